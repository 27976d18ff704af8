"""Scores of probabilities on held-out examples, and their calibration."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows, Table

FLOOR = 1e-6
BINS = 15


def score_table(y: Int64[np.ndarray, "n"], p: Float[np.ndarray, "n classes"]) -> dict[str, float]:
    """Every score: accuracy, balanced accuracy, ROC-AUC, average precision, log-loss, Brier score, ECE.

    AUC and average precision of more than two classes are means over classes, each against the rest; of two classes the
    second is the positive one. Log-loss is in nats, with probabilities of at least 1e-6.

    Args:
        y: Class numbers.
        p: Probabilities, in the order of the classes.

    Example:
        >>> scores = score_table(np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]))
        >>> round(scores["accuracy"], 3), scores["balanced_accuracy"], scores["roc_auc"]
        (0.667, 0.75, 1.0)
    """
    return {
        "accuracy": float((p.argmax(1) == y).mean()),
        "balanced_accuracy": balanced_accuracy(y, p.argmax(1)),
        "roc_auc": _over_classes(y, p, _auc),
        "average_precision": _over_classes(y, p, _average_precision),
        "log_loss": float(log_losses(y, p).mean()),
        "brier": float(((p - np.eye(p.shape[1])[y]) ** 2).sum(1).mean()),
        "ece": calibration(y, p).ece,
    }


def balanced_accuracy(y: Int64[np.ndarray, "n"], predicted: Int64[np.ndarray, "n"]) -> float:
    """Mean over the classes that occur of the share of their members that is recognised."""
    return float(np.mean([(predicted[y == k] == k).mean() for k in np.unique(y)]))


def log_losses(y: Int64[np.ndarray, "n"], p: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n"]:
    """-ln p of each example's class, p at least 1e-6."""
    return -np.log(np.maximum(p[np.arange(len(y)), y], FLOOR))


def _over_classes(y: np.ndarray, p: np.ndarray, function: Any) -> float:
    wanted = [1] if p.shape[1] == 2 else range(p.shape[1])
    found = [function(y == k, p[:, k]) for k in wanted if 0 < (y == k).sum() < len(y)]
    return float(np.mean(found)) if found else float("nan")


def _auc(positive: np.ndarray, score: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative; ties count half (Mann and Whitney)."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]
    n = positive.sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n))


def _average_precision(positive: np.ndarray, score: np.ndarray) -> float:
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(positive, score))


@dataclass(frozen=True, eq=False)
class Calibration(Rows):
    """Confidence against accuracy in bins of equal mass.

    Attributes:
        confidence: [bins], mean probability of the predicted class.
        accuracy: [bins], share that was right.
        counts: [bins].
        ece: Expected calibration error: mean |accuracy - confidence|, weighted by the counts.
    """

    confidence: Float[np.ndarray, "bins"] = field(repr=False)
    accuracy: Float[np.ndarray, "bins"] = field(repr=False)
    counts: Int64[np.ndarray, "bins"] = field(repr=False)
    ece: float

    @property
    def bins(self) -> int:
        """Number of bins."""
        return len(self.counts)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each bin."""
        rows = zip(self.confidence.tolist(), self.accuracy.tolist(), self.counts.tolist(), strict=True)
        return [{"confidence": c, "accuracy": a, "n": n} for c, a, n in rows]

    def table(self) -> Table:
        """The rows as a table."""
        return Table(self.to_records(), f"ECE {self.ece:.3f} in {self.bins} bins of equal mass")


def calibration(y: Int64[np.ndarray, "n"], p: Float[np.ndarray, "n classes"], bins: int = BINS) -> Calibration:
    """Reliability of probabilities in ``bins`` bins of equal mass (fewer, where there are fewer examples).

    Raises:
        ArgumentError: If there are no examples, or fewer than one bin.
    """
    if not len(y) or bins < 1:
        raise ArgumentError(f"{len(y)} examples in {bins} bins", "at least one of each")
    confidence, right = p.max(1), p.argmax(1) == y
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(y)))
    c = np.array([confidence[part].mean() for part in parts])
    a = np.array([right[part].mean() for part in parts])
    counts = np.array([len(part) for part in parts])
    return Calibration(c, a, counts, float((np.abs(c - a) * counts).sum() / counts.sum()))


def fit_temperature(y: Int64[np.ndarray, "n"], p: Float[np.ndarray, "n classes"]) -> float:
    """The temperature T for which softmax(ln p / T) has the least log-loss; fit it on held-out examples.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Example:
        >>> p = np.array([[0.999, 0.001], [0.001, 0.999], [0.999, 0.001], [0.001, 0.999]])
        >>> fit_temperature(np.array([0, 1, 0, 0]), p) > 1
        True
    """
    from scipy.optimize import minimize_scalar

    logs = np.log(np.maximum(p, 1e-300))
    loss = lambda t: float(log_losses(y, apply_temperature(np.exp(logs), float(np.exp(t)))).mean())
    return float(np.exp(minimize_scalar(loss, bounds=(-4, 6), method="bounded").x))  # pyright: ignore


def apply_temperature(p: Float[np.ndarray, "n classes"], temperature: float) -> Float[np.ndarray, "n classes"]:
    """softmax(ln p / T)."""
    logits = np.log(np.maximum(p, 1e-300)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
