"""Element-wise units: their gain f(z)/z, chord and value at zero.

Source: linear interpreters (Navarrete Michelini et al., ICCV 2019), extended to smooth units. A gain replaces f by
v -> (f(z)/z) v, a chord by v -> ((f(z) - f(0))/z) v + f(0); both agree with f at the reference z. The tangent
v -> f'(z) (v - z) + f(z) is the function's own derivative, with the convention at kinks that its autograd has.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from interp.hooks.errors import UnsupportedOpError


@dataclass(frozen=True)
class Unit:
    """An element-wise non-linearity.

    Attributes:
        piecewise_linear: The tangent is its mode under every preset.
        gain: Closed form of f(z)/z with its limit at 0, called as the function itself; without one the quotient is
            taken as it stands, where f(0) = 0.
        default: Mode under ``activation="gain"``: ``gain``, ``chord``, or ``mapped`` for functions such as exp, which
            must end in a divisor or a gate that is held, or be given a mode by an override.
        chord: Closed form of (f(z) - f(0))/z with its limit at 0.
    """

    piecewise_linear: bool = False
    gain: Callable[..., Tensor] | None = None
    default: str = "gain"
    chord: Callable[..., Tensor] | None = None


def ratio(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f(z)/z for f(0) = 0, with f'(0) where z is too small to divide by; half precision in float32."""

    def gain(z: Tensor, *args, **kwargs) -> Tensor:
        kwargs.pop("inplace", None)
        wide = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        small = wide.abs() <= torch.finfo(wide.dtype).tiny / torch.finfo(wide.dtype).eps
        safe = torch.where(small, torch.ones_like(wide), wide)
        with torch.enable_grad():
            probe = torch.zeros_like(wide).requires_grad_()
            slope = torch.autograd.grad(f(probe, *args, **kwargs).sum(), probe)[0]
        return torch.where(small, slope, f(safe, *args, **kwargs) / safe).to(z.dtype)

    return gain


def _from_above(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f(z)/z for f linear above 0, with the limit from above at 0: ELU, CELU, SELU."""

    def gain(z: Tensor, *args, **kwargs) -> Tensor:
        slope = f(torch.ones_like(z), *args, **kwargs)
        return torch.where(z >= 0, slope, ratio(f)(torch.where(z >= 0, -torch.ones_like(z), z), *args, **kwargs))

    return gain


def _gelu_gain(z: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


_sigmoid_chord = ratio(lambda z: torch.tanh(z / 2) / 2)


def _softplus_chord(z: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """(softplus(z) - ln 2/β)/z; below |βz| = 1e-2 by its series 1/2 + u/8 - u³/192 + u⁵/2880, u = βz."""
    u = beta * z
    near = (u.abs() < _SERIES) & (u <= threshold)
    safe = torch.where(near, torch.ones_like(z), z)
    series = 0.5 + u / 8 - u**3 / 192 + u**5 / 2880
    return torch.where(near, series, (F.softplus(safe, beta, threshold) - math.log(2) / beta) / safe)


def _hardsigmoid_chord(z: Tensor) -> Tensor:
    return torch.where(z.abs() <= _HARD, torch.full_like(z, 1 / 6), 0.5 / z.abs().clamp(min=1))


_SERIES, _HARD = 1e-2, 3.0
_PIECEWISE = Unit(piecewise_linear=True)
_MAPPED = Unit(default="mapped")
_SIGMOID = Unit(default="chord", chord=_sigmoid_chord)

UNITS: dict[str, Unit] = {
    **dict.fromkeys("relu relu6 hardtanh leaky_relu prelu rrelu abs absolute clamp clip clamp_min clamp_max threshold "
                    "hardshrink softshrink".split(), _PIECEWISE),
    "hardsigmoid": Unit(piecewise_linear=True, chord=_hardsigmoid_chord),
    "silu": Unit(gain=lambda z, **_: torch.sigmoid(z)),
    "gelu": Unit(gain=_gelu_gain),
    "mish": Unit(gain=lambda z, **_: torch.tanh(F.softplus(z))),
    "hardswish": Unit(gain=lambda z, **_: F.relu6(z + 3) / 6),
    "softsign": Unit(gain=lambda z: 1 / (1 + z.abs())),
    "elu": Unit(gain=_from_above(F.elu)),
    "celu": Unit(gain=_from_above(F.celu)),
    "selu": Unit(gain=_from_above(F.selu)),
    **{name: Unit(gain=ratio(f)) for name, f in {
        "tanh": torch.tanh, "tanhshrink": F.tanhshrink, "erf": torch.erf, "sin": torch.sin, "tan": torch.tan,
        "sinh": torch.sinh, "asinh": torch.asinh, "arcsinh": torch.asinh, "atan": torch.atan, "arctan": torch.atan,
        "asin": torch.asin, "arcsin": torch.asin, "atanh": torch.atanh, "arctanh": torch.atanh,
        "expm1": torch.expm1, "special_expm1": torch.expm1, "log1p": torch.log1p,
    }.items()},
    "sigmoid": _SIGMOID,
    "special_expit": _SIGMOID,
    "softplus": Unit(default="chord", chord=_softplus_chord),
    "log_sigmoid": Unit(default="chord", chord=lambda z: _softplus_chord(-z)),
    "exp": Unit(default="mapped", chord=ratio(torch.expm1)),
    "cos": Unit(default="mapped", chord=ratio(lambda z: -2 * torch.sin(z / 2) ** 2)),
    "cosh": Unit(default="mapped", chord=ratio(lambda z: 2 * torch.sinh(z / 2) ** 2)),
    **dict.fromkeys("exp2 erfc log log2 log10 acos arccos acosh arccosh logit sinc".split(), _MAPPED),
}  # fmt: skip


def at_zero(func: Callable, z: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """Return f(0), shaped like z."""
    return func(torch.zeros_like(z), *args, **kwargs)


def line(func: Callable, z: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Return the tangent (f'(z), f(z) - f'(z) z), with the call's own convention at kinks."""
    with torch.enable_grad():
        probe = z.clone().requires_grad_()
        value = func(probe, *args, **kwargs)
        slope = torch.autograd.grad(value.sum(), probe)[0]
    return slope, value.detach() - slope * z


def chord(unit: Unit, call: object, func: Callable, z: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Return (h, f(0)) with f(z) = h z + f(0).

    Raises:
        UnsupportedOpError: If f(0) is not finite.
    """
    offset = at_zero(func, z, args, kwargs)
    if not torch.isfinite(offset).all():
        raise UnsupportedOpError(
            f"{call} has no chord: its value at 0 is infinite", "a unit with finite f(0)", "override it by 'tangent'"
        )
    closed = unit.chord or ratio(lambda v, *a, **k: func(v, *a, **k) - at_zero(func, v, a, k))
    return closed(z, *args, **kwargs), offset
