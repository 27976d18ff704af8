"""Controls: labels that mean nothing, and how far a probe gets on them.

Sources: Hewitt & Liang, "Designing and Interpreting Probes with Control Tasks", EMNLP 2019; Ojala & Garriga,
"Permutation Tests for Studying Classifier Performance", JMLR 2010; the maximum over layers: Westfall & Young 1993.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows, Table
from interp.probes.estimator import check_lengths
from interp.probes.fitting import as_numbers, count, fit, probabilities, take
from interp.probes.intervals import permutation_p
from interp.probes.scores import balanced_accuracy
from interp.probes.splits import Split, outer_folds


def control_task(y: Any, types: Any, seed: int = 0) -> np.ndarray:
    """Random labels for word types: each type gets one, drawn from the frequencies of y, for all of its tokens.

    A probe that does well on these has memorised words; what it does better on y is its selectivity.

    Args:
        y: Labels, of which only the frequencies matter.
        types: Word type (or template, or whatever could be memorised) of each example.
        seed: Of the draw.

    Raises:
        ArgumentError: If there is not one type for each label, or only one type or label.

    Example:
        >>> found = control_task([0, 1, 0, 1], ["a", "b", "a", "b"])
        >>> bool(found[0] == found[2])
        True
    """
    labels = np.asarray(y.cpu() if hasattr(y, "cpu") else y)
    check_lengths(len(labels), types=types)
    _, kind = np.unique(np.asarray(types), return_inverse=True)
    kind = kind.reshape(-1)
    if kind.max() < 1 or len(np.unique(labels)) < 2:
        raise ArgumentError(f"{kind.max() + 1} types and {len(np.unique(labels))} labels", "at least two of each")
    generator = np.random.default_rng(seed)
    while True:  # one label for every type would be no task
        found = generator.choice(labels, size=kind.max() + 1)
        if len(np.unique(found)) > 1:
            return found[kind]


def shuffled(y: np.ndarray, groups: Any, folds: list[Split], seed: int) -> np.ndarray:
    """Labels in random order within each fold, which keeps what folds and groups say about labels.

    A fold that has more of a class has less of it in its training part: labels that were shuffled across folds would be
    guessed worse than chance, and a probe that knows nothing would look better than its control. Where each group has
    one label, groups trade labels as wholes. Where they are mixed, the labels of all groups of a fold are dealt out
    anew, group after group in random orders: labels that stood in one group stay together, at other groups' examples.
    """
    generator = np.random.default_rng(seed)
    tested = np.zeros((len(y), len(folds)), dtype=bool)
    for number, (_, test) in enumerate(folds):
        tested[test, number] = True
    _, fold = np.unique(tested, axis=0, return_inverse=True)
    fold = fold.reshape(-1)
    names = np.arange(len(y)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    _, first = np.unique(names, return_index=True)
    if (y[first][names] == y).all():
        return _within(fold[first], y[first], generator)[names]
    place, source = (_group_order(fold, names, generator) for _ in range(2))
    found = np.empty_like(y)
    found[place] = y[source]
    return found


def _group_order(fold: np.ndarray, names: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Examples fold by fold, group by group, both groups and examples within them in random order."""
    return np.lexsort((generator.random(len(names)), generator.permutation(names.max() + 1)[names], fold))


def _within(strata: np.ndarray, values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Values in random order within each stratum."""
    found = np.empty_like(values)
    found[np.lexsort((np.arange(len(values)), strata))] = values[np.lexsort((generator.random(len(values)), strata))]
    return found


def held_out_score(probe: Any, X: Any, y: np.ndarray, folds: list[Split], groups: Any, seed: int) -> float:
    """Balanced accuracy of predictions on held-out parts, all together."""
    classes, predicted = int(y.max()) + 1, np.full(len(y), -1)
    for train, test in folds:
        if len(np.unique(y[train])) < 2:
            predicted[test] = y[train][0]
            continue
        made = fit(probe, take(X, train), y[train], None if groups is None else np.asarray(groups)[train], seed)
        predicted[test] = probabilities(made, take(X, test), classes).argmax(1)
    tested = predicted >= 0
    return balanced_accuracy(y[tested], predicted[tested])


@dataclass(frozen=True, eq=False)
class Selectivity(Rows):
    """Balanced accuracy on a task and on its control, on the same splits.

    Attributes:
        task: On the labels.
        controls: [draws], on random labels.
        chance: 1 / classes.
        kind: ``control task`` (a label for each type) or ``shuffled labels``.
    """

    task: float
    controls: Float[np.ndarray, "draws"] = field(repr=False)
    chance: float
    kind: str

    @property
    def control(self) -> float:
        """Mean over the draws."""
        return float(self.controls.mean())

    @property
    def selectivity(self) -> float:
        """Task less control."""
        return self.task - self.control

    @property
    def p(self) -> float:
        """(1 + draws at least as good) / (1 + draws); of few draws it cannot be small."""
        return permutation_p(self.task, self.controls)

    def to_records(self) -> list[dict[str, Any]]:
        """One row."""
        return [{"task": self.task, "control": self.control, "selectivity": self.selectivity, "chance": self.chance,
                 "control kind": self.kind, "draws": len(self.controls)}]  # fmt: skip

    def table(self) -> Table:
        """The row as a table."""
        return Table(self.to_records(), "Balanced accuracy")


def selectivity(
    probe: Any, X: Any, y: Any, types: Any = None, *, groups: Any = None, folds: Any = 5, draws: int = 3, seed: int = 0
) -> Selectivity:
    """A probe's held-out balanced accuracy on y against control labels, on the same splits.

    With types held in common by training and test parts a control can be memorised; with ``groups=types`` it cannot.
    Give both calls, and both numbers.

    Args:
        probe: Any classifier.
        X: Features.
        y: Labels.
        types: Word type of each example for `control_task`; without, labels are shuffled.
        groups: What must not be on both sides of a split.
        folds: Number of folds, or a splitter.
        draws: Control runs.
        seed: Of splits and draws.

    Raises:
        ArgumentError: If there are no draws, or lengths differ.
    """
    if draws < 1:
        raise ArgumentError(f"draws={draws}", "at least 1")
    numbers, classes = as_numbers(y, X)
    split = outer_folds(numbers, groups, folds, seed)
    task = held_out_score(probe, X, numbers, split, groups, seed)
    found = []
    for draw in range(draws):
        labels = control_labels(numbers, types, groups, split, seed + 1 + draw)
        found.append(held_out_score(probe, X, labels, split, groups, seed))
    kind = "shuffled labels" if types is None else "control task"
    return Selectivity(task, np.array(found), 1 / len(classes), kind)


def control_labels(y: np.ndarray, types: Any, groups: Any, folds: list[Split], seed: int) -> np.ndarray:
    """Labels of `control_task` where there are types, else shuffled ones."""
    return shuffled(y, groups, folds, seed) if types is None else control_task(y, types, seed)


@dataclass(frozen=True, eq=False)
class PermutationTest(Rows):
    """Scores of sites against the same under shuffled labels.

    Attributes:
        sites: Names.
        observed: [sites], held-out balanced accuracy.
        null: [draws, sites], under shuffled labels, the same ones at every site.
    """

    sites: list[str]
    observed: Float[np.ndarray, "sites"]
    null: Float[np.ndarray, "draws sites"] = field(repr=False)

    @property
    def p(self) -> Float[np.ndarray, "sites"]:
        """p of each site by itself."""
        return np.array([permutation_p(o, n) for o, n in zip(self.observed, self.null.T, strict=True)])

    @property
    def p_max(self) -> Float[np.ndarray, "sites"]:
        """p corrected for having looked at all sites: against the best site of each draw."""
        return np.array([permutation_p(o, self.null.max(1)) for o in self.observed])

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each site."""
        rows = zip(self.sites, self.observed.tolist(), self.p.tolist(), self.p_max.tolist(), strict=True)
        return [{"site": s, "balanced_accuracy": o, "p": p, "p_max": m} for s, o, p, m in rows]

    def table(self) -> Table:
        """The rows as a table."""
        return Table(self.to_records(), f"{len(self.null)} permutations of the labels")


def permutation_test(
    probe: Any, X: Any, y: Any, *, groups: Any = None, folds: Any = 5, draws: int = 200, seed: int = 0
) -> PermutationTest:
    """Does the probe find anything at all: at one site, or at any of several?

    Each draw shuffles the labels within folds (whole groups, where a group has one label) and fits anew. A claim that
    one site is the best needs ``p_max``.

    Args:
        probe: Any classifier; one without inner cross-validation is much faster.
        X: Features, or a mapping from site to features.
        y: Labels.
        groups: What must not be on both sides of a split.
        folds: Number of folds, or a splitter.
        draws: Permutations; p is at least 1 / (1 + draws).
        seed: Of splits and draws.

    Raises:
        ArgumentError: If there are no draws or no sites, or lengths differ.
    """
    sites = dict(X) if isinstance(X, Mapping) else {"X": X}
    if draws < 1 or not sites or len({count(x) for x in sites.values()}) != 1:
        raise ArgumentError(f"draws={draws} of {len(sites)} sites", "at least one of each, of the same examples")
    numbers, _ = as_numbers(y, next(iter(sites.values())))
    split = outer_folds(numbers, groups, folds, seed)
    score = lambda labels: [held_out_score(probe, x, labels, split, groups, seed) for x in sites.values()]
    null = [score(shuffled(numbers, groups, split, seed + 1 + draw)) for draw in range(draws)]
    return PermutationTest([str(s) for s in sites], np.array(score(numbers)), np.array(null))
