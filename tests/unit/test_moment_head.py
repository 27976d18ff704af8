"""The moment head against its formulas written out in numpy, example by example."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from interp.hooks.errors import ArgumentError
from interp.probes import MomentHead
from interp.probes.covariance_norms import column_l2, eig_power, log_euclid, newton_schulz, signed_sqrt
from interp.probes.moment_head import pairs

LENGTHS = (5, 1, 9, 3)
WIDTH, CLASSES = 11, 3


def head(**options) -> MomentHead:
    """A small head in float64 whose gains and biases matter."""
    torch.manual_seed(1)
    made = MomentHead(WIDTH, CLASSES, **({"hidden": 32} | options)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made.eval()


def items():
    return [torch.randn(n, WIDTH, dtype=torch.float64) for n in LENGTHS]


def padded(examples, side="right", extra=0, fill=float("nan")):
    longest = max(map(len, examples)) + extra
    x = torch.full((len(examples), longest, WIDTH), fill, dtype=torch.float64)
    mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for i, item in enumerate(examples):
        place = slice(0, len(item)) if side == "right" else slice(longest - len(item), longest)
        x[i, place], mask[i, place] = item, True
    return x, mask


def erf(x):
    return np.vectorize(math.erf)(x)


def convolution(image, kernel):
    """3x3, stride 2, no padding, by its definition."""
    side = (image.shape[1] - 3) // 2 + 1
    out = np.zeros((len(kernel), side, side))
    for o in range(len(kernel)):
        for r in range(side):
            for c in range(side):
                out[o, r, c] = (kernel[o] * image[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3]).sum()
    return out


def by_hand(made, x, pairing, centre, norm, first, conv=True):
    """Logits and maps of one example [T, d], in numpy."""
    p = {name: value.detach().numpy() for name, value in made.named_parameters()}
    x = x.numpy()
    v = {"mean": x.mean(0), "last": x[-1], "cls": x[0]}[first]
    tokens = x[1:] if first == "cls" else x
    u = (tokens @ p["proj.weight"].T + p["proj.bias"]).reshape(len(tokens), 4, 8).transpose(1, 0, 2)
    z = (u - u.mean(2, keepdims=True)) / np.sqrt(u.var(2, keepdims=True) + 1e-5) * p["ln.weight"] + p["ln.bias"]
    if centre == "tokens":
        z = z - z.mean(1, keepdims=True)
    elif centre == "scalar":
        z = z - z.mean((1, 2), keepdims=True)
    index = {
        "near": [(0, 1), (1, 2), (2, 3)], "first": [(0, 1), (0, 2), (0, 3)], "halves": [(0, 2), (1, 3)],
        "all": [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], "self": [(0, 0), (1, 1), (2, 2), (3, 3)],
    }[pairing]  # fmt: skip
    maps = np.stack([z[j].T @ z[k] / len(tokens) for j, k in index])
    if norm == "column_l2":
        maps = maps / np.maximum(np.sqrt((maps**2).sum(1, keepdims=True)), 1e-6)
    elif norm == "signed_sqrt":
        maps = np.sign(maps) * np.sqrt(np.abs(maps) + 1e-6)
        maps = maps / max(np.sqrt((maps**2).sum()), 1e-6)
    r = maps
    if conv:
        r = convolution(maps, p["down.0.weight"])
        r = convolution(r * (1 + erf(r / np.sqrt(2))) / 2, p["down.2.weight"])
    one = p["classifier1.weight"] @ v + p["classifier1.bias"]
    two = p["classifier2.weight"] @ r.ravel() + p["classifier2.bias"]
    return (one + two) / 2, maps


@pytest.mark.parametrize("centre", ["tokens", "scalar", "none"])
@pytest.mark.parametrize(("pairing", "norm", "first", "conv"), [
    ("near", "column_l2", "mean", True), ("all", "column_l2", "mean", True), ("halves", "none", "last", True),
    ("first", "signed_sqrt", "cls", True), ("self", "none", "mean", False), ("near", "column_l2", "cls", False),
])  # fmt: skip
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_maps_are_the_formula(centre, pairing, norm, first, conv, side):
    made = head(pairing=pairing, centre=centre, norm=norm, first=first, conv=conv)
    examples = items() if first != "cls" else [torch.cat([t, t[:1] + 1]) for t in items()]
    x, mask = padded(examples, side)
    logits, maps = made(x, mask).detach().numpy(), made.maps(x, mask).detach().numpy()
    for i, example in enumerate(examples):
        expected, images = by_hand(made, example, pairing, centre, norm, first, conv)
        np.testing.assert_allclose(maps[i], images, atol=1e-10)
        np.testing.assert_allclose(logits[i], expected, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_padding_order_of_tokens_and_batch_mates_change_nothing(order, dtype, tolerance):
    made, examples = head(order=order).to(dtype), items()
    expected = torch.cat([made(t[None].to(dtype)) for t in examples])
    for side in ("left", "right"):
        for extra, fill in ((0, 0.0), (4, 1e6), (3, float("nan")), (2, float("inf"))):
            x, mask = padded(examples, side, extra, fill)
            torch.testing.assert_close(made(x.to(dtype), mask), expected, rtol=tolerance, atol=tolerance)
    shuffled = [t[torch.randperm(len(t))] for t in examples]
    torch.testing.assert_close(made(*padded(shuffled)).to(dtype), expected, rtol=tolerance, atol=tolerance)


def test_columns_have_norm_one_or_zero():
    made = head()
    norms = made.maps(*padded(items())).norm(dim=2)
    torch.testing.assert_close(norms[[0, 2, 3]], torch.ones(3, 3, 8).double(), rtol=0, atol=1e-6)
    assert torch.equal(norms[1], torch.zeros(3, 8).double())


def test_one_token_gives_zero_maps_and_finite_gradients():
    made = head()
    x = torch.randn(2, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    made(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())
    assert torch.equal(made.maps(x), torch.zeros(2, 3, 8, 8).double())


def test_one_token_without_centring_gives_the_outer_product_of_heads():
    made = head(centre="none", norm="none")
    x = torch.randn(2, 1, WIDTH, dtype=torch.float64)
    z = made.ln(made.proj(x[:, 0]).unflatten(1, (4, 8)))
    torch.testing.assert_close(made.maps(x)[:, 1], z[:, 1, :, None] * z[:, 2, None, :], rtol=1e-6, atol=1e-6)


def test_scalar_centring_is_none_while_the_layer_norm_has_unit_gain():
    torch.manual_seed(0)
    scalar, none = MomentHead(WIDTH, 2, hidden=32, centre="scalar"), MomentHead(WIDTH, 2, hidden=32, centre="none")
    none.load_state_dict(scalar.state_dict())
    x = torch.randn(3, 6, WIDTH)
    torch.testing.assert_close(scalar.maps(x), none.maps(x), rtol=0, atol=1e-6)
    with torch.no_grad():
        scalar.ln.bias.add_(0.5)
        none.ln.bias.add_(0.5)
    assert (scalar.maps(x) - none.maps(x)).abs().max() > 0.01


def test_order_one_and_a_second_branch_at_zero_are_the_linear_probe():
    linear = nn.Linear(WIDTH, CLASSES)
    x = torch.randn(4, 6, WIDTH)
    for made in (MomentHead(WIDTH, CLASSES, order=1), MomentHead(WIDTH, CLASSES, hidden=32, combine="sum")):
        made.classifier1.load_state_dict(linear.state_dict())
        assert torch.equal(made(x), linear(x.sum(1) / 6))
    learned = head(combine="learned")
    with torch.no_grad():
        learned.factors.copy_(torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(learned(x.double()), 2 * learned.classifier1(x.double().mean(1)))


@pytest.mark.parametrize(("width", "classes", "count"), [(768, 1000, 4_047_146), (576, 2, 302_764)])
def test_parameter_counts(width, classes, count):
    assert sum(p.numel() for p in MomentHead(width, classes).parameters()) == count


@pytest.mark.parametrize(("options", "inputs"), [
    ({}, 2883), ({"pairing": "all"}, 6 * 31**2), ({"hidden": 128}, 3 * 7**2), ({"hidden": 28}, 3),
    ({"hidden": 64, "heads": 8}, 7), ({"hidden": 12, "conv": False}, 27),
    ({"pairing": "self", "norm": "isqrt"}, 4 * 31**2),
])  # fmt: skip
def test_inputs_of_the_second_classifier(options, inputs):
    made = MomentHead(WIDTH, 2, **options)
    assert made.classifier2.in_features == inputs
    assert made(torch.randn(2, 5, WIDTH)).shape == (2, 2)


@pytest.mark.parametrize(("options", "match"), [
    ({"hidden": 30}, "hidden=30 with heads=4"), ({"hidden": 24}, "6 channels in each of 4 heads"),
    ({"heads": 1, "hidden": 32}, "pairing='near' of 1"), ({"heads": 3, "hidden": 33, "pairing": "halves"}, "halves"),
    ({"norm": "isqrt"}, "symmetric"), ({"centre": "batch"}, "centre='batch'"), ({"combine": "max"}, "combine"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(options, match, unchecked):
    with pytest.raises(ArgumentError, match=match):
        MomentHead(WIDTH, 2, **options)


# the authors' layout


class ReleasedTransformerHead(nn.Module):
    """The authors' head for transformers, written anew from its description: literals, and all."""

    def __init__(self, width, classes):
        super().__init__()
        self.proj, self.ln = nn.Linear(width, 512), nn.LayerNorm(128)
        self.classifier1, self.classifier2 = nn.Linear(width, classes), nn.Linear(2883, classes)
        layers = nn.Conv2d(3, 3, 3, 2, bias=False), nn.GELU(), nn.Conv2d(3, 3, 3, 2, bias=False)
        self.downblocks = nn.ModuleList([nn.Sequential(*layers)])

    def forward(self, x):
        z = [self.ln(part) for part in self.proj(x[:, 1:]).chunk(4, -1)]
        return (self.classifier1(x[:, 0]) + self.second(z)) / 2

    def second(self, z):
        z = [part - part.mean((1, 2), keepdim=True) for part in z]
        maps = torch.stack([a.mT @ b / a.shape[1] for a, b in itertools.pairwise(z)], 1)
        return self.classifier2(self.downblocks[0](nn.functional.normalize(maps, dim=2)).flatten(1))


class ReleasedConvolutionHead(ReleasedTransformerHead):
    """The same for feature maps [B, C, H, W]: 1x1 convolution, channel c in head c mod 4, the mean with a LayerNorm."""

    def __init__(self, width, classes):
        super().__init__(width, classes)
        del self.classifier1
        self.proj = nn.Conv2d(width, 512, 1)
        self.cls_head = nn.ModuleDict({"norm": nn.LayerNorm(width, eps=1e-6), "fc": nn.Linear(width, classes)})

    def forward(self, x):
        u = self.proj(x).flatten(2).mT
        z = [self.ln(u[:, :, k::4]) for k in range(4)]
        first = self.cls_head["fc"](self.cls_head["norm"](x.mean((2, 3))))
        return (first + self.second(z)) / 2


@pytest.mark.parametrize("prefix", ["", "module.head."])
def test_released_weights_of_transformers_give_the_released_logits(prefix):
    theirs, x = ReleasedTransformerHead(WIDTH, 5).double(), torch.randn(3, 8, WIDTH).double()
    nn.init.normal_(theirs.ln.bias)
    state = {prefix + key: value for key, value in theirs.state_dict().items()} | {"blocks.0.weight": torch.zeros(1)}
    torch.testing.assert_close(MomentHead.from_released(state).double()(x), theirs(x), rtol=1e-6, atol=1e-7)


def test_released_weights_of_convolutional_networks_give_the_released_logits():
    theirs, x = ReleasedConvolutionHead(WIDTH, 5).double(), torch.randn(3, WIDTH, 3, 4).double()
    nn.init.normal_(theirs.ln.bias)
    nn.init.normal_(theirs.cls_head["norm"].weight)
    made = MomentHead.from_released(theirs.state_dict()).double()
    torch.testing.assert_close(made(x.flatten(2).mT), theirs(x), rtol=1e-6, atol=1e-7)


def test_other_states_are_refused():
    state = ReleasedTransformerHead(WIDTH, 5).state_dict()
    with pytest.raises(ArgumentError, match="0 tensors named downblocks"):
        MomentHead.from_released({"weight": torch.zeros(2)})
    with pytest.raises(ArgumentError, match=r"without ln\.bias"):
        MomentHead.from_released({key: value for key, value in state.items() if key != "ln.bias"})
    with pytest.raises(ArgumentError, match="other shapes"):
        MomentHead.from_released(state | {"classifier2.weight": torch.zeros(5, 100)})


# normalisations


def covariance(q=16, tokens=64):
    x = torch.randn(3, tokens, q, dtype=torch.float64)
    return x.mT @ x / tokens


def test_newton_schulz_is_its_recursion_and_converges_to_the_root():
    s = covariance()
    y, z = s[0].numpy() / np.trace(s[0]), np.eye(16)
    for _ in range(5):
        t = (3 * np.eye(16) - z @ y) / 2
        y, z = y @ t, t @ z
    np.testing.assert_allclose(newton_schulz(s, 5)[0], np.sqrt(np.trace(s[0])) * y, rtol=1e-10)
    root = newton_schulz(s, 25)
    values, vectors = np.linalg.eigh(s[0].numpy())
    np.testing.assert_allclose(root[0], (vectors * np.sqrt(values)) @ vectors.T, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(root, root.mT, rtol=0, atol=1e-6)


def test_spectral_functions_are_those_of_the_eigenvalues():
    s = covariance()
    torch.testing.assert_close(eig_power(s) @ eig_power(s), s)
    torch.testing.assert_close(eig_power(s, 1.0), s)
    shifted = s + 1e-3 * s.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(16)
    torch.testing.assert_close(torch.linalg.matrix_exp(log_euclid(s)), shifted)
    assert torch.equal(log_euclid(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_norms_of_zeros_are_zeros_with_finite_gradients():
    for function in (column_l2, lambda m: signed_sqrt(m.flatten(1))):
        zero = torch.zeros(2, 3, 3, requires_grad=True)
        out = function(zero)
        out.sum().backward()
        assert not out.any()
        assert torch.isfinite(zero.grad).all()


def test_pairs():
    assert pairs(4, "all") == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert pairs(4, "first") == [(0, 1), (0, 2), (0, 3)]
