"""Reading a map between pictures: what a white pixel projects, what an output pixel reads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError

if TYPE_CHECKING:
    from interp.hooks.linear_scope import LinearScope


def white_impulses(scope: "LinearScope", pixels: Sequence[Any]) -> Float[Tensor, "n ..."]:
    """Return F e for each of n input pixels (row, column): e is one in all channels of the pixel.

    Raises:
        ArgumentError: If the input is no picture or a pixel is outside it.
    """
    if scope.x.ndim != 4 or not len(pixels):
        raise ArgumentError(f"{len(pixels)} pixels of an input {list(scope.in_shape)}", "pixels of a picture")
    probes = torch.zeros(len(pixels), *scope.in_shape, dtype=scope.dtype, device=scope.device)
    for probe, at in zip(probes, pixels, strict=True):
        i, j = inside(at, scope.in_shape)
        probe[:, i, j] = 1.0
    return scope.matvec(probes)


def filter_at(scope: "LinearScope", at: Any) -> Float[Tensor, "..."]:
    """Return Fᵀ w: w averages the channels of an output pixel (row, column), or is a class (index or label).

    Raises:
        ArgumentError: If the pixel or class does not exist.
    """
    if scope.y.ndim != 4:
        return scope.rmatvec(scope.direction(at))
    i, j = inside(at, scope.out_shape)
    w = torch.zeros(scope.out_shape, dtype=scope.dtype, device=scope.device)
    w[:, i, j] = 1.0 / scope.out_shape[0]
    return scope.rmatvec(w)


def inside(at: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a pixel (row, column) of pictures of a shape [..., height, width].

    Raises:
        ArgumentError: If it is no pixel of theirs.
    """
    height, width = shape[-2:]
    if not (isinstance(at, (tuple, list)) and len(at) == 2 and 0 <= at[0] < height and 0 <= at[1] < width):
        raise ArgumentError(f"pixel {at!r}", f"(row, column) inside {height} x {width}")
    return at[0], at[1]
