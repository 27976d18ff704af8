"""Self-check: closed forms against autograd on random directions, before they are used."""

import torch
from torch import Tensor

from interp.hooks.inputs import Batch
from interp.hooks.model import Model
from interp.jacobians.chain import ChainEngine, Step
from interp.jacobians.graph import GraphEngine
from interp.jacobians.places import End, Place

_PRODUCTS = 2
# Relative error of one block, and of ten layers (20 blocks), by the coarser of the model's and the sums' precision.
_ALLOWED = {
    "float64": (1e-12, 1e-11), "float32": (2e-6, 1e-5), "tf32": (2e-3, 1e-2), "float16": (2e-3, 1e-2),
    "bfloat16": (1e-2, 5e-2),
}  # fmt: skip
_BLOCKS = 20
# The products of autograd, with which closed forms are compared, are rounded as well.
_BOTH = 2.0


class FallbackWarning(UserWarning):
    """A closed form that disagreed with autograd, so that autograd was used."""


def tolerance(model: Model, precision: str = "", blocks: int | None = None) -> float:
    """Relative error that rounding explains in a product with a Jacobian over some blocks, or all of the model's."""
    blocks = 2 * model.n_layers if blocks is None else blocks
    own = str(model.dtype).removeprefix("torch.")
    if own == "float64" and model.config is not None:
        own = "float32"  # Hugging Face computes norms and softmax in float32 even in a float64 model.
    one, many = max(_ALLOWED[name] for name in (own, precision) if name in _ALLOWED)
    return _BOTH * (one if blocks <= 1 else many * max(1.0, blocks / _BLOCKS))


def check_chain(
    model: Model, batch: Batch, engine: ChainEngine, places: list[Place], ends: tuple[End, End]
) -> tuple[float, str]:
    """Return the largest relative error of two products Jᵀ w and of their adjoint, and the block at fault.

    The block is '' where there is none.
    """
    if not engine.steps:
        return 0.0, ""
    graph = GraphEngine(model, batch, ends, engine.held, 1)
    place = _spanned(places, engine.span)
    error = _error(engine, graph, place)
    blocks = sum(len(step.kinds) for step in engine.steps)
    if error <= tolerance(model, engine.precision, blocks):
        return error, ""
    worst, name = _culprit(model, batch, engine, place)
    return (worst, name) if worst > tolerance(model, engine.precision, 1) else (error, "the whole chain")


def _spanned(places: list[Place], span: slice) -> Place:
    """All that places depend on, at once: what a hook of the user's own changes at one position alone is seen."""
    every = tuple(range(span.start, span.stop))
    return Place(places[0].example, every, every, (False, False))


def _error(engine: ChainEngine, graph: GraphEngine, place: Place) -> float:
    generator = torch.Generator().manual_seed(0)
    shape = (_PRODUCTS, *engine.full_shape(place, 1))
    w = torch.randn(shape, generator=generator, dtype=torch.float64).to(engine.like)
    made = torch.cat([engine.pull(place, some) for some in w.split(engine.chunk)])
    wanted = graph.pull(place, w.to(graph.like)).to(engine.like)
    # The push against the pull: <w, J v> = <Jᵀ w, v>, over the size that such a product has.
    v = torch.randn(made[:1].shape, generator=generator, dtype=torch.float64).to(engine.like)
    adjoint = (w * engine.push(place, v)).flatten(1).sum(1) - (made * v).flatten(1).sum(1)
    errors = _relative(made, wanted), float((adjoint / made.flatten(1).norm(dim=1).clamp(min=1e-30)).abs().max())
    return max(error if error == error else float("inf") for error in errors)


def _relative(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _culprit(model: Model, batch: Batch, engine: ChainEngine, place: Place) -> tuple[float, str]:
    """The branch of which the closed form is furthest from autograd, and how far."""
    worst = (0.0, "")
    known = model.bindings.by_address  # type: ignore[union-attr]
    for step in engine.steps:
        for kind in step.kinds:
            names = _branch_sites(model, step, kind)
            if names is None:
                continue
            one = Step((kind,), step.layer, skip=False, before=not model.layout.post_ln)  # type: ignore[union-attr]
            ends = tuple(End(model.resolve(name)[0][0], known[name]) for name in names)
            alone = ChainEngine(model, batch, [one], [place], engine.held, engine.chunk, engine.like.dtype)
            error = _error(alone, GraphEngine(model, batch, (ends[0], ends[1]), engine.held, 1), place)
            worst = max(worst, (error, f"blocks.{step.layer}.{kind}"))
    return worst


def _branch_sites(model: Model, step: Step, kind: str) -> tuple[str, str] | None:
    if kind not in ("attention", "mlp"):
        return None
    middle = "hook_resid_pre" if kind == "attention" or model.layout.parallel else "hook_resid_mid"  # type: ignore[union-attr]
    return f"blocks.{step.layer}.{middle}", f"blocks.{step.layer}.hook_{'attn' if kind == 'attention' else 'mlp'}_out"
