"""Task: an algorithm with its inputs, and the draw of balanced pairs from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from interp.causal.data import InterchangeDataset, Pool, Splits
from interp.causal.models import OUTPUT, CausalModel
from interp.hooks.errors import ArgumentError, DegenerateDataError, UnmatchedVariableError

Inputs = dict[str, Tensor]
_ROUNDS, _PATIENCE = 4000, 50  # redraws of a source before its base is drawn again


@dataclass(frozen=True, eq=False)
class Task:
    """An algorithm, a distribution of its inputs, and what the network is given for them.

    Attributes:
        name: Which.
        causal_model: The algorithm.
        draw: n inputs of the algorithm, from a generator.
        encode: What the network is given for these inputs: a tensor [n, ...], or a list of texts.
        variables: Which variables pairs intervene on.
        source: Inputs of a source for a variable, given the bases; by default a draw of its own.
        flip: Share of pairs whose label the intervention changes, or None to take what comes.
        groups: What may not be shared between splits, of n inputs.
        candidates: Token of each label, of n inputs.
        width: Number of features of the network's input, where it is a vector.
    """

    name: str
    causal_model: CausalModel
    draw: Callable[[int, Generator], Inputs] = field(repr=False)
    encode: Callable[[Inputs], Any] = field(repr=False)
    variables: tuple[str, ...] = ()
    source: Callable[[str, Inputs, Generator], Inputs] | None = field(default=None, repr=False)
    flip: float | None = None
    groups: Callable[[Inputs], dict[str, Tensor]] | None = field(default=None, repr=False)
    candidates: Callable[[Inputs], Tensor] | None = field(default=None, repr=False)
    width: int | None = None

    def __post_init__(self):
        """Take all variables where none are named."""
        if not self.variables:
            object.__setattr__(self, "variables", self.causal_model.variables)

    def pool(self, inputs: Inputs) -> Pool:
        """These inputs, encoded, with the value of every node."""
        return Pool(
            self.encode(inputs), self.causal_model.run(inputs), self.groups(inputs) if self.groups else {},
            self.candidates(inputs) if self.candidates else None,
        )  # fmt: skip

    def labelled(self, n: int, seed: int) -> tuple[Any, Tensor]:
        """Return n inputs of the network with their labels, to train or test it on."""
        inputs = self.draw(n, Generator().manual_seed(seed))
        return self.encode(inputs), self.causal_model.run(inputs)[OUTPUT]

    def sample(
        self, n: int, *, seed: int, split: str = "test", interventions: str | Sequence[Sequence[str]] = "all",
        flip: float | str | None = "task", inputs: int | None = None,
    ) -> InterchangeDataset:  # fmt: skip
        """Draw n pairs.

        The set of intervened variables is drawn first, uniformly; then, where ``flip`` is a share, a coin says whether
        the label must change, and sources are drawn again until it does (and the base too, where none makes it).

        Args:
            n: Number of pairs.
            seed: Of the draw.
            split: Name of the split.
            interventions: ``all`` sets of variables but the empty one, or a list of sets.
            flip: Share of pairs whose label changes, or None; by default the task's.
            inputs: Draw only so many inputs, and pair them by number (each is used in many pairs); by default each pair
                has inputs of its own.

        Raises:
            ArgumentError: If n, the share or the sets are not legal, or ``inputs`` is given for a task whose sources
                depend on their bases.
            DegenerateDataError: If no source changes, or keeps, a label.
        """
        share = self.flip if flip == "task" else flip
        if n < 1 or (inputs is not None and inputs < 2) or not (share is None or 0 <= float(share) <= 1):
            raise ArgumentError(f"n={n}, inputs={inputs}, flip={flip!r}", "at least 1, at least 2, a share or None")
        if inputs is not None and self.source is not None:
            raise ArgumentError(
                f"inputs={inputs} of {self.name}, whose sources depend on their bases", "inputs=None", "more pairs"
            )
        generator = Generator().manual_seed(seed)
        sets = self._sets(interventions)
        chosen = sets[torch.randint(len(sets), (n,), generator=generator)]
        coin = None if share is None else torch.rand(n, generator=generator) < float(share)
        if inputs is not None:
            pool = self.pool(self.draw(inputs, generator))
            base, sources = self._numbers(pool, chosen, coin, generator)
        else:
            drawn = self._fresh(chosen, coin, generator)
            pool, base, sources = self._pooled(drawn, chosen)
        data = InterchangeDataset.pair(
            self.causal_model, pool, base, sources, chosen, variables=self.variables, split=split, seed=seed
        )
        data.check()
        return data

    def splits(self, train: int, validation: int = 10_000, test: int = 10_000, *, seed: int = 0, **options) -> Splits:
        """Draw train, validation and test pairs from seeds of their own.

        Raises:
            DegenerateDataError: If they share a pair.
        """
        sizes = {"train": train, "validation": validation, "test": test}
        made = {
            name: self.sample(n, seed=3 * seed + i, split=name, **options) for i, (name, n) in enumerate(sizes.items())
        }
        return Splits(made["train"], made["validation"], {"test": made["test"]})

    def with_variables(self, *variables: str) -> "Task":
        """The same task with pairs that intervene on these variables only."""
        if unknown := [v for v in variables if v not in self.causal_model.variables]:
            raise UnmatchedVariableError(f"variables {unknown}", f"some of {', '.join(self.causal_model.variables)}")
        return replace(self, variables=variables)

    def _sets(self, interventions: str | Sequence[Sequence[str]]) -> Tensor:
        k = len(self.variables)
        if interventions == "all":
            return torch.tensor([[bool(s >> i & 1) for i in range(k)] for s in range(1, 2**k)])
        sets = [tuple(s) for s in interventions]
        if isinstance(interventions, str) or not sets or any(v not in self.variables for s in sets for v in s):
            raise UnmatchedVariableError(
                f"interventions={interventions!r}", f"'all', or sets of {', '.join(self.variables)}"
            )
        return torch.tensor([[v in s for v in self.variables] for s in sets])

    def _source(self, variable: str, base: Inputs, generator: Generator) -> Inputs:
        if self.source is not None:
            return self.source(variable, base, generator)
        return self.draw(len(next(iter(base.values()))), generator)

    def _fresh(self, chosen: Tensor, coin: Tensor | None, generator: Generator) -> dict[str, Inputs]:
        """Inputs of bases and of each variable's sources, by ``base`` and the variables' names."""
        n = len(chosen)
        base = self.draw(n, generator)
        drawn = {"base": base, **{v: self._source(v, base, generator) for v in self.variables}}
        if coin is None:
            return drawn
        open_rows = self._wrong(drawn, chosen, coin).nonzero().flatten()
        for attempt in range(_ROUNDS):
            if not len(open_rows):
                return drawn
            base = _rows(drawn["base"], open_rows)
            if attempt % _PATIENCE == _PATIENCE - 1:
                base = self.draw(len(open_rows), generator)
                _write(drawn["base"], open_rows, base)
            for v in self.variables:
                _write(drawn[v], open_rows, self._source(v, base, generator))
            part = {name: _rows(inputs, open_rows) for name, inputs in drawn.items()}
            open_rows = open_rows[self._wrong(part, chosen[open_rows], coin[open_rows])]
        raise self._stuck(len(open_rows))

    def _wrong(self, drawn: Mapping[str, Inputs], chosen: Tensor, coin: Tensor) -> Tensor:
        """Where the label changes and should not, or the other way round."""
        before = self.causal_model.run(drawn["base"])[OUTPUT]
        after = self.causal_model.interchange(
            drawn["base"], {v: drawn[v] for v in self.variables},
            {v: chosen[:, k] for k, v in enumerate(self.variables)},
        )  # fmt: skip
        return (before != after) != coin

    def _pooled(self, drawn: Mapping[str, Inputs], chosen: Tensor) -> tuple[Pool, Tensor, Tensor]:
        """One pool of the bases and of the sources that are used, and their numbers."""
        n, start = len(chosen), len(chosen)
        parts, sources = [drawn["base"]], torch.zeros(chosen.shape, dtype=torch.int64)
        for k, v in enumerate(self.variables):
            rows = chosen[:, k].nonzero().flatten()
            sources[rows, k] = torch.arange(start, start + len(rows))
            parts.append(_rows(drawn[v], rows))
            start += len(rows)
        inputs = {i: torch.cat([p[i] for p in parts]) for i in parts[0]}
        if all(value.ndim == 1 and not value.is_floating_point() for value in inputs.values()):
            return self._merged(inputs, n, sources)
        return self.pool(inputs), torch.arange(n), sources

    def _merged(self, inputs: Inputs, n: int, sources: Tensor) -> tuple[Pool, Tensor, Tensor]:
        """Inputs that are numbers of words or digits come again and again: each is in the pool once."""
        columns = torch.stack([value.long() for value in inputs.values()], 1)
        kept, place = columns.unique(dim=0, return_inverse=True)
        unique = {name: kept[:, i].to(inputs[name].dtype) for i, name in enumerate(inputs)}
        return self.pool(unique), place[:n], place[sources]

    def _numbers(self, pool: Pool, chosen: Tensor, coin: Tensor | None, generator: Generator) -> tuple[Tensor, Tensor]:
        """Numbers of bases and sources in a pool, drawn again until each coin is obeyed."""
        n, m = len(chosen), len(pool)
        base = torch.randint(m, (n,), generator=generator)
        sources = torch.randint(m, chosen.shape, generator=generator)
        open_rows = torch.arange(0 if coin is None else n)
        for attempt in range(_ROUNDS):
            if coin is not None and len(open_rows):
                pairs = InterchangeDataset.pair(
                    self.causal_model, pool, base[open_rows], sources[open_rows], chosen[open_rows],
                    variables=self.variables,
                )  # fmt: skip
                open_rows = open_rows[pairs.flips != coin[open_rows]]
            if not len(open_rows):
                return base, sources
            sources[open_rows] = torch.randint(m, (len(open_rows), chosen.shape[1]), generator=generator)
            if attempt % _PATIENCE == _PATIENCE - 1:
                base[open_rows] = torch.randint(m, (len(open_rows),), generator=generator)
        raise self._stuck(len(open_rows))

    def _stuck(self, count: int) -> DegenerateDataError:
        return DegenerateDataError(
            f"{self.name}: {count} pairs whose label cannot be made to change, or to stay, as asked",
            "inputs from which both can be drawn", "draw with flip=None",
        )  # fmt: skip


def _rows(inputs: Inputs, rows: Tensor) -> Inputs:
    return {name: value[rows] for name, value in inputs.items()}


def _write(inputs: Inputs, rows: Tensor, new: Inputs) -> None:
    for name, value in new.items():
        inputs[name][rows] = value
