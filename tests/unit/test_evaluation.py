"""Splits, scores, intervals, controls and code lengths against scikit-learn, scipy, and what must come out."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
)
from sklearn.model_selection import GroupKFold, KFold, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from interp.hooks.errors import ArgumentError
from interp.probes import (
    LogisticProbe,
    MassMeanProbe,
    MomentFeatures,
    TokenSets,
    apply_temperature,
    bootstrap_ci,
    calibration,
    control_task,
    duplicate_groups,
    evaluate,
    fit_temperature,
    mcnemar,
    online_codelength,
    outer_folds,
    permutation_test,
    score_table,
    selectivity,
    wilson,
)
from interp.probes.controls import shuffled
from interp.probes.evaluation import score_intervals
from interp.probes.fitting import fit
from interp.probes.intervals import permutation_p
from interp.probes.scores import balanced_accuracy
from interp.probes.splits import SplitWarning


def task(n=120, d=6, gap=1.5, classes=2, seed=0):
    made = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = made.normal(size=(n, d))
    x[:, 0] += gap * y
    return x, y


def chances(n=200, classes=3, seed=0):
    made = np.random.default_rng(seed)
    p = made.dirichlet(np.ones(classes), size=n)
    return np.array([made.choice(classes, p=q) for q in p]), p


# splits


def test_equal_texts_and_equal_groups_are_one_group():
    found = duplicate_groups(["A film", "b", " a  FILM ", "c", "b", "d"], groups=[0, 1, 2, 2, 3, 4])
    assert found.duplicates == 2
    assert found.groups.tolist() == [0, 1, 0, 0, 1, 2]
    assert duplicate_groups(["\ufb01n", "fin"]).duplicates == 1


def test_folds_keep_groups_and_classes():
    y, groups = np.arange(60) % 3, np.arange(60) // 4
    for seed in range(3):
        folds = outer_folds(y, groups, 5, seed)
        assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(60))
        for train, test in folds:
            assert not set(groups[train]) & set(groups[test])
            assert not set(train) & set(test)
    again = outer_folds(y, groups, 5, 2)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(folds, again, strict=True))


@pytest.mark.parametrize("splitter", [KFold(3, shuffle=True, random_state=0), ShuffleSplit(2, random_state=0)])
@pytest.mark.filterwarnings("ignore:The groups parameter is ignored")
def test_a_splitter_that_cuts_groups_is_refused(splitter):
    with pytest.raises(ArgumentError, match=r"cuts \d+ of the groups"):
        outer_folds(np.arange(30) % 2, np.arange(30) // 3, splitter)
    assert len(outer_folds(np.arange(30) % 2, np.arange(30) // 3, GroupKFold(3))) == 3


def test_a_fold_without_a_class_is_refused_or_left_out():
    y, groups = np.array([0, 1] * 6 + [2, 2, 2]), np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6])
    with pytest.raises(ArgumentError, match=r"training part lacks \[2\]"):
        outer_folds(y, groups, 3)
    with pytest.warns(SplitWarning, match="left out"):
        assert len(outer_folds(y, groups, 3, on_missing_class="warn")) == 2


@pytest.mark.parametrize(("y", "more", "match"), [
    ([1, 1, 1], {}, r"1 class: \[1\]"), ([0, 0, 0, 1], {"folds": 2}, r"\{0: 3, 1: 1\} examples for 2 folds"),
    ([0, 1] * 5, {"groups": [0] * 9}, "groups of length 9 for 10"), ([0, 1] * 5, {"folds": 1}, "folds=1"),
    ([0, 1] * 5, {"groups": [0] * 5 + [1] * 5}, "2 groups for 5 folds"), ([[0, 1]], {}, "shape"),
])  # fmt: skip
def test_malformed_splits_are_refused(y, more, match):
    with pytest.raises(ArgumentError, match=match):
        outer_folds(np.array(y), **more)


# scores


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_are_those_of_scikit_learn(classes):
    y, p = chances(classes=classes)
    found = score_table(y, p)
    score, onehot = (p[:, 1], y) if classes == 2 else (p, np.eye(classes)[y])
    expected = {
        "accuracy": (p.argmax(1) == y).mean(),
        "balanced_accuracy": balanced_accuracy_score(y, p.argmax(1)),
        "roc_auc": roc_auc_score(y, score, multi_class="ovr"),
        "average_precision": average_precision_score(onehot, score),
        "log_loss": log_loss(y, np.maximum(p, 1e-6)),
        "brier": brier_score_loss(y, p, scale_by_half=False),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


def test_ties_count_half_in_the_area():
    y, p = np.array([0, 1, 1, 0]), np.array([0.2, 0.2, 0.7, 0.7])
    assert score_table(y, np.stack([1 - p, p], 1))["roc_auc"] == roc_auc_score(y, p) == 0.5


def test_calibration_bins_have_equal_mass():
    y, p = chances(1500, 2)
    found = calibration(y, p)
    assert (found.bins, found.counts.tolist()) == (15, [100] * 15)
    assert found.ece < 0.06
    sharper = apply_temperature(p, 0.25)
    assert calibration(y, sharper).ece > 3 * found.ece
    assert fit_temperature(y, sharper) == pytest.approx(4, rel=0.25)
    by_hand = sum(abs(c - a) * n for c, a, n in zip(found.confidence, found.accuracy, found.counts, strict=True)) / 1500
    assert found.ece == pytest.approx(by_hand)
    assert "ECE" in repr(found.table())


# intervals


def test_the_bootstrap_covers_the_mean():
    made, covered = np.random.default_rng(0), 0
    for i in range(200):
        found = bootstrap_ci(made.normal(size=40), n=200, seed=i)
        covered += found.low <= 0 <= found.high
    assert 178 <= covered <= 198  # 93 % is expected of 40 values; 3 sd


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_the_bootstrap_is_scipys(method):
    from scipy.stats import bootstrap

    x = np.random.default_rng(1).exponential(size=60)
    found = bootstrap_ci(x, np.mean, method=method, n=4000)
    theirs = bootstrap((x,), np.mean, method=method, n_resamples=4000, rng=0).confidence_interval
    np.testing.assert_allclose([found.low, found.high], [theirs.low, theirs.high], atol=0.02)


def test_groups_are_drawn_together():
    values = np.repeat(np.random.default_rng(0).normal(size=30), 20)
    alone, together = bootstrap_ci(values), bootstrap_ci(values, groups=np.arange(600) // 20)
    assert together.high - together.low > 3 * (alone.high - alone.low)
    shuffle = np.random.default_rng(1).permutation(600)
    again = bootstrap_ci(values[shuffle], groups=(np.arange(600) // 20)[shuffle])
    assert (again.low, again.high) == pytest.approx((together.low, together.high))


def test_intervals_of_scores_are_bootstrap_intervals():
    y, p = chances(90)
    groups = np.arange(90) // 3
    found = score_intervals(y, p[None], groups)
    for name, function in {
        "accuracy": lambda t, q: (q.argmax(1) == t).mean(),
        "balanced_accuracy": lambda t, q: balanced_accuracy(t, q.argmax(1)),
        "log_loss": lambda t, q: -np.log(np.maximum(q[np.arange(len(t)), t], 1e-6)).mean(),
    }.items():
        slow = bootstrap_ci((y, p), function, groups=groups)
        assert found[name].estimate == pytest.approx(slow.estimate, abs=1e-9)
        np.testing.assert_allclose([found[name].low, found[name].high], [slow.low, slow.high], atol=1e-9)


def test_shares_and_pairs():
    from scipy.stats import binomtest

    for k, n in ((0, 7), (3, 7), (40, 50)):
        theirs = binomtest(k, n).proportion_ci(method="wilson")
        found = wilson(k, n)
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    a, b = np.array([True] * 9 + [False] * 3), np.array([False] * 8 + [True] * 4)
    assert mcnemar(a, b) == pytest.approx(binomtest(8, 11).pvalue)
    assert mcnemar(a, a) == 1


@pytest.mark.parametrize("call", [
    lambda: bootstrap_ci(np.zeros(1)), lambda: bootstrap_ci(np.zeros(4), groups=[0] * 4),
    lambda: bootstrap_ci((np.zeros(4), np.zeros(3))), lambda: bootstrap_ci(np.zeros(4), method="t"),
    lambda: wilson(3, 2), lambda: wilson(0, 0), lambda: calibration(np.zeros(0, dtype=np.int64), np.zeros((0, 2))),
])  # fmt: skip
def test_malformed_intervals_are_refused(call, unchecked):
    with pytest.raises(ArgumentError):
        call()


# controls


def test_a_control_task_gives_each_type_one_label():
    y, types = np.array([0] * 900 + [1] * 100), np.arange(1000) // 2
    found = control_task(y, types)
    assert (found[::2] == found[1::2]).all()
    assert 0.06 < found.mean() < 0.14
    assert not np.array_equal(found, control_task(y, types, seed=1))
    assert len(np.unique(control_task([0, 1], ["a", "b"]))) == 2


def test_random_labels_are_at_chance_and_a_task_is_selective():
    x, y = task(600, 4)
    for types in (None, np.arange(600)):
        found = selectivity(LogisticProbe(C=1.0), x, y, types)
        assert abs(found.control - 0.5) < 3 * 0.5 / math.sqrt(600)
        assert found.selectivity > 0.2
    assert found.kind == "control task"


def test_memorised_words_show_in_the_control_and_not_where_words_are_held_out():
    made = np.random.default_rng(0)
    word = np.arange(400) % 40
    x = made.normal(size=(40, 64))[word] + 0.1 * made.normal(size=(400, 64))
    y = (word % 2).astype(int)
    shared = selectivity(LogisticProbe(C=1.0), x, y, word, draws=2)
    held = selectivity(LogisticProbe(C=1.0), x, y, word, groups=word, draws=2)
    assert shared.task > 0.98
    assert shared.control > 0.98
    assert abs(shared.selectivity) < 0.03
    assert held.task < 0.75


def test_shuffled_labels_keep_what_folds_and_groups_say():
    y, groups = np.repeat(np.arange(20) % 2, 4), np.repeat(np.arange(20), 4)
    for given in (None, groups):
        folds = outer_folds(y, given, 5)
        found = shuffled(y, given, folds, 1)
        assert not np.array_equal(found, y)
        assert all(found[test].sum() == y[test].sum() for _, test in folds)
    assert all(len(set(found[groups == g])) == 1 for g in range(20))
    mixed = np.tile([0, 1, 1, 1, 0, 0, 0, 1], 10)
    found = shuffled(mixed, groups, folds, 2)
    assert all(found[groups == g].sum() in (1, 3) for g in range(20))
    assert all(found[test].sum() == mixed[test].sum() for _, test in folds)


def test_one_mixed_group_does_not_leave_the_other_labels_in_place():
    x, y = task(200, 4)
    groups = np.arange(200)
    groups[1] = 0  # a text that stands twice, with both labels
    y[:2] = 0, 1
    found = [shuffled(y, groups, outer_folds(y, groups, 5), seed) for seed in range(20)]
    assert np.mean([(f == y).mean() for f in found]) < 0.6
    assert selectivity(LogisticProbe(C=1.0), x, y, groups=groups).control < 0.65


def test_control_labels_are_not_guessed_worse_than_chance():
    made = np.random.default_rng(0)
    found = [
        selectivity(MassMeanProbe(), made.normal(size=(40, 2)), np.arange(40) % 2, draws=10, seed=seed).control
        for seed in range(20)
    ]
    assert abs(np.mean(found) - 0.5) < 0.02  # 0.47 where labels are shuffled across folds


def test_p_is_uniform_where_there_is_nothing():
    found = []
    for seed in range(50):
        made = np.random.default_rng(seed)
        x, y = made.normal(size=(24, 2)), np.arange(24) % 2
        found.append(permutation_test(MassMeanProbe(), x, y, folds=2, draws=9, seed=seed).p[0])
    jitter = np.random.default_rng(0).uniform(0, 1 / 10, size=50)
    assert kstest(np.array(found) - jitter, "uniform").pvalue > 0.01


def test_the_best_of_many_sites_needs_the_maximum():
    x, y = task(60, gap=3.0)
    sites = {f"noise {i}": task(60, gap=0.0, seed=i + 1)[0] for i in range(4)} | {"signal": x}
    found = permutation_test(MassMeanProbe(), sites, y, folds=3, draws=39)
    assert (found.p_max >= found.p).all()
    assert found.p_max[-1] == 1 / 40
    assert found.p_max[:4].min() > 0.05
    assert found.to_records()[-1]["site"] == "signal"
    assert permutation_p(0.5, np.array([0.5, 0.4, 0.6])) == 0.75


# code length


class Uniform(DummyClassifier):
    def __init__(self):
        super().__init__(strategy="uniform")


@pytest.mark.parametrize("classes", [2, 5])
def test_a_uniform_predictor_sends_n_log_k_bits(classes):
    y = np.arange(430) % classes
    found = online_codelength(Uniform(), np.zeros((430, 1)), y)
    assert found.bits == pytest.approx(430 * math.log2(classes), abs=1e-9)
    assert found.compression == pytest.approx(1)
    assert found.ends[0] >= max(16, 2 * classes)
    assert found.ends[-1] == 430


def test_more_signal_is_a_shorter_code():
    bits = [online_codelength(LogisticProbe(C=0.1), *task(400, gap=gap)).bits for gap in (0.0, 1.5, 5.0)]
    assert bits[0] > 395
    assert bits[0] > bits[1] + 30 > bits[2] + 60
    found = online_codelength(LogisticProbe(C=0.1), *task(400, gap=5.0))
    assert sum(r["bits"] for r in found.to_records()) == pytest.approx(found.bits)
    assert "compression" in str(found)


def test_every_class_is_in_the_first_block():
    y = np.array([0] * 396 + [1] * 4)
    assert math.isfinite(online_codelength(LogisticProbe(C="cv"), task(400)[0], y, orders=1).bits)


def test_what_members_of_a_group_share_does_not_shorten_a_code_with_groups():
    names = np.repeat(np.arange(60), 7)
    generator = np.random.default_rng(0)
    y = generator.permutation(np.arange(60) % 2)[names]
    x = generator.normal(size=(60, 80))[names]
    probe = LogisticProbe(C=0.1)
    assert online_codelength(probe, x, y).bits < 0.7 * len(y)
    found = online_codelength(probe, x, y, groups=names)
    assert found.bits > 0.95 * len(y)
    assert found.ends[0] >= 4 * 7 - 7
    assert found.ends[-1] == len(y)


def test_no_block_is_sent_by_a_probe_that_saw_its_groups():
    names = np.random.default_rng(1).integers(0, 40, 300)
    fitted, sent = [], []

    class Spy(DummyClassifier):
        def fit(self, x, y):
            fitted.append(set(x[:, 0]))
            return super().fit(x, y)

        def predict_proba(self, x):
            sent.append(set(x[:, 0]))
            return super().predict_proba(x)

    online_codelength(Spy(strategy="prior"), names[:, None].astype(float), np.arange(300) % 3, groups=names)
    assert len(sent) >= 6
    assert all(not (a & b) for a, b in zip(fitted, sent, strict=True))


@pytest.mark.parametrize("groups", [[0] * 100, list(range(99)), [0, 1] * 50, [i // 34 for i in range(100)]])
def test_groups_too_few_for_a_code_are_refused(groups):
    with pytest.raises(ArgumentError):
        online_codelength(Uniform(), np.zeros((100, 1)), [0, 1] * 50, groups=groups, shares=(0.3, 0.5, 1.0))


@pytest.mark.parametrize(("y", "more"), [
    ([0, 1] * 8, {}), ([0] * 99 + [1], {}), ([0, 1] * 50, {"shares": (0.5,)}), ([0, 1] * 50, {"orders": 0}),
    ([0, 1] * 50, {"shares": (0.5, 0.2, 1.0)}),
])  # fmt: skip
def test_malformed_codes_are_refused(y, more):
    with pytest.raises(ArgumentError):
        online_codelength(Uniform(), np.zeros((len(y), 1)), y, **more)


# evaluation


def test_the_table_holds_baselines_and_controls():
    x, y = task(200)
    found = evaluate(LogisticProbe(C=1.0), x, np.array(["no", "yes"])[y], seeds=(0, 1))
    rows = {r["what"]: r["value"] for r in found.to_records()}
    assert found.classes == ["no", "yes"]
    assert rows["majority rate"] == 0.5
    assert rows["log_loss of the frequencies"] == pytest.approx(math.log(2))
    assert rows["selectivity"] > 0.15
    assert found.intervals["accuracy"].low < rows["accuracy"] < found.intervals["accuracy"].high
    assert "use not tested" in str(found)
    assert found.probabilities.shape == (2, 200, 2)
    assert "no control was run" in str(evaluate(MassMeanProbe(), x, y, controls=0))


def test_predictions_come_from_fits_that_did_not_see_the_example():
    x, y = task(40, 200, gap=0.0)
    found = evaluate(LogisticProbe(C=1e6), x, y)
    assert found.scores["accuracy"] < 0.75
    split = outer_folds(y, None, 5, 0)
    for train, test in split:
        theirs = LogisticProbe(C=1e6).fit(x[train], y[train]).predict_proba(x[test])
        np.testing.assert_allclose(found.probabilities[0][test], theirs, atol=1e-9)


def test_repeated_texts_are_counted_and_kept_together():
    made = np.random.default_rng(0)
    x = np.repeat(made.normal(size=(40, 400)), 2, axis=0)
    y = np.repeat(made.permutation(np.arange(40) % 2), 2)
    texts = [f"text {i // 2}" for i in range(80)]
    leaking = evaluate(LogisticProbe(C=1.0), x, y, controls=0)
    honest = evaluate(LogisticProbe(C=1.0), x, y, texts=texts)
    assert (honest.duplicates, honest.groups) == (40, 40)
    assert leaking.scores["accuracy"] > 0.85
    assert honest.scores["accuracy"] < 0.75
    assert "40 repeated texts" in str(honest)


@pytest.mark.parametrize("kind", ["tensor", "tokens", "list", "features", "theirs"])
def test_every_kind_of_features_and_estimator(kind):
    from sklearn.pipeline import make_pipeline

    x, y = task(60)
    tokens = [torch.as_tensor(row)[None] + 0.1 * torch.randn(4, 6).double() for row in x]
    probe, features = LogisticProbe(C=1.0), x
    if kind == "tensor":
        features, y = torch.as_tensor(x), torch.as_tensor(y)
    elif kind in ("tokens", "features"):
        features = TokenSets.from_list(tokens)
        probe = make_pipeline(MomentFeatures(3), LogisticProbe(C=1.0)) if kind == "features" else probe
    elif kind == "list":
        features = tokens
    else:
        probe = LogisticRegression()
    assert evaluate(probe, features, y, controls=1).scores["accuracy"] > 0.6


def test_groups_and_seeds_reach_the_last_step_of_a_pipeline():
    x, y = task(120, 4)
    groups = np.arange(120) // 10
    made = fit(make_pipeline(StandardScaler(), LogisticProbe()), x, y, groups, seed=3)[-1]
    alone = LogisticProbe(random_state=3).fit(StandardScaler().fit_transform(x), y, groups=groups)
    np.testing.assert_array_equal(made.inner_loss_, alone.inner_loss_)


def test_fits_that_do_not_converge_are_counted():
    x, y = task(60, gap=0.3)
    assert evaluate(LogisticRegression(max_iter=1), x, y, controls=0).converged == 0
    assert evaluate(LogisticProbe(C=1.0), x, y, controls=0).converged == 1


@pytest.mark.parametrize(("more", "match"), [
    ({"seeds": ()}, "seeds"), ({"controls": -1}, "controls"), ({"groups": [0, 1]}, "groups of length 2 for 60"),
    ({"texts": ["a"]}, "groups|length"), ({"types": [1, 2]}, "types of length 2"),
])  # fmt: skip
def test_malformed_evaluations_are_refused(more, match):
    with pytest.raises(ArgumentError, match=match):
        evaluate(MassMeanProbe(), *task(60), **more)
    with pytest.raises(ArgumentError, match="y of length 59 for 60"):
        evaluate(MassMeanProbe(), task(60)[0], task(59)[1])
