"""Interval: an estimate with its bounds; Wilson's, of a share, and Student's, of a mean."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows


@dataclass(frozen=True)
class Interval(Rows):
    """An estimate with its interval.

    Attributes:
        estimate: On the data as they are.
        low: Lower end.
        high: Upper end.
        level: Coverage that is aimed at.
        method: How it was made.
    """

    estimate: float
    low: float
    high: float
    level: float
    method: str

    def to_records(self) -> list[dict[str, Any]]:
        """One row."""
        return [asdict(self)]

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a share of independent successes.

    Raises:
        ArgumentError: If n is not positive, or the successes are not among 0..n.

    Example:
        >>> str(wilson(8, 10))
        '0.800 [0.490, 0.943]'
    """
    from scipy.special import ndtri

    if n < 1 or not 0 <= successes <= n:
        raise ArgumentError(f"{successes} of {n}", "0 to n successes, n at least 1")
    z, share = float(ndtri((1 + level) / 2)), successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, float(centre - half), float(centre + half), level, f"Wilson, n = {n}")


def student(values: Sequence[float], level: float = 0.95, bounds: tuple[float, float] | None = None) -> Interval:
    """Student's interval of a mean of independent values: m ± t s / √n, with n - 1 degrees of freedom.

    Two values give a very wide one (t = 12.7), which is what two values say.

    Args:
        values: One for each seed.
        level: Coverage.
        bounds: Where the interval is cut, as at 0 and 1 of a share.

    Raises:
        ArgumentError: If there are fewer than two values.

    Example:
        >>> str(student([0.7, 0.8, 0.9]))
        '0.800 [0.552, 1.048]'
    """
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        raise ArgumentError(f"{len(array)} values", "at least 2: one says nothing about the spread")
    half = float(stdtrit(len(array) - 1, (1 + level) / 2) * array.std(ddof=1) / np.sqrt(len(array)))
    mean = float(array.mean())
    low, high = (mean - half, mean + half) if bounds is None else np.clip([mean - half, mean + half], *bounds).tolist()
    return Interval(mean, low, high, level, f"Student, n = {len(array)}")
