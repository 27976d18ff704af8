"""Averages of Jacobians over batches of data, until they settle; the averages of several workers merged."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.hooks.site import SiteLike
from interp.hooks.table import Rows
from interp.jacobians.jacobian import jacobian
from interp.jacobians.reductions import JacobianSummary
from interp.store.files import weights_sha256


@dataclass(frozen=True, eq=False)
class JacobianMean(Rows):
    """The mean of the Jacobians between two sites over many inputs.

    Attributes:
        total: Their sum, in float64.
        count: How many.
        changes: After each batch but the first, by how much it moved the mean: |new - old| / |new|.
        source: Site.
        target: Site.
        linearization: What was held.
        weights: SHA-256 of the model's weights.
        rows: Components of the target that were kept, as they were given; None for all.
        columns: Components of the source, likewise.
    """

    total: Float[Tensor, "out in"] = field(repr=False)
    count: int
    changes: Float[Tensor, "batch"] = field(repr=False)
    source: str
    target: str
    linearization: str
    weights: str = field(repr=False)
    rows: list[Any] | None = field(default=None, repr=False)
    columns: list[Any] | None = field(default=None, repr=False)

    @property
    def value(self) -> Float[Tensor, "out in"]:
        """The mean, in float64."""
        return self.total / self.count

    def merge(self, other: "JacobianMean") -> "JacobianMean":
        """Return the mean over both's data; the changes are this one's, the other's, and that of merging.

        Raises:
            ArgumentError: If they are of other sites, linearisations, weights, rows or columns.
        """
        for name in ("source", "target", "linearization", "weights", "rows", "columns"):
            mine, its = getattr(self, name), getattr(other, name)
            if _plain(mine) != _plain(its):
                raise ArgumentError(f"means with {name} {mine!r:.80} and {its!r:.80}", "means of one thing")
        total, count = self.total + other.total.to(self.total.device), self.count + other.count
        changes = torch.cat([self.changes, other.changes, _change(total / count, self.value)[None]])
        return replace(self, total=total, count=count, changes=changes)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each batch but the first: how far it moved the mean."""
        common = {"source": self.source, "target": self.target, "linearization": self.linearization}
        return [common | {"batch": i + 1, "change": change} for i, change in enumerate(self.changes.tolist())]


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _change(new: Tensor, old: Tensor) -> Tensor:
    return ((new - old).norm() / new.norm().clamp(min=1e-300)).cpu()


def mean_jacobian(
    model: Model, batches: Iterable[Any], source: SiteLike, target: SiteLike, positions: Any = None, *,
    tolerance: float | None = None, rows: Any = None, columns: Any = None, **options: Any,
) -> JacobianMean:  # fmt: skip
    """Return the mean Jacobian over batches of inputs, read until there are no more or the mean has settled.

    The mean moves by about 1/(batches so far) of what batches differ among themselves: a small change says that more
    data would add little, not that the data is representative.

    Args:
        model: An attached model.
        batches: Inputs as `jacobian` takes them, one after the other; a generator is read only as far as needed.
        source: As for `jacobian`.
        target: Likewise.
        positions: Likewise, of every batch.
        tolerance: Stop after two batches in a row that each moved the mean by less, |new - old| / |new|.
        rows: As for `jacobian`.
        columns: Likewise.
        options: Further ones of `jacobian`: ``linearization``, ``precision``, ``budget``, ``method``, ``check``.

    Raises:
        ArgumentError: If there is no batch, the tolerance is not positive, or an option is not for means.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> mean = interp.mean_jacobian(
        ...     model, ["The cat sat", "A dog ran"], "blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out", "same"
        ... )
        >>> mean.count, mean.value.shape, len(mean.changes)
        (6, torch.Size([576, 576]), 1)
    """
    if tolerance is not None and not tolerance > 0:
        raise ArgumentError(f"tolerance={tolerance}", "a positive number, or None")
    if refused := sorted({"reduce", "out", "out_dtype"} & options.keys()):
        raise ArgumentError(f"{refused[0]}= of a mean", "options of jacobian() that say how, not what is kept")
    total, count, changes, last = None, 0, [], None
    for batch in batches:
        last = jacobian(model, batch, source, target, positions, rows=rows, columns=columns, reduce="sum", **options)
        assert isinstance(last, JacobianSummary)
        value = last.value.double()
        before, seen = total, count
        total, count = value if total is None else total + value, count + last.count
        if before is not None:
            changes.append(_change(total / count, before / seen))
        if tolerance is not None and len(changes) > 1 and max(changes[-2:]) < tolerance:
            break
    if total is None or last is None:
        raise ArgumentError("no batches", "at least one")
    moved = torch.stack(changes) if changes else torch.empty(0, dtype=torch.float64)
    kept = [None if k is None else [*k] for k in (rows, columns)]
    return JacobianMean(total, count, moved, last.source, last.target, last.linearization, weights_sha256(model), *kept)
