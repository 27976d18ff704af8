"""Minimum description length of labels given activations, by online coding.

Source: Voita & Titov, "Information-Theoretic Probing with Minimum Description Length", EMNLP 2020.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows, Table
from interp.probes.estimator import check_lengths
from interp.probes.fitting import as_numbers, fit, probabilities, take
from interp.probes.scores import FLOOR

SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Codelength(Rows):
    """Bits that it takes to send the labels to someone who has the activations.

    Attributes:
        n: Number of labels.
        classes: Number of classes.
        ends: Where each block ends; the first is sent by a uniform code.
        bits_by_block: [orders, blocks].
    """

    n: int
    classes: int
    ends: list[int]
    bits_by_block: Float[np.ndarray, "orders blocks"] = field(repr=False)

    @property
    def bits(self) -> float:
        """Total, mean over the orders."""
        return float(self.bits_by_block.sum(1).mean())

    @property
    def spread(self) -> float:
        """Standard deviation of the total over the orders."""
        return float(self.bits_by_block.sum(1).std(ddof=1)) if len(self.bits_by_block) > 1 else float("nan")

    @property
    def bits_per_label(self) -> float:
        """Total by number of labels."""
        return self.bits / self.n

    @property
    def compression(self) -> float:
        """n log2 K by the total: 1 for a probe that knows nothing, more for one that knows."""
        return self.n * math.log2(self.classes) / self.bits

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each block."""
        starts, bits = [0, *self.ends[:-1]], self.bits_by_block.mean(0).tolist()
        return [
            {"from": a, "to": b, "bits": x, "bits per label": x / (b - a)}
            for a, b, x in zip(starts, self.ends, bits, strict=True)
        ]

    def table(self) -> Table:
        """The rows as a table."""
        title = f"{self.bits:.1f} bits, {self.bits_per_label:.3f} per label, compression {self.compression:.2f}"
        return Table(self.to_records(), title)

    def __str__(self) -> str:
        return str(self.table())


def online_codelength(
    probe: Any, X: Any, y: Any, *, groups: Any = None, shares: Sequence[float] = SHARES, orders: int = 3, seed: int = 0
) -> Codelength:
    """Send the labels block by block, each with a probe fitted on the blocks before it.

        L = t_1 log2 K + sum_j -log2 p_j(y in block j + 1 | x)

    Blocks end at the given shares of the data; leading ones below max(16, 2 K) labels join the next. Orders are random
    but for two members of each class in the first block. Probabilities are at least 1e-6, and sum to one.

    With groups an order is one of whole groups, two with each class first, and the first block is at least as long as
    these. A group that the end of a block cuts is left out of the fit for the next block: no block is sent with a
    probe that saw one of its groups.

    Args:
        probe: Any classifier with probabilities.
        X: Features.
        y: Labels.
        groups: [n]: document, speaker, template. None: each example is its own.
        shares: Ends of the blocks, rising to 1.
        orders: Random orders that are averaged.
        seed: Of the orders.

    Raises:
        ArgumentError: If there are too few examples for two blocks, a class in fewer than two groups, the shares do
            not rise to 1, or groups are not as many as labels.

    Example:
        >>> from sklearn.dummy import DummyClassifier
        >>> found = online_codelength(DummyClassifier(strategy="uniform"), np.zeros((64, 1)), [0, 1, 2, 3] * 16)
        >>> round(found.bits, 6), round(found.compression, 6)
        (128.0, 1.0)
    """
    numbers, classes = as_numbers(y, X)
    n, k = len(numbers), len(classes)
    if list(shares) != sorted(set(shares)) or not shares or shares[-1] != 1 or shares[0] <= 0 or orders < 1:
        raise ArgumentError(f"shares={list(shares)}, orders={orders}", "shares rising to 1, at least one order")
    least = max(16, 2 * k)
    ends = sorted({round(s * n) for s in shares if round(s * n) >= least})
    if k < 2 or len(ends) < 2 or np.bincount(numbers).min() < 2:
        raise ArgumentError(
            f"{n} labels of {k} classes, the rarest {np.bincount(numbers).min() if n else 0} times",
            f"two blocks of at least {least} labels, two classes, each twice",
        )  # fmt: skip
    generators = [np.random.default_rng(seed + i) for i in range(orders)]
    if groups is None:
        drawn = [_order(numbers, k, ends[0], generator) for generator in generators]
    else:
        check_lengths(n, groups=groups)
        groups = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
        pairs = [_grouped_order(numbers, k, groups, generator) for generator in generators]
        drawn, longest = [order for order, _ in pairs], max(lead for _, lead in pairs)
        ends = [end for end in ends if end >= longest]
        if len(ends) < 2:
            raise ArgumentError(f"{longest} of {n} labels in two groups of each class", "two blocks", "smaller groups")
    found = [_one_order(probe, X, numbers, k, ends, order, groups, seed + i) for i, order in enumerate(drawn)]
    return Codelength(n, k, ends, np.array(found))


def _one_order(
    probe: Any, X: Any, y: np.ndarray, k: int, ends: list[int], order: np.ndarray, groups: np.ndarray | None, seed: int
) -> list[float]:
    bits = [ends[0] * math.log2(k)]
    for start, end in pairwise(ends):
        known = order[:start]
        if groups is not None:
            known = known[~np.isin(groups[known], groups[order[start:end]])]
        made = fit(probe, take(X, known), y[known], None if groups is None else groups[known], seed)
        p = np.maximum(probabilities(made, take(X, order[start:end]), k), FLOOR)
        p = p / p.sum(1, keepdims=True)
        bits.append(float(-np.log2(p[np.arange(end - start), y[order[start:end]]]).sum()))
    return bits


def _grouped_order(y: np.ndarray, k: int, groups: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Examples group by group, and how many are in the groups that lead."""
    names = generator.permutation(int(groups.max()) + 1)
    having = [names[np.isin(names, groups[y == label])] for label in range(k)]
    if (fewest := min(len(own) for own in having)) < 2:
        raise ArgumentError(f"a class in {fewest} group", "each class in two groups or more")
    lead = np.unique(np.concatenate([own[:2] for own in having]))
    names = np.concatenate([lead, names[~np.isin(names, lead)]])
    rank = np.empty(len(names), dtype=int)
    rank[names] = np.arange(len(names))
    return np.argsort(rank[groups], kind="stable"), int(np.isin(groups, lead).sum())


def _order(y: np.ndarray, k: int, first: int, generator: np.random.Generator) -> np.ndarray:
    order = generator.permutation(len(y))
    lead = np.concatenate([order[y[order] == label][:2] for label in range(k)])
    rest = order[~np.isin(order, lead)]
    head = generator.permutation(np.concatenate([lead, rest[: first - len(lead)]]))
    return np.concatenate([head, rest[first - len(lead) :]])
