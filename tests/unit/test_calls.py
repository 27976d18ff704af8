"""Calls that networks make, each against the dense Jacobian; what cannot be seen is refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import interp
from interp.hooks.errors import (
    BilinearOpError,
    ControlFlowError,
    NonFiniteError,
    TrainModeError,
    UnsupportedOpError,
)
from tests.nets import Call, assert_checks, draw, scope_of

X, IMAGE = draw(1, 6), draw(1, 2, 6, 6)
TIES = torch.tensor([[1.0, 1.0, 0.0, 1.0, -2.0, 0.0]], dtype=torch.float64)
PER_CHANNEL = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
GRID = F.affine_grid(torch.tensor([[[0.9, 0.1, 0], [0, 1, 0.1]]]).double(), (1, 2, 5, 5), align_corners=False)
ANGLES = torch.arange(6.0, dtype=torch.float64)


def matches_jacobian(fn, x, linearization="exact"):
    scope = scope_of(fn, x, linearization)
    assert_checks(scope)
    dense = torch.autograd.functional.jacobian(scope.model.module, x).reshape(scope.y.numel(), x.numel())
    torch.testing.assert_close(scope.dense(), dense, rtol=1e-9, atol=1e-11)
    target = tuple(0 for _ in scope.out_shape)
    assert scope.bias_report(target).completeness_error < 1e-12
    return scope


SELECTIONS = {
    "maximum over everything": lambda x: x.max().reshape(1, 1), "amax": lambda x: x.amax(-1, keepdim=True),
    "maximum along": lambda x: x.max(-1, keepdim=True).values, "maxout": lambda x: x.reshape(1, 3, 2).max(-1).values,
    "maximum of two": lambda x: torch.maximum(x, x.flip(-1)), "fmax": lambda x: torch.fmax(x, x.flip(-1)),
    "maximum with zero": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "minimum along": lambda x: x.min(-1, keepdim=True)[0], "median": lambda x: x.median(-1, keepdim=True).values,
    "median of everything": lambda x: x.median().reshape(1, 1), "sort": lambda x: x.sort(-1).values,
    "topk": lambda x: x.topk(3, -1).values, "kthvalue": lambda x: x.kthvalue(2, -1, keepdim=True).values,
    "cummax": lambda x: x.cummax(-1).values,
    "extremes": lambda x: torch.cat(list(torch.aminmax(x, dim=-1, keepdim=True)), -1),
    "live bounds": lambda x: torch.clamp(x, x.flip(-1) - 0.5, x.flip(-1) + 0.5),
    "where": lambda x: torch.where(x > 0, 2 * x, x.flip(-1)), "masked fill": lambda x: x.masked_fill(x > 0.5, 3.0),
    "gather by order": lambda x: x.gather(-1, x.argsort(-1)),
    "mask cast to a live value's type": lambda x: x * (x > 0).to(x),
    "slopes by channel": lambda x: F.prelu(x.reshape(1, 3, 2), PER_CHANNEL), "frac": torch.frac,
}  # fmt: skip


@pytest.mark.parametrize("x", [X, TIES], ids=["plain", "ties"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_share_ties_as_the_call_does(name, x):
    for linearization in ("frozen", "exact"):
        matches_jacobian(SELECTIONS[name], x, linearization)


def unpooled(x):
    pooled, where = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(2 * pooled + 1, where, 2)


LINEAR = {
    "ceiling and padding": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), IMAGE),
    "dilated windows": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), IMAGE),
    "overlapping windows": (lambda x: F.max_pool2d(x, 3, 1), IMAGE),
    "adaptive maximum": (lambda x: F.adaptive_max_pool2d(x, 3), IMAGE),
    "unpooling": (unpooled, IMAGE),
    "spectrum": (lambda x: torch.view_as_real(torch.fft.rfft(x)).flatten(1), X),
    "filter": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.tensor([1, 2j, 0, 1])), X),
    "plane waves": (lambda x: torch.fft.ifft2(torch.fft.fft2(x.reshape(1, 2, 3))).real, X),
    "short-time spectrum": (
        lambda x: torch.view_as_real(torch.stft(x, 4, 2, window=ANGLES[:4] + 1, return_complex=True)).flatten(1), X,
    ),
    "rotation": (
        lambda x: x * ANGLES.cos() + torch.cat([-x[:, 3:], x[:, :3]], -1) * ANGLES.sin(), X,
    ),
    "complex rotation": (
        lambda x: torch.view_as_real(
            torch.view_as_complex(x.reshape(1, 3, 2)) * torch.polar(torch.ones(3).double(), ANGLES[:3])
        ).flatten(1), X,
    ),
    "pad reflect": (lambda x: F.pad(x[:, None], (2, 1), mode="reflect"), X),
    "pad replicate": (lambda x: F.pad(x[:, None], (2, 1), mode="replicate"), X),
    "pad circular": (lambda x: F.pad(x[:, None], (2, 1), mode="circular"), X),
    "pad by a value": (lambda x: F.pad(x, (2, 1), value=3.0), X),
    "constant grid": (lambda x: F.grid_sample(x, GRID.expand(len(x), -1, -1, -1), align_corners=False), IMAGE),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE),
    "area": (lambda x: F.interpolate(x, scale_factor=0.5, mode="area"), IMAGE),
    "fold": (lambda x: F.fold(F.unfold(x, 2), 6, 2), IMAGE),
    "shuffles": (lambda x: F.pixel_shuffle(F.channel_shuffle(F.pixel_unshuffle(x, 2), 2), 2), IMAGE),
    "transposed convolution": (nn.ConvTranspose2d(2, 3, 3, stride=2), IMAGE),
    "sums": (lambda x: x.cumsum(-1).roll(1, -1).flip(-1), X),
    "live summand of addmm": (lambda x: torch.addmm(x[:, :3], x, torch.ones(6, 3).double(), beta=2), X),
    "bilinear with a constant": (nn.Sequential(Call(lambda x: BILINEAR(x[:, :3], torch.ones(1, 3).double()))), X),
    "stochastic depth": (lambda x: x + nn.Dropout(0.2).eval()(x), X),
    "weight norm": (torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), X),
    "spectral norm": (torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), X),
}  # fmt: skip
BILINEAR = nn.Bilinear(3, 3, 2).double()


@pytest.mark.parametrize("linearization", ["frozen", "exact"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_calls_and_pools_pass_as_they_are(name, linearization):
    matches_jacobian(*LINEAR[name], linearization)


def test_a_value_that_is_padded_in_is_the_residual():
    scope = scope_of(lambda x: F.pad(x, (2, 1), value=3.0), X)
    assert scope.r.flatten().tolist() == [3, 3, 0, 0, 0, 0, 0, 0, 3]


PRODUCTS = {  # name: (network, what it is with the held factors written as constants)
    "square": (lambda x: x * x, lambda x: X * x), "power": (lambda x: x**3, lambda x: X**2 * x),
    "cube as products": (lambda x: x * x * x, lambda x: X**2 * x),
    "quotient": (lambda x: x / (x.flip(-1) + 3), lambda x: x / (X.flip(-1) + 3)),
    "highway": (
        lambda x: torch.sigmoid(x) * F.relu(x) + (1 - torch.sigmoid(x)) * x,
        lambda x: torch.sigmoid(X) * F.relu(x) + (1 - torch.sigmoid(X)) * x,
    ),
    "squeeze and excite": (
        lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)), lambda x: x * torch.sigmoid(X.mean(-1, keepdim=True)),
    ),
    "swiglu": (lambda x: F.silu(x[:, :3]) * x[:, 3:], lambda x: F.silu(X[:, :3]) * x[:, 3:]),
    "geglu": (lambda x: x[:, 3:] * F.gelu(x[:, :3]), lambda x: x[:, 3:] * F.gelu(X[:, :3])),
    "exponential scale": (lambda x: x * torch.exp(x.flip(-1)) + 1, lambda x: x * torch.exp(X.flip(-1)) + 1),
    "adaptive instance norm": (
        lambda x: (x[:, :3] - x[:, :3].mean()) / x[:, :3].std() * x[:, 3:].std() + x[:, 3:].mean(),
        lambda x: (x[:, :3] - x[:, :3].mean()) / X[:, :3].std() * X[:, 3:].std() + x[:, 3:].mean(),
    ),
    "interpolation by a gate": (
        lambda x: torch.lerp(x, x.flip(-1), torch.sigmoid(x)), lambda x: torch.lerp(x, x.flip(-1), torch.sigmoid(X)),
    ),
    "log-softmax": (lambda x: F.log_softmax(x, -1), lambda x: x - torch.logsumexp(X, -1, keepdim=True)),
    "softmin gate": (lambda x: F.softmin(x, -1) * x, lambda x: F.softmin(X, -1) * x),
    "cosine": (
        lambda x: F.cosine_similarity(x, ANGLES[None])[:, None],
        lambda x: (x @ ANGLES[:, None]) / (X.norm() * ANGLES.norm()),
    ),
    "learned grid": (
        lambda x: F.grid_sample(x.reshape(-1, 1, 2, 3), x.reshape(-1, 1, 3, 2) / 3, align_corners=False),
        lambda x: F.grid_sample(x.reshape(-1, 1, 2, 3), X.reshape(-1, 1, 3, 2) / 3, align_corners=False),
    ),
    "fast gelu": (
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
        lambda x: 0.5 * x * (1 + torch.tanh(X * 0.7978845608 * (1 + 0.044715 * X * X))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_hold_one_factor(name):
    net, twin = PRODUCTS[name]
    scope = scope_of(net, X)
    dense = torch.autograd.functional.jacobian(twin, X).reshape(scope.y.numel(), 6)
    torch.testing.assert_close(scope.dense(), dense, rtol=1e-9, atol=1e-11)
    assert_checks(scope)
    assert scope.bias_report(tuple(0 for _ in scope.out_shape)).completeness_error < 1e-12
    if name != "learned grid":
        matches_jacobian(net, X)


@pytest.mark.parametrize("shape", [(1, 5, 4), (1, 5, 3, 3), (1, 5, 2, 2, 2)])
@pytest.mark.parametrize("size", [3, 4])
def test_local_response_norm_of_any_dimension(shape, size):
    x = draw(*shape)
    for linearization in ("frozen", "exact"):
        scope = scope_of(lambda x: F.local_response_norm(x, size, alpha=0.5), x, linearization)
        assert_checks(scope)
    ratio = (F.local_response_norm(x, size, alpha=0.5) / x).flatten()
    dense = scope_of(lambda x: F.local_response_norm(x, size, alpha=0.5), x).dense()
    torch.testing.assert_close(dense, torch.diag(ratio))


# Seen or refused ---


def under_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x + 1


def inside(fn):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), Call(fn))


REFUSED = {
    "checkpoint": (lambda x: checkpoint(torch.relu, x, use_reentrant=False), UnsupportedOpError, "checkpoint.* in 1"),
    "reentrant checkpoint": (
        lambda x: checkpoint(torch.relu, x, use_reentrant=True), UnsupportedOpError,
        "CheckpointFunction.* in 1.*switch gradient checkpointing off",
    ),
    "autocast": (under_autocast, UnsupportedOpError, r"add\(\[1, 6\]\) in 1 runs under autocast"),
    "recurrent kernel": (
        lambda x: nn.GRUCell(6, 6).double()(x), UnsupportedOpError, r"gru_cell.* in GRUCell.*recurrence",
    ),
    "bilinear layer": (lambda x: BILINEAR(x[:, :3], x[:, 3:]), BilinearOpError, "bilinear.* in Bilinear"),
    "outer product": (lambda x: torch.einsum("bi,bj->bij", x, x.flip(-1)), BilinearOpError, "einsum.* in 1"),
    "varying length": (lambda x: torch.masked_select(x, x > 0), UnsupportedOpError, "masked_select.* in 1.*where"),
    "drawn slopes": (lambda x: F.rrelu(x, training=True), TrainModeError, "rrelu.* in 1"),
    "not a number": (lambda x: F.relu((x - 100).sqrt() + x), NonFiniteError, "in 1"),
    "infinite coefficient": (
        lambda x: F.layer_norm(x * 0, (6,), eps=0.0).nan_to_num() + x, NonFiniteError, r"layer_norm.* in 1",
    ),
    "truth of a value": (lambda x: x if (x.sum() + 1) else -x, ControlFlowError, "bool.* in 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_seen_is_refused_where_it_runs(name):
    fn, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        scope_of(inside(fn), X)


def test_a_derivative_that_does_not_exist_is_refused():
    with pytest.raises(NonFiniteError):
        scope_of(lambda x: x + (0 * x).norm(dim=-1, keepdim=True).sqrt(), X, "exact")
    with pytest.raises(UnsupportedOpError, match=r"grid_sample.*overrides"):
        scope_of(PRODUCTS["learned grid"][0], X, "exact")


def test_a_compiled_function_runs_as_python():
    doubled = torch.compile(lambda x: torch.relu(x) * 2, backend="eager")  # no C++ compiler is asked for
    torch.testing.assert_close(
        scope_of(inside(doubled), X).dense(), scope_of(inside(lambda x: F.relu(x) * 2), X).dense()
    )


def test_truth_of_a_constant_mask_is_allowed():
    def masked(x):
        mask = torch.ones(1, 6, dtype=torch.bool)
        return x * 2 if mask.all() and bool(mask.any()) else x

    torch.testing.assert_close(scope_of(masked, X).dense(), 2 * torch.eye(6).double())


def test_seeing_leaves_torch_as_it_was_also_after_a_refusal():
    apply = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(UnsupportedOpError):
        scope_of(inside(under_autocast), X)
    assert torch.autograd.Function.__dict__["apply"] is apply
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        pass
    assert interp.LinearScope(interp.attach(nn.Linear(6, 2).double()), X).check()
