"""A probe with one hidden layer: what is encoded, but not linearly. To be read beside a control task."""

from typing import Any

import numpy as np
from torch import nn

from interp.hooks.errors import ArgumentError
from interp.probes.estimator import SkipFirst, VectorProbe
from interp.probes.tokens import Pool
from interp.probes.trained import TrainedProbe


class MLPProbe(VectorProbe, TrainedProbe):
    """Logits W2 relu(W1 v + b1) + b2 of a standardised vector. Its gain over `LogisticProbe` is non-linear information.

    Such a probe can also learn what the representation does not hold: report it with a control task.

    Args:
        hidden: Width of the hidden layer; ``auto`` is d / 4, 16 at least.
        pool: How a set of tokens becomes one vector.
        epochs: Most epochs.
        lr: Highest learning rate.
        weight_decay: On matrices.
        batch_size: Most examples in a step; fewer, 8 at least, where an epoch would have less than ten steps.
        validation: Share of the examples that chooses the epoch.
        patience: Epochs without improvement after which training stops.
        class_weight: None, ``balanced`` or a dict.
        skip_first: As in `LogisticProbe`.
        random_state: A seed, or (initialisation, order, split).

    Example:
        >>> import torch
        >>> X = torch.randn(60, 3)
        >>> y = (X[:, 0] * X[:, 1] > 0).long()
        >>> MLPProbe(epochs=3).fit(X, y).predict_proba(X).shape
        torch.Size([60, 2])
    """

    def __init__(
        self, hidden: Any = "auto", *, pool: Pool = "mean", epochs: int = 100, lr: float = 3e-3,
        weight_decay: float = 0.05, batch_size: int = 64, validation: float = 0.15, patience: int = 20,
        class_weight: Any = None, skip_first: SkipFirst = "auto", random_state: Any = 0,
    ):  # fmt: skip
        self.hidden, self.pool, self.epochs, self.lr, self.weight_decay = hidden, pool, epochs, lr, weight_decay
        self.batch_size, self.validation, self.patience = batch_size, validation, patience
        self.class_weight, self.skip_first, self.random_state = class_weight, skip_first, random_state

    def fit(self, X: Any, y: Any, mask: Any = None, groups: Any = None) -> "MLPProbe":
        """Train on vectors [n, d], or on token sets that ``pool`` makes vectors of.

        Raises:
            ArgumentError: If ``hidden`` is not a positive whole number or "auto", or the input is malformed.
        """
        number = isinstance(self.hidden, (int, np.integer)) and not isinstance(self.hidden, bool) and self.hidden > 0
        if not number and self.hidden != "auto":
            raise ArgumentError(f"hidden={self.hidden!r}", "a positive whole number or 'auto'")
        vectors = self._inputs(X, mask, fitting=True)
        self._fit_head(vectors, y, self.class_weight, groups)
        return self

    def _module(self) -> nn.Module:
        width = max(16, self.n_features_in_ // 4) if self.hidden == "auto" else int(self.hidden)
        return nn.Sequential(nn.Linear(self.n_features_in_, width), nn.ReLU(), nn.Linear(width, len(self.classes_)))
