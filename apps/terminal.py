"""What the command line says: errors, notes, progress, tables."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


def complain(given: str, needed: str = "", do: str = "", *notes: str) -> None:
    """An error in red, what was needed and what to do, on the error stream."""
    typer.secho(f"error: {given}", err=True, fg="red", bold=True)
    for label, text in (("needed", needed), ("to do", do)):
        if text:
            typer.echo(f"  {label + ':':8}{text}", err=True)
    for note in notes:
        typer.echo(f"  {note}", err=True)


@contextmanager
def short_warnings() -> Iterator[None]:
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


def quieten() -> None:
    """No log lines and progress bars of transformers: the command line has its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def spinner(quiet: bool) -> Iterator[Callable[[str], None]]:
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


def print_table(table: Any, markdown: bool = False) -> None:
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
