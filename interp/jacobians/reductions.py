"""Reductions: what is wanted of many Jacobians, without keeping them; for MLPs without ever forming one.

With p, q divided by the norm's divisor r, n the normalised input and c = K n:
mean J = W_out (diag(mean p) W_pre' + diag(mean q) W_up') - (1/(d T)) Σ c nᵀ;
<J_s, J_t> = KK - (X + Xᵀ)/d + (c cᵀ) (n nᵀ)/d², with KK = p E_gg pᵀ + p E_gu qᵀ + (p E_gu qᵀ)ᵀ + q E_uu qᵀ.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows
from interp.jacobians.branches import GateBranch
from interp.jacobians.chain import ChainEngine
from interp.jacobians.fused import fused_norms
from interp.jacobians.plan import refuse_large
from interp.jacobians.results import Jacobians
from interp.jacobians.stored import StoredJacobians

_KINDS = ("mean", "sum", "norm", "gram", "trace")


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
    if callable(how) or how in _KINDS:
        return
    if not (isinstance(how, str) and re.fullmatch(r"svd:[1-9]\d*", how)):
        raise ArgumentError(f"reduce={how!r}", f"one of {', '.join(_KINDS)}, svd:k (as svd:8), or a function of chunks")


@torch.no_grad()
def reduce(jacobians: Jacobians | StoredJacobians, how: str | Callable[[Tensor], Any]) -> JacobianSummary:
    """Return a summary of Jacobians, in closed form where there is one, else chunk by chunk."""
    check_reduction(how)
    kind = how if isinstance(how, str) else "function"
    closed = _Gates.of(jacobians, kind) if isinstance(how, str) and isinstance(jacobians, Jacobians) else None
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


class _Gates:
    """The factors of one layer's MLP at many tokens, from which summaries follow."""

    def __init__(self, branches: list[GateBranch], positions: list[list[int]], skip: bool):
        first, self.skip = branches[0], skip
        self.branch, self.factor = first, first.behind.factor
        take = lambda name: torch.cat([getattr(b, name)[at] for b, at in zip(branches, positions, strict=True)])
        self.p, self.q = take("p"), None if first.q is None else take("q")
        self.pre, self.up = first.folded
        self.d = self.pre.shape[1]
        self.n = self.c = None
        if first.before.norm is None:
            return
        at = list(zip(branches, positions, strict=True))
        scale = torch.cat([b.before.scale[i] for b, i in at])
        self.p = self.p / scale
        self.q = None if self.q is None else self.q / scale
        if first.before.mode == "tangent":
            self.n = torch.cat([b.before.normalized[i] for b, i in at])
            self.inner = self._inner()
            self.c = self.inner @ first.out.T

    def _inner(self) -> Tensor:
        """p ⊙ W_pre' n + q ⊙ W_up' n: the neurons of c = K n."""
        assert self.n is not None
        inner = self.p * (self.n @ self.pre.T)
        return inner if self.up is None or self.q is None else inner + self.q * (self.n @ self.up.T)

    @classmethod
    def of(cls, jacobians: Jacobians, kind: str) -> "_Gates | None":
        """The gates of a batch, where it is one layer's MLP at single tokens and the closed form is cheaper."""
        engines = list(jacobians.engines.values())
        if any(end.indices is not None for end in jacobians.ends) or kind not in _KINDS:
            return None
        if not all(isinstance(e, ChainEngine) and len(e.stages) == 1 for e in engines):
            return None
        if not all(p.single == (True, True) and p.sources == p.targets for p in jacobians.places):
            return None
        branches = [b for e in engines for b in e.stages[0][1]]  # type: ignore[union-attr]
        plain = all(isinstance(b, GateBranch) and b.behind.norm is None for b in branches)
        if not plain or len(branches) != len(engines):
            return None
        first = branches[0]
        f, d = first.p.shape[-1], first.out.shape[0]
        if kind in ("norm", "gram"):
            tables = (3 if first.q is not None else 1) * (4 * d * f * f)
            fits = 4 * f * f * first.p.element_size() <= jacobians.budget
            if not fits or tables > len(jacobians) * 2 * d * d * f:
                return None
        positions = [[p.sources[0] for p in jacobians.places if p.example == i] for i in jacobians.engines]  # type: ignore[index]
        return cls(branches, positions, engines[0].stages[0][0].skip)  # type: ignore[attr-defined, arg-type]

    def reduce(self, kind: str) -> Tensor:
        """One summary."""
        count = len(self.p)
        if kind in ("mean", "sum"):
            return self.mean() * (count if kind == "sum" else 1)
        if kind == "trace":
            return self.trace()
        gram = self.norms_squared() if kind == "norm" else self.gram()
        if self.skip:
            trace = self.trace() - self.d
            gram = gram + self.d + (2 * trace if kind == "norm" else trace[:, None] + trace[None])
        return gram.clamp(min=0).sqrt() if kind == "norm" else gram

    def mean(self) -> Float[Tensor, "d d"]:
        """Of all Jacobians: one product for any number of tokens."""
        average = lambda x: None if x is None else x.mean(0, dtype=torch.float64).to(x.dtype)
        p = average(self.p)
        assert p is not None
        core = self.branch.core(p, average(self.q), None, None)
        if self.c is not None and self.n is not None:
            core = core - (self.c.T.double() @ self.n.double() / (self.d * len(self.n))).to(core.dtype)
        core = core * self.factor
        return core + torch.eye(self.d, dtype=core.dtype, device=core.device) if self.skip else core

    def trace(self) -> Float[Tensor, "n"]:
        """Of each: p · diag(W_pre' W_out) + q · diag(W_up' W_out) - c · n / d."""
        found = self.p @ (self.branch.out.T * self.pre).sum(1)
        if self.up is not None and self.q is not None:
            found = found + self.q @ (self.branch.out.T * self.up).sum(1)
        if self.c is not None and self.n is not None:
            found = found - (self.c * self.n).sum(1) / self.d
        return found * self.factor + (self.d if self.skip else 0)

    def _crossed(self, q: Tensor | None) -> Tensor:
        """w = c W_out ⊙ p-side pre-activations, from which X[s, t] = w_s · p_t (and its q side) follow."""
        assert self.c is not None
        assert self.n is not None
        w = self.c @ self.branch.out
        return w * (self.n @ (self.pre if q is None else self.up).T)  # type: ignore[union-attr]

    def gram(self) -> Float[Tensor, "n n"]:
        """Inner products of all pairs."""
        gg, gu, uu = self.branch.tables
        found = self.p @ gg @ self.p.T
        if gu is not None and uu is not None and self.q is not None:
            mixed = self.p @ gu @ self.q.T
            found = found + mixed + mixed.T + self.q @ uu @ self.q.T
        if self.c is not None and self.n is not None:
            x = self._crossed(None) @ self.p.T
            if self.q is not None:
                x = x + self._crossed(self.q) @ self.q.T
            found = found - (x + x.T) / self.d + (self.c @ self.c.T) * (self.n @ self.n.T) / self.d**2
        return found * self.factor**2

    def norms_squared(self) -> Float[Tensor, "n"]:
        """Squared Frobenius norms: the diagonal of the gram matrix."""
        gg, gu, uu = self.branch.tables
        found = ((self.p @ gg) * self.p).sum(1)
        if gu is not None and uu is not None and self.q is not None:
            found = found + 2 * ((self.p @ gu) * self.q).sum(1) + ((self.q @ uu) * self.q).sum(1)
        if self.c is not None and self.n is not None:
            x = (self._crossed(None) * self.p).sum(1)
            if self.q is not None:
                x = x + (self._crossed(self.q) * self.q).sum(1)
            squares = self.c.pow(2).sum(1) * self.n.pow(2).sum(1)
            found = found - 2 * x / self.d + squares / self.d**2
        return found * self.factor**2
