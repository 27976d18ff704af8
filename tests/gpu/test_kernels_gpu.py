"""Kernels on a GPU against einsum in float64, in each precision, and the engine that uses them against autograd."""

import pytest
import torch

import interp
from interp.jacobians.fused import fused_norms
from interp.jacobians.kernels import choice, device, rows, sandwich
from tests.cases import build, inputs_for
from tests.kernel_cases import SIZES, make, relative

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not device.has_triton(), reason="no triton"),
]

LIMITS = {"bfloat16": 1e-2, "float16": 1e-3, "tf32": 2e-3, "float32": 2e-6}
LARGE = {"large": (5, 576, 512, 1536), "ragged": (19, 700, 130, 1000)}


def arguments(precision):
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    return dtype, "tf32" if precision == "tf32" else "float32"


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("size", [*SIZES, *LARGE])
def test_sandwich(size, precision):
    dtype, products = arguments(precision)
    x, wanted = make(SIZES.get(size) or LARGE[size], dtype, device="cuda")
    for way in ("fused", "torch"):
        assert relative(sandwich.sandwich(x, precision=products, way=way), wanted) < LIMITS[precision]
    out = torch.full((len(x.p), x.shape[2], x.shape[1]), torch.nan, device="cuda").mT
    assert relative(sandwich.sandwich(x, out, products, "fused"), wanted) < LIMITS[precision]


@pytest.mark.parametrize("precision", LIMITS)
def test_each_tile(precision):
    from interp.jacobians.kernels import triton_sandwich

    dtype, products = arguments(precision)
    x, wanted = make(LARGE["ragged"], dtype, device="cuda")
    for tile in triton_sandwich.tiles_for(dtype, products == "tf32"):
        out = torch.full_like(wanted, torch.nan, dtype=torch.float32)
        triton_sandwich.store(x.aligned(), out, tile, products == "tf32")
        assert relative(out, wanted) < LIMITS[precision], tile


@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "float32"])
def test_reductions(precision):
    dtype, products = arguments(precision)
    x, wanted = make((9, 300, 300, 500), dtype, skip=True, device="cuda")
    v, limit = torch.randn(3, 300, device="cuda"), LIMITS[precision]
    left, right = (torch.einsum(how, v.double(), wanted) for how in ("ko,toi->tki", "ki,toi->tko"))
    assert relative(sandwich.sandwich_norms(x, products, "fused"), wanted.square().sum((1, 2))) < limit
    assert relative(sandwich.sandwich_left(x, v, products, "fused"), left) < limit
    assert relative(sandwich.sandwich_right(x, v, products, "fused"), right) < limit
    assert relative(sandwich.sandwich_sum(x, products, "fused"), wanted.sum(0)) < limit


def test_the_global_flag_for_tf32_has_no_say():
    x, wanted = make(LARGE["large"], device="cuda")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for way in ("fused", "torch"):
            assert relative(sandwich.sandwich(x, way=way), wanted) < LIMITS["float32"]
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [37, 4096])
def test_row_kernels(width, dtype):
    v = torch.randn(11, 5, width, device="cuda").to(dtype)
    n, r, gain = (torch.randn(*shape, device="cuda") for shape in ((5, width), (5, 1), (width,)))
    limit = 2e-6 if dtype == torch.float32 else 1e-2
    wide = lambda *tensors: [t.double() for t in tensors]
    for jvp in (rows.rms_jvp, rows.ln_jvp):
        for transposed in (False, True):
            found = jvp(v, n, r, gain, transposed=transposed, way="fused")
            assert relative(found, jvp(*wide(v, n, r, gain), transposed=transposed, way="torch")) < limit
    scores = torch.randn(5, width, device="cuda")
    scores[:, ::2] = -torch.inf
    pattern = scores.softmax(-1)
    masked = v.masked_fill(pattern == 0, torch.nan)
    wanted = rows.softmax_jvp(*wide(pattern, masked), "torch")
    assert relative(rows.softmax_jvp(pattern, masked, "fused"), wanted) < limit
    p, q = torch.randn(2, 5, width, device="cuda")
    assert relative(rows.gate_tangent(p, v, q, v, "fused"), rows.gate_tangent(*wide(p, v, q, v), "torch")) < limit


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("precision", [None, "tf32"])
def test_jacobians(name, precision):
    model, ids = interp.attach(build(name).cuda()), inputs_for(name)[:1].cuda()
    for ends in (("hook_resid_mid", "hook_mlp_out"), ("hook_resid_pre", "hook_resid_post")):
        ends = [f"blocks.0.{end}" for end in ends]
        wanted = interp.jacobian(model, ids, *ends, "same", method="autograd").dense().double()
        made = interp.jacobian(model, ids, *ends, "same", method="closed", precision=precision)
        assert relative(made.dense(), wanted) < (1e-2 if precision else 1e-5)
        norms = fused_norms(made)
        if norms is not None:
            assert relative(norms, wanted.flatten(1).norm(dim=1)) < (1e-2 if precision else 1e-5)


def test_the_plan_says_which_way_won():
    choice._KNOWN.clear()
    model, ids = interp.attach(build("llama").cuda()), inputs_for("llama")[:1].cuda()
    made = interp.jacobian(model, ids, "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out", "same")
    assert "in a trial" in str(made.plan)
    (won,) = choice._KNOWN.values()
    assert ("fused" in made.plan.method) == won.fused
