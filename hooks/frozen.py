"""FrozenNetwork: a network around one input with every decision held; recorded once, pushed and pulled through."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp.hooks import calls
from interp.hooks.errors import InputError
from interp.hooks.inputs import Batch
from interp.hooks.layouts import child
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.hooks.rules import finish
from interp.hooks.session import Read, Session
from interp.hooks.tape import Constant, Entry, Tape
from interp.hooks.views import first_tensor, with_first

Select = Callable[[Any], Tensor] | Read

_TIMED = 4


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

    Attributes:
        values: Value of each input block [1, ...].
        output: The frozen network's output at the reference, with its graph.
        entries: The tape.
    """

    def __init__(
        self, model: Model, batch: Batch, held: Linearization, select: Select, values: dict[str, Tensor] | None = None
    ):
        self.model, self.batch, self.held, self.select = model, batch, held, select
        self.values = self._input_blocks() if values is None else values
        self._leaves = calls.mark_live({n: value.clone().requires_grad_() for n, value in self.values.items()})
        tape = Tape(model.module, held)
        self.output = finish(self._through(tape, self._leaves))
        self.entries: list[Entry] = tape.entries
        self._loop: bool | None = None

    def replay(self, blocks: dict[str, Tensor]) -> Tensor:
        """Return Σ F v + r for other values of the blocks [n, ...], by the network's own code."""
        values = calls.mark_live({n: value.detach().clone().requires_grad_() for n, value in blocks.items()})
        return self._through(Tape(self.model.module, self.held, self.entries), values).detach()

    def push(self, blocks: dict[str, Tensor]) -> Tensor:
        """Return Σ F v for values of some blocks [n, ...]: a replay that drops every constant where it would enter."""
        n = len(next(iter(blocks.values())))
        values = {
            name: blocks[name].detach().clone() if name in blocks else value.new_zeros(n, *value.shape[1:])
            for name, value in self.values.items()
        }
        tape = Tape(self.model.module, self.held, self.entries, homogeneous=True)
        return self._through(tape, calls.mark_live(values))

    def pull(self, block: str, w: Tensor) -> Tensor:
        """Return Fᵀ w for output directions [n, ...]: one by one or as one batch, whichever is faster here."""
        if len(w) < 2 * _TIMED or self._loop is not None:
            return self._pull_one_by_one(block, w) if self._loop or len(w) == 1 else self._pull_batch(block, w)
        start = time.perf_counter()
        first = self._pull_one_by_one(block, w[:_TIMED])
        middle = time.perf_counter()
        second = self._pull_batch(block, w[_TIMED : 2 * _TIMED])
        self._loop = middle - start <= time.perf_counter() - middle
        rest = [self.pull(block, w[2 * _TIMED :])] if len(w) > 2 * _TIMED else []
        return torch.cat([first, second, *rest])

    def _pull_one_by_one(self, block: str, w: Tensor) -> Tensor:
        leaf = self._leaves[block]
        return torch.cat([torch.autograd.grad(self.output, leaf, one[None], retain_graph=True)[0] for one in w])

    def _pull_batch(self, block: str, w: Tensor) -> Tensor:
        leaf = self._leaves[block]
        return torch.autograd.grad(self.output, leaf, w[:, None], retain_graph=True, is_grads_batched=True)[0][:, 0]

    def constants(self, w: Tensor) -> list[tuple[Constant, Tensor]]:
        """Return each call's constant with the gradient of <w, y> at its output: r · w is the sum of their products."""
        found: list[Constant] = []
        tape = Tape(self.model.module, self.held, self.entries, constants=found)
        zeros = calls.mark_live({n: torch.zeros_like(value).requires_grad_() for n, value in self.values.items()})
        out = self._through(tape, zeros)
        leaves = [c.leaf for c in found]
        grads = torch.autograd.grad(out, leaves, w[None], allow_unused=True) if leaves else ()
        return [(c, torch.zeros_like(c.leaf) if g is None else g) for c, g in zip(found, grads, strict=True)]

    def unit_gaps(self) -> list[tuple[float, str]]:
        """Return how far each unit is from affine in its live arguments, relative to its values, and its call."""
        found: list[tuple[float, str]] = []
        values = calls.mark_live({n: value.clone().requires_grad_() for n, value in self.values.items()})
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
        with untouched(self.model.module), tape.running(), self._inputs_from(values):
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
            wide = lambda v: v.expand(n, *v.shape[1:]) if isinstance(v, Tensor) else v
            kwargs = {k: wide(v) for k, v in self.batch.kwargs.items()}
            return self.model.module(*map(wide, self.batch.args), **kwargs)
        # A copy of the leaf, so that a network that writes to its input in place may do so.
        swap = lambda v: values["input"].clone() if v is self._slot else v
        return self.model.module(*map(swap, self.batch.args), **{k: swap(v) for k, v in self.batch.kwargs.items()})

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
