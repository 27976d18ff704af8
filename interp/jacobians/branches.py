"""Branches: norms and MLPs around a reference, pushed, pulled and as matrices in closed form.

With n the normalised input of an MLP, p and q its factors and r the norm's divisor,
J = (K - K n nᵀ/d)/r with K = W_out (diag(p) W_pre' + diag(q) W_up'); gain and centring are folded into the primed
weights, or into K. A norm held drops the second term. Values are [k, pos, d]; ``span`` says which positions they are.
"""

from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.linearization import Linearization
from interp.hooks.weights import Norm
from interp.jacobians.kernels import device
from interp.jacobians.kernels.rows import gate_tangent, ln_jvp, rms_jvp
from interp.jacobians.kernels.sandwich import Sandwich
from interp.propagation.reference import Reference
from interp.propagation.stages import MLP

_ACTIVE_SHARE = 0.6
_GRAM_BLOCK = 256


@runtime_checkable
class Branch(Protocol):
    """A part of a block that reads the stream."""

    name: str

    def push(self, v: Tensor, span: slice) -> Tensor:
        """J v at a span of positions."""
        ...

    def pull(self, w: Tensor, span: slice) -> Tensor:
        """Jᵀ w at a span of positions."""
        ...

    def dense(self, position: int, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """The Jacobian of one position by itself [out, in]."""
        ...


class NormAt:
    """A norm, or its absence, around a reference.

    Args:
        ref: The reference.
        name: The norm's name, or None for none.
        held: What is held.
        factor: What the norm's output is multiplied by.
    """

    def __init__(self, ref: Reference, name: str | None, held: Linearization, factor: float = 1.0):
        self.norm: Norm | None = ref.weights.norm(name) if name else None
        self.name, self.mode, self.factor = name or "", held.norm, factor
        if self.norm is not None:
            self.scale, self.normalized = ref.at(f"{name}.hook_scale"), ref.at(f"{name}.hook_normalized")

    def push(self, v: Tensor, span: slice) -> Tensor:
        """A tangent of the input as one of the output."""
        v = self._through(v, span)
        return v if self.factor == 1.0 else v * self.factor

    def pull(self, w: Tensor, span: slice) -> Tensor:
        """A covector of the output as one of the input."""
        return self._through(w if self.factor == 1.0 else w * self.factor, span, transposed=True)

    def _through(self, v: Tensor, span: slice, transposed: bool = False) -> Tensor:
        if self.norm is None:
            return v
        jvp = ln_jvp if self.norm.centred else rms_jvp
        n, r = self.normalized[span], self.scale[span]
        return jvp(v, n, r, self.norm.gain, self.mode != "tangent", transposed)

    def dense(self, position: int, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """The Jacobian at one position."""
        d = self.normalized.shape[-1]
        here = slice(position, position + 1)
        eye = torch.eye(d, dtype=self.normalized.dtype, device=self.normalized.device)
        full = self.push(eye[:, None] if columns is None else eye[columns][:, None], here)[:, 0].T
        return full if rows is None else full[rows]

    def fold(self, weight: Float[Tensor, "out d"]) -> Float[Tensor, "out d"]:
        """A weight that reads the output as one that reads the normalised input: gain and centring."""
        if self.norm is None:
            return weight
        weight = weight if self.norm.gain is None else weight * self.norm.gain.to(weight)
        return weight - weight.mean(-1, keepdim=True) if self.norm.centred else weight

    def finish(self, core: Tensor, position: int, folded: bool = True) -> Tensor:
        """From K to the Jacobian behind the norm, in place: (K - K n nᵀ/d)/r, K with gain and centring if not yet."""
        if self.norm is None:
            return core
        n, scale = self.normalized[position], self.scale[position]
        if folded or self.norm.gain is None:
            core.div_(scale)
        else:
            core.mul_(self.norm.gain.to(core) / scale)
        if self.norm.centred and not folded:
            core.sub_(core.mean(1, keepdim=True))
        if self.mode == "tangent":
            core.addr_(core @ n, n, alpha=-1.0 / len(n))
        return core

    def finish_left(self, core: Float[Tensor, "d n"], position: int) -> Float[Tensor, "d n"]:
        """The norm behind a branch: N K."""
        if self.norm is None:
            return core if self.factor == 1.0 else core.mul_(self.factor)
        return self.push(core.T[:, None], slice(position, position + 1))[:, 0].T


class GateBranch:
    """One layer's MLP with the norms before and behind it.

    Args:
        ref: A reference that holds `mlp_sites`.
        layer: Which block.
        held: What is held.
        before: Whether the norm in front belongs to it.
        behind: Whether the branch's multiplier and post-norm belong to it.

    Attributes:
        bf16: Whether the product that makes a matrix rounds its factors to bfloat16.
        scratch: Room for scaled weights, which branches of one size may share.

    Raises:
        SiteUnavailableError: If the MLP has no closed form.
    """

    def __init__(self, ref: Reference, layer: int, held: Linearization, before: bool = True, behind: bool = True):
        self.name, self.layer = f"blocks.{layer}.mlp", layer
        mlp = MLP(ref, layer)
        factor = ref.weights.layout.branch_scale if behind else 1.0
        self.before = NormAt(ref, ref.mlp_norm(layer) if before else None, held)
        self.behind = NormAt(ref, f"blocks.{layer}.ln2_post" if behind else None, held, factor)
        self.p, self.q = mlp.factors(ref.mlp_input(layer), held)
        self.plain = mlp.pre.weight.T, None if mlp.up is None else mlp.up.weight.T
        self.out = self._laid(mlp.down.weight).T
        self._folded: tuple[Tensor, Tensor | None] | None = None
        self.scratch: list[Tensor] = []
        self._rounded: Tensor | None = None
        self.bf16 = False

    @property
    def folded(self) -> tuple[Tensor, Tensor | None]:
        """W_pre and W_up [f, d] with the norm's gain and centring."""
        if self._folded is None:
            pre, up = self.plain
            self._folded = self._laid(self.before.fold(pre)), None if up is None else self._laid(self.before.fold(up))
        return self._folded

    @staticmethod
    def _laid(weight: Tensor) -> Tensor:
        """Neurons innermost where kernels run, as they read them."""
        return weight.T.contiguous().T if device.fits_kernels(weight) else weight

    def push(self, v: Float[Tensor, "k pos d"], span: slice) -> Float[Tensor, "k pos d"]:
        """J v."""
        pre, up = self.plain
        n = self.before.push(v, span)
        if up is None or self.q is None:
            hidden = gate_tangent(self.p[span], n @ pre.T)
        else:
            hidden = gate_tangent(self.p[span], n @ pre.T, self.q[span], n @ up.T)
        return self.behind.push(hidden @ self.out.T, span)

    def pull(self, w: Float[Tensor, "k pos d"], span: slice) -> Float[Tensor, "k pos d"]:
        """Jᵀ w."""
        pre, up = self.plain
        post = self.behind.pull(w, span) @ self.out
        n = (post * self.p[span]) @ pre
        if up is not None and self.q is not None:
            n = n + (post * self.q[span]) @ up
        return self.before.pull(n, span)

    def core(self, p: Tensor, q: Tensor | None, rows: Tensor | None, columns: Tensor | None, out=None) -> Tensor:
        """W_out (diag(p) W_pre + diag(q) W_up): one product, of the active neurons where many are off."""
        pre, up = self.plain
        left = self.out if rows is None else self.out[rows]
        if columns is not None:
            pre, up = pre[:, columns], None if up is None else up[:, columns]
        active = (p != 0) if q is None else (p != 0) | (q != 0)
        if int(active.sum()) < _ACTIVE_SHARE * len(p):
            keep = active.nonzero()[:, 0]
            pre, up, left, p = pre[keep], None if up is None else up[keep], left[:, keep], p[keep]
            q = None if q is None else q[keep]
        if not self.scratch or self.scratch[0].shape != pre.shape or self.scratch[0].dtype != pre.dtype:
            self.scratch[:] = [torch.empty_like(pre, memory_format=torch.contiguous_format)]
        middle = torch.mul(pre, p[:, None], out=self.scratch[0])
        if up is not None and q is not None:
            middle.addcmul_(up, q[:, None])
        if self.bf16:
            made = self._as_bf16(left) @ middle.bfloat16()
            return made.to(middle.dtype) if out is None else out.copy_(made)
        return torch.mm(left, middle, out=out) if out is not None else left @ middle

    def sandwich(
        self, positions: list[int], rows: Tensor | None, columns: Tensor | None, skip: bool = False
    ) -> Sandwich | None:
        """What the Jacobians of many tokens are made of, for one kernel.

        None where tokens are better taken one by one: a norm behind mixes their rows, most neurons are off, or the
        identity would have to be cut.
        """
        cut = rows is not None or columns is not None
        if self.behind.norm is not None or (skip and cut):
            return None
        (pre, up), out = self.folded, self.out
        scale = 1.0 if self.before.norm is None else self.before.scale[positions]
        p = self.p[positions] * (self.behind.factor / scale)
        q = None if self.q is None or up is None else self.q[positions] * (self.behind.factor / scale)
        active = (p != 0) if q is None else (p != 0) | (q != 0)
        if int(active.sum()) < _ACTIVE_SHARE * active.numel():
            return None
        n = c = None
        if self.before.norm is not None and self.before.mode == "tangent":
            n = self.before.normalized[positions]
            c = gate_tangent(p, n @ pre.T, q, None if up is None else n @ up.T) @ out.T / n.shape[-1]
        if rows is not None:
            out, c = out[rows], None if c is None else c[:, rows]
        if columns is not None:
            pre, up, n = pre[:, columns], None if up is None else up[:, columns], None if n is None else n[:, columns]
        return Sandwich(out, pre, p, up if q is not None else None, q, n, c, skip)

    def _as_bf16(self, left: Tensor) -> Tensor:
        if left is not self.out:
            return left.bfloat16()
        self._rounded = left.bfloat16() if self._rounded is None else self._rounded
        return self._rounded

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """E_gg, E_gu, E_uu [f, f], (W_outᵀ W_out) ⊙ (W W'ᵀ), from which inner products of Jacobians follow."""
        pre, up = self.folded
        outs = _gram(self.out.T)
        gg = _gram(pre).mul_(outs)
        if up is None:
            return gg, None, None
        return gg, (pre @ up.T).mul_(outs), _gram(up).mul_(outs)

    def dense(
        self, position: int, rows: Tensor | None = None, columns: Tensor | None = None, out: Tensor | None = None
    ) -> Float[Tensor, "out in"]:
        """The Jacobian of one token."""
        # A post-norm mixes all rows, the norm in front all columns.
        late = rows is not None and self.behind.norm is not None
        early = columns is not None and self.before.norm is not None
        cut = late or early
        q = None if self.q is None else self.q[position]
        core = self.core(self.p[position], q, None if late else rows, None if early else columns, None if cut else out)
        core = self.behind.finish_left(self.before.finish(core, position, folded=False), position)
        core = core[rows] if late else core
        return core[:, columns] if early else core


def _gram(rows: Float[Tensor, "f d"]) -> Float[Tensor, "f f"]:
    """A Aᵀ from its lower blocks: half the work."""
    found = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), _GRAM_BLOCK):
        some = rows[start : start + _GRAM_BLOCK]
        stop = start + len(some)
        torch.mm(some, rows[:stop].T, out=found[start:stop, :stop])
        found[:start, start:stop] = found[start:stop, :start].T
    return found


def mlp_sites(ref_model, layer: int) -> list[str]:
    """What a reference must hold for `GateBranch`."""
    layout = ref_model.layout
    norm = f"blocks.{layer}.{'ln1' if layout.parallel and layout.ln2 is None else 'ln2'}"
    inner = ("hook_resid_mid", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")
    norms = [f"{name}.{part}" for name in (norm, f"blocks.{layer}.ln2_post") for part in NORM_PARTS]
    return [*(f"blocks.{layer}.{part}" for part in inner), *norms]


NORM_PARTS = ("hook_scale", "hook_normalized")
