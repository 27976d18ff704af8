"""Evaluation of one probe at one site: held-out scores with intervals, baselines and controls in one table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows, Table
from interp.probes.controls import Selectivity, control_labels, held_out_score
from interp.probes.estimator import is_regressor
from interp.probes.fitting import as_numbers, count, fit, probabilities, take
from interp.probes.intervals import DRAWS, Interval, cluster_members
from interp.probes.regression import RegressionEvaluation, evaluate_values
from interp.probes.scores import Calibration, calibration, log_losses, score_table
from interp.probes.splits import OnMissing, Split, duplicate_groups, outer_folds


@dataclass(frozen=True, eq=False)
class Evaluation(Rows):
    """What a probe reaches on held-out examples.

    Attributes:
        classes: The labels in order.
        y: [n], class numbers of the tested examples.
        probabilities: [seeds, n, classes], each from a fit that did not see the example.
        scores: Means over the seeds.
        spread: Standard deviations over the seeds (NaN for one).
        intervals: Bootstrap intervals over examples, or over groups where there are groups.
        selectivity: The same probe on control labels, on the same splits.
        majority: Share of the most frequent class.
        prior_log_loss: Log-loss of a probe that only knows the frequencies.
        duplicates: Texts that repeat an earlier one, which were kept in one group; None where no texts were given.
        groups: Number of groups; None without groups.
        converged: Share of the fits that converged.
        untrained: Balanced accuracy of the same probe on an untrained copy of the model, if one was given.
    """

    classes: list[Any]
    y: Int64[np.ndarray, "n"] = field(repr=False)
    probabilities: Float[np.ndarray, "seeds n classes"] = field(repr=False)
    scores: dict[str, float]
    spread: dict[str, float]
    intervals: dict[str, Interval]
    selectivity: Selectivity | None
    majority: float
    prior_log_loss: float
    duplicates: int | None
    groups: int | None
    converged: float
    untrained: float | None = None

    @property
    def calibration(self) -> Calibration:
        """Reliability of the first seed's probabilities."""
        return calibration(self.y, self.probabilities[0])

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each score, then baselines and controls."""
        rows = []
        for name, value in self.scores.items():
            interval = self.intervals.get(name)
            ends = {"low": interval.low, "high": interval.high} if interval else {"low": "", "high": ""}
            rows.append({"what": name, "value": value, **ends, "spread": self.spread[name]})
        blank = {"low": "", "high": "", "spread": ""}
        rows.append({"what": "majority rate", "value": self.majority, **blank})
        rows.append({"what": "chance, balanced accuracy", "value": 1 / len(self.classes), **blank})
        rows.append({"what": "log_loss of the frequencies", "value": self.prior_log_loss, **blank})
        if self.selectivity is not None:
            kind = self.selectivity.kind
            rows.append({"what": f"balanced_accuracy on {kind}", "value": self.selectivity.control, **blank})
            rows.append({"what": "selectivity", "value": self.selectivity.selectivity, **blank})
        if self.untrained is not None:
            rows.append({"what": "balanced_accuracy on an untrained copy", "value": self.untrained, **blank})
        return rows

    def table(self) -> Table:
        """The rows as a table."""
        unit = "examples" if self.groups is None else f"examples in {self.groups:,} groups"
        notes = [f"{len(self.y):,} {unit}", f"{len(self.classes)} classes", f"{len(self.probabilities)} seeds"]
        notes += [f"ece in {self.calibration.bins} bins of equal mass"]
        notes += [f"{self.duplicates} repeated texts kept together"] if self.duplicates else []
        notes += [f"only {self.converged:.0%} of the fits converged"] if self.converged < 1 else []
        notes += ["no control was run"] if self.selectivity is None else []
        return Table(self.to_records(), "Held out: " + ", ".join(notes) + "; decodable, use not tested")

    def __str__(self) -> str:
        return str(self.table())


def evaluate(
    probe: Any, X: Any, y: Any, *, groups: Any = None, texts: Sequence[str] | None = None, types: Any = None,
    folds: Any = 5, seeds: Sequence[int] = (0,), controls: int = 3, level: float = 0.95,
    on_missing_class: OnMissing = "raise", untrained: Any = None,
) -> Evaluation | RegressionEvaluation:  # fmt: skip
    """Score a probe by cross-validation that leaks nothing, with its baselines and controls.

    What a probe chooses (C, epochs) it chooses inside each training part, with the groups. That a label can be read
    from activations does not show that the model uses it: see `probe_use`.

    Args:
        probe: Any classifier with fit and predict_proba, decision_function or predict. Of a regressor
            (`RidgeRegression`) y are numbers, and the score is R².
        X: Features: arrays, tensors, `TokenSets`.
        y: Labels.
        groups: [n]: document, speaker, template, word. A group is never on both sides. Tokens of one text must share
            one.
        texts: Texts of the examples: equal ones are kept in one group, and counted.
        types: Word type of each example, for a control task; without, control labels are shuffled ones.
        folds: Number of folds, or a splitter.
        seeds: Of splits, of probes that have a seed, and of controls.
        controls: Control runs; 0 leaves them out, which the table then says.
        level: Coverage of the intervals.
        on_missing_class: What happens to a fold that lacks a class: ``raise``, or ``warn`` and leave it out.
        untrained: Features of the same examples in an untrained copy of the model (`interp.causal.untrained`): what a
            probe reaches there is due to words, positions and architecture, not to what was learnt.

    Raises:
        ArgumentError: If lengths differ, there are no seeds, or a split is not possible.

    Example:
        >>> from interp.probes import MassMeanProbe
        >>> x = np.random.default_rng(0).normal(size=(60, 4)); y = np.arange(60) % 2
        >>> x[:, 0] += 3 * y
        >>> evaluate(MassMeanProbe(), x, y).scores["accuracy"] > 0.8
        True
    """
    if not len(seeds) or controls < 0:
        raise ArgumentError(f"seeds={list(seeds)}, controls={controls}", "at least one seed, and no negative number")
    if untrained is not None and count(untrained) != count(X):
        raise ArgumentError(f"untrained features of {count(untrained)} examples", f"{count(X)}, as in X")
    if is_regressor(probe):
        return evaluate_values(probe, X, y, groups, texts, types, folds, seeds, controls, level, untrained)
    numbers, classes = as_numbers(y, X)
    grouping = None if texts is None else duplicate_groups(texts, groups)
    joined = groups if grouping is None else grouping.groups
    runs = []
    for seed in seeds:
        split = outer_folds(numbers, joined, folds, seed, on_missing_class=on_missing_class)
        runs.append(_held_out(probe, X, numbers, len(classes), split, joined, seed))
    tested = np.all([~np.isnan(p[:, 0]) for p, _ in runs], axis=0)
    truth, found = numbers[tested], np.stack([p[tested] for p, _ in runs])
    tables = [score_table(truth, p) for p in found]
    kept = None if joined is None else np.asarray(joined)[tested]
    frequencies = np.bincount(truth, minlength=len(classes)) / len(truth)
    return Evaluation(
        classes.tolist(), truth, found,
        {name: float(np.mean([t[name] for t in tables])) for name in tables[0]},
        {name: float(np.std([t[name] for t in tables], ddof=1)) if len(tables) > 1 else float("nan")
         for name in tables[0]},
        score_intervals(truth, found, kept, level, seeds[0]),
        _control_runs(probe, X, numbers, tables[0], joined, types, folds, seeds[0], controls, on_missing_class),
        float(frequencies.max()), float(-(frequencies[frequencies > 0] * np.log(frequencies[frequencies > 0])).sum()),
        None if grouping is None else grouping.duplicates, None if kept is None else len(np.unique(kept)),
        float(np.mean([c for _, c in runs])),
        None if untrained is None else float(np.mean([
            held_out_score(probe, untrained, numbers,
                           outer_folds(numbers, joined, folds, seed, on_missing_class=on_missing_class), joined, seed)
            for seed in seeds
        ])),
    )  # fmt: skip


def _held_out(
    probe: Any, X: Any, y: np.ndarray, classes: int, split: list[Split], groups: Any, seed: int
) -> tuple[np.ndarray, float]:
    found, converged = np.full((len(y), classes), np.nan), []
    for train, test in split:
        made = fit(probe, take(X, train), y[train], None if groups is None else np.asarray(groups)[train], seed)
        found[test] = probabilities(made, take(X, test), classes)
        converged.append(bool(made.converged_))
    return found, float(np.mean(converged))


def _control_runs(probe, X, y, scores, groups, types, folds, seed, controls, on_missing) -> Selectivity | None:
    if not controls:
        return None
    split = outer_folds(y, groups, folds, seed, on_missing_class=on_missing)
    found = []
    for draw in range(controls):
        labels = control_labels(y, types, groups, split, seed + 1 + draw)
        found.append(held_out_score(probe, X, labels, split, groups, seed))
    kind = "shuffled labels" if types is None else "control task"
    return Selectivity(scores["balanced_accuracy"], np.array(found), 1 / len(np.unique(y)), kind)


def score_intervals(
    y: Int64[np.ndarray, "n"], p: Float[np.ndarray, "seeds n classes"], groups: Any, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Percentile bootstrap of accuracy, balanced accuracy and log-loss, each the mean over seeds of the same draws.

    The scores are ratios of sums, so that a draw is a product of its counts with sums over groups: the draws are those
    of `bootstrap_ci`, only faster.
    """
    members = cluster_members(len(y), groups)
    right = np.mean([q.argmax(1) == y for q in p], axis=0)
    loss = np.mean([log_losses(y, q) for q in p], axis=0)
    of_class = np.eye(p.shape[2])[y]
    columns = np.column_stack([np.ones(len(y)), right, loss, of_class, of_class * right[:, None]])
    sums = np.stack([columns[rows].sum(0) for rows in members])
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(len(members), size=len(members)) for _ in range(DRAWS)]
    draws = _ratios(np.stack([sums[chosen].sum(0) for chosen in drawn]))
    estimates = _ratios(sums.sum(0, keepdims=True))
    how = f"percentile bootstrap of {len(members)} {'examples' if groups is None else 'groups'}, {DRAWS} draws"
    found = {}
    for name, values in draws.items():
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
        found[name] = Interval(float(estimates[name][0]), low, high, level, how)
    return found


def _ratios(sums: Float[np.ndarray, "draws columns"]) -> dict[str, Float[np.ndarray, "draws"]]:
    """Scores of sums over examples: number, right, loss, members of each class, right ones of each class."""
    members, right = np.split(sums[:, 3:], 2, axis=1)
    recalls = np.divide(right, members, out=np.full_like(right, np.nan), where=members > 0)
    return {"accuracy": sums[:, 1] / sums[:, 0], "balanced_accuracy": np.nanmean(recalls, axis=1),
            "log_loss": sums[:, 2] / sums[:, 0]}  # fmt: skip
