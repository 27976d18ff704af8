"""LinearScope on networks written in several spellings: closed forms, slow twins, negative controls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import interp
from interp.hooks.errors import (
    ArgumentError,
    BilinearOpError,
    ControlFlowError,
    InputError,
    LinearizationError,
    TrainModeError,
    UnsupportedOpError,
)
from tests.nets import Call, assert_checks, draw, scope_of


def jacobian(module, x):
    dense = torch.func.jacrev(module)(x)[0]
    out = dense.shape[: dense.ndim - x.ndim]
    return dense.reshape(out.numel(), -1)


class ConvNet(nn.Module):
    """Convolutions, batch norm, ReLU6, pools, skips, nearest upsampling: piecewise linear throughout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.two = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)
        self.bn.running_mean.uniform_(-1, 1), self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = F.relu6(3 * self.bn(self.one(x)), inplace=True)
        x = x + F.leaky_relu(self.depthwise(x), 0.2)
        x = F.max_pool2d(x, 2)
        x = F.interpolate(self.two(x), scale_factor=2, mode="nearest")
        x = F.avg_pool2d(torch.cat([x, x.abs()], 1), 2)[:, 3:9]
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("linearization", ["frozen", "exact"])
def test_piecewise_linear_network_is_its_jacobian(memory_format, linearization):
    net, x = ConvNet().double().eval(), draw(1, 3, 8, 8).to(memory_format=memory_format)
    scope = scope_of(net, x, linearization)
    wanted = jacobian(net, x)
    torch.testing.assert_close(scope.dense(), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scope.columns(range(5)).reshape(5, -1).T, wanted[:, :5], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scope.r[0], scope.y[0] - wanted @ x.flatten(), rtol=1e-10, atol=1e-12)
    assert torch.equal(scope.y, net(x)), "the reference itself is untouched"
    assert_checks(scope)


def test_bias_free_relu_network_has_no_residual_and_is_homogeneous():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3, bias=False)).double()
    x = draw(1, 2, 6, 6)
    scope, scaled = scope_of(net, x), scope_of(net, 3 * x)
    assert scope.r.abs().max() == 0
    torch.testing.assert_close(scope.dense(), scaled.dense(), rtol=1e-12, atol=1e-14)
    votes = scope.votes(1)
    assert abs(votes.total - float(scope.y[0, 1])) < 1e-12


def test_single_convolution_has_its_bias_as_residual():
    conv = nn.Conv2d(1, 2, 3, padding=1)
    scope = scope_of(conv, draw(1, 1, 4, 4))
    assert torch.equal(scope.r, conv.bias.detach().reshape(1, 2, 1, 1).expand(1, 2, 4, 4))


def test_max_pool_rows_pick_one_input():
    dense = scope_of(lambda x: F.max_pool2d(x, 2), draw(1, 1, 4, 4)).dense()
    assert torch.equal(dense.sum(1), torch.ones(4, dtype=torch.float64))
    assert set(dense.unique().tolist()) == {0.0, 1.0}


def test_pixel_shuffle_is_a_permutation_and_average_rows_sum_to_one():
    dense = scope_of(lambda x: F.pixel_shuffle(x, 2), draw(1, 4, 2, 2)).dense()
    assert torch.equal(dense.sum(0), torch.ones(16).double())
    assert torch.equal(dense.sum(1), torch.ones(16).double())
    blur = scope_of(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), draw(1, 1, 3, 3)).dense()
    torch.testing.assert_close(blur.sum(1), torch.ones(36).double())


# Norms ---


def _by_hand_layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


NORMS = {
    "module": nn.LayerNorm(6, elementwise_affine=False),
    "functional": lambda x: F.layer_norm(x, (6,)),
    "by hand": _by_hand_layer_norm,
    "by rsqrt": lambda x: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5),
    "power": lambda x: (x - x.mean(-1, keepdim=True)) * (x.var(-1, unbiased=False, keepdim=True) + 1e-5) ** -0.5,
    "group norm": lambda x: F.group_norm(x, 1),
}


@pytest.mark.parametrize("spelling", NORMS)
def test_layer_norm_in_every_spelling(spelling):
    x = draw(1, 6) + 0.5
    sigma = (x.var(-1, unbiased=False) + 1e-5).sqrt()
    frozen = scope_of(NORMS[spelling], x, "frozen")
    torch.testing.assert_close(frozen.dense(), (torch.eye(6).double() - 1 / 6) / sigma, rtol=1e-9, atol=1e-11)
    exact = scope_of(NORMS[spelling], x, "exact")
    torch.testing.assert_close(exact.dense(), jacobian(Call(_by_hand_layer_norm), x), rtol=1e-6, atol=1e-9)
    assert_checks(frozen)
    assert_checks(exact)


RMS = {
    "module": nn.RMSNorm(6, eps=1e-5, elementwise_affine=False),
    "by hand": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "square": lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(),
    "product": lambda x: x / ((x * x).mean(-1, keepdim=True) + 1e-5) ** 0.5,
}


@pytest.mark.parametrize("spelling", RMS)
def test_rms_norm_in_every_spelling(spelling):
    x = draw(1, 6)
    scale = (x.pow(2).mean(-1) + 1e-5).sqrt()
    frozen = scope_of(RMS[spelling], x, "frozen")
    torch.testing.assert_close(frozen.dense(), torch.eye(6).double() / scale, rtol=1e-9, atol=1e-11)
    assert frozen.r.abs().max() == 0
    assert_checks(frozen)
    assert_checks(scope_of(RMS[spelling], x, "exact"))


# Products ---


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_gated_unit_by_formula_under_each_product_mode():
    net, x = SwiGLU().double(), draw(1, 4)
    g, u = net.gate(x)[0].detach(), net.up(x)[0].detach()
    act, gain = F.silu(g), torch.sigmoid(g)
    down, up, gate = net.down.weight.detach(), net.up.weight.detach(), net.gate.weight.detach()
    held = down @ (act[:, None] * up)
    other = down @ ((gain * u)[:, None] * gate)
    wanted = {"gate": held, "split": 0.5 * (held + other)}
    for mode, dense in wanted.items():
        scope = scope_of(net, x, interp.Linearization("gain", "frozen", "frozen", mode))
        torch.testing.assert_close(scope.dense(), dense, rtol=1e-11, atol=1e-13)
        assert_checks(scope)
    exact = scope_of(net, x, "exact")
    torch.testing.assert_close(exact.dense(), jacobian(net, x), rtol=1e-11, atol=1e-13)


def test_squeeze_and_excite_holds_the_gate():
    one, two = nn.Conv2d(4, 4, 1).double(), nn.Conv2d(4, 4, 3, padding=1).double()
    net = Call(lambda x: two(x) * torch.sigmoid(one(x.mean((2, 3), keepdim=True))), one=one, two=two)
    scope = scope_of(net, draw(1, 4, 5, 5))
    assert_checks(scope)


def test_of_two_activations_the_truer_gate_is_held():
    x = draw(1, 6)
    open_gate = torch.diag((torch.sigmoid(-x) * (x > 0))[0])
    torch.testing.assert_close(scope_of(lambda x: F.relu(x) * torch.sigmoid(-x), x).dense(), open_gate)
    torch.testing.assert_close(scope_of(lambda x: torch.sigmoid(-x) * F.relu(x), x).dense(), open_gate)
    ratio = torch.tanh(x) / x
    cell = scope_of(lambda x: torch.sigmoid(x) * torch.tanh(x), x).dense()
    torch.testing.assert_close(cell, torch.diag((torch.sigmoid(x) * ratio)[0]))


def _scores(x):
    return x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5


ATTENTION = {
    "fused": lambda x: F.scaled_dot_product_attention(x, x, x),
    "operator": lambda x: torch.softmax(_scores(x), -1) @ x,
    "matmul": lambda x: torch.matmul(F.softmax(torch.matmul(x, x.mT) / x.shape[-1] ** 0.5, dim=-1), x),
    "einsum": lambda x: torch.einsum(
        "bqk,bkd->bqd", (torch.einsum("bqd,bkd->bqk", x, x) / x.shape[-1] ** 0.5).softmax(-1), x
    ),
    "bmm": lambda x: torch.bmm(torch.bmm(x, x.mT).div(x.shape[-1] ** 0.5).softmax(-1), x),
    "soft-capped": lambda x: torch.softmax(50 * torch.tanh(_scores(x) / 50), -1) @ x,
}


@pytest.mark.parametrize("spelling", ATTENTION)
def test_attention_holds_the_pattern_in_every_spelling(spelling):
    x = draw(1, 5, 4)
    pattern = torch.softmax(50 * torch.tanh(_scores(x) / 50) if spelling == "soft-capped" else _scores(x), -1)
    frozen = scope_of(ATTENTION[spelling], x, "frozen")
    torch.testing.assert_close(frozen.dense(), torch.kron(pattern[0], torch.eye(4).double()), rtol=1e-11, atol=1e-13)
    assert_checks(frozen)
    exact = scope_of(ATTENTION[spelling], x, "exact")
    twin = ATTENTION["soft-capped" if spelling == "soft-capped" else "operator"]
    torch.testing.assert_close(exact.dense(), jacobian(Call(twin), x), rtol=1e-10, atol=1e-12)
    assert_checks(exact)


# Votes ---


def test_votes_sum_for_targets_margins_directions_and_any_origin():
    net, x = ConvNet().double().eval(), draw(1, 3, 8, 8)
    origin = draw(3, 8, 8, seed=5)
    for options in ({}, {"origin": origin}):
        scope = scope_of(net, x, **options)
        for arguments in ((2,), (2, 0), ((1,),), (draw(4, seed=7),)):
            votes = scope.votes(*arguments)
            assert votes.completeness_error < 1e-13
            assert votes.map.shape == (8, 8)
            assert abs(votes.total + votes.residual - votes.value) <= 1e-12 * votes.abs_total
    plain, moved = scope_of(net, x).votes(2), scope_of(net, x, origin=origin).votes(2)
    assert abs(plain.residual - moved.residual) > 1e-3, "bias share depends on the origin of the input space"
    assert plain.value == moved.value


def test_votes_by_formula():
    net, x = ConvNet().double().eval(), draw(1, 3, 8, 8)
    row = jacobian(net, x)[3].reshape(3, 8, 8)
    votes = scope_of(net, x).votes(3)
    torch.testing.assert_close(votes.map, (row * x[0]).sum(0), rtol=1e-10, atol=1e-13)
    assert votes.top(3)[0]["vote"] == pytest.approx(float(votes.map.flatten()[votes.map.abs().argmax()]))


def test_probes_are_independent_of_chunk_and_company():
    scope = scope_of(ConvNet().double().eval(), draw(1, 3, 8, 8))
    whole = scope.rows(range(4), chunk=4)
    assert torch.allclose(scope.rows(range(4), chunk=1), whole, rtol=1e-12, atol=1e-14)
    assert torch.allclose(scope.rows([2]), whole[2:3], rtol=1e-12, atol=1e-14)


def test_to_scipy_is_the_same_operator():
    from scipy.sparse.linalg import svds

    scope = scope_of(ConvNet().double().eval(), draw(1, 3, 8, 8))
    found = svds(scope.to_scipy(), k=2, rng=0)[1]
    wanted = torch.linalg.svdvals(scope.dense())[:2].flip(0)
    assert found == pytest.approx(wanted.tolist(), rel=1e-8)


# Refusals ---


class Gate(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.inner = Call(fn)

    def forward(self, x):
        return self.inner(x)


REFUSED = {
    "two live factors": (lambda x: x * x.flip(-1), BilinearOpError, "multiplies two live"),
    "two live matrices": (lambda x: x[..., None] @ x[:, None], BilinearOpError, "without being held"),
    "a product of two gates": (lambda x: F.silu(x) * F.silu(-x), BilinearOpError, "without being held"),
    "item": (lambda x: x * x.sum().item(), ControlFlowError, "reads a live value"),
    "float()": (lambda x: x * float(x.sum()), ControlFlowError, "reads a live value"),
    "detach": (lambda x: x * x.detach(), UnsupportedOpError, "cuts a live value off"),
    "data": (lambda x: x + x.data, UnsupportedOpError, "cuts a live value off"),
    "exp": (torch.exp, UnsupportedOpError, "exp"),
    "softmax at the end": (lambda x: torch.softmax(x, -1), LinearizationError, "interpret the logits"),
    "fft of two": (lambda x: torch.cdist(x, x.flip(-1)), UnsupportedOpError, "cdist"),
    "live dropout": (lambda x: F.dropout(x, 0.5, training=True), TrainModeError, "live"),
    "batch statistics": (lambda x: F.batch_norm(x, None, None, training=True), TrainModeError, "batch statistics"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_the_module_and_the_call(what):
    fn, error, text = REFUSED[what]
    x = torch.rand(3, 4, dtype=torch.float64)[:1] + 0.1
    if what == "batch statistics":
        fn = lambda x: F.batch_norm(x.reshape(2, 2), None, None, training=True).reshape(1, 4)
    with pytest.raises(error, match=text) as caught:
        scope_of(Gate(fn), x)
    if error is not LinearizationError:
        assert "inner" in str(caught.value), "the message has the module's path"


def test_no_grad_in_the_forward_is_refused():
    def cut(x):
        with torch.no_grad():
            return x + 1

    with pytest.raises(UnsupportedOpError, match="no_grad"):
        scope_of(cut, draw(1, 4))


def hides(fn):
    """A network that computes something of its input under no_grad, and what it does with it."""

    def run(x):
        with torch.no_grad():
            scale = (x.float().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
            scale.add_(1.0)
        return fn(x, scale)

    return run


def logged(x, scale):
    logged.seen = scale.clone()
    logged.shown = f"{tuple(scale.shape)}"
    return F.silu(x) * x


def test_what_is_computed_under_no_grad_for_a_networks_own_books_is_let_be():
    """As a TransformerBridge does with its norms' scales: nothing that is given out depends on it."""
    x = draw(1, 4)
    for linearization in ("frozen", "exact"):
        scope, wanted = scope_of(hides(logged), x, linearization), scope_of(lambda v: F.silu(v) * v, x, linearization)
        assert_checks(scope)
        torch.testing.assert_close(scope.dense(), wanted.dense(), rtol=0, atol=0)
        torch.testing.assert_close(scope.matvec(draw(1, 4, seed=5)), wanted.matvec(draw(1, 4, seed=5)), rtol=0, atol=0)
        assert torch.equal(scope.r, wanted.r)
    assert logged.seen is not None


def write_in_place(x, scale):
    with torch.no_grad():
        x[..., :2].mul_(2.0)
    return x


def write_to(x, scale):
    with torch.no_grad():
        x.add_(1.0)
    return x


@pytest.mark.parametrize(("fn", "error", "text"), [
    (lambda x, s: x / s, UnsupportedOpError, r"div.* in inner depends on what .* computed under no_grad"),
    (lambda x, s: x.masked_fill(s > 1, 0.0), UnsupportedOpError, r"masked_fill.* in inner depends on what"),
    (lambda x, s: s.expand(1, 4) + 0.0, UnsupportedOpError, r"the output depends on what .* computed under no_grad"),
    (lambda x, s: x if bool(s.max() > 1) else -x, ControlFlowError, r"bool.* in inner reads a value that"),
    (lambda x, s: x * float(s.sum()), ControlFlowError, r"float.* in inner reads a value that"),
    (write_in_place, UnsupportedOpError, r"mul in inner cuts a live value off: it writes under no_grad"),
    (write_to, UnsupportedOpError, r"add in inner cuts a live value off"),
])  # fmt: skip
def test_what_depends_on_it_is_refused(fn, error, text):
    with pytest.raises(error, match=text):
        scope_of(Gate(hides(fn)), draw(1, 4))


def test_control_flow_on_a_live_value_is_held_or_refused_but_never_ignored():
    """A comparison is a decision that is held; reading it with `if` is control flow on a constant of the tape."""
    scope = scope_of(lambda x: x if x.sum() > 0 else -x, draw(1, 4))
    assert_checks(scope)


def test_bool_on_a_live_value_is_refused():
    with pytest.raises(ControlFlowError):
        scope_of(lambda x: x if x.sum() else -x, draw(1, 4))


def test_inputs_that_cannot_be_linearised_are_refused():
    with pytest.raises(InputError, match="dtype"):
        interp.LinearScope(interp.attach(nn.Embedding(3, 2)), torch.tensor([[1, 2]]))
    with pytest.raises(InputError, match="2 examples"):
        scope_of(nn.Linear(4, 2), draw(2, 4))
    scope = scope_of(nn.Linear(4, 2), draw(1, 4))
    for call in (lambda: scope.votes(7), lambda: scope.rows([9]), lambda: scope.rows([])):
        with pytest.raises(ArgumentError):
            call()
    with pytest.raises(InputError, match=r"matvec of a tensor \[3\]"):
        scope.matvec(torch.zeros(3))
    with pytest.raises(MemoryError, match="bytes"):
        scope.dense(max_bytes=8)


def test_a_network_that_writes_to_its_buffer_keeps_it():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)
            self.last = nn.Buffer(torch.ones(1, 3))

        def forward(self, x):
            self.last.copy_(self.net(x))
            return self.last * 2

    net, x = Cached().double().eval(), draw(1, 3)
    with torch.no_grad():
        net(x)
    buffer, value = net.last, net.last.clone()
    scope = scope_of(net, x)
    assert_checks(scope)
    scope.bias_report((1,))
    assert net.last is buffer
    assert torch.equal(buffer, value)
    assert not buffer.requires_grad
    assert not vars(buffer), "no mark stays on it"


def test_scope_leaves_no_trace_also_after_a_refusal():
    from torch.nn.modules import module as hooks

    net = nn.Sequential(nn.Linear(4, 4), Call(lambda x: x * x.flip(-1)), nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    before = {n: p.clone() for n, p in net.named_parameters()}
    flags = [p.requires_grad for p in net.parameters()]
    counts = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    with pytest.raises(BilinearOpError):
        interp.LinearScope(interp.attach(net), torch.ones(1, 4))
    net[1] = nn.ReLU()
    interp.LinearScope(interp.attach(net), torch.ones(1, 4)).check()
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in net.named_parameters())
    assert (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)) == counts
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
