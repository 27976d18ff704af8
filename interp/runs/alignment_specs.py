"""A run of alignments: small networks that are trained for a task, and a sweep of maps over them with controls."""

import functools
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from interp.causal.alignment import Alignment
from interp.causal.data import Splits
from interp.causal.equality import distributive_law, hierarchical_equality
from interp.causal.files import kept_part
from interp.causal.flexible_maps import build_map
from interp.causal.networks import mlp, train_mlps
from interp.causal.partition import Partition
from interp.causal.sampling import Task
from interp.causal.sweep_result import AlignmentSweep
from interp.causal.sweeps import check_cells, map_name, sweep
from interp.causal.training import Training
from interp.hooks.attach import attach
from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.hooks.table import Table
from interp.plots import chart
from interp.runs.drawn import Drawn, save_drawn
from interp.runs.run import Progress, Run
from interp.runs.specs import Fields, Spec, Work

_ALGORITHMS = {
    "hierarchical_equality": ("both", "left", "first_argument"), "distributive_law": ("and_or", "and_or_and"),
}  # fmt: skip
_EXAMPLES = 40
_TRIED = 200  # pairs on which sites, maps and sizes are checked


class NetworkSpec(Fields):
    """The networks: MLPs of blocks of the input's width, one for each seed, trained together.

    Attributes:
        blocks: Number of blocks; sites are ``block1``, ``block2`` and so on.
        samples: Inputs in an epoch.
        epochs: Most epochs.
        enough: Accuracy of the worst network at which training ends.
    """

    blocks: int = Field(default=3, ge=1)
    samples: int = Field(default=1_048_576, ge=1024)
    epochs: int = Field(default=20, ge=1)
    enough: float = Field(default=0.999, gt=0)


class PairsSpec(Fields):
    """How many pairs, and the seed of their draw."""

    train: int = Field(default=128_000, ge=1)
    validation: int = Field(default=2_000, ge=1)
    test: int = Field(default=10_000, ge=1)
    seed: int = 0


class TrainingSpec(Fields):
    """The budget of every map, those of the controls too; as `Training`."""

    lr: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=1024, ge=1)
    steps: int = Field(default=4000, ge=1)
    patience: int = Field(default=5, ge=1)
    least: int | None = Field(default=None, ge=0)
    decay: Literal["plateau", "linear"] = "plateau"


class AlignmentSweepSpec(Spec):
    """Maps at sites of networks that solve a task, each beside untrained networks and permuted labels.

    Attributes:
        task: ``hierarchical_equality`` or ``distributive_law``.
        algorithm: One of the task's: ``both``, ``left``, ``first_argument``; ``and_or``, ``and_or_and``.
        network: What is trained.
        sites: Where variables are looked for.
        maps: Kinds, or kinds with options: ``{kind: revnet, blocks: 1, hidden: 16}``.
        sizes: Coordinates of each variable.
        seeds: Of networks, maps and controls, together.
        pairs: How many.
        training: The budget of every map.
        restarts: Maps on each untrained network.
        measure: Whether to measure stretch and non-linearity.
    """

    task: Literal["hierarchical_equality", "distributive_law"]
    algorithm: str
    network: NetworkSpec = NetworkSpec()
    sites: tuple[str, ...] = Field(min_length=1)
    maps: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    sizes: tuple[int, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    pairs: PairsSpec = PairsSpec()
    training: TrainingSpec = TrainingSpec()
    restarts: int = Field(default=3, ge=1)
    measure: bool = True

    @model_validator(mode="after")
    def _is_the_tasks(self) -> "AlignmentSweepSpec":
        if self.algorithm not in (known := _ALGORITHMS[self.task]):
            raise ValueError(f"algorithm of {self.task}: one of {', '.join(known)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("different seeds")
        return self

    def made(self) -> Task:
        """The task."""
        make = hierarchical_equality if self.task == "hierarchical_equality" else distributive_law
        return make(self.algorithm)  # type: ignore[arg-type]

    def prepare(self, progress: Progress) -> Work:
        """Check sites, maps and sizes against a network that is not trained yet.

        Raises:
            InterpError: If a site does not exist, or a map or a block does not fit it.
        """
        task = self.made()
        splits = task.splits(_TRIED, _TRIED, min(_TRIED, self.pairs.test), seed=self.pairs.seed)
        for spec in self.maps:
            if not isinstance(spec, str) and not isinstance(spec.get("kind"), str):
                raise ArgumentError(f"map {spec}", "a kind, with its options")
        network = attach(mlp(task, blocks=self.network.blocks))
        check_cells(network, splits, self.sites, self.maps, self.sizes, self.measure)
        return functools.partial(_compute, self, task)


def _compute(spec: AlignmentSweepSpec, task: Task, run: Run, step: Progress) -> None:
    """Write ``networks``, ``sweep``, ``summary``, ``frontier``, two figures, and the map that is chosen with examples.

    Cells of the sweep are kept as they are finished.
    """
    step(f"training {len(spec.seeds)} networks")
    models = [attach(network) for network in _networks(spec, task, run)]
    run.record_model("network", models[0])
    splits, training = task.splits(**spec.pairs.model_dump()), Training(**spec.training.model_dump())
    found: AlignmentSweep = run.once("sweep", lambda: sweep(
        models, splits, spec.sites, spec.maps, sizes=spec.sizes, seeds=spec.seeds, training=training,
        restarts=spec.restarts, measure=spec.measure, path=run.path / "cells", progress=_stacks(step),
    ))  # fmt: skip
    run.once("summary", found.summary)
    run.once("frontier", found.frontier)
    if {"alignment", "examples"} - set(run.names):
        step("fitting the chosen map for examples")
        chosen = _chosen(spec, found, models[0], splits)
        chosen.fit(splits, training=training, seed=spec.seeds[0])
        run.once("alignment", lambda: kept_part(chosen))
        run.once("examples", lambda: chosen.examples(splits.test, _EXAMPLES))
    save_drawn(run, "alignments", "found", lambda: _drawn(found), f"{task.name}: {found.algorithm}")


def _chosen(spec: AlignmentSweepSpec, found: AlignmentSweep, model: Model, splits: Splits) -> Alignment:
    """The map, site and size that validation pairs choose, on the first network, before training."""
    best = found.best()
    given = next(m for m in spec.maps if map_name(m) == best["map"])
    own = {"kind": given} if isinstance(given, str) else given
    # As the sweep takes them: principal axes are those of all training inputs.
    pool = splits.train.pool
    rows = torch.arange(len(pool) if own["kind"] == "pca" else 1)
    acts = model.capture(pool.take(rows), best["site"])[best["site"]]
    tau = build_map(own, acts.shape[-1], seed=spec.seeds[0], acts=acts)
    blocks = Partition(dict.fromkeys(splits.train.variables, int(best["size"])))
    return Alignment(model, splits.train.causal_model, best["site"], tau, blocks)


def _networks(spec: AlignmentSweepSpec, task: Task, run: Run) -> list[nn.Sequential]:
    """The trained networks; those of a run that goes on are read."""
    from safetensors.torch import load_model, save_model

    files = [run.path / "cells" / f"network-{seed}.safetensors" for seed in spec.seeds]
    networks = [mlp(task, blocks=spec.network.blocks, seed=seed) for seed in spec.seeds]
    if "networks" in run.names and all(file.is_file() for file in files):
        for network, file in zip(networks, files, strict=True):
            load_model(network, str(file))
        return networks
    networks, accuracies = train_mlps(task, spec.seeds, **spec.network.model_dump())
    files[0].parent.mkdir(exist_ok=True)
    for network, file in zip(networks, files, strict=True):
        save_model(network, str(file))
    rows = [{"seed": s, "accuracy": a} for s, a in zip(spec.seeds, accuracies, strict=True)]
    run.save("networks", Table(rows, "on inputs of their own"))
    return networks


def _stacks(step: Progress) -> Progress:
    """Says each stack once, not each validation."""
    said: list[str] = []

    def progress(line: str) -> None:
        stack = line.split(":")[0]
        if stack not in said:
            said.append(stack)
            step(stack)

    return progress


def _drawn(found: AlignmentSweep) -> list[Drawn]:
    best = found.best()
    shown = f"{best['map']} at {best['site']}: {best['iia']:.3f}, untrained networks {best['random']:.3f}"
    silent = (
        "That the network uses the variables in its own runs: only that swapping them answers as the algorithm does."
    )
    return [
        Drawn(
            chart(found), "Accuracy against complexity",
            f"Each point is a map; filled ones are on the frontier. Validation pairs choose {shown}.",
            "What the network does, where the curves are close: a map that is flexible enough aligns anything.",
            wide=True,
        ),
        Drawn(
            chart(found, figure="grid"), "Maps by sites, with their controls",
            f"Means over {best['seeds']} seeds. Budget: {found.budget}.", silent, wide=True,
        ),
    ]  # fmt: skip
