"""Checks of a LinearScope, each with its tolerance: what must hold whatever the network."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.hooks.table import Table

if TYPE_CHECKING:
    from interp.hooks.linear_scope import LinearScope


def check(scope: "LinearScope", probes: int, seed: int) -> Table:
    """Return the checks: completeness, reference untouched, units, replay against F, adjoint; with tolerances."""
    made, size = torch.Generator().manual_seed(seed), float(scope.y.abs().max())
    gaps = [
        ("completeness: F x + r = y", scope.Fx + scope.r - scope.y, size),
        ("frozen network at the reference = y", scope.network.output.detach() - scope.y, size),
    ]
    for _ in range(probes):
        gaps += [_replay_gap(scope, made, size), _adjoint_gap(scope, made)]
    worst, unit = max(scope.network.unit_gaps(), default=(0.0, "none"))
    gaps.insert(2, (f"every unit is affine: {unit}", torch.tensor(worst), 1.0))
    rows = [_row(*gap, scope.worst_tolerance) for gap in gaps]
    return Table(rows, f"checks of LinearScope ({scope.network.held.name})")


def _replay_gap(scope: "LinearScope", made: torch.Generator, size: float) -> tuple[str, Tensor, float]:
    probes = {}
    for name, block in scope.blocks.items():
        noise = _noise(block.value, made)
        probes[name] = 10 * noise * block.value.norm() / noise.norm()
    parts = (b.map.matvec(probes[n][0])[None] for n, b in scope.blocks.items())
    pushed = sum(parts, torch.zeros_like(scope.y))
    scale = max(float(pushed.abs().max()), size)
    return "linearity: replay at 10x = F v + r", scope.replay(probes) - pushed - scope.r, scale


def _adjoint_gap(scope: "LinearScope", made: torch.Generator) -> tuple[str, Tensor, float]:
    v, w = _noise(scope.x, made)[0], _noise(scope.y, made)[0]
    pushed, pulled = scope.matvec(v).double(), scope.rmatvec(w).double()
    gap = (pushed * w.double()).sum() - (v.double() * pulled).sum()
    return "adjoint: <F v, w> = <v, Fᵀ w>", gap, float(pushed.norm() * w.double().norm())


def _noise(like: Tensor, made: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=made, dtype=torch.float32).to(like)


def _row(name: str, gap: Tensor, scale: float, tolerance: float) -> dict[str, Any]:
    error = float(gap.abs().max()) / max(scale, 1e-30)
    return {"check": name, "error": error, "tolerance": tolerance, "holds": error <= tolerance}
