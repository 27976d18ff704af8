"""Control arms: what the same map reaches, with the same pairs and budget, where it should reach nothing."""

import copy
from collections.abc import Sequence
from typing import Literal

import torch

from interp.causal.data import InterchangeDataset
from interp.causal.flexible_maps import build_map
from interp.causal.lanes import Lane, Lanes
from interp.causal.maps import AlignmentMap, stack
from interp.causal.models import CausalModel
from interp.causal.networks import untrained
from interp.causal.neurons import search_lane
from interp.causal.partition import Partition
from interp.causal.report import Control
from interp.causal.scoring import Score, score_lanes
from interp.causal.training import Fit, Progress, Training, fit_lanes
from interp.hooks.errors import ArgumentError, DegenerateDataError
from interp.hooks.model import Model

ControlName = Literal["random_model", "shuffle", "wrong_algorithm", "permuted"]
CONTROLS: tuple[ControlName, ...] = ("random_model", "shuffle", "wrong_algorithm", "permuted")
_TOGETHER = 12  # lanes in one stack
_SEED = 10_000  # seeds of controls begin here


def refuse_permuted(kind: str, variables: Sequence[str]) -> None:
    """Refuse to exchange blocks where there is one, or where the map has learned its own and uses no others.

    Raises:
        ArgumentError: If so.
    """
    if len(variables) < 2:
        raise ArgumentError("a permuted control with one variable", "at least two variables to permute")
    if kind == "boundless":
        raise ArgumentError("a permuted control of a map that learns its blocks", "a map whose blocks are given")


def refuse_wrong(test: InterchangeDataset, wrong: CausalModel | None) -> InterchangeDataset:
    """Return test pairs with another algorithm's labels, and refuse one that is no control.

    Raises:
        ArgumentError: If there is none.
        ShapeMismatchError: If it has another number of variables.
        DegenerateDataError: If it gives one label to all pairs.
    """
    if wrong is None:
        raise ArgumentError("controls=('wrong_algorithm',) without wrong=", "wrong=, another algorithm")
    found = test.under(wrong)
    if len(found.labels.unique()) < 2:
        raise DegenerateDataError(
            f"wrong algorithm {wrong.name} with one label on all test pairs", "an algorithm with several labels"
        )
    return found


class Arms:
    """The control arms of one trained lane.

    Args:
        lane: The lane that is controlled.
        data: Its training and validation pairs, or None where its map was not trained.
        test: Where arms are scored.
        training: Its budget.
        seed: Of the order of pairs.
        progress: Told of every validation.
    """

    def __init__(
        self, lane: Lane, data: tuple[InterchangeDataset, InterchangeDataset] | None, test: InterchangeDataset,
        training: Training, seed: int = 0, progress: Progress = lambda _: None,
    ):  # fmt: skip
        self.lane, self.data, self.test, self.training = lane, data, test, training
        self.seed, self.progress = seed, progress

    def random_model(self, seeds: int, restarts: int, models: Sequence[Model] | None = None) -> Control:
        """The same map on untrained networks: for each the best of several restarts."""
        networks = list(models) if models is not None else [untrained(self.lane.model, _SEED + s) for s in range(seeds)]
        if not networks:
            raise ArgumentError("no untrained networks", "at least one (three, to see their spread)")
        if self.lane.tau.kind == "identity":
            restarts = 1  # nothing of it is drawn
        lanes = [
            Lane(
                network, self.lane.sites, self.fresh(r, network), self.lane.mask, cache=self.lane.cache,
                search=self.lane.search,
            )
            for network in networks
            for r in range(restarts)
        ]  # fmt: skip
        for i in range(0, len(lanes), restarts):
            for lane in lanes[i + 1 : i + restarts]:
                lane.stages = lanes[i].stages  # one network, read once
        fits, scores = self._run(lanes)
        values, trained = [], []
        for i in range(0, len(lanes), restarts):
            group = range(i, i + restarts)
            best = max(group, key=lambda j: (fits[j].trained, -fits[j].validation_loss) if fits else (False, 0.0))
            values.append(scores[best].headline.estimate)
            trained.append(not fits or fits[best].trained)
        return Control("random_model", values, trained, f"{len(networks)} untrained networks, best of {restarts} maps")

    def shuffle(self, seeds: int = 1) -> Control:
        """Labels permuted in training and validation: on true labels of test pairs, and on the permuted ones."""
        lanes = [self._like(self.fresh(s), shuffle=_SEED + s) for s in range(seeds)]
        fits, scores = self._run(lanes)
        still = score_lanes([self._like(self.fresh(seeds))], self.test, self.training.readout)[0]
        beside = {"untrained map": still.headline.estimate}
        if self.data is not None:
            memory = Lanes(
                lanes, self.data[0].take(torch.arange(min(len(self.data[0]), 20_000))), self.training.readout
            )
            whole = [self.data[0].shuffled(_SEED + s).labels[: len(memory.data)] for s in range(seeds)]
            memory.labels = torch.stack(whole)
            _, right = memory.evaluate(stack([lane.tau for lane in lanes]).eval())
            beside["memorised"] = float(right.float().mean())
        note = "labels permuted in training and validation; scored on true labels"
        return Control(
            "shuffle", [s.headline.estimate for s in scores], [f.trained for f in fits] or [True] * seeds, note, beside
        )

    def wrong_algorithm(self, wrong: CausalModel | None) -> Control:
        """Another algorithm on the same pairs."""
        test = refuse_wrong(self.test, wrong)
        assert wrong is not None
        lane = self._like(self.fresh(0))
        fits: list[Fit] = []
        if self.data is not None and (lane.tau.num_parameters or lane.search):
            train, validation = (d.under(wrong) for d in self.data)
            for one, its in zip((train, validation), self.data, strict=True):
                lane.stages[id(one.pool.inputs)] = self.lane.stage(its)
            if lane.search:
                search_lane(lane, validation, self.training.readout)
            fits = fit_lanes([lane], train, validation, self.training, seed=self.seed)
        score = score_lanes([lane], test, self.training.readout)[0]
        return Control("wrong_algorithm", [score.headline.estimate], [f.trained for f in fits] or [True], wrong.name)

    def permuted(self, partition: Partition, variables: Sequence[str]) -> Control:
        """The trained map with each variable's block given to the next variable."""
        mask = partition.permuted(self.lane.tau.code_width).mask(variables, self.lane.tau.code_width)
        lane = copy.copy(self.lane)
        lane.mask = mask
        score = score_lanes([lane], self.test, self.training.readout)[0]
        return Control("permuted", [score.headline.estimate], [True], "blocks exchanged at test")

    def fresh(self, seed: int, model: Model | None = None) -> AlignmentMap:
        """An untrained map of the same kind."""
        tau = self.lane.tau
        if tau.kind in ("identity", "dictionary"):
            return tau
        data = self.test if self.data is None else self.data[0]
        acts = self.lane.stage(data).acts
        if tau.kind == "pca" and model is not None:
            acts = Lane(model, self.lane.sites, tau, self.lane.mask).stage(data).acts
        return build_map(tau.spec(), tau.width, seed=_SEED + seed, acts=acts, dtype=tau.dtype)

    def _like(self, tau: AlignmentMap, shuffle: int | None = None) -> Lane:
        lane = Lane(self.lane.model, self.lane.sites, tau, self.lane.mask, shuffle, self.lane.cache, self.lane.search)
        lane.stages = self.lane.stages
        return lane

    def _run(self, lanes: Sequence[Lane]) -> tuple[list[Fit], list[Score]]:
        """Train lanes, or search their neurons, and score them; a map that is not trained is scored as it is."""
        fits: list[Fit] = []
        scores: list[Score] = []
        if self.data is not None and self.lane.search:
            for lane in lanes:
                search_lane(lane, self.data[1], self.training.readout)
        for start in range(0, len(lanes), _TOGETHER):
            part = lanes[start : start + _TOGETHER]
            if self.data is not None:
                fits += fit_lanes(part, *self.data, self.training, seed=self.seed, progress=self.progress)
            scores += score_lanes(part, self.test, self.training.readout)
        return fits, scores
