"""Runs again: one that was interrupted goes on, one that is finished is computed a second time and compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.hooks.errors import ArgumentError, RunError
from interp.hooks.table import Rows, Table
from interp.runs.comparison import RunComparison, compare_runs
from interp.runs.run import Progress, Run
from interp.runs.specs import execute, spec_of

# How far results of the same calculation may be apart on another machine, relative to their largest number.
TOLERANCES: Mapping[str, float] = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Verification(Rows):
    """A run against the same specification computed again.

    Attributes:
        comparison: Of the two runs.
        tolerance: The largest relative deviation that is allowed.
    """

    comparison: RunComparison = field(repr=False)
    tolerance: float

    @property
    def deviation(self) -> float:
        """The largest relative deviation of any result."""
        return self.comparison.deviation

    @property
    def holds(self) -> bool:
        """Whether every result is there again, within the tolerance and with the same words."""
        return all(row["holds"] for row in self.to_records())

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each result: deviation, relative deviation, note, and whether it holds."""
        return [row | {"holds": self._holds(row)} for row in self.comparison.to_records()]

    def _holds(self, row: dict[str, Any]) -> bool:
        return not row["note"] and row["relative"] is not None and row["relative"] <= self.tolerance

    def table(self) -> Table:
        """The results as a table."""
        return Table(self.to_records(), f"{self.comparison.first}, computed again")


def resume(run: Run, progress: Progress = lambda _: None) -> Run:
    """Go on with a run that failed or was interrupted: what is finished stays, what is missing is computed.

    Args:
        run: The run. One that is finished, with all of its results, stays as it is.
        progress: Told each step.

    Raises:
        RunError: If another process works on it, its specification was changed, or its model is another one now.
        InterpError: If a step fails; what was finished is kept.
    """
    spec = spec_of(run)
    if run.state == "finished" and not run.missing:
        return run
    if run.state == "running":
        do = f"wait until it ends; `interp show {run.path}` says how far it is"
        raise RunError(f"{run.path} is running", "a run that failed or was interrupted", do)
    work = spec.prepare(progress)
    with run.working(progress) as step:
        work(run, step)
    return run


def verify(
    run: Run, root: str | Path, *, tolerance: float | None = None, progress: Progress = lambda _: None
) -> Verification:
    """Compute a finished run again, into another folder, and compare all results.

    Args:
        run: A finished run.
        root: Folder of runs in which the second one is made.
        tolerance: Largest deviation relative to a result's largest number; by default that of the coarsest dtype of
            the run's models in `TOLERANCES`.
        progress: Told each step.

    Raises:
        ArgumentError: If the tolerance is negative.
        RunError: If the run is not finished, its specification was changed, or a result cannot be read.
        InterpError: If it cannot be computed again.
    """
    if tolerance is not None and not tolerance >= 0:
        raise ArgumentError(f"tolerance={tolerance}", "0 or more")
    spec = spec_of(run)
    if run.state != "finished":
        raise RunError(f"{run.path} is {run.state}", "a finished run", f"finish it: interp resume {run.path}")
    for name in (*run.missing, *run.names):
        run.load(name)
    allowed = default_tolerance(run) if tolerance is None else tolerance
    return Verification(compare_runs(run, execute(spec, root, progress)), allowed)


def default_tolerance(run: Run) -> float:
    """Return the tolerance of the coarsest dtype among a run's models; float32's where it has none."""
    dtypes = [model.get("dtype", "float32") for model in run.provenance.get("models", {}).values()]
    return max((TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes), default=TOLERANCES["float32"])
