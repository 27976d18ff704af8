"""Validity of single units: the network's own value at the reference, and affine when replayed.

A rule that breaks either is reported at its own module and call, not as a sum that does not add up at the end.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.hooks import calls
from interp.hooks.errors import CompletenessError, NonFiniteError

if TYPE_CHECKING:
    from interp.hooks.tape import Call, Tape

# Rules that make the call itself while recording, or draw.
_THEMSELVES = (
    calls.LINEAR | calls.COMPARISONS | calls.SELECTIONS | calls.BILINEAR | calls.WEIGHTED | calls.DROPOUTS
    | frozenset("softmax logsumexp batch_norm instance_norm".split())
)  # fmt: skip


@torch.no_grad()
def value_at_reference(call: "Call") -> list[Tensor] | None:
    """The network's own result of a call; None where its rule makes the call anyway."""
    if call.name in _THEMSELVES:
        return None
    if calls.in_place(call.func, call.kwargs) and call.args:
        call = replace(call, args=(call.args[0].clone(), *call.args[1:]))
    return calls.tensors(call.run())


@torch.no_grad()
def refuse_wrong(call: "Call", values: list[Tensor], out: Any) -> None:
    """Refuse a result that is not the network's own, or NaN.

    Raises:
        NonFiniteError: If the network's own result holds NaN.
        CompletenessError: If the rule's result is another.
    """
    for value, given in zip(values, calls.tensors(out), strict=True):
        if not value.is_floating_point():
            continue
        if float((value - given).abs().max()) == 0 if value.numel() else True:
            continue
        if torch.isnan(value).any():
            raise NonFiniteError(f"{call} gives NaN", "finite values at the reference", "check the input and weights")
        finite = torch.isfinite(value)
        same = bool((value[~finite] == given[~finite]).all())
        gap = (value - given)[finite].abs().max() if finite.any() else torch.zeros(())
        size = value[finite].abs().max() if finite.any() else torch.ones(())
        # Written-out norms lose digits where the mean is large beside the spread: half of the digits must agree.
        if not same or not float(gap) <= torch.finfo(value.dtype).eps ** 0.5 * float(size):
            raise CompletenessError(
                f"the rule of {call} gives another value than the call at the reference: off by {float(gap):.1e}",
                f"the call's own value (of {float(size):.1e})",
                "correct the rule that register_unit was given",
            )


def refuse_nonfinite(call: "Call", mode: str, held: Any) -> None:
    """Refuse coefficients that are NaN, or infinite where they multiply.

    Raises:
        NonFiniteError: Naming call and mode.
    """
    multiplies = mode in ("gain", "chord", "frozen", "frozen_stats", "batch_stats") or isinstance(held, tuple)
    for t in calls.tensors(held) if multiplies else []:
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise NonFiniteError(
                f"{call} has a {mode} that is NaN or infinite at the reference",
                "finite coefficients",
                "choose another mode for it in overrides, or another reference",
            )


def affine_gap(tape: "Tape", rule: Callable[["Tape", "Call"], Any], call: "Call") -> float | None:
    """How far a rule is from affine in its live arguments v: |2 U(v) - U(2v) - U(0)| relative to its values.

    None for calls that are linear by themselves, and for results that a later call holds.
    """
    if call.name in _THEMSELVES:
        return None
    made = [tape.at_multiple(rule, call, factor) for factor in (1.0, 2.0, 0.0)]
    if any(t.is_floating_point() and tape.is_pending(t) for t in calls.tensors(made)):
        return None
    results = [[t.detach() for t in calls.tensors(out) if t.is_floating_point()] for out in made]
    worst = 0.0
    for once, twice, none in zip(*results, strict=True):
        seen = torch.isfinite(once)  # a masked score is -inf at the reference
        if not seen.any():
            continue
        size = max(float(t[seen].abs().max()) for t in (once, twice, none))
        error = float((2 * once - twice - none)[seen].abs().max()) / max(size, 1e-30)
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst
