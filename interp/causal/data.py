"""Pairs for interchange interventions: pools of inputs, and bases and sources by their numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from interp.causal.models import OUTPUT, CausalModel
from interp.hooks.errors import DegenerateDataError, ShapeMismatchError, UnmatchedVariableError


@dataclass(frozen=True, eq=False)
class Pool:
    """Unique inputs, each with the values of the algorithm's nodes. Pairs refer to them by number.

    Attributes:
        inputs: What the network is given: a tensor [m, ...], or a list of texts or token ids.
        settings: The value of every node on every input.
        groups: What may not be shared between splits: for each kind (name, template) the items of every input [m, k].
        candidates: For language models, the token of each label [m, labels], of a base's own input; else None.
    """

    inputs: Any = field(repr=False)
    settings: dict[str, Tensor] = field(repr=False)
    groups: dict[str, Tensor] = field(default_factory=dict, repr=False)
    candidates: Int64[Tensor, "m labels"] | None = field(default=None, repr=False)

    def __post_init__(self):
        """Refuse values that are not one for each input.

        Raises:
            ShapeMismatchError: Naming what has another number.
        """
        counts = {name: len(values) for name, values in (*self.settings.items(), *self.groups.items())}
        counts |= {} if self.candidates is None else {"candidates": len(self.candidates)}
        if wrong := {name: count for name, count in counts.items() if count != len(self.inputs)}:
            raise ShapeMismatchError(f"{len(self.inputs)} inputs with values of {wrong}", "one value for each input")

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Int64[Tensor, "k"]) -> Any:
        """The network's inputs of these numbers."""
        return self.inputs[rows] if isinstance(self.inputs, Tensor) else [self.inputs[i] for i in rows.tolist()]


@dataclass(frozen=True, eq=False)
class InterchangeDataset:
    """Interchange interventions with the labels that the algorithm gives them.

    Pair i sets, in the run of input ``base[i]``, each variable k with ``chosen[i, k]`` to its value in the run of input
    ``sources[i, k]``. A source of a variable that is not chosen is the base itself, and is never run.

    Attributes:
        causal_model: The algorithm.
        variables: The variables, in the order of the columns.
        pool: The inputs.
        base: Number of each base.
        sources: Number of each source.
        chosen: Which variables are intervened on.
        labels: The algorithm's output under the intervention.
        split: ``train``, ``validation``, ``test`` or another name.
        seed: Of the draw.
    """

    causal_model: CausalModel
    variables: tuple[str, ...]
    pool: Pool = field(repr=False)
    base: Int64[Tensor, "n"] = field(repr=False)
    sources: Int64[Tensor, "n variables"] = field(repr=False)
    chosen: Bool[Tensor, "n variables"] = field(repr=False)
    labels: Int64[Tensor, "n"] = field(repr=False)
    split: str = "test"
    seed: int | None = None

    @classmethod
    def pair(
        cls, causal_model: CausalModel, pool: Pool, base: Int64[Tensor, "n"], sources: Int64[Tensor, "n variables"],
        chosen: Bool[Tensor, "n variables"], *, variables: Sequence[str] | None = None, split: str = "test",
        seed: int | None = None,
    ) -> "InterchangeDataset":  # fmt: skip
        """Pair inputs of a pool, and ask the algorithm for the labels.

        Raises:
            UnmatchedVariableError: If a variable is not the algorithm's, or the pool has no values of it.
            ShapeMismatchError: If there is not one source for each base and variable, or a number is no input's.
            DegenerateDataError: If there are no pairs.
        """
        names = tuple(variables or causal_model.variables)
        if unknown := [v for v in names if v not in causal_model.variables]:
            raise UnmatchedVariableError(f"variables {unknown}", f"some of {', '.join(causal_model.variables)}")
        if missing := [v for v in (*causal_model.inputs, *names, OUTPUT) if v not in pool.settings]:
            raise UnmatchedVariableError(f"a pool without values of {', '.join(missing)}", "Task.pool(inputs)")
        if sources.shape != (len(base), len(names)) or chosen.shape != sources.shape:
            raise ShapeMismatchError(
                f"{len(base)} bases, sources {list(sources.shape)}, chosen {list(chosen.shape)}",
                f"sources and chosen [{len(base)}, {len(names)}]",
            )
        if not len(base):
            raise DegenerateDataError(f"split {split!r} without pairs", "at least one")
        sources = torch.where(chosen, sources, base[:, None])
        used = torch.cat([base, sources.flatten()])
        if int(used.min()) < 0 or int(used.max()) >= len(pool):
            raise ShapeMismatchError(f"inputs {int(used.min())}..{int(used.max())}", f"0..{len(pool) - 1}, the pool's")
        labels = _labels(causal_model, names, pool, base, sources, chosen)
        return cls(causal_model, names, pool, base, sources, chosen, labels, split, seed)

    def __len__(self) -> int:
        return len(self.base)

    @property
    def base_labels(self) -> Int64[Tensor, "n"]:
        """The algorithm's output on the bases, without intervention."""
        return self.pool.settings[OUTPUT][self.base]

    @property
    def flips(self) -> Bool[Tensor, "n"]:
        """Whether the intervention changes the label."""
        return self.labels != self.base_labels

    @property
    def candidates(self) -> Int64[Tensor, "n labels"] | None:
        """The token of each label of each pair, for language models."""
        return None if self.pool.candidates is None else self.pool.candidates[self.base]

    def intervened(self) -> list[str]:
        """For each pair the names of the intervened variables, joined by +."""
        names = {}
        for row in torch.unique(self.chosen, dim=0):
            names[tuple(row.tolist())] = "+".join(v for v, c in zip(self.variables, row.tolist(), strict=True) if c)
        return [names[tuple(row)] or "none" for row in self.chosen.tolist()]

    def take(self, rows: Tensor, split: str | None = None) -> "InterchangeDataset":
        """These pairs of the same pool: numbers, or a mask."""
        picked = {name: getattr(self, name)[rows] for name in ("base", "sources", "chosen", "labels")}
        return replace(self, **picked, split=split or self.split)

    def shuffled(self, seed: int = 0) -> "InterchangeDataset":
        """The same pairs with their labels permuted: a control that only memory can pass."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return replace(self, labels=self.labels[order])

    def under(self, other: CausalModel, variables: Sequence[str] | None = None) -> "InterchangeDataset":
        """The same bases, sources and choices with the labels of another algorithm on the same inputs.

        Args:
            other: Its variables take the places of this one's, in order.
            variables: Of the other, if not all.

        Raises:
            ShapeMismatchError: If it has another number of variables.
        """
        names = tuple(variables or other.variables)
        if len(names) != len(self.variables):
            raise ShapeMismatchError(f"{other.name} with variables {names}", f"{len(self.variables)} variables")
        settings = other.run({i: self.pool.settings[i] for i in other.inputs})
        pool = replace(self.pool, settings=settings)
        labels = _labels(other, names, pool, self.base, self.sources, self.chosen)
        return replace(self, causal_model=other, variables=names, pool=pool, labels=labels)

    def without_intervention(self) -> "InterchangeDataset":
        """The bases alone: nothing is intervened on."""
        nothing = torch.zeros_like(self.chosen)
        sources = self.base[:, None].expand_as(self.sources)
        return replace(self, chosen=nothing, sources=sources, labels=self.base_labels)

    def check(self) -> None:
        """Refuse pairs from which nothing can be concluded.

        Raises:
            DegenerateDataError: If all labels are equal, no label flips, or candidates of a pair are one token.
        """
        for name in sorted(set(intervened := self.intervened())):
            rows = torch.tensor([i == name for i in intervened])
            if len(self.labels[rows].unique()) < 2 and int(rows.sum()) > 1:
                raise DegenerateDataError(f"{self.split}: all labels equal where {name} is set", "both labels")
        if not self.flips.any():
            raise DegenerateDataError(f"{self.split}: no intervention changes a label", "pairs that flip")
        self.refuse_shared_tokens()

    def refuse_shared_tokens(self) -> None:
        """Refuse pairs two of whose answers are one token.

        Raises:
            DegenerateDataError: Saying how many.
        """
        if self.candidates is not None:
            same = self.candidates.sort(1).values.diff(dim=1).eq(0).any(1)
            if same.any():
                raise DegenerateDataError(
                    f"{self.split}: {int(same.sum())} pairs whose answers begin with one token",
                    "answers that differ in their first token", "drop these inputs",
                )  # fmt: skip

    def __repr__(self) -> str:
        share = float(self.flips.float().mean())
        return f"InterchangeDataset({self.split}: {len(self)} pairs of {len(self.pool)} inputs, {share:.0%} flip)"


@dataclass(frozen=True)
class Splits:
    """Data sets that share nothing that they must not share.

    Attributes:
        train: To fit.
        validation: To choose.
        tests: To report, by name: ``test``, and those with unseen names, frames or other shifts.
        disjoint: Kinds of groups that train and validation share with no test that is named after them.
    """

    train: InterchangeDataset
    validation: InterchangeDataset
    tests: Mapping[str, InterchangeDataset]
    disjoint: tuple[str, ...] = ()

    def __post_init__(self):
        """Refuse splits that leak.

        Raises:
            DegenerateDataError: If a pair is in two splits, or a group that is to be disjoint is.
        """
        fitted = [self.train, self.validation]
        for one, other in [(self.train, self.validation), *((a, t) for a in fitted for t in self.tests.values())]:
            refuse_shared_pairs(one, other)
        for kind in self.disjoint:
            for test in [t for name, t in self.tests.items() if kind in name] or list(self.tests.values()):
                for part in fitted:
                    refuse_shared_groups(part, test, kind)

    @property
    def test(self) -> InterchangeDataset:
        """The first of the tests."""
        return next(iter(self.tests.values()))

    def __repr__(self) -> str:
        return "\n".join(map(repr, (self.train, self.validation, *self.tests.values())))


def refuse_shared_pairs(one: InterchangeDataset, other: InterchangeDataset) -> None:
    """Refuse two splits that hold the same base with the same sources.

    Raises:
        DegenerateDataError: Saying how many.
    """
    if one.pool is not other.pool and one.pool.inputs is not other.pool.inputs:
        shared = set(_pair_keys(one)) & set(_pair_keys(other)) if _may_share(one, other) else set()
    else:
        key = lambda d: set(map(tuple, torch.cat([d.base[:, None], d.sources, d.chosen], 1).tolist()))
        shared = key(one) & key(other)
    if shared:
        raise DegenerateDataError(
            f"{len(shared)} pairs in both {one.split} and {other.split}", "splits without a common pair",
            "draw the splits from disjoint inputs",
        )  # fmt: skip


def refuse_shared_groups(one: InterchangeDataset, other: InterchangeDataset, kind: str) -> None:
    """Refuse two splits whose inputs share an item (a name, a frame) that is declared disjoint.

    Raises:
        DegenerateDataError: Naming the first items; or if the inputs have no such groups.
    """
    if kind not in one.pool.groups or kind not in other.pool.groups:
        raise DegenerateDataError(f"disjoint={kind!r}", f"one of {', '.join(one.pool.groups) or 'no groups'}")
    shared = _items(one, kind) & _items(other, kind)
    if shared:
        raise DegenerateDataError(
            f"{kind} {sorted(shared)[:5]} in both {one.split} and {other.split}", f"splits without a common {kind}"
        )


def _items(data: InterchangeDataset, kind: str) -> set[int]:
    used = torch.cat([data.base, data.sources[data.chosen]]).unique()
    return set(data.pool.groups[kind][used].flatten().tolist())


def _may_share(one: InterchangeDataset, other: InterchangeDataset) -> bool:
    """Whether a base may be common: vectors are compared by their sums first, since there are many."""
    pools = one.pool.inputs, other.pool.inputs
    if not all(isinstance(p, Tensor) and p[0].shape == pools[0][0].shape for p in pools):
        return not any(isinstance(p, Tensor) for p in pools)
    sums = [pool.flatten(1).double().sum(1)[data.base] for pool, data in zip(pools, (one, other), strict=True)]
    return bool(torch.isin(*sums).any())


def _pair_keys(data: InterchangeDataset) -> list[tuple[Any, ...]]:
    vectors = isinstance(data.pool.inputs, Tensor)
    texts = [row.tobytes() for row in data.pool.inputs.numpy()] if vectors else [str(text) for text in data.pool.inputs]
    rows = zip(data.base.tolist(), data.sources.tolist(), data.chosen.tolist(), strict=True)
    return [(texts[b], *(texts[i] for i in s), *c) for b, s, c in rows]


def _labels(
    model: CausalModel, variables: tuple[str, ...], pool: Pool, base: Tensor, sources: Tensor, chosen: Tensor
) -> Int64[Tensor, "n"]:
    """The algorithm's labels under the interventions, from the values in the pool."""
    do = {v: pool.settings[v][sources[:, k]] for k, v in enumerate(variables)}
    where = {v: chosen[:, k] for k, v in enumerate(variables)}
    return model.run({i: pool.settings[i][base] for i in model.inputs}, do, where)[OUTPUT]
