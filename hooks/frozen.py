"""FrozenNetwork: a network around one input with every decision held; recorded once, pushed and pulled through."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from interp.hooks import calls
from interp.hooks.budget import Meter
from interp.hooks.errors import InputError
from interp.hooks.inputs import Batch
from interp.hooks.layouts import child
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.hooks.one_batch import Together, run_together
from interp.hooks.rules import finish
from interp.hooks.session import Read, Session
from interp.hooks.tape import Constant, Entry, Tape
from interp.hooks.views import first_tensor, with_first

Select = Callable[[Any], Tensor] | Read

# Temporaries of a rule, beside the live values: the product and the sum of slope * v + offset.
_TEMPORARIES = 2
# Backwards through a graph, the gradients of a value and of what it was made from are alive together.
_BACKWARD = 2


class FrozenNetwork:
    """y = Σ_b F_b x_b + r over input blocks b, three ways.

    ``pull`` differentiates the recorded graph, ``push`` replays the tape without constants, ``replay`` replays it with
    them. The three agree only if the recording is affine, which `LinearScope.check` tests.

    Args:
        model: An attached model.
        batch: One example.
        held: What is held.
        select: Picks the output tensor from what the module returns; or a site to stop at, with its binding.
        values: Values of the input blocks, if not those of the batch.
        compute_dtype: What is computed after the recording is computed in this dtype; by default the model's own. The
            decisions are those of the model's own dtype, cast. The network then keeps a copy of the weights in that
            dtype, put in the place of the model's own while it runs.

    Attributes:
        values: Value of each input block [1, ...].
        output: The frozen network's output at the reference, with its graph.
        entries: The tape.
        push_bytes: Memory that a push takes for each probe, measured at the first one; None before.
    """

    def __init__(
        self, model: Model, batch: Batch, held: Linearization, select: Select, values: dict[str, Tensor] | None = None,
        compute_dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.model, self.batch, self.held, self.select = model, batch, held, select
        self._weights: dict[int, Tensor] = {}
        self.push_bytes: int | None = None
        self.values = self._input_blocks() if values is None else values
        self.dtype = self.own_dtype if compute_dtype is None else compute_dtype
        self._leaves = self._leaves_of(self.values, self.own_dtype)
        tape = Tape(model.module, held)
        self.output = finish(self._through(tape, self._leaves))
        self.entries: list[Entry] = tape.entries
        if self.dtype != self.own_dtype:
            self._widen()

    @property
    def own_dtype(self) -> torch.dtype:
        """The dtype in which the model itself runs."""
        return self.model.dtype if self.batch.ids is not None else self._slot.dtype

    @property
    def pull_bytes(self) -> int | None:
        """Memory that a pull takes for each direction, or None before the first push."""
        return None if self.push_bytes is None else _BACKWARD * self.push_bytes

    def _leaves_of(self, values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return calls.mark_live({n: v.detach().to(dtype).clone().requires_grad_() for n, v in values.items()})

    @torch.no_grad()
    def _wide(self, value: Any) -> Any:
        """A value with its narrower floating-point tensors cast to the dtype of what is computed."""
        bits = torch.finfo(self.dtype).bits
        narrow = lambda v: isinstance(v, Tensor) and v.is_floating_point() and torch.finfo(v.dtype).bits < bits
        return tree_map(lambda v: v.to(self.dtype) if narrow(v) else v, value)

    def _widen(self) -> None:
        """From now on in the dtype of what is computed: weights, decisions, inputs, and the graph at the reference."""
        module = self.model.module
        for t in (*module.parameters(), *module.buffers()):
            if (wide := self._wide(t)) is not t:
                self._weights[id(t)] = wide.detach()
        self.entries = [replace(entry, held=self._wide(entry.held)) for entry in self.entries]
        self.values = self._wide(self.values)
        self._leaves = self._leaves_of(self.values, self.dtype)
        self.output = self._through(Tape(module, self.held, self.entries), self._leaves)

    def replay(self, blocks: dict[str, Tensor]) -> Tensor:
        """Return Σ F v + r for other values of the blocks [n, ...], by the network's own code."""
        tape = Tape(self.model.module, self.held, self.entries)
        tape.graphless = True
        return self._through(tape, self._probes(blocks))

    def together(self, blocks: dict[str, Tensor], y: Tensor, tolerance: float) -> Together:
        """Return y and Σ F v + r from one batch of the reference and its probes; nothing that was recorded is used.

        Raises:
            MixedBatchError: If the network mixes the items of a batch.
        """
        values = self._probes(blocks)
        return run_together(self._through, self.model.module, self.held, self.values, values, y, tolerance)

    def push(self, blocks: dict[str, Tensor]) -> Tensor:
        """Return Σ F v for values of some blocks [n, ...]: a replay that drops every constant where it would enter."""
        values = self._probes(blocks)
        tape = Tape(self.model.module, self.held, self.entries, homogeneous=True)
        if self.push_bytes is not None:
            return self._through(tape, values)
        tape.meter = meter = Meter()
        meter.see(values)
        out = self._through(tape, values)
        self.push_bytes = (meter.peak + _TEMPORARIES * meter.largest) // max(1, len(out))
        return out

    def _probes(self, blocks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Live copies of given values of some blocks, zeros for the others."""
        n = len(next(iter(blocks.values())))
        return calls.mark_live(
            {
                name: blocks[name].detach().to(self.dtype, copy=True)
                if name in blocks
                else value.new_zeros(n, *value.shape[1:])
                for name, value in self.values.items()
            }
        )

    def pull(self, block: str, w: Tensor) -> Tensor:
        """Return Fᵀ w for output directions [n, ...] as one batch."""
        leaf = self._leaves[block]
        if len(w) == 1:
            return torch.autograd.grad(self.output, leaf, w, retain_graph=True)[0]
        return torch.autograd.grad(self.output, leaf, w[:, None], retain_graph=True, is_grads_batched=True)[0][:, 0]

    def constants(self, w: Tensor) -> list[tuple[Constant, Tensor]]:
        """Return each call's constant with the gradient of <w, y> at its output: r · w is the sum of their products."""
        found: list[Constant] = []
        tape = Tape(self.model.module, self.held, self.entries, constants=found)
        zeros = {name: torch.zeros_like(value) for name, value in self.values.items()}
        out = self._through(tape, self._leaves_of(zeros, self.dtype))
        leaves = [c.leaf for c in found]
        grads = torch.autograd.grad(out, leaves, w[None], allow_unused=True) if leaves else ()
        return [(c, torch.zeros_like(c.leaf) if g is None else g) for c, g in zip(found, grads, strict=True)]

    def unit_gaps(self) -> list[tuple[float, str]]:
        """Return how far each unit is from affine in its live arguments, relative to its values, and its call."""
        found: list[tuple[float, str]] = []
        values = self._leaves_of(self.values, self.dtype)
        self._through(Tape(self.model.module, self.held, self.entries, gaps=found), values)
        return found

    def _input_blocks(self) -> dict[str, Tensor]:
        """Values of the input blocks [1, ...]: embeddings of a token model, else the first floating-point argument."""
        if self.batch.ids is not None:
            return _embeddings(self.model, self.batch)
        x = next((a for a in (*self.batch.args, *self.batch.kwargs.values()) if isinstance(a, Tensor)), None)
        if x is None or not x.is_floating_point():
            raise InputError(
                f"an input of dtype {None if x is None else x.dtype}",
                "a floating-point input",
                "linearise from an embedding: attach with a layout",
            )
        return {"input": x}

    def _through(self, tape: Tape, values: dict[str, Tensor]) -> Tensor:
        """The output for values of the blocks, the network's own code run under a tape."""
        module = self.model.module
        with wearing(module, self._weights), untouched(module), tape.running(), self._inputs_from(values):
            if isinstance(self.select, Read):
                session = Session(self.model.module, [self.select], stop=True, keep_graph=True)
                with session:
                    self._call(values)
                selected = session.values[self.select.site]
            else:
                selected = self.select(self._call(values))
        tape.check_finished()
        return selected

    def _call(self, values: dict[str, Tensor]) -> Any:
        n = next(iter(values.values())).shape[0]
        if self.batch.ids is not None:
            repeat = lambda v: self._given(v).expand(n, *v.shape[1:]) if isinstance(v, Tensor) else v
            kwargs = {k: repeat(v) for k, v in self.batch.kwargs.items()}
            return self.model.module(*map(repeat, self.batch.args), **kwargs)
        # A copy of the leaf, so that a network that writes to its input in place may do so.
        swap = lambda v: values["input"].clone() if v is self._slot else self._given(v)
        return self.model.module(*map(swap, self.batch.args), **{k: swap(v) for k, v in self.batch.kwargs.items()})

    def _given(self, value: Any) -> Any:
        """An argument of the batch as it is run now: in the dtype of what is computed, once that is not the model's."""
        return self._wide(value) if self._weights else value

    @property
    def _slot(self) -> Tensor:
        return next(a for a in (*self.batch.args, *self.batch.kwargs.values()) if isinstance(a, Tensor))

    @contextmanager
    def _inputs_from(self, values: dict[str, Tensor]):
        """Replace the outputs of the embedding modules by the given values."""
        with ExitStack() as stack:
            if self.batch.ids is not None:
                for name, path in _embedding_paths(self.model).items():
                    give = lambda m, a, out, name=name: with_first(out, values[name].clone())
                    stack.callback(child(self.model.module, path).register_forward_hook(give).remove)  # type: ignore[union-attr]
            yield


@contextmanager
def wearing(module: nn.Module, weights: Mapping[int, Tensor]) -> Iterator[None]:
    """Other tensors in the place of those parameters and buffers whose id has one."""
    owners: list[dict[str, Any]] = [own for m in module.modules() for own in (m._parameters, m._buffers)]  # type: ignore[misc]
    own = [(place, name, t) for place in (owners if weights else []) for name, t in place.items() if id(t) in weights]
    try:
        for place, name, t in own:
            place[name] = weights[id(t)]
        yield
    finally:
        for place, name, t in own:
            place[name] = t


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Weights without gradients, random numbers as before, and buffers as copies, to which the network may write."""
    flagged = [p for p in module.parameters() if p.requires_grad]
    own = [(m, n, b) for m in module.modules() for n, b in m.named_buffers(recurse=False)]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        try:
            for p in flagged:
                p.requires_grad_(False)
            for m, name, buffer in own:
                m._buffers[name] = buffer.detach().clone()
            yield
        finally:
            for m, name, buffer in own:
                m._buffers[name] = buffer
            for p in flagged:
                p.requires_grad_(True)


def _embedding_paths(model: Model) -> dict[str, str]:
    """Paths of the embedding modules by block name."""
    layout = model.layout
    if layout is None:
        raise InputError("token ids to a model without a layout", "a layout", "attach with layout=interp.Layout(...)")
    paths = {"hook_embed": layout.embed, "hook_pos_embed": layout.pos_embed, "hook_type_embed": layout.type_embed}
    return {name: path for name, path in paths.items() if path is not None}


@torch.no_grad()
def _embeddings(model: Model, batch: Batch) -> dict[str, Tensor]:
    """What each embedding module gives for a batch, with a batch axis of one."""
    paths = _embedding_paths(model)
    sites = {name: f"{path}:out" for name, path in paths.items()}
    acts = model.capture(batch, list(sites.values()))
    return {name: first_tensor(acts[site.removesuffix(":out")]) for name, site in sites.items()}
