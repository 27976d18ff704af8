"""The batched logistic solver against scikit-learn, and inner folds."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from interp.hooks.errors import ArgumentError
from interp.probes.inner_folds import inner_folds
from interp.probes.logistic_path import solve_path
from interp.probes.logistic_solver import solve_logistic
from interp.probes.site_fits import fit_sites

C = (1e-4, 1e-2, 1.0, 1e2)


def problem(n, d, classes, seed=0):
    """Features of very different scales, correlated, with an offset; classes overlap."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, d)) * np.logspace(-1, 2, d)) @ rng.normal(size=(d, d)) / d + 3
    score = x[:, :4].sum(1) / x[:, :4].sum(1).std() + rng.normal(size=n)
    y = np.searchsorted(np.quantile(score, np.linspace(0, 1, classes + 1)[1:-1]), score)
    folds = np.ones((3, n))
    held = rng.permutation(n) % 2
    folds[0, held == 0] = 0
    folds[1, held == 1] = 0
    return torch.as_tensor(x), torch.as_tensor(y), torch.as_tensor(folds)


def objective(z, y, coef, intercept, penalty):
    """In numpy, from scratch: one logit for two classes."""
    logits = z @ coef.T + intercept
    logits = np.hstack([np.zeros_like(logits), logits]) if len(coef) == 1 else logits
    top = logits.max(1, keepdims=True)
    loss = np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(y)), y]
    return loss.sum() + penalty / 2 * (coef**2).sum()


@pytest.mark.parametrize(("n", "d", "classes"), [(200, 20, 2), (60, 90, 2), (200, 20, 4), (60, 90, 3)])
def test_every_column_is_at_scikit_learns_minimum(n, d, classes):
    x, y, folds = problem(n, d, classes)
    (fit,), (fine,) = fit_sites([x], y, folds, C), fit_sites([x], y, folds, C, tol=1e-13)
    assert bool(fit.solution.converged.all())
    for f in range(len(folds)):
        train = folds[f].bool().numpy()
        scaler = StandardScaler().fit(x.numpy()[train])
        z, labels = scaler.transform(x.numpy()[train]), y.numpy()[train]
        for i, c in enumerate(C):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other = LogisticRegression(C=c, tol=1e-10, max_iter=20000).fit(z, labels)
            raw, intercept = fit.weights[f, i].numpy(), fit.intercepts[f, i].numpy()
            ours = objective(z, labels, raw * scaler.scale_, intercept + raw @ scaler.mean_, 1 / c)
            theirs = objective(z, labels, other.coef_, other.intercept_, 1 / c)
            assert (ours - theirs) / theirs < 1e-6
            assert ours == pytest.approx(float(fit.solution.objective[f * len(C) + i]), rel=1e-6)
            logits = x.numpy() @ fine.weights[f, i].numpy().T + fine.intercepts[f, i].numpy()
            ours_say = (logits[:, 0] > 0).astype(int) if classes == 2 else logits.argmax(1)
            scores = other.decision_function(scaler.transform(x.numpy()))
            margin = np.abs(scores) if classes == 2 else np.diff(np.sort(scores, 1)[:, -2:], axis=1)[:, 0]
            same = ours_say == other.predict(scaler.transform(x.numpy()))
            assert same[margin > 1e-4].all()


def test_sites_columns_and_order_do_not_matter():
    x, y, folds = problem(120, 15, 2)
    wide = torch.cat([x, x[:, :5] ** 2], 1)
    both = fit_sites([x, wide], y, folds, C, tol=1e-16)
    for site, fit in zip([x, wide], both, strict=True):
        (alone,) = fit_sites([site], y, folds[1:2], C[::-1], tol=1e-16)
        torch.testing.assert_close(fit.weights[1], alone.weights[0].flip(0), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(fit.loss[1], alone.loss[0].flip(0), rtol=1e-6, atol=0)


def newton(z, y, weights, penalty, scales2):
    """The objective, and its least value by damped Newton steps on weights and intercept, in numpy."""
    design, ridge = np.hstack([z, np.ones((len(z), 1))]), np.append(penalty * scales2, 0.0)

    def value(theta):
        logits = design @ theta
        return (weights * (np.logaddexp(0, logits) - y * logits)).sum() + (ridge * theta**2).sum() / 2

    theta = np.zeros(len(ridge))
    for _ in range(60):
        p = 1 / (1 + np.exp(-design @ theta))
        gradient = design.T @ (weights * (p - y)) + ridge * theta
        hessian = (design.T * (weights * p * (1 - p))) @ design + np.diag(ridge)
        step, length = np.linalg.solve(hessian, gradient), 1.0
        while value(theta - length * step) > value(theta) and length > 1e-9:
            length /= 2
        theta = theta - length * step
    return value, value(theta)


@pytest.mark.parametrize(
    ("penalties", "size"), [((1e3, 10.0, 0.1), 1.0), ((0.1, 1e3, 10.0), 1.0), ((1e-3,), 1.0), ((1e-3, 1.0), 300.0)]
)
def test_a_path_is_at_newtons_minimum_in_any_order_and_where_float32_fails(penalties, size):
    x, y, folds = problem(80, 60, 2)
    z = size * (x - x.mean(0)) / x.std(0)
    weights = folds.T * torch.as_tensor(np.random.default_rng(1).integers(1, 4, 80))[:, None]
    scales = torch.as_tensor(np.random.default_rng(2).uniform(0.5, 2, (60, 3)))
    found = solve_path(z, y, weights, torch.tensor(penalties, dtype=torch.float64), scales, tol=1e-9)
    assert bool(found.converged.all())
    for fold in range(3):
        for i, penalty in enumerate(penalties):
            column = fold * len(penalties) + i
            value, least = newton(z.numpy(), y.numpy(), weights[:, fold].numpy(), penalty, scales[:, fold].numpy() ** 2)
            mine = value(np.append(found.weights[:, column, 0].numpy(), float(found.intercepts[column, 0])))
            assert mine <= least * (1 + 1e-7)
            assert mine == pytest.approx(float(found.objective[column]), rel=1e-9, abs=1e-14)


def test_a_path_takes_few_steps():
    x, y, folds = problem(80, 60, 2)
    z = (x - x.mean(0)) / x.std(0) + 0.3
    penalties = torch.tensor([10.0**k for k in range(-2, 5)], dtype=torch.float64)
    found = solve_path(z, y, folds.T, penalties, torch.ones(60, 3).double(), tol=1e-5)
    assert float(found.iterations.double().mean()) < 4.2


def test_held_out_loss_is_the_mean_log_loss_of_what_a_fold_leaves_out():
    x, y, folds = problem(100, 8, 3)
    (fit,) = fit_sites([x], y, folds, [1.0])
    held = folds[0] == 0
    logits = x[held] @ fit.weights[0, 0].T + fit.intercepts[0, 0]
    assert float(fit.loss[0, 0]) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y[held])), rel=1e-9)
    assert bool(fit.loss[2].isnan())


def test_weights_are_copies():
    x, y, _ = problem(50, 6, 2)
    weights = torch.as_tensor(np.random.default_rng(0).integers(0, 3, 50)).double()
    (weighted,) = fit_sites([x], y, weights[None], [1.0], tol=1e-14)
    copies = weights.long()
    repeated, labels = x.repeat_interleave(copies, 0), y.repeat_interleave(copies)
    (copied,) = fit_sites([repeated], labels, torch.ones(1, len(labels)).double(), [1.0], tol=1e-14)
    torch.testing.assert_close(weighted.weights, copied.weights, rtol=1e-6, atol=1e-9)


def test_too_few_iterations_are_said():
    x, y, folds = problem(100, 30, 2)
    (fit,) = fit_sites([x], y, folds, [1e4], max_iter=3)
    assert not bool(fit.solution.converged.any())


def test_a_penalty_of_zero_is_refused():
    x, y, folds = problem(20, 3, 2)
    with pytest.raises(ArgumentError, match="penalty"):
        solve_logistic(x, y, 2, folds.T, torch.zeros(3).double())


def test_inner_folds_keep_equal_rows_together_and_do_not_depend_on_order():
    rows = torch.randn(30, 4).double()
    x, y = rows.repeat(2, 1), (torch.arange(30) % 3).repeat(2)
    fold = inner_folds(x, y, None, None, 0)
    assert torch.equal(fold[:30], fold[30:])
    order = torch.randperm(60)
    assert torch.equal(inner_folds(x[order], y[order], None, None, 0), fold[order])
    counts = torch.stack([torch.bincount(fold[:30][y[:30] == k], minlength=5) for k in range(3)])
    assert int(counts.min()) == int(counts.max()) == 2
    assert not torch.equal(fold, inner_folds(x, y, None, None, 1))


def test_inner_folds_keep_groups_together():
    groups = np.repeat(np.arange(12), 5)
    fold = inner_folds(torch.randn(60, 3).double(), torch.arange(60) % 2, groups, 3, 0).numpy()
    assert all(len(set(fold[groups == g])) == 1 for g in range(12))
    assert set(fold) == {0, 1, 2}


def test_inner_folds_are_as_many_as_leave_every_class_in_training():
    groups, y = np.arange(40) // 10, torch.tensor([0] * 10 + [1] * 10 + [0, 1] * 10)
    y[20:] = torch.tensor([2] * 20)
    x = torch.randn(40, 3).double()
    with pytest.raises(ArgumentError, match="lacks a class"):
        inner_folds(x, y, groups, None, 0)
    y[:20] = torch.tensor([0, 1] * 10)
    fold = inner_folds(x, y, groups, None, 0)
    assert fold.max() + 1 < 5
    assert all(len(set(y[fold != k].tolist())) == 3 for k in range(int(fold.max()) + 1))


def test_inner_folds_refuse_more_folds_than_examples_of_a_class():
    x, y = torch.randn(8, 2).double(), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    with pytest.raises(ArgumentError, match=r"\[6, 2\] distinct examples for 3 folds"):
        inner_folds(x, y, None, 3, 0)
    assert set(inner_folds(x, y, None, None, 0).tolist()) == {0, 1}
    alone = inner_folds(x, torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]), None, None, 0)
    assert alone[-1] == -1
