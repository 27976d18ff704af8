"""Probes that are trained by gradient: the part that they share."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp.probes.estimator import Probe, TokenProbe, as_array, balanced, check_lengths
from interp.probes.logistic_solver import moments_of
from interp.probes.tokens import TokenSets
from interp.probes.training import Schedule, Seeds, seeded, train_head

CHUNK_VALUES = 2**24
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
    head_: nn.Module

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
        history = train_head(
            self.head_, lambda head, rows: head(*_batch(scaled, rows)), labels.to(device), weights.to(device),
            schedule, seeds, groups=groups, lengths=lengths,
        )  # fmt: skip
        self.loss_, self.validation_loss_ = np.array(history["loss"]), np.array(history["validation"])
        self.n_iter_ = len(self.loss_)
        self.best_epoch_ = int(history["best"][0]) if history["best"] else self.n_iter_ - 1
        self.head_ = self.head_.double().eval()

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
                found.append(head(*_batch(scaled, rows)))
        logits = torch.cat(found)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def _values_per_example(self) -> int:
        """Numbers that the head holds for one example beside its tokens."""
        return 0

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"mean_": (self.n_features_in_,), "std_": (self.n_features_in_,)}


class TrainedTokenProbe(TokenProbe, TrainedProbe):
    """A trained probe on sets of tokens."""


def _batch(data: Any, rows: Tensor) -> tuple[Tensor, ...]:
    return data.take(rows).padded() if isinstance(data, TokenSets) else (data[rows.to(data.device)],)
