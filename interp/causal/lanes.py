"""Lanes: alignments of one kind of map that are trained and evaluated together, along one axis in front."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from interp.causal.data import InterchangeDataset
from interp.causal.maps import AlignmentMap
from interp.causal.stages import SequentialStage, Stage, cut
from interp.causal.swap import rows_needed, swap, swap_by_matrices
from interp.hooks.errors import ShapeMismatchError, UnmatchedVariableError
from interp.hooks.model import Model
from interp.hooks.site import SiteLike

Readout = Literal["candidates", "vocabulary"]
_EVALUATED = 16384  # rows of vectors in one evaluation step, of all lanes together
_TEXTS = 256


@dataclass(eq=False)
class Lane:
    """One map at one place of one network.

    Attributes:
        model: The network.
        sites: Where it is cut.
        tau: The map.
        mask: Which coordinates of its code are whose [variables, code].
        shuffle: Seed by which labels are permuted wherever this lane is fitted, or None.
        cache: Whether the lower network may be run once only.
        search: Neurons of each variable up to which the mask is searched for before scoring, or None.
        stages: The cut network for each pool, by the pool's identity.
    """

    model: Model
    sites: SiteLike | Sequence[SiteLike]
    tau: AlignmentMap
    mask: Bool[Tensor, "variables code"]
    shuffle: int | None = None
    cache: bool = True
    search: int | None = None
    stages: dict[int, Stage] = field(default_factory=dict, repr=False)

    def stage(self, data: InterchangeDataset) -> Stage:
        """The network cut for a data set's inputs, made once."""
        key = id(data.pool.inputs)
        if key not in self.stages:
            self.stages[key] = cut(self.model, self.sites, data.pool, self.cache)
        return self.stages[key]


class Lanes:
    """Lanes on one data set: their activations, the networks behind the sites, and the labels.

    Args:
        lanes: Maps of one kind and width.
        data: The pairs.
        readout: ``candidates``: the answer is the best of the labels' tokens; ``vocabulary``: of all tokens.
        fitting: Whether lanes are fitted to these pairs: labels are then permuted for those that ask for it.

    Raises:
        ShapeMismatchError: If a map does not fit its site.
        UnmatchedVariableError: If the network has no output for a label.
    """

    def __init__(
        self, lanes: Sequence[Lane], data: InterchangeDataset, readout: Readout = "candidates", fitting: bool = False
    ):  # fmt: skip
        self.lanes, self.data, self.readout = list(lanes), data, readout
        stages = _read_once(lanes, data)
        distinct = list({id(s): s for s in stages}.values())
        for lane, stage in zip(lanes, stages, strict=True):
            if stage.width != lane.tau.width:
                raise ShapeMismatchError(f"{lane.tau} at {lane.sites}", f"a map of width {stage.width}, as the site is")
        dtype = lanes[0].tau.dtype
        self.acts = torch.stack([s.acts.to(dtype) for s in distinct])
        places = [next(i for i, d in enumerate(distinct) if d is s) for s in stages]
        self.which = None if places == list(range(len(places))) else torch.tensor(places)
        self.members = [[i for i, place in enumerate(places) if place == one] for one in range(len(distinct))]
        self.mask = torch.stack([lane.mask for lane in lanes])
        self.uppers = [_Upper(stages, members) for members in _alike(stages)]
        seeds = [lane.shuffle if fitting else None for lane in lanes]
        seeds = seeds if any(seed is not None for seed in seeds) else seeds[:1]
        self.labels = torch.stack([data.labels if seed is None else data.shuffled(seed).labels for seed in seeds])
        self.needed = torch.cat([data.base[None], data.sources.where(data.chosen, data.base[:, None]).mT])
        self._answers_exist(stages[0])

    def __len__(self) -> int:
        return len(self.lanes)

    def logits(self, tau: AlignmentMap, rows: Int64[Tensor, "rows"]) -> Float[Tensor, "lanes rows labels"]:
        """Return the outputs after the interchange of some pairs, for every lane of a stack."""
        data, weights = self.data, tau.weights(self.mask)
        if len(rows) >= tau.width and (found := tau.swap_matrices(weights.to(tau.dtype))) is not None:
            return self.answers(self._moved(found, rows), rows)
        needed, where = rows_needed(data.base[rows], data.sources[rows], data.chosen[rows])
        h = self.acts.index_select(1, needed)
        h = h.expand(len(self), -1, -1) if len(h) == 1 else h if self.which is None else h[self.which]
        return self.answers(swap(tau, h, where, weights, len(rows)), rows)

    def _moved(self, matrices: Tensor, rows: Int64[Tensor, "rows"]) -> Tensor:
        """The same by matrices, place by place: fewer and smaller steps, where there are more rows than coordinates."""
        needed = self.needed.index_select(1, rows)
        h = self.acts.index_select(1, needed.flatten()).unflatten(1, needed.shape)
        own = _by_place(matrices, self.members)
        return _in_order([swap_by_matrices(one, m) for one, m in zip(h, own, strict=True)], self.members)

    def answers(self, h: Float[Tensor, "lanes rows width"], rows: Int64[Tensor, "rows"]) -> Tensor:
        """Return the outputs with h at the sites in the runs of the pairs' bases."""
        wanted = self.data.candidates if self.readout == "candidates" else None
        wanted = None if wanted is None else wanted[rows]
        if len(self.uppers) == 1:
            return self.uppers[0](h, self.data.base[rows], wanted)
        members = [u.members for u in self.uppers]
        parts = zip(self.uppers, _by_place(h, members), strict=True)
        found = [upper(part, self.data.base[rows], wanted) for upper, part in parts]
        return _in_order(found, members)

    def targets(self, rows: Int64[Tensor, "rows"]) -> Int64[Tensor, "lanes rows"]:
        """Return the labels of some pairs, as columns of the output."""
        labels = self.labels.index_select(1, rows).expand(len(self), -1)
        if self.readout == "candidates" or self.data.candidates is None:
            return labels
        return self.data.candidates[rows].expand(len(self), -1, -1).gather(2, labels[..., None])[..., 0]

    def loss(self, tau: AlignmentMap, rows: Int64[Tensor, "rows"]) -> Float[Tensor, "lanes"]:
        """Return the mean cross-entropy of some pairs, for every lane."""
        return cross_entropy(self.logits(tau, rows), self.targets(rows))

    @torch.no_grad()
    def evaluate(self, tau: AlignmentMap) -> tuple[Float[Tensor, "lanes"], Bool[Tensor, "lanes n"]]:
        """Return mean cross-entropy and which pairs are answered as the algorithm does."""
        n, chain = len(self.data), isinstance(self.lanes[0].stage(self.data), SequentialStage)
        size = max(1, (_EVALUATED if chain else _TEXTS) // len(self))
        total, right = torch.zeros(len(self), dtype=torch.float64), []
        for rows in torch.arange(n).split(size):
            logits, targets = self.logits(tau, rows), self.targets(rows)
            total += cross_entropy(logits, targets).double() * len(rows)
            right.append(logits.argmax(-1) == targets)
        return total / n, torch.cat(right, 1)

    def chance(self) -> Float[Tensor, "lanes"]:
        """Entropy of the labels, which the best constant guess reaches, for every lane, in nats."""
        shares = torch.stack([torch.bincount(row, minlength=2) for row in self.labels]).double() / len(self.data)
        return -(shares * shares.clamp(min=1e-300).log()).sum(1).expand(len(self))

    def _answers_exist(self, stage: Stage) -> None:
        candidates, labels = self.data.pool.candidates, self.data.causal_model.labels
        if candidates is not None:
            if candidates.shape[1] != labels:
                raise UnmatchedVariableError(f"{candidates.shape[1]} candidates", f"one for each of {labels} labels")
            return
        count, highest = stage.plain(self.data.base[:1]).shape[1], int(self.data.labels.max())
        if highest >= count or self.data.causal_model.labels > count:
            raise UnmatchedVariableError(
                f"labels 0..{max(highest, self.data.causal_model.labels - 1)}", f"one of the network's {count} outputs"
            )


def cross_entropy(logits: Tensor, targets: Tensor) -> Float[Tensor, "lanes"]:
    """Mean over rows, for every lane; in float32 or better, whatever the network's dtype."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.shape[-1] == 2:  # log(1 + exp(other - right)): one pass instead of a softmax over rows of two
        return nn.functional.softplus((logits[..., 0] - logits[..., 1]) * (2 * targets - 1), threshold=40).mean(1)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def _read_once(lanes: Sequence[Lane], data: InterchangeDataset) -> list[Stage]:
    """The stage of every lane; lanes at one place of one network share theirs."""
    found: dict[tuple[int, str, bool], Stage] = {}
    for lane in lanes:
        place = (id(lane.model), str(lane.sites), lane.cache)
        if place in found:
            lane.stages.setdefault(id(data.pool.inputs), found[place])
        found[place] = lane.stage(data)
    return [lane.stage(data) for lane in lanes]


def _by_place(x: Tensor, members: Sequence[list[int]]) -> Sequence[Tensor]:
    """The lanes' rows, for each place those of its lanes."""
    order = list(itertools.chain.from_iterable(members))
    return x.split([len(m) for m in members]) if order == sorted(order) else [x[m] for m in members]


def _in_order(parts: Sequence[Tensor], members: Sequence[list[int]]) -> Tensor:
    """Parts that belong to these lanes, behind each other in the order of the lanes."""
    if len(parts) == 1:
        return parts[0]
    order = list(itertools.chain.from_iterable(members))
    joined = torch.cat(list(parts))
    return joined if order == sorted(order) else joined[torch.tensor(order).argsort()]


def _alike(stages: Sequence[Stage]) -> list[list[int]]:
    """Lanes by the network behind their site: chains of one structure together, others by themselves."""
    found: dict[str, list[int]] = {}
    for index, stage in enumerate(stages):
        chain = isinstance(stage, SequentialStage)
        key = f"{stage.rest} {stage.model.dtype}" if isinstance(stage, SequentialStage) and chain else str(id(stage))
        found.setdefault(key, []).append(index)
    return list(found.values())


class _Upper:
    """The networks behind the sites of some lanes, run at once."""

    def __init__(self, stages: Sequence[Stage], members: list[int]):
        self.members, self.first = members, stages[members[0]]
        rests = [s.rest for i in members if isinstance(s := stages[i], SequentialStage)]
        self.stacked = None
        if len({id(stages[i]) for i in members}) > 1:
            with torch.no_grad():
                self.parameters, self.buffers = torch.func.stack_module_state(rests)  # type: ignore[arg-type]
            self.parameters = {name: p.detach() for name, p in self.parameters.items()}
            self.stacked, self.dtype = rests[0], self.first.model.dtype

    def __call__(self, h: Tensor, rows: Tensor, candidates: Tensor | None) -> Tensor:
        if self.stacked is not None:
            call = lambda p, b, x: torch.func.functional_call(self.stacked, (p, b), (x,))  # type: ignore[arg-type]
            return torch.func.vmap(call)(self.parameters, self.buffers, h.to(self.dtype))
        lanes = len(h)
        wanted = None if candidates is None else candidates.repeat(lanes, 1)
        out = self.first.logits(h.flatten(0, 1), rows.repeat(lanes), wanted)
        return out.unflatten(0, (lanes, -1))


def bits(nats: float) -> float:
    """Nats in bits."""
    return nats / math.log(2)
