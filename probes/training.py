"""Training of small heads on fixed features: AdamW, warm-up and cosine, early stopping on an inner validation part."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from interp.hooks.errors import ArgumentError

Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How a head is trained.

    Attributes:
        epochs: Passes over the training part.
        lr: Highest learning rate, reached after the warm-up, falling to 0 as a cosine.
        weight_decay: On matrices alone, not on gains and biases.
        batch_size: Examples in a step.
        validation: Share of the examples that chooses the epoch; 0 to train all epochs on everything.
        patience: Epochs without a better validation loss after which training stops.
        warmup: Share of the steps with a rising rate.
        clip: Largest norm of the gradient.
    """

    epochs: int = 30
    lr: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 64
    validation: float = 0.15
    patience: int = 10
    warmup: float = 0.1
    clip: float = 1.0

    def __post_init__(self):
        """Refuse numbers out of range.

        Raises:
            ArgumentError: If a number is not positive, or the validation share not in [0, 1).
        """
        for name in ("epochs", "lr", "batch_size", "patience"):
            if isinstance(getattr(self, name), bool) or not getattr(self, name) > 0:
                raise ArgumentError(f"{name}={getattr(self, name)!r}", "a number above 0")
        if not 0 <= self.validation < 1:
            raise ArgumentError(f"validation={self.validation!r}", "a share in [0, 1)")


@dataclass(frozen=True)
class Seeds:
    """Seeds of the initialisation, of the order of examples and of the inner split, apart from each other."""

    init: int
    order: int
    split: int

    @classmethod
    def of(cls, random_state: object) -> "Seeds":
        """One seed for all three, or three.

        Raises:
            ArgumentError: If it is neither.
        """
        if isinstance(random_state, (int, np.integer)) and not isinstance(random_state, bool):
            return cls(int(random_state), int(random_state), int(random_state))
        if isinstance(random_state, (tuple, list)) and len(random_state) == 3:
            return cls(*map(int, random_state))
        raise ArgumentError(f"random_state={random_state!r}", "a seed, or (initialisation, order, split)")


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module built from a seed; torch's own random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def validation_rows(labels: Int64[Tensor, "n"], share: float, groups: object, seed: int) -> Int64[Tensor, "m"]:
    """Rows of a stratified validation part, which keeps groups together; none where a class would be too small."""
    y = labels.cpu().numpy()
    if share <= 0 or np.bincount(y).min() < 2 or len(y) * share < 1:
        return torch.empty(0, dtype=torch.int64)
    if groups is not None:
        from sklearn.model_selection import GroupShuffleSplit

        names = np.asarray(groups)
        _, held = next(GroupShuffleSplit(1, test_size=share, random_state=seed).split(y, y, names))
        return torch.as_tensor(held)
    rng, rows = np.random.default_rng(seed), []
    for k in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == k))
        rows.append(members[: min(max(1, round(share * len(members))), len(members) - 1)])
    return torch.as_tensor(np.sort(np.concatenate(rows)))


def train_head(
    head: nn.Module,
    forward: Forward,
    labels: Int64[Tensor, "n"],
    weights: Float[Tensor, "n"],
    schedule: Schedule,
    seeds: Seeds,
    *,
    held: Int64[Tensor, "m"],
    lengths: Tensor | None = None,
) -> dict[str, list[float]]:
    """Train a head in place and leave it in evaluation mode, at its best epoch, which may be none.

    Args:
        head: What is trained.
        forward: Logits [rows, classes] of rows, given the head and their numbers.
        labels: Class numbers.
        weights: Weight of each example.
        schedule: How it is trained.
        seeds: Seeds, of which that of the order is used.
        held: Rows that choose the epoch, from `validation_rows`; without any the last epoch is kept.
        lengths: Tokens of each example; batches are made of examples of like length.

    Returns:
        ``loss`` of every epoch; ``validation`` before the first and after every epoch, where there is a validation
        part; and ``best``, how many epochs the chosen head was trained.
    """
    train = torch.ones(len(labels), dtype=torch.bool)
    train[held] = False
    rows = train.nonzero().flatten()
    weights = weights / weights[rows].mean()
    per_epoch = math.ceil(len(rows) / schedule.batch_size)
    optimizer = adamw(head.parameters(), schedule.lr, schedule.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(per_epoch * schedule.epochs, schedule.warmup))
    generator = torch.Generator().manual_seed(seeds.order)
    history: dict[str, list[float]] = {"loss": [], "validation": [], "best": []}
    best, state, waited = math.inf, None, 0
    for epoch in range(schedule.epochs + 1):
        if epoch:
            history["loss"].append(
                _epoch(head, forward, rows, labels, weights, schedule, optimizer, rate, lengths, generator)
            )
        if not len(held):
            continue
        loss = validation_loss(head, forward, held, labels, weights)
        history["validation"].append(loss)
        waited = 0 if loss < best else waited + 1
        if loss < best:
            best, state, history["best"] = loss, copy.deepcopy(head.state_dict()), [float(epoch)]
        if waited >= schedule.patience:
            break
    if state is not None:
        head.load_state_dict(state)
    head.eval()
    return history


def validation_loss(head: nn.Module, forward: Forward, rows: Tensor, labels: Tensor, weights: Tensor) -> float:
    """Weighted mean cross-entropy of rows, without gradients."""
    head.eval()
    with torch.no_grad():
        parts = [_loss(forward(head, part), labels[part], weights[part]) for part in rows.split(256)]
    return float(torch.stack(parts).sum() / weights[rows].sum())


def _loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return (losses * weights.to(losses)).sum()


def _epoch(head, forward, rows, labels, weights, schedule, optimizer, rate, lengths, generator) -> float:
    """One pass; the mean loss."""
    head.train()
    total = 0.0
    for batch in _batches(rows, schedule.batch_size, lengths, generator):
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(forward(head, batch), labels[batch], weights[batch])
        (loss / len(batch)).backward()
        nn.utils.clip_grad_norm_(head.parameters(), schedule.clip)
        optimizer.step()
        rate.step()
        total += float(loss.detach())
    return total / float(weights[rows].sum())


def _batches(rows: Tensor, size: int, lengths: Tensor | None, generator: torch.Generator) -> list[Tensor]:
    """Shuffled batches; with lengths, of examples of like length, in a shuffled order."""
    rows = rows[torch.randperm(len(rows), generator=generator)]
    if lengths is None:
        return list(rows.split(size))
    window = rows.split(size * 8)
    sorted_windows = [part[lengths.cpu()[part].argsort(stable=True)] for part in window]
    batches = [batch for part in sorted_windows for batch in part.split(size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone."""
    live = [p for p in parameters if p.requires_grad]
    matrices, others = [p for p in live if p.ndim > 1], [p for p in live if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Factor of the learning rate at each step: a linear rise over a share of the steps, then a cosine to zero."""
    rising = max(1, round(warmup * steps))

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return rate
