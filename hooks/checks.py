"""Checks of a LinearScope, each with its tolerance: what must hold whatever the network."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.hooks.errors import CompletenessError, MixedBatchError, NonFiniteError
from interp.hooks.table import Table

if TYPE_CHECKING:
    from interp.hooks.linear_scope import LinearScope


def refuse_incomplete(scope: "LinearScope") -> None:
    """Refuse a scope whose parts do not sum to the network's output.

    Raises:
        NonFiniteError: If F x or r holds NaN or infinity.
        CompletenessError: If F x + r is not y; the unit that is not affine is named.
    """
    if not torch.isfinite(scope.Fx + scope.r).all():
        raise NonFiniteError(
            "F x or r holds NaN or infinity",
            "finite derivatives at the reference",
            "a root or a norm of zero has none: choose norm='frozen', or another reference",
        )
    gap = float((scope.Fx + scope.r - scope.y).abs().max())
    size = max(float(t.abs().max()) for t in (scope.Fx, scope.r, scope.y))
    if not gap <= scope.worst_tolerance * max(size, 1e-30):
        worst, unit = max(scope.network.unit_gaps(), default=(0.0, ""))
        culprit = f"; {unit} is not affine, by {worst:.1e}" if worst > scope.worst_tolerance else ""
        raise CompletenessError(
            f"F x + r differs from the output by {gap:.1e} (of {size:.1e}){culprit}",
            f"a relative difference below {scope.worst_tolerance:.0e}",
            "a part of this network is not what the tape saw: scope a smaller part of it with output=",
        )


def check(scope: "LinearScope", probes: int, seed: int) -> Table:
    """Return the checks: completeness, reference untouched, units, replay against F, adjoint; with tolerances."""
    made, size = torch.Generator().manual_seed(seed), float(scope.y.abs().max())
    gaps = [
        ("completeness: F x + r = y", scope.Fx + scope.r - scope.y, size),
        ("frozen network at the reference = y", scope.network.output.detach() - scope.y, size),
    ]
    rows = [_row(*gap, scope.worst_tolerance) for gap in gaps]
    worst, unit = max(scope.network.unit_gaps(), default=(0.0, "none"))
    gaps = [(f"every unit is affine: {unit}", torch.tensor(worst), 1.0)]
    for _ in range(probes):
        gaps += [_replay_gap(scope, made, size), _adjoint_gap(scope, made)]
    rows += [_row(*gap, scope.map_tolerance) for gap in gaps + _one_batch_gap(scope, made, size)]
    return Table(rows, f"checks of LinearScope ({scope.network.held.name})")


def _replay_gap(scope: "LinearScope", made: torch.Generator, size: float) -> tuple[str, Tensor, float]:
    probes = _large(scope, made)
    parts = (b.map.matvec(probes[n][0])[None] for n, b in scope.blocks.items())
    pushed = sum(parts, torch.zeros_like(scope.y))
    scale = max(float(pushed.abs().max()), size)
    return "linearity: replay at 10x = F v + r", scope.replay(probes) - pushed - scope.r, scale


def _one_batch_gap(scope: "LinearScope", made: torch.Generator, size: float) -> list[tuple[str, Tensor, float]]:
    """The paper's engine against the tape; none where the network mixes a batch, or decides in another dtype."""
    if scope.dtype != scope.y.dtype:
        return []
    probes = _large(scope, made)
    try:
        found = scope.run_together(probes).probes
    except MixedBatchError:
        return []
    scale = max(size, float(found.abs().max()))
    return [("one batch: beside the reference at 10x = replay", found - scope.replay(probes), scale)]


def _large(scope: "LinearScope", made: torch.Generator) -> dict[str, Tensor]:
    """A probe for each block, of ten times its norm."""
    noises = {name: _noise(block.value, made) for name, block in scope.blocks.items()}
    return {name: 10 * noise * scope.blocks[name].value.norm() / noise.norm() for name, noise in noises.items()}


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
