"""The interchange intervention itself: coordinates of the code of a base set to those of its sources."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
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
        weights: [*, variables, code]: which coordinates are whose; soft ones mix.
        rows: Number of bases.
    """
    parts = tau.parts()
    z, rest = tau.encode(h, parts)
    out, *sources = z.split([rows, *map(len, where)], -2)
    for k, (some, source) in enumerate(zip(where, sources, strict=True)):
        if not len(some):
            continue
        weight, old = weights[..., k, None, :], out if len(some) == rows else out.index_select(-2, some)
        hard = weight.dtype == torch.bool
        new = torch.where(weight, source, old) if hard else torch.lerp(old, source, weight.expand_as(old))
        out = new if len(some) == rows else out.index_copy(-2, some, new)
    return tau.decode(out, None if rest is None else rest[..., :rows, :], parts)
