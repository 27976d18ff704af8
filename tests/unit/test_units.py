"""Element-wise units and calls: value, slope and affineness, one network for each."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import interp
from interp.hooks.errors import ArgumentError
from interp.hooks.units import UNITS
from tests.nets import assert_checks, scope_of

Z = torch.tensor([[-7.0, -2.0, -0.7, -1e-3, 1e-3, 0.4, 1.0, 2.5, 6.5]], dtype=torch.float64)
SPELLED = {
    "relu": F.relu, "relu6": F.relu6, "hardtanh": F.hardtanh, "leaky_relu": lambda z: F.leaky_relu(z, 0.1),
    "abs": torch.abs, "clamp": lambda z: z.clamp(-1, 2), "threshold": lambda z: F.threshold(z, 0.1, 0.3),
    "hardshrink": F.hardshrink, "softshrink": F.softshrink, "hardsigmoid": F.hardsigmoid, "silu": F.silu,
    "gelu": F.gelu, "mish": F.mish, "hardswish": F.hardswish, "softsign": F.softsign, "tanh": torch.tanh,
    "elu": lambda z: F.elu(z, 0.7), "celu": lambda z: F.celu(z, 0.7), "selu": F.selu, "tanhshrink": F.tanhshrink,
    "log_sigmoid": F.logsigmoid, "erf": torch.erf, "sin": torch.sin, "asinh": torch.asinh, "arctan": torch.arctan,
    "atan": torch.atan, "sigmoid": torch.sigmoid, "special_expit": torch.special.expit, "softplus": F.softplus,
    "rrelu": F.rrelu, "absolute": torch.absolute, "clip": lambda z: z.clip(-1, 2),
    "clamp_min": lambda z: z.clamp_min(-1), "clamp_max": lambda z: z.clamp_max(1),
}  # fmt: skip


def test_every_unit_has_a_case():
    assert set(SPELLED) == set(UNITS)


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("linearization", ["frozen", "exact"])
def test_unit_is_affine_and_complete(name, linearization):
    scope = scope_of(SPELLED[name], Z, linearization)
    assert torch.equal(scope.y, SPELLED[name](Z))
    assert_checks(scope)


@pytest.mark.parametrize("name", SPELLED)
def test_tangent_slope_is_autograd(name):
    z = Z.clone().requires_grad_()
    slope = torch.autograd.grad(SPELLED[name](z).sum(), z)[0][0]
    dense = scope_of(SPELLED[name], Z, "exact").dense()
    torch.testing.assert_close(dense, torch.diag(slope), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [n for n, u in UNITS.items() if u.gain is not None])
def test_gain_is_value_over_input(name):
    dense = scope_of(SPELLED[name], Z, "frozen").dense()
    torch.testing.assert_close(dense, torch.diag((SPELLED[name](Z) / Z)[0]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, u in UNITS.items() if u.gain is not None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gain_at_zero_is_the_slope(name, dtype):
    zero = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    slope = torch.autograd.grad(SPELLED[name](zero).sum(), zero)[0]
    gain = UNITS[name].gain
    given = {"elu": (0.7,), "celu": (0.7,)}.get(name, ())
    torch.testing.assert_close(gain(zero.detach(), *given), slope, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("pattern", ["left", "Tanh", "tanh", "l*"])
def test_overrides_choose_the_mode_by_path_type_and_call(pattern):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Tanh(), nn.SiLU()

        def forward(self, x):
            return self.left(x) + self.right(x)

    x = Z[:, 5:]
    z = x[0].clone().requires_grad_()
    slope = torch.autograd.grad(torch.tanh(z).sum(), z)[0]
    gains = {"tangent": slope, "gain": torch.tanh(x[0]) / x[0], "constant": torch.zeros_like(x[0])}
    for mode, wanted in gains.items():
        scope = scope_of(Two(), x, interp.Linearization("gain", overrides={pattern: mode}))
        torch.testing.assert_close(scope.dense(), torch.diag(wanted + torch.sigmoid(x[0])), rtol=1e-12, atol=1e-14)
        assert_checks(scope)


def test_linearization_refuses_what_does_not_exist(unchecked):
    with pytest.raises(ArgumentError, match="one of exact, frozen, path"):
        interp.Linearization.of("frozne")
    with pytest.raises(ArgumentError, match="norm='none'"):
        interp.Linearization(norm="none")
    with pytest.raises(ArgumentError, match="override"):
        interp.Linearization(overrides={"*": "gains"})


RELUS = {
    "module": nn.ReLU(), "functional": F.relu, "torch": torch.relu, "method": lambda x: x.relu(),
    "in place": lambda x: x.relu_(), "in-place module": nn.ReLU(inplace=True), "clamp": lambda x: x.clamp(min=0),
    "times its mask": lambda x: x * (x > 0), "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "masked fill": lambda x: x.masked_fill(x < 0, 0.0),
}  # fmt: skip


class Spelled(nn.Module):
    def __init__(self, act):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)
        self.act = act

    def forward(self, x):
        return self.two(self.act(self.act(self.one(x)) - 0.3))


@pytest.mark.parametrize("spelling", RELUS)
def test_relu_in_every_spelling_gives_the_same_map(spelling):
    x = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = torch.func.jacrev(Spelled(F.relu).double())(x)[0, :, 0]
    scope = scope_of(Spelled(RELUS[spelling]), x)
    torch.testing.assert_close(scope.dense(), wanted, rtol=1e-12, atol=1e-14)
    assert_checks(scope)


SILUS = {
    "module": nn.SiLU(), "functional": F.silu, "product": lambda x: x * torch.sigmoid(x),
    "product, turned": lambda x: torch.sigmoid(x) * x, "in place": lambda x: F.silu(x, inplace=True),
    "quotient": lambda x: x / (1 + torch.sigmoid(-x) / torch.sigmoid(x)),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SILUS)
def test_silu_in_every_spelling_gives_the_same_gain(spelling):
    x = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scope = scope_of(Spelled(SILUS[spelling]), x)
    torch.testing.assert_close(scope.dense(), scope_of(Spelled(F.silu), x).dense(), rtol=1e-10, atol=1e-12)
    assert_checks(scope)


def test_gelu_by_hand_is_gelu():
    from transformers.activations import NewGELUActivation

    x = torch.randn(1, 5, dtype=torch.float64)
    tanh = scope_of(Spelled(lambda z: F.gelu(z, approximate="tanh")), x)
    by_hand = scope_of(Spelled(NewGELUActivation()), x)
    torch.testing.assert_close(by_hand.dense(), tanh.dense(), rtol=1e-10, atol=1e-12)
    assert_checks(by_hand)
