"""Figures of runs, each with its words: what is drawn, what one sees, what it does not show."""

from collections.abc import Sequence
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


def save_drawn(run: Run, section: str, stem: str, drawn: Sequence[Drawn], heading: str = "") -> None:
    """Write figures as SECTION-STEM, or with numbers where there are several.

    Args:
        run: The run.
        section: What they are about; a report groups by it.
        stem: Of the files' names.
        drawn: The figures.
        heading: Text of the section in a report; by default it is looked up among the specification's inputs.
    """
    for n, one in enumerate(drawn, start=1):
        name = f"{section}-{stem}" + (f"-{n}" if len(drawn) > 1 else "")
        words = {"title": one.title, "sees": one.sees, "silent": one.silent, "wide": one.wide, "heading": heading}
        run.save_figure(name, one.chart, section=section, **words)
