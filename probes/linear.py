"""Linear probes: logistic regression, ridge, difference of means, linear discriminant analysis.

Their directions are in raw activation units: standardisation is undone, w_raw = w / std, b_raw = b - <w, mean / std>.
"""

import warnings
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.observables.observable import Observable
from interp.probes.estimator import (
    ConvergenceWarning,
    SkipFirst,
    VectorProbe,
    as_array,
    balanced,
    check_is_fitted,
    check_lengths,
)
from interp.probes.inner_folds import inner_folds
from interp.probes.ridge import fit_ridge
from interp.probes.site_fits import fit_sites, moments_of
from interp.probes.tokens import Pool

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


class LinearProbe(VectorProbe):
    """What linear probes share: ``coef_`` [1 or classes, d] and ``intercept_`` in raw units, and their directions."""

    coef_: np.ndarray
    intercept_: np.ndarray

    def _logits(self, inputs: Float[Tensor, "n d"]) -> Tensor:
        coef = torch.as_tensor(self.coef_, device=inputs.device)
        logits = inputs @ coef.T + torch.as_tensor(self.intercept_, device=inputs.device)
        return logits[:, 0] if len(coef) == 1 else logits

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        rows = 1 if len(self.classes_) == 2 else len(self.classes_)
        return {"coef_": (rows, self.n_features_in_), "intercept_": (rows,)}

    def direction(self, label: Any = None) -> Float[Tensor, "d"]:
        """The direction in raw activation units along which the logit of ``label`` rises.

        Of two classes the second is the default. Of more, it is the label's weights less the mean over classes.

        Raises:
            ArgumentError: If the label is not a class, or is needed and not given.
        """
        return self._row(label)[0]

    def _row(self, label: Any) -> tuple[Tensor, float]:
        check_is_fitted(self)
        names = self.classes_.tolist()
        if label is None and len(names) > 2:
            raise ArgumentError(f"no label for {len(names)} classes", f"one of {names[:20]}")
        if label is not None and label not in names:
            raise ArgumentError(f"label={label!r}", f"one of {names[:20]}")
        coef, intercept = torch.as_tensor(self.coef_), torch.as_tensor(self.intercept_)
        if len(names) == 2:
            sign = -1.0 if label == names[0] else 1.0
            return sign * coef[0], sign * float(intercept[0])
        k = names.index(label)
        return coef[k] - coef.mean(0), float(intercept[k] - intercept.mean())

    def observable(self, site: Any, label: Any = None, name: str | None = None) -> Observable:
        """The probe as an observable at a site: its direction, with the intercept as offset.

        Args:
            site: Where the activations were taken.
            label: The class whose logit it is; the second of two by default.
            name: What it is called in tables.

        Raises:
            ArgumentError: If the label is not a class, or is needed and not given.
        """
        vector, offset = self._row(label)
        what = self.classes_.tolist()[1] if label is None else label
        label = name or f"{type(self).__name__} {what!r}"
        return Observable.from_residual(vector, site=site, offset=offset, name=label)

    def _set_raw(self, coef: Tensor, intercept: Tensor, mean: Tensor, std: Tensor) -> None:
        raw = coef / std
        self.coef_, self.intercept_ = as_array(raw), as_array(intercept - raw @ mean)


class LogisticProbe(LinearProbe):
    """l2 logistic regression, the convex linear probe: min sum_i s_i CE(y_i, W v_i + b) + |W|^2 / (2 C).

    Features are standardised with the training part alone; the intercept is not penalised. C is chosen by inner
    cross-validation on held-out log-loss, with equal rows in one fold. This is what the toolkit calls "LP".

    Args:
        C: Inverse penalty, or ``cv`` to choose it from ``grid``.
        pool: How a set of tokens becomes one vector.
        standardize: Whether features get mean 0 and variance 1.
        class_weight: None, ``balanced`` or a dict.
        skip_first: Whether means and maxima leave the first token out; ``auto`` where it is an attention sink.
        grid: Values of C to choose from.
        folds: Inner folds; by default as many as the smallest class allows, five at most.
        tol: Relative gap of the final objective; 1e-7 suffices to choose C.
        max_iter: Most iterations of the solver.
        random_state: Seed of the inner folds.

    Attributes:
        coef_: [1 or classes, d], raw units.
        intercept_: [1 or classes].
        C_: The chosen C.
        inner_loss_: [folds, grid], held-out log-loss, where C was chosen.
        converged_: Whether the final fit is within ``tol``.
        n_iter_: Iterations of the final fit.

    Example:
        >>> X = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> LogisticProbe(C=1.0).fit(X, ["low", "low", "high", "high"]).predict([[0.2], [2.9]]).tolist()
        ['low', 'high']
    """

    def __init__(
        self, C: float | int | Literal["cv"] = "cv", *, pool: Pool = "mean", standardize: bool = True,
        class_weight: Any = None, skip_first: SkipFirst = "auto", grid: Any = C_GRID,
        folds: int | None = None, tol: float = 1e-18, max_iter: int = 2000, random_state: int = 0,
    ):  # fmt: skip
        self.C, self.pool, self.standardize, self.class_weight = C, pool, standardize, class_weight
        self.skip_first, self.grid, self.folds, self.tol = skip_first, grid, folds, tol
        self.max_iter, self.random_state = max_iter, random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None, mask: Any = None, groups: Any = None) -> "LogisticProbe":
        """Fit on vectors [n, d], or on token sets that ``pool`` makes vectors of.

        Args:
            X: Features.
            y: Labels.
            sample_weight: [n], not negative.
            mask: [n, T], True where a token is valid.
            groups: [n]; inner folds keep a group together.

        Raises:
            ArgumentError: If C is neither a positive number nor "cv", or the input is malformed.
        """
        number = not isinstance(self.C, (str, bool)) and self.C > 0
        if not number and self.C != "cv":
            raise ArgumentError(f"C={self.C!r}", "a positive number or 'cv'")
        vectors, labels, weights = self._fit_inputs(X, y, mask, sample_weight)
        groups = _kept(groups, sample_weight, len(vectors))
        weights = balanced(labels, weights, self.class_weight, self.classes_)
        self.C_ = float(self.C) if number else self._choose(vectors, labels, weights, groups)
        fit = self._solve(vectors, labels, weights[None], [self.C_])
        self.coef_ = as_array(fit.weights[0, 0])
        self.intercept_ = as_array(fit.intercepts[0, 0])
        self.n_iter_, self.converged_ = int(fit.solution.iterations), bool(fit.solution.converged)
        self.objective_ = float(fit.solution.objective)
        if not self.converged_:
            text = f"C={self.C_:g} is not converged after {self.n_iter_} iterations: raise max_iter or lower C"
            warnings.warn(text, ConvergenceWarning, stacklevel=2)
        return self

    def _choose(self, vectors: Tensor, labels: Tensor, weights: Tensor, groups: Any) -> float:
        fold = inner_folds(vectors, labels, groups, self.folds, self.random_state)
        train = torch.stack([weights * (fold != k) for k in range(int(fold.max()) + 1)])
        self.inner_loss_ = self._solve(vectors, labels, train, list(self.grid), weights).cpu().numpy()
        return float(self.grid[int(self.inner_loss_.mean(0).argmin())])

    def _solve(self, vectors: Tensor, labels: Tensor, train: Tensor, grid: list[float], test: Any = None) -> Any:
        tol = self.tol if test is None else max(self.tol, 1e-7)
        (fit,) = fit_sites(
            [vectors], labels, train, grid, standardize=self.standardize, tol=tol, max_iter=self.max_iter,
            test_weights=test,
        )  # fmt: skip
        return fit if test is None else fit.loss


class RidgeProbe(LinearProbe):
    """Least squares on one-hot targets of ±1 with an l2 penalty, in closed form; alpha by exact leave-one-out.

    All penalties share one eigendecomposition. With residual r and leverage h of an example, leaving it out gives
    r / (1 - h); with groups, whole groups are left out: (I - H)^-1 r, H the hat matrix's block of the group. A weight
    counts as that many copies, of which one (of a group: all) is left out. Logits are scores, not log-odds.

    Args:
        alpha: Penalty, or ``loo`` to choose it from ``grid``.
        pool: How a set of tokens becomes one vector.
        standardize: Whether features get mean 0 and variance 1.
        skip_first: As in `LogisticProbe`.
        grid: Values of alpha to choose from.

    Attributes:
        alpha_: The chosen penalty.
        loo_error_: [grid], mean squared leave-one-out error.

    Example:
        >>> X = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> RidgeProbe(alpha=1.0).fit(X, [0, 0, 1, 1]).predict(X).tolist()
        [0, 0, 1, 1]
    """

    def __init__(
        self, alpha: float | int | Literal["loo"] = "loo", *, pool: Pool = "mean", standardize: bool = True,
        skip_first: SkipFirst = "auto", grid: Any = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5),
    ):  # fmt: skip
        self.alpha, self.pool, self.standardize, self.skip_first, self.grid = alpha, pool, standardize, skip_first, grid

    def fit(self, X: Any, y: Any, sample_weight: Any = None, mask: Any = None, groups: Any = None) -> "RidgeProbe":
        """Fit as `LogisticProbe.fit` does.

        Raises:
            ArgumentError: If alpha is neither a positive number nor "loo", or the input is malformed.
        """
        candidates = ridge_candidates(self.alpha, self.grid)
        vectors, labels, weights = self._fit_inputs(X, y, mask, sample_weight)
        groups = _kept(groups, sample_weight, len(vectors))
        members = None if groups is None else group_rows(groups, len(vectors))
        targets = 2.0 * torch.nn.functional.one_hot(labels).double() - 1
        targets = targets[:, 1:] if len(self.classes_) == 2 else targets
        found = fit_ridge(vectors, targets, weights, candidates, self.standardize, members)
        self.loo_error_, self.alpha_ = np.array(found.errors), found.alpha
        self._set_raw(found.coef, found.centre, found.mean, found.std)
        return self


def ridge_candidates(alpha: Any, grid: Any) -> list[float]:
    """Penalties to choose from.

    Raises:
        ArgumentError: If alpha is neither a positive number nor "loo".
    """
    number = not isinstance(alpha, (str, bool)) and alpha > 0
    if not number and alpha != "loo":
        raise ArgumentError(f"alpha={alpha!r}", "a positive number or 'loo'")
    return [float(alpha)] if number else list(grid)


class MassMeanProbe(LinearProbe):
    """Difference of class means, with the threshold at the midpoint: often the best causal direction.

    logit = <theta, v - (mu1 + mu0) / 2> / s^2 + log prior ratio, theta = mu1 - mu0, where s^2 is the variance within
    classes along theta (of more classes: the mean variance in the span of the means). More classes: nearest mean.

    Args:
        pool: How a set of tokens becomes one vector.
        standardize: Whether features get mean 0 and variance 1 first.
        prior: Whether the logit holds the classes' frequencies.
        skip_first: As in `LogisticProbe`. Without it a decoder's first token swamps the means.

    Example:
        >>> X = torch.tensor([[0.0, 1.0], [0.0, 3.0], [2.0, 1.0], [2.0, 3.0]])
        >>> MassMeanProbe().fit(X, [0, 0, 1, 1]).means_.tolist()
        [[0.0, 2.0], [2.0, 2.0]]
    """

    def __init__(
        self, *, pool: Pool = "mean", standardize: bool = False, prior: bool = False, skip_first: SkipFirst = "auto"
    ):
        self.pool, self.standardize, self.prior, self.skip_first = pool, standardize, prior, skip_first

    def fit(self, X: Any, y: Any, sample_weight: Any = None, mask: Any = None) -> "MassMeanProbe":
        """Fit as `LogisticProbe.fit` does."""
        vectors, labels, weights = self._fit_inputs(X, y, mask, sample_weight)
        mean, std = moments_of(vectors, weights)
        std = std if self.standardize else torch.ones_like(std)
        z = (vectors - mean) / std
        means, totals = class_means(z, labels, weights)
        spread = _variance_in_span(z - means[labels], means, weights)
        prior = (totals / totals.sum()).log() if self.prior else torch.zeros_like(totals)
        self.means_ = as_array(means * std + mean)
        coef, intercept = means / spread, prior - (means**2).sum(1) / (2 * spread)
        self._set_raw(*two_rows_to_one(coef, intercept), mean, std)
        return self


class LDAProbe(LinearProbe):
    """Linear discriminant analysis: mass-mean corrected by the covariance within classes, S^-1 (mu1 - mu0).

    S is the average of the classes' covariances by their frequencies, each shrunk towards a multiple of the identity:
    by Ledoit and Wolf's amount (on standardised features of the class) or by a number.

    Args:
        shrinkage: ``auto`` (Ledoit-Wolf), or a number in [0, 1].
        pool: How a set of tokens becomes one vector.
        skip_first: As in `LogisticProbe`.

    Example:
        >>> X = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
        >>> LDAProbe().fit(X, [0, 0, 1, 1]).predict(X).tolist()
        [0, 0, 1, 1]
    """

    def __init__(
        self, shrinkage: float | int | Literal["auto"] = "auto", *, pool: Pool = "mean", skip_first: SkipFirst = "auto"
    ):
        self.shrinkage, self.pool, self.skip_first = shrinkage, pool, skip_first

    def fit(self, X: Any, y: Any, mask: Any = None) -> "LDAProbe":
        """Fit as `LogisticProbe.fit` does, without weights."""
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        vectors, labels, _ = self._fit_inputs(X, y, mask, None)
        inner = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=self.shrinkage)
        inner.fit(vectors.cpu().numpy(), as_array(labels))
        self.coef_, self.intercept_ = inner.coef_, inner.intercept_
        return self


def class_means(z: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean [classes, d] and total weight [classes] of each class."""
    onehot = torch.nn.functional.one_hot(labels).to(z.dtype) * weights[:, None]
    totals = onehot.sum(0)
    return (onehot.T @ z) / totals[:, None], totals


def two_rows_to_one(coef: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
    """Of two classes' logits their difference; of more, all."""
    if len(coef) > 2:
        return coef, intercept
    return (coef[1] - coef[0])[None], (intercept[1] - intercept[0])[None]


def _variance_in_span(residuals: Tensor, means: Tensor, weights: Tensor) -> Tensor:
    basis, sizes, _ = torch.linalg.svd((means - means.mean(0)).T, full_matrices=False)
    basis = basis[:, sizes > 1e-12 * sizes[0].clamp(min=1e-300)]
    variance = (weights @ (residuals @ basis) ** 2).mean() / weights.sum()
    return variance if bool(variance > 0) else torch.ones_like(variance)


def group_rows(groups: Any, n: int) -> list[Tensor]:
    """Rows of each group.

    Raises:
        ArgumentError: If there is not one group for each example, or only one group.
    """
    check_lengths(n, groups=groups)
    names = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if names.max() < 1:
        raise ArgumentError("all examples in one group", "at least 2 groups")
    return [torch.as_tensor(np.flatnonzero(names == k)) for k in range(names.max() + 1)]


def _kept(groups: Any, sample_weight: Any, n: int) -> Any:
    """Groups of the examples whose weight is not zero."""
    if groups is None or sample_weight is None or len(groups) == n:
        return groups
    return np.asarray(groups)[np.asarray(sample_weight) > 0]
