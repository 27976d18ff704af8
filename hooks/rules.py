"""Rules: what a linearisation makes of each kind of call on live values. `RULES` maps a call's name to its rule.

A rule returns the call's result. While recording, the result has the network's value and the frozen network's
derivative; while replaying it is affine in the live arguments. Each rule is valid iff both hold.
"""

from collections.abc import Callable

from torch import Tensor

from interp.hooks import calls, hidden, norm_rules, product_rules, unit_rules
from interp.hooks.basic_rules import Rule, held, linear, tangent
from interp.hooks.errors import ArgumentError, BilinearOpError, LinearizationError, UnsupportedOpError
from interp.hooks.tape import PENDING, Tags
from interp.hooks.units import UNITS, Unit

_EXPONENTIALS = frozenset("pow rpow float_power".split())


def finish(output: Tensor) -> Tensor:
    """Return a recorded output that is affine in the input.

    Raises:
        BilinearOpError: If a product of live values was never held.
        UnsupportedOpError: If a function without a mode of its own was never held, or the output was computed under
            no_grad.
        LinearizationError: If the output does not depend on the input.
    """
    tags = Tags.of([output])
    if PENDING in tags:
        name = tags[PENDING].partition("(")[0]
        if name in UNITS or name in _EXPONENTIALS:
            raise UnsupportedOpError(
                f"{tags[PENDING]} reaches the output without being held",
                "a divisor or a gate of it, or a mode",
                f"choose one: Linearization(overrides={{{name!r}: 'chord'}}), 'tangent' or 'constant'",
            )
        raise BilinearOpError(
            f"{tags[PENDING]} reaches the output without being held",
            "a gate, divisor or pattern",
            "choose product='tangent', or 'exact', or hold a factor: overrides={'path of its layer': 'constant'}",
        )
    if not output.requires_grad:
        hidden.refuse_use("the output", hidden.origin_of([output]))
        raise LinearizationError(
            "an output that does not depend on the input under this linearization",
            "a live output",
            "if it ends in a softmax, interpret the logits: output=...",
        )
    return output


def register_unit(fn: Callable, rule: Unit | Rule) -> Callable[[], None]:
    """Teach the tape a call of your own: an element-wise `Unit`, or a rule (tape, call) -> result.

    Args:
        fn: The torch function, any function that dispatches through ``__torch_function__``, or a class of
            `torch.autograd.Function`, whose ``apply`` is meant.
        rule: How it is linearised. It must give the network's own value at the reference, and be affine in the live
            arguments when replayed. The first is tested at every recording, both by `LinearScope.check`.

    Returns:
        A function that takes the registration back.

    Raises:
        ArgumentError: If the call has a rule already.

    Example:
        >>> import torch
        >>> from interp.hooks.units import Unit
        >>> forget = register_unit(torch.special.i1, Unit(gain=lambda z: torch.special.i1(z) / z))
        >>> forget()
    """
    name = calls.name_of(fn)
    if name in RULES:
        raise ArgumentError(
            f"a rule for {name}", "a call without one", "choose its mode by Linearization(overrides=...)"
        )
    if isinstance(rule, Unit):
        UNITS[name] = rule
        RULES[name] = unit_rules.unit
    else:
        RULES[name] = rule

    def forget() -> None:
        RULES.pop(name, None)
        UNITS.pop(name, None)

    return forget


RULES: dict[str, Rule] = {
    **dict.fromkeys(calls.LINEAR, linear),
    **dict.fromkeys(calls.WEIGHTED | calls.BILINEAR, product_rules.contraction),
    **dict.fromkeys(calls.PRODUCTS, product_rules.product),
    **dict.fromkeys(calls.QUOTIENTS, norm_rules.quotient),
    **dict.fromkeys(calls.POWERS, unit_rules.power),
    **dict.fromkeys(calls.ROOTS, unit_rules.root),
    **dict.fromkeys(calls.DIVISORS, norm_rules.divisor),
    **dict.fromkeys(calls.COMPARISONS, held),
    **dict.fromkeys(calls.SELECTIONS, tangent),
    **dict.fromkeys(UNITS, unit_rules.unit),
    **dict.fromkeys(calls.DROPOUTS, unit_rules.dropout),
    **dict.fromkeys(calls.DIFFERENCES, norm_rules.difference),
    "grid_sample": product_rules.grid_sample,
    "mean": norm_rules.mean,
    "batch_norm": norm_rules.batch_norm,
    "layer_norm": norm_rules.layer_norm,
    "rms_norm": norm_rules.rms_norm,
    "group_norm": norm_rules.group_norm,
    "instance_norm": norm_rules.instance_norm,
    "softmax": product_rules.softmax,
    "log_softmax": product_rules.log_softmax,
    "logsumexp": product_rules.logsumexp,
}  # fmt: skip
