"""Kernels: forms in torch against einsum here; those in Triton in its interpreter and its compiler, each in a process
of its own (`tests/kernel_cases.py`), since Triton reads TRITON_INTERPRET when it is imported.
"""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, MissingExtraError
from interp.jacobians.kernels import choice, device, rows, sandwich
from tests.cases import build, inputs_for
from tests.conftest import missing
from tests.kernel_cases import COMPILED, INTERPRETED, SIZES, make, relative

ROOT = Path(__file__).resolve().parents[2]
# What a program may have of shared memory on an H100.
MOST_SHARED = 227 * 1024


def told(which, folder, **environment):
    """What a process says of its cases, by name."""
    if not device.has_triton():
        missing("triton is not installed")
    added = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder), **environment}
    command = [sys.executable, "-m", "tests.kernel_cases", which]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | added, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return told("interpreted", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return told("compiled", tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="0")


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERPRETED)
def test_a_kernel_computes_what_its_formula_says(interpreted, name):
    assert "failure" not in interpreted[name], interpreted[name]["failure"]
    assert interpreted[name]["value"] < (1e-3 if "float16" in name else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_kernel_fits_an_h100(compiled, name):
    assert "failure" not in compiled[name], compiled[name]["failure"]
    found = compiled[name]["value"]
    assert found["spilled"] == 0
    assert found["shared"] <= MOST_SHARED
    if "bf16" in name or "tf32" in name:
        kind = "bf16" if "bf16" in name else "tf32"
        assert [product.split()[1] for product in found["products"]] == [kind]
        assert found["scaled in registers"]
        assert found["asynchronous copies"]


# in torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_the_form_in_torch_is_the_formula(size, dtype):
    x, wanted = make(size, dtype)
    limit = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert relative(sandwich.sandwich(x), wanted) < limit


@pytest.mark.parametrize("options", [{"gated": False}, {"normed": False}, {"skip": True}])
def test_terms_are_optional(options):
    x, wanted = make((9, 24, 24, 31), **options)
    v = torch.randn(3, 24)
    assert relative(sandwich.sandwich(x), wanted) < 1e-6
    assert relative(sandwich.sandwich_sum(x), wanted.sum(0)) < 1e-6
    assert relative(sandwich.sandwich_norms(x), wanted.square().sum((1, 2))) < 1e-6
    assert relative(sandwich.sandwich_left(x, v), torch.einsum("ko,toi->tki", v.double(), wanted)) < 1e-6
    assert relative(sandwich.sandwich_right(x, v), torch.einsum("ki,toi->tko", v.double(), wanted)) < 1e-6


def test_groups_and_strides_change_nothing(monkeypatch):
    x, wanted = make("17x33x1")
    whole = sandwich.sandwich(x)
    monkeypatch.setattr(sandwich, "_GROUP_BYTES", 1)
    assert sandwich.group_size(x) == 1
    out = torch.full((11, 66, 17), torch.nan)[:, ::2]
    assert sandwich.sandwich(x, out) is out
    torch.testing.assert_close(out, whole)
    assert relative(out, wanted) < 1e-6


def test_masked_entries_of_a_softmax_count_as_zero():
    pattern = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]])
    v = torch.tensor([[[1.0, 2.0, torch.nan], [3.0, torch.nan, torch.inf]]])
    moved = 0.25 * 0.75
    torch.testing.assert_close(rows.softmax_jvp(pattern, v), torch.tensor([[[-moved, moved, 0], [0.0, 0, 0]]]))


@pytest.mark.parametrize("centred", [True, False])
def test_a_norm_pulled_is_the_transpose_of_one_pushed(centred):
    jvp = rows.ln_jvp if centred else rows.rms_jvp
    x, gain = torch.randn(1, 7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    forward = lambda x: (lambda c: c / c.square().mean(-1, keepdim=True).sqrt())(x - x.mean() if centred else x)
    wanted = torch.autograd.functional.jacobian(lambda x: forward(x) * gain, x)[0, :, 0]
    r = (x - x.mean() if centred else x).square().mean(-1, keepdim=True).sqrt()
    eye = torch.eye(7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(jvp(eye, forward(x), r, gain)[:, 0].T, wanted)
    torch.testing.assert_close(jvp(eye, forward(x), r, gain, transposed=True)[:, 0], wanted)


# choice


def test_the_fastest_way_is_timed_once(monkeypatch):
    times = {"kernel": 1.0, "other": 3.0, "torch": 2.0}
    tried = []
    monkeypatch.setattr(choice, "_KNOWN", {})
    monkeypatch.setattr(choice, "_seconds", lambda call: tried.append(call()) or times[tried[-1]])
    candidates = lambda: {"128 x 256": lambda: "kernel", "64 x 64": lambda: "other", None: lambda: "torch"}
    first = choice.choose(("size",), candidates)
    assert choice.choose(("size",), candidates) is first
    assert tried == ["kernel", "other", "torch"]
    assert first.fused
    assert "fused kernel: in a trial 1e+03 ms fused (128 x 256), 2e+03 ms in torch" in str(first)
    times["torch"] = 0.5
    assert not choice.choose(("another size",), candidates).fused


def test_nothing_is_tried_on_a_cpu(monkeypatch):
    monkeypatch.setattr(choice, "_seconds", lambda call: pytest.fail("a trial on a CPU"))
    model, ids = interp.attach(build("llama")), inputs_for("llama")[:1]
    made = interp.jacobian(model, ids, "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out", "same")
    assert made.plan.method == "closed forms, block by block"
    assert made.plan.notes == []
    made.dense()


# refusals


def test_a_kernel_without_triton_says_what_to_install(monkeypatch, unchecked):
    monkeypatch.setattr(device, "has_triton", lambda: False)
    x, wanted = make("17x33x1")
    with pytest.raises(MissingExtraError, match=r"interp\[kernels\]"):
        sandwich.sandwich(x, way="fused")
    with pytest.raises(MissingExtraError, match=r"way='torch'"):
        rows.gate_tangent(torch.ones(2), torch.ones(1, 2), way="fused")
    assert relative(sandwich.sandwich(x), wanted) < 1e-6


def test_a_kernel_on_a_cpu_is_refused():
    if not device.has_triton():
        missing("triton is not installed")
    with pytest.raises(ArgumentError, match="a fused kernel on cpu"):
        sandwich.sandwich(make("17x33x1")[0], way="fused")


def test_bad_arguments_are_refused(unchecked):
    x, _ = make("17x33x1")
    with pytest.raises(ArgumentError, match="way='quick'"):
        sandwich.sandwich(x, way="quick")
    with pytest.raises(ArgumentError, match="precision='bf16'"):
        sandwich.sandwich(x, precision="bf16")
    with pytest.raises(ArgumentError, match=r"out \[11, 17, 33\]"):
        sandwich.sandwich(x, torch.empty(11, 17, 33))
    with pytest.raises(ArgumentError, match="up alone"):
        sandwich.Sandwich(x.out, x.pre, x.p, up=x.up)
    with pytest.raises(ArgumentError, match="the identity on 17 inputs and 33 outputs"):
        sandwich.Sandwich(x.out, x.pre, x.p, skip=True)


def test_interp_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\nimport interp; interp.jacobian\n"
        "from interp.jacobians.kernels import device, rows, sandwich"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [rows, sandwich])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed
