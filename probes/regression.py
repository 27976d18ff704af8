"""Probes of numbers: ridge regression, and its held-out R² with intervals and controls."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows, Table
from interp.observables.observable import Observable
from interp.probes.controls import control_labels
from interp.probes.estimator import (
    BaseEstimator,
    RegressorMixin,
    SkipFirst,
    VectorProbe,
    as_answer,
    as_array,
    check_is_fitted,
    check_lengths,
    column_or_1d,
    sample_weights,
)
from interp.probes.fitting import count, fit, take
from interp.probes.intervals import Interval, bootstrap_ci
from interp.probes.linear import group_rows, ridge_candidates
from interp.probes.ridge import fit_ridge
from interp.probes.splits import Split, duplicate_groups, value_folds
from interp.probes.tokens import Pool


class RidgeRegression(RegressorMixin, BaseEstimator):
    """Least squares of a number with an l2 penalty, in closed form; alpha by exact leave-one-out.

    min sum_i s_i (y_i - <w, v_i> - b)^2 + alpha |w|^2 on standardised features. With groups alpha is chosen by leaving
    whole groups out. `evaluate` gives its held-out R².

    Args:
        alpha: Penalty, or ``loo`` to choose it from ``grid``.
        pool: How a set of tokens becomes one vector.
        standardize: Whether features get mean 0 and variance 1.
        skip_first: As in `LogisticProbe`.
        grid: Values of alpha to choose from.

    Attributes:
        coef_: [d], in raw activation units.
        intercept_: The answer at zero.
        alpha_: The chosen penalty.
        loo_error_: [grid], mean squared leave-one-out error.

    Example:
        >>> X = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> RidgeRegression(alpha=1e-9).fit(X, [1.0, 3.0, 5.0, 7.0]).predict(X).round().tolist()
        [1.0, 3.0, 5.0, 7.0]
    """

    _inputs, _pooled = VectorProbe._inputs, VectorProbe._pooled
    n_features_in_: int

    def __init__(
        self, alpha: float | int | Literal["loo"] = "loo", *, pool: Pool = "mean", standardize: bool = True,
        skip_first: SkipFirst = "auto", grid: Any = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5),
    ):  # fmt: skip
        self.alpha, self.pool, self.standardize, self.skip_first, self.grid = alpha, pool, standardize, skip_first, grid

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None, mask: Any = None, groups: Any = None) -> "RidgeRegression":
        """Fit as `LogisticProbe.fit` does, to finite numbers.

        Raises:
            ArgumentError: If alpha is neither a positive number nor "loo", or the input is malformed.
        """
        candidates = ridge_candidates(self.alpha, self.grid)
        vectors = self._inputs(X, mask, fitting=True)
        values = torch.as_tensor(as_values(y, len(vectors)), device=vectors.device)
        weights = sample_weights(sample_weight, vectors)
        kept = weights > 0
        if groups is not None:
            check_lengths(len(vectors), groups=groups)
            groups = np.asarray(groups)[kept.cpu().numpy()]
        members = None if groups is None else group_rows(groups, int(kept.sum()))
        found = fit_ridge(
            vectors[kept], values[kept][:, None], weights[kept], candidates, self.standardize, members
        )  # fmt: skip
        raw = found.coef / found.std
        self.coef_, self.intercept_ = as_array(raw[0]), float((found.centre - raw @ found.mean)[0])
        self.alpha_, self.loo_error_ = found.alpha, np.array(found.errors)
        return self

    def predict(self, X: Any, mask: Any = None) -> Any:
        """The number of each example."""
        check_is_fitted(self)
        inputs = self._inputs(X, mask)
        return as_answer(X, inputs @ torch.as_tensor(self.coef_, device=inputs.device) + self.intercept_)

    def direction(self) -> Float[Tensor, "d"]:
        """The direction in raw activation units along which the answer rises."""
        check_is_fitted(self)
        return torch.as_tensor(self.coef_)

    def observable(self, site: Any, name: str | None = None) -> Observable:
        """The probe as an observable at a site: its direction, with the intercept as offset."""
        label = name or type(self).__name__
        return Observable.from_residual(self.direction(), site=site, offset=self.intercept_, name=label)


def as_values(y: Any, n: int) -> Float[np.ndarray, "n"]:
    """Finite numbers, one for each of n examples.

    Raises:
        ArgumentError: If y is missing, no vector of numbers, of another length, not finite, or all the same.
    """
    if y is None:
        raise ArgumentError("RidgeRegression requires y to be passed, but the target y is None", "numbers")
    values = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    values = column_or_1d(values, warn=True) if values.ndim == 2 and values.shape[1] == 1 else values
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        what = f"y of shape {list(values.shape)}, {values.dtype} (Unknown label type)"
        raise ArgumentError(what, "one number for each example")
    check_lengths(n, y=values)
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ArgumentError(f"y with {int((~np.isfinite(values)).sum())} NaN or infinity", "finite numbers")
    return values


@dataclass(frozen=True, eq=False)
class RegressionEvaluation(Rows):
    """What a probe of numbers reaches on held-out examples.

    Attributes:
        y: [n].
        predicted: [seeds, n], each from a fit that did not see the example.
        r2: 1 - squared error by squared deviation from the mean of y, with its interval over examples or groups.
        spearman: Rank correlation, mean over the seeds.
        rmse: Root of the mean squared error.
        spread: Standard deviation of R² over the seeds (NaN for one).
        controls: [draws], R² on control values, on the same splits.
        control: Which control it was.
        untrained: R² on an untrained copy of the model, if one was given.
        groups: Number of groups; None without groups.
        duplicates: Texts that repeat an earlier one, which were kept in one group; None where no texts were given.
    """

    y: Float[np.ndarray, "n"] = field(repr=False)
    predicted: Float[np.ndarray, "seeds n"] = field(repr=False)
    r2: Interval
    spearman: float
    rmse: float
    spread: float
    controls: Float[np.ndarray, "draws"] = field(repr=False)
    control: str
    untrained: float | None
    groups: int | None
    duplicates: int | None

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each score, then baselines and controls."""
        blank = {"low": "", "high": "", "spread": ""}
        rows = [{"what": "r2", "value": self.r2.estimate, "low": self.r2.low, "high": self.r2.high,
                 "spread": self.spread}]  # fmt: skip
        rows += [{"what": name, "value": value, **blank} for name, value in (
            ("spearman", self.spearman), ("rmse", self.rmse), ("rmse of the mean", float(self.y.std())))]  # fmt: skip
        if len(self.controls):
            rows.append({"what": f"r2 on {self.control}", "value": float(self.controls.mean()), **blank})
        if self.untrained is not None:
            rows.append({"what": "r2 on an untrained copy", "value": self.untrained, **blank})
        return rows

    def table(self) -> Table:
        """The rows as a table."""
        unit = "examples" if self.groups is None else f"examples in {self.groups:,} groups"
        notes = [f"{len(self.y):,} {unit}", f"{len(self.predicted)} seeds"]
        notes += [f"{self.duplicates} repeated texts kept together"] if self.duplicates else []
        notes += [] if len(self.controls) else ["no control was run"]
        return Table(self.to_records(), "Held out: " + ", ".join(notes) + "; decodable, use not tested")

    def __str__(self) -> str:
        return str(self.table())


def evaluate_values(
    probe: Any, X: Any, y: Any, groups: Any, texts: Sequence[str] | None, types: Any, folds: Any, seeds: Sequence[int],
    controls: int, level: float, untrained: Any,
) -> RegressionEvaluation:  # fmt: skip
    """`evaluate` for probes of numbers: the same folds for the task, its controls and an untrained copy."""
    values = as_values(y, count(X))
    if values.min() == values.max():
        raise ArgumentError(f"y is {values[0]} everywhere", "numbers that differ")
    grouping = None if texts is None else duplicate_groups(texts, groups)
    joined = groups if grouping is None else grouping.groups
    splits = [value_folds(values, joined, folds, seed) for seed in seeds]
    run = lambda features, target, at: _held_out(probe, features, target, splits[at], joined, seeds[at])
    found = np.stack([run(X, values, at) for at in range(len(seeds))])
    each = [r_squared(values, p) for p in found]
    shuffles = [control_labels(values, types, joined, splits[0], seeds[0] + 1 + draw) for draw in range(controls)]
    errors = ((values - found) ** 2).mean(0)
    interval = bootstrap_ci((errors, values), lambda e, v: 1 - e.mean() / max(v.var(), 1e-300), groups=joined,
                            level=level, seed=seeds[0])  # fmt: skip
    other = None if untrained is None else [r_squared(values, run(untrained, values, at)) for at in range(len(seeds))]
    return RegressionEvaluation(
        values, found, interval, float(np.mean([_spearman(values, p) for p in found])),
        float(np.sqrt(errors.mean())), float(np.std(each, ddof=1)) if len(each) > 1 else float("nan"),
        np.array([r_squared(c, run(X, c, 0)) for c in shuffles]),
        "shuffled values" if types is None else "control task",
        None if other is None else float(np.mean(other)), None if joined is None else len(np.unique(joined)),
        None if grouping is None else grouping.duplicates,
    )  # fmt: skip


def r_squared(y: Float[np.ndarray, "n"], predicted: Float[np.ndarray, "n"]) -> float:
    """1 - squared error by squared deviation from the mean."""
    return float(1 - ((y - predicted) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(np.asarray(spearmanr(a, b)[0]))


def _held_out(
    probe: Any, X: Any, y: np.ndarray, folds: list[Split], groups: Any, seed: int
) -> Float[np.ndarray, "n"]:  # fmt: skip
    found = np.empty(len(y))
    for train, test in folds:
        made = fit(probe, take(X, train), y[train], None if groups is None else np.asarray(groups)[train], seed)
        answer = made.predict(take(X, test))
        found[test] = answer.cpu().numpy() if isinstance(answer, Tensor) else answer
    return found
