"""Fifteen claims about a LinearScope. Each is one check, and beside it one thing broken that the check must notice.

A claim is a function without arguments that asserts; what is broken is a rule, a part of the engine or the network.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interp.hooks import frozen, rules, spectra, unit_rules
from interp.hooks.attach import attach
from interp.hooks.calls import is_live
from interp.hooks.errors import (
    BilinearOpError,
    ControlFlowError,
    InputError,
    InterpError,
    TrainModeError,
    UnsupportedOpError,
)
from interp.hooks.frozen import FrozenNetwork
from interp.hooks.linear_scope import LinearScope
from interp.hooks.linearization import Linearization
from interp.hooks.tape import Tape
from tests.nets import Call, draw, scope_of

EXACT64 = 1e-12


class Net(nn.Module):
    """Convolution, batch norm, ReLU6 (some units capped), convolution, leaky ReLU, mean, head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.one, self.bn, self.two = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)
        self.head = nn.Linear(4, 3)
        self.bn.running_mean.uniform_(-1, 1), self.bn.running_var.uniform_(0.05, 0.1)
        nn.init.uniform_(self.bn.bias, -1, 1)

    def forward(self, x):
        x = F.relu6(self.bn(self.one(x)))
        return self.head(F.leaky_relu(self.two(x), 0.2).mean((2, 3)))


def without_biases(activation=F.relu, bias=False):
    torch.manual_seed(6)
    one, two = nn.Linear(6, 12, bias=bias), nn.Linear(12, 3, bias=bias)
    return Call(lambda x: two(activation(one(x))), one=one, two=two).double()


def scope(dtype=torch.float64, **options):
    return scope_of(Net(), 2 * draw(1, 2, 7, 7).to(dtype), **options)


def close(a, b, tolerance=EXACT64, scale=None):
    size = float(b.detach().abs().max()) if scale is None else scale
    assert float((a - b).detach().abs().max()) <= tolerance * max(size, 1e-30)


# The claims ---


def reference_is_untouched():
    for dtype in (torch.float32, torch.float64):
        net, x = Net().to(dtype).eval(), draw(1, 2, 7, 7).to(dtype)
        before = net(x)
        found = scope_of(net, x)
        assert torch.equal(found.y, before), "the network's own output"
        assert torch.equal(found.network.output, before), "and that of its recording"
        assert torch.equal(net(x), before)


def complete_for_all_outputs():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, EXACT64)):
        found = scope(dtype)
        close(found.Fx + found.r, found.y, tolerance)
        for k in range(3):
            votes, biases = found.votes(k), found.bias_report(k)
            terms = votes.abs_total + float(biases.values.abs().sum())
            gap = abs(float(votes.map.double().sum()) + votes.residual - votes.value)
            assert gap <= 100 * torch.finfo(dtype).eps * terms


def residual_in_three_ways():
    found = scope()
    for k in range(3):
        report = found.bias_report(k)
        terms = float(report.values.abs().sum())
        zero = found.replay({"input": torch.zeros_like(found.x)})[0, k]
        rest = found.y[0, k] - (found.rows([k])[0] * found.x[0]).sum()
        for value in (float(zero), float(rest), report.total):
            assert abs(value - float(found.r[0, k])) <= EXACT64 * terms


def linear_far_from_the_reference():
    for net in (without_biases(), Net().double()):
        x = draw(1, *((6,) if isinstance(net, Call) else (2, 7, 7)))
        found = scope_of(net, x)
        for size in (10.0, 1e-3):
            a, b = size * draw(*x.shape, seed=1), size * draw(*x.shape, seed=2)
            shifted = [found.replay({"input": v}) - found.r for v in (a, b, a + b, -3 * a)]
            scale = float(torch.cat(shifted).abs().max()) + float(found.r.abs().max())
            close(shifted[2], shifted[0] + shifted[1], EXACT64, scale)
            close(shifted[3], -3 * shifted[0], EXACT64, scale)
            close(shifted[0][0], found.matvec(a[0]), EXACT64, scale)
        assert not found.matvec(torch.zeros_like(x[0])).any()


def push_and_pull_are_adjoint():
    found = scope()
    for seed in range(3):
        v, w = draw(*found.in_shape, seed=seed), draw(*found.out_shape, seed=seed + 9)
        pushed = found.matvec(v)
        gap = float((pushed * w).sum() - (v * found.rmatvec(w)).sum())
        assert abs(gap) <= EXACT64 * float(pushed.norm() * w.norm())


def tangents_are_the_jacobian_and_gains_are_not():
    net, x = Net().double().eval(), 2 * draw(1, 2, 7, 7)
    wanted = torch.autograd.functional.jacobian(net, x).reshape(3, -1)
    close(scope_of(net, x, "exact").dense(), wanted)
    smooth, x = without_biases(F.silu), draw(1, 6)
    wanted = torch.func.jacrev(smooth)(x)[0, :, 0]
    exact, gain = scope_of(smooth, x, "exact"), scope_of(smooth, x, "frozen")
    close(exact.dense(), wanted)
    assert exact.r.abs().max() > 1e-3 * exact.y.abs().max(), "a tangent does not go through the origin"
    assert (gain.dense() - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert not gain.r.any()
    close(gain.Fx, gain.y)


def columns_and_rows_are_of_one_matrix():
    found = scope()
    rows = found.rows(range(3)).reshape(3, -1)
    columns = found.columns(range(rows.shape[1]), chunk=16).reshape(-1, 3).T
    close(columns, rows)


HOMOGENEOUS = {"build": lambda: without_biases()}


def homogeneous_without_biases():
    net, x = HOMOGENEOUS["build"](), draw(1, 6)
    found, scaled = scope_of(net, x), scope_of(net, 7 * x)
    assert not found.r.any()
    close(scaled.dense(), found.dense())
    point = x.clone().requires_grad_()
    gradient = torch.autograd.grad(net(point)[0, 1], point)[0]
    assert abs(float((gradient * x).sum() - found.y[0, 1])) <= EXACT64 * float((gradient * x).abs().sum())


def one_function_in_any_spelling():
    x = draw(1, 6)
    spellings = [
        F.relu, torch.relu, lambda v: v.relu(), lambda v: v.clone().relu_(), lambda v: v.clamp(min=0),
        lambda v: torch.clamp_min(v, 0), lambda v: F.threshold(v, 0.0, 0.0), nn.ReLU(inplace=True),
        lambda v: F.leaky_relu(v, 0.0),
    ]  # fmt: skip
    wanted = scope_of(without_biases(), x)
    for spelling in spellings:
        found = scope_of(without_biases(spelling), x)
        close(found.dense(), wanted.dense())
        close(found.r, wanted.r, scale=1.0)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 3), nn.ReLU()).double())
    plain = nn.Sequential(traced.get_submodule("0"), nn.ReLU())
    close(scope_of(traced, x).dense(), scope_of(plain, x).dense())
    constant = Linearization("gain", "frozen", "frozen", "gate", overrides={"sigmoid": "constant"})
    swish = scope_of(without_biases(lambda v: v * torch.sigmoid(v)), x, constant)
    close(swish.dense(), scope_of(without_biases(F.silu), x).dense())
    strided = draw(1, 12)[:, ::2]
    close(scope_of(without_biases(), strided).dense(), scope_of(without_biases(), strided.contiguous()).dense())
    picture = draw(1, 2, 7, 7)
    last = picture.to(memory_format=torch.channels_last)
    close(scope_of(Net(), last).dense(), scope_of(Net(), picture).dense())


def closed_forms():
    conv = nn.Conv1d(1, 1, 3, padding=1).double()
    found = scope_of(conv, draw(1, 1, 6))
    kernel = conv.weight.detach()[0, 0]
    toeplitz = sum(kernel[i] * torch.diag(torch.ones(6 - abs(i - 1)).double(), i - 1) for i in range(3))
    close(found.dense(), toeplitz)
    close(found.r[0], conv.bias.detach().expand(1, 6))
    pooled = scope_of(lambda x: F.max_pool2d(x, 2), draw(1, 1, 4, 4)).dense()
    assert torch.equal(pooled.sum(1), torch.ones(4).double())
    assert pooled.unique().tolist() == [0.0, 1.0]
    shuffled = scope_of(lambda x: F.pixel_shuffle(x, 2), draw(1, 4, 2, 2)).dense()
    assert torch.equal(shuffled @ shuffled.T, torch.eye(16).double())
    for even in (lambda x: F.avg_pool2d(x, 2), lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")):
        sums = scope_of(even, draw(1, 1, 4, 4)).dense().sum(1)
        close(sums, torch.ones_like(sums))


REACH = {"causal": True, "kernel": 3}


def nothing_from_the_future_or_beyond_the_field():
    mix = lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=REACH["causal"])
    for held in ("frozen", "exact"):
        blocks = scope_of(mix, draw(1, 5, 3), held).dense().reshape(5, 3, 5, 3).abs().amax((1, 3))
        assert not blocks.triu(1).any()
        assert (blocks.diagonal() > 0).all()
    torch.manual_seed(0)
    side = REACH["kernel"]
    local = nn.Sequential(nn.Conv2d(1, 3, side, padding="same"), nn.ReLU(), nn.Conv2d(3, 1, 3, padding="same"))
    column = scope_of(local, draw(1, 1, 12, 12)).columns([(0, 6, 6)])[0, 0]
    seen = torch.zeros(12, 12, dtype=torch.bool)
    seen[4:9, 4:9] = True
    assert not column[~seen].any()
    assert column[seen].any()


def singular_values_are_those_of_the_matrix():
    found = scope()
    triplets = found.svd(2)
    dense = found.dense()
    assert triplets.residuals.max() <= 1e-4
    close(triplets.s, torch.linalg.svdvals(dense)[:2], 1e-4)
    energy = scope_of(nn.Linear(4, 6), draw(1, 4))
    top = energy.svd(3).s.pow(2).sum() + torch.linalg.svdvals(energy.dense())[3] ** 2
    assert float(top) == pytest.approx(float(energy.dense().pow(2).sum()), rel=1e-8)
    close(found.matvec(triplets.v[0]), triplets.s[0] * triplets.u[0], 1e-6)


def wrong_networks_are_refused():
    noisy = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().train()
    scripted = torch.jit.script(nn.ReLU())
    refused = [
        (BilinearOpError, lambda: scope_of(lambda x: x * x.flip(-1), draw(1, 4))),
        (ControlFlowError, lambda: scope_of(lambda x: x if x.sum() else -x, draw(1, 4))),
        (UnsupportedOpError, lambda: scope_of(lambda x: scripted(x), draw(1, 4))),
        (InputError, lambda: LinearScope(attach(nn.Embedding(3, 2)), torch.tensor([[1, 2]]))),
        (TrainModeError, lambda: LinearScope(attach(Call(lambda x: noisy(x.reshape(2, 4)), net=noisy)), draw(1, 8))),
    ]
    for error, make in refused:
        with pytest.raises(error):
            make()


def no_trace_is_left():
    from torch.nn.modules import module as hooks

    def state():
        flags = [(p.requires_grad, p.grad) for p in net.parameters()]
        counts = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
        shared = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
        values = [v.clone() for v in net.state_dict().values()]
        modes = torch.is_grad_enabled(), torch.random.get_rng_state().tolist(), [m.training for m in net.modules()]
        return (flags, counts, shared, modes), values

    for fail in (False, True):
        net, x = Net().double().eval(), draw(1, 2, 7, 7)
        (before, weights), output = state(), net(x)
        if fail:
            net.head.register_forward_pre_hook(lambda m, a: 1 / 0)
            before[1][[*net.modules()].index(net.head)] += 1
        with pytest.raises(ZeroDivisionError) if fail else contextlib.nullcontext():
            found = scope_of(net, x)
            found.bias_report(1), found.votes(0), found.stability(2, samples=1)
        after, values = state()
        assert after == before
        assert all(torch.equal(a, b) for a, b in zip(values, weights, strict=True))
        assert fail or torch.equal(net(x), output)


def probes_do_not_know_each_other():
    found = scope()
    probes = draw(9, *found.in_shape, seed=4)
    together = found.matvec(probes)
    close(torch.cat([found.matvec(p)[None] for p in probes]), together)
    close(found.matvec(probes.flip(0)).flip(0), together)
    for chunk in (1, 2, 5):
        close(found.columns(range(7), chunk=chunk), found.columns(range(7)))
        close(found.rows(range(3), chunk=chunk), found.rows(range(3)))
    directions = draw(9, *found.out_shape, seed=5)
    close(torch.cat([found.rmatvec(w)[None] for w in directions]), found.rmatvec(directions))


# What is broken ---


def swap_rule(name, rule):
    return lambda patch: patch.setitem(rules.RULES, name, rule)


def inexact_unit(tape, call):
    return call.write(unit_rules.unit(tape, call) * (1 + 1e-6))


def unit_without_offset(tape, call):
    """Forgets what a capped unit adds, when the tape is replayed."""
    out = unit_rules.unit(tape, call)
    return call.live[0] * tape.entries[tape._next - 1].held[0] if tape.replaying else out


def lose_the_norm(patch):
    note = Tape._note
    patch.setattr(
        Tape, "_note", lambda self, added, call, out: call.name == "batch_norm" or note(self, added, call, out)
    )


def unit_with_half_a_derivative(tape, call):
    out = unit_rules.unit(tape, call)
    return out if tape.replaying else out.detach() + 0.5 * (out - out.detach())


def chords_instead_of_tangents(patch):
    elementwise = unit_rules.elementwise
    patch.setattr(unit_rules, "elementwise", lambda tape, call, found, mode: elementwise(tape, call, found, "chord"))


def other_rows(patch):
    pull = FrozenNetwork.pull
    patch.setattr(FrozenNetwork, "pull", lambda self, block, w: pull(self, block, w) * 1.001)


def identity_with_offset(tape, call):
    """Right at the reference and affine, but of another slope."""
    z, rest = call.live[0], call.args[1:]
    plain = lambda: call.func(z.detach().clone(), *rest, **call.kwargs) - z.detach()
    offset = tape.decide(call, "tangent", plain)
    return call.write(z + (0 if tape.homogeneous else offset))


def pool_that_spreads(tape, call):
    """Right at the reference and affine, but all inputs of a window share the maximum."""
    even = F.avg_pool2d(call.live[0], 2)
    gap = tape.decide(call, "tangent", lambda: call.func(call.live[0].detach(), *call.args[1:]) - even.detach())
    return even + (0 if tape.homogeneous else gap)


def smaller_values(patch):
    lanczos = spectra._lanczos
    patch.setattr(spectra, "_lanczos", lambda *a: (lambda u, s, v: (u, 0.99 * s, v))(*lanczos(*a)))


def flags_forgotten(patch):
    @contextlib.contextmanager
    def careless(module):
        for p in module.parameters():
            p.requires_grad_(False)
        yield

    patch.setattr(frozen, "untouched", careless)


def probes_that_mix(patch):
    push = FrozenNetwork.push
    mixed = lambda out: out + 1e-6 * out.mean(0) if len(out) > 1 else out
    patch.setattr(FrozenNetwork, "push", lambda self, blocks: mixed(push(self, blocks)))


CLAIMS = {
    "1 reference": (reference_is_untouched, swap_rule("relu6", inexact_unit)),
    "2 completeness": (complete_for_all_outputs, swap_rule("relu6", unit_without_offset)),
    "3 residual": (residual_in_three_ways, lose_the_norm),
    "4 linearity": (linear_far_from_the_reference, swap_rule("relu", rules.linear)),
    "5 adjoint": (push_and_pull_are_adjoint, swap_rule("leaky_relu", unit_with_half_a_derivative)),
    "6 Jacobian": (tangents_are_the_jacobian_and_gains_are_not, chords_instead_of_tangents),
    "7 columns and rows": (columns_and_rows_are_of_one_matrix, other_rows),
    "8 homogeneity": (
        homogeneous_without_biases,
        lambda patch: patch.setitem(HOMOGENEOUS, "build", lambda: without_biases(bias=True)),
    ),
    "9 spelling": (one_function_in_any_spelling, swap_rule("clamp", identity_with_offset)),
    "10 closed forms": (closed_forms, swap_rule("max_pool2d", pool_that_spreads)),
    "11 causality": (nothing_from_the_future_or_beyond_the_field, lambda patch: patch.setitem(REACH, "causal", False)),
    "11 locality": (nothing_from_the_future_or_beyond_the_field, lambda patch: patch.setitem(REACH, "kernel", 7)),
    "12 spectrum": (singular_values_are_those_of_the_matrix, smaller_values),
    "13 refusals": (wrong_networks_are_refused, swap_rule("mul", rules.linear)),
    "14 no trace": (no_trace_is_left, flags_forgotten),
    "15 independence": (probes_do_not_know_each_other, probes_that_mix),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("what", CLAIMS)
def test_claim(what):
    CLAIMS[what][0]()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:.*residual above")
@pytest.mark.parametrize("what", CLAIMS)
def test_claim_notices_what_is_broken(what, monkeypatch):
    claim, breaks = CLAIMS[what]
    breaks(monkeypatch)
    with pytest.raises((AssertionError, InterpError, pytest.fail.Exception)):
        claim()


def test_what_is_broken_passes_the_checks_that_are_not_its_own(monkeypatch):
    """A live unit is complete at the reference; only a probe far from it shows that it is not held."""
    monkeypatch.setitem(rules.RULES, "relu", rules.linear)
    found = scope_of(without_biases(), draw(1, 6))
    close(found.Fx + found.r, found.y)
    assert is_live(found.network.output)
    assert not all(row["holds"] for row in found.check())
