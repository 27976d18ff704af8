"""What is read from a scope of a picture or a vector: centred scores, origins, impulses, units, stability, files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import interp
from interp.hooks.errors import ArgumentError, InputError
from interp.hooks.linearization import Linearization
from interp.saving import load_result, save_result
from tests.nets import Call, draw, scope_of


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.one, self.two, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, stride=2), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(F.relu(self.two(F.relu(self.one(x)))).mean((2, 3)))


class Enlarger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)

    def forward(self, x):
        return F.pixel_shuffle(self.two(F.relu(self.one(x))), 2)


@pytest.fixture(scope="module")
def classes():
    return scope_of(Classifier(), draw(1, 3, 9, 9))


@pytest.fixture(scope="module")
def pictures():
    return scope_of(Enlarger(), draw(1, 3, 6, 7))


# Targets ---


def test_centred_votes_are_of_a_score_less_the_mean(classes):
    rows = classes.dense()
    wanted = ((rows[3] - rows.mean(0)).reshape(3, 9, 9) * classes.x[0]).sum(0)
    votes = classes.votes(3, centred=True)
    torch.testing.assert_close(votes.map, wanted, rtol=1e-10, atol=1e-13)
    assert votes.target == "3 - mean"
    assert votes.value == pytest.approx(float(classes.y[0, 3] - classes.y.mean()))
    report = classes.bias_report(3, centred=True)
    assert report.total == pytest.approx(votes.residual)
    assert report.target == votes.target


def test_centred_votes_do_not_see_a_common_shift(classes):
    net = Classifier()
    shifted = Call(lambda x: (y := net(x)) + y.sum(-1, keepdim=True) + 7.0, net=net)
    scope = scope_of(shifted, classes.x)
    for centred in (True, False):
        one, two = classes.votes(3, centred=centred), scope.votes(3, centred=centred)
        assert (abs(one.bias_share - two.bias_share) < 1e-9) == centred
        assert torch.allclose(one.map, two.map, atol=1e-10) == centred


def test_lists_and_boxes_are_means(classes, pictures):
    several = classes.votes(2, margin_to=[0, 1, 4])
    alone = [classes.votes(2, margin_to=k).map for k in (0, 1, 4)]
    torch.testing.assert_close(several.map, torch.stack(alone).mean(0))
    assert several.target == "2 - mean(0, 1, 4)"
    box = pictures.votes((slice(None), slice(2, 4), 5))
    assert box.target == "mean[:, 2:4, 5]"
    assert box.value == pytest.approx(float(pictures.y[0, :, 2:4, 5].mean()))
    wanted = (pictures.rows([(c, i, 5) for c in range(2) for i in (2, 3)]).mean(0) * pictures.x[0]).sum(0)
    torch.testing.assert_close(box.map, wanted, rtol=1e-10, atol=1e-13)


def test_targets_that_are_refused(classes, pictures):
    for call, text in (
        (lambda: classes.votes(3, margin_to=1, centred=True), "a margin is free"),
        (lambda: pictures.votes((0, 1, 1), centred=True), "centred outputs"),
        (lambda: classes.votes([]), "empty list"),
        (lambda: classes.votes([1, 9]), "index into outputs"),
        (lambda: pictures.votes((slice(None), 40, ...)), "out of bounds"),
    ):
        with pytest.raises(ArgumentError, match=text):
            call()


def test_votes_inside_a_window(classes):
    votes = classes.votes(1)
    assert votes.inside((slice(0, 4), slice(2, 9))) == pytest.approx(float(votes.map[:4, 2:].sum()))
    assert votes.inside(torch.ones(9, 9)) == pytest.approx(votes.total)
    with pytest.raises(ArgumentError, match="shape of the votes"):
        votes.inside(torch.ones(3, 9, 9))


def test_a_restricted_scope_is_a_part_of_its_matrix(pictures):
    part = pictures.restrict((..., slice(4, 8), slice(0, 3)), (slice(None), slice(1, 5), slice(0, 4)))
    whole = pictures.dense().reshape(2, 12, 14, 3, 6, 7)[:, 4:8, :3, :, 1:5, :4]
    torch.testing.assert_close(part.dense(), whole.reshape(24, 48), rtol=1e-10, atol=1e-13)
    assert part.linearization is pictures.linearization
    found = pictures.svd(2, window=(..., slice(4, 8), slice(0, 3)))
    assert found.linearization == "frozen"
    assert found.u[..., :4, :].abs().max() == 0


# Origins ---


class Grey:
    """Preprocessing of a picture of uint8 values."""

    def __call__(self, image):
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() - 100) / 50


def test_named_origins_and_what_carries_their_names():
    x = draw(1, 3, 9, 9)
    model = interp.attach(Classifier().double().eval(), preprocess=Grey(), check=False)
    wanted = {"zero": 0.0, "black": -2.0, "grey": 0.56, "mean": x.mean((2, 3), keepdim=True)}
    shares = set()
    for name, value in wanted.items():
        scope = interp.LinearScope(model, x, origin=name)
        torch.testing.assert_close(scope.origin, torch.as_tensor(value).double().expand(1, 3, 9, 9))
        given = interp.LinearScope(model, x, origin=torch.as_tensor(value).double())
        votes = scope.votes(2)
        assert votes.residual == pytest.approx(given.votes(2).residual)
        assert votes.origin == scope.bias_report(2).origin == name
        assert f"origin {name}" in repr(votes)
        shares.add(round(votes.bias_share, 6))
    assert len(shares) == 4, "the share depends on the origin"
    assert given.votes(2).origin.startswith("a tensor of norm")


def test_origins_that_are_not_defined_are_refused():
    for origin, x, error, text in (
        ("black", draw(1, 3, 9, 9), ArgumentError, "comes with its preprocessing"),
        ("white", draw(1, 3, 9, 9), ArgumentError, "'grey' or a tensor"),
        (torch.zeros(4), draw(1, 3, 9, 9), InputError, "broadcasts to"),
    ):
        with pytest.raises(error, match=text):
            scope_of(Classifier(), x, origin=origin)
    with pytest.raises(ArgumentError, match="origin='mean'"):
        scope_of(nn.Linear(4, 2), draw(1, 4), origin="mean")


# Impulses ---


def test_white_impulse_and_receptive_filter_are_sums_of_columns_and_rows(pictures, classes):
    whole = pictures.dense().reshape(2, 12, 14, 3, 6, 7)
    found = pictures.impulse_responses([(2, 3), (0, 6)])
    torch.testing.assert_close(found[0], whole[..., 2, 3].sum(-1), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found[1], whole[..., 0, 6].sum(-1), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(pictures.receptive_filter((7, 9)), whole[:, 7, 9].mean(0), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(classes.receptive_filter(1), classes.rows([1])[0])
    for call in (lambda: pictures.impulse_responses([(6, 0)]), lambda: pictures.receptive_filter((0, 14))):
        with pytest.raises(ArgumentError, match="inside"):
            call()
    with pytest.raises(ArgumentError, match="pixels of a picture"):
        scope_of(nn.Linear(4, 2), draw(1, 4)).impulse_responses([(0, 0)])


# Several references ---


def test_each_image_has_its_own_scope(classes):
    model, x = classes.model, draw(3, 3, 9, 9, seed=2)
    scopes = interp.LinearScope.each(model, x, origin="mean")
    for i, scope in enumerate(scopes):
        alone = interp.LinearScope(model, x[i : i + 1], origin="mean")
        assert torch.equal(scope.y, alone.y)
        assert torch.equal(scope.dense(), alone.dense())
        assert torch.equal(scope.votes(2).map, alone.votes(2).map)
    backwards = interp.LinearScope.each(model, x.flip(0), origin="mean")
    assert all(torch.equal(a.dense(), b.dense()) for a, b in zip(scopes, reversed(backwards), strict=True))
    assert not torch.allclose(scopes[0].dense(), scopes[1].dense()), "tapes are not shared"
    with pytest.raises(InputError, match=r"LinearScope\.each"):
        interp.LinearScope(model, x)


def test_examples_that_cannot_be_told_apart_are_refused():
    two = Call(lambda x: x)
    two.forward = lambda x, y: x + y
    with pytest.raises(InputError, match="2 examples in 2 arguments"):
        interp.LinearScope.each(interp.attach(two, check=False), (draw(2, 3), draw(2, 3)))


# Units ---


def test_units_say_what_is_on_saturated_and_out_of_proportion():
    x = torch.tensor([[-1.0, 2.0, 7.0, 0.5]], dtype=torch.float64)
    row = scope_of(lambda x: F.relu6(x), x).units[0]
    assert (row["on"], row["saturated"], row["largest"], row["note"]) == (0.5, 0.25, 1.0, "")
    silu = scope_of(lambda x: F.silu(x), x).units[0]
    assert silu["on"] == 1
    assert "saturated" not in silu
    assert silu["largest"] == pytest.approx(float(torch.sigmoid(x).max()))
    chord = Linearization("gain", overrides={"threshold": "chord"})
    jump = scope_of(lambda x: F.threshold(x, 0.01, 30.0), torch.tensor([[0.011, 2.0]]).double(), chord).units[0]
    assert jump["largest"] == pytest.approx((30 - 0.011) / 0.011)
    assert jump["note"] == "ill-conditioned"


# Stability ---


def test_stability_by_hand():
    net, x = Classifier().double().eval(), draw(1, 3, 20, 20)
    scope = scope_of(net, x)
    found = scope.stability(2, noise_std=0.3, samples=2, cell=6, seed=7)
    made = torch.Generator().manual_seed(7)
    gradient = lambda v: torch.autograd.functional.jacobian(lambda t: net(t)[0, 2], v)[0]
    cosine = lambda a, b: float(F.cosine_similarity(a.flatten(), b.flatten(), 0))
    cells = lambda v: F.avg_pool2d(F.pad(v[None], (0, 4, 0, 4)), 6)[0] * 36
    row, votes = gradient(x), (gradient(x) * x[0]).sum(0)
    for i in range(2):
        noisy = x + 0.3 * torch.randn(x.shape, generator=made).double()
        other = gradient(noisy)
        their = (other * noisy[0]).sum(0)
        assert float(found.cosines[i]) == pytest.approx(cosine(other, row), abs=1e-6)
        assert float(found.votes[i]) == pytest.approx(cosine(their, votes), abs=1e-6)
        assert float(found.cells[i]) == pytest.approx(cosine(cells(their), cells(votes)), abs=1e-6)
    assert found.cell == 6
    assert found.noise == pytest.approx(0.3 * x.numel() ** 0.5 / float(x.norm()), rel=0.05)


def test_votes_say_whether_their_stability_was_tested(classes):
    plain, tested = classes.votes(2), classes.votes(2, stability=True)
    assert "stability not tested" in repr(plain)
    assert "stability not tested" in plain.top(2).title
    assert tested.stability is not None
    for text in (repr(tested), tested.top(2).title):
        assert f"cosine of the row {tested.stability.mean_cosine:.3f}" in text
    assert torch.equal(plain.map, tested.map)
    smooth = scope_of(lambda x: F.silu(x), draw(1, 4)).stability((1,))
    assert "flip" not in smooth.caption
    for options in (dict(noise=0.1, noise_std=0.1), dict(noise_std=0.0), dict(samples=0), dict(cell=0)):
        with pytest.raises(ArgumentError, match="needed"):
            classes.stability(2, **options)


# Files ---


def assert_same(one, two):
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif hasattr(one, "__dataclass_fields__"):
        for name in one.__dataclass_fields__:
            assert_same(getattr(one, name), getattr(two, name))
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for name in one:
            assert_same(one[name], two[name])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


def test_every_reading_comes_back_bit_for_bit(classes, tmp_path):
    square = scope_of(nn.Linear(6, 6), draw(1, 6))
    results = [
        classes.votes(2, stability=True), classes.votes(1), classes.bias_report(1), classes.svd(2), square.eig(3),
        classes.stability(2, float64=True), classes.units,
    ]  # fmt: skip
    for i, result in enumerate(results[:-1]):
        save_result(result, tmp_path / str(i))
        back = load_result(tmp_path / str(i))
        assert_same(result, back)
        assert repr(back) == repr(result)
    save_result(results[-1], tmp_path / "units")
    assert load_result(tmp_path / "units").to_records() == results[-1].to_records()
    assert square.eig(3).values.is_complex()
