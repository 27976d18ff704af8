"""Probes from passes over blocks: the same as from the whole matrix, within a budget."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from interp.hooks.errors import ArgumentError, SizeError
from interp.probes import (
    LeaceEraser,
    LogisticProbe,
    MassMeanProbe,
    RidgeProbe,
    closed_forms,
    load_probe,
    stream_probes,
)
from interp.probes.erasure import oas
from interp.probes.inner_folds import label_folds
from interp.probes.site_fits import fit_sites
from interp.probes.site_moments import readers
from interp.probes.streaming import stream_fits

SMALL = "20kB"  # blocks of a dozen rows


def task(n=150, d=9, classes=2, seed=0):
    made = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = made.normal(size=(n, d)) @ made.normal(size=(d, d)) + 5
    x[:, 0] += y
    x[:, 4] = 2.5
    return x, y


def centred(logits):
    """Of more than two classes' logits only differences mean something."""
    return logits if logits.ndim == 1 else logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3])
def test_closed_forms_are_those_of_the_whole_matrix(classes):
    x, y = task(classes=classes)
    found = closed_forms({"a": x}, y, shrinkage=0.2, alpha=10.0, erasers=True, budget=SMALL)["a"]
    pairs = [(found.mass_mean, MassMeanProbe()), (found.ridge, RidgeProbe(10.0)),
             (found.lda, LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2))]  # fmt: skip
    for probe, other in pairs:
        other.fit(x, y)
        ours, theirs = (centred(p.decision_function(x)) for p in (probe, other))
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-7)
    eraser = LeaceEraser.fit(x, y)
    torch.testing.assert_close(found.eraser(torch.tensor(x)), eraser(torch.tensor(x)), rtol=1e-8, atol=1e-8)
    assert found.lda.direction(1).shape == (9,)


def test_shrinkage_and_penalty_are_chosen():
    x, y = task(40, 60)
    found = closed_forms({"a": x}, y, budget="1MiB")["a"]
    means = np.stack([x[y == k].mean(0) for k in (0, 1)])
    within = np.cov((x - means[y]).T, bias=True)
    std = np.where(np.diag(within) > 1e-20, np.sqrt(np.diag(within)), 1)
    amount = oas(torch.tensor(within / np.outer(std, std)), 40)
    shrunk = (1 - amount) * within + amount * np.diag(std**2)
    np.testing.assert_allclose(found.lda.coef_[0], np.linalg.solve(shrunk, means[1] - means[0]), rtol=1e-7, atol=1e-9)
    assert 0.05 < amount < 0.95
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    t, errors = 2.0 * y - 1, []
    for alpha in (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5):
        hat = z @ np.linalg.inv(z.T @ z + alpha * np.eye(60)) @ z.T + 1 / 40
        errors.append((((t - hat @ t) ** 2).sum()) / (1 - np.trace(hat) / 40) ** 2)
    assert found.ridge.alpha_ == (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)[int(np.argmin(errors))]


def test_a_closed_form_is_saved_as_its_probe(tmp_path):
    x, y = task()
    probe = closed_forms({"a": x}, np.array(["no", "yes"])[y])["a"].lda
    probe.save(tmp_path / "p.safetensors")
    back = load_probe(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(back.predict_proba(x), probe.predict_proba(x))
    assert back.predict(x)[0] in ("no", "yes")


@pytest.mark.parametrize(("n", "d", "classes"), [(150, 9, 2), (150, 9, 3), (40, 60, 2)])
def test_streamed_logistic_fits_are_those_of_the_whole_matrix(n, d, classes):
    x, y = task(n, d, classes)
    labels, grid = torch.tensor(y), [1e-3, 1e-1, 10.0]
    fold = label_folds(labels, None, 4, 0)
    ((_, _, blocks),) = readers({"a": x}, n, None, "mean", "240kB" if d == 60 else SMALL)
    assert len(list(blocks())) > 5
    solution, loss, *_ = stream_fits(blocks, labels, fold, grid, tol=1e-10)
    train = torch.stack([(fold != k).double() for k in range(4)])
    (whole,) = fit_sites([torch.tensor(x)], labels, train, grid, tol=1e-12)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.objective, whole.solution.objective, rtol=1e-8, atol=0)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-4, atol=1e-6)


def test_c_is_chosen_and_the_probe_is_the_logistic_one():
    x, y = task()
    groups = np.arange(150) // 3
    found = stream_probes({"a": x, "b": x[:, :3]}, y, groups=groups, budget="200kB", tol=1e-10)
    for site, features in (("a", x), ("b", x[:, :3])):
        other = LogisticProbe(tol=1e-10).fit(features, y, groups=groups)
        assert found[site].C_ == other.C_
        np.testing.assert_allclose(found[site].inner_loss_, other.inner_loss_, rtol=1e-3, atol=1e-5)
        ours, theirs = (probe.decision_function(features) for probe in (found[site], other))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert found[site].converged_
    assert found["a"].coef_[0, 4] == 0


@pytest.mark.parametrize("classes", [2, 3])
def test_folds_by_labels_are_stratified(classes):
    labels = torch.arange(60) % classes
    fold = label_folds(labels, None, 5, 0)
    counts = torch.stack([torch.bincount(fold[labels == k], minlength=5) for k in range(classes)])
    assert int(counts.min()) == int(counts.max())


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda x, y: closed_forms({"a": x}, y, budget="1kB"), SizeError, r"1,000 bytes; needed: [\d,]+ for 9 features"),
    (lambda x, y: closed_forms({"a": x}, y, sites=["b"]), ArgumentError, r"sites \['b'\]"),
    (lambda x, y: closed_forms({"a": x}, y[1:]), ArgumentError, "y of length 149 for 150"),
    (lambda x, y: closed_forms({"a": x}, 0 * y), ArgumentError, "1 class"),
    (lambda x, y: closed_forms({"a": np.where(x > 0, np.nan, x)}, y), ArgumentError, "NaN or infinity"),
    (lambda x, y: closed_forms({"a": x}, y, shrinkage=2.0), ArgumentError, "shrinkage=2.0"),
    (lambda x, y: closed_forms({"a": x}, y, alpha=-1.0), ArgumentError, "alpha=-1.0"),
    (lambda x, y: stream_probes({"a": x}, y, C=0), ArgumentError, "C=0"),
    (lambda x, y: stream_probes({"a": x}, y, pool="tokens"), ArgumentError, "pool='tokens'"),
    (lambda x, y: stream_probes({"a": x}, 0 * y), ArgumentError, "1 class"),
    (lambda x, y: stream_probes({"a": x}, y, folds=100), ArgumentError, "for 100 folds"),
])  # fmt: skip
def test_malformed_calls_are_refused(call, error, match, unchecked):
    with pytest.raises(error, match=match):
        call(*task())


def test_few_passes_are_said():
    x, y = task()
    assert not stream_probes({"a": x}, y, C=100.0, max_iter=2)["a"].converged_
