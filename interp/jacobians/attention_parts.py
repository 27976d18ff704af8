"""Parts of an attention block's Jacobian: what moves the output through values, and what through the pattern."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.linearization import LinearizationLike
from interp.hooks.model import Model
from interp.hooks.table import Rows
from interp.jacobians.engine import Engine
from interp.jacobians.heads import AttentionBranch
from interp.jacobians.jacobian import jacobian
from interp.jacobians.places import Place
from interp.jacobians.plan import refuse_large
from interp.jacobians.results import Jacobians

_PARTS = ("value", "query", "key")


@dataclass(frozen=True, eq=False)
class AttentionParts(Rows):
    """d hook_attn_out_t / d hook_resid_pre_s of one layer, in parts that add up to it.

    Attributes:
        value: Through the values, the pattern held (OV) [n, out, in].
        query: Through the query of t, where s is t; else zero.
        key: Through the key of s.
        layer: Which block.
        head: The only head that is counted, or None for all.
        places: [example, s, t] of each.
        linearization: What was held.
    """

    value: Float[Tensor, "n out in"] = field(repr=False)
    query: Float[Tensor, "n out in"] = field(repr=False)
    key: Float[Tensor, "n out in"] = field(repr=False)
    layer: int
    head: int | None
    places: list[list[int]] = field(repr=False)
    linearization: str

    @property
    def pattern(self) -> Float[Tensor, "n out in"]:
        """Through the pattern (QK): query and key."""
        return self.query + self.key

    @property
    def whole(self) -> Float[Tensor, "n out in"]:
        """The sum of the parts: the Jacobian."""
        return self.value + self.pattern

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each: example, positions, Frobenius norms of the parts and of the whole."""
        names = (*_PARTS, "whole")
        norms = {name: getattr(self, name).flatten(1).norm(dim=1).tolist() for name in names}
        return [
            {"layer": self.layer, "head": self.head, "example": e, "source": s, "target": t}
            | {name: norms[name][i] for name in names}
            for i, (e, s, t) in enumerate(self.places)
        ]


def attention_parts(
    model: Model, inputs: Any, layer: int, positions: Any = "same", *, head: int | None = None,
    linearization: LinearizationLike = "exact", budget: int | str = "2GiB", check: bool = True,
) -> AttentionParts:  # fmt: skip
    """Return the value, query and key parts of an attention block's Jacobian, stream to what it adds to the stream.

    With A the pattern, o = A v and g the scores' derivative by queries times keys, each head gives in front of W_O
    A_ts W_V (value), g A_ts (v_s - o_t) (R_sᵀ q_t)ᵀ W_K (key), and at s = t Σ_j A_tj g (v_j - o_t) k_jᵀ R_t W_Q
    (query); norms before and behind the block are part of each. Elhage et al. 2021, "A mathematical framework for
    transformer circuits", call the first OV and the others QK; here the derivative of the pattern is included.

    Args:
        model: A decoder.
        inputs: As for `jacobian`.
        layer: Which block.
        positions: As for `jacobian`, except that each map has one source and one target position.
        head: Count this head alone.
        linearization: Where the pattern is held, query and key parts are zero.
        budget: Bytes for all three parts.
        check: Whether the whole is compared with autograd first.

    Raises:
        ArgumentError: If there is no such layer or head, positions are not single, or the block has no closed form.
        SizeError: If the parts do not fit the budget.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> parts = interp.attention_parts(model, "The cat sat", 3, positions=[(1, 2)])
        >>> parts.value.shape, bool((parts.query == 0).all())
        (torch.Size([1, 576, 576]), True)
    """
    if not 0 <= layer < model.n_layers:
        raise ArgumentError(f"layer={layer}", f"0..{model.n_layers - 1}")
    ends = f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_attn_out"
    between = jacobian(
        model, inputs, *ends, positions, linearization=linearization, budget=budget, method="closed", check=check
    )
    assert isinstance(between, Jacobians)
    if not all(place.single == (True, True) for place in between.places):
        raise ArgumentError(f"positions={positions!r}", "one source and one target position for each map", "use 'same'")
    n, rows, columns = between.shape
    refuse_large(3 * n * rows * columns * between.like.element_size(), between.budget, n, rows, columns)
    made = [_parts(between.engines[place.example], place, head) for place in between.places]
    stacked = {name: torch.stack([one[name] for one in made]) for name in _PARTS}
    places = [[p.example, p.sources[0], p.targets[0]] for p in between.places]  # type: ignore[index]
    return AttentionParts(**stacked, layer=layer, head=head, places=places, linearization=between.linearization.name)


@torch.no_grad()
def _parts(engine: Engine, place: Place, head: int | None) -> dict[str, Tensor]:
    branch = engine.stages[0][1][0]  # type: ignore[attr-defined]
    assert isinstance(branch, AttentionBranch)
    heads = branch.wo.shape[0]
    if head is not None and not 0 <= head < heads:
        raise ArgumentError(f"head={head}", f"0..{heads - 1}, or None for all")
    (s,), (t,) = place.sources or (0,), place.targets or (0,)
    chosen = slice(None) if head is None else slice(head, head + 1)
    found = {}
    for name, part in branch.paths(t, s).items():
        core = branch.wo[chosen].flatten(0, 1).T @ part[chosen].flatten(0, 1)
        found[name] = branch.behind.finish_left(branch.before.finish(core, s), t)
    zero = torch.zeros_like(found["value"])
    return {name: found.get(name, zero) for name in _PARTS}
