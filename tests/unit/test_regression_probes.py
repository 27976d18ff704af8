"""Probes of numbers: ridge against scikit-learn's, and held-out R² against the loop that it stands for."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, KFold, LeaveOneGroupOut, cross_val_predict
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from interp.hooks.errors import ArgumentError
from interp.probes import MassMeanProbe, RidgeRegression, TokenSets, evaluate, sweep


def task(n=120, d=6, noise=0.5, seed=0):
    made = np.random.default_rng(seed)
    x = made.normal(size=(n, d)) * np.arange(1, d + 1) + 3
    return x, x[:, 0] - 0.5 * x[:, 1] + noise * made.normal(size=n) + 7


@parametrize_with_checks([RidgeRegression(alpha=1.0)])
def test_the_contract_of_scikit_learn(estimator, check, unchecked):
    check(estimator)


def test_the_fit_is_scikit_learns():
    x, y = task()
    z = StandardScaler().fit_transform(x)
    weights = np.random.default_rng(1).integers(0, 3, len(y)).astype(float)
    for alpha in (0.1, 100.0):
        np.testing.assert_allclose(RidgeRegression(alpha).fit(x, y).predict(x), Ridge(alpha).fit(z, y).predict(z))
    expected = RidgeRegression(1.0).fit(np.repeat(x, weights.astype(int), 0), np.repeat(y, weights.astype(int)))
    np.testing.assert_allclose(RidgeRegression(1.0).fit(x, y, weights).coef_, expected.coef_)
    grid = (1e-2, 1.0, 30.0, 1e3)
    found = RidgeRegression(grid=grid).fit(x, y)
    theirs = RidgeCV(grid, store_cv_results=True).fit(z, y)
    assert found.alpha_ == theirs.alpha_
    np.testing.assert_allclose(found.loo_error_, theirs.cv_results_.mean(0), rtol=1e-6)
    torch.testing.assert_close(
        found.direction() @ torch.as_tensor(x).T + found.intercept_, torch.as_tensor(found.predict(x))
    )


def test_groups_are_left_out_as_wholes():
    x, y = task(40)
    groups = np.arange(40) // 4
    z = StandardScaler().fit_transform(x)
    found = RidgeRegression(grid=(5.0,)).fit(x, y, groups=groups)
    left_out = cross_val_predict(Ridge(5.0), z, y, groups=groups, cv=LeaveOneGroupOut())
    np.testing.assert_allclose(found.loo_error_[0], ((y - left_out) ** 2).mean())


def test_scores_are_held_out_and_controls_are_near_nothing():
    x, y = task()
    found = evaluate(RidgeRegression(1.0), x, y, seeds=(0, 3), controls=2, untrained=task(seed=9)[0])
    by_hand = [cross_val_predict(RidgeRegression(1.0), x, y, cv=KFold(5, shuffle=True, random_state=s)) for s in (0, 3)]
    np.testing.assert_allclose(found.predicted, by_hand)
    each = [r2_score(y, p) for p in by_hand]
    assert found.r2.estimate == pytest.approx(np.mean(each))
    assert found.spread == pytest.approx(np.std(each, ddof=1))
    assert found.spearman == pytest.approx(np.mean([spearmanr(y, p).statistic for p in by_hand]))
    assert found.r2.low < found.r2.estimate < found.r2.high
    assert found.r2.estimate > 0.8 > 0.1 > max(*found.controls, found.untrained)
    assert [r["what"] for r in found.to_records()][-2:] == ["r2 on shuffled values", "r2 on an untrained copy"]
    assert "decodable, use not tested" in str(found)


def test_groups_and_equal_texts_are_not_cut():
    x, y = task(60)
    groups = np.arange(60) // 3
    found = evaluate(RidgeRegression(1.0), x, y, groups=groups, controls=0)
    folds = GroupKFold(5, shuffle=True, random_state=0)
    np.testing.assert_allclose(
        found.predicted[0], cross_val_predict(RidgeRegression(1.0), x, y, groups=groups, cv=folds)
    )
    assert found.groups == 20
    assert "no control was run" in str(found)
    told = evaluate(RidgeRegression(1.0), x, y, texts=[f"text {i // 2}" for i in range(60)], controls=0)
    assert (told.duplicates, told.groups) == (30, 30)
    with pytest.raises(ArgumentError, match=r"KFold cuts \d+ of the groups"):
        evaluate(RidgeRegression(1.0), x, y, groups=groups, folds=KFold(5, shuffle=True, random_state=1))


def test_token_sets_are_pooled():
    x, y = task(30)
    sets = TokenSets.from_list([np.stack([row - 1, row + 1]) for row in x])
    np.testing.assert_allclose(RidgeRegression(1.0).fit(sets, y).coef_, RidgeRegression(1.0).fit(x, y).coef_)


@pytest.mark.parametrize(("y", "match"), [
    (np.zeros(120), "0.0 everywhere"),
    (np.full(120, np.nan), "120 NaN or infinity"),
    (np.zeros(119), "length 119 for 120"),
    (np.array(["a", "b"] * 60), "one number for each example"),
])  # fmt: skip
def test_malformed_values_are_refused(y, match):
    with pytest.raises(ArgumentError, match=match):
        evaluate(RidgeRegression(1.0), task()[0], y)


def test_a_sweep_over_classes_refuses_probes_of_numbers(unchecked):
    x, _ = task()
    with pytest.raises(ArgumentError, match=r"evaluate\(\) takes regressors"):
        sweep({"a": x}, np.arange(120) % 2, [MassMeanProbe(), RidgeRegression()])
