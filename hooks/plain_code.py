"""What is switched off, or refused, so that a tape sees every call of a network's own Python code."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import handle_torch_function

from interp.hooks import calls
from interp.hooks.errors import UnsupportedOpError

if TYPE_CHECKING:
    from interp.hooks.tape import Tape

_SAVED = "interp: a tape keeps its own graph"


@contextmanager
def seen(tape: "Tape") -> Iterator[None]:
    """Compiled functions run as Python, custom autograd functions as calls; recomputed graphs are refused.

    Raises:
        UnsupportedOpError: If the network recomputes its graph (checkpointing) or moves it away.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_functions_as_calls(tape))
        if not tape.homogeneous:
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_SAVED))
        try:
            yield
        except RuntimeError as error:
            if str(error) != _SAVED:
                raise
            raise UnsupportedOpError(
                f"checkpoint (or another hook on saved tensors) in {tape.latest or 'the model'}",
                "a graph that is kept",
                "switch gradient checkpointing off",
            ) from error


@contextmanager
def _functions_as_calls(tape: "Tape") -> Iterator[None]:
    """`torch.autograd.Function.apply` on live values goes through the tape, under the class's name."""
    own = torch.autograd.Function.__dict__["apply"]

    def apply(cls, *args, **kwargs):
        if tape.depth or not any(calls.is_live(t) for t in calls.tensors(args, kwargs)):
            return own.__func__(cls, *args, **kwargs)
        return handle_torch_function(_call_of(cls, own), calls.tensors(args, kwargs), *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = own


def _call_of(cls: type, own: Any) -> Callable:
    def call(*args, **kwargs):
        return own.__func__(cls, *args, **kwargs)

    call.__name__ = calls.raw_name(cls)
    return call


def refuse_autocast(call: Any) -> None:
    """Refuse a call under autocast: its dtype is not the model's.

    Raises:
        UnsupportedOpError: Naming the call.
    """
    if torch.is_autocast_enabled(call.live[0].device.type):
        raise UnsupportedOpError(
            f"{call} runs under autocast", "one dtype throughout", "leave autocast; convert the model with .to(dtype)"
        )


_REMEDIES = {
    "CheckpointFunction.apply": "switch gradient checkpointing off",
    **dict.fromkeys(
        ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        "a fused kernel: write the recurrence out in matrix products, sigmoid and tanh",
    ),
    "masked_select": "a selection of varying length has no batch axis: multiply by the mask, or use where",
}


def remedy(call: Any) -> str:
    """What to do about a call without a rule."""
    if call.name.endswith(".apply") and call.name not in _REMEDIES:
        return f"register_unit({call.name.removesuffix('.apply')}, ...) gives this custom function a rule"
    general = "replace the call, give it a rule by register_unit, or linearise between sites that do not contain it"
    return _REMEDIES.get(call.name, general)
