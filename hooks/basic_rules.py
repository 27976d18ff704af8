"""The rules that others are made of: a call as it is, held, or expanded around the reference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from interp.hooks import calls
from interp.hooks.tape import ACTIVATED, BASE, PATTERN, Call, Tags, Tape

Rule = Callable[[Tape, Call], Any]


def tangent(tape: Tape, call: Call) -> Any:
    """f(z) + J_f(z)(v - z): the call itself while recording, its affine expansion while replaying."""
    points = tape.decide(call, "tangent", lambda: [t.detach().clone() for t in call.live])
    if not tape.replaying:
        return call.run()
    moved = calls.expand(call.func, call.args, call.kwargs, points, tape.homogeneous)
    return call.write(moved) if isinstance(moved, Tensor) else moved


def held(tape: Tape, call: Call, mode: str = "constant") -> Any:
    """A constant: the call's value at the reference."""
    call.held, call.is_constant = call.live, True
    return tape.decide(call, mode, lambda: detached(call.run()))


def linear(tape: Tape, call: Call) -> Any:
    """The call as it is; marks pass through."""
    tags = Tags.of(call.live)
    out = calls.without_constants(call.func, call.args, call.kwargs) if tape.homogeneous else call.run()
    tags.pop(BASE, None)
    if call.name not in calls.RESHAPES:
        tags = Tags.moved(call.live)
        if len(call.live) > 1:
            tags.pop(ACTIVATED, None)
            tags.pop(PATTERN, None)
    return Tags.put(out, tags)


def with_held(call: Call, live: Tensor, value: Tensor) -> Call:
    """The call with one live argument replaced by a held value."""
    swap = lambda v: value if v is live else v
    return replace(call, args=tree_map(swap, call.args), kwargs=tree_map(swap, call.kwargs), held=[])


def bound(call: Call, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name."""
    return defaults | dict(zip(names, call.args, strict=False)) | call.kwargs


def affine(tape: Tape, value: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """Gain ⊙ value + bias; without the bias in a replay of the linear part."""
    value = value if gain is None else value * gain
    return value if bias is None or tape.homogeneous else value + bias


def detached(out: Any) -> Any:
    """Copies of the tensors in a result."""
    if isinstance(out, Tensor):
        return out.detach().clone()
    return type(out)(*map(detached, out)) if hasattr(out, "_fields") else type(out)(map(detached, out))
