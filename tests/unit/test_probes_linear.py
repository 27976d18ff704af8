"""Vector probes: against scikit-learn and formulas, directions, the scikit-learn contract, malformed input."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_validate
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from interp.hooks.errors import ArgumentError
from interp.probes import BilinearProbe, CCSProbe, KNNProbe, LDAProbe, LogisticProbe, MassMeanProbe, RidgeProbe
from interp.probes.contrast import contrast_loss

LINEAR = [LogisticProbe(C=1.0), RidgeProbe(), MassMeanProbe(), LDAProbe()]
VECTOR = [*LINEAR, KNNProbe(), BilinearProbe(rank=3, C=1.0)]


def data(n=120, d=6, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return rng.normal(size=(n, d)) * np.arange(1, d + 1) + 3 + 2 * rng.normal(size=(classes, d))[y], y


@pytest.mark.parametrize(("probe", "check"), [
    pytest.param(probe, check, id=f"{type(probe).__name__}-{number}")
    for probe in [*VECTOR, LogisticProbe()]
    for number, (_, check) in enumerate(estimator_checks_generator(probe, mark="skip"))
])  # fmt: skip
def test_the_contract_of_scikit_learn(probe, check, unchecked):
    if "array_api" in str(check):
        pytest.skip("needs SCIPY_ARRAY_API in the environment")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(probe)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_is_scikit_learns_on_standardised_features(classes):
    x, y = data(classes=classes)
    scaler = StandardScaler().fit(x)
    other = LogisticRegression(C=0.3, tol=1e-10, max_iter=10000).fit(scaler.transform(x), y)
    probe = LogisticProbe(C=0.3).fit(x, y)
    np.testing.assert_allclose(probe.coef_ * scaler.scale_, other.coef_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(probe.predict_proba(x), other.predict_proba(scaler.transform(x)), atol=1e-6)


def test_balanced_weights_are_scikit_learns():
    x, y = data()
    y[:70] = 0
    scaled = StandardScaler().fit_transform(x)
    other = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=10000).fit(scaled, y)
    probe = LogisticProbe(C=1.0, class_weight="balanced", standardize=False).fit(scaled, y)
    np.testing.assert_allclose(probe.coef_, other.coef_, rtol=1e-4)


def test_c_is_the_one_of_least_held_out_loss():
    x, y = data(200, 30)
    probe = LogisticProbe(grid=(1e-4, 1e-2, 1.0, 100.0)).fit(x, y)
    assert probe.inner_loss_.shape == (5, 4)
    assert probe.grid[probe.inner_loss_.mean(0).argmin()] == probe.C_
    assert probe.converged_
    grouped = LogisticProbe().fit(x, y, groups=np.arange(200) // 20)
    assert grouped.inner_loss_.shape == (5, 7)


def test_ridge_is_scikit_learns():
    x, y = data(80, 10, classes=3)
    scaled, grid = StandardScaler().fit_transform(x), (0.1, 1.0, 10.0, 100.0)
    other = RidgeClassifierCV(grid, store_cv_results=True).fit(scaled, y)
    probe = RidgeProbe(grid=grid, standardize=False).fit(scaled, y)
    assert probe.alpha_ == other.alpha_
    np.testing.assert_allclose(probe.coef_, other.coef_, rtol=1e-8)
    np.testing.assert_allclose(probe.loo_error_, other.cv_results_.mean((0, 1)), rtol=1e-8)


def test_leave_one_out_is_leaving_one_out():
    x, y = data(25, 4)
    probe = RidgeProbe(2.0, standardize=False).fit(x, y)
    errors = []
    for i in range(25):
        kept = np.arange(25) != i
        # the mean of the features is that of all examples, as in the closed form; leaving it out too is another fit
        z, t = np.c_[x - x.mean(0), np.ones(25)], 2.0 * y - 1
        penalty = np.diag([2.0] * 4 + [0.0])
        w = np.linalg.solve(z[kept].T @ z[kept] + penalty, z[kept].T @ t[kept])
        errors.append((t[i] - z[i] @ w) ** 2)
    assert probe.loo_error_[0] == pytest.approx(np.mean(errors), rel=1e-10)


def test_leaving_groups_out_is_leaving_groups_out():
    x, y = data(24, 4)
    groups, weights = np.arange(24) // 3, 1.0 + np.arange(24) % 2
    probe = RidgeProbe(2.0, standardize=False).fit(x, y, sample_weight=weights, groups=groups)
    z, t = np.c_[x - np.average(x, axis=0, weights=weights), np.ones(24)], 2.0 * y - 1
    errors = []
    for g in range(8):
        kept = groups != g
        inside = z[kept].T * weights[kept]
        w = np.linalg.solve(inside @ z[kept] + np.diag([2.0] * 4 + [0.0]), inside @ t[kept])
        errors.append((t[~kept] - z[~kept] @ w) ** 2)
    assert probe.loo_error_[0] == pytest.approx(np.average(np.concatenate(errors), weights=weights), rel=1e-10)
    alone = RidgeProbe().fit(x, y, groups=np.arange(24))
    np.testing.assert_allclose(alone.loo_error_, RidgeProbe().fit(x, y).loo_error_)
    with pytest.raises(ArgumentError, match="all examples in one group"):
        RidgeProbe().fit(x, y, groups=np.zeros(24))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("shrinkage", [0.3, "auto"])
def test_discriminant_analysis_is_scikit_learns(classes, shrinkage):
    x, y = data(classes=classes)
    other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, y)
    probe = LDAProbe(shrinkage).fit(x, y)
    np.testing.assert_allclose(probe.decision_function(x), other.decision_function(x), rtol=1e-6)


def test_mass_mean_is_the_difference_of_means_with_the_threshold_midway():
    x, y = data()
    probe = MassMeanProbe().fit(x, y)
    low, high = x[y == 0].mean(0), x[y == 1].mean(0)
    direction = probe.direction().numpy()
    np.testing.assert_allclose(direction / np.linalg.norm(direction), (high - low) / np.linalg.norm(high - low))
    assert probe.decision_function([(low + high) / 2])[0] == pytest.approx(0, abs=1e-10)
    within = ((x - np.where(y[:, None], high, low)) @ (high - low) / np.linalg.norm(high - low)).var()
    assert probe.decision_function([high])[0] == pytest.approx(((high - low) ** 2).sum() / 2 / within)
    many, labels = data(classes=4)
    means = np.stack([many[labels == k].mean(0) for k in range(4)])
    nearest = ((many[:, None] - means) ** 2).sum(2).argmin(1)
    np.testing.assert_array_equal(MassMeanProbe().fit(many, labels).predict(many), nearest)


def test_neighbours_are_scikit_learns():
    x, y = data(100, classes=3)
    test, _ = data(40, seed=1)
    other = KNeighborsClassifier(7, metric="cosine").fit(x, y)
    np.testing.assert_allclose(KNNProbe(7).fit(x, y).predict_proba(test), other.predict_proba(test))


@pytest.mark.parametrize("classes", [2, 3])
def test_the_quadratic_form_is_the_logit(classes):
    x, y = data(classes=classes)
    probe = BilinearProbe(4, C=1.0).fit(x, y)
    form, linear, offset = probe.quadratic_form(1)
    v = torch.as_tensor(x)
    found = ((v @ form) * v).sum(1) + v @ linear + offset
    logits = probe.decision_function(x)
    expected = logits if classes == 2 else logits[:, 1] - logits.mean(1)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(form, form.T)


def test_the_bilinear_probe_sees_a_product_and_a_linear_one_does_not():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    assert BilinearProbe(5).fit(x[:300], y[:300]).score(x[300:], y[300:]) > 0.9
    assert LogisticProbe().fit(x[:300], y[:300]).score(x[300:], y[300:]) < 0.65


@pytest.mark.parametrize("probe", LINEAR, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_direction_is_the_gradient_of_the_logit(probe, classes):
    x, y = data(classes=classes)
    names = np.array(["b", "a", "c"])[y]
    probe.fit(x, names)
    observable = probe.observable("blocks.3.hook_resid_post", "b")
    logits = probe.decision_function(x)
    expected = logits if classes == 2 else logits[:, 1] - logits.mean(1)
    found = x @ observable.vector.numpy() + observable.offset
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert str(observable.site) == "blocks.3.hook_resid_post"
    if classes == 2:
        assert torch.equal(probe.direction("a"), -probe.direction())
        assert torch.equal(probe.direction("b"), probe.direction())
    else:
        with pytest.raises(ArgumentError, match="no label for 3 classes"):
            probe.direction()
    with pytest.raises(ArgumentError, match="label='z'"):
        probe.direction("z")


@pytest.mark.parametrize("probe", VECTOR, ids=lambda p: type(p).__name__)
def test_tensors_give_tensors_and_the_same_numbers(probe):
    x, y = data()
    x = x.astype(np.float32)
    arrays = probe.fit(x, y)
    expected, labels = arrays.predict_proba(x), arrays.predict(x)
    tensors = probe.fit(torch.as_tensor(x), torch.as_tensor(y))
    found = tensors.predict_proba(torch.as_tensor(x))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    assert torch.equal(tensors.predict(torch.as_tensor(x)), torch.as_tensor(labels))


def test_rotations_of_unstandardised_features_change_nothing():
    x, y = data()
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    plain = LogisticProbe(C=0.1, standardize=False).fit(x, y).predict_proba(x)
    turned = LogisticProbe(C=0.1, standardize=False).fit(x @ rotation, y).predict_proba(x @ rotation)
    np.testing.assert_allclose(plain, turned, atol=1e-6)


def test_constant_features_have_weight_zero():
    x, y = data()
    x[:, 2] = 7.0
    assert LogisticProbe(C=1.0).fit(x, y).coef_[0, 2] == 0
    assert abs(RidgeProbe().fit(x, y).coef_[0, 2]) < 1e-12


def test_searches_pipelines_and_groups():
    x, y = data()
    search = GridSearchCV(LogisticProbe(C=1.0), {"C": [0.01, 1.0]}, cv=3).fit(x, y)
    assert search.best_params_["C"] in (0.01, 1.0)
    scores = cross_validate(make_pipeline(StandardScaler(), MassMeanProbe()), x, y, groups=np.arange(120) // 10,
                            cv=GroupKFold(3))  # fmt: skip
    assert len(scores["test_score"]) == 3


@pytest.mark.parametrize("probe", VECTOR, ids=lambda p: type(p).__name__)
def test_malformed_input_is_refused(probe, unchecked):
    x, y = data()
    with pytest.raises(NotFittedError):
        type(probe)().predict(x)
    with pytest.raises(ValueError, match=r"1 class: .*at least 2 classes"):
        probe.fit(x, np.zeros(120))
    with pytest.raises(ValueError, match="length 119 for 120"):
        probe.fit(x, y[1:])
    with pytest.raises(ValueError, match="NaN"):
        probe.fit(np.where(x == x[3, 2], np.nan, x), y)
    with pytest.raises(ValueError, match="NaN or infinity at 1 valid tokens"):
        probe.fit(torch.as_tensor(np.where(x == x[3, 2], np.inf, x)), y)
    probe.fit(x, y)
    with pytest.raises(ValueError, match="5 features"):
        probe.predict(x[:, 1:])
    with pytest.raises(ValueError, match="5 features"):
        probe.predict(torch.as_tensor(x[:, 1:]))
    with pytest.raises(ValueError, match=r"labels \[9\] in y"):
        probe.score(x, np.where(y == 1, 9, y))
    with pytest.raises(ValueError, match="a mask for features"):
        probe.predict(x, mask=np.ones((120, 1), dtype=bool))


@pytest.mark.parametrize(("probe", "params", "match"), [
    (LogisticProbe, {"C": 0}, "C=0"), (LogisticProbe, {"C": "best"}, "C='best'"),
    (RidgeProbe, {"alpha": -1}, "alpha=-1"), (KNNProbe, {"k": 0}, "k=0"),
    (LogisticProbe, {"C": 1.0, "class_weight": {7: 2.0}}, "class_weight"),
    (LogisticProbe, {"folds": 90}, "90 folds"),
])  # fmt: skip
def test_malformed_parameters_are_refused(probe, params, match, unchecked):
    with pytest.raises(ArgumentError, match=match):
        probe(**params).fit(*data())


def test_a_fit_that_stops_early_says_so():
    from sklearn.exceptions import ConvergenceWarning

    with pytest.warns(ConvergenceWarning, match="not converged after 2 iterations"):
        probe = LogisticProbe(C=1e3, max_iter=2).fit(*data())
    assert not probe.converged_


def contrast(n=80, d=10, seed=0):
    """Pairs whose truth is along one direction; x+ and x- also differ by a constant."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    truth, kind = torch.randn(2, d, generator=generator)
    sign = (2 * y[:, None] - 1) * truth
    noise = torch.randn(n, 2, d, generator=generator) * 0.2
    return torch.stack([sign + kind, -sign - kind], 1) + noise, y


def test_contrast_search_finds_truth_without_labels():
    pairs, y = contrast()
    probe = CCSProbe(4, steps=300).fit(pairs)
    assert not probe.sign_known_
    assert probe.score(pairs, y) > 0.95
    assert probe.loss_ == probe.losses_.min()
    p = torch.as_tensor(probe._scaled(pairs.double()) @ torch.as_tensor(probe.coef_) + probe.intercept_).sigmoid()
    assert probe.loss_ == pytest.approx(float(contrast_loss(p[..., None])))
    labelled = CCSProbe(4, steps=300).fit(pairs, torch.where(torch.arange(80) < 6, y, -1))
    assert labelled.sign_known_
    assert (labelled.predict(pairs) == y).float().mean() > 0.95
    rows = labelled.report(pairs, y).to_records()
    assert [row["accuracy"] > 0.9 for row in rows] == [True, True]
    assert str(labelled.observable("blocks.1.hook_resid_post").site) == "blocks.1.hook_resid_post"


def test_contrast_search_refuses_what_are_no_pairs(unchecked):
    pairs, y = contrast()
    for wrong, match in ((pairs[:, 0], "shape"), (pairs.repeat(1, 2, 1), r"\[80, 4, 10\]"), (pairs / 0, "NaN")):
        with pytest.raises(ArgumentError, match=match):
            CCSProbe(1, steps=2).fit(wrong)
    with pytest.raises(ArgumentError, match="-1 where unknown"):
        CCSProbe(1, steps=2).fit(pairs, y + 1)
