"""How a probe's score grows with labels, and whether it holds on other data than it was fitted on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows, Table
from interp.probes.controls import held_out_score
from interp.probes.fitting import as_numbers, fit, probabilities, take
from interp.probes.scores import balanced_accuracy
from interp.probes.splits import outer_folds


@dataclass(frozen=True, eq=False)
class LearningCurve(Rows):
    """Balanced accuracy by number of labels.

    Attributes:
        sizes: Labels in training.
        values: [sizes, runs], a run being a fold of a seed.
        chance: 1 / classes.
    """

    sizes: list[int]
    values: Float[np.ndarray, "sizes runs"] = field(repr=False)
    chance: float

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each size."""
        return [
            {"labels": n, "balanced_accuracy": float(v.mean()), "spread": float(v.std(ddof=1)), "chance": self.chance}
            for n, v in zip(self.sizes, self.values, strict=True)
        ]

    def table(self) -> Table:
        """The rows as a table."""
        return Table(self.to_records(), "Learning curve: mean and spread over folds and seeds")


def learning_curve(
    probe: Any, X: Any, y: Any, *, sizes: Sequence[int] | None = None, groups: Any = None, folds: Any = 5,
    seeds: Sequence[int] = (0, 1, 2),
) -> LearningCurve:  # fmt: skip
    """Score a probe that is given few labels, then more; the test parts are the same for all sizes.

    Args:
        probe: Any classifier.
        X: Features.
        y: Labels.
        sizes: Labels in training; by default 10, 30, 100, 300, ... and all. Subsets are stratified and nested.
        groups: What must not be on both sides of a split.
        folds: Number of folds, or a splitter.
        seeds: Of splits and subsets.

    Raises:
        ArgumentError: If a size has fewer than two of each class, or exceeds the training part.

    Example:
        >>> from interp.probes import MassMeanProbe
        >>> made = np.random.default_rng(0); y = np.arange(100) % 2
        >>> curve = learning_curve(MassMeanProbe(), made.normal(size=(100, 3)) + y[:, None], y, sizes=[10, 80])
        >>> curve.sizes, curve.values.shape
        ([10, 80], (2, 15))
    """
    numbers, classes = as_numbers(y, X)
    splits = [(seed, part) for seed in seeds for part in outer_folds(numbers, groups, folds, seed)]
    most = min(len(train) for _, (train, _) in splits)
    if sizes is None:
        steps = sorted({c * 10**e for e in range(1, 8) for c in (1, 3)})
        wanted = [n for n in steps if 2 * len(classes) <= n < most] + [most]
    else:
        wanted = sorted(set(map(int, sizes)))
    if not wanted or wanted[-1] > most or wanted[0] < 2 * len(classes):
        raise ArgumentError(f"sizes={wanted}", f"from {2 * len(classes)} (two of each class) to {most}")
    values = np.empty((len(wanted), len(splits)))
    for run, (seed, (train, test)) in enumerate(splits):
        order = train[_balanced_order(numbers[train], np.random.default_rng(seed))]
        for row, size in enumerate(wanted):
            part = order[:size]
            made = fit(probe, take(X, part), numbers[part], None if groups is None else np.asarray(groups)[part], seed)
            predicted = probabilities(made, take(X, test), len(classes)).argmax(1)
            values[row, run] = balanced_accuracy(numbers[test], predicted)
    return LearningCurve(wanted, values, 1 / len(classes))


def _balanced_order(y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random order whose beginnings hold two of each class, then each class by its frequency."""
    place = np.empty(len(y))
    for label in np.unique(y):
        members = generator.permutation(np.flatnonzero(y == label))
        place[members] = (np.arange(len(members)) + generator.uniform()) / len(members)
        place[members[:2]] = -1
    return np.lexsort((generator.uniform(size=len(y)), place))


@dataclass(frozen=True, eq=False)
class TransferMatrix(Rows):
    """Balanced accuracy of probes fitted on one source and tested on another.

    Attributes:
        sources: Names.
        values: [fitted on, tested on]; the diagonal by cross-validation.
        chance: 1 / classes.
    """

    sources: list[str]
    values: Float[np.ndarray, "sources sources"] = field(repr=False)
    chance: float

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each pair."""
        return [
            {"fitted on": a, "tested on": b, "balanced_accuracy": float(self.values[i, j])}
            for i, a in enumerate(self.sources)
            for j, b in enumerate(self.sources)
        ]

    def table(self) -> Table:
        """One row for each source that was fitted on."""
        rows = [{"fitted on": a} | dict(zip(self.sources, self.values[i].tolist(), strict=True))
                for i, a in enumerate(self.sources)]  # fmt: skip
        return Table(rows, f"Balanced accuracy by source tested on (diagonal: held out); chance {self.chance:.3f}")


def transfer_matrix(
    probe: Any, sources: Mapping[str, tuple[Any, Any]], *, groups: Mapping[str, Any] | None = None, folds: Any = 5,
    seed: int = 0,
) -> TransferMatrix:  # fmt: skip
    """Fit on each source and test on each other one: a direction that does not transfer tells topics apart.

    Args:
        probe: Any classifier.
        sources: Features and labels by name; all with the same classes.
        groups: Groups of a source by name, for the diagonal.
        folds: Folds of the diagonal.
        seed: Of splits and probes.

    Raises:
        ArgumentError: If there are fewer than two sources, or classes differ.
    """
    known = {name: as_numbers(y, X) for name, (X, y) in sources.items()}
    kinds = {name: classes.tolist() for name, (_, classes) in known.items()}
    if len(sources) < 2 or any(k != next(iter(kinds.values())) for k in kinds.values()):
        raise ArgumentError(f"sources with classes {kinds}", "at least two sources, with the same classes")
    classes = len(next(iter(kinds.values())))
    values = np.empty((len(sources), len(sources)))
    for i, (name, (X, _)) in enumerate(sources.items()):
        y, own = known[name][0], (groups or {}).get(name)
        made = fit(probe, X, y, own, seed)
        for j, (other, (Z, _)) in enumerate(sources.items()):
            if i == j:
                values[i, i] = held_out_score(probe, X, y, outer_folds(y, own, folds, seed), own, seed)
            else:
                values[i, j] = balanced_accuracy(known[other][0], probabilities(made, Z, classes).argmax(1))
    return TransferMatrix(list(sources), values, 1 / classes)
