"""What test_kernels.py runs in processes of its own, since Triton reads TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python -m tests.kernel_cases interpreted    # each kernel against einsum in float64
    python -m tests.kernel_cases compiled                          # ahead of time for sm_90, without a GPU

Prints one JSON object for each case.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

if __name__ == "__main__":
    # As in conftest.py: shapes are checked, and the hook must leave the kernels as they are.
    import jaxtyping

    SHAPE_CHECKS = jaxtyping.install_import_hook("interp", "beartype.beartype")

from interp.jacobians.kernels import choice, device, rows
from interp.jacobians.kernels.sandwich import Sandwich, sandwich, sandwich_left, sandwich_norms, sandwich_right

# name: [tokens, inputs, outputs, neurons]. Odd, 1, more than one group of 8 tokens, and not multiples of any tile.
SIZES = {"17x33x1": (11, 17, 33, 1), "40x100x72": (3, 40, 72, 100), "33x1x17": (1, 33, 1, 17)}
INTERPRETED, COMPILED = {}, {}


def case(table, *arguments):
    """Enter a function, with its arguments, under a name made of both."""

    def enter(function):
        name = " ".join([function.__name__, *map(str, arguments)])
        table[name] = functools.partial(function, *arguments)
        return function

    return enter


def make(size, dtype=torch.float32, gated=True, normed=True, skip=False, device="cpu"):
    """A sandwich of random numbers and its Jacobians by einsum in float64."""
    tokens, d_in, d_out, f = SIZES[size] if isinstance(size, str) else size
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    x = Sandwich(
        draw(d_out, f).to(dtype), draw(f, d_in).to(dtype), draw(tokens, f),
        draw(f, d_in).to(dtype) if gated else None, draw(tokens, f) if gated else None,
        draw(tokens, d_in) if normed else None, draw(tokens, d_out) if normed else None, skip,
    )  # fmt: skip
    return x, dense(x)


def dense(x):
    wanted = torch.einsum("of,tf,fi->toi", x.out.double(), x.p.double(), x.pre.double())
    if x.up is not None:
        wanted += torch.einsum("of,tf,fi->toi", x.out.double(), x.q.double(), x.up.double())
    if x.n is not None:
        wanted -= torch.einsum("to,ti->toi", x.c.double(), x.n.double())
    return wanted + torch.eye(wanted.shape[1], device=wanted.device) if x.skip else wanted


def relative(found, wanted):
    """Relative Frobenius error; infinite where anything is not finite."""
    error = float((found.double() - wanted).norm() / wanted.norm())
    return error if error == error else float("inf")


# values, in the interpreter


@case(INTERPRETED, "17x33x1", "float32")
@case(INTERPRETED, "40x100x72", "float32")
@case(INTERPRETED, "40x100x72", "float16")
@case(INTERPRETED, "33x1x17", "float16")
def stores(size, dtype):
    """Every term, small tiles: several in each direction, and several groups of tokens."""
    from interp.jacobians.kernels import triton_sandwich as kernels

    x, wanted = make(size, getattr(torch, dtype))
    out = torch.full_like(wanted, torch.nan, dtype=torch.float32)
    kernels.store(x.aligned(), out, kernels.Tile(16, 32, 16, 4, 3), False)
    return relative(out, wanted)


@case(INTERPRETED, "ungated")
@case(INTERPRETED, "plain")
@case(INTERPRETED, "skip")
def terms(which):
    """Without a gate, without a norm, with the identity; with the tiles that GPUs get."""
    options = {"ungated": {"gated": False}, "plain": {"normed": False}, "skip": {"skip": True}}[which]
    x, wanted = make((2, 40, 40, 24), **options)
    return relative(sandwich(x, way="fused"), wanted)


@case(INTERPRETED, "transposed")
@case(INTERPRETED, "apart")
def strided(which):
    """Results that are views: J of a tensor that holds Jᵀ, every other row and column. Nothing else is written."""
    x, wanted = make("40x100x72")
    tokens, d_out, d_in = wanted.shape
    if which == "transposed":
        whole = torch.full((tokens, d_in, d_out), torch.nan)
        out = whole.mT
    else:
        whole = torch.full((tokens, 2 * d_out, 2 * d_in), torch.nan)
        out = whole[:, ::2, ::2]
    assert sandwich(x, out, way="fused") is out
    untouched = whole.numel() - out.numel()
    return relative(out, wanted) if int(whole.isnan().sum()) == untouched else float("inf")


@case(INTERPRETED)
def padded():
    """Weights and factors cut from wider tensors whose rest is NaN, with neurons across and along."""
    x, wanted = make("40x100x72")

    def within(value):
        wide = torch.full((value.shape[0] + 3, value.shape[1] + 5), torch.nan)
        return wide[: value.shape[0], : value.shape[1]].copy_(value)

    across, along = within(x.pre), within(x.up.T).T
    cut = Sandwich(within(x.out), across, within(x.p), along, within(x.q), within(x.n), within(x.c))
    return relative(sandwich(cut, way="fused"), wanted)


@case(INTERPRETED, "norms")
@case(INTERPRETED, "left")
@case(INTERPRETED, "right")
def reduces(which):
    """What is summed instead of stored, over several tiles and with the identity."""
    x, wanted = make((9, 40, 40, 33), skip=True)
    vectors = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    found, by_hand = {
        "norms": lambda: (sandwich_norms(x, way="fused"), wanted.square().sum((1, 2))),
        "left": lambda: (sandwich_left(x, vectors, way="fused"), torch.einsum("ko,toi->tki", vectors.double(), wanted)),
        "right": lambda: (
            sandwich_right(x, vectors, way="fused"), torch.einsum("ki,toi->tko", vectors.double(), wanted)
        ),
    }[which]()  # fmt: skip
    return relative(found, by_hand)


@case(INTERPRETED, "rms", "float32", True)
@case(INTERPRETED, "rms", "float16", False)
@case(INTERPRETED, "ln", "float32", True)
@case(INTERPRETED, "ln", "float32", False)
def norms(kind, dtype, gain):
    """Against autograd in float64, pushed and pulled; more tangents than a program takes."""
    k, pos, d, dtype = 11, 2, 37, getattr(torch, dtype)
    x, weight = torch.randn(pos, d, dtype=torch.float64), torch.rand(d, dtype=torch.float64) + 0.5 if gain else None
    v = torch.randn(k, pos, d).to(dtype)

    def forward(x):
        x = x - x.mean(-1, keepdim=True) if kind == "ln" else x
        r = (x.square().mean(-1, keepdim=True)).sqrt()
        return x / r * (1.0 if weight is None else weight), x / r, r

    matrix = torch.autograd.functional.jacobian(lambda x: forward(x)[0], x)
    _, n, r = (t.float() for t in forward(x))
    call = functools.partial(getattr(rows, f"{kind}_jvp"), v, n, r, None if weight is None else weight.float())
    pushed = torch.einsum("pdqe,kqe->kpd", matrix, v.double())
    pulled = torch.einsum("qepd,kqe->kpd", matrix, v.double())
    held = v.double() - v.double().mean(-1, keepdim=True) if kind == "ln" else v.double()
    held = held / forward(x)[2] * (1.0 if weight is None else weight)
    return max(
        relative(call(way="fused"), pushed), relative(call(transposed=True, way="fused"), pulled),
        relative(call(held=True, way="fused"), held),
    )  # fmt: skip


@case(INTERPRETED, 1)
@case(INTERPRETED, 33)
def softmax(keys):
    """Against autograd in float64, with NaN where a key is masked; the pattern is a slice of a larger one."""
    scores = torch.randn(2, 5, keys, dtype=torch.float64)
    scores[:, 0, keys // 2 + 1 :] = -torch.inf
    pattern = scores.softmax(-1)
    v = torch.randn(9, 2, 5, keys)
    inner = torch.where(pattern == 0, 0.0, v.double())
    wanted = pattern * (inner - (pattern * inner).sum(-1, keepdim=True))
    v = torch.where(pattern == 0, torch.nan, v)
    wide = torch.full((2, 8, keys), torch.nan)
    wide[:, 1:6] = pattern
    found = rows.softmax_jvp(wide[:, 1:6], v, way="fused")
    if keys == 1:
        return float(found.abs().max())
    return relative(found, wanted)


@case(INTERPRETED, True)
@case(INTERPRETED, False)
def gates(gated):
    """More elements than a program takes, not a multiple of them."""
    p, q, dg, du = torch.randn(3, 101), torch.randn(3, 101), torch.randn(7, 3, 101), torch.randn(7, 3, 101)
    wanted = p.double() * dg.double() + (q.double() * du.double() if gated else 0)
    return relative(rows.gate_tangent(p, dg, *((q, du) if gated else ()), way="fused"), wanted)


@case(INTERPRETED, "llama", "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out")
@case(INTERPRETED, "gpt2", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post")
@case(INTERPRETED, "gpt2", "blocks.1.ln2.hook_out", "blocks.1.mlp.hook_out")
@case(INTERPRETED, "gemma2", "blocks.0.hook_resid_pre", "blocks.0.hook_resid_post")
def jacobians(name, source, target):
    """The engine as it is on a GPU, against autograd: tokens at once, kept rows and columns, norms, and the plan."""
    import interp
    from tests.cases import build, inputs_for

    model, ids = interp.attach(build(name)), inputs_for(name)[:1, :3]
    call = functools.partial(interp.jacobian, model, ids, source, target, "same")
    wanted = call(method="autograd").dense().double()
    before = device.fits_kernels, choice._seconds
    device.fits_kernels = lambda like: like.dtype == torch.float32
    # In the place of times: the kernels first, so that they are chosen.
    times = iter([2.0, 1.0, 3.0] * 9)
    choice._seconds = lambda call: next(times)
    choice._KNOWN.clear()
    try:
        made = call(method="closed")
        mlp = "resid_pre" not in source
        assert ("fused kernel" in str(made.plan)) == mlp, str(made.plan)
        errors = [relative(made.dense(), wanted)] if mlp else []
        kept = call(method="closed", rows=[5, 0, 3], columns=list(range(1, 20, 2)))
        errors.append(relative(kept.dense(), wanted[:, [5, 0, 3]][:, :, 1:20:2]))
        if mlp:
            from interp.jacobians.fused import fused_norms

            errors.append(relative(fused_norms(made), wanted.flatten(1).norm(dim=1)))
        return max(errors)
    finally:
        device.fits_kernels, choice._seconds = before


# code, for a GPU that is not here


def built(kernel, pointers, fixed, integers=(), **options):
    """A kernel compiled for an H100, and what it takes of registers and shared memory."""
    from triton import compile as build
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind = lambda name: "constexpr" if name in fixed else pointers.get(name, "i32")
    signature = {name: kind(name) for name in kernel.arg_names}
    free = [i for i, name in enumerate(kernel.arg_names) if name not in fixed and name not in integers]
    source = ASTSource(kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in free})
    made = build(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True, **options})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    number = lambda word: int(re.search(rf"\b{word}:(\d+)", usage).group(1))
    spilled = number("LOCAL") + number("STACK")
    return made, {"shared": made.metadata.shared, "registers": number("REG"), "spilled": spilled}


@case(COMPILED, "bf16", 0, True, "STORE")
@case(COMPILED, "bf16", 0, False, "STORE")
@case(COMPILED, "bf16", 0, True, "NORM")
@case(COMPILED, "bf16", 0, True, "LEFT")
@case(COMPILED, "bf16", 0, True, "RIGHT")
@case(COMPILED, "bf16", 1, True, "STORE")
@case(COMPILED, "tf32", 0, True, "STORE")
@case(COMPILED, "tf32", 1, True, "STORE")
@case(COMPILED, "fp32", 0, True, "STORE")
@case(COMPILED, "fp32", 1, True, "STORE")
def product(dtype, which, gated, what):
    """The sandwich with one of its tiles, and which instructions its products are."""
    from interp.jacobians.kernels import triton_sandwich as kernels

    tile = kernels.tiles_for(torch.bfloat16 if dtype == "bf16" else torch.float32, dtype == "tf32")[which]
    fixed = dict(
        F=14336, VECTORS=2, GATED=gated, NORMED=True, SKIP=True, WHAT=getattr(kernels, what).value,
        PRECISION="tf32" if dtype == "tf32" else "ieee", GROUP=8, BLOCK_I=tile.inputs, BLOCK_O=tile.outputs,
        BLOCK_F=tile.neurons, to_row=1,
    )  # fmt: skip
    fixed |= {} if gated else {"up": None, "q": None}
    pointers = dict.fromkeys(("pre", "up", "w_out"), "*bf16" if dtype == "bf16" else "*fp32")
    pointers |= dict.fromkeys(("p", "q", "n", "c", "vectors", "out"), "*fp32")
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made, found = built(kernels.sandwich_kernel, pointers, fixed, ("tokens",), **options)
    products = re.findall(r"wgmma\.mma_async\S*\.(m64n\d+k\d+)\.f32\.(\w+)\.\w+ *\{[^}]*\}, *([{%])", made.asm["ptx"])
    return found | {
        "products": sorted({f"{shape} {kind}" for shape, kind, _ in products}),
        "scaled in registers": bool(products) and all(left == "{" for _, _, left in products),
        "asynchronous copies": "cp.async" in made.asm["ptx"],
    }


@case(COMPILED, "norm")
@case(COMPILED, "softmax")
@case(COMPILED, "gate")
def row(which):
    """The row-wise kernels, at the width of a large model."""
    from interp.jacobians.kernels import triton_rows as kernels

    fixed = {
        "norm": dict(D=8192, CENTRED=True, HELD=False, GAIN=True, TRANSPOSED=False, EACH=8, BLOCK=8192),
        "softmax": dict(width=8192, EACH=8, BLOCK=8192),
        "gate": dict(GATED=True, BLOCK=2048),
    }[which]
    pointers = dict.fromkeys(("v", "normalized", "scale", "gain", "out", "pattern", "p", "dg", "q", "du"), "*fp32")
    kernel = getattr(kernels, f"{which}_kernel")
    return built(kernel, pointers, fixed, ("rows", "tangents"), num_warps=8 if which == "gate" else 16)[1]


def main(which):
    for name, run in {"interpreted": INTERPRETED, "compiled": COMPILED}[which].items():
        torch.manual_seed(0)
        start = time.time()
        try:
            found = {"value": run()}
        except Exception:  # noqa: BLE001 - the parent process shows it
            found = {"failure": traceback.format_exc()[-1500:]}
        print(json.dumps({"name": name, "seconds": round(time.time() - start, 1), **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
