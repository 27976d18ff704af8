"""Sweeps: maps, sites, sizes and seeds trained in stacks, each with its controls at the same budget; resumable."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.causal.complexity import complexity, refuse_few
from interp.causal.complexity import sizes as map_sizes
from interp.causal.controls import refuse_permuted, refuse_wrong
from interp.causal.data import InterchangeDataset, Pool, Splits
from interp.causal.flexible_maps import build_map
from interp.causal.lanes import Lane
from interp.causal.maps import AlignmentMap
from interp.causal.models import CausalModel
from interp.causal.networks import untrained
from interp.causal.partition import Partition
from interp.causal.scoring import Score, score_lanes
from interp.causal.stages import Stage, cut
from interp.causal.sweep_result import AlignmentSweep
from interp.causal.training import Fit, Progress, Training, fit_lanes
from interp.hooks.errors import ArgumentError, ShapeMismatchError
from interp.hooks.model import Model
from interp.hooks.site import Site, SiteLike
from interp.runs.kept import Kept

MapSpec = str | Mapping[str, Any]
_SEED = 10_000  # seeds of controls begin here


@dataclass(frozen=True)
class _Cell:
    """One map at one site, with one size of block and one seed."""

    name: str
    spec: dict[str, Any] = field(hash=False)
    site: str
    width: int
    size: int
    seed: int


@dataclass(frozen=True, eq=False)
class _Plan:
    """What all cells share."""

    models: dict[int, Model]
    random_models: dict[int, Model] | None
    data: Splits
    training: Training
    restarts: int
    wrong: CausalModel | None
    permuted: bool
    measure: bool
    cache: bool

    @property
    def variables(self) -> tuple[str, ...]:
        """The aligned variables."""
        return self.data.train.variables

    def partition(self, cell: _Cell) -> Partition:
        """As many coordinates for each variable."""
        return Partition(dict.fromkeys(self.variables, cell.size))


def sweep(
    models: Model | Sequence[Model], data: Splits, sites: Sequence[SiteLike],
    maps: Sequence[MapSpec] | Mapping[str, MapSpec], *, sizes: Sequence[int], seeds: Sequence[int] = (0,),
    training: Training | None = None, restarts: int = 3, random_models: Sequence[Model] | None = None,
    wrong: CausalModel | None = None, permuted: bool = False, measure: bool = True, cache: bool = True,
    path: str | Path | None = None, lanes: int = 24, progress: Progress = lambda _: None,
) -> AlignmentSweep:  # fmt: skip
    """Train every map at every site, for every size of block and seed, each beside its controls.

    For each of these the same map is also trained on an untrained network of the same architecture (several times, of
    which the best by validation loss counts) and on permuted labels: with the same pairs, steps and rates. All are
    scored on the test pairs. Maps of one kind are trained side by side.

    Args:
        models: The network; or one for each seed, which then varies the network with the map.
        data: Pairs. Their variables are aligned.
        sites: Where.
        maps: Kinds (``orthogonal``) or specifications (``{"kind": "revnet", "blocks": 1}``) as `build_map` takes them,
            by name or named by `map_name`.
        sizes: Coordinates of each variable.
        seeds: Of the maps' first values and of the untrained networks.
        training: The budget of every map; by default that of `Training`.
        restarts: Maps on each untrained network.
        random_models: Untrained networks, one for each seed, where these cannot be initialised anew.
        wrong: Another algorithm on the same inputs, with as many variables, that every map is also trained for.
        permuted: Whether to score the trained maps with blocks exchanged between variables as well.
        measure: Whether to measure stretch and non-linearity; sizes are always there.
        cache: Whether the network below a site is run once only.
        path: A folder; finished cells are kept there and not computed again. One process at a time.
        lanes: Maps that are trained side by side.
        progress: Told of every validation.

    Raises:
        ArgumentError: If a list is empty or repeats itself, networks and seeds do not match, or blocks are to be
            permuted that a map learns, or of one variable.
        DegenerateDataError: If there are too few test inputs to measure a map.
        SiteNotFoundError: If a site does not exist.
        ShapeMismatchError: If blocks do not fit a site.
        RunError: If another process works in the folder.

    Example:
        >>> import interp
        >>> from interp.causal import Training, hierarchical_equality, mlp, sweep
        >>> task = hierarchical_equality()
        >>> found = sweep(
        ...     interp.attach(mlp(task)), task.splits(200, 100, 100), ["block1"], ["identity", "orthogonal"],
        ...     sizes=[4, 8], training=Training(steps=2), restarts=1, measure=False,
        ... )
        >>> len(found.rows), found.maps
        (4, ['identity', 'orthogonal'])
    """
    networks = _networks(models, seeds)
    given = None if random_models is None else _networks(random_models, seeds)
    plan = _Plan(
        networks, given, data, training or Training(), restarts, wrong, permuted, measure, cache
    )  # fmt: skip
    if restarts < 1 or lanes < 1:
        raise ArgumentError(f"restarts={restarts}, lanes={lanes}", "at least 1 of each")
    cells = _cells(plan, sites, maps, sizes)
    data.train.check()
    for test in data.tests.values() if wrong is not None else ():
        refuse_wrong(test, wrong)
    with Kept(path, "cells.jsonl") as kept:
        rows = _rows(plan, cells, kept, lanes, progress)
    pairs = f"{len(data.train)} training pairs"
    return AlignmentSweep(
        rows, data.train.causal_model.name, list(plan.variables), f"{plan.training}; {pairs}", _controls(plan)
    )


def map_name(spec: MapSpec) -> str:
    """Return the name of a map's specification: its kind with its options.

    Example:
        >>> map_name({"kind": "revnet", "blocks": 10, "hidden": 16}), map_name({"kind": "low_rank", "rank": 4})
        ('revnet 10x16', 'low_rank rank=4')
    """
    if isinstance(spec, str):
        return spec
    options = {k: v for k, v in sorted(spec.items()) if k != "kind"}
    if spec.get("kind") == "revnet" and set(options) == {"blocks", "hidden"}:
        return f"revnet {options['blocks']}x{options['hidden']}"
    return " ".join([str(spec.get("kind")), *(f"{k}={v}" for k, v in options.items())])


def _named(maps: Sequence[MapSpec] | Mapping[str, MapSpec]) -> dict[str, dict[str, Any]]:
    pairs = list(maps.items()) if isinstance(maps, Mapping) else [(map_name(m), m) for m in maps]
    if not pairs or len(dict(pairs)) < len(pairs) or isinstance(maps, str):
        raise ArgumentError(f"maps={maps!r}", "different maps, at least one")
    return {name: {"kind": m} if isinstance(m, str) else dict(m) for name, m in pairs}


def _networks(models: Model | Sequence[Model], seeds: Sequence[int]) -> dict[int, Model]:
    if not len(seeds) or len(set(seeds)) < len(seeds):
        raise ArgumentError(f"seeds={list(seeds)}", "different seeds, at least one")
    if isinstance(models, Model):
        return dict.fromkeys(seeds, models)
    if len(models) != len(seeds):
        raise ArgumentError(f"{len(models)} networks for {len(seeds)} seeds", "one network, or one for each seed")
    return dict(zip(seeds, models, strict=True))


def check_cells(
    model: Model, data: Splits, sites: Sequence[SiteLike], maps: Sequence[MapSpec] | Mapping[str, MapSpec],
    sizes: Sequence[int], measure: bool = False,
) -> None:  # fmt: skip
    """Refuse sites, maps and sizes that do not fit a network, without training anything.

    Raises:
        InterpError: As `sweep` does.
    """
    _cells(_Plan({0: model}, None, data, Training(), 1, None, False, measure, True), sites, maps, sizes)


def _cells(
    plan: _Plan, sites: Sequence[SiteLike], given: Sequence[MapSpec] | Mapping[str, MapSpec], sizes: Sequence[int]
) -> list[_Cell]:
    """All cells, those that are stacked together behind each other; what does not fit is refused."""
    maps = _named(given)
    places = [str(Site.parse(s)) for s in sites]
    if not places or not len(sizes) or len(set(places)) < len(places) or len(set(sizes)) < len(sizes):
        raise ArgumentError(f"sites={places}, sizes={list(sizes)}", "different sites and sizes, at least one of each")
    widths = {place: _width(plan, place) for place in places}
    found = []
    for name, spec in maps.items():
        for place, size in ((p, s) for p in places for s in sizes):
            width = widths[place]
            tau = build_map(spec, width, acts=torch.eye(width))
            if plan.permuted:
                refuse_permuted(tau.kind, plan.variables)
            if plan.measure and tau.kind == "revnet":
                refuse_few(len(plan.data.test.pool), width)
            Partition(dict.fromkeys(plan.variables, size)).mask(plan.variables, tau.code_width)
            found += [_Cell(name, spec, place, width, size, seed) for seed in plan.models]
    return found


def _width(plan: _Plan, place: str) -> int:
    """Width of a site, which must be the same in every network."""
    pool = plan.data.train.pool
    one = Pool(pool.take(torch.arange(1)), {})
    distinct = {id(m): m for m in (*plan.models.values(), *(plan.random_models or {}).values())}.values()
    widths = {cut(m, place, one, plan.cache).width for m in distinct}
    if len(widths) > 1:
        raise ShapeMismatchError(f"site {place} of widths {sorted(widths)}", "networks of one architecture")
    return widths.pop()


def _rows(plan: _Plan, cells: Sequence[_Cell], kept: Kept, lanes: int, progress: Progress) -> list[dict[str, Any]]:
    """The rows of all cells. Stacks are those of the whole grid, also where some cells are there already."""
    shared = _Fingerprint(plan) if kept.file is not None else None
    keys = {cell: shared.key(cell) if shared else str(i) for i, cell in enumerate(cells)}
    work, stacks = _Work(plan), _stacks(cells, max(1, lanes // _lanes(plan)))
    for number, stack in enumerate(stacks, start=1):
        missing = [cell for cell in stack if keys[cell] not in kept.rows]
        if missing:
            where = f"stack {number} of {len(stacks)}, {missing[0].name}"
            made = work.compute(missing, lambda line, where=where: progress(f"{where}: {line}"))
            kept.add({keys[cell]: rows for cell, rows in zip(missing, made, strict=True)})
    return [dict(row) for cell in cells for row in kept.rows[keys[cell]]]


def _lanes(plan: _Plan) -> int:
    return 2 + plan.restarts


def _stacks(cells: Sequence[_Cell], together: int) -> list[list[_Cell]]:
    """Cells whose maps can be trained side by side, in parts of a given size."""
    found = []
    for _, group in groupby(cells, key=lambda c: (c.name, c.width)):
        members = list(group)
        found += [members[i : i + together] for i in range(0, len(members), together)]
    return found


class _Work:
    """Computes stacks of cells; what of the networks the next stack needs too is held."""

    def __init__(self, plan: _Plan):
        self.plan = plan
        self.random: dict[int, Model] = dict(plan.random_models or {})
        self.stages: dict[tuple[int, str], dict[int, Stage]] = {}

    def compute(self, cells: Sequence[_Cell], progress: Progress) -> list[list[dict[str, Any]]]:
        """Train and score cells together: for each its rows, one for each test split."""
        plan = self.plan
        self._let_go(cells)
        parts = [self._lanes(cell) for cell in cells]
        every = [lane for part in parts for lane in part]
        fits = fit_lanes(every, plan.data.train, plan.data.validation, plan.training, progress=progress)
        measured = [self._measured(part[0]) for part in parts]
        rows: list[list[dict[str, Any]]] = [[] for _ in cells]
        for name, test in plan.data.tests.items():
            scores, more = score_lanes(every, test, plan.training.readout), self._more(parts, cells, name, progress)
            start = 0
            for i, (cell, part) in enumerate(zip(cells, parts, strict=True)):
                own = slice(start, start + len(part))
                row = _row(cell, name, scores[own], fits[own])
                rows[i].append(row | {key: values[i] for key, values in more.items()} | measured[i])
                start += len(part)
        return rows

    def _lanes(self, cell: _Cell) -> list[Lane]:
        """The trained map, those on an untrained network, and, where there is something to train, permuted labels."""
        model, network = self.plan.models[cell.seed], self._random(cell.seed)
        found = [self._lane(cell, model, cell.seed)]
        if not found[0].tau.num_parameters:
            return [*found, self._lane(cell, network, _SEED + cell.seed)]
        found += [self._lane(cell, network, _SEED * (r + 1) + cell.seed) for r in range(self.plan.restarts)]
        return [*found, self._lane(cell, model, cell.seed, shuffle=_SEED + cell.seed)]

    def _lane(self, cell: _Cell, model: Model, seed: int, shuffle: int | None = None) -> Lane:
        stages, pool = self.stages.setdefault((id(model), cell.site), {}), self.plan.data.train.pool
        if cell.spec["kind"] == "pca" and id(pool.inputs) not in stages:
            stages[id(pool.inputs)] = cut(model, cell.site, pool, self.plan.cache)
        acts = stages[id(pool.inputs)].acts if cell.spec["kind"] == "pca" else None
        tau = build_map(cell.spec, cell.width, seed=seed, acts=acts)
        mask = self.plan.partition(cell).mask(self.plan.variables, tau.code_width)
        return Lane(model, cell.site, tau, mask, shuffle, self.plan.cache, stages=stages)

    def _random(self, seed: int) -> Model:
        if seed not in self.random:
            self.random[seed] = untrained(self.plan.models[seed], _SEED + seed)
        return self.random[seed]

    def _let_go(self, cells: Sequence[_Cell]) -> None:
        """Forget untrained networks and activations that these cells do not need."""
        seeds = {cell.seed for cell in cells}
        if self.plan.random_models is None:
            self.random = {seed: model for seed, model in self.random.items() if seed in seeds}
        networks = {id(self.plan.models[s]) for s in seeds} | {id(self.random[s]) for s in seeds if s in self.random}
        needed = {(network, cell.site) for network in networks for cell in cells}
        self.stages = {key: held for key, held in self.stages.items() if key in needed}

    def _measured(self, lane: Lane) -> dict[str, float]:
        if not self.plan.measure:
            return map_sizes(lane.tau, lane.mask)
        return complexity(lane.tau, lane.stage(self.plan.data.test).acts, lane.mask)

    def _more(
        self, parts: Sequence[Sequence[Lane]], cells: Sequence[_Cell], name: str, progress: Progress
    ) -> dict[str, list[float]]:
        """The controls that were asked for beside the two that are always there, on one test split."""
        plan, found = self.plan, {}
        test, trained = plan.data.tests[name], [part[0] for part in parts]
        if plan.permuted:
            masks = [plan.partition(c).permuted(p.tau.code_width) for c, p in zip(cells, trained, strict=True)]
            lanes = [
                _again(p, p.tau, m.mask(plan.variables, p.tau.code_width)) for p, m in zip(trained, masks, strict=True)
            ]
            found["permuted"] = [s.headline.estimate for s in score_lanes(lanes, test, plan.training.readout)]
        if plan.wrong is not None:
            lanes = [_again(self._lane(c, p.model, c.seed), None, p.mask) for c, p in zip(cells, trained, strict=True)]
            train, validation = (d.under(plan.wrong) for d in (plan.data.train, plan.data.validation))
            fit_lanes(lanes, train, validation, plan.training, progress=progress)
            scores = score_lanes(lanes, test.under(plan.wrong), plan.training.readout)
            found["wrong algorithm"] = [s.headline.estimate for s in scores]
        return found


def _again(lane: Lane, tau: AlignmentMap | None, mask: Tensor) -> Lane:
    return Lane(lane.model, lane.sites, lane.tau if tau is None else tau, mask, cache=lane.cache, stages=lane.stages)


def _row(cell: _Cell, split: str, scores: Sequence[Score], fits: Sequence[Fit]) -> dict[str, Any]:
    """A cell's accuracies on one split: of its own map, the best on an untrained network, and that of no labels."""
    fixed = len(scores) == 2
    restarts = range(1, 2 if fixed else len(scores) - 1)
    best = max(restarts, key=lambda i: (fits[i].trained, -fits[i].validation_loss))
    own, random, shuffled = scores[0], scores[best], None if fixed else scores[-1]
    return {
        "map": cell.name, "site": cell.site, "size": cell.size, "seed": cell.seed, "split": split, "n": own.n,
        "iia": own.headline.estimate, "low": own.headline.low, "high": own.headline.high, "plain": own.plain,
        "flip": own.flip, "stay": own.stay, "model accuracy": own.model_accuracy,
        "where model is right": own.where_right, **own.baselines, "random": random.headline.estimate,
        "random plain": random.plain, "random restarts": [scores[i].headline.estimate for i in restarts],
        "random trained": fixed or fits[best].trained, "shuffled": shuffled and shuffled.headline.estimate,
        "selectivity": own.headline.estimate - random.headline.estimate, "trained": fixed or fits[0].trained,
        "steps": fits[0].steps, "validation loss": fits[0].validation_loss, "chance": fits[0].chance,
        "random validation loss": fits[best].validation_loss, "spec": json.dumps(cell.spec, sort_keys=True),
    }  # fmt: skip


def _controls(plan: _Plan) -> str:
    found = [f"untrained networks (best of {plan.restarts} maps)", "permuted labels"]
    found += ["exchanged blocks"] * plan.permuted + ([] if plan.wrong is None else [f"algorithm {plan.wrong.name}"])
    return ", ".join(found)


class _Fingerprint:
    """Hashes of all that a cell's numbers depend on."""

    def __init__(self, plan: _Plan):
        import interp
        from interp.store.files import weights_sha256

        hashes: dict[int, str] = {}  # of weights and modules: one set of weights may belong to two architectures
        for model in (*plan.models.values(), *(plan.random_models or {}).values()):
            hashes.setdefault(id(model), weights_sha256(model) + re.sub("0x[0-9a-f]+", "", f"{model.module}"))
        self.networks = {seed: hashes[id(model)] for seed, model in plan.models.items()}
        self.random = {seed: hashes[id(model)] for seed, model in (plan.random_models or {}).items()}
        splits = [_content(d) for d in (plan.data.train, plan.data.validation, *plan.data.tests.values())]
        self.shared = [
            interp.__version__, splits, list(plan.data.tests), plan.data.train.causal_model.name, asdict(plan.training),
            plan.restarts, None if plan.wrong is None else _content(plan.data.train.under(plan.wrong)), plan.permuted,
            plan.measure, plan.cache,
        ]  # fmt: skip

    def key(self, cell: _Cell) -> str:
        """Of one cell."""
        own = [asdict(cell), self.networks[cell.seed], self.random.get(cell.seed)]
        return hashlib.sha256(json.dumps([*own, *self.shared], sort_keys=True).encode()).hexdigest()


def _content(data: InterchangeDataset) -> str:
    whole = hashlib.sha256(f"{data.causal_model.name} {data.variables}".encode())
    inputs = data.pool.inputs
    tensors = [data.base, data.sources, data.chosen, data.labels, data.pool.candidates]
    for tensor in [*tensors, inputs if isinstance(inputs, Tensor) else None]:
        if tensor is not None:
            whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    whole.update(b"" if isinstance(inputs, Tensor) else json.dumps([str(i) for i in inputs]).encode())
    return whole.hexdigest()
