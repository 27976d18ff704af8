"""Unembedding: from the normalised stream to logits, as a step of a chain."""

from torch import Tensor

from interp.hooks.layouts import child
from interp.hooks.linearization import Linearization
from interp.hooks.weights import linear_weight
from interp.jacobians.heads import cap_slope
from interp.propagation.reference import Reference


class Unembedding:
    """W_U with the model's scale and, at the logits, its soft-cap's derivative."""

    name = "unembed"

    def __init__(self, ref: Reference, site: str, held: Linearization):
        layout = ref.weights.layout
        head = child(ref.model.module, layout.unembed or "")
        assert head is not None
        capped = site == "logits"
        self.weight = linear_weight(head, layout.unembed or "").detach().to(ref.weights.dtype)
        self.scale = layout.logit_scale if capped else 1.0
        cap = layout.logit_softcap if capped else None
        self.slope = None
        if cap is not None:
            self.slope = cap_slope(ref.at("logits"), ref.at("unembed.hook_out") * self.scale, cap, held)

    def push(self, v: Tensor, span: slice) -> Tensor:
        """Tangents of the logits."""
        out = v @ self.weight.T * self.scale
        return out if self.slope is None else out * self.slope[span]

    def pull(self, w: Tensor, span: slice) -> Tensor:
        """Covectors on the normalised stream."""
        return (w if self.slope is None else w * self.slope[span]) @ self.weight * self.scale

    def dense(self, position: int, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """The matrix at one position."""
        slope = None if self.slope is None else self.slope[position]
        weight = self.weight if rows is None else self.weight[rows]
        weight = weight if columns is None else weight[:, columns]
        if slope is not None:
            weight = weight * (slope if rows is None else slope[rows])[:, None]
        return weight * self.scale
