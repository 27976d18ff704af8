"""Where a chain's matrices come from one kernel for many tokens: one layer's MLP, at single tokens, on a GPU."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp.jacobians.branches import GateBranch
from interp.jacobians.kernels import device
from interp.jacobians.kernels.choice import Choice
from interp.jacobians.kernels.sandwich import Precision, Sandwich, sandwich_norms, trial
from interp.jacobians.places import Place

if TYPE_CHECKING:
    from interp.jacobians.chain import ChainEngine
    from interp.jacobians.results import Jacobians


def precision_of(engine: "ChainEngine") -> Precision:
    """Of float32 products."""
    return "tf32" if engine.tf32 else "float32"


def sandwich_of(
    engine: "ChainEngine", places: list[Place], rows: Tensor | None, columns: Tensor | None
) -> Sandwich | None:
    """What one kernel makes the matrices of several places from; None where they are taken one by one."""
    if not device.fits_kernels(engine.like) or len(engine.stages) != 1:
        return None
    step, (branch, *others) = engine.stages[0]
    apart = all(p.single == (True, True) and p.sources == p.targets for p in places)
    if others or not isinstance(branch, GateBranch) or not apart:
        return None
    if not engine.composes(places[0], min(engine.count(places[0], 0, columns), engine.count(places[0], 1, rows))):
        return None
    return branch.sandwich([(p.sources or (0,))[0] for p in places], rows, columns, step.skip)


def choice_of(engine: "ChainEngine", places: list[Place], rows: Tensor | None, columns: Tensor | None) -> Choice | None:
    """Whether a kernel or torch makes the matrices of several places; None where they are taken one by one."""
    with engine.products():
        x = sandwich_of(engine, places, rows, columns)
        return None if x is None else trial(x, precision_of(engine))


def fused_norms(jacobians: "Jacobians") -> Tensor | None:
    """Frobenius norms of one layer's MLP Jacobians without writing one; None where no kernel would run."""
    source, target = jacobians.ends
    found = []
    for index, engine in jacobians.engines.items():
        places = [place for place in jacobians.places if place.example == index]
        if not hasattr(engine, "stages"):
            return None
        with engine.products():
            x = sandwich_of(engine, places, target.indices, source.indices)  # type: ignore[arg-type]
            if x is None:
                return None
            found.append(sandwich_norms(x, precision_of(engine)).sqrt())  # type: ignore[arg-type]
    return torch.cat(found)
