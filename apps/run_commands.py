"""Commands on runs: compute, go on, show, compute again, compare."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.apps.terminal import print_table, quieten, spinner
from interp.hooks.errors import InterpError, RunError

_RUN = typer.Argument(help="A run's folder, or its name in ./runs.")
REPORT = typer.Option("--report/--no-report", help="Write report.html into the run.")
QUIET = typer.Option("--quiet", "-q", help="No progress.")
_OVERRIDES = typer.Argument(
    help="Fields to replace, as key=value: inputs.0.text='The cat', svd.k=4.", show_default=False
)


def run(
    spec: Annotated[Path, typer.Argument(help="A YAML or TOML file: its kind, and that kind's fields.")],
    overrides: Annotated[list[str] | None, _OVERRIDES] = None,
    out: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    report: Annotated[bool, REPORT] = True,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Compute what a specification says, into a new run with its results, figures and report."""
    from interp.runs.specs import kind_of, read_spec

    wanted = read_spec(spec, overrides or [])
    from interp.runs.run import Run

    quieten()
    with spinner(quiet) as step:
        work = wanted.prepare(step)
        made = Run.create(out, kind_of(wanted), wanted.model_dump(mode="json"))
        with _reported_if_it_fails(made, report, step), made.working(step) as working:
            work(made, working)
        said = _ended(made, report, step)
    _say(made, said)


def resume(
    run: Annotated[Path, _RUN],
    report: Annotated[bool, REPORT] = True,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Go on with a run that failed or was interrupted: what is finished is not computed again."""
    from interp.runs.again import resume as go_on
    from interp.runs.run import Run

    found = Run.open(run_folder(run))
    if found.state == "finished" and not found.missing:
        typer.echo(f"{found.path} is finished: nothing to do")
        return
    quieten()
    with spinner(quiet) as step:
        with _reported_if_it_fails(found, report, step):
            go_on(found, step)
        said = _ended(found, report, step)
    _say(found, said)


def verify(
    run: Annotated[Path, _RUN],
    out: Annotated[Path | None, typer.Option(help="Keep the second run in this folder of runs.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative deviation; by default that of the model's dtype.")
    ] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Compute a run again, elsewhere, and show how far each result deviates; 1 if one is beyond the tolerance."""
    from interp.runs.again import verify as compute_again
    from interp.runs.run import Run

    found = Run.open(run_folder(run))
    quieten()
    with tempfile.TemporaryDirectory(prefix="interp-verify-") as elsewhere, spinner(quiet) as step:
        done = compute_again(found, elsewhere if out is None else out, tolerance=tolerance, progress=step)
    print_table(done.table())
    typer.echo(f"\nlargest relative deviation: {done.deviation:.2g}, tolerance {done.tolerance:.2g}")
    if out is not None:
        typer.echo(f"second run: {out / done.comparison.second}")
    if not done.holds:
        typer.secho("not the same results", err=True, fg="red", bold=True)
        raise typer.Exit(1)


def diff(
    first: Annotated[Path, _RUN],
    second: Annotated[Path, typer.Argument(help="The other one.")],
) -> None:
    """Compare two runs: what was asked, where it was computed, and how far each result deviates."""
    from interp.hooks.table import Table
    from interp.runs.comparison import compare_runs
    from interp.runs.run import Run

    found = compare_runs(*(Run.open(run_folder(path)) for path in (first, second)))
    if found.fields:
        print_table(Table(found.fields, "what differs in specification and provenance"))
        typer.echo()
    else:
        typer.echo("specification and provenance are the same\n")
    print_table(found.table())
    typer.echo(f"\nlargest relative deviation: {found.deviation:.2g}")


def show(run: Annotated[Path, _RUN]) -> None:
    """Show a run: what was asked, its state, where it was computed, its results and their checks."""
    from interp.runs.run import Run

    found = Run.open(run_folder(run))
    failure = "".join(f"\n  {key}: {value}" for key, value in found.failure.items())
    typer.echo(f"{found.path.name}: {found.state}{failure}\n\nspecification:")
    typer.echo(json.dumps(found.spec, indent=2, ensure_ascii=False))
    _show_provenance(found.provenance)
    typer.echo("\nresults:")
    broken = [f for f in (_show_result(found, name) for name in (*found.names, *found.missing)) if f is not None]
    for name in found.figures:
        typer.echo(f"  figure {name}: {found.path / 'figures' / name}.png")
    report = found.path / "report.html"
    if report.is_file():
        typer.echo(f"\nreport: {report}")
    if found.state in ("failed", "interrupted"):
        typer.echo(f"\nto go on: interp resume {found.path}")
    if broken:
        raise broken[0]
    if "completeness" in found.names:
        typer.echo()
        print_table(found.load("completeness"))


def _show_provenance(given: dict[str, Any]) -> None:
    typer.echo("\nmodels:")
    for role, model in given.get("models", {}).items():
        name, digest = model.get("name") or model.get("path"), model.get("sha256", "")
        typer.echo(f"  {role}: {name} (licence {model.get('licence') or 'not recorded'}) {digest[:12]}")
    typer.echo("\nprovenance:")
    rows = {"command": " ".join(given.get("command", []))}
    rows |= {what: ", ".join(f"{k} {v}" for k, v in given.get(what, {}).items()) for what in _WHERE}
    rows["resumed"] = ", ".join(one["time"] for one in given.get("resumed", []))
    for what, text in rows.items():
        if text:
            typer.echo(f"  {what}: {text}")


_WHERE = ("times", "versions", "machine", "git")


def _show_result(found: Any, name: str) -> RunError | None:
    """Print a line on a result; give back why it cannot be read."""
    try:
        typer.echo(f"  {name}: {_summary(found.load(name))}")
    except RunError as error:
        typer.echo(f"  {name}: {error.given}")
        return error
    return None


@contextmanager
def _reported_if_it_fails(made: Any, report: bool, step: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except Exception:
        if report:  # Of what was finished; that it cannot be written must not hide why the run failed.
            with suppress(InterpError):
                typer.echo(f"report: {written_report(made, step)}", err=True)
        raise


def _ended(made: Any, report: bool, step: Callable[[str], None]) -> str:
    return f"report: {written_report(made, step)}" if report else f"run: {made.path}"


def _say(made: Any, said: str) -> None:
    if "completeness" in made.names:
        print_table(made.load("completeness"))
    typer.echo(f"\n{said}")


def written_report(made: Any, step: Callable[[str], None]) -> Path:
    """Write a run's report and return its path."""
    from interp.apps.report import write_report

    step("writing the report")
    return write_report(made)


def run_folder(run: Path) -> Path:
    """The folder of a run that is given as such, or by its name in ./runs."""
    return run if run.exists() or not (Path("runs") / run).exists() else Path("runs") / run


def _summary(result: Any) -> str:
    """One line on a result."""
    kind = type(result).__name__
    if kind == "Table":
        return f"table of {len(result)} rows: {', '.join(result.columns)}"
    if kind == "LogitLens":
        return f"logit lens, {len(result.layers)} layers, {len(result.tokens)} positions"
    if kind == "Attribution":
        return f"attribution of {result.observable} = {result.measurement:.4f}"
    if kind == "Votes":
        return f"votes for {result.target} = {result.value:.4f}, of which r {result.residual:.4f}"
    return kind
