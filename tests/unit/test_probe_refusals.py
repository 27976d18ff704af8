"""What probes refuse, and what they take as it is meant, beyond the cases that stand with each probe."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from interp.hooks.errors import ArgumentError
from interp.probes import (
    AttentionProbe,
    BilinearProbe,
    CCSProbe,
    KNNProbe,
    LDAProbe,
    LogisticProbe,
    MassMeanProbe,
    MLPProbe,
    MomentFeatures,
    MomentProbe,
    RidgeProbe,
    RidgeRegression,
    TokenSets,
    evaluate,
    sweep,
)
from interp.probes.evaluation import Evaluation
from interp.probes.splits import SplitWarning

VECTORS = [LogisticProbe(C=1.0), RidgeProbe(), MassMeanProbe(), LDAProbe(), KNNProbe(), BilinearProbe(),
           MLPProbe(epochs=1), RidgeRegression()]  # fmt: skip
SETS = [AttentionProbe(epochs=1), MomentProbe(epochs=1, hidden=28), MomentFeatures(2)]
names = lambda probe: type(probe).__name__


def vectors(n=40, d=5):
    made = np.random.default_rng(0)
    y = np.arange(n) % 2
    return made.normal(size=(n, d)) + y[:, None], y


@pytest.mark.parametrize("probe", VECTORS, ids=names)
def test_whole_numbers_are_numbers(probe):
    x, y = vectors()
    whole = (10 * x).round().astype(int)
    found, expected = (probe.fit(form, y).predict(form) for form in (whole, whole.astype(float)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("probe", [*VECTORS, *SETS], ids=names)
def test_objects_and_rows_alone_are_refused(probe):
    x, y = vectors()
    with pytest.raises(TypeError):
        probe.fit(np.array([[{}] * 5] * 40, dtype=object), y)
    with pytest.raises(ValueError, match=r"1D array|shape"):
        probe.fit(x[:, 0], y)


@pytest.mark.parametrize("probe", [*VECTORS, *SETS, CCSProbe()], ids=names)
def test_what_is_not_fitted_says_so(probe):
    ask = type(probe)().transform if hasattr(probe, "transform") else type(probe)().predict
    with pytest.raises(NotFittedError):
        ask(vectors()[0])


def test_heads_that_do_not_fit_are_refused_with_their_sizes():
    x, y = vectors(16)
    sets = TokenSets.from_list(list(torch.as_tensor(x).view(8, 2, 5)))
    for options, match in (({"hidden": 30, "heads": 4}, "30"), ({"hidden": 16, "heads": 4}, "4")):
        with pytest.raises(ArgumentError, match=match):
            MomentProbe(epochs=1, **options).fit(sets, y[:8])


@pytest.mark.parametrize(("y", "match"), [
    ([0, 1, 2, 3], r"\{0: 1, 1: 1, 2: 1, 3: 1\} examples for 5 folds"),
    ([0] * 30 + [1] * 3, r"\{0: 30, 1: 3\} examples for 5 folds"),
    ([0] * 20, r"1 class: \[0\]"),
])  # fmt: skip
def test_too_few_of_a_class_are_counted(y, match):
    x = np.random.default_rng(0).normal(size=(len(y), 3))
    for call in (evaluate, lambda p, x, y: sweep({"a": x}, y, [p])):
        with pytest.raises(ValueError, match=match):
            call(MassMeanProbe(), x, y)


def test_a_fold_of_one_class_is_skipped_only_where_that_is_asked_for():
    x, _ = vectors(40)
    y, groups = np.r_[np.zeros(30, int), np.ones(10, int)], np.r_[np.arange(30) // 6, np.full(5, 7), np.full(5, 8)]
    with pytest.raises(ArgumentError, match="on_missing_class"):
        evaluate(MassMeanProbe(), x, y, groups=groups, controls=0)
    with pytest.warns(SplitWarning, match="is left out"):
        found = evaluate(MassMeanProbe(), x, y, groups=groups, controls=0, on_missing_class="warn")
    assert isinstance(found, Evaluation)
    assert len(found.y) < 40


def test_a_sweep_names_the_site_of_what_is_not_finite():
    x, y = vectors()
    bad = x.copy()
    bad[7, 2], bad[9] = np.nan, np.inf
    with pytest.raises(ValueError, match="in 2 rows of late, first at example 7"):
        sweep({"early": x, "late": bad}, y, [MassMeanProbe()])
    sets = lambda part: TokenSets.from_list(list(torch.as_tensor(part).view(20, 2, 5)))
    with pytest.raises(ValueError, match="in 2 rows of late, first at example 3"):
        sweep({"early": sets(x), "late": sets(bad)}, y[:20], [MassMeanProbe(skip_first=False)])


def test_fits_that_do_not_converge_are_flagged_in_the_table():
    x, y = vectors()
    found = sweep({"a": x}, y, {"stopped": LogisticProbe(1e4, max_iter=1), "done": LogisticProbe(0.1)}, control=False)
    assert {r["probe"]: r["converged"] for r in found.curve()} == {"stopped": 0.0, "done": 1.0}
    assert all(np.isfinite(r["value"]) for r in found.rows)
