"""The low-data comparison: a vector read off the weights against probes trained on a few examples.

Source: Dunefsky & Cohan, "Observable Propagation", ICML 2024, section 5.4, with one site, position and split for all
methods, seeds and intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows, Table
from interp.propagation.feature_vectors import FeatureVector

_METHODS = ("feature vector", "linear regression", "logistic regression", "mean difference")
_DRAWS, _FEWEST = 200, 4


@dataclass(frozen=True)
class LowDataComparison(Rows):
    """Held-out scores by method and number of training examples.

    Attributes:
        methods: Names.
        sizes: Training examples.
        r2: Squared correlation with the measurement on held-out examples, [method, size, seed].
        auc: Area under the ROC curve for its sign (or given labels), [method, size, seed].
        tested: How many examples were held out at the largest size.
    """

    methods: list[str]
    sizes: list[int]
    r2: Float[Tensor, "method size seed"] = field(repr=False)
    auc: Float[Tensor, "method size seed"] = field(repr=False)
    tested: int

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each method and size: means, and 95 % intervals over seeds."""
        rows = []
        for i, method in enumerate(self.methods):
            for j, size in enumerate(self.sizes):
                row: dict[str, Any] = {"method": method, "training examples": 0 if i == 0 else size}
                if i == 0 and j:
                    continue
                for name, values in (("r2", self.r2[i, j]), ("auc", self.auc[i, j])):
                    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
                    row |= {name: float(values.mean()), f"{name} low": low, f"{name} high": high}
                rows.append(row)
        return rows

    def table(self) -> Table:
        """The rows as a table."""
        return Table(self.to_records(), f"held-out scores, {self.tested} examples or more")


def low_data_comparison(
    vector: FeatureVector, activations: Float[Tensor, "example d"], measurements: Float[Tensor, "example"], *,
    labels: Bool[Tensor, "example"] | None = None, groups: Sequence[Any] | None = None,
    sizes: Sequence[int] = (10, 30, 60), seeds: int = 20,
) -> LowDataComparison:  # fmt: skip
    """Compare a feature vector with probes trained on few of the same activations.

    Each seed draws a training set; every method is scored on the same held-out examples. The vector sees no training
    set. Regression fits the measurement, the logistic one and the mean difference fit its label.

    Args:
        vector: Made from weights and at most a prompt.
        activations: Rows of the vector's own site, one position of each example.
        measurements: The model's own measurement on each example.
        labels: Classes; by default whether the measurement is above its median.
        groups: A group for each example (its template, say): none is both in training and held out.
        sizes: Numbers of training examples.
        seeds: How many draws.

    Raises:
        ArgumentError: If shapes do not match, a size leaves nothing to test, or one class is missing.
    """
    x, m = activations.detach().float().cpu(), measurements.detach().float().cpu()
    y = m > m.median() if labels is None else labels.cpu()
    _check(vector, x, m, y, groups, sizes, seeds)
    ids = {g: i for i, g in enumerate(dict.fromkeys(groups))} if groups is not None else {}
    group = torch.arange(len(m)) if groups is None else torch.tensor([ids[g] for g in groups])
    free = x @ vector.vector.float().cpu()
    r2 = torch.zeros(len(_METHODS), len(sizes), seeds, dtype=torch.float64)
    auc, tested = torch.zeros_like(r2), len(m)
    for j, size in enumerate(sizes):
        for seed in range(seeds):
            train, test = _split(group, y, size, seed)
            tested = min(tested, len(test))
            scores = [free[test], *(x[test] @ w for w in _fitted(x[train], m[train], y[train]))]
            for i, score in enumerate(scores):
                r2[i, j, seed] = torch.corrcoef(torch.stack([score, m[test]]).double())[0, 1] ** 2
                auc[i, j, seed] = _auc(score, y[test])
    return LowDataComparison(list(_METHODS), list(sizes), r2, auc, tested)


def _check(
    vector: FeatureVector, x: Tensor, m: Tensor, y: Tensor, groups: Any, sizes: Sequence[int], seeds: int
) -> None:  # fmt: skip
    if x.shape[1] != len(vector.vector) or len(m) != len(x) or len(y) != len(x):
        raise ArgumentError(
            f"activations {list(x.shape)}, {len(m)} measurements, {len(y)} labels",
            f"rows of width {len(vector.vector)}, as many measurements and labels",
        )
    if groups is not None and len(groups) != len(x):
        raise ArgumentError(f"{len(groups)} groups", f"one for each of {len(x)} examples")
    if seeds < 2 or not len(sizes) or min(sizes) < _FEWEST or max(sizes) > len(x) - _FEWEST:
        raise ArgumentError(
            f"sizes={list(sizes)} of {len(x)} examples, seeds={seeds}", "4 or more on each side, 2 seeds"
        )
    if bool(y.all()) or not bool(y.any()):
        raise ArgumentError("labels of one class", "two classes")


def _split(group: Tensor, y: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """A training set of about this size with both classes, and the rest without its groups."""
    made, names = torch.Generator().manual_seed(seed), group.unique()
    grouped = len(names) < len(group)
    for _ in range(_DRAWS):
        # Whole groups train, half of them; examples are then drawn among theirs.
        half = names[torch.randperm(len(names), generator=made)][: (len(names) + 1) // 2]
        order = torch.randperm(len(group), generator=made)
        train = (order[torch.isin(group[order], half)] if grouped else order)[:size]
        test = torch.arange(len(group))[~torch.isin(group, group[train])]
        both = all(0 < int(y[part].sum()) < len(part) for part in (train, test))
        if len(train) == size and len(test) >= _FEWEST and both:
            return train, test
    raise ArgumentError(
        f"{size} training examples of {len(group)} in {len(group.unique())} groups",
        "groups that leave both classes on either side", "use smaller sizes",
    )  # fmt: skip


def _fitted(x: Tensor, m: Tensor, y: Tensor) -> list[Tensor]:
    """Directions: least squares (smallest norm) on the measurement, logistic on the label, difference of means."""
    import numpy as np
    from sklearn.linear_model import LinearRegression, LogisticRegression

    linear = LinearRegression().fit(x.numpy(), m.numpy()).coef_
    scale = float(x.std(0).mean().clamp(min=1e-12))
    logistic = LogisticRegression(max_iter=2000).fit(x.numpy() / scale, y.numpy().astype(np.int64)).coef_[0]
    return [torch.as_tensor(w, dtype=x.dtype) for w in (linear, logistic)] + [x[y].mean(0) - x[~y].mean(0)]


def _auc(score: Tensor, y: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y.numpy(), score.numpy()))
