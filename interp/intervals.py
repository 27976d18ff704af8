"""Interval: an estimate with its bounds, and Wilson's, of a share."""

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
    from scipy.stats import norm

    if n < 1 or not 0 <= successes <= n:
        raise ArgumentError(f"{successes} of {n}", "0 to n successes, n at least 1")
    z, share = float(norm.ppf((1 + level) / 2)), successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, float(centre - half), float(centre + half), level, f"Wilson, n = {n}")
