"""LinearScope: a network around one input as F x + r, with votes that sum.

Source: Navarrete Michelini, Liu, Lu, Jiang, "A Tour of Convolutional Networks Guided by Linear Interpreters", ICCV
2019; extended to smooth units, norms, products and attention.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError, CompletenessError, InputError, NonFiniteError
from interp.hooks.inputs import Batch
from interp.hooks.layouts import child
from interp.hooks.linear_map import LinearMap
from interp.hooks.linearization import Linearization, LinearizationLike
from interp.hooks.model import Model, main_tensor
from interp.hooks.rules import finish
from interp.hooks.table import Table
from interp.hooks.tape import Tape
from interp.hooks.text import token_id
from interp.hooks.views import first_tensor, with_first
from interp.hooks.votes import Votes


@dataclass(frozen=True)
class Block:
    """One block of the input: its value and its linear map."""

    name: str
    value: Tensor
    map: LinearMap


class LinearScope(LinearMap):
    """The network around one reference input: y = F x + r.

    For a language model x are the token embeddings; learned positions and token types are further blocks of the
    input, and r holds what is constant. Hooks live only while the scope is made or replayed; the module keeps its own
    code, flags and weights.

    Args:
        model: An attached model.
        x: One example: a text, token ids, an image tensor [1, ...].
        linearization: ``frozen`` (default), ``exact``, ``path``, or a Linearization.
        output: Selects the output tensor from what the module returns; by default its logits or main tensor.
        origin: Origin o of the input space for votes: y = F (x - o) + (r + F o). Zero by default.

    Attributes:
        y: Output of the network itself, with its batch axis.
        Fx: Linear part, summed over blocks.
        r: Constant part: the frozen network's output for zero input.
        blocks: Input blocks by name.

    Raises:
        LinearizationError: If a call cannot be linearised; the message names module and call.
        InputError: If there is not exactly one example.

    Example:
        >>> import interp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> scope = interp.LinearScope(interp.attach(net), torch.randn(1, 4))
        >>> scope.votes(2).completeness_error < 1e-5
        True
    """

    def __init__(
        self,
        model: Model,
        x: Any,
        linearization: LinearizationLike = "frozen",
        *,
        output: Callable[[Any], Tensor] | None = None,
        origin: Tensor | None = None,
    ):
        self.model = model
        self.batch = model.batch(x)
        if self.batch.size != 1:
            raise InputError(f"{self.batch.size} examples", "one reference input", "make one scope for each")
        held = Linearization.of(linearization)
        self._select = output or main_tensor
        self._held = held
        with torch.no_grad():
            self.y = self._select(model.forward(self.batch))
        if not torch.isfinite(self.y).all():
            raise NonFiniteError("the network's output holds NaN or infinity", "finite output at the reference")
        self._tape: list = []
        values = self._input_blocks()
        self._leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        self._graph = finish(self._record())
        self.blocks = {name: Block(name, values[name], self._block_map(name)) for name in values}
        first = next(iter(self.blocks.values()))
        super().__init__(first.map._push, first.map._pull, first.map.in_shape, first.map.out_shape, self.y, held)
        self.x = first.value
        self.origin = self._origin(origin)
        self.r = self.replay({name: torch.zeros_like(value) for name, value in values.items()})
        self.Fx = sum((b.map.matvec(b.value[0])[None] for b in self.blocks.values()), torch.zeros_like(self.y))

    # Making ----------------------------------------------------------------------------------------------------------

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

    def _record(self) -> Tensor:
        tape = Tape(self.model.module, self._held)
        out = self._through(tape, self._leaves)
        self._tape = tape.entries
        return out

    def replay(self, blocks: dict[str, Float[Tensor, "n ..."]]) -> Float[Tensor, "n ..."]:
        """Return F v + r by running the network's own code on other inputs with the recorded decisions held.

        Args:
            blocks: A value for each input block, [n, ...].

        Raises:
            ControlFlowDivergedError: If the network makes other calls than at the reference.
        """
        values = {name: value.detach().clone().requires_grad_() for name, value in blocks.items()}
        return self._through(Tape(self.model.module, self._held, self._tape), values).detach()

    def _through(self, tape: Tape, values: dict[str, Tensor]) -> Tensor:
        n = next(iter(values.values())).shape[0]
        with self._without_weight_gradients(), tape.running(), self._inputs_from(values):
            # A copy of the leaf, so that a network that writes to its input in place may do so.
            if self.batch.ids is not None:
                kwargs = {
                    k: v.expand(n, *v.shape[1:]) if isinstance(v, Tensor) else v for k, v in self.batch.kwargs.items()
                }
                out = self.model.module(**kwargs)
            else:
                swap = lambda v: values["input"].clone() if v is self._slot else v
                out = self.model.module(
                    *map(swap, self.batch.args), **{k: swap(v) for k, v in self.batch.kwargs.items()}
                )
            return self._select(out)

    @property
    def _slot(self) -> Tensor:
        return next(a for a in (*self.batch.args, *self.batch.kwargs.values()) if isinstance(a, Tensor))

    @contextmanager
    def _without_weight_gradients(self):
        flagged = [p for p in self.model.module.parameters() if p.requires_grad]
        try:
            for p in flagged:
                p.requires_grad_(False)
            yield
        finally:
            for p in flagged:
                p.requires_grad_(True)

    @contextmanager
    def _inputs_from(self, values: dict[str, Tensor]):
        """Replace the outputs of the embedding modules by the given values."""
        with ExitStack() as stack:
            if self.batch.ids is not None:
                for name, path in _embedding_paths(self.model).items():
                    give = lambda m, a, out, name=name: with_first(out, values[name].clone())
                    stack.callback(child(self.model.module, path).register_forward_hook(give).remove)  # type: ignore[union-attr]
            yield

    def _block_map(self, name: str) -> LinearMap:
        leaf, graph = self._leaves[name], self._graph
        in_shape, out_shape = leaf.shape[1:], graph.shape[1:]

        def pull(w: Tensor) -> Tensor:
            if len(w) == 1:
                return torch.autograd.grad(graph, leaf, w, retain_graph=True)[0]
            grads = torch.autograd.grad(graph, leaf, w[:, None], retain_graph=True, is_grads_batched=True)[0]
            return grads[:, 0]

        def push(v: Tensor) -> Tensor:
            # The adjoint is linear in w; differentiating it once more in direction v gives F v.
            w = torch.zeros_like(graph, requires_grad=True)
            adjoint = torch.autograd.grad(graph, leaf, w, create_graph=True)[0]
            return torch.cat([torch.autograd.grad(adjoint, w, one[None], retain_graph=True)[0] for one in v])

        return LinearMap(
            pull=pull, push=push, in_shape=in_shape, out_shape=out_shape, like=graph, linearization=self._held
        )

    def _origin(self, origin: Tensor | None) -> Tensor:
        if origin is None:
            return torch.zeros_like(self.x)
        try:
            return torch.as_tensor(origin, dtype=self.x.dtype, device=self.x.device).expand_as(self.x)
        except RuntimeError:
            raise InputError(
                f"origin of shape {list(origin.shape)}", f"a shape that broadcasts to {list(self.x.shape)}"
            ) from None

    # Reading ---------------------------------------------------------------------------------------------------------

    def votes(self, target: Any, margin_to: Any = None, *, position: int = -1) -> Votes:
        """Return each input element's vote for a target: (Fᵀ w) ⊙ (x - o), summed over channels.

        w is the target's unit vector, or target minus ``margin_to``, or a given tensor shaped like the output.

        Args:
            target: A token (string or id) of a language model, a class (label or index), an index tuple into the
                output, or a direction w.
            margin_to: A second target; the votes are then for the difference.
            position: For language models, whose next token; the last by default.

        Raises:
            TokenError: If a string is not exactly one token.
            ArgumentError: If the target does not exist.
            CompletenessError: If votes and residual do not sum to the output.
        """
        w = self.direction(target, position)
        name = self._name(target)
        if margin_to is not None:
            w, name = w - self.direction(margin_to, position), f"{name} - {self._name(margin_to)}"
        shift = {next(iter(self.blocks)): self.origin[0]}
        elements = {n: b.map.rmatvec(w) * (b.value[0] - shift.get(n, 0.0)) for n, b in self.blocks.items()}
        flat = torch.cat([e.flatten() for e in elements.values()]).double()
        residual = (w.double() * self.r[0].double()).sum()
        residual = residual + (self.rmatvec(w).double() * self.origin[0].double()).sum()
        maps = {n: self._reduce(e) for n, e in elements.items()}
        votes = Votes(
            map=next(iter(maps.values())), blocks=maps, total=float(flat.sum()), abs_total=float(flat.abs().sum()),
            residual=float(residual), value=float((w.double() * self.y[0].double()).sum()),
            labels=self._labels(), target=name,
        )  # fmt: skip
        if votes.completeness_error > self.tolerance:
            raise CompletenessError(
                f"votes {votes.total:.6g} + residual {votes.residual:.6g} against {votes.value:.6g} for {name} "
                f"(relative {votes.completeness_error:.1e})", f"at most {self.tolerance:.0e}",
                "the linearisation missed something in this network: scope.check() says more",
            )  # fmt: skip
        return votes

    @property
    def tolerance(self) -> float:
        """Relative completeness error allowed in the model's dtype."""
        return 100 * torch.finfo(self.y.dtype).eps

    def direction(self, target: Any, position: int = -1) -> Float[Tensor, "..."]:
        """Return the unit vector over outputs (without batch axis) that a target names.

        Raises:
            ArgumentError: If the target does not exist.
        """
        shape = self.y.shape[1:]
        if isinstance(target, Tensor):
            if target.shape != shape:
                raise ArgumentError(f"a direction {list(target.shape)}", f"{list(shape)}")
            return target.to(self.y)
        index = target if isinstance(target, tuple) else self._index(target, position)
        w = torch.zeros(shape, dtype=self.y.dtype, device=self.y.device)
        if len(index) != len(shape) or any(not -n <= i < n for i, n in zip(index, shape, strict=True)):
            raise ArgumentError(f"target {target!r}", f"an index into outputs {list(shape)}")
        w[index] = 1.0
        return w

    def _index(self, target: Any, position: int) -> tuple[int, ...]:
        if self.batch.ids is not None and self.y.ndim == 3:
            where = int(self.batch.positions(position)[0, 0])
            return (where, token_id(self.model, target))
        if isinstance(target, str):
            labels = self.model.labels or []
            if labels.count(target) != 1:
                raise ArgumentError(
                    f"class {target!r}",
                    "a label of this model",
                    f"labels are {', '.join(labels[:5])}, ..." if labels else "it has no labels: give an index",
                )
            return (labels.index(target),)
        return (int(target),)

    def _reduce(self, elements: Tensor) -> Tensor:
        if self.batch.ids is not None:
            return elements.sum(-1)
        return elements.sum(0) if elements.ndim == 3 else elements

    def _labels(self) -> list[str] | None:
        if self.batch.ids is None or self.model.tokenizer is None:
            return None
        return [self.model.tokenizer.decode([t]) for t in self.batch.ids[0].tolist()]

    def _name(self, target: Any) -> str:
        """What a target is called: a token's or class's text where it has one."""
        if isinstance(target, Tensor):
            return "a direction"
        if isinstance(target, int) and self.batch.ids is not None and self.model.tokenizer is not None:
            return repr(self.model.tokenizer.decode([target]))
        if isinstance(target, int) and self.model.labels:
            return self.model.labels[target]
        return str(target) if self.batch.ids is None else repr(target)

    @property
    def units(self) -> Table:
        """Every decision that is held: module, call, mode and shape."""
        rows = []
        for index, entry in enumerate(self._tape):
            rows.append(
                {
                    "call": index,
                    "module": entry.path,
                    "op": entry.op,
                    "mode": entry.mode,
                    "shape": str(list(entry.shape)),
                }
            )
        return Table(rows, f"{len(rows)} held decisions")

    def check(self, probes: int = 2, seed: int = 0) -> Table:
        """Return the checks: completeness, reference untouched, replay against F, adjoint; each with its tolerance.

        The replay uses probes of ten times the input's norm: a live non-linearity shows only off the reference.
        """
        made = torch.Generator().manual_seed(seed)
        noise = lambda like: torch.randn(like.shape, generator=made, dtype=torch.float32).to(like)
        scale = float(self.y.abs().max())
        rows = [_row("completeness: F x + r = y", self.Fx + self.r - self.y, scale, self.tolerance)]
        rows.append(_row("frozen network at the reference = y", self._graph.detach() - self.y, scale, self.tolerance))
        for _ in range(probes):
            vs = {n: 10 * noise(b.value) * b.value.norm() / noise(b.value).norm() for n, b in self.blocks.items()}
            pushed = sum(b.map.matvec(vs[n][0])[None] for n, b in self.blocks.items())
            rows.append(
                _row(
                    "linearity: replay at 10x = F v + r",
                    self.replay(vs) - pushed - self.r,
                    float(pushed.abs().max()),
                    self.tolerance,
                )
            )
            v, w = noise(self.x)[0], noise(self.y)[0]
            fv, fw = self.matvec(v).double(), self.rmatvec(w).double()
            gap = (fv * w.double()).sum() - (v.double() * fw).sum()
            rows.append(
                _row("adjoint: <F v, w> = <v, Fᵀ w>", gap, float(fv.norm() * w.double().norm()), self.tolerance)
            )
        return Table(rows, f"checks of LinearScope ({self._held.name})")

    def __repr__(self) -> str:
        inputs = ", ".join(f"{n} {list(b.value.shape[1:])}" for n, b in self.blocks.items())
        return f"LinearScope({inputs} -> {list(self.y.shape[1:])}, {self._held.name})"


def _row(name: str, gap: Tensor, scale: float, tolerance: float) -> dict[str, Any]:
    error = float(gap.abs().max()) / max(scale, 1e-30)
    return {"check": name, "error": error, "tolerance": tolerance, "holds": error <= tolerance}


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
