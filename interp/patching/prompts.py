"""Clean and corrupt prompts, and what is measured on them.

Pairs of one length run together, so that no forward call ever holds padding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.errors import ArgumentError, SiteUnavailableError
from interp.hooks.inputs import Batch
from interp.hooks.interventions import PlanLike
from interp.hooks.model import Model
from interp.observables.observable import Observable
from interp.observables.sequences import SequenceObservable

Direction = Literal["denoise", "noise"]
Side = Literal["clean", "corrupt"]
Metric = Observable | Sequence[Observable] | Callable[[Tensor], Tensor] | Literal["kl"]

_PLAIN = {"input_ids", "attention_mask", "position_ids", "use_cache"}
_LOGIT_BYTES, _MOST_ROWS = 256 * 2**20, 64


def sides(direction: str) -> tuple[Side, Side]:
    """Return (base, source): the run that is changed, and the run whose values are put into it.

    Raises:
        ArgumentError: If the direction is neither ``denoise`` nor ``noise``.
    """
    if direction not in ("denoise", "noise"):
        raise ArgumentError(
            f"direction={direction!r}", "'denoise' (clean values into the corrupt run) or 'noise' (the reverse)"
        )
    return ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")


@dataclass(frozen=True, eq=False)
class Measure:
    """What is read from the logits of each row.

    Attributes:
        name: In tables.
        functions: One for all pairs, or one for each; none for the divergence from the clean distribution.
        position: Whose next-token logits, or None for those of all positions.
    """

    name: str
    functions: tuple[Callable[[Tensor], Any], ...]
    position: int | None

    @classmethod
    def of(cls, metric: Any, position: int | None, n_pairs: int) -> "Measure":
        """Return the measure that a user's metric stands for.

        Raises:
            ArgumentError: If it is of no legal kind, or a list of another length than the pairs.
        """
        if getattr(metric, "site", None) is not None:
            raise ArgumentError(f"an observable of {metric.site}", "a metric of the logits")
        if isinstance(metric, SequenceObservable) and position is not None:
            raise ArgumentError(f"a sequence with position={position}", "position=None: it names its own positions")
        kl = isinstance(metric, str) and metric == "kl"
        if position is None and (kl or not callable(metric) or isinstance(metric, Observable)):
            raise ArgumentError("position=None", "one position", "only a function may read the logits of all positions")
        if kl:
            return cls("KL(clean ‖ run)", (), position)
        if callable(metric):
            return cls(getattr(metric, "name", getattr(metric, "__name__", "metric")), (metric,), position)
        if not isinstance(metric, (list, tuple)) or not all(isinstance(m, Observable) for m in metric):
            raise ArgumentError(
                f"metric={metric!r:.60}", "an Observable, one for each pair, a function of logits, or 'kl'"
            )
        if len(metric) != n_pairs:
            raise ArgumentError(f"{len(metric)} observables for {n_pairs} pairs", "one for each")
        return cls(metric[0].name if n_pairs == 1 else f"{metric[0].name}, ...", tuple(metric), position)

    @property
    def is_divergence(self) -> bool:
        """Whether it is KL(clean ‖ run)."""
        return not self.functions

    def at(self, logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, "row ..."]:
        """The logits that are measured, in float32 or better."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.position is None else logits[:, self.position]

    def __call__(
        self, logits: Float[Tensor, "row pos vocab"], pairs: list[int], clean: Float[Tensor, "row vocab"] | None
    ) -> Float[Tensor, "row"]:
        """Return one number for each row.

        Args:
            logits: Of the rows.
            pairs: Which pair each row belongs to.
            clean: Log-probabilities of the clean runs, for the divergence.

        Raises:
            ArgumentError: If a function gives something else than one number for each row.
        """
        read = self.at(logits)
        if clean is not None:
            # kl_div takes log q first; its default reduction would divide by the size of the vocabulary.
            log_q = torch.log_softmax(read, -1)
            return torch.nn.functional.kl_div(log_q, clean.to(log_q), reduction="none", log_target=True).sum(-1)
        function, *others = self.functions
        if others:
            return torch.stack([self.functions[p](row) for p, row in zip(pairs, read, strict=True)])
        found = function(read)
        if not isinstance(found, Tensor) or found.shape != (len(pairs),):
            given = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ArgumentError(
                f"metric {self.name} gave {given} for logits {list(read.shape)}", f"a tensor [{len(pairs)}]"
            )
        return found


class Pairs:
    """Aligned prompts of equal length, pair by pair.

    Args:
        model: A model of tokens with logits.
        clean: One prompt or a list of them.
        corrupt: As many, each as long as its clean one.
        metric: What is measured.
        position: Whose logits.

    Raises:
        ArgumentError: If numbers or lengths of prompts differ.
        PositionError: If the position lies outside a prompt.
        SiteUnavailableError: If the model has no token inputs or no logits.
    """

    def __init__(self, model: Model, clean: Any, corrupt: Any, metric: Any, position: int | None):
        self.model = model
        if model.bindings is None or "logits" not in model.bindings.by_address or model.bindings.n_layers == 0:
            raise SiteUnavailableError(
                f"patching {type(model.module).__name__} ({model.family})", "a layout with blocks and logits",
                "model.run(inputs, plan=[interp.Patch(...)]) patches any module",
            )  # fmt: skip
        self.batch = model.batch(clean)
        self.prompts = {"clean": _rows(self.batch), "corrupt": _rows(model.batch(corrupt))}
        counts = {side: len(rows) for side, rows in self.prompts.items()}
        if counts["clean"] != counts["corrupt"]:
            raise ArgumentError(f"{counts['clean']} clean prompts and {counts['corrupt']} corrupt", "aligned lists")
        for index, (a, b) in enumerate(zip(*self.prompts.values(), strict=True)):
            if len(a) != len(b):
                of = f" in pair {index}" if counts["clean"] > 1 else ""
                raise ArgumentError(
                    f"clean has {len(a)} tokens, corrupt {len(b)}{of}; patching needs equal lengths",
                    "prompts that match position by position", "choose words of as many tokens",
                )  # fmt: skip
        self.measure = Measure.of(metric, position, len(self))
        if position is not None:
            self.batch.positions(position)

    def __len__(self) -> int:
        return len(self.prompts["clean"])

    @property
    def dtype(self) -> torch.dtype:
        """dtype of what is measured."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each pair."""
        return [len(row) for row in self.prompts["clean"]]

    def rows(self, batch_size: int | None) -> int:
        """How many rows run together: as asked for, or as many as keep their logits within 256 MiB, at most 64.

        Raises:
            ArgumentError: If the batch size is below 1.
        """
        if batch_size is not None:
            if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
                raise ArgumentError(f"batch_size={batch_size!r}", "an int of at least 1")
            return batch_size
        vocab = self.model.bindings.sizes["vocab"]  # type: ignore[union-attr]
        return max(1, min(_MOST_ROWS, _LOGIT_BYTES // (4 * vocab * max(self.lengths))))

    def chunks(self, size: int) -> Iterator["Chunk"]:
        """Pairs that run together: of one length, at most so many."""
        for length in dict.fromkeys(self.lengths):
            same = [i for i, n in enumerate(self.lengths) if n == length]
            for start in range(0, len(same), size):
                yield Chunk(self, same[start : start + size])


class Chunk:
    """Some pairs of one length, with what was measured on their two runs.

    Attributes:
        pairs: Which.
        measured: By side, once that side has run.
    """

    def __init__(self, of: Pairs, pairs: list[int]):
        self.of, self.pairs = of, pairs
        self.measured: dict[Side, Tensor] = {}
        self._clean: Tensor | None = None

    def ids(self, side: Side, members: list[int] | None = None) -> Tensor:
        """Token ids [row, pos] of one side, for all pairs or for members of the chunk, repeated as named."""
        rows = [self.of.prompts[side][p] for p in self.pairs]
        return torch.stack(rows if members is None else [rows[m] for m in members])

    @torch.no_grad()
    def run(self, side: Side, sites: Sequence[str] = ()) -> Activations:
        """Run one side as it is, and read sites."""
        acts = self.of.model.capture(self.ids(side), [*sites, "logits"])
        if side == "clean" and self.of.measure.is_divergence:
            self._clean = torch.log_softmax(self.of.measure.at(acts["logits"]), -1)
        self.measured[side] = self.read(acts["logits"], list(range(len(self.pairs))))
        return acts

    def gradients(
        self, side: Side, sites: Sequence[str], members: list[int] | None = None, plan: PlanLike = ()
    ) -> tuple[Activations, Float[Tensor, "row"]]:
        """Run one side under a plan, and read sites with the measure's gradient there; and the measure itself."""
        rows = list(range(len(self.pairs))) if members is None else members
        self._see_clean()
        found: list[Tensor] = []

        def target(logits: Tensor) -> Tensor:
            found.append(self.read(logits, rows))
            return found[0]

        acts = self.of.model.capture(self.ids(side, rows), list(sites), plan=plan, gradient_of=target)
        if members is None and not plan:
            self.measured[side] = found[0].detach()
        return acts, found[0].detach()

    def patched(self, side: Side, members: list[int], plan: PlanLike) -> Float[Tensor, "row"]:
        """Run rows of one side under a plan and measure them."""
        return self.read(self.of.model.run(self.ids(side, members), plan=plan), members)

    def read(self, logits: Float[Tensor, "row pos vocab"], members: list[int]) -> Float[Tensor, "row"]:
        """The measure of rows that belong to members of the chunk."""
        self._see_clean()
        clean = None if self._clean is None else self._clean[members]
        return self.of.measure(logits, [self.pairs[m] for m in members], clean).to(self.of.dtype)

    def _see_clean(self) -> None:
        if self.of.measure.is_divergence and self._clean is None:
            self.run("clean")


def _rows(batch: Batch) -> list[Tensor]:
    """Token ids of each prompt, without padding."""
    if batch.ids is None or batch.mask is None:
        raise ArgumentError("inputs without tokens", "texts or token ids")
    if extra := set(batch.kwargs) - _PLAIN:
        raise ArgumentError(f"inputs with {', '.join(sorted(extra))}", "texts or token ids alone")
    return [ids[keep] for ids, keep in zip(batch.ids, batch.mask, strict=True)]
