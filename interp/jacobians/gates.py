"""Gates: the factors of one layer's MLP at many tokens, from which summaries follow without a Jacobian.

With p, q divided by the norm's divisor r, n the normalised input and c = K n:
mean J = W_out (diag(mean p) W_pre' + diag(mean q) W_up') - (1/(d T)) Σ c nᵀ;
<J_s, J_t> = KK - (X + Xᵀ)/d + (c cᵀ) (n nᵀ)/d², with KK = p E_gg pᵀ + p E_gu qᵀ + (p E_gu qᵀ)ᵀ + q E_uu qᵀ;
D J Eᵀ = (E W_out) (diag(p) W_pre' Dᵀ + diag(q) W_up' Dᵀ) - (E c) (D n)ᵀ/d for rows E and D.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.jacobians.branches import GateBranch
from interp.jacobians.chain import ChainEngine
from interp.jacobians.results import Jacobians

SUMMARIES = ("mean", "sum", "norm", "gram", "trace")


class Gates:
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
    def of(cls, jacobians: Jacobians) -> "Gates | None":
        """The gates of a batch, where it is one layer's MLP at single tokens."""
        engines = list(jacobians.engines.values())
        if any(end.indices is not None for end in jacobians.ends):
            return None
        if not all(isinstance(e, ChainEngine) and len(e.stages) == 1 for e in engines):
            return None
        if not all(p.single == (True, True) and p.sources == p.targets for p in jacobians.places):
            return None
        engines[0].refuse_new_weights()
        branches = [b for e in engines for b in e.stages[0][1]]  # type: ignore[union-attr]
        plain = all(isinstance(b, GateBranch) and b.behind.norm is None for b in branches)
        if not plain or len(branches) != len(engines):
            return None
        positions = [[p.sources[0] for p in jacobians.places if p.example == i] for i in jacobians.engines]  # type: ignore[index]
        return cls(branches, positions, engines[0].stages[0][0].skip)  # type: ignore[attr-defined, arg-type]

    def pays(self, kind: str, budget: int) -> bool:
        """Whether a summary costs less this way than from the matrices: tables over neurons have to fit, and to pay."""
        if kind not in ("norm", "gram"):
            return kind in SUMMARIES
        f = self.p.shape[-1]
        tables = (3 if self.q is not None else 1) * (4 * self.d * f * f)
        return 4 * f * f * self.p.element_size() <= budget and tables <= len(self.p) * 2 * self.d**2 * f

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
        core = self.branch.before.fold(self.branch.core(p, average(self.q), None, None))
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

    def sides(self, readers: Float[Tensor, "reader d"], writers: Float[Tensor, "writer d"]) -> "Sides":
        """E W_out, D W_pre'ᵀ and D W_up'ᵀ: what rows E and D see of the neurons, whatever the token."""
        up = None if self.up is None or self.q is None else writers @ self.up.T
        return Sides(readers, writers, readers @ self.branch.out, writers @ self.pre.T, up)

    def between(self, sides: "Sides", chosen: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """E J Dᵀ of each Jacobian, for the chosen rows of E and of D, as indices."""
        found = []
        for t, (rows, columns) in enumerate(chosen):
            middle = sides.pre[columns] * self.p[t]
            if sides.up is not None and self.q is not None:
                middle.addcmul_(sides.up[columns], self.q[t])
            made = sides.out[rows] @ middle.T
            if self.c is not None and self.n is not None:
                made.addr_(sides.readers[rows] @ self.c[t], sides.writers[columns] @ self.n[t], alpha=-1.0 / self.d)
            made = made * self.factor
            found.append(made.addmm_(sides.readers[rows], sides.writers[columns].T) if self.skip else made)
        return found


class Sides(NamedTuple):
    """Rows that read a Jacobian's output and write its input, and what they see of the neurons."""

    readers: Tensor
    writers: Tensor
    out: Tensor
    pre: Tensor
    up: Tensor | None
