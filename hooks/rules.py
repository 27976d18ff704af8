"""Rules: what a linearisation makes of each kind of call on live values. `RULES` maps a call's name to its rule.

A rule returns the call's result. While recording, the result has the network's value and the frozen network's
derivative; while replaying it is affine in the live arguments. Each rule is valid iff both hold.
"""

import fnmatch
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interp.hooks import calls
from interp.hooks.errors import ArgumentError, BilinearOpError, LinearizationError, TrainModeError, UnsupportedOpError
from interp.hooks.tape import ACTIVATED, DIVISOR, PENDING, RANK, Call, Tags, Tape
from interp.hooks.units import UNITS, Unit, chord, line

Rule = Callable[[Tape, Call], Any]


def tangent(tape: Tape, call: Call) -> Any:
    """f(z) + J_f(z)(v - z): the call itself while recording, its affine expansion while replaying."""
    points = tape.decide(call, "tangent", lambda: [t.detach().clone() for t in call.live])
    if not tape.replaying:
        return call.run()
    moved = calls.expand(call.func, call.args, call.kwargs, points, tape.homogeneous)
    return call.write(moved) if isinstance(moved, Tensor) else moved


def held(tape: Tape, call: Call) -> Any:
    """A constant: the call's value at the reference."""
    call.held, call.is_constant = call.live, True
    return tape.decide(call, "constant", lambda: _detached(call.run()))


def linear(tape: Tape, call: Call) -> Any:
    """The call as it is; marks pass through."""
    tags = Tags.of(call.live)
    out = calls.without_constants(call.func, call.args, call.kwargs) if tape.homogeneous else call.run()
    if call.name not in calls.RESHAPES and len(call.live) > 1:
        tags.pop(ACTIVATED, None)
    return Tags.put(out, tags)


def dropout(tape: Tape, call: Call) -> Any:
    """Identity in evaluation mode."""
    bound = _bound(call, ("input", "p", "training"), {"p": 0.5, "training": True})
    if bound["training"] and bound["p"] > 0:
        raise TrainModeError(f"{call} is live", "evaluation mode", "call model.eval()")
    return linear(tape, call)


def batch_norm(tape: Tape, call: Call) -> Any:
    """An affine constant with running statistics; refused with batch statistics."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    bound = _bound(call, names, {"training": False, "running_mean": None, "weight": None, "eps": 1e-5})
    if bound["training"] or bound["running_mean"] is None:
        raise TrainModeError(f"{call} uses batch statistics", "running statistics", "call model.eval()")
    if not tape.homogeneous:
        return linear(tape, call)
    shape = (1, -1, *[1] * (bound["input"].ndim - 2))
    scale = torch.rsqrt(bound["running_var"] + bound["eps"])
    gain = scale if bound["weight"] is None else scale * bound["weight"]
    return Tags.put(bound["input"] * gain.reshape(shape), {})


def contraction(tape: Tape, call: Call) -> Any:
    """A layer or a matrix product: linear with one live factor; of two, differentiated or held with the pattern."""
    if len(call.live) > 1:
        if tape.linearization.attention == "tangent":
            return tangent(tape, call)
        return Tags.put(call.run(), {PENDING: str(call)})
    return Tags.put(_without_bias(call) if tape.homogeneous else call.run(), {})


def _without_bias(call: Call) -> Any:
    """A layer or product with one live factor, without the constant that it adds."""
    args: tuple[Any, ...] = call.args
    kwargs = call.kwargs
    if call.name == "linear" or call.name.startswith("conv"):
        args = (*args[:2], None, *args[3:]) if len(args) > 2 else args
        kwargs = {k: v for k, v in kwargs.items() if k != "bias"}
    if call.name in ("addmm", "baddbmm", "addbmm", "addmv", "addr"):
        first, *rest = args
        if calls.is_live(first):
            return calls.without_constants(call.func, args, kwargs)
        args = (torch.zeros_like(first), *rest)
    return call.func(*args, **kwargs)


def product(tape: Tape, call: Call) -> Any:
    """a ⊙ b: linear with one live factor; of two, by the product mode (gate, split or tangent)."""
    if len(call.live) < 2:
        return Tags.put(call.run(), Tags.of(call.live))
    a, b = _two(call)
    tags = [Tags.of([a]), Tags.of([b])]
    mode = tape.linearization.product
    if a is b:
        return square(tape, call)
    if mode == "tangent" or DIVISOR in tags[0] or DIVISOR in tags[1]:
        return tangent(tape, call)
    if mode == "split" and PENDING not in tags[0] and PENDING not in tags[1]:
        return _split(tape, call, a, b)
    held_one = _gate_of(tags)
    if held_one is None and not any(PENDING in t or ACTIVATED in t for t in tags):
        raise BilinearOpError(
            f"{call} multiplies two live values, neither an activation's output",
            "a product with one gate",
            "choose product='split' or product='tangent'",
        )
    if held_one is None:
        return Tags.put(call.run(), tags[0] | tags[1] | {PENDING: str(call)})
    call.held = [(a, b)[held_one]]
    gate = tape.decide(call, "gate", lambda: call.held[0].detach().clone())
    return Tags.put(call.write(gate * b if held_one == 0 else a * gate), {})


# Which of two activations is the gate: the one that is made to be a factor.
_GATES = {"sigmoid": "2", "special_expit": "2", "hardsigmoid": "2", "tanh": "1"}


def _gate_of(tags: list[dict[str, str]]) -> int | None:
    """Index of the factor to hold: what is not affine yet, else the activation's output, else the truer gate of two."""
    for key in (PENDING, ACTIVATED):
        marked = [key in t for t in tags]
        if marked[0] != marked[1]:
            return marked.index(True)
    ranks = [t.get(RANK, "0") for t in tags]
    if PENDING in tags[0] or ACTIVATED not in tags[0] or ranks[0] == ranks[1]:
        return None
    return ranks.index(max(ranks))


def _split(tape: Tape, call: Call, a: Tensor, b: Tensor) -> Tensor:
    ref_a, ref_b = tape.decide(call, "split", lambda: (a.detach().clone(), b.detach().clone()))
    return Tags.put(call.write(0.5 * (ref_a * b + a * ref_b)), {})


def quotient(tape: Tape, call: Call) -> Any:
    """a / b: linear in a; a live divisor is held, or differentiated where norms are."""
    reverse = call.name.startswith("r")
    top, bottom = reversed(_two(call)) if reverse else _two(call)
    if not calls.is_live(bottom):
        return Tags.put(call.run(), Tags.of(call.live))
    if tape.linearization.norm == "tangent":
        return tangent(tape, call)
    if call.kwargs.get("rounding_mode") is not None:
        raise UnsupportedOpError(f"{call} rounds", "a smooth quotient")
    call.held = [bottom]
    divisor = tape.decide(call, "constant", lambda: bottom.detach().clone())
    return Tags.put(call.write(top / divisor), {})


def square(tape: Tape, call: Call) -> Any:
    """z^n: differentiated where norms are; else not affine until a divisor or gate that holds it."""
    exponent = _bound(call, ("input", "exponent"), {"exponent": 2})["exponent"]
    if isinstance(exponent, (int, float)) and exponent < 1:
        return divisor(tape, call)
    if tape.linearization.norm == "tangent":
        return tangent(tape, call)
    return Tags.put(call.run(), {PENDING: str(call)})


def divisor(tape: Tape, call: Call) -> Any:
    """A norm's divisor: held, or differentiated."""
    if tape.linearization.norm == "tangent":
        return Tags.put(tangent(tape, call), {DIVISOR: str(call)})
    return held(tape, call)


def softmax(tape: Tape, call: Call) -> Any:
    """An attention pattern or a routing weight: held, or differentiated."""
    return tangent(tape, call) if tape.linearization.attention == "tangent" else held(tape, call)


def layer_norm(tape: Tape, call: Call) -> Any:
    """LayerNorm as one call: γ (v - mean v)/σ + β with σ held."""
    if tape.linearization.norm == "tangent":
        return tangent(tape, call)
    bound = _bound(
        call, ("input", "normalized_shape", "weight", "bias", "eps"), {"weight": None, "bias": None, "eps": 1e-5}
    )
    v, dims = bound["input"], tuple(range(-len(bound["normalized_shape"]), 0))
    centre = v - v.mean(dims, keepdim=True)
    scale = tape.decide(call, "frozen", lambda: (centre.detach().pow(2).mean(dims, keepdim=True) + bound["eps"]).sqrt())
    return _affine(tape, centre / scale, bound["weight"], bound["bias"])


def rms_norm(tape: Tape, call: Call) -> Any:
    """RMSNorm as one call: γ v/rms with rms held."""
    if tape.linearization.norm == "tangent":
        return tangent(tape, call)
    bound = _bound(call, ("input", "normalized_shape", "weight", "eps"), {"weight": None, "eps": None})
    v, dims = bound["input"], tuple(range(-len(bound["normalized_shape"]), 0))
    eps = torch.finfo(v.dtype).eps if bound["eps"] is None else bound["eps"]
    scale = tape.decide(call, "frozen", lambda: (v.detach().pow(2).mean(dims, keepdim=True) + eps).sqrt())
    return _affine(tape, v / scale, bound["weight"], None)


def instance_norm(tape: Tape, call: Call) -> Any:
    """InstanceNorm: an affine constant with running statistics, else GroupNorm with a group for each channel."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    bound = _bound(call, names, {"running_mean": None, "running_var": None, "weight": None, "bias": None, "eps": 1e-5})
    if not bound.get("use_input_stats", True) and bound["running_mean"] is not None:
        args = (*(bound[n] for n in names[:5]), False, 0.1, bound["eps"])
        return batch_norm(tape, Call(F.batch_norm, call.name, args, {}, call.path))
    args = (bound["input"], bound["input"].shape[1], bound["weight"], bound["bias"], bound["eps"])
    return group_norm(tape, Call(F.group_norm, call.name, args, {}, call.path))


def group_norm(tape: Tape, call: Call) -> Any:
    """GroupNorm as one call: per group γ (v - mean v)/σ + β with σ held."""
    if tape.linearization.norm == "tangent":
        return tangent(tape, call)
    bound = _bound(call, ("input", "num_groups", "weight", "bias", "eps"), {"weight": None, "bias": None, "eps": 1e-5})
    v = bound["input"]
    groups = v.reshape(v.shape[0], bound["num_groups"], -1)
    centre = groups - groups.mean(-1, keepdim=True)
    scale = tape.decide(call, "frozen", lambda: (centre.detach().pow(2).mean(-1, keepdim=True) + bound["eps"]).sqrt())
    shape = (1, -1, *[1] * (v.ndim - 2))
    gain, bias = (None if t is None else t.reshape(shape) for t in (bound["weight"], bound["bias"]))
    return _affine(tape, (centre / scale).reshape(v.shape), gain, bias)


def unit(tape: Tape, call: Call) -> Any:
    """An element-wise unit, in the mode that the linearisation names for it."""
    found, mode = UNITS[call.name], _unit_mode(tape, call)
    z = call.args[0] if call.args else call.kwargs["input"]
    rest = {k: v for k, v in call.kwargs.items() if k not in ("input", "inplace")}
    args = call.args[1:]
    tags = Tags.of([z])
    if PENDING in tags:
        return Tags.put(call.run(), {PENDING: tags[PENDING], ACTIVATED: str(call)})
    if mode == "tangent":
        slope, offset = tape.decide(call, "tangent", lambda: line(_plain(call), z.detach(), args, rest))
        out = slope * z if tape.homogeneous else slope * z + offset
        if not tape.replaying:
            # To the bit what the network computes, with a derivative that can itself be differentiated.
            out = _plain(call)(z.detach(), *args, **rest) + slope * (z - z.detach())
        out = call.write(out)
    elif mode == "constant":
        return held(tape, call)
    elif mode == "gain" and found.gain is not None:
        coefficient = tape.decide(call, "gain", lambda: found.gain(z.detach(), *args, **rest))  # type: ignore[misc]
        out = call.write(coefficient * z)
    else:
        slope, offset = tape.decide(call, "chord", lambda: chord(_plain(call), z.detach(), args, rest))
        out = call.write(slope * z if tape.homogeneous else slope * z + offset)
    return Tags.put(out, {ACTIVATED: str(call), RANK: _GATES.get(call.name, "0")})


def _unit_mode(tape: Tape, call: Call) -> str:
    for pattern, mode in tape.linearization.overrides.items():
        if fnmatch.fnmatch(call.path, pattern) or pattern in (tape.type_at(call.path), call.name):
            return mode
    found = UNITS[call.name]
    if found.piecewise_linear or tape.linearization.activation == "tangent":
        return "tangent"
    return found.default


def _plain(call: Call) -> Callable:
    """The call's function, never in place."""
    return lambda z, *args, **kwargs: call.func(z.clone(), *args, **kwargs)


def finish(output: Tensor) -> Tensor:
    """Return a recorded output that is affine in the input.

    Raises:
        BilinearOpError: If a product of live values was never held.
        LinearizationError: If the output does not depend on the input.
    """
    tags = Tags.of([output])
    if PENDING in tags:
        raise BilinearOpError(
            f"{tags[PENDING]} reaches the output without being held",
            "a gate, divisor or pattern",
            "choose product='tangent', or 'exact'",
        )
    if not output.requires_grad:
        raise LinearizationError(
            "an output that does not depend on the input under this linearization",
            "a live output",
            "if it ends in a softmax, interpret the logits: output=...",
        )
    return output


def _two(call: Call) -> tuple[Any, Any]:
    """The two operands, however they were passed."""
    bound = _bound(call, ("input", "other"), {})
    return bound["input"], bound["other"]


def _affine(tape: Tape, value: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    value = value if gain is None else value * gain
    return value if bias is None or tape.homogeneous else value + bias


def _bound(call: Call, names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any]:
    return defaults | dict(zip(names, call.args, strict=False)) | call.kwargs


def _detached(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.detach().clone()
    return type(out)(*map(_detached, out)) if hasattr(out, "_fields") else type(out)(map(_detached, out))


def register_unit(fn: Callable, rule: Unit | Rule) -> Callable[[], None]:
    """Teach the tape a call of your own: an element-wise `Unit`, or a rule (tape, call) -> result.

    Args:
        fn: The torch function, or any function that dispatches through ``__torch_function__``.
        rule: How it is linearised. It must give the network's own value at the reference, and be affine in the live
            arguments when replayed; `LinearScope.check` tests both.

    Returns:
        A function that takes the registration back.

    Raises:
        ArgumentError: If the call has a rule already.

    Example:
        >>> import torch
        >>> from interp.hooks.units import Unit
        >>> forget = register_unit(torch.sinh, Unit(gain=lambda z: torch.sinh(z) / z))
        >>> forget()
    """
    name = calls.name_of(fn)
    if name in RULES:
        raise ArgumentError(
            f"a rule for {name}", "a call without one", "choose its mode by Linearization(overrides=...)"
        )
    if isinstance(rule, Unit):
        UNITS[name] = rule
        RULES[name] = unit
    else:
        RULES[name] = rule

    def forget() -> None:
        RULES.pop(name, None)
        UNITS.pop(name, None)

    return forget


RULES: dict[str, Rule] = {
    **dict.fromkeys(calls.LINEAR, linear),
    **dict.fromkeys(calls.WEIGHTED | calls.BILINEAR, contraction),
    **dict.fromkeys(calls.PRODUCTS, product),
    **dict.fromkeys(calls.QUOTIENTS, quotient),
    **dict.fromkeys(calls.SQUARES, square),
    **dict.fromkeys(calls.DIVISORS, divisor),
    **dict.fromkeys(calls.COMPARISONS, held),
    **dict.fromkeys(calls.SELECTIONS, tangent),
    **dict.fromkeys(UNITS, unit),
    **dict.fromkeys(calls.DROPOUTS, dropout),
    "batch_norm": batch_norm,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "instance_norm": instance_norm,
}  # fmt: skip
