"""A run of probing: activations of a packaged data set, and a sweep of probes over their sites with its controls."""

import functools
from typing import Any, Literal

import numpy as np
from pydantic import Field

from interp.datasets import LabelledTexts, labelled_texts
from interp.hooks.attach import load
from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.hooks.table import Table
from interp.plots import chart
from interp.probes.curves import learning_curve
from interp.probes.linear import LDAProbe, LogisticProbe, MassMeanProbe, RidgeProbe
from interp.probes.neighbours import KNNProbe
from interp.probes.sweeps import ProbeSweep, sweep
from interp.runs.drawn import Drawn, save_drawn
from interp.runs.run import Progress, Run
from interp.runs.specs import Fields, Spec, Work
from interp.store.store import ActivationStore

_PROBES = {
    "logistic": LogisticProbe, "mass_mean": MassMeanProbe, "lda": LDAProbe, "ridge": RidgeProbe, "neighbours": KNNProbe,
}  # fmt: skip


class TextsSpec(Fields):
    """Which texts: of a packaged data set as many of each class, drawn by a seed.

    Attributes:
        name: As `labelled_texts` takes it.
        count: How many in all.
        seed: Of the draw.
    """

    name: str = "movies"
    count: int = Field(default=300, ge=20)
    seed: int = 0

    def drawn(self) -> LabelledTexts:
        """The texts.

        Raises:
            ArgumentError: If there is no such data set, or a class has too few texts.
        """
        data, made = labelled_texts(self.name), np.random.default_rng(self.seed)
        labels = np.asarray(data.labels)
        classes = np.unique(labels)
        each, left = divmod(self.count, len(classes))
        wanted = {c: each + (i < left) for i, c in enumerate(classes)}
        members = {c: np.flatnonzero(labels == c) for c in classes}
        short = [str(c) for c, rows in members.items() if len(rows) < wanted[c]]
        if short or not each:
            raise ArgumentError(
                f"{self.count} texts of {self.name}, {len(classes)} classes",
                f"as many of each class; too few of {', '.join(short)}" if short else f"at least {len(classes)}",
            )
        rows = np.concatenate([made.choice(members[c], n, replace=False) for c, n in wanted.items()])
        rows = made.permutation(rows)
        pick = lambda column: None if column is None else [column[i] for i in rows]
        texts, kept = pick(data.texts), pick(data.labels)
        return LabelledTexts(
            data.name, texts or [], kept or [], pick(data.groups), pick(data.ratings), data.licence, data.source
        )


class ProbeSweepSpec(Spec):
    """Probes at sites by nested cross-validation, beside permuted labels and an untrained copy of the model.

    Attributes:
        model: A packaged name, hub id, folder or GGUF file.
        texts: What is probed.
        sites: Globs select many.
        pools: ``mean``, ``max``, ``last`` or ``first``.
        probes: Which.
        folds: Number of folds.
        seeds: Of splits, probes and controls.
        untrained: Seed of an untrained copy of the model; null for none.
        curve: Whether to draw a learning curve of the first probe at the site that is chosen.
    """

    model: str
    texts: TextsSpec = TextsSpec()
    sites: tuple[str, ...] = Field(default=("blocks.*.hook_resid_post",), min_length=1)
    pools: tuple[Literal["mean", "max", "last", "first"], ...] = Field(default=("mean",), min_length=1)
    probes: tuple[Literal["logistic", "mass_mean", "lda", "ridge", "neighbours"], ...] = Field(
        default=("logistic", "mass_mean"), min_length=1
    )
    folds: int = Field(default=5, ge=2)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    untrained: int | None = 0
    curve: bool = True

    def prepare(self, progress: Progress) -> Work:
        """Load the model and the texts, and check the sites.

        Raises:
            InterpError: If a model, data set or site does not exist.
        """
        data = self.texts.drawn()
        progress(f"loading {self.model}")
        model = load(self.model)
        if model.tokenizer is None:
            raise ArgumentError(f"model {self.model!r} ({model.family})", "a model with a tokenizer")
        model.resolve(list(self.sites))
        return functools.partial(_compute, self, model, data)


def _compute(spec: ProbeSweepSpec, model: Model, data: LabelledTexts, run: Run, step: Progress) -> None:
    """Write ``sweep``, ``best``, ``curve`` and their figures; activations and finished probes are kept as they come."""
    run.record_model("model", model)
    step(f"activations of {len(data)} texts")
    store = ActivationStore.build(
        model, data.texts, list(spec.sites), run.path / "cells" / "store", pools=spec.pools, labels=data.labels,
        groups=data.groups, untrained=spec.untrained,
    )  # fmt: skip
    probes = {name: _PROBES[name]() for name in spec.probes}
    step(f"{', '.join(probes)} at {len(store.sites)} sites")
    found: ProbeSweep = run.once("sweep", lambda: sweep(
        store, None, probes, pools=spec.pools, folds=spec.folds, seeds=spec.seeds, path=run.path / "cells" / "probes",
    ))  # fmt: skip
    best = found.best()
    run.once("best", lambda: Table([{k: _plain(v) for k, v in best.items()}], "chosen inside the training parts"))
    if spec.curve:
        step("learning curve")
        features, first = store.pooled(best["site"], best["pool"]).numpy(), next(iter(probes.values()))
        run.once("curve", lambda: learning_curve(
            first, features, store.labels, groups=store.groups, folds=spec.folds, seeds=spec.seeds
        ))  # fmt: skip
    save_drawn(run, "probes", "found", lambda: _drawn(found, best), f"{data.name}: {spec.model}")


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else str(value)


def _drawn(found: ProbeSweep, best: dict[str, Any]) -> list[Drawn]:
    return [Drawn(
        chart(found), "Probes by site, with their controls",
        f"Chosen inside the training parts: {found.metric.replace('_', ' ')} {best['value']:.3f} on data that the "
        f"choice did not see; majority {found.majority:.3f}.",
        "Whether the model uses what a probe reads; and the highest point of a curve was looked for.", wide=True,
    )]  # fmt: skip
