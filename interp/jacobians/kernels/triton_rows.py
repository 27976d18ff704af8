"""Row-wise kernels in Triton. Imported only where they run: Triton is optional.

A program keeps one row of statistics in registers and goes through the tangents of that row, so that the statistics
are read once; everything else is read and written once.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tangents that one program goes through.
_TANGENTS = 8
# A gate's tangent is element by element.
_ELEMENTS = 2048


@triton.jit
@no_type_check
def norm_kernel(
    v, normalized, scale, gain, out, rows, tangents,
    D: tl.constexpr, CENTRED: tl.constexpr, HELD: tl.constexpr, GAIN: tl.constexpr, TRANSPOSED: tl.constexpr,
    EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """γ ⊙ (v - mean v - n (n·v)/d)/r of one row and some of its tangents."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < D
    n = tl.load(normalized + row * D + at, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(scale + row).to(tl.float32)
    if GAIN:
        g = tl.load(gain + at, mask=mask, other=0.0).to(tl.float32)
    for step in range(EACH):
        k = tl.program_id(1) * EACH + step
        here = at < tl.where(k < tangents, D, 0)
        where = (k.to(tl.int64) * rows + row) * D + at
        x = tl.load(v + where, mask=here, other=0.0).to(tl.float32)
        if GAIN and TRANSPOSED:
            x = x * g
        if CENTRED:
            x = tl.where(mask, x - tl.sum(x, 0) / D, 0.0)
        if not HELD:
            x = x - n * (tl.sum(n * x, 0) / D)
        x = x / r
        if GAIN and not TRANSPOSED:
            x = x * g
        tl.store(out + where, x.to(out.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def softmax_kernel(
    pattern, v, out, rows, tangents, width: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A (v - Σ A v) of one row of A and some of its tangents; where A is 0, v is not read."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    a = tl.load(pattern + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    for step in range(EACH):
        k = tl.program_id(1) * EACH + step
        here = at < tl.where(k < tangents, width, 0)
        where = (k.to(tl.int64) * rows + row) * width + at
        x = a * tl.load(v + where, mask=here & (a != 0), other=0.0).to(tl.float32)
        x = x - a * tl.sum(x, 0)
        tl.store(out + where, x.to(out.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def gate_kernel(p, dg, q, du, out, size, inner, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """p ⊙ dg + q ⊙ du of a block of elements; factors repeat every ``inner``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    shared = at % inner
    x = tl.load(dg + at, mask=mask, other=0.0).to(tl.float32) * tl.load(p + shared, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        y = tl.load(du + at, mask=mask, other=0.0).to(tl.float32)
        x += y * tl.load(q + shared, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=mask)


def norm_jvp(
    v: Tensor, normalized: Tensor, scale: Tensor, gain: Tensor | None, centred: bool, held: bool, transposed: bool
) -> Tensor:
    """Tangents [k, ..., d] through a norm with statistics [..., d] and [..., 1]."""
    v, normalized, scale = v.contiguous(), normalized.contiguous(), scale.contiguous()
    out, width, tangents = torch.empty_like(v), v.shape[-1], len(v)
    rows = scale.numel()
    if v.numel() == 0:
        return out
    each, block = min(_TANGENTS, tangents), triton.next_power_of_2(width)
    norm_kernel[(rows, triton.cdiv(tangents, each))](
        v, normalized, scale, None if gain is None else gain.contiguous(), out, rows, tangents,
        D=width, CENTRED=centred, HELD=held, GAIN=gain is not None, TRANSPOSED=transposed, EACH=each, BLOCK=block,
        num_warps=_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return out


def softmax_jvp(pattern: Tensor, v: Tensor) -> Tensor:
    """Tangents [k, ..., key] through a softmax of value [..., key]."""
    v, pattern = v.contiguous(), pattern.contiguous()
    out, width, tangents = torch.empty_like(v), v.shape[-1], len(v)
    if v.numel() == 0:
        return out
    each, block = min(_TANGENTS, tangents), triton.next_power_of_2(width)
    rows = pattern.numel() // width
    softmax_kernel[(rows, triton.cdiv(tangents, each))](
        pattern, v, out, rows, tangents, width=width, EACH=each, BLOCK=block, num_warps=_warps(block),
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def gate_tangent(p: Tensor, dg: Tensor, q: Tensor | None, du: Tensor | None) -> Tensor:
    """p ⊙ dg + q ⊙ du with factors [..., f] shared by the tangents [k, ..., f]."""
    p, dg = p.contiguous(), dg.contiguous()
    gated = q is not None and du is not None
    out = torch.empty_like(dg)
    if dg.numel() == 0:
        return out
    gate_kernel[(triton.cdiv(dg.numel(), _ELEMENTS),)](
        p, dg, q.contiguous() if q is not None else None, du.contiguous() if du is not None else None, out,
        dg.numel(), p.numel(), GATED=gated, BLOCK=_ELEMENTS, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    """Warps for a row: 16 elements for each thread or fewer."""
    return max(1, min(16, block // 512))
