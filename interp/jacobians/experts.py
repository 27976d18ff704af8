"""Experts: a mixture-of-experts MLP around a reference, its router included, in closed form.

With w the chosen experts' weights, o_e their outputs and R the router's rows, the derivative by the MLP's input is
Σ_e w_e W_out,e (diag(p_e) W_pre,e + diag(q_e) W_up,e) + Σ_e o_e (∂w_e)ᵀ with ∂w_e = w_e (R_e - Σ_j w_j R_j). The j are
the chosen experts if their weights are made to sum to one, else all. Which are chosen does not move.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interp.hooks.errors import SiteUnavailableError
from interp.hooks.layouts import child
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.hooks.units import line
from interp.jacobians.branches import NormAt
from interp.propagation.reference import Reference

_CLOSE = 1e-2


def experts_of(model: Model, layer: int) -> nn.Module | None:
    """The MLP of a layer, where it is a router ``gate`` [expert, d] and stacked experts, else None."""
    layout = model.layout
    mlp = None if layout is None or layout.mlp is None else child(model.module, f"{layout.blocks}.{layer}.{layout.mlp}")
    router, experts = getattr(mlp, "gate", None), getattr(mlp, "experts", None)
    names = ("gate_up_proj", "down_proj", "act_fn")
    stacked = all(hasattr(experts, name) for name in names) and hasattr(router, "weight") and hasattr(router, "top_k")
    return mlp if stacked and set(dict(mlp.named_children())) == {"gate", "experts"} else None  # type: ignore[union-attr]


class ExpertBranch:
    """One layer's mixture of experts with the norms before and behind it.

    Args:
        ref: A reference that holds `mlp_sites` and ``mlp.hook_out``.
        layer: Which block.
        held: What is held; only ``exact`` has a closed form.
        before: Whether the norm in front belongs to it.
        behind: Whether the branch's multiplier and post-norm belong to it.

    Raises:
        SiteUnavailableError: If the formula does not give the MLP's own output, or something is held.
    """

    def __init__(self, ref: Reference, layer: int, held: Linearization, before: bool = True, behind: bool = True):
        self.name = f"blocks.{layer}.mlp"
        mlp = experts_of(ref.model, layer)
        if mlp is None or held != Linearization.of("exact"):
            raise SiteUnavailableError(f"the closed form of {self.name} under {held.name}", "exact", "autograd has it")
        factor = ref.weights.layout.branch_scale if behind else 1.0
        self.before = NormAt(ref, ref.mlp_norm(layer) if before else None, held)
        self.behind = NormAt(ref, f"blocks.{layer}.ln2_post" if behind else None, held, factor)
        own = lambda weight: weight.detach().to(ref.weights.dtype)
        experts, self.router = mlp.experts, own(mlp.gate.weight)  # type: ignore[union-attr, arg-type]
        self.pre, self.up = own(experts.gate_up_proj).chunk(2, dim=1)  # type: ignore[union-attr, arg-type]
        self.out = own(experts.down_proj)  # type: ignore[union-attr, arg-type]
        self.function: Any = experts.act_fn  # type: ignore[union-attr]
        x, wanted = ref.mlp_input(layer), ref.at(f"{self.name}.hook_out")
        count = int(mlp.gate.top_k)  # type: ignore[union-attr, arg-type]
        self._choose(x, count)
        self._run(x)
        if not (self._value() - wanted).norm() <= _CLOSE * wanted.norm():
            self.summed = False
            self.weights = self.shares.gather(1, self.chosen)
            if not (self._value() - wanted).norm() <= _CLOSE * wanted.norm():
                raise SiteUnavailableError(
                    f"the closed form of {self.name}", "a softmax of the router's k largest scores"
                )

    def _choose(self, x: Float[Tensor, "pos d"], count: int) -> None:
        """Which experts each position has, and how much of each."""
        self.shares = F.softmax(x @ self.router.T, dim=-1)
        top = self.shares.topk(count, dim=-1)
        self.chosen, self.summed = top.indices, True
        self.weights = top.values / top.values.sum(-1, keepdim=True)

    def _run(self, x: Float[Tensor, "pos d"]) -> None:
        """Factors p and q of each chosen expert's neurons [pos, chosen, f], and its output [pos, chosen, d]."""
        shape = (*self.chosen.shape, self.pre.shape[1])
        self.p, self.q = x.new_empty(shape), x.new_empty(shape)
        self.outputs = x.new_empty(*self.chosen.shape, x.shape[1])
        for e, where in self._each(slice(0, len(x))):
            a, u = x[where[0]] @ self.pre[e].T, x[where[0]] @ self.up[e].T
            slope, _ = line(self.function, a, (), {})
            self.p[where], self.q[where] = slope * u, self.function(a)
            self.outputs[where] = (self.q[where] * u) @ self.out[e].T

    def _value(self) -> Tensor:
        return (self.outputs * self.weights[..., None]).sum(1)

    def _each(self, span: slice) -> list[tuple[int, tuple[Tensor, ...]]]:
        """Each expert with the positions of a span (from its start) and the places among the chosen that it has."""
        chosen = self.chosen[span]
        return [(int(e), torch.where(chosen == e)) for e in chosen.unique()]

    def _lean(self, moved: Float[Tensor, "k pos chosen"], span: slice) -> Float[Tensor, "k pos expert"]:
        """Σ_e moved_e ∂w_e by the router's scores."""
        w = self.weights[span]
        own = torch.zeros(*moved.shape[:2], len(self.router), dtype=moved.dtype, device=moved.device)
        own.scatter_(2, self.chosen[span].expand_as(moved), w * moved)
        total = (w * moved).sum(-1, keepdim=True)
        if not self.summed:
            return own - self.shares[span] * total
        spread = torch.zeros_like(own).scatter_(2, self.chosen[span].expand_as(moved), w.expand_as(moved))
        return own - spread * total

    def _turn(self, moved: Float[Tensor, "k pos expert"], span: slice) -> Float[Tensor, "k pos chosen"]:
        """Tangents of the weights for tangents of the router's scores."""
        w, chosen = self.weights[span], self.chosen[span]
        own = moved.gather(2, chosen.expand(len(moved), -1, -1))
        mean = (w * own).sum(-1, keepdim=True) if self.summed else (self.shares[span] * moved).sum(-1, keepdim=True)
        return w * (own - mean)

    def push(self, v: Float[Tensor, "k pos d"], span: slice) -> Float[Tensor, "k pos d"]:
        """J v."""
        n = self.before.push(v, span)
        out = torch.einsum("kpc,pcd->kpd", self._turn(n @ self.router.T, span), self.outputs[span])
        for e, (at, place) in self._each(span):
            p, q = self.p[span][at, place], self.q[span][at, place]
            hidden = ((n[:, at] @ self.pre[e].T) * p).addcmul_(n[:, at] @ self.up[e].T, q)
            out.index_add_(1, at, (hidden * self.weights[span][at, place, None]) @ self.out[e].T)
        return self.behind.push(out, span)

    def pull(self, w: Float[Tensor, "k pos d"], span: slice) -> Float[Tensor, "k pos d"]:
        """Jᵀ w."""
        y = self.behind.pull(w, span)
        n = self._lean(torch.einsum("kpd,pcd->kpc", y, self.outputs[span]), span) @ self.router
        for e, (at, place) in self._each(span):
            post = (y[:, at] @ self.out[e]) * self.weights[span][at, place, None]
            n.index_add_(1, at, (post * self.p[span][at, place]) @ self.pre[e])
            n.index_add_(1, at, (post * self.q[span][at, place]) @ self.up[e])
        return self.before.pull(n, span)

    def dense(
        self, position: int, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> Float[Tensor, "out in"]:
        """The Jacobian of one token: one product for each chosen expert, and the router's few rows."""
        here = slice(position, position + 1)
        eye = torch.eye(self.chosen.shape[1], dtype=self.out.dtype, device=self.out.device)
        core = self.outputs[position].T @ (self._lean(eye[:, None], here)[:, 0] @ self.router)
        for place, e in enumerate(self.chosen[position].tolist()):
            middle = (self.pre[e] * self.p[position, place, :, None]).addcmul_(
                self.up[e], self.q[position, place, :, None]
            )
            core.addmm_(self.out[e], middle, alpha=float(self.weights[position, place]))
        core = self.behind.finish_left(self.before.finish(core, position, folded=False), position)
        core = core if rows is None else core[rows]
        return core if columns is None else core[:, columns]
