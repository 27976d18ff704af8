"""Element-wise units: their gain f(z)/z, chord and value at zero.

Source: linear interpreters (Navarrete Michelini et al., ICCV 2019), extended to smooth units. A gain replaces f by
v -> (f(z)/z) v, a chord by v -> ((f(z) - f(0))/z) v + f(0); both agree with f at the reference z.
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
        piecewise_linear: The tangent is its only sensible mode.
        gain: Closed form of f(z)/z with its limit at 0, called as the function itself; None where f(0) != 0.
        default: Mode under ``activation="gain"``.
    """

    piecewise_linear: bool = False
    gain: Callable[..., Tensor] | None = None
    default: str = "gain"


def _ratio(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f(z)/z, with f'(0) where the quotient is 0/0 or z is too small to divide by."""

    def gain(z: Tensor, *args, **kwargs) -> Tensor:
        kwargs.pop("inplace", None)
        tiny = torch.finfo(z.dtype).tiny / torch.finfo(z.dtype).eps
        small = z.abs() <= tiny
        safe = torch.where(small, torch.ones_like(z), z)
        zero = torch.zeros_like(z)
        with torch.enable_grad():
            probe = zero.requires_grad_()
            slope = torch.autograd.grad(f(probe, *args, **kwargs).sum(), probe)[0]
        return torch.where(small, slope, f(safe, *args, **kwargs) / safe)

    return gain


def _gelu_gain(z: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


_PIECEWISE = Unit(piecewise_linear=True)
_GATE = Unit(default="chord")

UNITS: dict[str, Unit] = {
    **dict.fromkeys("relu relu6 hardtanh leaky_relu rrelu abs absolute clamp clip clamp_min clamp_max threshold "
                    "hardshrink softshrink hardsigmoid".split(), _PIECEWISE),
    "silu": Unit(gain=lambda z, **_: torch.sigmoid(z)),
    "gelu": Unit(gain=_gelu_gain),
    "mish": Unit(gain=lambda z, **_: torch.tanh(F.softplus(z))),
    "hardswish": Unit(gain=lambda z, **_: F.relu6(z + 3) / 6),
    "softsign": Unit(gain=lambda z: 1 / (1 + z.abs())),
    "tanh": Unit(gain=_ratio(torch.tanh)),
    "elu": Unit(gain=_ratio(F.elu)),
    "celu": Unit(gain=_ratio(F.celu)),
    "selu": Unit(gain=_ratio(F.selu)),
    "tanhshrink": Unit(gain=_ratio(F.tanhshrink)),
    "log_sigmoid": _GATE,
    "erf": Unit(gain=_ratio(torch.erf)),
    "sin": Unit(gain=_ratio(torch.sin)),
    "asinh": Unit(gain=_ratio(torch.asinh)),
    "arctan": Unit(gain=_ratio(torch.atan)),
    "atan": Unit(gain=_ratio(torch.atan)),
    "sigmoid": _GATE,
    "special_expit": _GATE,
    "softplus": _GATE,
}  # fmt: skip


def line(func: Callable, z: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Return the tangent (f'(z), f(z) - f'(z) z), with the call's own convention at kinks."""
    with torch.enable_grad():
        probe = z.clone().requires_grad_()
        value = func(probe, *args, **kwargs)
        slope = torch.autograd.grad(value.sum(), probe)[0]
    return slope, value.detach() - slope * z


def chord(func: Callable, z: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Return (h, f(0)) with f(z) = h z + f(0).

    Raises:
        UnsupportedOpError: If f(0) is not finite.
    """
    offset = func(torch.zeros_like(z), *args, **kwargs)
    if not torch.isfinite(offset).all():
        raise UnsupportedOpError("a chord of a unit with infinite value at 0", "a unit with finite f(0)")
    quotient = _ratio(lambda v, *a, **k: func(v, *a, **k) - func(torch.zeros_like(v), *a, **k))
    return quotient(z, *args, **kwargs), offset
