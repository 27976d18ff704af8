"""One batch, half precision and clean-up of a LinearScope, on tiny models."""

import pytest
import torch
from torch import nn

import interp
from interp.hooks.errors import ArgumentError, MetaWeightsError, MixedBatchError
from tests.cases import build, build_cnn, inputs_for
from tests.tiny.test_leave_no_trace import plain, snapshot

PICTURE = torch.linspace(0, 9, 108).sin().reshape(1, 3, 6, 6)


def scope_of(name, linearization="frozen", dtype=None, **options):
    module, x = build(name, dtype=dtype), inputs_for(name)[:1]
    x = x.to(dtype) if dtype is not None and x.is_floating_point() else x
    return interp.LinearScope(interp.attach(module), x, linearization, **options)


# One batch ---


@pytest.mark.parametrize(
    ("name", "linearization"),
    [(name, "frozen") for name in ("gpt2", "gpt-j", "gemma2", "phi3", "bert")] + [("vit", "exact"), ("llama", "path")],
)
def test_one_batch_gives_what_tape_and_model_give(name, linearization):
    scope = scope_of(name, linearization)
    made = torch.Generator().manual_seed(0)
    probes = {n: torch.randn(3, *b.value.shape[1:], generator=made) for n, b in scope.blocks.items()}
    y, out = scope.run_together(probes)
    size = float(max(out.abs().max(), scope.y.abs().max()))
    assert (y - scope.y).abs().max() <= 1e-5 * scope.y.abs().max()
    assert (out - scope.replay(probes)).abs().max() <= 1e-5 * size
    pushed = sum(b.map.matvec(probes[n]) for n, b in scope.blocks.items())
    assert (out - pushed - scope.r).abs().max() <= 1e-5 * size


def test_routing_by_tokens_mixes_the_batch_and_is_refused():
    scope = scope_of("mixtral")
    with pytest.raises(MixedBatchError, match=r"softmax\(\[28, 3\]\) in model.layers.0.mlp.gate"):
        scope.run_together(torch.zeros(2, 7, 32))
    to_attention = scope_of("mixtral", output="blocks.0.hook_resid_mid")
    probes = torch.randn(2, 7, 32)
    out = to_attention.run_together(probes).probes
    torch.testing.assert_close(out, to_attention.matvec(probes) + to_attention.r, rtol=1e-5, atol=1e-5)


def test_columns_at_a_position_of_a_site_in_every_chunk():
    scope = scope_of("llama", output="blocks.1.hook_resid_post@last")
    whole = scope.columns(range(40), chunk=40)
    assert (scope.columns(range(40), chunk=1) - whole).abs().max() <= 1e-6 * whole.abs().max()
    rows = scope.dense()[:, :40]
    torch.testing.assert_close(whole.flatten(1).T, rows, rtol=1e-5, atol=1e-6)


# Half precision ---


def checks(scope):
    return {row["check"].split(":")[0]: row for row in scope.check(probes=1)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mistral", "gpt2", "cnn"])
def test_half_models_are_computed_in_float32(name, dtype):
    if name == "cnn":
        scope = interp.LinearScope(interp.attach(build_cnn().to(dtype)), PICTURE.to(dtype))
    else:
        scope = scope_of(name, dtype=dtype)
    parameters = list(scope.model.module.parameters())
    assert {p.dtype for p in parameters} == {dtype} == {scope.y.dtype}
    assert {t.dtype for t in (scope.Fx, scope.r, scope.x, scope.rows([0]), scope.columns([0]))} == {torch.float32}
    found = checks(scope)
    assert all(row["holds"] for row in found.values()), found
    for strict in ("every unit is affine", "linearity", "adjoint"):
        assert found[strict]["tolerance"] < 2e-5, strict
    assert found["completeness"]["error"] > 1e-5, "the decisions and y have the model's own rounding"
    votes, report = scope.votes(3), scope.bias_report(3)
    assert votes.map.dtype == torch.float32
    assert votes.completeness_error < 2e-3
    assert report.completeness_error < 1e-5
    y = scope.run_together(torch.zeros_like(scope.x)).y
    assert (y - scope.y).abs().max() <= scope.worst_tolerance * scope.y.abs().max()


def test_decisions_of_a_half_model_are_its_own():
    """Near zero bfloat16 and float32 decide otherwise: the row must hold the bfloat16 decision."""
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU())
    net[0].weight.data = torch.tensor([[1.0, -1.0 - 2**-7]])
    x = torch.tensor([[1.0, 1.0]])
    half = interp.LinearScope(interp.attach(net.bfloat16()), x.bfloat16() * torch.tensor([1.0, 0.9921875]).bfloat16())
    product = float(half.y)
    assert half.dense().abs().max() == (1.0078125 if product else 0.0)
    entry = half.network.entries[0]
    assert entry.held[0].dtype == torch.float32
    assert float(entry.held[0]) == float(product > 0)


def test_a_half_row_is_the_hand_written_one():
    """A gated network: gate and gain from the bfloat16 run, everything else in float32."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 5)

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    net, x = Gated().bfloat16(), torch.linspace(-1, 1, 8)[None].bfloat16()
    scope = interp.LinearScope(interp.attach(net), x)
    z = net.gate(x)[0].detach()
    held = (torch.sigmoid(z) * z).float()  # the rule's own product in bfloat16
    wanted = net.down.weight.detach().float() @ (held[:, None] * net.up.weight.detach().float())
    torch.testing.assert_close(scope.dense(), wanted, rtol=1e-5, atol=1e-6)
    twice = interp.LinearScope(interp.attach(net), x, compute_dtype=torch.float64)
    torch.testing.assert_close(twice.dense(), wanted.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "cnn"])
def test_float32_models_are_computed_in_float64_when_asked(name):
    make = lambda **options: (
        interp.LinearScope(interp.attach(build_cnn()), PICTURE, **options)
        if name == "cnn"
        else scope_of(name, **options)
    )
    plain_scope, wide = make(), make(compute_dtype=torch.float64)
    assert {wide.Fx.dtype, wide.r.dtype, wide.rows([0]).dtype} == {torch.float64}
    assert torch.equal(wide.y, plain_scope.y)
    found = checks(wide)
    assert all(row["holds"] for row in found.values()), found
    assert found["adjoint"]["tolerance"] <= 1e-6
    if name == "cnn":
        assert found["linearity"]["error"] < 1e-13
    gap = (wide.rows([3]) - plain_scope.rows([3])).abs().max()
    assert 0 < gap <= 1e-5 * plain_scope.rows([3]).abs().max()
    assert wide.stability(3, samples=1).mean_cosine > 0.9


def test_dtypes_that_are_refused():
    with pytest.raises(ArgumentError, match="not narrower"):
        scope_of("llama", dtype=torch.float64, compute_dtype=torch.float32)
    with pytest.raises(ArgumentError, match="for a model in"):
        scope_of("llama", compute_dtype=torch.int64)
    net = build_cnn()
    model = interp.attach(net)
    from interp.hooks.precision import compute_dtype_of

    net.head.to("meta")
    with pytest.raises(MetaWeightsError, match="offloaded"):
        compute_dtype_of(model, torch.float32, torch.float64)
    assert compute_dtype_of(model, torch.bfloat16, None) == torch.bfloat16


# No trace ---


def together(scope):
    scope.run_together(scope.x)


def products(scope):
    scope.rows(range(4)), scope.columns(range(4)), scope.votes(3), scope.bias_report(3)


@pytest.mark.parametrize(
    ("name", "act", "dtype"),
    [
        ("gpt2", together, torch.float32), ("gpt2", products, torch.float32), ("llama", together, torch.bfloat16),
        ("llama", products, torch.bfloat16),
    ],
)  # fmt: skip
def test_nothing_is_left_while_scopes_live_and_after(name, act, dtype):
    module, x = build(name, dtype=dtype), inputs_for(name)[:1]
    module.requires_grad_(True)
    logits = plain(module, x).float()
    before = snapshot(module)
    one = interp.LinearScope(interp.attach(module), x)
    two = interp.LinearScope(interp.attach(module), x, "exact")
    alone = one.rows([5])
    act(one), act(two), act(one)
    assert torch.equal(one.rows([5]), alone), "another scope changes nothing"
    assert snapshot(module) == before
    assert torch.equal(plain(module, x).float(), logits)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_left_after_an_exception_in_the_middle(error, dtype):
    module, x = build("llama", dtype=dtype), inputs_for("llama")[:1]
    scope = interp.LinearScope(interp.attach(module), x)
    before, armed = snapshot(module), []

    def explode(m, args, out):
        if armed:
            raise error("on purpose")

    handle = module.model.layers[1].mlp.up_proj.register_forward_hook(explode)
    probes, armed = scope.x.clone(), [True]
    for call in (
        lambda: scope.run_together(probes),
        lambda: scope.matvec(probes),
        lambda: scope.replay({"hook_embed": probes}),
        lambda: scope.bias_report(3),
        lambda: interp.LinearScope(interp.attach(module), x),
    ):
        with pytest.raises(error, match="on purpose"):
            call()
    handle.remove()
    after = snapshot(module)
    assert {key for key in before if before[key] != after[key]} == set()
    armed.clear()
    torch.testing.assert_close(
        scope.run_together(probes).probes, scope.replay({"hook_embed": probes}), rtol=0.1, atol=0.1
    )


def test_nothing_is_left_after_a_mixture_is_refused():
    module, x = build("mixtral"), inputs_for("mixtral")[:1]
    scope = interp.LinearScope(interp.attach(module), x)
    before = snapshot(module)
    with pytest.raises(MixedBatchError):
        scope.run_together(scope.x)
    after = snapshot(module)
    assert {key for key in before if before[key] != after[key]} == set()
    assert all(row["holds"] for row in scope.check())
