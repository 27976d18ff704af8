"""A mode for each call: norms, attention, products, statistics and masks by formula; choices that change nothing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import interp
from interp.hooks.errors import ArgumentError, BilinearOpError, TrainModeError
from tests.nets import Call, assert_checks, draw, scope_of


def held(overrides, base="frozen"):
    return replace(interp.Linearization.of(base), overrides=overrides)


def jacobian(module, x):
    return torch.autograd.functional.jacobian(module, x).reshape(-1, x.numel())


def by_hand(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def by_moments(x):
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + 1e-5)


LAYER_NORMS = {
    "layer_norm": nn.LayerNorm(6), "group_norm": lambda x: F.group_norm(x, 1),
    "instance_norm": lambda x: F.instance_norm(x[:, None])[:, 0], "by hand": by_hand, "by moments": by_moments,
}  # fmt: skip


@pytest.mark.parametrize("base", ["frozen", "exact"])
@pytest.mark.parametrize("spelling", LAYER_NORMS)
def test_norms_by_formula_in_every_mode(spelling, base):
    net, x = nn.Sequential(Call(LAYER_NORMS[spelling])), draw(1, 6) + 0.5
    sigma = (x.var(correction=0) + 1e-5).sqrt()
    eye, mean = torch.eye(6).double(), torch.full((6, 6), 1 / 6).double()
    wanted = {"frozen": (eye - mean) / sigma, "frozen_stats": eye / sigma, "tangent": jacobian(Call(by_hand), x)}
    for mode, dense in wanted.items():
        scope = scope_of(net, x, held({"0.*" if spelling == "layer_norm" else "0": mode}, base))
        torch.testing.assert_close(scope.dense(), dense, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(scope.r, scope.y - x @ dense.T, rtol=1e-6, atol=1e-9)
        assert_checks(scope)
        assert scope.bias_report((0,)).completeness_error < 1e-12


def test_a_norm_without_a_mean_has_the_same_map_with_its_statistics_held():
    x = draw(1, 6)
    maps = [scope_of(nn.RMSNorm(6), x, held({"RMSNorm": mode})).dense() for mode in ("frozen", "frozen_stats")]
    assert torch.equal(*maps)


class Attention(nn.Module):
    def forward(self, x):
        return torch.softmax(x @ x.mT / 2, -1) @ x


ATTENTIONS = {
    "operator": Attention(), "fused": Call(lambda x: F.scaled_dot_product_attention(x, x, x)),
    "by hand": Call(lambda x: (e := torch.exp(x @ x.mT / 2)) / e.sum(-1, keepdim=True) @ x),
}  # fmt: skip


@pytest.mark.parametrize("spelling", ATTENTIONS)
def test_attention_by_formula_in_every_mode(spelling):
    x, eye = draw(1, 5, 4), torch.eye(4).double()
    pattern = torch.softmax(x @ x.mT / 2, -1)[0].detach()
    value = torch.kron(pattern, eye)
    through = jacobian(lambda z: torch.softmax(z @ z.mT / 2, -1) @ x, x)
    wanted = {"frozen": value, "tangent": value + through, "split": 0.5 * (value + through)}
    if spelling == "by hand":
        wanted = {"frozen": value}
    for mode, dense in wanted.items():
        for base in ("frozen", "exact"):
            overrides = {} if spelling == "by hand" else {"softmax": mode}
            scope = scope_of(ATTENTIONS[spelling], x, held(overrides, "frozen" if spelling == "by hand" else base))
            torch.testing.assert_close(scope.dense(), dense, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(scope.r.flatten(), scope.y.flatten() - dense @ x.flatten())
            assert_checks(scope)


def test_split_attention_of_a_module_with_a_causal_mask():
    part = nn.MultiheadAttention(8, 2, batch_first=True)
    mask = torch.ones(5, 5).triu(1).bool()
    net = Call(lambda x: part(x, x, x, attn_mask=mask)[0], part=part)
    for mode in ("split", "tangent"):
        scope = scope_of(net, draw(1, 5, 8), held({"MultiheadAttention": mode}))
        assert_checks(scope)
        later = scope.dense().reshape(5, 8, 5, 8)[0, :, 1:]
        assert later.abs().max() == 0, "causal"


@pytest.mark.parametrize("turned", [False, True])
def test_products_by_formula_in_every_mode(turned):
    x = draw(1, 6)
    a, b = x[0, :3], x[0, 3:]
    gate, other = torch.tanh(a), torch.diag(torch.tanh(a) / a * b)
    net = lambda x: x[:, 3:] * torch.tanh(x[:, :3]) if turned else torch.tanh(x[:, :3]) * x[:, 3:]
    for mode, share in {"gate": 1.0, "split": 0.5, "split:0.3": 0.3, "split:0": 0.0}.items():
        scope = scope_of(net, x, held({"mul": mode}))
        dense = torch.cat([(1 - share) * other, share * torch.diag(gate)], 1)
        torch.testing.assert_close(scope.dense(), dense, rtol=1e-11, atol=1e-13)
        assert_checks(scope)
        assert scope.units.to_records()[-1]["mode"] == mode
    torch.testing.assert_close(scope_of(net, x, held({"mul": "tangent", "tanh": "tangent"})).dense(),
                               jacobian(net, x))  # fmt: skip


def test_a_fused_call_answers_to_its_own_name():
    x = draw(1, 6)
    split = interp.Linearization("gain", "frozen", "frozen", "split")
    dense = scope_of(lambda x: F.glu(x, -1), x, split).dense()
    torch.testing.assert_close(scope_of(lambda x: F.glu(x, -1), x, held({"glu": "split"})).dense(), dense)


class FiLM(nn.Module):
    """Scale and shift predicted from the input, by layers without an activation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.shift = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.scale(x) * x + self.shift(x)


def test_a_predicted_scale_is_held_where_its_layer_is_named():
    net, x = FiLM().double(), draw(1, 4)
    with pytest.raises(BilinearOpError, match="overrides"):
        scope_of(net, x)
    scope = scope_of(net, x, held({"scale": "constant"}))
    wanted = torch.diag(net.scale(x)[0]) + net.shift.weight
    torch.testing.assert_close(scope.dense(), wanted.detach())
    assert_checks(scope)


class Noisy(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.4))


def test_statistics_and_mask_of_the_reference_are_held_and_nothing_else_changes():
    net, x = Noisy().double().train(), draw(1, 3, 5)
    model = interp.attach(net)
    with pytest.raises(TrainModeError, match="1, 3"):
        interp.LinearScope(model, x)
    with pytest.raises(TrainModeError, match=r"dropout\(\[1, 4, 5\]\) in 3.*one_mask"):
        interp.LinearScope(model, x, held({"1": "batch_stats"}))
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    scope = interp.LinearScope(model, x, held({"1": "batch_stats", "Dropout": "one_mask"}))
    assert_checks(scope)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    conv, norm = net[0].weight[:, :, 0], net[1]
    hidden = net[0](x)
    slope = norm.weight / (hidden.var((0, 2), correction=0) + norm.eps).sqrt()
    open_units = (scope.y != 0).double() / 0.6
    wanted = torch.einsum("ot,o,oi,ts->otis", open_units[0], slope, conv, torch.eye(5).double())
    torch.testing.assert_close(scope.dense(), wanted.reshape(20, 15).detach(), rtol=1e-10, atol=1e-12)
    assert 0 < (scope.y == 0).double().mean() < 1


def test_batch_norm_without_running_statistics():
    net, x = nn.BatchNorm1d(3, track_running_stats=False), draw(1, 3, 5)
    with pytest.raises(TrainModeError, match="batch statistics"):
        scope_of(net, x)
    scope = scope_of(net, x, held({"batch_norm": "batch_stats"}))
    wanted = 1 / (x.var((0, 2), correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(scope.dense(), torch.diag(wanted.repeat_interleave(5)))


def test_alpha_dropout_and_dropped_channels_keep_one_mask():
    for fn, name in ((lambda x: F.alpha_dropout(x, 0.4, True), "alpha_dropout"),
                     (lambda x: F.dropout2d(x, 0.4, True), "dropout2d")):  # fmt: skip
        assert_checks(scope_of(fn, draw(1, 6, 3, 3), held({name: "one_mask"})))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm = nn.Tanh(), nn.SiLU(), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.left(x) + self.right(x))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"middle": "tangent"}, "'middle'.*met none"),
        ({"relu": "tangent"}, "'relu'.*met none"),
        ({"left": "frozen"}, r"'left': 'frozen'.*tanh\(\[1, 4\]\) in left, which has tangent or gain"),
        ({"norm": "gain"}, r"'norm': 'gain'.*layer_norm.*tangent or frozen or frozen_stats"),
        ({"*": "tangent", "left": "gain"}, "'left'.*taken by an override before it"),
        ({"left": "one_mask"}, "'left': 'one_mask'"),
    ],
)
def test_an_override_that_changes_nothing_is_refused(overrides, text):
    with pytest.raises(ArgumentError, match=text):
        scope_of(Two(), draw(1, 4), held(overrides))


def test_the_first_override_that_a_call_can_take_decides():
    x = draw(1, 4)
    scope = scope_of(Two(), x, held({"l*": "chord", "n*": "frozen_stats", "SiLU": "constant"}))
    modes = {row["op"]: row["mode"] for row in scope.units.to_records()}
    assert modes == {"tanh": "chord", "silu": "constant", "layer_norm": "frozen_stats"}


@pytest.mark.parametrize("mode", ["split:2", "split:", "split:x", "split:-1", "gate:1", "mean"])
def test_modes_that_do_not_exist_are_refused(mode, unchecked):
    with pytest.raises(ArgumentError, match="one of"):
        interp.Linearization(overrides={"*": mode})
