"""Pull-back rules against autograd and formulas, in float64; the theorem on directions by Monte Carlo."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interp.hooks.block_weights import Projection
from interp.hooks.linearization import Linearization
from interp.hooks.weights import Norm
from interp.propagation.stages import MLP, pull_gain, pull_norm

WIDTH = 24


def norm(centred, *, width=WIDTH, eps=1e-2, offset=0.0, plain=False, dtype=torch.float64):
    module = nn.Module()
    if not plain:
        module.weight = nn.Parameter((0.3 * torch.randn(width) + 1 - offset).to(dtype))
        if centred:
            module.bias = nn.Parameter((0.3 * torch.randn(width)).to(dtype))
    return Norm("norm", module, centred, offset, eps)


def formula(n, x):
    """N(x), written out."""
    gain, bias = getattr(n.module, "weight", None), getattr(n.module, "bias", None)
    y = x - x.mean(-1, keepdim=True) if n.centred else x
    y = y / (y.pow(2).mean(-1, keepdim=True) + n.eps).sqrt()
    y = y if gain is None else y * (gain + n.offset)
    return y if bias is None else y + bias


def state(n, x):
    """(divisor, normalised input), written out."""
    y = x - x.mean(-1, keepdim=True) if n.centred else x
    r = (y.pow(2).mean(-1, keepdim=True) + n.eps).sqrt()
    return r, y / r


def relative(found, wanted):
    return float((found - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize(("offset", "dtype", "limit"), [
    (0.0, torch.float64, 1e-12), (1.0, torch.float64, 1e-12), (0.0, torch.float32, 1e-5),
])  # fmt: skip
def test_tangent_of_a_norm_is_autograd(centred, eps, offset, dtype, limit):
    n = norm(centred, eps=eps, offset=offset, dtype=dtype)
    x, y = torch.randn(5, WIDTH, dtype=dtype, requires_grad=True), torch.randn(5, WIDTH, dtype=dtype)
    value = (formula(n, x) * y).sum(-1)
    (wanted,) = torch.autograd.grad(value.sum(), x)
    found, offset_found = pull_norm(y, n, "tangent", *state(n, x.detach()))
    assert relative(found, wanted) <= limit
    assert relative((found * x).sum(-1) + offset_found, value) <= limit


@pytest.mark.parametrize("centred", [True, False])
def test_frozen_norm_is_autograd_with_the_divisor_detached(centred):
    n = norm(centred)
    x, y = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True), torch.randn(WIDTH, dtype=torch.float64)
    r, _ = state(n, x)
    centred_x = x - x.mean() if centred else x
    bias = getattr(n.module, "bias", torch.zeros(()))
    value = y @ (n.module.weight * centred_x / r.detach() + bias)
    (wanted,) = torch.autograd.grad(value, x)
    found, offset = pull_norm(y, n, "frozen", *state(n, x.detach()))
    assert relative(found, wanted) <= 1e-12
    assert float(found @ x + offset - value) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("centred", [True, False])
def test_the_jacobian_annihilates_its_input_but_for_eps(centred):
    """Check 2: J x = (N(x) - β) ε/r²; what makes exact gradients useless for attribution."""
    n, x = norm(centred), torch.randn(WIDTH, dtype=torch.float64)
    r, normalized = state(n, x)
    rows, _ = pull_norm(
        torch.eye(WIDTH, dtype=torch.float64), n, "tangent", r.expand(WIDTH, 1), normalized.expand(WIDTH, -1)
    )
    wanted = (formula(n, x) - getattr(n.module, "bias", 0.0)) * n.eps / r**2
    assert (rows @ x - wanted).abs().max() <= 1e-12
    assert wanted.abs().max() > 1e-4


@pytest.mark.parametrize("centred", [True, False])
def test_angle_and_ratio_between_frozen_and_tangent(centred):
    """Check 3: sin φ = |cos(P(γ ⊙ y), P x)|, norms in ratio cos φ."""
    n, x, y = norm(centred, eps=0.0), torch.randn(WIDTH).double(), torch.randn(WIDTH).double()
    frozen, _ = pull_norm(y, n, "frozen", *state(n, x))
    tangent, _ = pull_norm(y, n, "tangent", *state(n, x))
    p = (lambda v: v - v.mean()) if centred else (lambda v: v)
    aligned = p(n.module.weight.detach() * y)
    sine = float((aligned @ p(x)).abs() / (aligned.norm() * p(x).norm()))
    cosine = float(frozen @ tangent / (frozen.norm() * tangent.norm()))
    assert math.sqrt(1 - cosine**2) == pytest.approx(sine, abs=1e-10)
    assert float(tangent.norm() / frozen.norm()) == pytest.approx(cosine, abs=1e-10)


@pytest.mark.parametrize(("centred", "mean"), [(True, math.sqrt(math.pi / 2)), (False, math.sqrt(2 / math.pi))])
def test_direction_preservation(centred, mean):
    """Check 4: the angle between n and the gradient of n · N(x) is below the theorem's bound and near its limit."""
    d, pairs = 512, 6000
    n, x = torch.randn(pairs, d, dtype=torch.float64), torch.randn(pairs, d, dtype=torch.float64)
    plain = norm(centred, width=d, eps=0.0, plain=True)
    gradient, _ = pull_norm(n, plain, "tangent", *state(plain, x))
    angle = torch.acos((F.normalize(n, dim=-1) * F.normalize(gradient, dim=-1)).sum(-1).clamp(-1, 1)).mean()
    bound = 2 * math.acos(math.sqrt(1 - 1 / (d - 1))) / (1 if centred else 2)
    assert float(angle) < bound
    assert float(angle) == pytest.approx(mean / math.sqrt(d), rel=0.02)


def test_gain_alone_keeps_gain_and_centring():
    n, y = norm(True), torch.randn(3, WIDTH, dtype=torch.float64)
    found, offset = pull_gain(y, n)
    scaled = n.module.weight.detach() * y
    assert relative(found, scaled - scaled.mean(-1, keepdim=True)) <= 1e-14
    assert relative(offset, y @ n.module.bias.detach()) <= 1e-14
    same, nothing = pull_gain(y, None)
    assert torch.equal(same, y)
    assert not nothing.any()


# MLPs -----------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "gelu_pytorch_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu": F.relu,
    "silu": F.silu,
    "softplus": F.softplus,
}


def affine(out, inputs=WIDTH, dtype=torch.float64):
    return Projection(torch.randn(inputs, out, dtype=dtype) / inputs**0.5, 0.3 * torch.randn(out, dtype=dtype))


def mlp(function, gated, dtype=torch.float64):
    made = object.__new__(MLP)
    made.name, made.layer, made.function = "blocks.0.mlp", 0, function
    made.pre, made.down = affine(40, dtype=dtype), affine(WIDTH, 40, dtype)
    made.up = affine(40, dtype=dtype) if gated else None
    return made


def value_of(m, v):
    hidden = m.function(v @ m.pre.weight + m.pre.bias)
    hidden = hidden if m.up is None else hidden * (v @ m.up.weight + m.up.bias)
    return hidden @ m.down.weight + m.down.bias


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_tangent_of_an_mlp_is_autograd(name, gated, dtype, limit):
    m = mlp(ACTIVATIONS[name], gated, dtype)
    v, y = torch.randn(6, WIDTH, dtype=dtype, requires_grad=True), torch.randn(6, WIDTH, dtype=dtype)
    value = (value_of(m, v) * y).sum(-1)
    (wanted,) = torch.autograd.grad(value.sum(), v)
    found, post, offset = m.pull(y, Linearization.of("path"), v.detach())
    assert relative(found, wanted) <= limit
    assert relative((found * v).sum(-1) + offset, value) <= 10 * limit
    assert relative(post, y @ m.down.weight.T) <= limit


@pytest.mark.parametrize("product", ["tangent", "gate", "split"])
@pytest.mark.parametrize("activation", ["tangent", "gain"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_mode_gives_the_mlps_value_at_the_reference(name, gated, activation, product):
    """Check 6: y · MLP(v) = y_in · v + offset, with pre-activations of exactly zero among them."""
    m = mlp(ACTIVATIONS[name], gated)
    v, y = torch.randn(6, WIDTH, dtype=torch.float64), torch.randn(6, WIDTH, dtype=torch.float64)
    v[0] = 0
    m.pre.bias[:5] = 0
    found, _, offset = m.pull(y, Linearization(activation, "frozen", "frozen", product), v)
    wanted = (value_of(m, v) * y).sum(-1)
    assert relative((found * v).sum(-1) + offset, wanted) <= 1e-12


def test_gain_and_gate_by_their_formulas():
    y, v = torch.randn(WIDTH, dtype=torch.float64), torch.randn(WIDTH, dtype=torch.float64)
    held = Linearization.of("frozen")
    plain = mlp(F.silu, False)
    z, t = v @ plain.pre.weight + plain.pre.bias, plain.down.weight @ y
    found, _, offset = plain.pull(y, held, v)
    ratio = F.silu(z) / z
    assert relative(found, plain.pre.weight @ (ratio * t)) <= 1e-12
    assert float(offset) == pytest.approx(float(y @ plain.down.bias + (t * ratio) @ plain.pre.bias), rel=1e-10)
    gated = mlp(F.silu, True)
    a, t = F.silu(v @ gated.pre.weight + gated.pre.bias), gated.down.weight @ y
    found, _, offset = gated.pull(y, held, v)
    assert relative(found, gated.up.weight @ (a * t)) <= 1e-12
    assert float(offset) == pytest.approx(float(y @ gated.down.bias + (a * t) @ gated.up.bias), rel=1e-10)
    tangent, _, _ = gated.pull(y, Linearization.of("path"), v)
    assert float(F.cosine_similarity(found, tangent, dim=0)) < 0.99


def test_relu_modes_coincide():
    m, v, y = mlp(F.relu, False), torch.randn(4, WIDTH).double(), torch.randn(4, WIDTH).double()
    one, _, _ = m.pull(y, Linearization.of("path"), v)
    two, _, _ = m.pull(y, Linearization.of("frozen"), v)
    assert relative(one, two) <= 1e-13
