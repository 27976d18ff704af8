"""The interchange intervention itself: coordinates of the code of a base set to those of its sources."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from interp.causal.maps import AlignmentMap


def rows_needed(
    base: Int64[Tensor, "rows"], sources: Int64[Tensor, "rows variables"], chosen: Bool[Tensor, "rows variables"]
) -> tuple[Int64[Tensor, "needed"], list[Tensor]]:
    """Return the inputs that a batch needs, bases first, and for each variable the bases that it is set in.

    Sources of variables that are not set are left out.
    """
    where = [chosen[:, k].nonzero().flatten() for k in range(chosen.shape[1])]
    return torch.cat([base, *(sources[rows, k] for k, rows in enumerate(where))]), where


def swap(tau: AlignmentMap, h: Tensor, where: Sequence[Tensor], weights: Tensor, rows: int) -> Tensor:
    """Return h* = τ⁻¹(z*) of the bases, where z* takes block k from source k and everything else from the base.

    Args:
        tau: The map, or a stack of maps.
        h: [*, needed, width], in the order of `rows_needed`.
        where: For each variable the bases that it is set in.
        weights: [*, variables, code]: which coordinates are whose; soft ones mix, z* = z_b + Σ_k weights_k (z_k - z_b).
        rows: Number of bases.
    """
    parts = tau.parts()
    z, rest = tau.encode(h, parts)
    base, *sources = z.split([rows, *map(len, where)], -2)
    out = base
    for k, (some, source) in enumerate(zip(where, sources, strict=True)):
        if not len(some):
            continue
        weight, pick = weights[..., k, None, :], lambda x, some=some: _at(x, some, rows)
        hard = weight.dtype == torch.bool
        new = torch.where(weight, source, pick(out)) if hard else pick(out) + weight * (source - pick(base))
        out = new if len(some) == rows else out.index_copy(-2, some, new)
    return tau.decode(out, None if rest is None else rest[..., :rows, :], parts)


def _at(x: Tensor, some: Tensor, rows: int) -> Tensor:
    return x if len(some) == rows else x.index_select(-2, some)


def swap_by_matrices(h: Float[Tensor, "base_and_sources rows width"], matrices: Tensor) -> Tensor:
    """Return h* = h_b + Σ_k (h_k - h_b) M_k for a stack of linear maps of one place.

    Args:
        h: Activations of the bases, then of each variable's sources: the base itself where it is not set.
        matrices: [lanes, variables, width, width], of `AlignmentMap.swap_matrices`.
    """
    base, *sources = h
    moves, lanes = torch.cat([source - base for source in sources], 1), (len(matrices), -1, -1)
    return torch.baddbmm(base.expand(lanes), moves.expand(lanes), matrices.flatten(1, 2))
