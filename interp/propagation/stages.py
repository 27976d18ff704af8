"""Pull-backs through single stages: y on a stage's output becomes Jᵀ y on its input, and what the stage adds.

Around a reference x0 a stage is f(x) ≈ f(x0) + J (x - x0), so y · f(x) ≈ (Jᵀ y) · x + offset with
offset = y · f(x0) - (Jᵀ y) · x0. Covectors are [..., d]; leading axes are observables and positions.

Source: Dunefsky & Cohan, "Observable Propagation", ICML 2024, section 3, extended to RMSNorm, grouped queries, gated
MLPs and held divisors and gates.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import SiteUnavailableError
from interp.hooks.linearization import Linearization
from interp.hooks.units import line
from interp.hooks.weights import Norm
from interp.propagation.reference import Reference, Weights

Pulled = tuple[Tensor, Tensor]

# Of a gated product, how much of either factor's derivative is taken: (factor that is gated, gate).
_SHARES = {"tangent": (1.0, 1.0), "gate": (1.0, 0.0), "split": (0.5, 0.5)}


def pull_gain(y: Float[Tensor, "... d"], norm: Norm | None) -> Pulled:
    """Through gain and bias alone, to the normalised input n = P x / r: P (γ ⊙ y) and y · β. Needs no data."""
    if norm is None:
        return y, y.new_zeros(y.shape[:-1])
    scaled = y if norm.gain is None else y * norm.gain.to(y)
    offset = y.new_zeros(y.shape[:-1]) if norm.bias is None else y @ norm.bias.to(y)
    return (scaled - scaled.mean(-1, keepdim=True) if norm.centred else scaled), offset


def centred_gain(x: Float[Tensor, "... d"], norm: Norm) -> Float[Tensor, "... d"]:
    """γ ⊙ P x: a part of a norm's input as the part of its output, but for the divisor."""
    x = norm.centre(x)
    return x if norm.gain is None else x * norm.gain.to(x)


def pull_norm(
    y: Float[Tensor, "... d"], norm: Norm | None, mode: str, scale: Float[Tensor, "... 1"],
    normalized: Float[Tensor, "... d"],
) -> Pulled:  # fmt: skip
    """Through N(x) = γ ⊙ P x / r(x) + β to x.

    ``frozen`` holds r: (1/r) P (γ ⊙ y), offset y · β. ``tangent`` differentiates it: with n = P x / r,
    (1/r) P (γ ⊙ y - n (n · γ ⊙ y) / d), which all but annihilates x itself; offset y · β + (y · γ ⊙ n)(1 - ε/r²).
    """
    if norm is None:
        return y, y.new_zeros(y.shape[:-1])
    pulled, offset = pull_gain(y, norm)
    if mode == "tangent":
        aligned = (pulled * normalized).sum(-1)
        pulled = pulled - normalized * aligned[..., None] / normalized.shape[-1]
        # J x = (N(x) - β) ε/r²: what is left of x is due to ε alone.
        offset = offset + aligned * (1 - norm.eps / scale[..., 0] ** 2)
    return pulled / scale, offset


def pull_norm_at(ref: Reference, y: Tensor, name: str, mode: str, at: Any = slice(None)) -> Pulled:
    """Through a named norm around a reference, at all or some positions; as it is where the model has no such norm."""
    norm = ref.weights.norm(name)
    if norm is None:
        return y, y.new_zeros(y.shape[:-1])
    return pull_norm(y, norm, mode, ref.at(f"{name}.hook_scale")[at], ref.at(f"{name}.hook_normalized")[at])


def pull_branch(ref: Reference, y: Tensor, layer: int, norm: str, mode: str, at: Any = slice(None)) -> Pulled:
    """From what a branch adds to the stream to what its last linear module gives: multiplier and post-norm."""
    return pull_norm_at(ref, y * ref.weights.layout.branch_scale, f"blocks.{layer}.{norm}", mode, at)


def pull_heads(
    weights: Weights, y: Float[Tensor, "... pos d"], layer: int, pattern: Float[Tensor, "head pos key"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Through attention with its pattern held, from the sum of heads to the normalised input of each source token.

    Per head W_V (Σ_t A[t, s] W_O y_t), heads of a group summed; the offset is y · b_O + Σ_s A[t, s] (W_O y_t) · b_V.

    Returns:
        y at the input [..., pos, d], at z [..., pos, head, d_head], at v [..., pos, kv_head, d_head], and the offset
        [...], summed over positions.
    """
    output, values = weights.output(layer), weights.values(layer)
    z = output.pull(y)
    offset = output.constant(y).sum(-1)
    moved = torch.einsum("hts,...thd->...shd", pattern, z)
    kv = values.weight.shape[1]
    v = moved.unflatten(-2, (kv, -1)).sum(-2)
    return values.pull(v), z, v, offset + values.constant(v).sum(-1)


def pull_head(
    weights: Weights, y: Float[Tensor, "... d"], layer: int, head: int, probability: Tensor | float = 1.0
) -> Pulled:
    """Through one head from one destination to one source: A W_V W_O y at the source's normalised input.

    With probability 1 it is the data-free form, what the head reads; the offset is A (W_O y) · b_V.
    """
    output, values = weights.output(layer), weights.values(layer)
    z = torch.einsum("...d,kd->...k", y, output.weight[head]) * probability
    group = weights.group(head)
    offset = y.new_zeros(y.shape[:-1]) if values.bias is None else z @ values.bias[group]
    return torch.einsum("...k,dk->...d", z, values.weight[:, group]), offset


class MLP:
    """One layer's MLP around a reference: W_out (a(g) ⊙ u), or W_out a(g) without a gate.

    Args:
        ref: The reference.
        layer: Which block.

    Raises:
        SiteUnavailableError: If the MLP's parts are not plain linear modules and a known activation.
    """

    def __init__(self, ref: Reference, layer: int):
        self.name = f"blocks.{layer}.mlp"
        function = ref.activation(layer)
        if function is None:
            raise SiteUnavailableError(
                f"the closed form of {self.name} in {type(ref.model.module).__name__}",
                "linear modules around an element-wise activation",
                "total vectors take the autograd form by themselves; paths through this MLP are not available",
            )
        self.function, self.layer = function, layer
        self.pre = ref.weights.map_to(f"{self.name}.hook_pre")
        gated = ref.has(f"{self.name}.hook_pre_linear")
        self.up = ref.weights.map_to(f"{self.name}.hook_pre_linear") if gated else None
        self.down = ref.weights.map_from(f"{self.name}.hook_post")

    def __call__(self, v: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The MLP's value at a normalised input."""
        hidden = self.function(self.pre(v))
        return self.down(hidden if self.up is None else hidden * self.up(v))

    def pull(
        self, y: Float[Tensor, "... d"], held: Linearization, v: Float[Tensor, "... d"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Jᵀ y at the normalised input v, y at the neurons, and the offset.

        ``activation``: a tangent, or its gain a(g)/g. ``product`` of a gated MLP: ``tangent``, ``gate`` (a(g) held) or
        ``split`` (half through either factor).
        """
        post = self.down.pull(y)
        g = self.pre(v)
        slope, shift = self._line(g, held)
        if self.up is None:
            pulled = post * slope
            offset = self.down.constant(y) + self.pre.constant(pulled) + (post * shift).sum(-1)
            return self.pre.pull(pulled), post, offset
        u, a = self.up(v), self.function(g)
        share_u, share_g = _SHARES[held.product]
        to_u, to_g = share_u * post * a, share_g * post * u * slope
        offset = self.down.constant(y) + self.up.constant(to_u) + self.pre.constant(to_g)
        # a u = a·u' + (slope g' + shift)·u - (both counted) a·u, so that the constant makes up for what is missing.
        offset = offset + (post * ((1 - share_u) * a * u - share_g * u * (a - shift))).sum(-1)
        pulled = self.up.pull(to_u) + (self.pre.pull(to_g) if share_g else 0.0)
        return pulled, post, offset

    def factors(
        self, v: Float[Tensor, "... d"], held: Linearization
    ) -> tuple[Float[Tensor, "... f"], Float[Tensor, "... f"] | None]:
        """Return (p, q) at the normalised input v: the derivative is W_out (diag(p) W_pre + diag(q) W_up).

        q is None without a gate. A held gate makes p zero.
        """
        g = self.pre(v)
        slope, _ = self._line(g, held)
        if self.up is None:
            return slope, None
        share_u, share_g = _SHARES[held.product]
        return share_g * self.up(v) * slope, share_u * self.function(g)

    def _line(self, g: Tensor, held: Linearization) -> Pulled:
        """(slope, shift) with a(g) = slope g + shift: the tangent, or the chord from 0 (the gain where a(0) = 0)."""
        slope, shift = line(self.function, g, (), {})
        if held.activation == "tangent":
            return slope, shift
        base = self.function(torch.zeros_like(g))
        safe = torch.where(g == 0, torch.ones_like(g), g)
        return torch.where(g == 0, slope, (self.function(g) - base) / safe), base
