"""Training of alignment maps: cross-entropy of the swapped network against the algorithm, with the network frozen."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.causal.data import InterchangeDataset
from interp.causal.lanes import Lane, Lanes, Readout
from interp.causal.maps import AlignmentMap, refuse_not_invertible, stack, unstack
from interp.causal.report import CausalAbstractionWarning
from interp.hooks.errors import ArgumentError, NonInvertibleMapError
from interp.hooks.table import Rows

Progress = Callable[[str], None]
_LEFT_CHANCE = 0.02  # a validation loss that far below a constant guess's has left the plateau
_WARN_CONDITION = 1e4
_TRIED = 256  # activations on which a map must undo itself
_HALVED_AFTER = 10  # epochs without a better training loss


@dataclass(frozen=True)
class Training:
    """How maps are trained: the budget that is printed beside every number.

    Attributes:
        lr: Learning rate of Adam.
        batch_size: Pairs in a step.
        steps: Most steps.
        validate_every: Steps between validations; by default an epoch, and at least eight in a run.
        patience: Validations without a better loss after which a map is done.
        threshold: By how much a loss must fall to be better, per pair, in nats.
        least: Steps before which patience does not count; by default until the loss is 2 % below a constant guess's.
        warmup: Steps with a rising rate.
        decay: ``plateau``: the rate is halved after 10 epochs without a better training loss; ``linear``: to zero.
        readout: Whether losses and accuracies compare the labels' tokens or all tokens.
    """

    lr: float = 1e-3
    batch_size: int = 1024
    steps: int = 4000
    validate_every: int | None = None
    patience: int = 5
    threshold: float = 1e-3
    least: int | None = None
    warmup: int = 0
    decay: Literal["plateau", "linear"] = "plateau"
    readout: Readout = "candidates"

    def __post_init__(self):
        """Refuse numbers out of range.

        Raises:
            ArgumentError: If one is not positive.
        """
        for name in ("lr", "batch_size", "steps", "patience"):
            if isinstance(getattr(self, name), bool) or not getattr(self, name) > 0:
                raise ArgumentError(f"{name}={getattr(self, name)!r}", "a number above 0")
        if self.decay not in ("plateau", "linear") or self.readout not in ("candidates", "vocabulary"):
            raise ArgumentError(
                f"decay={self.decay!r}, readout={self.readout!r}", "plateau or linear; candidates or vocabulary"
            )

    def every(self, n: int) -> int:
        """Steps between validations, for n pairs."""
        return self.validate_every or max(1, min(math.ceil(n / self.batch_size), self.steps // 8))

    def __str__(self) -> str:
        return f"{self.steps} steps of {self.batch_size} pairs, lr {self.lr:g}, patience {self.patience}"


@dataclass(frozen=True)
class Fit(Rows):
    """How one map was trained.

    Attributes:
        steps: Steps until it was done.
        validation_loss: The lowest, in nats per pair; the kept map's.
        chance: Of the best constant guess.
        trained: Whether the loss left the plateau: more than 2 % below chance.
        stopped: Whether patience ran out before the steps did.
        round_trip: Largest error of the way back, relative to the largest activation.
        seconds: Wall clock of the whole stack.
        losses: Validation losses.
    """

    steps: int
    validation_loss: float
    chance: float
    trained: bool
    stopped: bool
    round_trip: float
    seconds: float
    losses: list[float] = field(default_factory=list, repr=False)

    def to_records(self) -> list[dict[str, Any]]:
        """One row."""
        return [{name: value for name, value in vars(self).items() if name != "losses"}]


class _Adam:
    """Adam (Kingma and Ba 2015) with a learning rate for each lane."""

    def __init__(self, tau: AlignmentMap, lanes: int):
        self.named = [(n, p) for n, p in tau.named_parameters() if p.requires_grad]
        self.factors = [tau.lr_factors.get(n, 1.0) for n, _ in self.named]
        self.first = [torch.zeros_like(p) for _, p in self.named]
        self.second = [torch.zeros_like(p) for _, p in self.named]
        self.count, self.lanes = 0, lanes

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], rates: Float[Tensor, "lanes"]) -> None:
        """One step; a rate of 0 leaves a lane as it is."""
        self.count += 1
        even = bool((rates == rates[0]).all())
        for (_, p), g, m, v, factor in zip(self.named, grads, self.first, self.second, self.factors, strict=True):
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            spread = (v / (1 - 0.999**self.count)).sqrt_().add_(1e-8)
            scale = factor / (1 - 0.9**self.count)
            if even:
                p.addcdiv_(m, spread, value=-scale * float(rates[0]))
            else:
                p.sub_(m.div(spread).mul_((scale * rates).to(p.dtype).view(-1, *[1] * (p.ndim - 1))))


class _Watch:
    """Validation losses of every lane: which map to keep, of those that undo themselves, and when to stop."""

    def __init__(self, tau: AlignmentMap, lanes: Lanes, training: Training):
        count = len(lanes)
        self.training, self.chance, self.lanes = training, lanes.chance(), lanes
        self.refused: list[list[NonInvertibleMapError]] = [[] for _ in range(count)]
        self.best = torch.full((count,), math.inf, dtype=torch.float64)
        self.better = self.best.clone()  # the loss that must be beaten by the threshold
        self.waited, self.steps = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        self.done, self.losses = torch.zeros(count, dtype=torch.bool), []
        self.kept = {n: p.detach().clone() for n, p in tau.named_parameters()}

    @torch.no_grad()
    def see(self, tau: AlignmentMap, losses: Float[Tensor, "lanes"], step: int) -> None:
        """Note losses; keep what is better; find who is done."""
        if not torch.isfinite(losses[~self.done]).all():
            raise NonInvertibleMapError(f"a validation loss of {losses.tolist()} after {step} steps", "finite losses")
        self.losses.append(losses.tolist())
        self.steps[~self.done] = step
        keep = (losses < self.best) & ~self.done
        for lane in keep.nonzero()[:, 0].tolist():
            keep[lane] = self._undoes_itself(tau, lane, step)
        self.best[keep] = losses[keep]
        for name, parameter in tau.named_parameters():
            self.kept[name][keep] = parameter.detach()[keep]
        better = losses < self.better - self.training.threshold
        self.better[better] = losses[better]
        least = self.training.least
        armed = self.left if least is None else torch.full_like(self.done, step >= least)
        self.waited = torch.where(better | ~armed, 0, self.waited + 1)
        self.done |= self.waited >= self.training.patience

    def _undoes_itself(self, tau: AlignmentMap, lane: int, step: int) -> bool:
        """Whether a lane's present map does; training may drive a flexible one beyond what its dtype can undo."""
        own = self.lanes.lanes[lane]
        one = copy.deepcopy(own.tau)
        for name, rows in tau.named_parameters():
            one.get_parameter(name).copy_(rows[lane])
        try:
            refuse_not_invertible(one.eval(), own.stage(self.lanes.data).acts[:_TRIED], f"after {step} steps")
        except NonInvertibleMapError as error:
            self.refused[lane].append(error)
            return False
        return True

    @property
    def left(self) -> Tensor:
        """Lanes whose loss has left the plateau of a constant guess."""
        return left_chance(self.best, self.chance)


def left_chance(loss: Any, chance: Any) -> Any:
    """Whether a loss has left the plateau of a constant guess."""
    return loss < (1 - _LEFT_CHANCE) * chance


def fit_lanes(
    lanes: Sequence[Lane], train: InterchangeDataset, validation: InterchangeDataset, training: Training = Training(),
    *, seed: int = 0, progress: Progress = lambda _: None,
) -> list[Fit]:  # fmt: skip
    """Train maps of one kind together, each as if it were alone, and leave each at its lowest validation loss.

    A map that does not undo itself at a validation is not chosen there; a warning says so.

    Args:
        lanes: What is trained, in place.
        train: Pairs to train on, the same batches for every lane.
        validation: Pairs that choose the step.
        training: The budget.
        seed: Of the order of pairs.
        progress: Told of every validation.

    Raises:
        NonInvertibleMapError: If a map does not undo itself on real activations before training, or at any validation.
        ShapeMismatchError: If a map does not fit its site.
    """
    start = time.perf_counter()
    held, data = (Lanes(lanes, pairs, training.readout, fitting=True) for pairs in (validation, train))
    for lane in lanes:
        refuse_not_invertible(lane.tau, lane.stage(validation).acts[:_TRIED], "before training")
    tau = stack([lane.tau for lane in lanes])
    watch = _Watch(tau, held, training)
    if tau.num_parameters:
        _train(tau, data, held, watch, training, seed, progress)
    else:
        watch.see(tau.eval(), held.evaluate(tau)[0], 0)
    for name, parameter in tau.named_parameters():
        parameter.data.copy_(watch.kept[name])
    unstack(tau, [lane.tau for lane in lanes])
    errors = [refuse_not_invertible(lane.tau, lane.stage(validation).acts[:_TRIED], "after training") for lane in lanes]
    for lane, refused, best in zip(lanes, watch.refused, watch.best.tolist(), strict=True):
        if refused and best == math.inf:
            raise refused[-1]
        if refused:
            text = f"{lane.tau} at {lane.sites}: {len(refused)} validations left out, where the map did not undo itself"
            warnings.warn(f"{text} ({refused[-1].given})", CausalAbstractionWarning, stacklevel=2)
        if (condition := lane.tau.condition()) > _WARN_CONDITION:
            text = f"{lane.tau} at {lane.sites}: condition number {condition:.1e} after training, above 1e4"
            warnings.warn(text, CausalAbstractionWarning, stacklevel=2)
    seconds = time.perf_counter() - start
    return [
        Fit(
            int(watch.steps[i]), float(watch.best[i]), float(watch.chance[i]), bool(watch.left[i]),
            bool(watch.done[i]), errors[i], seconds, [float(row[i]) for row in watch.losses],
        )
        for i in range(len(lanes))
    ]  # fmt: skip


def _train(
    tau: AlignmentMap, data: Lanes, held: Lanes, watch: _Watch, training: Training, seed: int, progress: Progress
) -> None:
    generator, adam = torch.Generator().manual_seed(seed), _Adam(tau, len(data))
    rates, plateau = _Rates(training, len(data)), training.every(len(data.data))
    order, at, total, count = torch.empty(0, dtype=torch.int64), 0, torch.zeros(len(data)), 0
    parameters = [p for _, p in adam.named]
    for step in range(training.steps):
        if at >= len(order):
            order, at = torch.randperm(len(data.data), generator=generator), 0
            if count:
                rates.epoch(total / count)
            total, count = torch.zeros(len(data)), 0
        rows, at = order[at : at + training.batch_size], at + training.batch_size
        tau.train()
        tau.progress(step / training.steps)
        losses, penalty = data.loss(tau, rows), tau.penalty()
        objective = losses.sum() if penalty is None else (losses + penalty).sum()
        adam.step(torch.autograd.grad(objective, parameters), rates.at(step, watch.done))
        total, count = total + losses.detach(), count + 1
        if (step + 1) % plateau == 0 or step + 1 == training.steps:
            tau.eval()
            tau.progress(1.0)
            found = held.evaluate(tau)[0]
            watch.see(tau, found, step + 1)
            progress(f"step {step + 1}: validation loss {', '.join(f'{x:.4f}' for x in found.tolist())}")
            if watch.done.all():
                return


class _Rates:
    """The learning rate of every lane."""

    def __init__(self, training: Training, lanes: int):
        self.training = training
        self.rates = torch.full((lanes,), training.lr, dtype=torch.float64)
        self.best, self.waited = torch.full((lanes,), math.inf), torch.zeros(lanes, dtype=torch.int64)

    def at(self, step: int, done: Tensor) -> Tensor:
        """Rates of one step; 0 for lanes that are done."""
        share = min(1.0, (step + 1) / self.training.warmup) if self.training.warmup else 1.0
        if self.training.decay == "linear":
            share = min(share, 1 - step / self.training.steps)
        return torch.where(done, 0.0, self.rates * share)

    def epoch(self, losses: Tensor) -> None:
        """Halve the rate of lanes whose training loss has not fallen for ten epochs."""
        if self.training.decay != "plateau":
            return
        self.waited = torch.where(losses < self.best, 0, self.waited + 1)
        self.best = torch.minimum(self.best, losses)
        late = self.waited >= _HALVED_AFTER
        self.rates[late] /= 2
        self.waited[late] = 0


def describe(training: Training) -> dict[str, Any]:
    """The budget as plain data."""
    return {name: getattr(training, name) for name in training.__dataclass_fields__}
