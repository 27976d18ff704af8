"""Figures of runs, each with its words: what is drawn, what one sees, what it does not show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from interp.runs.run import Run


@dataclass(frozen=True)
class Drawn:
    """A figure and its words."""

    chart: Any
    title: str
    sees: str
    silent: str
    wide: bool = False


def save_drawn(
    run: Run, section: str, stem: str, drawn: Sequence[Drawn] | Callable[[], Sequence[Drawn]], heading: str = ""
) -> None:
    """Write figures as SECTION-STEM, or with numbers where there are several; those that are there already stay.

    Args:
        run: The run.
        section: What they are about; a report groups by it.
        stem: Of the files' names.
        drawn: The figures, or what draws them: it is not called where all are there.
        heading: Text of the section in a report; by default it is looked up among the specification's inputs.
    """
    name = f"{section}-{stem}"
    if _all_there(run, name):
        return
    found = drawn() if callable(drawn) else drawn
    for n, one in enumerate(found, start=1):
        words = {"title": one.title, "sees": one.sees, "silent": one.silent, "wide": one.wide, "heading": heading}
        numbered = f"{name}-{n}" if len(found) > 1 else name
        run.save_figure(numbered, one.chart, section=section, count=len(found), **words)


def _all_there(run: Run, name: str) -> bool:
    there = run.figures
    first = f"{name}-1"
    if first not in there:
        return name in there
    return all(f"{name}-{n}" in there for n in range(1, run.figure(first)["count"] + 1))
