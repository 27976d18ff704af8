"""Splits that leak nothing: groups stay together, equal texts are one group, and every class is on both sides."""

import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from interp.hooks.errors import ArgumentError
from interp.probes.estimator import check_lengths

OnMissing = Literal["raise", "warn"]
Split = tuple[np.ndarray, np.ndarray]


class SplitWarning(UserWarning):
    """A fold that was left out."""


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which examples belong together.

    Attributes:
        groups: [n], numbers from 0.
        duplicates: How many examples repeat the text of an earlier one.
    """

    groups: Int64[np.ndarray, "n"] = field(repr=False)
    duplicates: int


def duplicate_groups(texts: Sequence[str], groups: Any = None) -> Grouping:
    """Put examples of the same text, and of the same given group, into one group.

    Texts are equal if they are after Unicode normalisation (NFKC), without case, with single spaces. Common corpora
    hold 1 to 8 % exact duplicates; on both sides of a split they are memory, not generalisation.

    Args:
        texts: One for each example.
        groups: Groups that are known already (document, speaker, template), or None.

    Raises:
        ArgumentError: If there is not one group for each text.

    Example:
        >>> duplicate_groups(["A  film.", "another", "a film."]).groups.tolist()
        [0, 1, 0]
    """
    check_lengths(len(texts), groups=groups)
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Any, int] = {}
    repeated = 0
    for i, text in enumerate(texts):
        key = ("text", re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().casefold())
        repeated += key in first
        for known in (key, *([("group", groups[i])] if groups is not None else [])):
            a, b = root(first.setdefault(known, i)), root(i)
            parent[max(a, b)] = min(a, b)
    _, numbers = np.unique([root(i) for i in range(len(texts))], return_inverse=True)
    return Grouping(numbers.astype(np.int64), repeated)


def check_labels(y: Any, folds: int, groups: Any = None) -> np.ndarray:
    """Labels as an array.

    Raises:
        ArgumentError: If there are fewer than two classes, or fewer members (or groups) of a class than folds.
    """
    labels = np.asarray(y.cpu() if hasattr(y, "cpu") else y)
    if labels.ndim != 1:
        raise ArgumentError(f"y of shape {list(labels.shape)}", "one label for each example")
    check_lengths(len(labels), groups=groups)
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2:
        raise ArgumentError(f"y holds {len(names)} class: {names.tolist()}", "at least 2 classes")
    if counts.min() < folds:
        told = dict(zip(names.tolist()[:20], counts.tolist()[:20], strict=True))
        raise ArgumentError(f"classes of {told} examples for {folds} folds", "as many of each as folds", "fewer folds")
    return labels


def outer_folds(
    y: Any, groups: Any = None, folds: Any = 5, seed: int = 0, *, on_missing_class: OnMissing = "raise"
) -> list[Split]:
    """Training and test indices of each fold: stratified, and with groups never cut.

    Args:
        y: Labels.
        groups: [n] or None.
        folds: A number, or a splitter of scikit-learn; one that cuts groups is refused.
        seed: Of the shuffle.
        on_missing_class: What happens to a fold whose training part lacks a class, or whose test part has one class:
            ``raise``, or ``warn`` and leave the fold out.

    Raises:
        ArgumentError: If a class has fewer members than folds, or groups are cut.

    Example:
        >>> folds = outer_folds([0, 0, 1, 1] * 5, groups=[i // 2 for i in range(20)], folds=5)
        >>> [len(test) for _, test in folds]
        [4, 4, 4, 4, 4]
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if isinstance(folds, bool) or (isinstance(folds, int) and folds < 2):
        raise ArgumentError(f"folds={folds!r}", "at least 2, or a splitter")
    count = folds if isinstance(folds, int) else 1
    labels = check_labels(y, count, groups)
    names = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if isinstance(folds, int):
        if names is not None and names.max() + 1 < folds:
            raise ArgumentError(f"{names.max() + 1} groups for {folds} folds", "as many groups as folds", "fewer folds")
        kind = StratifiedKFold if names is None else StratifiedGroupKFold
        splitter = kind(folds, shuffle=True, random_state=seed)
    else:
        splitter: Any = folds
    found = []
    for number, (train, test) in enumerate(splitter.split(np.zeros((len(labels), 1)), labels, names)):
        _check_uncut(train, test, names, type(splitter).__name__)
        if _has_all(labels, train, test, number, on_missing_class):
            found.append((np.asarray(train), np.asarray(test)))
    if not found:
        raise ArgumentError("no fold with every class in training and two in test", "groups that share the classes")
    return found


def value_folds(y: Any, groups: Any = None, folds: Any = 5, seed: int = 0) -> list[Split]:
    """Training and test indices of each fold where y holds numbers: shuffled, and with groups never cut.

    Args:
        y: [n].
        groups: [n] or None.
        folds: A number, or a splitter of scikit-learn; one that cuts groups is refused.
        seed: Of the shuffle.

    Raises:
        ArgumentError: If there are fewer examples or groups than folds, or groups are cut.
    """
    from sklearn.model_selection import GroupKFold, KFold

    if isinstance(folds, bool) or (isinstance(folds, int) and folds < 2):
        raise ArgumentError(f"folds={folds!r}", "at least 2, or a splitter")
    check_lengths(len(y), groups=groups)
    names = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    splitter: Any = folds
    if isinstance(folds, int):
        parts = len(y) if names is None else int(names.max()) + 1
        if parts < folds:
            unit = "examples" if names is None else "groups"
            raise ArgumentError(f"{parts} {unit} for {folds} folds", f"as many {unit} as folds", "fewer folds")
        splitter = (KFold if names is None else GroupKFold)(folds, shuffle=True, random_state=seed)
    found = []
    for train, test in splitter.split(np.zeros((len(y), 1)), y, names):
        _check_uncut(train, test, names, type(splitter).__name__)
        found.append((np.asarray(train), np.asarray(test)))
    return found


def _check_uncut(train: np.ndarray, test: np.ndarray, groups: np.ndarray | None, name: str) -> None:
    cut = [] if groups is None else sorted(set(groups[train].tolist()) & set(groups[test].tolist()))
    if cut:
        raise ArgumentError(
            f"{name} cuts {len(cut)} of the groups", "a splitter that keeps groups together",
            "a number of folds, StratifiedGroupKFold or GroupKFold",
        )  # fmt: skip


def _has_all(labels: np.ndarray, train: np.ndarray, test: np.ndarray, number: int, on_missing: OnMissing) -> bool:
    lacking = sorted(set(labels.tolist()) - set(labels[train].tolist()), key=str)
    if not lacking and len(set(labels[test].tolist())) > 1:
        return True
    what = f"the training part lacks {lacking[:5]}" if lacking else "the test part has one class"
    if on_missing == "raise":
        raise ArgumentError(
            f"fold {number}: {what}", "every class in training and two in test",
            'fewer folds, or on_missing_class="warn" to leave the fold out',
        )  # fmt: skip
    warnings.warn(f"fold {number} is left out: {what}", SplitWarning, stacklevel=4)
    return False
