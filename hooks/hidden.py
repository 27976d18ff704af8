"""Hidden values: what a network computes from live values under no_grad, for its own books.

A tape lets them be, under a mark that every call passes on. They are refused only where the network comes to depend on
them: mixed with a live value again, read by control flow, or given out.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from interp.hooks import calls
from interp.hooks.errors import ControlFlowError, UnsupportedOpError

_MARK = "_interp_hidden"
_WHY = "detach(), .data or no_grad() would hide a part of the network"


def origin_of(values: list[Tensor]) -> str | None:
    """The call under no_grad that hidden values among these come from, or None."""
    return next((origin for v in values if (origin := getattr(v, _MARK, None))), None)


def hide(value: Any, origin: str) -> Any:
    """Mark the tensors in a value that are not live, and return it."""
    for t in calls.tensors(value):
        if not calls.is_live(t):
            setattr(t, _MARK, origin)
    return value


def run_hidden(func: Callable, args: tuple, kwargs: dict[str, Any], path: str, origin: str) -> Any:
    """Make a call on hidden values, or on live ones under no_grad; its result is hidden.

    Raises:
        ControlFlowError: If the call reads a value.
        UnsupportedOpError: If it writes into a live value, or may do so.
    """
    where = f"{calls.name_of(func)} in {path or 'the model'}"
    if calls.name_of(func) in calls.CONTROL_FLOW or calls.raw_name(func) in calls.CONTROL_FLOW:
        raise ControlFlowError(
            f"{where} reads a value that {origin} computed under no_grad",
            "control flow that does not depend on the input",
        )
    target = args[0] if args and calls.in_place(func, kwargs) else None
    if isinstance(target, Tensor) and (calls.is_live(target) or target._is_view()):
        raise UnsupportedOpError(
            f"{where} cuts a live value off: it writes under no_grad", "a forward that keeps it", _WHY
        )
    out = func(*args, **kwargs)
    return hide(target if out is None else out, origin) if out is not None or target is not None else out


def refuse_use(what: str, origin: str | None) -> None:
    """Refuse to go on with a hidden value.

    Raises:
        UnsupportedOpError: If there is one.
    """
    if origin is not None:
        raise UnsupportedOpError(
            f"{what} depends on what {origin} computed under no_grad, which cuts a live value off",
            "a forward that keeps it", _WHY,
        )  # fmt: skip


def refuse_detached(call: Any) -> None:
    """Refuse detach() and .data of a live value.

    Raises:
        UnsupportedOpError: Naming the call.
    """
    raise UnsupportedOpError(f"{call} cuts a live value off", "a forward that keeps it", _WHY)
