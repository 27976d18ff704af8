"""The tape: a network's decisions at a reference input, recorded and replayed while it runs its own code.

A function mode sees every call. Calls on values that do not depend on the input run as they are. A call on a live
value is linear, or a unit with a rule, or refused. Recording leaves an autograd graph whose derivative is F; replaying
holds the recorded decisions and gives F v + r for any other input v.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from interp.hooks import calls
from interp.hooks.composites import COMPOSITES
from interp.hooks.errors import ControlFlowDivergedError, ControlFlowError, UnsupportedOpError
from interp.hooks.linearization import Linearization


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
    """One call on live values."""

    func: Callable
    name: str
    args: tuple
    kwargs: dict[str, Any]
    path: str
    held: list[Tensor] = field(default_factory=list)
    is_constant: bool = False

    @property
    def live(self) -> list[Tensor]:
        """The live arguments, in order."""
        return [t for t in calls.tensors(self.args, self.kwargs) if calls.is_live(t)]

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


class Tags:
    """Marks on live tensors: name -> the call that made it.

    PENDING: not affine in the input, so that something must hold it before the output. ACTIVATED: an activation's
    output, the factor that a gated product holds; RANK: how much of a gate it is. DIVISOR: a norm's divisor that is
    differentiated.
    """

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
    """

    def __init__(
        self,
        module: nn.Module,
        linearization: Linearization,
        entries: list[Entry] | None = None,
        homogeneous: bool = False,
        constants: list[Constant] | None = None,
    ):
        super().__init__()
        self.homogeneous, self.constants = homogeneous, constants
        self.linearization = linearization
        self.replaying = entries is not None
        self.entries: list[Entry] = entries if entries is not None else []
        self._next = self.depth = 0
        self.unseen: list[str] = []
        self._paths = {id(sub): name for name, sub in module.named_modules()}
        self._types = {name: type(sub).__name__ for name, sub in module.named_modules()}
        self._stack: list[str] = []

    @property
    def path(self) -> str:
        """Path of the innermost running module."""
        return self._stack[-1] if self._stack else ""

    def type_at(self, path: str) -> str:
        """Type name of the module at a path."""
        return self._types.get(path, "")

    def decide(self, call: Call, mode: str, compute: Callable[[], Any]) -> Any:
        """Return what a call holds: computed now, or as recorded.

        Raises:
            ControlFlowDivergedError: If the replay makes another call here than the recording did.
        """
        if not self.replaying:
            shape = tuple(call.live[0].shape)
            held = compute()
            self.entries.append(Entry(call.path, call.name, mode, shape, held))
            return held
        if (
            self._next >= len(self.entries)
            or (entry := self.entries[self._next]).op != call.name
            or entry.path != call.path
        ):
            expected = (
                f"{self.entries[self._next].op} in {self.entries[self._next].path}"
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
                self._stack.append(self._paths.get(id(module), type(module).__name__))

            def after(module, args, output) -> None:
                self._stack.pop()

            stack.callback(module_hooks.register_module_forward_pre_hook(before).remove)
            stack.callback(module_hooks.register_module_forward_hook(after, always_call=True).remove)
            stack.enter_context(torch.set_grad_enabled(not self.homogeneous))
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
        if not any(calls.is_live(t) for t in calls.tensors(told)):
            return func(*args, **kwargs)
        call = Call(func, name, args, kwargs, self.path)
        if name in calls.CONTROL_FLOW or calls.raw_name(func) in calls.CONTROL_FLOW:
            raise ControlFlowError(f"{call} reads a live value", "control flow that does not depend on the input")
        if name in calls.DETACHING or not (torch.is_grad_enabled() or self.homogeneous):
            raise UnsupportedOpError(
                f"{call} cuts a live value off",
                "a forward that keeps it",
                "detach(), .data or no_grad() would hide a part of the network",
            )
        if name in COMPOSITES:
            with self:
                return COMPOSITES[name](*args, **kwargs)
        rule = RULES.get(name)
        if rule is None:
            raise UnsupportedOpError(
                f"{call} has no linearisation rule",
                "a linear call, a known unit or a product",
                "replace the call, or linearise between sites that do not contain it",
            )
        return self._apply(rule, call)

    def _apply(self, rule: Callable[["Tape", Call], Any], call: Call) -> Any:
        pending = [t for t in call.live if PENDING in Tags.of([t])]
        added = self._constant_of(rule, call) if self.constants is not None and not pending else None
        out = rule(self, call)
        unheld = [t for t in pending if not any(t is h for h in call.held)]
        if unheld:
            Tags.put(out, Tags.of(calls.tensors(out)) | {PENDING: Tags.of(unheld)[PENDING]})
        if self.homogeneous and not call.is_constant:
            calls.mark_live(call.args[0] if out is None else out)
            if calls.in_place(call.func, call.kwargs) and call.args and call.args[0]._base is not None:
                calls.mark_live(call.args[0]._base)
        if added is not None and not call.is_constant:
            self._note(added, call, out)
        return out

    def _constant_of(self, rule: Callable[["Tape", Call], Any], call: Call) -> Any:
        """The call's result for zero live arguments: what it adds. The same decisions are read again afterwards."""
        first = self._next
        here = {id(t): Tags.put(torch.zeros_like(t).requires_grad_().clone(), Tags.of([t])) for t in call.live}
        swap = lambda v: here.get(id(v), v)
        args = tuple(tree_map(swap, call.args))
        if calls.in_place(call.func, call.kwargs) and not calls.is_live(args[0]):
            args = (args[0].clone(), *args[1:])
        zero = Call(call.func, call.name, args, tree_map(swap, call.kwargs), call.path)
        out = rule(self, zero)
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
        """Raise if a replay made fewer calls than the recording.

        Raises:
            ControlFlowDivergedError: Naming the call that was not made.
        """
        if self.replaying and self._next != len(self.entries):
            entry = self.entries[self._next]
            raise ControlFlowDivergedError(
                f"a replay that ended before {entry.op} in {entry.path}",
                "the calls of the reference",
                "the network's control flow depends on its input",
            )
