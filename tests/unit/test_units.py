"""Element-wise units and calls: value, slope and affineness, one network for each."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import interp
from interp.hooks.errors import ArgumentError, UnsupportedOpError
from interp.hooks.units import UNITS
from tests.nets import assert_checks, scope_of

Z = torch.tensor([[-7.0, -2.0, -0.7, -1e-3, 1e-3, 0.4, 1.0, 2.5, 6.5]], dtype=torch.float64)
PER_CHANNEL = torch.linspace(-0.3, 0.9, 9)
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
    "prelu": lambda z: F.prelu(z, PER_CHANNEL.to(z)), "tan": torch.tan, "sinh": torch.sinh, "arcsinh": torch.arcsinh,
    "expm1": torch.expm1, "special_expm1": torch.special.expm1,
}  # fmt: skip
# Functions that have no mode of their own under `frozen`, or that are defined on a part of the line only.
MAPPED = {
    "exp": torch.exp, "exp2": torch.exp2, "cos": torch.cos, "cosh": torch.cosh, "erfc": torch.erfc,
    "sinc": torch.sinc, "acos": lambda z: torch.acos(z / 8), "arccos": lambda z: torch.arccos(z / 8),
}  # fmt: skip
INSIDE = {
    "asin": lambda z: torch.asin(z / 8), "arcsin": lambda z: torch.arcsin(z / 8),
    "atanh": lambda z: torch.atanh(z / 8), "arctanh": lambda z: torch.arctanh(z / 8),
    "log1p": lambda z: torch.log1p(z / 8),
}  # fmt: skip
INFINITE = {
    "log": torch.log, "log2": torch.log2, "log10": torch.log10, "acosh": lambda z: torch.acosh(z + 2),
    "arccosh": lambda z: torch.arccosh(z + 2), "logit": lambda z: torch.logit(z / 8),
}  # fmt: skip


def test_every_unit_has_a_case():
    assert set(SPELLED) | set(MAPPED) | set(INSIDE) | set(INFINITE) == set(UNITS)


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


GAINS = [n for n in SPELLED if UNITS[n].gain is not None]
ABOVE = {"elu": 1.0, "celu": 1.0, "selu": float(F.selu(torch.ones((), dtype=torch.float64)))}


@pytest.mark.parametrize("name", GAINS)
def test_gain_is_value_over_input(name):
    dense = scope_of(SPELLED[name], Z, "frozen").dense()
    torch.testing.assert_close(dense, torch.diag((SPELLED[name](Z) / Z)[0]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", GAINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gain_at_zero_and_at_the_smallest_numbers_is_the_slope(name, dtype):
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(SPELLED[name](zero), zero)[0]
    below = {"elu": 0.7, "celu": 1.0, "selu": float(slope)}.get(name, float(slope))
    tiny = float(torch.finfo(dtype).smallest_normal) / 8
    z = torch.tensor([0.0, tiny, -tiny], dtype=dtype)
    gain = UNITS[name].gain(z, *{"elu": (0.7,), "celu": (0.7,)}.get(name, ()))
    above = ABOVE.get(name, float(slope))
    wanted = torch.tensor([above, above, below], dtype=dtype)
    torch.testing.assert_close(gain, wanted, rtol=1e-2, atol=1e-3)


def modes_of(name):
    fn = SPELLED[name]
    through_zero = bool((fn(torch.zeros_like(Z)) == 0).all())
    return ["tangent", "chord", "constant"] + (["gain"] if through_zero else [])


@pytest.mark.parametrize(("name", "mode"), [(n, m) for n in SPELLED for m in modes_of(n)])
def test_every_unit_in_every_mode_by_formula(name, mode):
    fn, z = SPELLED[name], Z.clone().requires_grad_()
    offset = fn(torch.zeros_like(Z))
    slope = {
        "tangent": torch.autograd.grad(fn(z).sum(), z)[0],
        "gain": fn(Z) / Z, "chord": (fn(Z) - offset) / Z, "constant": torch.zeros_like(Z),
    }[mode]  # fmt: skip
    # With the input added, so that an output whose unit is held still depends on it.
    scope = scope_of(lambda z: z + fn(z), Z, interp.Linearization(overrides={name: mode}))
    torch.testing.assert_close(scope.dense(), torch.diag(1 + slope[0]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(scope.r, fn(Z) - slope * Z, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["sigmoid", "special_expit", "softplus", "log_sigmoid", "hardsigmoid", "threshold"])
def test_a_gain_needs_a_function_through_zero(name):
    with pytest.raises(ArgumentError, match=f"{name}.*tangent or chord or constant"):
        scope_of(SPELLED[name], Z, interp.Linearization(overrides={name: "gain"}))


def test_hardtanh_has_a_gain_only_between_bounds_of_both_signs():
    saturated = torch.tensor([[-4.0, 0.5, 4.0]], dtype=torch.float64)
    dense = scope_of(F.hardtanh, saturated, interp.Linearization(overrides={"hardtanh": "gain"})).dense()
    torch.testing.assert_close(dense, torch.diag(torch.tensor([0.25, 1.0, 0.25], dtype=torch.float64)))
    with pytest.raises(ArgumentError, match="hardtanh"):
        scope_of(lambda z: F.hardtanh(z, 0.5, 2), Z, interp.Linearization(overrides={"hardtanh": "gain"}))


@pytest.mark.parametrize("name", MAPPED)
def test_a_function_with_an_offset_is_refused_unless_it_is_given_a_mode(name):
    with pytest.raises(UnsupportedOpError, match=f"{name}.*overrides"):
        scope_of(MAPPED[name], Z)
    fn = MAPPED[name]
    chord = scope_of(fn, Z, interp.Linearization("gain", overrides={name: "chord"}))
    offset = fn(torch.zeros_like(Z))
    torch.testing.assert_close(chord.dense() @ Z[0], (fn(Z) - offset)[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(chord.r, offset, rtol=1e-10, atol=1e-12)
    for scope in (chord, scope_of(fn, Z, "exact")):
        assert_checks(scope)


@pytest.mark.parametrize("name", INSIDE | INFINITE)
def test_functions_of_a_part_of_the_line(name):
    z = torch.tensor([[0.3, 0.9, 2.0, 6.0]], dtype=torch.float64)
    fn = (INSIDE | INFINITE)[name]
    exact = scope_of(fn, z, "exact")
    assert_checks(exact)
    probe = z.clone().requires_grad_()
    slope = torch.autograd.grad(fn(probe).sum(), probe)[0]
    torch.testing.assert_close(exact.dense(), torch.diag(slope[0]), rtol=1e-10, atol=1e-12)
    if name in INSIDE:
        assert_checks(scope_of(fn, z))
    elif name not in ("acosh", "arccosh"):
        with pytest.raises(UnsupportedOpError, match=f"{name}.*infinite"):
            scope_of(fn, z, interp.Linearization(overrides={name: "chord"}))


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "log_sigmoid", "exp", "cos", "cosh"])
def test_chords_lose_no_digits_near_zero(name):
    z = torch.tensor([0.0, 1e-300, 1e-9, -3e-6, 2e-3, -9.99e-3, 1.001e-2], dtype=torch.float64)
    series = {  # (f(z) - f(0))/z about 0
        "sigmoid": lambda u: 0.25 - u**2 / 48 + u**4 / 480, "softplus": lambda u: 0.5 + u / 8 - u**3 / 192,
        "log_sigmoid": lambda u: 0.5 - u / 8 + u**3 / 192, "cos": lambda u: -u / 2 + u**3 / 24 - u**5 / 720,
        "exp": lambda u: 1 + u / 2 + u**2 / 6 + u**3 / 24 + u**4 / 120 + u**5 / 720 + u**6 / 5040,
        "cosh": lambda u: u / 2 + u**3 / 24 + u**5 / 720,
    }  # fmt: skip
    torch.testing.assert_close(UNITS[name].chord(z), series[name](z), rtol=3e-12, atol=1e-15)
    assert torch.isfinite(UNITS["softplus"].chord(z, 3.0, 1e-3)).all()


def test_kinks_follow_the_calls_own_derivative():
    kinks = torch.tensor([[0.0, 6.0, -1.0, 1.0, 0.5]], dtype=torch.float64)
    for fn in (F.relu, lambda z: z.clamp(min=0), F.relu6, F.hardtanh, torch.abs, F.leaky_relu, F.hardshrink,
               lambda z: F.prelu(z, torch.full((1,), 0.3).to(z)), F.softshrink):  # fmt: skip
        z = kinks.clone().requires_grad_()
        slope = torch.autograd.grad(fn(z).sum(), z)[0]
        scope = scope_of(fn, kinks)
        torch.testing.assert_close(scope.dense(), torch.diag(slope[0]), rtol=0, atol=0)
        assert_checks(scope)
    relu, clamp = (scope_of(f, kinks).dense()[0, 0] for f in (F.relu, lambda z: z.clamp(min=0)))
    assert (relu, clamp) == (0, 1)


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
