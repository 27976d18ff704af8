"""Reductions: what is wanted of many Jacobians, without keeping them; for MLPs without ever forming one."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows
from interp.jacobians.fused import fused_norms
from interp.jacobians.gates import SUMMARIES, Gates
from interp.jacobians.plan import refuse_large
from interp.jacobians.results import Jacobians
from interp.jacobians.stored import StoredJacobians


@dataclass(frozen=True, eq=False)
class JacobianSummary(Rows):
    """What was asked for of a batch of Jacobians.

    Attributes:
        kind: ``mean``, ``sum``, ``norm``, ``gram``, ``trace``, ``svd:k`` or ``function``.
        value: [out, in] of mean and sum, [n] of norms and traces, [n, n] of a gram matrix, [n, k] of singular
            values; the results of a function by chunk.
        count: How many Jacobians.
        source: Site.
        target: Site.
        linearization: What was held.
        method: How it was computed.
    """

    kind: str
    value: Any = field(repr=False)
    count: int
    source: str
    target: str
    linearization: str
    method: str

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each Jacobian (of means and sums, one)."""
        common = {"kind": self.kind, "source": self.source, "target": self.target, "linearization": self.linearization}
        if not isinstance(self.value, Tensor) or self.kind in ("mean", "sum"):
            return [common | {"count": self.count}]
        return [common | {"index": i, "value": row.tolist()} for i, row in enumerate(self.value)]


def check_reduction(how: str | Callable[[Tensor], Any]) -> None:
    """Refuse what is no reduction.

    Raises:
        ArgumentError: If it is neither a known word nor a function.
    """
    if callable(how) or how in SUMMARIES:
        return
    if not (isinstance(how, str) and re.fullmatch(r"svd:[1-9]\d*", how)):
        raise ArgumentError(
            f"reduce={how!r}", f"one of {', '.join(SUMMARIES)}, svd:k (as svd:8), or a function of chunks"
        )


@torch.no_grad()
def reduce(jacobians: Jacobians | StoredJacobians, how: str | Callable[[Tensor], Any]) -> JacobianSummary:
    """Return a summary of Jacobians, in closed form where there is one, else chunk by chunk."""
    check_reduction(how)
    kind = how if isinstance(how, str) else "function"
    closed = Gates.of(jacobians) if isinstance(jacobians, Jacobians) else None
    closed = closed if closed is not None and closed.pays(kind, jacobians.budget) else None
    value = _streamed(jacobians, how) if closed is None else closed.reduce(kind)
    source, target = jacobians.site_names
    method = f"{jacobians.method}, chunk by chunk" if closed is None else "closed form of the summary"
    return JacobianSummary(kind, value, len(jacobians), source, target, jacobians.linearization.name, method)


def _streamed(jacobians: Jacobians | StoredJacobians, how: str | Callable[[Tensor], Any]) -> Any:
    if not isinstance(how, str):
        return [how(chunk) for _, chunk in jacobians]
    n, rows, columns = jacobians.shape
    like = jacobians.like
    if how in ("mean", "sum"):
        refuse_large(rows * columns * 8, jacobians.budget, 1, rows, columns)
        total = sum(chunk.sum(0, dtype=torch.float64) for _, chunk in jacobians)
        return (total / (n if how == "mean" else 1)).to(like.dtype)  # type: ignore[union-attr]
    if how == "norm":
        fused = fused_norms(jacobians) if isinstance(jacobians, Jacobians) else None
        return fused if fused is not None else torch.cat([chunk.flatten(1).norm(dim=1) for _, chunk in jacobians])
    if how == "trace":
        _check_square(rows, columns)
        return torch.cat([chunk.diagonal(dim1=1, dim2=2).sum(1) for _, chunk in jacobians])
    if how == "gram":
        return _gram(jacobians, n, like)
    k = int(how.split(":")[1])
    if k > min(rows, columns):
        raise ArgumentError(f"svd:{k} of {rows} x {columns} matrices", f"k up to {min(rows, columns)}")
    return torch.cat([torch.linalg.svdvals(chunk)[:, :k] for _, chunk in jacobians])


def _check_square(rows: int, columns: int) -> None:
    if rows != columns:
        raise ArgumentError(f"the trace of {rows} x {columns} matrices", "square ones")


def _gram(jacobians: Jacobians | StoredJacobians, n: int, like: Tensor) -> Tensor:
    """All inner products; later chunks are made again for each earlier one, so that two are held at a time."""
    refuse_large(n * n * like.element_size(), jacobians.budget, 1, n, n)
    found = like.new_empty(n, n)
    spans = list(jacobians._chunks())
    for index, left in enumerate(spans):
        one = jacobians._matrices(left).flatten(1)
        for right in spans[index:]:
            other = one if right == left else jacobians._matrices(right).flatten(1)
            found[left, right] = one @ other.T
            found[right, left] = other @ one.T
    return found
