"""Attribution over a dataset: mean and standard error of each contribution, in memory that does not grow with it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.direct import Attribution, from_parts, read_observables
from interp.attribution.streams import readers_of
from interp.attribution.units import EMBEDDINGS, Detail, Readers, check_complete
from interp.hooks.budget import bytes_of
from interp.hooks.errors import ArgumentError, PositionError, SizeError
from interp.hooks.inputs import Batch
from interp.hooks.model import Model
from interp.hooks.table import Rows, Table
from interp.propagation.starts import pre_cap_note

_KEPT = (
    *EMBEDDINGS, "attention", "heads", "kv_heads", "attention_bias", "mlps", "neurons", "mlp_bias", "constant",
    "rounding", "measurement",
)  # fmt: skip
_PLACES = {
    "attention": "attention", "head": "heads", "kv_head": "kv_heads", "mlp": "mlps", "neuron": "neurons",
    "constant": "constant", "rounding": "rounding",
}  # fmt: skip


@dataclass
class AttributionSummary(Rows):
    """Count, mean and spread of each contribution over examples: an accumulator that can be continued and merged.

    Attributes:
        observables: Names.
        unit: How finely: ``component``, ``head``, ``kv_head``, ``neuron``, or two as in ``head+neuron``.
        n: Number of examples: prompts, or with ``position="all"`` their tokens.
        mean: By part (``heads``, ``mlps``, ``measurement``, ...), [obs, ...] in float64.
        m2: Sums of squared deviations from the mean, likewise.
        note: What to know when reading the numbers.

    Example:
        >>> import torch
        >>> one, two = AttributionSummary(["a"], "component"), AttributionSummary(["a"], "component")
        >>> one.update({"mlps": torch.tensor([[[1.0], [2.0]]])})
        >>> two.update({"mlps": torch.tensor([[[6.0]]])})
        >>> both = one.merge(two)
        >>> both.n, both.mean["mlps"].item()
        (3, 3.0)
    """

    observables: list[str]
    unit: str = "head"
    n: int = 0
    mean: dict[str, Tensor] = field(default_factory=dict, repr=False)
    m2: dict[str, Tensor] = field(default_factory=dict, repr=False)
    note: str = ""

    def __post_init__(self):
        """Refuse units that have no mean over prompts.

        Raises:
            ArgumentError: If sources are asked for, which differ between prompts.
        """
        if Detail.of(self.unit).attention == "source":
            raise ArgumentError(f"unit={self.unit!r} over a dataset", "'component', 'head', 'kv_head' or 'neuron'")

    def update(self, parts: Mapping[str, Float[Tensor, "obs example ..."]]) -> None:
        """Take in examples. All of them or, where the parts do not fit, none.

        Args:
            parts: Contributions by part; the axes behind the example's are the part's.

        Raises:
            ArgumentError: If the parts are others than before, or of another shape.
        """
        values = {key: value.detach().cpu().double() for key, value in parts.items()}
        mean = {key: value.mean(1) for key, value in values.items()}
        m2 = {key: (value - mean[key][:, None]).square().sum(1) for key, value in values.items()}
        counts = {value.shape[1] for value in values.values()}
        if len(counts) != 1:
            raise ArgumentError(f"parts of {sorted(counts)} examples", "as many in each part")
        both = self.merge(AttributionSummary(self.observables, self.unit, counts.pop(), mean, m2))
        self.n, self.mean, self.m2 = both.n, both.mean, both.m2

    def merge(self, other: "AttributionSummary") -> "AttributionSummary":
        """Return the summary of this one's examples and another's: shards and interrupted runs add up.

        Raises:
            ArgumentError: If the summaries are of different observables, units or parts.
        """
        if (self.observables, self.unit) != (other.observables, other.unit):
            raise ArgumentError(
                f"summaries of {self.observables} by {self.unit} and {other.observables} by {other.unit}",
                "the same observables and unit",
            )
        if not self.n or not other.n:
            filled = self if self.n else other
            return AttributionSummary(
                self.observables, self.unit, filled.n, dict(filled.mean), dict(filled.m2), self.note or other.note
            )
        shapes = [{key: tuple(value.shape) for key, value in one.mean.items()} for one in (self, other)]
        if shapes[0] != shapes[1]:
            raise ArgumentError(f"parts {shapes[1]}", f"{shapes[0]}, as before", "one summary is of one model")
        n = self.n + other.n
        mean, m2 = {}, {}
        for key, here in self.mean.items():
            step = other.mean[key] - here
            mean[key] = here + step * (other.n / n)
            m2[key] = self.m2[key] + other.m2[key] + step.square() * (self.n * other.n / n)
        return AttributionSummary(self.observables, self.unit, n, mean, m2, self.note or other.note)

    # Reading ---------------------------------------------------------------------------------------------------------

    @property
    def standard_error(self) -> dict[str, Tensor]:
        """Of each mean, [obs, ...]; NaN below two examples."""
        free = self.n * (self.n - 1) if self.n > 1 else float("nan")
        return {key: (value / free).sqrt() for key, value in self.m2.items()}

    @property
    def completeness_error(self) -> float:
        """The largest, over observables, of the mean contributions' completeness errors."""
        return max(self.attribution(name).completeness_error for name in range(len(self.observables)))

    def attribution(self, observable: int | str = 0) -> Attribution:
        """Return the mean contributions to one observable, which sum to its mean measurement.

        Raises:
            ArgumentError: If there is no such observable, or no example yet.
        """
        index = self._index(observable)
        if not self.n:
            raise ArgumentError("a summary of no examples", "at least one")
        parts = {key: value[index] for key, value in self.mean.items()}
        note = "; ".join(filter(None, (self.note, f"mean of {self.n} examples")))
        return from_parts(self.observables[index], parts, -1, note, self.unit, None)

    def _index(self, observable: int | str) -> int:
        if isinstance(observable, str) and observable in self.observables:
            return self.observables.index(observable)
        if isinstance(observable, int) and 0 <= observable < len(self.observables):
            return observable
        raise ArgumentError(f"observable {observable!r}", f"one of {self.observables[:10]}, or its index")

    def to_records(self, observable: int | str | None = None, *, neurons: int = 10) -> list[dict[str, Any]]:
        """One row for each mean contribution, with its standard error; the means sum to the mean measurement.

        Args:
            observable: One of them; all by default.
            neurons: How many of each layer's largest neurons have rows of their own; what the others share has no
                standard error.
        """
        chosen = range(len(self.observables)) if observable is None else [self._index(observable)]
        errors = self.standard_error
        return [
            {"observable": self.observables[i], **row, "standard_error": _error(errors, row, i), "n": self.n}
            for i in chosen
            for row in self.attribution(i).to_records(neurons=neurons)
        ]

    def top(self, k: int = 10, observable: int | str = 0) -> Table:
        """Return the k largest mean contributions to one observable by absolute value."""
        rows = [r for r in self.to_records(observable, neurons=k) if r["kind"] != "rest"]
        rows = sorted(rows, key=lambda r: -abs(r["value"]))[:k]
        index = self._index(observable)
        mean = float(self.mean["measurement"][index])
        shown = ("component", "value", "standard_error")
        return Table(
            [{c: r[c] for c in shown} for r in rows], f"{self.observables[index]} = {mean:.4f}, mean of {self.n}"
        )

    def __repr__(self) -> str:
        return f"AttributionSummary({len(self.observables)} observables by {self.unit}, n={self.n})"

    def _repr_html_(self) -> str:
        return self.top(12)._repr_html_() if self.n else f"<p>{self!r}</p>"


def _error(errors: dict[str, Tensor], row: dict[str, Any], index: int) -> float | None:
    """The standard error of a row's mean."""
    if row["kind"] == "rest":
        return None
    if row["kind"] == "embedding":
        return float(errors[row["component"]][index])
    if row["kind"] == "bias":
        return float(errors["mlp_bias" if "MLP" in row["component"] else "attention_bias"][index, row["layer"]])
    value = errors[_PLACES[row["kind"]]][index]
    at = [row[axis] for axis in ("layer", "head", "neuron") if row.get(axis) is not None]
    return float(value[tuple(at)])


@torch.no_grad()
def attribute_dataset(
    model: Model, observables: Any, prompts: Iterable[Any], unit: str = "head", *, position: Any = "last",
    batch_size: int = 16, budget: int | str = "1GiB", padding_side: str | None = None,
    into: AttributionSummary | None = None,
) -> AttributionSummary:  # fmt: skip
    """Return mean and standard error of each contribution over many prompts, with a divisor for each.

    Prompts are read in batches and forgotten; the model stops in front of its unembedding, of which only the
    observables' rows are used. Every example is checked for completeness before it counts.

    Args:
        model: A decoder with a final norm and an unembedding.
        observables: As for `direct_attribution`.
        prompts: Texts, or lists of token ids, or a tensor of them; a generator will do.
        unit: As for `direct_attribution`, without ``source``.
        position: ``last`` (of each prompt's own tokens), an int (negative from each end), a substring that covers one
            token of each prompt, or a list with an int for each prompt. ``all``: every token of every prompt counts as
            an example, those of one prompt side by side; standard errors take them for independent.
        batch_size: How many prompts run together, at most.
        budget: Bytes for contributions, ``"512MiB"`` or a number; batches are made smaller to fit.
        padding_side: As for `Model.capture`.
        into: A summary to continue. It holds every finished batch if the call is interrupted, so that
            ``prompts[into.n:]`` are left to do (not with ``all``, where n counts tokens).

    Raises:
        ArgumentError: If there are no prompts, the unit does not exist, or ``into`` is of something else.
        PositionError: If a position lies outside a prompt, or is not one for each.
        SizeError: If one example does not fit the budget.
        CompletenessError: If an example's contributions do not sum to its measurement.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> obs = interp.Observable.logit_diff(model, " she", " he")
        >>> prompts = [f"So, {name} really is a great friend, isn't" for name in ("Emma", "Mary", "Anna")]
        >>> found = interp.attribute_dataset(model, obs, prompts)
        >>> found.n, found.completeness_error < 1e-5
        (3, True)
    """
    if isinstance(prompts, str) or batch_size < 1:
        raise ArgumentError(
            f"prompts={prompts!r:.40}, batch_size={batch_size}", "a list of prompts, and a batch of at least 1"
        )
    wanted = read_observables(observables)
    empty = AttributionSummary(list(wanted.names), unit)
    summary = empty if into is None else into
    summary.merge(empty)  # refuses a summary of something else
    readers = readers_of(model, wanted, Detail.of(unit))
    fitting = _fitting(readers, budget)
    summary.note = pre_cap_note(model) if wanted.site is None else ""
    for rows, where in _batches(prompts, position, min(batch_size, fitting)):
        for batch in _fit_to(model, rows, padding_side, fitting if position == "all" else None):
            place = readers.place(where)
            if place != "all":
                _one_each(batch, place)
            parts = readers.parts(readers.capture(batch, place, logits=False), logits=False)
            check_complete(model, wanted.names, parts)
            summary.update({key: parts[key] for key in _KEPT if key in parts})
    if not summary.n:
        raise ArgumentError("no prompts", "at least one")
    return summary


def _fit_to(model: Model, rows: list[Any], padding_side: str | None, tokens: int | None) -> Iterator[Batch]:
    """Prompts as one batch, or as several of which none has more padded tokens than fit."""
    batch = model.batch(rows, padding_side)
    assert batch.mask is not None
    if tokens is None or batch.mask.numel() <= tokens:
        yield batch
    elif len(rows) == 1:
        raise SizeError(
            f"a prompt of {batch.mask.numel()} tokens, all of them attributed", f"at most {tokens} in this budget",
            "take fewer observables, or a larger budget=",
        )  # fmt: skip
    else:
        for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            yield from _fit_to(model, part, padding_side, tokens)


def _batches(prompts: Iterable[Any], position: Any, size: int) -> Iterator[tuple[list[Any], Any]]:
    """Prompts in batches, each with its positions."""
    rows = iter(prompts)
    position = position.tolist() if hasattr(position, "tolist") else position
    each = None if isinstance(position, (int, str)) else iter(position)
    while chunk := list(islice(rows, size)):
        if each is None:
            yield chunk, position
            continue
        places = [[p[0] if isinstance(p, (list, tuple)) else p] for p in islice(each, len(chunk))]
        if len(places) != len(chunk):
            raise PositionError("fewer positions than prompts", "an int for each prompt")
        yield chunk, places
    if each is not None and next(each, None) is not None:
        raise PositionError("more positions than prompts", "an int for each prompt")


def _one_each(batch: Batch, where: Any) -> None:
    count = batch.positions(where).shape[1]
    if count != 1:
        raise PositionError(f"position={where!r}, which is {count} tokens", "one token of each prompt")


def _fitting(readers: Readers, budget: int | str) -> int:
    """How many examples' contributions fit: in the working dtype, in float64, and once more while they are summed."""
    sizes, layers, n = readers.weights.sizes, readers.model.n_layers, len(readers.observables)
    terms = layers * (4 + sizes["head"] + sizes["kv_head"] + (sizes["d_mlp"] if readers.detail.mlp == "neuron" else 0))
    captured = layers * (2 * sizes["d_model"] + sizes["head"] * sizes["d_head"] + sizes.get("d_mlp", 0))
    each, fixed, given = 24 * n * terms + 4 * captured, 64 * n * terms, bytes_of(budget)
    if fixed + each > given:
        raise SizeError(
            f"budget={budget!r}", f"{fixed + each} bytes for one example of {n} observables", "take fewer observables"
        )
    return (given - fixed) // each
