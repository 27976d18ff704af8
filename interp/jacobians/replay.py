"""Replay: Jacobians of networks over pictures, pushed and pulled through their recorded decisions.

The tape of `LinearScope` under ``exact``: each unit's slope, norms and products as their tangents. Columns are one run
of the network's own code without its constants; no second derivatives and no forward-mode rules are needed.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from interp.hooks import guards
from interp.hooks.budget import Chunked
from interp.hooks.errors import CompletenessError, NonFiniteError
from interp.hooks.frozen_gradients import probed_network
from interp.hooks.inputs import Batch
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.jacobians.engine import Engine
from interp.jacobians.graph import refuse_independent
from interp.jacobians.places import End, Place

# How far columns and rows may differ by rounding.
_ADJOINT = {torch.float64: 1e-7, torch.float32: 1e-3}


class ReplayEngine(Engine):
    """Jacobians of one picture.

    Args:
        model: A model without token inputs.
        batch: One example.
        ends: Source and target.
        held: What is held.
        budget: Bytes that probes may take together.

    Attributes:
        bytes_each: What one probe takes.
        flops: Of one probe.

    Raises:
        LinearizationError: If a call has no rule, or columns and rows differ.
        NoPathError: If the target does not depend on the source.
        ModelStateError: If the network checkpoints activations.
        NonFiniteError: If the target holds NaN or infinity.
    """

    def __init__(self, model: Model, batch: Batch, ends: tuple[End, End], held: Linearization, budget: int):
        guards.refuse_compiled(model.module)
        if not held.keeps_training:
            guards.refuse_training(model.module)
        self.network = network = probed_network(model, _channels_last(batch), held, [ends[0].site], ends[1].site)
        output, leaf = network.output, network.leaves[0]
        refuse_independent(output, network.leaves, ends[:1], ends[1])
        if not torch.isfinite(output).all():
            raise NonFiniteError(f"{ends[1].site} holds NaN or infinity", "finite activations at the reference")
        self.shapes = tuple(leaf.shape[1:]), tuple(output.shape[1:])
        self.like = output.detach().new_empty(0)
        self.method, self.chunk = "replay of recorded slopes", 1
        self._check_adjoint(leaf, output)  # measures what a probe takes as well
        self.bytes_each = max(network.push_bytes or 1, network.pull_bytes or 1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.forward(batch)
        self.flops = float(counter.get_total_flops())
        self._push = Chunked(network.push_from, network.push_bytes or 1, budget, "auto", "a column")
        self._pull = Chunked(network.pull_to, network.pull_bytes or 1, budget, "auto", "a row")

    def push(self, place: Place, v: Tensor) -> Tensor:
        """Columns: the network's own code without constants."""
        return self._push(v) if hasattr(self, "_push") else self.network.push_from(v)

    def _check_adjoint(self, leaf: Tensor, output: Tensor) -> None:
        """Compare <w, J v> with <Jᵀ w, v>: where a network hides calls, columns would lack what rows have."""
        generator = torch.Generator().manual_seed(0)
        draw = lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
        v, w = draw(leaf), draw(output)
        with torch.enable_grad():
            pulled = self.network.pull_to(w)
        pushed = self.network.push_from(v).detach()
        # Rounding is relative to the larger of the two products' terms, which may cancel.
        size = max(float(pushed.norm() * w.norm()), float(pulled.norm() * v.norm()))
        gap = abs(float((w * pushed).sum() - (pulled * v).sum()))
        if not gap <= _ADJOINT[leaf.dtype] * size:
            raise CompletenessError(
                f"columns and rows of one Jacobian that differ by {gap / size:.1e}", "one linear map",
                "the network hides calls, as torch.vmap does: method='autograd' does not replay them",
            )  # fmt: skip

    def pull(self, place: Place, w: Tensor) -> Tensor:
        """Rows: backwards through the recording."""
        with torch.enable_grad():
            return self._pull(w)


def _channels_last(batch: Batch) -> Batch:
    """Pictures [1, channel, height, width] in the order of memory that convolutions on a CPU are fastest with."""
    turn = lambda v: (
        v.contiguous(memory_format=torch.channels_last)
        if isinstance(v, Tensor) and v.ndim == 4 and not v.is_cuda
        else v
    )
    return Batch(tuple(map(turn, batch.args)), {k: turn(v) for k, v in batch.kwargs.items()}, batch.size)
