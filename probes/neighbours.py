"""Nearest neighbours by cosine: a check on geometry, not on linear decodability."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.probes.estimator import SkipFirst, VectorProbe, as_array
from interp.probes.site_fits import moments_of
from interp.probes.tokens import Pool

CHUNK = 1024


class KNNProbe(VectorProbe):
    """Votes of the k training examples with the largest cosine; a zero vector has cosine 0 with everything.

    Probabilities are shares of votes; logits are log shares with half a vote added to each class. Cosines that agree
    to ten digits count as equal, and of equals the earlier example is taken.

    Args:
        k: Neighbours; all examples where there are fewer.
        pool: How a set of tokens becomes one vector.
        standardize: Whether features get mean 0 and variance 1 first.
        skip_first: As in `LogisticProbe`.

    Example:
        >>> X = torch.tensor([[1.0, 0.1], [2.0, 0.0], [0.1, 1.0], [0.0, 3.0]])
        >>> KNNProbe(k=1).fit(X, ["right", "right", "up", "up"]).predict(torch.tensor([[5.0, 1.0]])).tolist()
        ['right']
    """

    train_: np.ndarray
    labels_: np.ndarray

    def __init__(self, k: int = 10, *, pool: Pool = "mean", standardize: bool = False, skip_first: SkipFirst = "auto"):
        self.k, self.pool, self.standardize, self.skip_first = k, pool, standardize, skip_first

    def fit(self, X: Any, y: Any, mask: Any = None) -> "KNNProbe":
        """Keep the training examples.

        Raises:
            ArgumentError: If k is not a positive whole number, or the input is malformed.
        """
        if isinstance(self.k, bool) or not isinstance(self.k, (int, np.integer)) or self.k < 1:
            raise ArgumentError(f"k={self.k!r}", "a positive whole number")
        vectors, labels, weights = self._fit_inputs(X, y, mask, None)
        mean, std = moments_of(vectors, weights)
        self.mean_ = as_array(mean if self.standardize else torch.zeros_like(mean))
        self.std_ = as_array(std if self.standardize else torch.ones_like(std))
        self.train_, self.labels_ = as_array(self._units(vectors)), as_array(labels)
        return self

    def _units(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        z = (vectors - torch.as_tensor(self.mean_).to(vectors)) / torch.as_tensor(self.std_).to(vectors)
        return z / z.norm(dim=1, keepdim=True).clamp(min=1e-300)

    def _votes(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        train = torch.as_tensor(self.train_).to(vectors)
        onehot = torch.nn.functional.one_hot(torch.as_tensor(self.labels_), len(self.classes_)).to(vectors)
        k, votes = min(self.k, len(train)), []
        for part in self._units(vectors).split(CHUNK):
            cosines = (part @ train.T).mul(1e10).round()
            nearest = cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
            votes.append(onehot[nearest].sum(1))
        return torch.cat(votes)

    def _logits(self, inputs: Float[Tensor, "n d"]) -> Tensor:
        logs = (self._votes(inputs) + 0.5).log()
        return logs[:, 1] - logs[:, 0] if logs.shape[1] == 2 else logs

    def _probabilities(self, inputs: Float[Tensor, "n d"]) -> Tensor:
        votes = self._votes(inputs)
        return votes / votes.sum(1, keepdim=True)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        d, n = self.n_features_in_, len(self.labels_)
        return {"train_": (n, d), "labels_": (n,), "mean_": (d,), "std_": (d,)}
