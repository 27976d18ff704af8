"""Probes that are trained by gradient: the part that they share."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.probes.estimator import Probe, TokenProbe, as_array, balanced, check_lengths
from interp.probes.linear import LogisticProbe
from interp.probes.site_fits import moments_of
from interp.probes.tokens import TokenSets
from interp.probes.training import Schedule, Seeds, seeded, train_head, validation_rows

CHUNK_VALUES = 2**24
CHUNK_ROWS = 256
Start = Literal["linear", "random"]
FEWEST_STEPS = 10
FEWEST_EXAMPLES = 8


class TrainedProbe(Probe):
    """Standardised features, a head ``head_`` made by ``_module``, trained by a `Schedule`.

    The head is trained in float32 and answers in float64, so that batch mates change nothing.
    """

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int
    validation: float
    patience: int
    random_state: Any
    head_: Any

    def _fit_head(self, data: Any, y: Any, class_weight: Any, groups: Any) -> None:
        """Train the head on token sets, or on vectors [n, d]."""
        seeds, schedule = Seeds.of(self.random_state), self._schedule(len(data))
        labels = self._labels(y, len(data))
        check_lengths(len(data), groups=groups)
        tokens = data.values.double() if isinstance(data, TokenSets) else data
        weights = balanced(labels, torch.ones(len(labels), dtype=torch.float64), class_weight, self.classes_)
        mean, std = moments_of(tokens, torch.ones(len(tokens), dtype=torch.float64, device=tokens.device))
        self.mean_, self.std_ = as_array(mean), as_array(std)
        scaled, device = self._scaled(data, torch.float32), tokens.device
        self.head_ = seeded(self._module, seeds.init).to(device)
        lengths = data.lengths if isinstance(data, TokenSets) else None
        held = validation_rows(labels, schedule.validation, groups, seeds.split)
        self._begin(scaled, labels.to(device), weights.to(device), held)
        history = train_head(
            self.head_, lambda head, rows: head(*batch_of(scaled, rows)), labels.to(device), weights.to(device),
            schedule, seeds, held=held, lengths=lengths,
        )  # fmt: skip
        self.loss_, self.validation_loss_ = np.array(history["loss"]), np.array(history["validation"])
        self.n_iter_ = len(self.loss_)
        self.best_epoch_ = int(history["best"][0]) if history["best"] else self.n_iter_
        self.head_ = self.head_.double().eval()

    def _begin(self, data: Any, labels: Tensor, weights: Tensor, held: Tensor) -> None:
        """Where the head starts, if not at its random weights."""

    def _schedule(self, n: int) -> Schedule:
        asked = Schedule(self.epochs, self.lr, self.weight_decay, self.batch_size, self.validation, self.patience)
        return replace(asked, batch_size=min(self.batch_size, max(FEWEST_EXAMPLES, n // FEWEST_STEPS)))

    def _scaled(self, data: Any, dtype: torch.dtype) -> Any:
        values = data.values if isinstance(data, TokenSets) else data
        mean, std = (torch.as_tensor(x, device=values.device) for x in (self.mean_, self.std_))
        z = ((values.double() - mean) / std).to(dtype)
        return data.replace_values(z) if isinstance(data, TokenSets) else z

    def _logits(self, inputs: Any) -> Tensor:
        scaled = self._scaled(inputs, torch.float64)
        values = scaled.values if isinstance(scaled, TokenSets) else scaled
        head, found = self.head_.to(values.device), []
        longest = int(inputs.lengths.max()) if isinstance(inputs, TokenSets) else 1
        size = max(1, CHUNK_VALUES // (longest * values.shape[1] + self._values_per_example()))
        with torch.no_grad():
            for rows in torch.arange(len(inputs)).split(size):
                found.append(head(*batch_of(scaled, rows)))
        logits = torch.cat(found)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def _values_per_example(self) -> int:
        """Numbers that the head holds for one example beside its tokens."""
        return 0

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"mean_": (self.n_features_in_,), "std_": (self.n_features_in_,)}


class TrainedTokenProbe(TokenProbe, TrainedProbe):
    """A trained probe on sets of tokens, whose head has a linear layer on a pooled vector.

    With ``start="linear"`` that layer begins at the convex solution of `LogisticProbe` on the head's first pooled
    vector, fitted without the validation part; what else the head has begins at zero. Training then has to gain on it.
    """

    start: Start

    def _begin(self, data: TokenSets, labels: Tensor, weights: Tensor, held: Tensor) -> None:
        if self.start not in ("linear", "random"):
            raise ArgumentError(f"start={self.start!r}", "linear or random")
        if self.start == "random":
            return
        train = torch.ones(len(labels), dtype=torch.bool)
        train[held] = False
        rows = train.nonzero().flatten()
        with torch.no_grad():
            pooled = torch.cat([self.head_.pooled(*batch_of(data, part)) for part in rows.split(CHUNK_ROWS)])
        rows = rows.to(labels.device)
        single = int(torch.bincount(labels[rows]).max()) < 2
        linear = LogisticProbe(1.0 if single else "cv").fit(pooled, labels[rows], sample_weight=weights[rows])
        coef, intercept = torch.as_tensor(linear.coef_), torch.as_tensor(linear.intercept_)
        if len(coef) == 1:
            coef, intercept = torch.cat([-coef, coef]) / 2, torch.cat([-intercept, intercept]) / 2
        self.head_.start_at(coef, intercept)


def batch_of(data: Any, rows: Tensor) -> tuple[Tensor, ...]:
    """A head's arguments: padded tokens and their mask, or vectors."""
    return data.take(rows).padded() if isinstance(data, TokenSets) else (data[rows.to(data.device)],)
