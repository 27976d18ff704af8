"""Graph: Jacobians by autograd through the network's own code, between probes and one site."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from interp.hooks import guards
from interp.hooks.calls import DROPOUTS
from interp.hooks.errors import ModelStateError, NonFiniteError, NoPathError, TrainModeError
from interp.hooks.frozen import untouched
from interp.hooks.frozen_gradients import probed_network
from interp.hooks.inputs import Batch
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.hooks.plans import Probe
from interp.hooks.session import Read, Session
from interp.jacobians.engine import Engine
from interp.jacobians.places import End, Place

EXACT = Linearization.of("exact")
# What torch says where a reentrant checkpoint is asked for gradients at chosen tensors.
_REENTRANT = "use_reentrant"


class _NoDropout(TorchFunctionMode):
    """Refuses dropout that a call switches on: no module says so beforehand."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "").strip("_")
        if name in DROPOUTS:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            live = given.get("train", given.get("training", "alpha" not in name)) and given.get("p", 0.5) > 0
        else:
            live = name == "scaled_dot_product_attention" and (args[4] if len(args) > 4 else kwargs.get("dropout_p"))
        if live:
            raise TrainModeError(f"{name} is live in the model's forward", "evaluation mode", "call model.eval()")
        return func(*args, **kwargs)


class Recording:
    """One forward run with a zero leaf at some sites and the graph kept up to another.

    Fused attention runs as its formula, which has second derivatives and batching rules; the module's settings stay.

    Args:
        model: An attached model.
        batch: One example.
        sources: Where the leaves are.
        target: Where the run stops.
        held: What is held; ``exact`` runs the plain network, others its frozen form.

    Raises:
        NoPathError: If the target does not depend on a source.
        NonFiniteError: If the target holds NaN or infinity.
        TrainModeError: If dropout or batch statistics are live.
        ModelStateError: If the network switches gradients off, or checkpoints activations, or inference mode is on.
    """

    def __init__(self, model: Model, batch: Batch, sources: Sequence[End], target: End, held: Linearization = EXACT):
        guards.refuse_inference_mode()
        guards.refuse_compiled(model.module)
        guards.refuse_checkpointing(model.module)
        if not held.keeps_training:
            guards.refuse_training(model.module)
        run = _run if held == EXACT else _run_frozen
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self.output, self.leaves = run(model, batch, sources, target, held)
        self.can_batch = True
        refuse_independent(self.output, self.leaves, sources, target)
        if not torch.isfinite(self.output).all():
            raise NonFiniteError(f"{target.site} holds NaN or infinity", "finite activations at the reference")

    def pull(self, w: Float[Tensor, "k ..."]) -> list[Tensor]:
        """Gradients [k, 1, ...] at each leaf of k covectors [k, 1, ...] on the target."""
        if self.can_batch and len(w) > 1:
            try:
                return list(torch.autograd.grad(self.output, self.leaves, w, retain_graph=True, is_grads_batched=True))
            except RuntimeError as error:
                if "vmap" not in str(error) and "batching rule" not in str(error):
                    raise
                self.can_batch = False
        each = [torch.autograd.grad(self.output, self.leaves, one, retain_graph=True) for one in w]
        return [torch.stack(grads) for grads in zip(*each, strict=True)]

    def push(self, v: Float[Tensor, "k ..."]) -> Tensor:
        """Tangents [k, 1, ...] of the target for k tangents of the first leaf: the derivative of w -> Jᵀ w."""
        with torch.enable_grad():
            w = torch.zeros_like(self.output, requires_grad=True)
            pulled = torch.autograd.grad(self.output, self.leaves[0], w, create_graph=True)[0]
        if not pulled.requires_grad:
            return v.new_zeros(len(v), *self.output.shape)
        return torch.stack([torch.autograd.grad(pulled, w, one, retain_graph=True)[0] for one in v])


def refuse_independent(output: Tensor, leaves: Sequence[Tensor], sources: Sequence[End], target: End) -> None:
    """Refuse a target that does not depend on a source, or through recomputed activations.

    Raises:
        NoPathError: If it does not depend on one of them.
        ModelStateError: If the network checkpoints activations: hooks would be gone when they are computed again.
    """
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    try:
        if output.requires_grad:
            zero = torch.zeros_like(output)
            grads = torch.autograd.grad(output, list(leaves), zero, retain_graph=True, allow_unused=True)
    except (CheckpointError, RuntimeError) as error:
        if not isinstance(error, CheckpointError) and _REENTRANT not in str(error):
            raise
        kind = "checkpointed activations" + ("" if isinstance(error, CheckpointError) else " (use_reentrant=True)")
        raise ModelStateError(
            f"{target.site} behind {kind}", "a forward that keeps them", "turn checkpointing off"
        ) from error
    for end, grad in zip(sources, grads, strict=True):
        if grad is None:
            raise NoPathError(
                f"target {target.site}, which does not depend on {end.site}", "a source that the target depends on",
                "jacobian(..., allow_zero=True) gives the zeros",
            )  # fmt: skip


def _run(model: Model, batch: Batch, sources, target: End, held: Linearization) -> tuple[Tensor, list[Tensor]]:
    reads = [Read(end.site, end.binding) for end in sources]
    probes = [Probe(read.site) for read in reads]
    edits = [probe.edit(read) for probe, read in zip(probes, reads, strict=True)]
    end = Read(target.site, target.binding)
    # A free module may run twice: only a whole run, with its own value read as well, can tell.
    free = {read for read in reads if read.binding.where.startswith("raw")} - {end}
    session = Session(
        model.module, [end, *free], edits, stop=not free and not end.binding.where.startswith("raw"), keep_graph=True,
        size=batch.size, extent=batch.extent,
    )  # fmt: skip
    with untouched(model.module), _NoDropout(), session:
        model.module(*batch.args, **batch.kwargs)
    return session.values[end.site], [probe.leaf for probe in probes]


def _run_frozen(model: Model, batch: Batch, sources, target: End, held: Linearization) -> tuple[Tensor, list[Tensor]]:
    network = probed_network(model, batch, held, [end.site for end in sources], target.site)
    return network.output, [probe.leaf for probe in network.probes]


class GraphEngine(Engine):
    """Jacobians of one example by autograd.

    Args:
        model: An attached model.
        batch: One example.
        ends: Source and target.
        held: What is held.
        chunk: How many rows run as one batched backward pass.
        local: Whether the target at a position depends on the source at that position alone.
    """

    def __init__(
        self, model: Model, batch: Batch, ends: tuple[End, End], held: Linearization, chunk: int, local: bool = False
    ):
        self.recording = Recording(model, batch, [ends[0]], ends[1], held)
        self.chunk, self.local, self.length = chunk, local, batch.lengths[0] if batch.ids is not None else 0
        leaf, output = self.recording.leaves[0], self.recording.output
        skip = [2 if batch.ids is not None and end.has_positions else 1 for end in ends]
        self.shapes = tuple(leaf.shape[skip[0] :]), tuple(output.shape[skip[1] :])
        half = output.dtype in (torch.float16, torch.bfloat16)
        self.like = output.detach().new_empty(0, dtype=torch.float32 if half else output.dtype)
        self.method = "autograd, by rows" + (" of all positions at once" if local else "")
        self.start = batch.starts[0] if batch.ids is not None else 0
        self.weights = sum(p.numel() for p in model.module.parameters() if p.ndim > 1)

    def push(self, place: Place, v: Tensor) -> Tensor:
        """By the derivative of the pull."""
        leaf = self.recording.leaves[0]
        full = self.recording.push(self._widen(v.to(leaf.dtype), place.sources, leaf))
        return self._narrow(full, place.targets).to(self.like.dtype)

    def pull(self, place: Place, w: Tensor) -> Tensor:
        """By backward passes, as one batch where the network has the rules for it."""
        output = self.recording.output
        found = [
            self._narrow(self.recording.pull(self._widen(some, place.targets, output))[0], place.sources)
            for some in w.to(output.dtype).split(self.chunk)
        ]
        return torch.cat(found).to(self.like.dtype)

    def rows_of_all(self, rows: Tensor | None) -> Float[Tensor, "pos out in"]:
        """Rows of every position's own Jacobian: one backward pass for each row, whatever the number of positions."""
        output, (source, target) = self.recording.output, self.shapes
        which = torch.arange(math.prod(target)) if rows is None else rows
        found = self.like.new_empty(output.shape[1], len(which), math.prod(source))
        for start in range(0, len(which), self.chunk):
            some = which[start : start + self.chunk].to(output.device)
            seeds = output.new_zeros(len(some), *output.shape[:2], math.prod(target))
            seeds.scatter_(3, some[:, None, None, None].expand(-1, *output.shape[:2], 1), 1.0)
            grads = self.recording.pull(seeds.reshape(len(some), *output.shape))[0]
            found[:, start : start + len(some)] = grads[:, 0].flatten(2).transpose(0, 1)
        return found

    def by_columns(self, n_in: int, n_out: int) -> bool:
        """Rows are cheaper: a column costs two backward passes."""
        return 3 * n_in < n_out

    def _widen(self, part: Tensor, positions: tuple[int, ...] | None, like: Tensor) -> Tensor:
        if positions is None:
            return part[:, None]
        full = part.new_zeros(len(part), *like.shape)
        full[:, 0, [self.start + p for p in positions]] = part
        return full

    def _narrow(self, full: Tensor, positions: tuple[int, ...] | None) -> Tensor:
        return full[:, 0] if positions is None else full[:, 0, [self.start + p for p in positions]]
