"""Fused calls written out, calls that cannot be seen, and units of the user's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import interp
from interp.hooks.errors import ArgumentError, CompiledModelError, CompletenessError, UnsupportedOpError
from interp.hooks.rules import register_unit
from interp.hooks.tape import Tags
from interp.hooks.units import Unit
from tests.nets import Call, assert_checks, draw, scope_of


def attention_module(**options):
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, batch_first=True, **options).double().eval()


PLAIN, SPLIT = attention_module(), attention_module(kdim=4, vdim=4)
COMPOSITES = {
    "glu": (lambda x: F.glu(x, -1), (1, 6)),
    "normalize": (lambda x: F.normalize(x, dim=-1), (1, 6)),
    "local response norm": (lambda x: F.local_response_norm(x, 3), (1, 5, 4, 4)),
    "instance norm": (F.instance_norm, (1, 3, 4, 4)),
    "instance norm, running": (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (1, 3, 4, 4)),
    "multi-head attention": (Call(lambda x: PLAIN(x, x, x, need_weights=False)[0]), (1, 5, 8)),
    "causal multi-head attention": (
        Call(lambda x: PLAIN(x, x, x, attn_mask=torch.ones(5, 5).triu(1).bool())[0]), (1, 5, 8),
    ),
    "masked keys": (
        Call(lambda x: PLAIN(x, x, x, key_padding_mask=torch.tensor([[0, 0, 0, 1, 1]]).bool())[0]),
        (1, 5, 8),
    ),
    "separate projections": (
        Call(lambda x: SPLIT(x, x[..., :4], x[..., 4:])[0]), (1, 5, 8),
    ),
    "transformer layer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 5, 8)),
}  # fmt: skip


@pytest.mark.parametrize("linearization", ["frozen", "exact"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_fused_calls_are_written_out(name, linearization):
    fn, shape = COMPOSITES[name]
    x = draw(*shape)
    scope = scope_of(fn, x, linearization)
    assert_checks(scope)
    if linearization == "exact":
        module = scope.model.module
        with torch.no_grad():
            torch.testing.assert_close(scope.y, module(x))
        wanted = torch.autograd.functional.jacobian(module, x).reshape(scope.y.numel(), x.numel())
        torch.testing.assert_close(scope.dense(), wanted, rtol=1e-8, atol=1e-10)


def test_glu_by_formula_and_normalize_keeps_its_length():
    x = draw(1, 6)
    dense = scope_of(lambda x: F.glu(x, -1), x).dense()
    torch.testing.assert_close(dense[:, :3], torch.diag(torch.sigmoid(x[0, 3:])))
    assert dense[:, 3:].abs().max() == 0
    torch.testing.assert_close(scope_of(lambda x: F.normalize(x, dim=-1), x).dense(), torch.eye(6).double() / x.norm())


def test_scripted_functions_are_refused_where_they_run():
    @torch.jit.script
    def hidden(x):
        return torch.relu(x) * 2

    class Inner(nn.Module):
        def forward(self, x):
            return hidden(x)

    with pytest.raises(UnsupportedOpError, match="in 1 runs in scripted"):
        scope_of(nn.Sequential(nn.Linear(4, 4), Inner()), draw(1, 4))
    with pytest.raises(CompiledModelError):
        interp.attach(torch.jit.script(nn.Linear(2, 2)))


def test_custom_autograd_functions_are_refused():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g

    x = draw(1, 4)
    with pytest.raises(UnsupportedOpError, match=r"Double.apply\(\[1, 4\]\) in fn.*register_unit\(Double"):
        scope_of(Call(Call(lambda x: Double.apply(x))), x)
    forget = register_unit(Double, Unit(gain=lambda z: torch.full_like(z, 2)))
    try:
        scope = scope_of(lambda x: Double.apply(x), x)
        torch.testing.assert_close(scope.dense(), 2 * torch.eye(4).double())
        assert_checks(scope)
    finally:
        forget()
    assert "apply" in vars(torch.autograd.Function)
    assert torch.autograd.Function.apply.__func__.__module__ == "torch.autograd.function"


def test_recurrent_kernels_are_refused():
    with pytest.raises(UnsupportedOpError, match=r"lstm.*in fn"):
        scope_of(Call(nn.LSTM(4, 4, batch_first=True).double()), draw(1, 3, 4))


def test_a_unit_of_ones_own():
    x = draw(1, 4)
    with pytest.raises(UnsupportedOpError, match="special_i1"):
        scope_of(torch.special.i1, x)
    forget = register_unit(torch.special.i1, Unit(gain=lambda z: torch.special.i1(z) / z))
    try:
        scope = scope_of(torch.special.i1, x)
        torch.testing.assert_close(scope.dense(), torch.diag((torch.special.i1(x) / x)[0]))
        assert_checks(scope)
        assert_checks(scope_of(torch.special.i1, x, "exact"))
        with pytest.raises(ArgumentError, match="special_i1"):
            register_unit(torch.special.i1, Unit(piecewise_linear=True))
    finally:
        forget()
    with pytest.raises(UnsupportedOpError, match="special_i1"):
        scope_of(torch.special.i1, x)


def test_a_rule_of_ones_own_and_a_wrong_one_that_is_found():
    x = draw(1, 4)

    def honest(tape, call):
        gain = tape.decide(call, "gain", lambda: (torch.special.i0(call.args[0]) / call.args[0]).detach())
        return Tags.put(gain * call.args[0], {})

    def wrong(tape, call):
        return Tags.put(call.run(), {})

    for rule, holds in ((honest, True), (wrong, False)):
        forget = register_unit(torch.special.i0, rule)
        try:
            if holds:
                assert_checks(scope_of(torch.special.i0, x))
            else:
                with pytest.raises(CompletenessError, match=r"differs from the output.*special_i0.*is not affine"):
                    scope_of(torch.special.i0, x)
        finally:
            forget()


def test_a_rule_with_a_wrong_value_is_named_where_it_runs():
    net = torch.nn.Sequential(nn.Linear(4, 4), Call(torch.special.i1), nn.Linear(4, 2))
    forget = register_unit(torch.special.i1, Unit(gain=lambda z: 1.01 * torch.special.i1(z) / z))
    try:
        with pytest.raises(CompletenessError, match=r"rule of special_i1\(\[1, 4\]\) in 1 gives another value"):
            scope_of(net, draw(1, 4))
    finally:
        forget()


def test_check_has_a_row_for_the_units_that_finds_a_rule_that_is_not_affine():
    def leaky(tape, call):
        z = tape.decide(call, "gain", lambda: call.args[0].detach().clone())
        away = 0.0 if tape.homogeneous or not tape.replaying else 1e-3 * (call.args[0] - z) * call.args[0]
        return Tags.put(torch.special.i1(z) / z * call.args[0] + away, {})

    forget = register_unit(torch.special.i1, leaky)
    try:
        checks = scope_of(lambda x: 3 * torch.special.i1(x), draw(1, 4)).check()
    finally:
        forget()
    rows = [row for row in checks if "unit" in row["check"]]
    assert len(rows) == 1
    assert "special_i1" in rows[0]["check"]
    assert not rows[0]["holds"]
