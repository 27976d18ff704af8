"""The gate sandwich in Triton. Imported only where it runs: Triton is optional.

One program makes one tile [inputs, outputs] of one token's transposed Jacobian, so that the factors p and q run along
the contiguous axis of neurons, W_out is shared by all tokens, and tokens stack along the rows: one tall matrix product
whose left tile is scaled in registers on its way to the tensor cores.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from interp.jacobians.kernels.sandwich import Sandwich

# Tokens that share a tile of the weights while it is in the second-level cache.
_GROUP = 8


@dataclass(frozen=True)
class Tile:
    """How much one program does, and with what.

    Attributes:
        inputs: Rows of a tile.
        outputs: Columns of a tile. Wide ones pay: the left tile is scaled again for each.
        neurons: How many are summed at a time.
        warps: Of a program.
        stages: Of the pipeline of loads.
    """

    inputs: int
    outputs: int
    neurons: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.inputs} x {self.outputs} x {self.neurons}"


def tiles_for(dtype: torch.dtype, tf32: bool) -> tuple[Tile, ...]:
    """The tiles that are timed against each other for weights of a dtype."""
    if dtype.itemsize == 2:
        return Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3)
    if tf32:
        return Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3)
    return Tile(64, 64, 16, 4, 3), Tile(128, 64, 16, 8, 3)


# What a program does with its tile.
STORE, NORM, LEFT, RIGHT = (tl.constexpr(i) for i in range(4))


@triton.jit
@no_type_check
def sandwich_kernel(
    pre, up, w_out, p, q, n, c, vectors, out,
    tokens, d_in, d_out, pre_step, up_step, out_step, p_step, q_step, n_step, c_step, vector_step,
    to_token, to_row, to_column, to_vector,
    F: tl.constexpr, VECTORS: tl.constexpr, GATED: tl.constexpr, NORMED: tl.constexpr, SKIP: tl.constexpr,
    WHAT: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """J_tᵀ[i, o] = Σ_f (pre[i, f] p[t, f] + up[i, f] q[t, f]) w_out[o, f] - n[t, i] c[t, o], one tile of one token."""
    tiles_o = tl.cdiv(d_out, BLOCK_O)
    tiles = tl.cdiv(d_in, BLOCK_I) * tiles_o
    pid = tl.program_id(0)
    first = pid // (tiles * GROUP) * GROUP
    here = tl.minimum(tokens - first, GROUP)
    rest = pid - first * tiles
    tile = rest // here
    token = first + rest % here
    tile_i, tile_o = tile // tiles_o, tile % tiles_o

    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_i, mask_o = i < d_in, o < d_out
    # Offsets in weights and results may pass 2^31.
    row_i, row_o, t = i.to(tl.int64), o.to(tl.int64), token.to(tl.int64)

    acc = tl.zeros((BLOCK_I, BLOCK_O), dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        mask_f = f < F
        mask_a = mask_i[:, None] & mask_f[None, :]
        scale = tl.load(p + t * p_step + f, mask=mask_f, other=0.0).to(tl.float32)
        left = tl.load(pre + row_i[:, None] * pre_step + f[None, :], mask=mask_a, other=0.0).to(tl.float32)
        left = left * scale[None, :]
        if GATED:
            scale = tl.load(q + t * q_step + f, mask=mask_f, other=0.0).to(tl.float32)
            other = tl.load(up + row_i[:, None] * up_step + f[None, :], mask=mask_a, other=0.0).to(tl.float32)
            left += other * scale[None, :]
        mask_b = mask_f[:, None] & mask_o[None, :]
        right = tl.load(w_out + row_o[None, :] * out_step + f[:, None], mask=mask_b, other=0.0)
        acc = tl.dot(left.to(right.dtype), right, acc, input_precision=PRECISION)

    if NORMED:
        by_i = tl.load(n + t * n_step + i, mask=mask_i, other=0.0).to(tl.float32)
        by_o = tl.load(c + t * c_step + o, mask=mask_o, other=0.0).to(tl.float32)
        acc -= by_i[:, None] * by_o[None, :]
    mask = mask_i[:, None] & mask_o[None, :]
    if SKIP:
        acc += tl.where((i[:, None] == o[None, :]) & mask, 1.0, 0.0)

    if WHAT == STORE:
        where = out + t * to_token + row_i[:, None] * to_row + row_o[None, :] * to_column
        tl.store(where, acc.to(out.dtype.element_ty), mask=mask)
    elif WHAT == NORM:
        tl.store(out + t * to_token + tile, tl.sum(tl.sum(acc * acc, 1), 0))
    elif WHAT == LEFT:
        for which in range(VECTORS):
            w = tl.load(vectors + which * vector_step + o, mask=mask_o, other=0.0).to(tl.float32)
            part = tl.sum(acc * w[None, :], 1)
            tl.store(out + t * to_token + which * to_vector + tile_o * to_row + i, part, mask=mask_i)
    else:
        for which in range(VECTORS):
            v = tl.load(vectors + which * vector_step + i, mask=mask_i, other=0.0).to(tl.float32)
            part = tl.sum(acc * v[:, None], 0)
            tl.store(out + t * to_token + which * to_vector + tile_i * to_row + o, part, mask=mask_o)


def launch(
    x: Sandwich, what: tl.constexpr, out: Tensor, strides: tuple[int, int, int, int], tile: Tile, tf32: bool,
    vectors: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the kernel over all tokens and tiles of a `Sandwich`, whose weights and factors have unit stride along f.

    ``strides`` of the output are by token, row (of a reduction: tile), column and vector.
    """
    d_in, d_out, neurons = x.pre.shape[1], x.out.shape[0], x.out.shape[1]
    tokens = len(x.p)
    pre, up = x.pre.T, None if x.up is None else x.up.T
    step = lambda tensor: 0 if tensor is None else tensor.stride(0)
    grid = (tokens * triton.cdiv(d_in, tile.inputs) * triton.cdiv(d_out, tile.outputs),)
    sandwich_kernel[grid](
        pre, up, x.out, x.p, x.q, x.n, x.c, vectors, out,
        tokens, d_in, d_out, step(pre), step(up), step(x.out), step(x.p), step(x.q), step(x.n), step(x.c),
        step(vectors), *strides,
        F=neurons, VECTORS=0 if vectors is None else len(vectors), GATED=up is not None, NORMED=x.n is not None,
        SKIP=x.skip, WHAT=what.value, PRECISION="tf32" if tf32 else "ieee", GROUP=_GROUP,
        BLOCK_I=tile.inputs, BLOCK_O=tile.outputs, BLOCK_F=tile.neurons,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def store(x: Sandwich, out: Tensor, tile: Tile, tf32: bool) -> None:
    """Write each token's Jacobian to ``out`` [token, output, input] through its strides."""
    launch(x, STORE, out, (out.stride(0), out.stride(2), out.stride(1), 0), tile, tf32)


def norms(x: Sandwich, tile: Tile, tf32: bool) -> Tensor:
    """The squared Frobenius norm of each token's Jacobian [token], summed by tile and then over tiles."""
    tiles = triton.cdiv(x.pre.shape[1], tile.inputs) * triton.cdiv(x.out.shape[0], tile.outputs)
    parts = torch.empty(len(x.p), tiles, dtype=torch.float32, device=x.p.device)
    launch(x, NORM, parts, (parts.stride(0), 0, 0, 0), tile, tf32)
    return parts.sum(1, dtype=torch.float64).to(torch.float32)


def products(x: Sandwich, vectors: Tensor, left: bool, tile: Tile, tf32: bool) -> Tensor:
    """Jᵀ of vectors on the outputs (``left``) or J of vectors on the inputs: [token, vector, width], by tiles."""
    d_in, d_out = x.pre.shape[1], x.out.shape[0]
    width, tiles = (d_in, triton.cdiv(d_out, tile.outputs)) if left else (d_out, triton.cdiv(d_in, tile.inputs))
    parts = torch.empty(len(x.p), len(vectors), tiles, width, dtype=torch.float32, device=x.p.device)
    strides = (parts.stride(0), parts.stride(2), 0, parts.stride(1))
    launch(x, LEFT if left else RIGHT, parts, strides, tile, tf32, vectors)
    return parts.sum(2)
