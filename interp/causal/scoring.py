"""Scores of alignments on one split: broken down by flip and intervention, beside the baselines of the data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.causal.data import InterchangeDataset
from interp.causal.lanes import Lane, Lanes, Readout
from interp.causal.maps import stack
from interp.hooks.errors import DegenerateDataError
from interp.hooks.table import Rows
from interp.intervals import Interval, wilson


@dataclass(frozen=True)
class Score(Rows):
    """How often a swapped network answers as the algorithm does, on one split.

    Attributes:
        split: Name of the split.
        n: Number of pairs.
        headline: Mean of the accuracies on pairs that flip and pairs that stay, with its interval (Newcombe's sum of
            Wilson's); the plain accuracy where there are only pairs of one kind.
        plain: Share of all pairs, as published tables have it.
        flip: On pairs whose label the intervention changes.
        stay: On the others.
        by: Accuracy for each set of intervened variables, and for each item of a group that was asked for.
        model_accuracy: Of the network on the bases, without intervention.
        with_empty: Accuracy with the empty intervention as one more, equally likely set.
        where_right: Accuracy on pairs for which the network is right on the base and the sources.
        n_right: Number of such pairs.
        baselines: ``do nothing``, ``full swap`` (all of h from the first source), ``best constant`` (for each set).
    """

    split: str
    n: int
    headline: Interval
    plain: float
    flip: float | None
    stay: float | None
    by: dict[str, float] = field(repr=False)
    model_accuracy: float
    with_empty: float
    where_right: float | None
    n_right: int
    baselines: dict[str, float]

    def to_records(self) -> list[dict[str, Any]]:
        """One row."""
        row = {"split": self.split, "n": self.n, "headline": self.headline.estimate, "low": self.headline.low}
        row |= {"high": self.headline.high, "plain": self.plain, "flip": self.flip, "stay": self.stay}
        row |= {"model accuracy": self.model_accuracy, "with empty": self.with_empty}
        row |= {"where model is right": self.where_right}
        return [row | self.baselines | {f"by {name}": value for name, value in self.by.items()}]


def score_lanes(
    lanes: Sequence[Lane], data: InterchangeDataset, readout: Readout = "candidates", by: Sequence[str] = ()
) -> list[Score]:
    """Score lanes of one kind of map on a split.

    Args:
        lanes: Trained maps.
        data: Pairs that were not trained on.
        readout: Whether the labels' tokens are compared, or all tokens.
        by: Kinds of groups to break down by, beside the interventions.

    Raises:
        DegenerateDataError: If the split is the training split: an alignment is reported on held-out pairs only.
    """
    if data.split == "train":
        raise DegenerateDataError(
            "IIA on the training pairs", "a split that was held out", "evaluate on the test pairs"
        )
    together = Lanes(lanes, data, readout)
    _, right = together.evaluate(stack([lane.tau for lane in lanes]).eval())
    distinct = {id(lane.stage(data)): i for i, lane in enumerate(lanes)}
    known = {stage: _Facts(together, i) for stage, i in distinct.items()}
    return [_score(data, right[i], known[id(lane.stage(data))], by) for i, lane in enumerate(lanes)]


class _Facts:
    """What does not depend on the map: the network's own answers on a pool, and the answers to a full swap."""

    @torch.no_grad()
    def __init__(self, lanes: Lanes, index: int):
        lane, data = lanes.lanes[index], lanes.data
        stage, order = lane.stage(data), torch.arange(len(data.pool))
        candidates = data.pool.candidates if lanes.readout == "candidates" else None
        answers = []
        for rows in order.split(4096 if data.pool.candidates is None else 64):
            wanted = None if candidates is None else candidates[rows]
            answers.append(stage.logits(stage.acts[rows], rows, wanted).argmax(1))
        self.answers = torch.cat(answers)
        truth = data.pool.settings["output"]
        self.truth = truth
        if data.pool.candidates is not None and lanes.readout == "vocabulary":
            truth = data.pool.candidates.gather(1, truth[:, None])[:, 0]
        self.right = self.answers == truth
        first = data.chosen.int().argmax(1)
        donors = torch.where(data.chosen.any(1), data.sources.gather(1, first[:, None])[:, 0], data.base)
        targets, found = lanes.targets(torch.arange(len(data)))[index], []
        for rows in torch.arange(len(data)).split(4096 if data.pool.candidates is None else 64):
            wanted = None if candidates is None else data.pool.candidates[data.base[rows]]  # type: ignore[index]
            found.append(stage.logits(stage.acts[donors[rows]], data.base[rows], wanted).argmax(1) == targets[rows])
        self.full_swap = float(torch.cat(found).float().mean())
        self.nothing = float((self.answers[data.base] == targets).float().mean())


def _score(data: InterchangeDataset, right: Bool[Tensor, "n"], facts: _Facts, by: Sequence[str]) -> Score:
    flips, n = data.flips, len(data)
    share = lambda rows: float(right[rows].float().mean()) if bool(rows.any()) else None
    names, codes = data.intervened(), {}
    for i, name in enumerate(names):
        codes.setdefault(name, []).append(i)
    parts = {name: float(right[rows].float().mean()) for name, rows in codes.items()}
    constant = sum(int(torch.bincount(data.labels[rows]).max()) for rows in codes.values()) / n
    for kind in by:
        items = data.pool.groups[kind][data.base]
        for item in items.unique().tolist():
            rows = (items == item).reshape(n, -1).any(1)
            parts[f"{kind} {item}"] = float(right[rows].float().mean())
    model_right = facts.right[data.base]
    fair = model_right & (facts.right[data.sources] | ~data.chosen).all(1)
    plain, accuracy, sets = float(right.float().mean()), float(model_right.float().mean()), len(codes)
    with_empty = plain if "none" in codes else (sets * plain + accuracy) / (sets + 1)
    return Score(
        data.split, n, _headline(right, flips), plain, share(flips), share(~flips), parts, accuracy,
        with_empty, share(fair), int(fair.sum()),
        {"do nothing": facts.nothing, "full swap": facts.full_swap, "best constant": constant},
    )  # fmt: skip


def _headline(right: Bool[Tensor, "n"], flips: Bool[Tensor, "n"]) -> Interval:
    """Mean of two shares, with the square root of the sum of squares of their distances to Wilson's bounds."""
    parts = [right[rows] for rows in (flips, ~flips) if bool(rows.any())]
    found = [wilson(int(p.sum()), len(p)) for p in parts]
    if len(found) == 1:
        return found[0]
    mean = sum(f.estimate for f in found) / 2
    down = sum((f.estimate - f.low) ** 2 for f in found) ** 0.5 / 2
    up = sum((f.high - f.estimate) ** 2 for f in found) ** 0.5 / 2
    return Interval(mean, mean - down, mean + up, found[0].level, f"mean of flip and stay, n = {len(right)}")
