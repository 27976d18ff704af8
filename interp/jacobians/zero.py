"""Zero: Jacobians that are zero by structure, of the shape that they would have."""

import torch
from torch import Tensor

from interp.hooks import guards
from interp.hooks.inputs import Batch
from interp.hooks.model import Model
from interp.hooks.session import Read, Session
from interp.jacobians.engine import Engine
from interp.jacobians.places import End, Place


class ZeroEngine(Engine):
    """Zeros between two sites of one example, of which the second does not depend on the first.

    Args:
        model: An attached model.
        batch: One example.
        ends: Source and target.
    """

    def __init__(self, model: Model, batch: Batch, ends: tuple[End, End]):
        guards.refuse_compiled(model.module)
        reads = [Read(end.site, end.binding) for end in ends]
        with torch.no_grad(), Session(model.module, reads, size=batch.size, extent=batch.extent) as session:
            model.forward(batch)
        values = [session.values[end.site] for end in ends]
        skip = [2 if batch.ids is not None and end.has_positions else 1 for end in ends]
        self.shapes = tuple(values[0].shape[skip[0] :]), tuple(values[1].shape[skip[1] :])
        half = values[1].dtype in (torch.float16, torch.bfloat16)
        self.like = values[1].new_empty(0, dtype=torch.float32 if half else values[1].dtype)
        self.method, self.chunk = "zero by structure", 1

    def push(self, place: Place, v: Tensor) -> Tensor:
        """Zeros."""
        return self.like.new_zeros(len(v), *self.full_shape(place, 1))

    def pull(self, place: Place, w: Tensor) -> Tensor:
        """Zeros."""
        return self.like.new_zeros(len(w), *self.full_shape(place, 0))

    def dense(self, place: Place, rows: Tensor | None, columns: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Zeros."""
        if out is not None:
            return out.zero_()
        return self.like.new_zeros(self.count(place, 1, rows), self.count(place, 0, columns))
