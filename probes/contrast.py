"""Contrast-consistent search: a direction found without labels, from pairs of a statement and its negation."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Table
from interp.observables.observable import Observable
from interp.probes.estimator import Probe, as_array, check_is_fitted, check_lengths, check_width

UNKNOWN = -1


class CCSProbe(Probe):
    """Contrast-consistent search on pairs (x+, x-): probabilities that are consistent and confident.

    Each side is standardised by itself; p = sigmoid(w x + b); the loss is the mean of
    (p+ - (1 - p-))^2 + min(p+, p-)^2; of ``restarts`` random starts the lowest loss is kept. The answer for a pair is
    (p+ + 1 - p-) / 2.

    Labels are not used for the direction, so its sign is not determined: without labels `score` is max(acc, 1 - acc);
    with some (``-1`` where unknown) they choose the sign. The search finds the most salient contrast, which need not be
    the intended one: `report` puts it beside the top principal component of the differences. Compare with
    `LogisticProbe` too.

    Source: Burns, Ye, Klein, Steinhardt, "Discovering Latent Knowledge in Language Models Without Supervision", ICLR
    2023 (arXiv 2212.03827).

    Args:
        restarts: Random starts.
        steps: Steps of Adam for each.
        lr: Its learning rate.
        weight_decay: Its decay of w.
        random_state: Seed of the starts.

    Attributes:
        coef_: [d], for standardised features.
        loss_: The lowest loss.
        losses_: [restarts].
        sign_known_: Whether labels chose the sign.

    Example:
        >>> y = torch.arange(40) % 2
        >>> truth = torch.randn(8)
        >>> plus = torch.randn(40, 8) * 0.1 + (2 * y[:, None] - 1) * truth
        >>> minus = torch.randn(40, 8) * 0.1 - (2 * y[:, None] - 1) * truth
        >>> CCSProbe().fit(torch.stack([plus, minus], 1)).score(torch.stack([plus, minus], 1), y)
        1.0
    """

    coef_: np.ndarray
    mean_: np.ndarray
    std_: np.ndarray
    component_: np.ndarray

    def __init__(
        self, restarts: int = 10, *, steps: int = 1000, lr: float = 1e-2, weight_decay: float = 1e-2,
        random_state: int = 0,
    ):  # fmt: skip
        self.restarts, self.steps, self.lr = restarts, steps, lr
        self.weight_decay, self.random_state = weight_decay, random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.target_tags.required = False
        return tags

    def fit(self, X: Any, y: Any = None) -> "CCSProbe":
        """Find the direction.

        Args:
            X: [n, 2, d]: the activation of the statement as true (x+), and as false (x-).
            y: None, or for each pair 1 where x+ is the true one, 0 where x- is, -1 where that is unknown.

        Raises:
            ArgumentError: If X is not of pairs, or y holds other values.
        """
        if self.restarts < 1 or self.steps < 1:
            raise ArgumentError(f"restarts={self.restarts}, steps={self.steps}", "at least 1 of each")
        pairs = self._inputs(X, None, fitting=True)
        self.classes_ = np.array([0, 1])
        mean, std = pairs.mean(0), pairs.std(0, correction=0)
        self.mean_, self.std_ = as_array(mean), as_array(torch.where(std > 0, std, 1.0))
        z = self._scaled(pairs)
        weights, offsets, losses = self._search(z)
        best = int(losses.argmin())
        self.losses_, self.loss_ = as_array(losses), float(losses[best])
        self.coef_, self.intercept_ = as_array(weights[best]), float(offsets[best])
        differences = z[:, 0] - z[:, 1]
        self.component_ = as_array(torch.linalg.svd(differences - differences.mean(0))[2][0])
        self.sign_known_ = False
        if y is not None:
            self._choose_sign(pairs, y)
        return self

    def _inputs(self, X: Any, mask: Any, *, fitting: bool = False) -> Float[Tensor, "n 2 d"]:
        if mask is not None:
            raise ArgumentError("a mask for pairs", "no mask: each side is one vector")
        pairs = torch.as_tensor(X if isinstance(X, Tensor) else np.asarray(X)).detach()
        if pairs.ndim != 3 or pairs.shape[1] != 2 or not len(pairs):
            raise ArgumentError(f"features of shape {list(pairs.shape)}", "[pairs, 2, d]: x+ and x-")
        pairs = pairs.double()
        if not bool(torch.isfinite(pairs).all()):
            bad = (~torch.isfinite(pairs)).flatten(1).any(1).nonzero().flatten()
            raise ArgumentError(f"NaN or infinity in {len(bad)} pairs, first in pair {int(bad[0])}", "finite features")
        check_width(self, pairs.shape[2], fitting)
        return pairs

    def _scaled(self, pairs: Float[Tensor, "n 2 d"]) -> Float[Tensor, "n 2 d"]:
        return (pairs - torch.as_tensor(self.mean_).to(pairs)) / torch.as_tensor(self.std_).to(pairs)

    def _search(self, z: Float[Tensor, "n 2 d"]) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.random_state)
        starts = torch.randn(self.restarts, z.shape[2], generator=generator, dtype=torch.float64)
        weights = (starts / starts.norm(dim=1, keepdim=True)).to(z.device).requires_grad_()
        offsets = torch.zeros(self.restarts, dtype=torch.float64, device=z.device, requires_grad=True)
        groups = [{"params": [weights], "weight_decay": self.weight_decay}, {"params": [offsets], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad(set_to_none=True)
                contrast_loss(torch.sigmoid(z @ weights.T + offsets)).sum().backward()
                optimizer.step()
        with torch.no_grad():
            losses = contrast_loss(torch.sigmoid(z @ weights.T + offsets))
        return weights.detach(), offsets.detach(), losses

    def _choose_sign(self, pairs: Tensor, y: Any) -> None:
        labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
        check_lengths(len(pairs), y=labels)
        if set(labels.tolist()) - {0, 1, UNKNOWN}:
            raise ArgumentError(f"labels {sorted(set(labels.tolist()))[:10]}", "1, 0, or -1 where unknown")
        known = labels != UNKNOWN
        if not known.any():
            return
        right = ((self._logits(pairs) > 0).cpu().numpy() == labels)[known].mean()
        if right < 0.5:
            self.coef_, self.intercept_ = -self.coef_, -self.intercept_
        self.sign_known_ = True

    def _probability(self, inputs: Float[Tensor, "n 2 d"]) -> Float[Tensor, "n"]:
        p = torch.sigmoid(self._scaled(inputs) @ torch.as_tensor(self.coef_).to(inputs) + self.intercept_)
        return (p[:, 0] + 1 - p[:, 1]) / 2

    def _logits(self, inputs: Float[Tensor, "n 2 d"]) -> Tensor:
        return torch.logit(self._probability(inputs))

    def score(self, X: Any, y: Any, sample_weight: Any = None, mask: Any = None) -> float:
        """Accuracy; without a known sign max(accuracy, 1 - accuracy)."""
        accuracy = super().score(X, y, sample_weight, mask)
        return accuracy if self.sign_known_ else max(accuracy, 1 - accuracy)

    def report(self, X: Any, y: Any) -> Table:
        """Accuracy beside that of the top principal component of the differences x+ - x-.

        Args:
            X: [n, 2, d].
            y: Labels, 1 or 0.
        """
        check_is_fitted(self)
        z, labels = self._scaled(self._inputs(X, None)), np.asarray(y.cpu() if isinstance(y, Tensor) else y)
        check_lengths(len(z), y=labels)
        along = (z[:, 0] - z[:, 1]) @ torch.as_tensor(self.component_).to(z)
        component = float(((along > 0).cpu().numpy() == labels).mean())
        rows = [
            {"probe": "contrast-consistent search", "accuracy": self.score(X, y), "sign known": self.sign_known_},
            {"probe": "top component of differences", "accuracy": max(component, 1 - component), "sign known": False},
        ]
        return Table(rows, "contrast pairs: the larger of accuracy and 1 - accuracy where the sign is not known")

    def direction(self) -> Float[Tensor, "d"]:
        """w in raw activation units: divided by the mean of the two sides' standard deviations."""
        check_is_fitted(self)
        return torch.as_tensor(self.coef_ / self.std_.mean(0))

    def observable(self, site: Any, name: str | None = None) -> Observable:
        """The direction as an observable at a site; its offset is 0, as the two sides have different ones."""
        return Observable.from_residual(self.direction(), site=site, name=name or "CCSProbe")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        d = self.n_features_in_
        return {"coef_": (d,), "mean_": (2, d), "std_": (2, d), "component_": (d,)}


def contrast_loss(p: Float[Tensor, "n 2 restarts"]) -> Float[Tensor, "restarts"]:
    """Mean of (p+ - (1 - p-))^2 + min(p+, p-)^2.

    Example:
        >>> contrast_loss(torch.tensor([[[0.75], [0.25]]])).item()
        0.0625
    """
    plus, minus = p[:, 0], p[:, 1]
    return ((plus - (1 - minus)) ** 2 + torch.minimum(plus, minus) ** 2).mean(0)
