"""The tape: a network's decisions at a reference input, recorded and replayed while it runs its own code.

A function mode sees every call. Calls on values that do not depend on the input run as they are. A call on a live
value is linear, or a unit with a rule, or refused. Recording leaves an autograd graph whose derivative is F; replaying
holds the recorded decisions and gives F v + r for any other input v.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from interp.hooks import calls
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
class Call:
    """One call on live values."""

    func: Callable
    name: str
    args: tuple
    kwargs: dict[str, Any]
    path: str

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
            return self.args[0].copy_(new)
        return new

    def __str__(self) -> str:
        shapes = ", ".join(str(list(t.shape)) for t in self.live)
        return f"{self.name}({shapes}) in {self.path or 'the model'}"


class Tags:
    """Marks on live tensors: where a value that is not affine yet, or an activation's output, came from."""

    @staticmethod
    def of(tensors: list[Tensor]) -> dict[str, str]:
        """The union of the tensors' marks: name -> origin."""
        found: dict[str, str] = {}
        for t in tensors:
            found |= getattr(t, "_interp_tags", {})
        return found

    @staticmethod
    def put(value: Any, tags: dict[str, str]) -> Any:
        """Mark all live tensors in a value (and forget older marks)."""
        for t in calls.tensors(value):
            if t.requires_grad:
                t._interp_tags = dict(tags)  # type: ignore[attr-defined]
        return value


class Tape(TorchFunctionMode):
    """Records decisions, or replays them.

    Args:
        module: The network; names its parts in messages.
        linearization: What is held.
        entries: Decisions to replay; None to record.
    """

    def __init__(self, module: nn.Module, linearization: Linearization, entries: list[Entry] | None = None):
        super().__init__()
        self.linearization = linearization
        self.replaying = entries is not None
        self.entries: list[Entry] = entries if entries is not None else []
        self._next = 0
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
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self)
            yield self

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run a call under the rules."""
        from interp.hooks.rules import RULES

        kwargs = kwargs or {}
        name = calls.name_of(func)
        if name in calls.METADATA or not any(calls.is_live(t) for t in calls.tensors(args, kwargs)):
            return func(*args, **kwargs)
        call = Call(func, name, args, kwargs, self.path)
        if name in calls.CONTROL_FLOW or calls.raw_name(func) in calls.CONTROL_FLOW:
            raise ControlFlowError(f"{call} reads a live value", "control flow that does not depend on the input")
        if name in calls.DETACHING or not torch.is_grad_enabled():
            raise UnsupportedOpError(
                f"{call} cuts a live value off",
                "a forward that keeps it",
                "detach(), .data or no_grad() would hide a part of the network",
            )
        if name == "scaled_dot_product_attention":
            from interp.hooks.attention import explicit_attention

            with self:
                return explicit_attention(*args, **kwargs)
        rule = RULES.get(name)
        if rule is None:
            raise UnsupportedOpError(
                f"{call} has no linearisation rule",
                "a linear call, a known unit or a product",
                "replace the call, or linearise between sites that do not contain it",
            )
        return rule(self, call)
