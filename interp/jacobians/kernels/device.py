"""Where kernels run: which tensors they take, and how precise products of float32 factors are."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from interp.hooks.errors import ArgumentError, MissingExtraError

Way = Literal["auto", "fused", "torch"]
WAYS = ("auto", "fused", "torch")

# float64 has no matrix product worth fusing, and Triton's interpreter multiplies the bit patterns of bfloat16.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def fits_kernels(like: Tensor) -> bool:
    """Whether a kernel would take a tensor: on a CUDA device, of at most 32 bits, and Triton is here."""
    return like.is_cuda and like.dtype in _DTYPES and has_triton()


def runs_fused(way: Way, like: Tensor) -> bool:
    """Return whether a kernel runs: where it can, under ``auto``; where it was asked for, or not at all.

    Raises:
        ArgumentError: If the way is unknown, or the tensor is not one that kernels take.
        MissingExtraError: If a kernel was asked for without Triton.
    """
    if way == "fused":
        require_kernels(like)
    elif way not in WAYS:
        raise ArgumentError(f"way={way!r}", f"one of {', '.join(WAYS)}")
    return way == "fused" or (way == "auto" and fits_kernels(like))


def require_kernels(like: Tensor) -> None:
    """Refuse to run a kernel on what it cannot take. On a CPU only Triton's interpreter can.

    Raises:
        ArgumentError: If device or dtype are others.
        MissingExtraError: If Triton is not installed.
    """
    if not has_triton():
        raise MissingExtraError(
            "a fused kernel without triton", "triton", "pip install 'interp[kernels]', or way='torch' without it"
        )
    from triton import knobs  # pyright: ignore[reportMissingImports]

    if not like.is_cuda and not knobs.runtime.interpret:
        raise ArgumentError(f"a fused kernel on {like.device}", "a CUDA device", "way='torch' runs anywhere")
    if like.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ArgumentError(f"a fused kernel of {like.dtype}", names, "way='torch' takes any dtype")


@contextmanager
def float32_products(like: Tensor, tf32: bool) -> Iterator[None]:
    """Products of float32 factors round them to tf32 or do not, whatever the process-wide flag says. For GPUs."""
    if not like.is_cuda:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
