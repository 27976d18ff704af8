"""Intervals and tests: cluster bootstrap, McNemar, permutation p-values; Wilson's is shared by all rooms."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from interp.hooks.errors import ArgumentError
from interp.intervals import Interval, wilson
from interp.probes.estimator import check_lengths

__all__ = ["DRAWS", "Interval", "bootstrap_ci", "cluster_members", "mcnemar", "permutation_p", "wilson"]

DRAWS = 2000


def bootstrap_ci(
    values: Any, statistic: Callable[..., float] = np.mean, *, groups: Any = None, n: int = DRAWS, level: float = 0.95,
    method: Literal["percentile", "bca"] = "percentile", seed: int = 0,
) -> Interval:  # fmt: skip
    """Bootstrap interval of a statistic; with groups, groups are drawn and not examples.

    For "probe A against probe B" give the difference of their scores, example by example: the draws are then paired.

    Args:
        values: An array, or a tuple of arrays with one entry for each example.
        statistic: Function of these arrays.
        groups: [n]: examples of one group are drawn together (cluster bootstrap).
        n: Number of draws.
        level: Coverage.
        method: ``percentile``, or ``bca`` (bias corrected and accelerated; Efron 1987).
        seed: Of the draws.

    Raises:
        ArgumentError: If there are fewer than two examples or groups, or lengths differ.

    Example:
        >>> found = bootstrap_ci(np.array([0.0, 1.0] * 50))
        >>> found.estimate, 0.35 < found.low < 0.45
        (0.5, True)
    """
    arrays = tuple(map(np.asarray, values)) if isinstance(values, tuple) else (np.asarray(values),)
    check_lengths(len(arrays[0]), groups=groups, **{f"values[{i}]": a for i, a in enumerate(arrays)})
    if method not in ("percentile", "bca") or not 0 < level < 1 or n < 1:
        raise ArgumentError(
            f"method={method!r}, level={level}, n={n}", "percentile or bca, between 0 and 1, at least 1"
        )
    members = cluster_members(len(arrays[0]), groups)
    generator = np.random.default_rng(seed)
    at = lambda chosen: float(statistic(*(a[np.concatenate([members[g] for g in chosen])] for a in arrays)))
    draws = np.array([at(generator.integers(len(members), size=len(members))) for _ in range(n)])
    estimate = float(statistic(*arrays))
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        left_out = np.array([at(np.delete(np.arange(len(members)), g)) for g in range(len(members))])
        tails = _bca(tails, draws, estimate, left_out)
    low, high = np.nanquantile(draws, tails).tolist()
    unit = "examples" if groups is None else "groups"
    return Interval(estimate, low, high, level, f"{method} bootstrap of {len(members)} {unit}, {n} draws")


def _bca(tails: np.ndarray, draws: np.ndarray, estimate: float, left_out: np.ndarray) -> np.ndarray:
    from scipy.stats import norm

    below = (draws < estimate).mean() + (draws == estimate).mean() / 2
    bias = norm.ppf(np.clip(below, 1 / (2 * len(draws)), 1 - 1 / (2 * len(draws))))
    gaps = left_out.mean() - left_out
    spread = (gaps**2).sum() ** 1.5
    acceleration = (gaps**3).sum() / (6 * spread) if spread > 0 else 0.0
    z = bias + norm.ppf(tails)
    return norm.cdf(bias + z / (1 - acceleration * z))


def cluster_members(n: int, groups: Any) -> list[np.ndarray]:
    """Indices of the examples of each group (of each example, without groups).

    Raises:
        ArgumentError: If there are fewer than two.
    """
    names = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    order = np.argsort(names, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(names[order])) + 1) if n else []
    if len(members) < 2:
        raise ArgumentError(f"{len(members)} independent examples or groups", "at least 2")
    return members


def mcnemar(right: Bool[np.ndarray, "n"], other: Bool[np.ndarray, "n"]) -> float:
    """Exact two-sided p of "both probes are right equally often", on the same independent examples.

    Example:
        >>> mcnemar(np.array([True] * 6), np.array([False] * 6))
        0.03125
    """
    from scipy.stats import binomtest

    gained, lost = int((right & ~other).sum()), int((other & ~right).sum())
    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost).pvalue)


def permutation_p(observed: float, null: Float[np.ndarray, "draws"]) -> float:
    """(1 + number of draws at least as large) / (1 + draws)."""
    return float((1 + (np.asarray(null) >= observed - 1e-12).sum()) / (1 + len(null)))
