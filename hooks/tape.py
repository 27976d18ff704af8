"""The tape: a network's decisions at a reference input, recorded and replayed while it runs its own code.

A function mode sees every call. Calls on values that do not depend on the input run as they are. A call on a live
value is linear, or a unit with a rule, or refused. Recording leaves an autograd graph whose derivative is F; replaying
holds the recorded decisions and gives F v + r for any other input v.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from interp.hooks import calls, hidden
from interp.hooks.budget import Meter
from interp.hooks.choices import Choices
from interp.hooks.composites import COMPOSITES
from interp.hooks.errors import ControlFlowDivergedError, ControlFlowError, UnsupportedOpError
from interp.hooks.linearization import Linearization
from interp.hooks.plain_code import refuse_autocast, remedy, seen
from interp.hooks.validity import affine_gap, refuse_nonfinite, refuse_wrong, value_at_reference


@dataclass
class Entry:
    """One decision: at which module, in which call, in which mode, and what was held."""

    path: str
    op: str
    mode: str
    shape: tuple[int, ...]
    held: Any


@dataclass
class Constant:
    """What one call added to the live value: where, its value, and a zero leaf at its output."""

    path: str
    op: str
    value: Tensor
    leaf: Tensor


@dataclass
class Call:
    """One call on live values: in which module, of which type, inside which fused calls."""

    func: Callable
    name: str
    args: tuple
    kwargs: dict[str, Any]
    path: str
    type: str = ""
    inside: tuple[str, ...] = ()
    held: list[Tensor] = field(default_factory=list)
    is_constant: bool = False

    @property
    def live(self) -> list[Tensor]:
        """The live arguments, in order."""
        return [t for t in calls.tensors(self.args, self.kwargs) if calls.is_live(t)]

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which an override may mean this call."""
        return (self.name, *self.inside)

    def also(self, name: str) -> "Call":
        """The same call, under a further name."""
        return replace(self, inside=(*self.inside, name))

    def instead(self, func: Callable, *args: Any) -> "Call":
        """Another call in the same place."""
        return replace(self, func=func, args=args, kwargs={})

    def run(self) -> Any:
        """The call as the network makes it."""
        return self.func(*self.args, **self.kwargs)

    def write(self, new: Tensor) -> Tensor:
        """Give back a replaced result; into the first argument where the network's call would write there."""
        if calls.in_place(self.func, self.kwargs):
            return (self.args[0] if self.args else self.kwargs["input"]).copy_(new)
        return new

    def __str__(self) -> str:
        shapes = ", ".join(str(list(t.shape)) for t in self.live)
        return f"{self.name}({shapes}) in {self.path or 'the model'}"


PENDING, ACTIVATED, RANK, DIVISOR = "pending", "activated", "rank", "divisor"
PATTERN, MEAN, SOURCE, BASE = "pattern", "mean", "source", "base"


class Tags:
    """Marks on live tensors: name -> the call that made it.

    PENDING: not affine in the input, so that something must hold it before the output. ACTIVATED: an activation's
    output, the factor that a gated product holds; RANK: how much of a gate it is. DIVISOR: a norm's divisor that is
    differentiated. PATTERN: an attention pattern whose product is split. MEAN: a mean, and
    SOURCE: what it is the mean of. BASE: a number times
    which value.
    """

    @staticmethod
    def moved(tensors: list[Tensor]) -> dict[str, str]:
        """The marks of what is made of the tensors: it is no longer their mean, or a multiple of the same value."""
        return {name: origin for name, origin in Tags.of(tensors).items() if name not in (MEAN, SOURCE, BASE)}

    @staticmethod
    def of(tensors: list[Tensor]) -> dict[str, str]:
        """The union of the tensors' marks: name -> origin."""
        found: dict[str, str] = {}
        for t in tensors:
            found |= getattr(t, "_interp_tags", {})
        return found

    @staticmethod
    def put(value: Any, tags: dict[str, str]) -> Any:
        """Mark the tensors in a value (and forget older marks)."""
        for t in calls.tensors(value):
            t._interp_tags = dict(tags)  # type: ignore[attr-defined]
        return value


class _Unseen(TorchDispatchMode):
    """Refuses operations on live values that run outside every call that the tape sees: scripted or compiled code."""

    def __init__(self, tape: "Tape"):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        quiet = func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
        if self.tape.depth == 0 and not quiet and any(calls.is_live(t) for t in calls.tensors(args, kwargs)):
            # Raised here, the error would reach the user wrapped in the interpreter's own.
            self.tape.unseen.append(f"{func} in {self.tape.path or 'the model'}")
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)


class Tape(TorchFunctionMode):
    """Records decisions, or replays them.

    Args:
        module: The network; names its parts in messages.
        linearization: What is held.
        entries: Decisions to replay; None to record.
        homogeneous: Replay the linear part alone, F v: every constant is dropped where it would enter. Such a replay
            needs no gradients and keeps no activations; live values are marked instead.
        constants: A list that an affine replay fills with each call's constant.
        gaps: A list that an affine replay fills with how far each call is from affine, and the call.

    Attributes:
        graphless: Whether to run without gradients and mark live values instead: less memory, nothing to differentiate.
        meter: Counts the memory of live results, where given.
    """

    def __init__(
        self,
        module: nn.Module,
        linearization: Linearization,
        entries: list[Entry] | None = None,
        homogeneous: bool = False,
        constants: list[Constant] | None = None,
        gaps: list[tuple[float, str]] | None = None,
    ):
        super().__init__()
        self.homogeneous, self.constants, self.gaps = homogeneous, constants, gaps
        self.graphless = homogeneous
        self.meter: Meter | None = None
        self.linearization, self.choices = linearization, Choices(linearization)
        self.replaying = entries is not None
        self.entries: list[Entry] = entries if entries is not None else []
        self._next = self.depth = 0
        self.unseen: list[str] = []
        self._paths = {id(sub): name for name, sub in module.named_modules()}
        self._types = {name: type(sub).__name__ for name, sub in module.named_modules()}
        self._stack: list[str] = []
        self._inside: list[str] = []
        self.latest = ""

    @property
    def path(self) -> str:
        """Path of the innermost running module."""
        return self._stack[-1] if self._stack else ""

    def decide(self, call: Call, mode: str, compute: Callable[[], Any]) -> Any:
        """Return what a call holds: computed now, or as recorded.

        Raises:
            ControlFlowDivergedError: If the replay makes another call here than the recording did.
        """
        if not self.replaying:
            shape = tuple(call.live[0].shape)
            held = compute()
            refuse_nonfinite(call, mode, held)
            self.entries.append(Entry(call.path, call.name, mode, shape, held))
            return held
        if (
            self._next >= len(self.entries)
            or (entry := self.entries[self._next]).op != call.name
            or entry.path != call.path
        ):
            expected = (
                f"{self.entries[self._next].op} in {self.entries[self._next].path or 'the model'}"
                if self._next < len(self.entries)
                else "no further call"
            )
            raise ControlFlowDivergedError(
                f"a replay that calls {call}", expected, "the network's control flow depends on its input"
            )
        self._next += 1
        return entry.held

    @contextmanager
    def running(self) -> Iterator["Tape"]:
        """The mode with module names kept; both are gone afterwards."""
        with ExitStack() as stack:

            def before(module, args) -> None:
                self.latest = self._paths.get(id(module), type(module).__name__)
                self._stack.append(self.latest)

            def after(module, args, output) -> None:
                self._stack.pop()

            stack.callback(module_hooks.register_module_forward_pre_hook(before).remove)
            stack.callback(module_hooks.register_module_forward_hook(after, always_call=True).remove)
            # Without gradients too: the inputs require none, and what the network computes under no_grad shows.
            stack.enter_context(torch.enable_grad())
            stack.enter_context(seen(self))
            if not self.replaying:
                stack.enter_context(_Unseen(self))
            stack.enter_context(self)
            yield self
        if self.unseen:
            raise UnsupportedOpError(
                f"{self.unseen[0]} runs in scripted or compiled code",
                "Python calls that can be seen",
                "give the module that it was made from",
            )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run a call under the rules."""
        self.depth += 1
        try:
            return self._run(func, args, kwargs or {})
        finally:
            self.depth -= 1

    def _run(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        from interp.hooks.rules import RULES

        name = calls.name_of(func)
        if name in calls.METADATA:
            return func(*args, **kwargs)
        args, kwargs = calls.freeze_parameters(args, kwargs)
        told = args[:1] if name in calls.SHAPED_LIKE else (args, kwargs)
        given = calls.tensors(told)
        origin = hidden.origin_of(given)
        if not any(calls.is_live(t) for t in given):
            if origin is None:
                return func(*args, **kwargs)
            return hidden.run_hidden(func, args, kwargs, self.path, origin)
        call = Call(func, name, args, kwargs, self.path, self._types.get(self.path, ""), tuple(self._inside))
        refuse_autocast(call)
        if name in calls.CONTROL_FLOW or calls.raw_name(func) in calls.CONTROL_FLOW:
            raise ControlFlowError(f"{call} reads a live value", "control flow that does not depend on the input")
        if name in calls.DETACHING:
            hidden.refuse_detached(call)
        if not torch.is_grad_enabled():
            return hidden.run_hidden(func, args, kwargs, self.path, origin or str(call))
        hidden.refuse_use(str(call), origin)
        if name in COMPOSITES:
            return self._written_out(name, args, kwargs)
        rule = RULES.get(name)
        if rule is None:
            raise UnsupportedOpError(
                f"{call} has no linearisation rule", "a linear call, a known unit or a product", remedy(call)
            )
        return self._apply(rule, call)

    def _written_out(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A fused call as the calls that it stands for, each under its own rule."""
        self._inside.append(name)
        try:
            with self:
                return COMPOSITES[name](*args, **kwargs)
        finally:
            self._inside.pop()

    def _apply(self, rule: Callable[["Tape", Call], Any], call: Call) -> Any:
        value = self._own_value(call)
        pending = [t for t in call.live if PENDING in Tags.of([t])]
        added = self.at_multiple(rule, call, 0.0) if self.constants is not None and not pending else None
        if self.gaps is not None and not pending and (gap := affine_gap(self, rule, call)) is not None:
            self.gaps.append((gap, str(call)))
        out = rule(self, call)
        if value is not None:
            refuse_wrong(call, value, out)
        unheld = [t for t in pending if not any(t is h for h in call.held)]
        if unheld:
            Tags.put(out, Tags.of(calls.tensors(out)) | {PENDING: Tags.of(unheld)[PENDING]})
        if self.graphless and not call.is_constant:
            calls.mark_live(call.args[0] if out is None else out)
            if calls.in_place(call.func, call.kwargs) and call.args and call.args[0]._base is not None:
                calls.mark_live(call.args[0]._base)
        if self.meter is not None:
            self.meter.see(out)
        if added is not None and not call.is_constant:
            self._note(added, call, out)
        return out

    def _own_value(self, call: Call) -> list[Tensor] | None:
        """What the network itself makes of a call, with which a recorded result must agree; None while replaying."""
        return None if self.replaying else value_at_reference(call)

    @staticmethod
    def is_pending(value: Tensor) -> bool:
        """Whether a value is not affine yet."""
        return PENDING in Tags.of([value])

    def at_multiple(self, rule: Callable[["Tape", Call], Any], call: Call, factor: float) -> Any:
        """The call's result for a multiple of its live arguments. The same decisions are read again afterwards."""
        first = self._next
        scaled = lambda t: factor * t.detach() if factor else torch.zeros_like(t)
        here = {id(t): Tags.put(scaled(t).requires_grad_().clone(), Tags.of([t])) for t in call.live}
        swap = lambda v: here.get(id(v), v)
        args = tuple(tree_map(swap, call.args))
        if calls.in_place(call.func, call.kwargs) and not calls.is_live(args[0]):
            args = (args[0].clone(), *args[1:])
        out = rule(self, replace(call, args=args, kwargs=tree_map(swap, call.kwargs), held=[]))
        self._next = first
        return args[0] if out is None else out

    def _note(self, added: Any, call: Call, out: Any) -> None:
        """Put a zero leaf on each output to which something was added."""
        targets = calls.tensors(call.args[0] if out is None else out)
        for value, target in zip(calls.tensors(added), targets, strict=True):
            if value.is_floating_point() and calls.is_live(target) and bool(value.detach().any()):
                leaf = calls.mark_live(torch.zeros_like(target, requires_grad=True))
                target.add_(leaf)
                self.constants.append(Constant(call.path, call.name, value.detach(), leaf))  # type: ignore[union-attr]

    def check_finished(self) -> None:
        """Raise if a replay made fewer calls than the recording, or a recording met no call for an override.

        Raises:
            ControlFlowDivergedError: Naming the call that was not made.
            ArgumentError: Naming the override.
        """
        if not self.replaying:
            self.choices.check()
        if self.replaying and self._next != len(self.entries):
            entry = self.entries[self._next]
            raise ControlFlowDivergedError(
                f"a replay that ended before {entry.op} in {entry.path or 'the model'}",
                "the calls of the reference",
                "the network's control flow depends on its input",
            )
