"""Sweeps: probes at sites, by nested cross-validation, with controls in every row; resumable."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows, Table
from interp.probes.controls import control_labels
from interp.probes.estimator import is_regressor
from interp.probes.fingerprints import content_hash, hash_of
from interp.probes.fitting import as_numbers, check_finite, count, fit, probabilities, take
from interp.probes.scores import balanced_accuracy, log_losses, score_table
from interp.probes.splits import Split, duplicate_groups, outer_folds
from interp.probes.tokens import TokenSets
from interp.runs.kept import Kept
from interp.store.store import ActivationStore

METRICS = ("accuracy", "balanced_accuracy", "roc_auc", "average_precision", "log_loss", "brier", "ece")
INNER = 3
Key = tuple[str, str, str]
Source = ActivationStore | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ProbeSweep(Rows):
    """Scores of probes at sites, fold by fold.

    Attributes:
        rows: One for each site, pooling, probe, seed and fold: ``value`` on the test part, ``control`` with control
            labels on the same split, ``untrained`` on an untrained copy of the model (if there is one), ``inner``
            (held-out score inside the training part: minus the log-loss, by which a site is chosen), ``n``,
            ``fit_seconds``, ``converged``.
        metric: What ``value`` and ``control`` are.
        majority: Share of the most frequent class.
        control: Which control it was.
        duplicates: Texts that repeat an earlier one, which were kept in one group; None where that is not known.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    metric: str
    majority: float
    control: str
    duplicates: int | None = None

    def to_records(self) -> list[dict[str, Any]]:
        """The rows."""
        return [dict(row) for row in self.rows]

    def table(self) -> Table:
        """The rows as a table."""
        return Table(self.to_records(), f"{self.metric} by fold; majority rate {self.majority:.3f}")

    def curve(self) -> Table:
        """Means over folds and seeds at each site. Exploratory: its maximum is too good, for it was looked for."""
        found = []
        for (site, pool, probe), rows in self._by_key().items():
            values, controls = (np.array([r[name] for r in rows], dtype=float) for name in ("value", "control"))
            found.append({
                "site": site, "pool": pool, "probe": probe, self.metric: float(values.mean()),
                "spread": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
                "control": float(controls.mean()), "selectivity": float((values - controls).mean()),
                **_untrained_mean(rows),
                "inner": float(np.mean([r["inner"] for r in rows])),
                "converged": float(np.mean([r["converged"] for r in rows])),
                "fit_seconds": float(np.sum([r["fit_seconds"] for r in rows])),
            })  # fmt: skip
        title = f"Exploratory: {self.metric} at each site, control: {self.control}, majority {self.majority:.3f}"
        return Table(found, title + (f", {self.duplicates} repeated texts kept together" if self.duplicates else ""))

    def best(self, probe: str | None = None) -> dict[str, Any]:
        """The site (pooling, probe) that inner scores choose, and what the choice is worth on data it did not see.

        In every fold the choice is made inside the training part; ``value`` is the mean over folds of what the chosen
        one reaches on the test part: the score to report. ``chosen`` says how often each was chosen.

        Args:
            probe: Choose among this probe's sites alone.

        Raises:
            ArgumentError: If there is no such probe.
        """
        rows = [r for r in self.rows if probe is None or r["probe"] == probe]
        if not rows:
            raise ArgumentError(f"probe={probe!r}", f"one of {sorted({r['probe'] for r in self.rows})}")
        folds: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in rows:
            folds.setdefault((row["seed"], row["fold"]), []).append(row)
        picked = [max(members, key=lambda r: r["inner"]) for members in folds.values()]
        names = [_key(r) for r in picked]
        chosen = {name: names.count(name) for name in sorted(set(names), key=lambda n: (-names.count(n), n))}
        values = np.array([r["value"] for r in picked])
        site, pool, kind = next(iter(chosen))
        return {
            "site": site, "pool": pool, "probe": kind, "metric": self.metric, "value": float(values.mean()),
            "spread": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
            "control": float(np.mean([r["control"] for r in picked])), **_untrained_mean(picked),
            "chosen": {" ".join(name): times for name, times in chosen.items()},
        }  # fmt: skip

    def _by_key(self) -> dict[Key, list[dict[str, Any]]]:
        found: dict[Key, list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault(_key(row), []).append(row)
        return found

    def __str__(self) -> str:
        best = self.best()
        other = f", untrained copy {best['untrained']:.3f}" if "untrained" in best else ""
        line = f"nested: {best['metric']} {best['value']:.3f} ± {best['spread']:.3f} "
        line += f"(control {best['control']:.3f}{other}), "
        return f"{self.curve()}\n{line}mostly at {best['site']} by {best['probe']}; decodable, use not tested"


def _untrained_mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {"untrained": float(np.mean([r["untrained"] for r in rows]))} if "untrained" in rows[0] else {}


def _key(row: Mapping[str, Any]) -> Key:
    return row["site"], row["pool"], row["probe"]


@dataclass(frozen=True, eq=False)
class _Job:
    """One probe at one site with one seed."""

    site: str
    pool: str
    name: str
    probe: Any
    seed: int


@dataclass(frozen=True, eq=False)
class _Task:
    """What all jobs share."""

    y: np.ndarray
    groups: Any
    types: Any
    folds: Any
    metric: str
    control: bool
    untrained: Any


def sweep(
    data: Source, y: Any, probes: Mapping[str, Any] | Sequence[Any], *, sites: Sequence[str] | None = None,
    pools: Sequence[str] = ("mean",), groups: Any = None, texts: Sequence[str] | None = None, types: Any = None,
    folds: Any = 5, seeds: Sequence[int] = (0,), metric: str = "balanced_accuracy", control: bool = True,
    untrained: Source | None = None, path: str | Path | None = None, jobs: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> ProbeSweep:  # fmt: skip
    """Fit probes at sites by nested cross-validation.

    Every probe of a seed sees the same outer folds. Inside each training part it gets an inner score, by which `best`
    chooses; the test part is for the reported score alone. On control labels it is fitted once more for each fold.

    Args:
        data: An `ActivationStore`, or a mapping from site to features of the same examples.
        y: Labels; None for those of the store.
        probes: Classifiers by name; or a list, named by their classes.
        sites: Which; by default all that have the pooling.
        pools: Of a store: ``mean``, ``last``, ... or ``tokens`` for token sets. Of a mapping it only names a column.
        groups: What must not be on both sides of a split; by default the store's groups, if it has some.
        texts: Equal texts are kept in one group; by default those of a store whose token ids are equal.
        types: Word types for a control task; without, control labels are shuffled ones.
        folds: Number of folds, or a splitter.
        seeds: Of splits, probes and controls.
        metric: One of the scores of `score_table`.
        control: Whether to fit control labels too (doubles the work).
        untrained: The same sites of an untrained copy of the model (`interp.causal.untrained`), on which every probe is
            fitted too; by default the copy's store that `ActivationStore.build(..., untrained=seed)` kept.
        path: A folder; finished parts are kept there and not computed again, and can be read while it runs. One
            process at a time writes there.
        jobs: Processes.
        progress: Called with a line after each probe at a site, with the time that is left.

    Raises:
        ArgumentError: If something is no classifier, lengths differ, or a site or score is not known.
        RunError: If another process works in the folder.

    Example:
        >>> from interp.probes import MassMeanProbe
        >>> made = np.random.default_rng(0); y = np.arange(60) % 2
        >>> data = {"early": made.normal(size=(60, 4)), "late": made.normal(size=(60, 4)) + 2 * y[:, None]}
        >>> sweep(data, y, [MassMeanProbe()]).best()["site"]
        'late'
    """
    named = _named(probes)
    if metric not in METRICS or jobs < 1 or not len(seeds):
        raise ArgumentError(f"metric={metric!r}, jobs={jobs}, seeds={list(seeds)}", f"one of {', '.join(METRICS)}, "
                            "at least one process and one seed")  # fmt: skip
    chosen = _sites(data, sites, pools)
    first = _features(data, *chosen[0])
    if isinstance(data, ActivationStore):
        y, groups = data.labels if y is None else y, data.groups if groups is None else groups
    if y is None:
        raise ArgumentError("no labels", "y=, or a store that was built with labels=")
    numbers, _ = as_numbers(y, first)
    joined, duplicates = _joined(data, texts, groups)
    if untrained is None and isinstance(data, ActivationStore):
        untrained = data.untrained
    if untrained is not None:
        _features(untrained, *chosen[0])  # refused before any work
    task = _Task(numbers, joined, types, folds, metric, control, untrained)
    outer_folds(numbers, joined, folds, seeds[0])  # refused before any work
    todo = [_Job(s, p, name, probe, seed) for s, p in chosen for name, probe in named.items() for seed in seeds]
    rows = [row for done in _run(data, todo, task, path, jobs, progress) for row in done]
    kind = "none" if not control else "shuffled labels" if types is None else "control task"
    kind += ", untrained copy" if untrained is not None else ""
    return ProbeSweep(rows, metric, float(np.bincount(numbers).max() / len(numbers)), kind, duplicates)


def _joined(data: Source, texts: Sequence[str] | None, groups: Any) -> tuple[Any, int | None]:
    """Groups that hold equal texts together, and how many repeat an earlier one."""
    ids = data.token_ids if isinstance(data, ActivationStore) and texts is None else None
    if ids is not None:
        texts = [" ".join(map(str, row.tolist())) for row in ids]
    if texts is None:
        return groups, None
    found = duplicate_groups(texts, groups)
    return (groups if not found.duplicates else found.groups), found.duplicates


def _named(probes: Any) -> dict[str, Any]:
    if isinstance(probes, Mapping):
        named = {str(name): probe for name, probe in probes.items()}
    else:
        named = {type(p).__name__: p for p in probes}
        if len(named) != len(probes):
            raise ArgumentError("two probes of one class", "a mapping from names to probes")
    needed = ("fit", "predict", "get_params")
    unfit = lambda p: isinstance(p, type) or not all(hasattr(p, name) for name in needed) or is_regressor(p)
    wrong = [n for n, p in named.items() if unfit(p)]
    if wrong or not named:
        raise ArgumentError(
            f"{', '.join(wrong) or 'no probes'}", "classifiers with fit, predict and get_params",
            "evaluate() takes regressors, site by site; an adapter changes the model, and says nothing about its "
            "frozen activations",
        )  # fmt: skip
    return named


def _sites(data: Source, sites: Sequence[str] | None, pools: Sequence[str]) -> list[tuple[str, str]]:
    if not isinstance(data, ActivationStore):
        known = [(str(site), pools[0]) for site in data]
    else:
        known = [(s, p) for p in pools for s in (data.token_sites if p == "tokens" else data.sites)]
    found = [(s, p) for s, p in known if sites is None or s in set(map(str, sites))]
    missing = set(map(str, sites or ())) - {s for s, _ in found}
    if missing or not found:
        raise ArgumentError(
            f"sites {sorted(missing)[:5]} by {list(pools)}", f"some of {[s for s, _ in known][:5]}, ..."
        )
    return found


def _features(data: Source, site: str, pool: str) -> Any:
    if not isinstance(data, ActivationStore):
        named = {str(key): value for key, value in data.items()}
        if site not in named:
            raise ArgumentError(f"no {site} in the mapping", f"features of every site; there are {list(named)[:5]}")
        return named[site]
    return TokenSets(*data.tokens(site)) if pool == "tokens" else data.pooled(site, pool).numpy()


def _run(data, todo: list[_Job], task: _Task, path, jobs: int, progress) -> Iterator[list[dict[str, Any]]]:
    began, keys = (
        time.perf_counter(),
        {id(job): _fingerprint(data, job, task) if path is not None else "" for job in todo},
    )
    with Kept(path, "sweep.jsonl") as kept:
        found = {id(job): kept.rows[keys[id(job)]] for job in todo if keys[id(job)] in kept.rows}
        open_jobs = [job for job in todo if id(job) not in found]
        for made, (job, rows) in enumerate(_computed(data, open_jobs, task, jobs), 1):
            found[id(job)] = rows
            if path is not None:
                kept.add({keys[id(job)]: rows})
            left = (time.perf_counter() - began) / made * (len(open_jobs) - made)
            progress(f"{made} of {len(open_jobs)}: {job.name} at {job.site}; {left:.0f} s left")
    yield from (found[id(job)] for job in todo)


def _computed(data, todo: list[_Job], task: _Task, jobs: int) -> Iterator[tuple[_Job, list[dict[str, Any]]]]:
    if jobs == 1:
        held: tuple[Any, tuple[Any, Any]] = (None, (None, None))
        for job in todo:
            if held[0] != (job.site, job.pool):
                held = ((job.site, job.pool), _pair(data, job, task))
            yield job, _job_rows(*held[1], job, task)
        return
    from joblib import Parallel, delayed

    run = Parallel(n_jobs=jobs, return_as="generator")
    results = run(delayed(_job_rows)(*_pair(data, job, task), job, task) for job in todo)
    yield from zip(todo, results, strict=True)  # type: ignore[arg-type]


def _pair(data: Source, job: _Job, task: _Task) -> tuple[Any, Any]:
    """Features of the model, and of its untrained copy if there is one."""
    own = _features(data, job.site, job.pool)
    check_finite(own, job.site)
    return own, None if task.untrained is None else _features(task.untrained, job.site, job.pool)


def _job_rows(X: Any, untrained: Any, job: _Job, task: _Task) -> list[dict[str, Any]]:
    for features in (X,) if untrained is None else (X, untrained):
        if count(features) != len(task.y):
            raise ArgumentError(f"{count(features)} examples at {job.site}", f"{len(task.y)}, one for each label")
    split = outer_folds(task.y, task.groups, task.folds, job.seed)
    labels = control_labels(task.y, task.types, task.groups, split, job.seed + 1)
    rows = [_fold_row(X, job, task, labels, number, part) for number, part in enumerate(split)]
    return rows if untrained is None else [
        {**row, "untrained": _untrained(untrained, job, task, part)} for row, part in zip(rows, split, strict=True)
    ]  # fmt: skip


def _untrained(X: Any, job: _Job, task: _Task, part: Split) -> float:
    """What the same probe reaches on the untrained copy, by the same labels and parts."""
    train, test = part
    groups = None if task.groups is None else np.asarray(task.groups)[train]
    made = fit(job.probe, take(X, train), task.y[train], groups, job.seed)
    return _score(made, take(X, test), task.y[test], int(task.y.max()) + 1, task.metric)


def _fold_row(X: Any, job: _Job, task: _Task, labels: np.ndarray, number: int, part: Split) -> dict[str, Any]:
    train, test = part
    inside, groups = take(X, train), None if task.groups is None else np.asarray(task.groups)[train]
    began = time.perf_counter()
    made = fit(job.probe, inside, task.y[train], groups, job.seed)
    seconds = time.perf_counter() - began
    control = float("nan")
    if task.control and len(np.unique(labels[train])) > 1:
        other = fit(job.probe, inside, labels[train], groups, job.seed)
        control = _score(other, take(X, test), labels[test], int(task.y.max()) + 1, task.metric)
    return {
        "site": job.site, "pool": job.pool, "probe": job.name, "seed": job.seed, "fold": number,
        "metric": task.metric, "value": _score(made, take(X, test), task.y[test], int(task.y.max()) + 1, task.metric),
        "control": control, "inner": _inner(job, made, inside, task.y[train], groups), "n": len(test),
        "fit_seconds": seconds, "converged": bool(made.converged_),
    }  # fmt: skip


def _score(probe: Any, X: Any, y: np.ndarray, classes: int, metric: str) -> float:
    p = probabilities(probe, X, classes)
    return balanced_accuracy(y, p.argmax(1)) if metric == "balanced_accuracy" else score_table(y, p)[metric]


def _inner(job: _Job, made: Any, X: Any, y: np.ndarray, groups: Any) -> float:
    """Minus the log-loss on held-out parts of the training part: the probe's own, where it chose C by it."""
    own = getattr(made, "inner_loss_", None)
    if own is not None:
        return -float(np.mean(own, axis=0).min())
    losses = []
    for train, test in outer_folds(y, groups, INNER, job.seed):
        other = fit(job.probe, take(X, train), y[train], None if groups is None else groups[train], job.seed)
        losses.append(log_losses(y[test], probabilities(other, take(X, test), int(y.max()) + 1)).mean())
    return -float(np.mean(losses))


def _fingerprint(data: Source, job: _Job, task: _Task) -> str:
    """Hash of all that a job's result depends on."""
    sources = [None if d is None else _identity(d, job) for d in (data, task.untrained)]
    params = json.dumps(job.probe.get_params(), default=repr, sort_keys=True)
    labels = [None if v is None else np.asarray(v).tolist() for v in (task.y, task.groups, task.types)]
    return hash_of([sources, job.site, job.pool, job.name, type(job.probe).__name__, params, job.seed, labels,
                    repr(task.folds), task.metric, task.control])  # fmt: skip


def _identity(data: Source, job: _Job) -> str:
    return data.sha256 if isinstance(data, ActivationStore) else content_hash(_features(data, job.site, job.pool))
