"""What a LinearScope gives beyond votes: constants by origin, outputs at sites, token blocks, stability."""

import pytest
import torch
from torch import nn

import interp
from interp.hooks.errors import ArgumentError, SizeError
from tests.cases import CASES, build, build_cnn, inputs_for


def scope_of(name, linearization="frozen", **options):
    return interp.LinearScope(interp.attach(build(name)), inputs_for(name)[:1], linearization, **options)


# Constants ---


@pytest.mark.parametrize("linearization", ["frozen", "exact"])
@pytest.mark.parametrize("name", CASES)
def test_constants_sum_to_the_residual(name, linearization):
    scope = scope_of(name, linearization)
    report = scope.bias_report(3)
    assert report.completeness_error < 1e-5
    assert report.residual == pytest.approx(scope.votes(3).residual, rel=1e-4, abs=1e-5)
    assert sum(r["value"] for r in report.by_module()) == pytest.approx(report.total, rel=1e-6, abs=1e-7)
    assert sum(float(m.sum()) for m in report.maps) == pytest.approx(report.total, rel=1e-3, abs=1e-4)


def test_masks_of_minus_infinity_add_nothing():
    """Fused attention adds -inf where eager attention adds the lowest number; both constants have no influence."""
    module = build("llama")
    reports = []
    for attention in ("eager", "sdpa"):
        module.set_attn_implementation(attention)
        scope = interp.LinearScope(interp.attach(module), inputs_for("llama")[:1], "exact")
        assert all(row["holds"] for row in scope.check())
        reports.append(scope.bias_report(3))
    assert reports[1].total == pytest.approx(reports[0].total, rel=1e-6)
    assert reports[1].completeness_error < 1e-6


def test_constants_of_a_cnn_by_hand():
    """conv -> batch norm -> ReLU -> skip: each constant's share by the gradient of the real network at it."""
    net, x = build_cnn().double(), torch.linspace(0, 9, 108).sin().reshape(1, 3, 6, 6).double()
    scope = interp.LinearScope(interp.attach(net), x)
    shares = {r["module"]: r["value"] for r in scope.bias_report(2).by_module()}
    assert set(shares) == {"conv", "norm", "skip", "head"}
    assert shares["head"] == pytest.approx(float(net.head.bias[2]))
    wanted = {}
    for path in ("conv", "skip"):
        layer = getattr(net, path)
        wanted[path] = float(torch.autograd.grad(net(x)[0, 2], layer.bias)[0] @ layer.bias)
    norm = net.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - scale * norm.running_mean
    wanted["norm"] = float(torch.autograd.grad(net(x)[0, 2], norm.bias)[0] @ shift)
    for path, value in wanted.items():
        assert shares[path] == pytest.approx(value, rel=1e-9), path


def test_constants_for_a_margin_and_a_network_without_any():
    assert scope_of("mistral").bias_report(3, margin_to=5).total == 0
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU())
    report = interp.LinearScope(interp.attach(net), torch.ones(1, 4)).bias_report(1)
    assert (report.total, len(report.to_records())) == (0, 0)


def test_another_origin_is_one_more_term():
    net, x = build_cnn(), torch.randn(1, 3, 6, 6)
    plain = interp.LinearScope(interp.attach(net), x)
    moved = interp.LinearScope(interp.attach(net), x, origin=torch.full((3, 6, 6), 0.3))
    report = moved.bias_report(2)
    assert report.residual == pytest.approx(moved.votes(2).residual, rel=1e-5)
    assert report.modules[-1] == "(origin of the input space)"
    assert report.values[-1] == pytest.approx(float(plain.rows([2])[0].sum() * 0.3), rel=1e-4)
    assert len(report.values) == len(plain.bias_report(2).values) + 1


# Outputs at sites ---


def test_output_at_a_site_is_the_map_to_that_site():
    model, ids = interp.attach(build("llama")), inputs_for("llama")[:1]
    scope = interp.LinearScope(model, ids, output="blocks.1.hook_resid_post")
    wanted = model.capture(ids, "blocks.1.hook_resid_post")["blocks.1.hook_resid_post"]
    assert torch.equal(scope.y, wanted)
    for row in scope.check():
        assert row["holds"], row
    last = interp.LinearScope(model, ids, output="blocks.1.hook_resid_post@last")
    assert last.out_shape == (1, wanted.shape[-1])
    torch.testing.assert_close(last.rows([(0, 5)]), scope.rows([(6, 5)]))
    head = interp.LinearScope(model, ids, output="blocks.1.attn.hook_z#2")
    assert head.out_shape == (7, 1, 8)
    with pytest.raises(ArgumentError, match="selects 3 sites"):
        interp.LinearScope(model, ids, output="blocks.*.hook_resid_post")


def test_output_at_a_module_of_a_cnn():
    net, x = build_cnn(), torch.randn(1, 3, 6, 6)
    scope = interp.LinearScope(interp.attach(net), x, output="skip")
    assert scope.out_shape == (6, 6, 6)
    assert all(row["holds"] for row in scope.check())


def test_the_next_stream_is_a_linear_map_of_the_former_with_eigenvectors():
    scope = interp.LinearScope(interp.attach(build("llama")), torch.tensor([[3]]), output="blocks.2.hook_resid_post")
    found = scope.eig(3)
    wanted = torch.linalg.eigvals(scope.dense().double())
    wanted = wanted[wanted.abs().argsort(descending=True)][:3]
    torch.testing.assert_close(found.values.abs(), wanted.abs(), rtol=1e-3, atol=1e-4)


# Token blocks ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_exact_blocks_are_those_of_the_dense_map(name):
    scope = scope_of(name, output="blocks.1.hook_resid_post")
    length, width = scope.out_shape
    dense = scope.dense().reshape(length, width, length, width)
    wanted = dense.double().pow(2).sum((1, 3)).sqrt()
    found = scope.token_blocks()
    torch.testing.assert_close(found.norms, wanted, rtol=1e-5, atol=1e-6)
    if name != "bert":
        assert found.norms.triu(1).abs().max() == 0, "a later token moves nothing earlier"
    some = scope.token_blocks([2, -1])
    assert some.positions == [2, length - 1]
    torch.testing.assert_close(some.norms, found.norms[[2, length - 1]], rtol=1e-6, atol=1e-7)


def test_estimated_blocks_agree_within_their_errors():
    scope = scope_of("llama", output="blocks.1.hook_resid_post")
    exact, found = scope.token_blocks(), scope.token_blocks(probes=256)
    lower = torch.ones(7, 7).tril().bool()
    distance = ((found.norms - exact.norms) / found.standard_errors)[lower]
    assert distance.abs().max() < 5
    assert found.standard_errors[lower].mean() < 0.1 * exact.norms[lower].mean()
    assert found.norms.triu(1).abs().max() == 0


def test_blocks_refuse_what_they_cannot_do(monkeypatch):
    import interp.hooks.token_blocks as token_blocks

    with pytest.raises(ArgumentError, match="token positions on both sides"):
        interp.LinearScope(interp.attach(nn.Linear(4, 4)), torch.ones(1, 4)).token_blocks()
    with pytest.raises(ArgumentError, match="at least 2"):
        scope_of("llama").token_blocks(probes=1)
    monkeypatch.setattr(token_blocks, "MOST_ROWS", 100)
    with pytest.raises(SizeError, match=r"427 rows.*probes=128"):
        scope_of("llama").token_blocks()


# Stability ---


def test_stability_of_a_piecewise_linear_network():
    net, x = build_cnn(), torch.randn(1, 3, 6, 6)
    scope = interp.LinearScope(interp.attach(net), x)
    calm, rough = scope.stability(2, noise=1e-6), scope.stability(2, noise=1.0, samples=6)
    assert calm.mean_flips == 0
    assert calm.mean_cosine == pytest.approx(1, abs=1e-6)
    assert rough.mean_flips > 0.01
    assert rough.mean_cosine < 0.999
    assert torch.equal(rough.cosines, scope.stability(2, noise=1.0, samples=6).cosines), "the seed decides"


def test_stability_in_float64():
    scope = interp.LinearScope(interp.attach(build_cnn()), torch.randn(1, 3, 6, 6))
    found = scope.stability(2, float64=True)
    assert found.float64_cosine == pytest.approx(1, abs=1e-6)
    assert found.float64_flips == 0
    assert len(found.table()) == 2
    words = scope_of("llama", "path").stability(3, float64=True, noise=1e-3)
    assert words.float64_cosine == pytest.approx(1, abs=1e-5)
    assert words.mean_cosine > 0.9
    with pytest.raises(ArgumentError, match="all positive"):
        scope.stability(2, noise=0.0)


def test_flips_count_the_units_that_changed():
    net = nn.Sequential(nn.ReLU(), nn.Flatten())
    x = torch.tensor([[1.0, -1.0, 1e-4, 5.0]])
    scope = interp.LinearScope(interp.attach(net), x)
    other = interp.LinearScope(interp.attach(net), torch.tensor([[1.0, -1.0, -1e-4, 5.0]]))
    from interp.hooks.stability import flipped

    assert flipped(scope.network.entries, other.network.entries) == 0.25
