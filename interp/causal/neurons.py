"""Greedy search for the neurons that carry an algorithm's variables: blocks of the identity map."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from interp.causal.data import InterchangeDataset, Splits
from interp.causal.lanes import Lane, Lanes, Readout
from interp.causal.maps import IdentityMap
from interp.causal.models import CausalModel
from interp.causal.partition import Partition
from interp.causal.scoring import score_lanes
from interp.causal.training import Fit, Training, left_chance
from interp.hooks.budget import bytes_of
from interp.hooks.errors import ArgumentError, DegenerateDataError
from interp.hooks.model import Model
from interp.hooks.site import SiteLike
from interp.hooks.table import Rows

if TYPE_CHECKING:
    from interp.causal.alignment import Alignment

_TIE = 1e-6  # losses this close, relative to the lowest, are one: a batch's place in memory moves the last digits
_COPIES = 8  # copies of the swapped activations that the network behind the site is taken to hold at once
_BUDGET = "256MiB"


@dataclass(frozen=True)
class NeuronSearch(Rows):
    """A greedy search: which neurons were taken in which order, and what each size came to.

    Accuracies of the curve stand without controls, and say so: `Alignment.evaluate` repeats the search on untrained
    networks and on permuted labels.

    Attributes:
        variables: The variables.
        order: For each variable its neurons, in the order in which they were taken.
        losses: Cross-entropy on the evaluation pairs after each round, in nats per pair.
        evaluated: Share of the evaluation pairs that are answered as the algorithm does, after each round.
        chance: Cross-entropy of the best constant guess.
        tried: Number of candidates in all.
        uncontrolled_curve: Plain accuracy on separate test pairs at each size; empty where there were none.
    """

    variables: list[str]
    order: list[list[int]]
    losses: list[float]
    evaluated: list[float] = field(repr=False)
    chance: float
    tried: int
    uncontrolled_curve: list[float] = field(default_factory=list, repr=False)

    @property
    def best(self) -> int:
        """Neurons of each variable at the lowest loss: often not the last round's."""
        return 1 + min(range(len(self.losses)), key=self.losses.__getitem__)

    def partition(self, size: int | None = None) -> Partition:
        """The blocks at a size, by default the best.

        Raises:
            ArgumentError: If the search did not get that far.
        """
        chosen = self.best if size is None else size
        if not 1 <= chosen <= len(self.losses):
            raise ArgumentError(f"size={size}", f"1..{len(self.losses)}, the sizes that were searched")
        return Partition({v: taken[:chosen] for v, taken in zip(self.variables, self.order, strict=True)})

    def as_fit(self) -> Fit:
        """The search as a training of so many rounds."""
        loss = self.losses[self.best - 1]
        return Fit(len(self.losses), loss, self.chance, left_chance(loss, self.chance), False, 0.0, 0.0, [*self.losses])

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each size."""
        found = []
        for i, (loss, share) in enumerate(zip(self.losses, self.evaluated, strict=True)):
            row: dict[str, Any] = {"size": i + 1, "evaluation loss": loss, "uncontrolled evaluation accuracy": share}
            row |= {f"neuron of {v}": taken[i] for v, taken in zip(self.variables, self.order, strict=True)}
            curve = self.uncontrolled_curve
            found.append(row | ({"uncontrolled accuracy": curve[i]} if curve else {}))
        return found

    def __repr__(self) -> str:
        blocks = "; ".join(
            f"{v} {' '.join(map(str, t[: self.best]))}" for v, t in zip(self.variables, self.order, strict=True)
        )
        return (
            f"NeuronSearch({blocks}: size {self.best} of {len(self.losses)}, evaluation loss "
            f"{self.losses[self.best - 1]:.4f}, a constant guess {self.chance:.4f}, {self.tried} candidates)"
        )


def greedy_neurons(
    model: Model, causal_model: CausalModel, sites: SiteLike | Sequence[SiteLike],
    evaluation: InterchangeDataset | Splits, test: InterchangeDataset | None = None, *, most: int | None = None,
    readout: Readout = "candidates", budget: int | str = _BUDGET, progress: Callable[[str], None] = lambda _: None,
) -> "Alignment":  # fmt: skip
    """Return the alignment of the identity map whose blocks are the neurons that a greedy search finds.

    From empty blocks on, each round tries every unused neuron i for one variable, or every ordered pair (i, j) for two,
    and keeps the candidate with the lowest interchange cross-entropy on the evaluation pairs; of equal ones that with
    the lowest numbers. The blocks are those of the size with the lowest loss. Sutter et al. 2025 (arXiv 2507.08802),
    constructive abstraction.

    The network below the sites is run once; a batch of candidates is one run of the network behind them. A round of two
    variables costs about d² runs, so ``most`` is worth setting where d is large.

    Args:
        model: The network.
        causal_model: The algorithm.
        sites: Where neurons are looked for.
        evaluation: Pairs that choose, or splits, whose validation pairs choose and whose test pairs give the curve.
        test: Other pairs, on which the curve over sizes is reported.
        most: Neurons of each variable at which the search ends; by default half of all.
        readout: Whether losses and accuracies compare the labels' tokens or all tokens.
        budget: Memory for a batch of candidates.
        progress: Told of every round.

    Raises:
        ArgumentError: If the pairs intervene on more than two variables, or ``most`` neurons do not exist.
        DegenerateDataError: If the test pairs are those that choose, or the training pairs.

    Example:
        >>> import interp
        >>> from interp.causal import greedy_neurons, hierarchical_equality, mlp
        >>> task = hierarchical_equality()
        >>> found = greedy_neurons(
        ...     interp.attach(mlp(task)), task.causal_model, "block1", task.sample(200, seed=0), most=2
        ... )
        >>> found.search.to_records()[1]["size"], found.partition.sizes[0] <= 2
        (2, True)
    """
    from interp.causal.alignment import Alignment

    if isinstance(evaluation, Splits):
        evaluation, test = evaluation.validation, evaluation.test if test is None else test
    if test is evaluation:
        raise DegenerateDataError(
            "one set of pairs both to choose neurons and to report them", "two sets", "test=, other pairs"
        )
    if evaluation.split not in ("train", "validation"):
        evaluation = evaluation.take(torch.arange(len(evaluation)), split="validation")
    lane = Lane(model, sites, IdentityMap(1), torch.zeros(len(evaluation.variables), 1, dtype=torch.bool))
    lane.tau = IdentityMap(lane.stage(evaluation).width)
    lane.search = lane.tau.width // 2 if most is None else most
    found = search_lane(lane, evaluation, readout, budget, progress)
    if test is not None:
        sizes = range(1, len(found.losses) + 1)
        lanes = [_at_size(lane, found, size) for size in sizes]
        curve = [s.plain for s in score_lanes(lanes, test, readout)]
        found = NeuronSearch(**{**vars(found), "uncontrolled_curve": curve})
    result = Alignment(model, causal_model, sites, lane.tau, found.partition())
    lane.mask = result.mask
    result.searched(found, lane, evaluation, Training(readout=readout))
    return result


def search_lane(
    lane: Lane, evaluation: InterchangeDataset, readout: Readout = "candidates", budget: int | str = _BUDGET,
    progress: Callable[[str], None] = lambda _: None,
) -> NeuronSearch:  # fmt: skip
    """Search neurons for one lane up to ``lane.search`` of each variable, and give it the mask of the best size.

    Args:
        lane: Of an identity map.
        evaluation: Pairs that choose.
        readout: Whether losses compare the labels' tokens or all tokens.
        budget: Memory for a batch of candidates.
        progress: Told of every round.

    Raises:
        ArgumentError: If there are more than two variables, or fewer neurons than asked for.
    """
    names, width, most = evaluation.variables, lane.tau.width, lane.search
    if len(names) > 2:
        raise ArgumentError(
            f"a greedy search for {', '.join(names)}", "one or two variables", "task.with_variables(...)"
        )
    if most is None or not 1 <= most <= width // len(names):
        raise ArgumentError(f"most={most}", f"1..{width // len(names)} neurons of {width} for each of {len(names)}")
    data, held = Lanes([lane], evaluation, readout, fitting=True), bytes_of(budget)
    acts, taken, found = data.acts[0].clone(), [], []
    state = acts[evaluation.base]  # the bases, with the neurons that were taken already set
    tried = 0
    for size in range(1, most + 1):
        free = [i for i in range(width) if i not in {j for t in taken for j in t}]
        candidates = torch.tensor(list(permutations(free, len(names))))
        losses, right = _losses(data, acts, state, candidates, held)
        best = int((losses <= losses.min() * (1 + _TIE)).nonzero()[0])
        tried += len(candidates)
        taken.append(tuple(candidates[best].tolist()))
        found.append((float(losses[best]), float(right[best])))
        state = _set(data, acts, state[None].clone(), candidates[best : best + 1], torch.arange(len(state)))[0]
        progress(f"size {size}: neurons {taken[-1]}, evaluation loss {found[-1][0]:.4f}")
    order = [list(column) for column in zip(*taken, strict=True)]
    result = NeuronSearch(
        list(names), order, [loss for loss, _ in found], [share for _, share in found], float(data.chance()[0]), tried
    )
    lane.mask = result.partition().mask(names, width)
    return result


@torch.no_grad()
def _losses(
    data: Lanes, acts: Tensor, state: Tensor, candidates: Int64[Tensor, "candidates variables"], budget: int
) -> tuple[Float[Tensor, "candidates"], Float[Tensor, "candidates"]]:
    """Mean cross-entropy and accuracy of every candidate."""
    n, width = state.shape
    each = _COPIES * width * state.element_size()
    rows_at_once = max(1, min(n, budget // each))
    at_once = max(1, budget // (each * rows_at_once))
    losses = torch.zeros(len(candidates), dtype=torch.float64)
    right = torch.zeros(len(candidates), dtype=torch.float64)
    for rows in torch.arange(n).split(rows_at_once):
        targets = data.targets(rows)[0]
        for some in torch.arange(len(candidates)).split(at_once):
            h = _set(data, acts, state[rows].repeat(len(some), 1, 1), candidates[some], rows)
            logits = data.answers(h.flatten(0, 1)[None], rows.repeat(len(some)))[0].unflatten(0, h.shape[:2])
            wanted = targets.expand(len(some), -1)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).double(), wanted.flatten(), reduction="none")
            losses[some] += loss.view(wanted.shape).sum(1)
            right[some] += (logits.argmax(-1) == wanted).sum(1)
    return losses / n, right / n


def _set(data: Lanes, acts: Tensor, h: Tensor, candidates: Tensor, rows: Tensor) -> Tensor:
    """Set, in h [candidates, rows, width], the neuron of each variable to its value in the run of the source."""
    pairs = data.data
    for k in range(candidates.shape[1]):
        here = pairs.chosen[rows, k].nonzero().flatten()
        values = acts[pairs.sources[rows[here], k]][:, candidates[:, k]].mT  # [candidates, rows where it is set]
        h[torch.arange(len(candidates))[:, None], here, candidates[:, k, None]] = values
    return h


def _at_size(lane: Lane, found: NeuronSearch, size: int) -> Lane:
    mask = found.partition(size).mask(found.variables, lane.tau.width)
    return Lane(lane.model, lane.sites, lane.tau, mask, cache=lane.cache, stages=lane.stages)
