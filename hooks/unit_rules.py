"""Rules of element-wise calls: units, powers, dropout."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interp.hooks import calls
from interp.hooks.basic_rules import bound, held, linear, tangent
from interp.hooks.errors import TrainModeError
from interp.hooks.norm_rules import norm_mode
from interp.hooks.tape import ACTIVATED, DIVISOR, PENDING, RANK, Call, Tags, Tape
from interp.hooks.units import UNITS, Unit, at_zero, chord, line, ratio

# How much of a gate an activation is: of two, the one that is made to be a factor is held.
_GATES = {"sigmoid": "2", "special_expit": "2", "hardsigmoid": "2", "tanh": "1"}

# Names of powers below one, with the unit that an override may make of them.
_ROOTS = {"sqrt": Unit(), "rsqrt": Unit(), "reciprocal": Unit()}


def unit(tape: Tape, call: Call) -> Any:
    """An element-wise unit, in the mode that the linearisation names for it."""
    found = UNITS[call.name]
    if call.name == "rrelu" and bound(call, ("input", "lower", "upper", "training"), {"training": False})["training"]:
        raise TrainModeError(f"{call} draws its slopes", "evaluation mode", "call model.eval()")
    z = _parts(call)[0]
    if len(call.live) > 1 or not calls.is_live(z) or z.is_complex():
        # A bound or a slope that depends on the input, or a modulus: no single real pre-activation.
        return tangent(tape, call)
    default = "tangent" if found.piecewise_linear or tape.linearization.activation == "tangent" else found.default
    mode = tape.choices.mode(call, _modes(tape, found, call), default)
    return Tags.put(elementwise(tape, call, found, mode), _marks(call, mode))


def _modes(tape: Tape, found: Unit, call: Call) -> tuple[str, ...]:
    """Modes of a unit; the gain needs f(0) = 0."""
    if not tape.linearization.overrides:
        return ()
    z, args, rest = _parts(call)
    through_zero = found.gain is not None or bool((at_zero(plain(call), z.detach()[:1], args, rest) == 0).all())
    return ("tangent", "gain", "chord", "constant") if through_zero else ("tangent", "chord", "constant")


def _marks(call: Call, mode: str) -> dict[str, str]:
    z = _parts(call)[0]
    if PENDING in Tags.of([z]) or mode == "mapped":
        return {PENDING: Tags.of([z]).get(PENDING, str(call)), ACTIVATED: str(call)}
    return {} if mode == "constant" else {ACTIVATED: str(call), RANK: _GATES.get(call.name, "0")}


def elementwise(tape: Tape, call: Call, found: Unit, mode: str) -> Any:
    """f at v in a mode, around the reference z."""
    z, args, rest = _parts(call)
    if mode == "constant":
        return held(tape, call)
    if mode == "mapped" or PENDING in Tags.of([z]):
        return call.run()
    if mode == "gain":
        closed = found.gain or ratio(plain(call))
        return call.write(tape.decide(call, mode, lambda: closed(z.detach(), *args, **rest)) * z)
    if mode == "chord":
        slope, offset = tape.decide(call, mode, lambda: chord(found, call, plain(call), z.detach(), args, rest))
        return call.write(slope * z if tape.homogeneous else slope * z + offset)
    slope, offset = tape.decide(call, "tangent", lambda: line(plain(call), z.detach(), args, rest))
    if tape.replaying:
        return call.write(slope * z if tape.homogeneous else slope * z + offset)
    # To the bit what the network computes, with a derivative that can itself be differentiated.
    return call.write(plain(call)(z.detach(), *args, **rest) + slope * (z - z.detach()))


def power(tape: Tape, call: Call) -> Any:
    """z^n: a divisor for n < 1, else a unit with gain z^(n - 1); differentiated where norms or products are."""
    twice = call.name in calls.PRODUCTS or call.name == "square"
    given = bound(call, ("input", "other" if twice else "exponent"), {"exponent": 2.0})
    z, n, other = given["input"], given["exponent"], given.get("other")
    if call.name == "rpow" or not calls.is_live(z) or calls.is_live(n):
        return _exponential(tape, call)
    lowest = float(n.min()) if isinstance(n, Tensor) else n
    if lowest < 1:
        return root(tape, call)
    smooth = tape.linearization.norm == "tangent" or tape.linearization.product == "tangent"
    mode = tape.choices.mode(call, ("tangent", "gain", "constant"), "tangent" if smooth else "gain")
    if mode == "tangent":
        return tangent(tape, call)
    if mode == "constant":
        return held(tape, call)
    gain = tape.decide(call, "gain", lambda: z.detach() ** (n - 1) if other is None else other.detach().clone())
    return Tags.put(call.write(gain * z), {ACTIVATED: str(call)})


def _exponential(tape: Tape, call: Call) -> Any:
    """c^v: as exp, differentiated or left to what holds it."""
    default = "tangent" if tape.linearization.activation == "tangent" else "mapped"
    mode = tape.choices.mode(call, ("tangent", "constant"), default)
    if mode == "mapped":
        return Tags.put(call.run(), {PENDING: str(call), ACTIVATED: str(call)})
    return tangent(tape, call) if mode == "tangent" else held(tape, call)


def root(tape: Tape, call: Call) -> Any:
    """A root or reciprocal: a norm's divisor, held or differentiated; or a unit where an override names it."""
    by_name = ("gain", "chord", "constant") if call.name in _ROOTS else ("constant",)
    mode = norm_mode(tape, call, by_name)
    if mode in ("gain", "chord"):
        return Tags.put(elementwise(tape, call, _ROOTS[call.name], mode), {ACTIVATED: str(call)})
    if mode == "tangent":
        return Tags.put(tangent(tape, call), {DIVISOR: str(call)})
    return held(tape, call)


def dropout(tape: Tape, call: Call) -> Any:
    """Identity in evaluation mode; live, refused, or the mask of the reference."""
    given = bound(call, ("input", "p", "training"), {"p": 0.5, "training": "alpha" not in call.name})
    training = given.get("train", given["training"])
    if not training or given["p"] == 0:
        return linear(tape, call)
    if tape.choices.mode(call, ("one_mask",), "refuse") == "refuse":
        raise TrainModeError(
            f"{call} is live",
            "evaluation mode",
            "call model.eval(), or hold one mask: Linearization(overrides={'dropout': 'one_mask'})",
        )
    z, args, rest = _parts(call)
    slope, offset = tape.decide(call, "one_mask", lambda: _mask(plain(call), z.detach(), args, rest))
    return Tags.put(call.write(slope * z if tape.homogeneous else slope * z + offset), Tags.of([z]))


def _mask(func: Callable, z: Tensor, args: tuple, rest: dict) -> tuple[Tensor, Tensor]:
    """(f(1) - f(0), f(0)) of one draw, which is the draw that the network would have made here."""
    devices = [z.device] if z.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        offset = at_zero(func, z, args, rest)
    return func(torch.ones_like(z), *args, **rest) - offset, offset


def _parts(call: Call) -> tuple[Any, tuple, dict[str, Any]]:
    """The pre-activation, and the call's other arguments."""
    z = call.args[0] if call.args else call.kwargs["input"]
    return z, call.args[1:], {k: v for k, v in call.kwargs.items() if k not in ("input", "inplace")}


def plain(call: Call) -> Callable:
    """The call's function, never in place."""
    return lambda z, *args, **kwargs: call.func(z.clone(), *args, **kwargs)
