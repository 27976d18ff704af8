"""LEACE against its formula in numpy, and against every linear probe; what it does not erase."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from interp.hooks.errors import ArgumentError, ErasureError
from interp.probes import LeaceEraser, LeaceFitter, LogisticProbe, MomentFeatures, TokenSets, ablate_direction


def task(n=300, d=8, gap=1.0, classes=2, seed=0, share=0.7):
    made = np.random.default_rng(seed)
    y = (made.uniform(size=n) > share).astype(int) if classes == 2 else np.arange(n) % classes
    x = made.normal(size=(n, d)) @ made.normal(size=(d, d))
    x += gap * made.normal(size=(classes, d))[y]
    return x, y


def gap_of(x, y, scale):
    means = np.stack([x[y == k].mean(0) for k in np.unique(y)])
    return np.linalg.norm((means - x.mean(0)) / scale, axis=1).max()


def leace_by_hand(x, y):
    """r(x) = x - W^+ U U^T W (x - mu), in numpy, without standardisation."""
    mu, z = x.mean(0), np.eye(y.max() + 1)[y]
    values, vectors = np.linalg.eigh((x - mu).T @ (x - mu) / len(x))
    half = vectors * np.sqrt(values) @ vectors.T
    cross = (x - mu).T @ (z - z.mean(0)) / len(x)
    whitened = np.linalg.inv(half) @ cross
    u, s, _ = np.linalg.svd(whitened, full_matrices=False)
    u = u[:, s > 1e-10 * s.max()]
    return x - (x - mu) @ (half @ u @ u.T @ np.linalg.inv(half)).T


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e5])
def test_the_formula(classes, scale):
    x, y = task(classes=classes)
    eraser = LeaceEraser.fit(x * scale, y, shrinkage=0)
    assert eraser.rank == classes - 1
    np.testing.assert_allclose(eraser(x * scale) / scale, leace_by_hand(x, y), rtol=1e-9, atol=1e-9)
    moved = ((eraser(x * scale) - x * scale) ** 2).sum(1).mean()
    assert eraser.removed == pytest.approx(moved)
    assert eraser.variance == pytest.approx(scale**2 * x.var(0).sum())


@pytest.mark.parametrize("method", ["leace", "orth"])
@pytest.mark.parametrize("shrinkage", [0, 0.3, 1, "oas"])
@pytest.mark.parametrize("shape", [(300, 8), (40, 100)])
def test_class_means_are_equal_afterwards(method, shrinkage, shape):
    x, y = task(*shape, classes=3)
    eraser = LeaceEraser.fit(x, y, method=method, shrinkage=shrinkage)
    assert gap_of(eraser(x), y, x.std(0)) < 1e-6 * gap_of(x, y, x.std(0))
    assert eraser.residual < 1e-6


@pytest.mark.parametrize("gap", [1.0, 0.03, 0.01, 1e-4])
def test_a_weak_concept_is_erased_too(gap):
    made = np.random.default_rng(0)
    y = np.arange(2000) % 2
    x = made.normal(size=(2000, 5))
    for k in (0, 1):
        x[y == k] -= x[y == k].mean(0)
    x[:, 0] += gap * y
    erased = LeaceEraser.fit(x, y)(x)
    assert gap_of(erased, y, x.std(0)) < 1e-6 * gap_of(x, y, x.std(0))


def test_no_linear_probe_beats_the_majority_on_what_it_was_fitted_on():
    x, y = task()
    erased = LeaceEraser.fit(x, y)(x)
    for probe in (LogisticProbe(C=1.0), LogisticProbe(C=1e4), LogisticRegression(C=100, max_iter=1000)):
        assert probe.fit(x, y).score(x, y) > y.mean() + 0.1
        assert probe.fit(erased, y).score(erased, y) == pytest.approx(1 - y.mean())


def test_leace_moves_less_than_a_projection():
    x, y = task()
    moved = {m: LeaceEraser.fit(x, y, method=m, shrinkage=0).removed for m in ("leace", "orth")}
    assert moved["leace"] < moved["orth"]


def test_streaming_is_the_same_and_erasing_twice_is_erasing_once():
    x, y = task(classes=3)
    whole = LeaceEraser.fit(x, y)
    fitter = LeaceFitter(y)
    for start in range(0, 300, 37):
        fitter.update(x[start : start + 37], y[start : start + 37])
    np.testing.assert_allclose(fitter.eraser()(x), whole(x), atol=1e-10)
    np.testing.assert_allclose(whole(whole(x)), whole(x), atol=1e-10)
    assert whole(torch.as_tensor(x).float()).dtype == torch.float32
    assert whole(torch.as_tensor(x).reshape(3, 100, 8)).shape == (3, 100, 8)


def test_a_probe_of_second_moments_still_finds_what_is_in_the_covariance():
    made = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    tokens = []
    for label in y:
        t = torch.randn(20, 8, generator=made, dtype=torch.float64) + 0.5 * label
        t[:, 1] += 2 * label * t[:, 0]
        tokens.append(t)
    sets = TokenSets.from_list(tokens)
    erased = LeaceEraser.fit(sets, y)(sets)
    linear = LogisticProbe(C=1.0, pool="mean").fit(erased, y).score(erased, y)
    features = MomentFeatures(8)
    second = LogisticProbe(C=1.0).fit(features.fit_transform(erased), y).score(features.transform(erased), y)
    assert linear < 0.65
    assert second > 0.95


def test_constant_features_and_labels_without_effect():
    x, y = task()
    x[:, 3] = 2.0
    x[:, 4] = 0.1
    np.testing.assert_allclose(LeaceEraser.fit(x, y)(x)[:, 3:5], x[:, 3:5], rtol=1e-12)
    flat = np.tile([[1.0, 2.0], [3.0, 5.0]], (10, 1))
    assert LeaceEraser.fit(flat, np.repeat([0, 1], 2).repeat(5)).residual < 1e-6


def test_a_concept_that_is_left_is_an_error(monkeypatch):
    from interp.probes import erasure

    x, y = task(gap=0.01)
    monkeypatch.setattr(erasure, "_SMALLEST", 1e3)
    with pytest.raises(ErasureError, match="still at 1 of its distance"):
        LeaceEraser.fit(x, y)


def test_a_direction_is_ablated_to_its_mean():
    step = ablate_direction("0", torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]))
    x = torch.randn(5, 2, dtype=torch.float64)
    v, mu = torch.tensor([0.6, 0.8]).double(), torch.tensor([1.0, 0.0]).double()
    expected = x - ((x - mu) @ v)[:, None] * v
    found = step.apply(x, None)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found @ v, torch.full((5,), float(mu @ v)).double())


@pytest.mark.parametrize(("call", "match"), [
    (lambda x, y: LeaceEraser.fit(x, y * 0), "1 class"), (lambda x, y: LeaceEraser.fit(x, y[1:]), "length 299"),
    (lambda x, y: LeaceEraser.fit(x, y, method="svd"), "method"), (lambda x, y: LeaceEraser.fit(x * np.nan, y), "NaN"),
    (lambda x, y: LeaceEraser.fit(x, y, shrinkage=2), "shrinkage"),
    (lambda x, y: LeaceFitter([0, 1]).update(x, y + 5), "labels"),
    (lambda x, y: LeaceFitter([0, 1]).eraser(), "no act"),
    (lambda x, y: LeaceFitter([0, 1, 2]).update(x, y).eraser(), "no example of 2"),
    (lambda x, y: LeaceEraser.fit(x, y)(x[:, 1:]), "width 7"),
    (lambda x, y: LeaceFitter(y).update(x, y).update(x[:, 1:], y), "7 features"),
    (lambda x, y: ablate_direction("a", np.zeros(3), np.zeros(3)), "norm 0"),
])  # fmt: skip
def test_malformed_calls_are_refused(call, match, unchecked):
    with pytest.raises(ArgumentError, match=match):
        call(*task())
