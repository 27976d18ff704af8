"""Attention pooling: a linear probe of learned averages over tokens."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.hooks.errors import ArgumentError
from interp.probes.estimator import SkipFirst
from interp.probes.trained import Start, TrainedTokenProbe


class AttentionHead(nn.Module):
    """Logits W concat_k(sum_t softmax_t(q_k . x_t / sqrt d) x_t) + b, with the softmax over valid tokens.

    The queries start near zero, so that the head begins close to mean pooling.
    """

    def __init__(self, width: int, classes: int, queries: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.1)
        self.classifier = nn.Linear(queries * width, classes)

    def weights(
        self, features: Float[Tensor, "batch T d"], mask: Bool[Tensor, "batch T"]
    ) -> Float[Tensor, "batch queries T"]:
        """Attention over the valid tokens, summing to 1."""
        clean = features.masked_fill(~mask[..., None], 0)
        scores = self.queries @ clean.transpose(1, 2) / features.shape[2] ** 0.5
        return scores.masked_fill(~mask[:, None], -torch.inf).softmax(2)

    def forward(
        self, features: Float[Tensor, "batch T d"], mask: Bool[Tensor, "batch T"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.classifier(self.pooled(features, mask))

    def pooled(self, features: Float[Tensor, "batch T d"], mask: Bool[Tensor, "batch T"]) -> Float[Tensor, "batch k"]:
        """The averages of all queries, one after the other."""
        return (self.weights(features, mask) @ features.masked_fill(~mask[..., None], 0)).flatten(1)

    @torch.no_grad()
    def start_at(self, weight: Float[Tensor, "classes k"], bias: Float[Tensor, "classes"]) -> None:
        """Let the head be this linear probe of the averages."""
        self.classifier.weight.copy_(weight)
        self.classifier.bias.copy_(bias)


class AttentionProbe(TrainedTokenProbe):
    """A linear probe of attention-pooled tokens, with learned queries: the natural competitor of `MomentProbe`.

    Args:
        queries: Learned queries, each with its own average.
        epochs: Most epochs.
        lr: Highest learning rate.
        weight_decay: On matrices.
        batch_size: Most examples in a step; fewer, 8 at least, where an epoch would have less than ten steps.
        validation: Share of the examples that chooses the epoch.
        patience: Epochs without improvement after which training stops.
        class_weight: None, ``balanced`` or a dict.
        skip_first: As in `MomentProbe`.
        start: ``linear``: from the convex linear probe of the pooled tokens; ``random``.
        random_state: A seed, or (initialisation, order, split).

    Example:
        >>> X = torch.randn(40, 6, 5)
        >>> y = (X[:, :, 0].mean(1) > 0).long()
        >>> AttentionProbe(epochs=2).fit(X, y).attention(X)[0].sum().round().item()
        1.0
    """

    head_: AttentionHead

    def __init__(
        self, queries: int = 1, *, epochs: int = 30, lr: float = 1e-2, weight_decay: float = 0.05,
        batch_size: int = 64, validation: float = 0.15, patience: int = 10, class_weight: Any = None,
        skip_first: SkipFirst = "auto", start: Start = "linear", random_state: Any = 0,
    ):  # fmt: skip
        self.queries, self.epochs, self.lr, self.weight_decay = queries, epochs, lr, weight_decay
        self.batch_size, self.validation, self.patience = batch_size, validation, patience
        self.class_weight, self.skip_first, self.start = class_weight, skip_first, start
        self.random_state = random_state

    def fit(self, X: Any, y: Any, mask: Any = None, groups: Any = None) -> "AttentionProbe":
        """Train as `MomentProbe.fit` does.

        Raises:
            ArgumentError: If ``queries`` is not a positive whole number, or the input is malformed.
        """
        if isinstance(self.queries, bool) or not isinstance(self.queries, int) or self.queries < 1:
            raise ArgumentError(f"queries={self.queries!r}", "a positive whole number")
        sets = self._inputs(X, mask, fitting=True)
        self._fit_head(sets, y, self.class_weight, groups)
        return self

    def attention(self, X: Any, mask: Any = None) -> Float[Tensor, "n queries T"]:
        """Where the queries look: weights over the valid tokens that are used, padded with zeros on the right."""
        sets = self._scaled(self._inputs(X, mask), torch.float64)
        with torch.no_grad():
            return self.head_.weights(*sets.padded())

    def _module(self) -> nn.Module:
        return AttentionHead(self.n_features_in_, len(self.classes_), self.queries)
