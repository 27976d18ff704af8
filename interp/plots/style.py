"""What the figures share: legible tokens, colours, type sizes, rows of plain data."""

import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from interp.hooks.notebook import visible as visible

FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Noto Sans', sans-serif"
INK, MUTED, LINE = "#1d2530", "#667180", "#dfe3e8"
POSITIVE, NEGATIVE, NEUTRAL = "#2f78b3", "#c5690d", "#8a94a1"
# Blue for, orange against: told apart with every common form of colour blindness.
DIVERGING: dict[str, Any] = {"scheme": "blueorange", "reverse": True, "clamp": True}
HINT = "click to mark, shift-click to add, click beside to clear"
# Axes show what stands behind the number by which their entries are ordered: see `ordered`.
LABEL = "slice(datum.label, 5)"
_NOTE_WIDTH = 72


def ordered(index: int, name: str) -> str:
    """A key of an axis: unique where names repeat, in order when sorted as text, shown without its number."""
    return f"{index:04d} {name}"


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, as the figures write it.

    Example:
        >>> signed(-1.5, 2)
        '−1.50'
    """
    return f"{value:+.{digits}f}".replace("-", "−")


def legible(name: str) -> str:
    """An observable's or target's name as figures show it: tokens visible, classes by their first name.

    Example:
        >>> legible("' Mary' - ' John'"), legible("palace - castle, fortress")
        ('␣Mary − ␣John', 'palace − castle')
    """
    return " − ".join(_unquoted(part) for part in name.split(" - "))


def _unquoted(part: str) -> str:
    quoted = len(part) > 2 and part[0] == part[-1] and part[0] in "'\""
    return visible(part[1:-1]).replace("\\\\", "\\") if quoted else visible(part.split(", ")[0])


class Sets(dict[str, list[dict[str, Any]]]):
    """The data sets of one figure by name: each is written into the figure once, however many layers draw it."""

    def add(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Any:
        """Add rows and return the reference by which a layer names them.

        NaN and infinity, which JSON lacks, become null.
        """
        import altair as alt

        clean = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
        self[name] = [{key: clean(value) for key, value in row.items()} for row in rows]
        return alt.NamedData(name)


def finish(chart: Any, sets: Sets, clicks: "Clicks | None" = None, title: str = "", note: str = "") -> Any:
    """A chart with its data, what clicks select in it, its title, a note under it and the common style."""
    import altair as alt

    lines = [*textwrap.wrap(note, _NOTE_WIDTH), *([HINT] if title and clicks is not None else [])]
    if title:
        chart = chart.properties(title=alt.TitleParams(title, subtitle=lines or alt.Undefined))
    elif lines:  # Vega leaves out a subtitle that stands under no title.
        chart = chart.properties(title=alt.TitleParams(lines, fontSize=12, fontWeight="normal", color=MUTED))
    chart = (
        chart.configure(font=FONT, background="white", padding=6)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=INK, titleColor=MUTED, labelFontSize=12, titleFontSize=12, titleFontWeight="normal",
            domain=False, tickColor=LINE, gridColor="#eef0f3", labelLimit=220, titlePadding=8,
        )
        .configure_title(
            anchor="start", color=INK, fontSize=14, fontWeight=600, subtitleColor=MUTED, subtitleFontSize=12, offset=10,
        )
        .configure_legend(
            labelColor=INK, titleColor=MUTED, labelFontSize=12, titleFontSize=12, titleFontWeight="normal",
        )
        .configure_concat(spacing=18)
    )  # fmt: skip
    if clicks is not None:
        chart["params"] = [clicks.on(chart)]
    # Last, and past altair's copying and checking of every row.
    chart["datasets"] = dict(sets)
    return chart


@dataclass(frozen=True)
class Clicks:
    """A selection by clicks on the marks of named views: all rows that share the clicked row's ``field``.

    Attributes:
        field: The column.
        views: Names of the views that listen.
        name: What conditions and filters call the selection.
        start: The field's value that is selected at first, if any.
    """

    field: str
    views: tuple[str, ...]
    name: str = "pick"
    start: Any = None

    def on(self, chart: Any) -> Any:
        """The selection as a parameter of a whole figure; Altair numbers the names of views that it concatenates."""
        import altair as alt

        found = [n for n in _view_names(chart) if n in self.views or n.rpartition("_")[0] in self.views]
        value = alt.Undefined if self.start is None else [{self.field: self.start}]
        select = alt.PointSelectionConfig(type="point", fields=[self.field])
        return alt.TopLevelSelectionParameter(name=self.name, select=select, views=found, value=value)


def _view_names(chart: Any) -> list[str]:
    parts = [p for kind in ("hconcat", "vconcat", "layer") for p in getattr(chart, kind, None) or []]
    if not parts:
        return [chart.name] if isinstance(chart.name, str) else []
    return [name for part in parts for name in _view_names(part)]


def padded(values: Iterable[float], share: float = 0.06) -> list[float]:
    """An axis that holds zero and all values, with some air."""
    found = [0.0, *values]
    low, high = min(found), max(found)
    air = share * (high - low or 1.0)
    return [low - air if low < 0 else 0.0, high + air if high > 0 else 0.0] if low != high else [-1.0, 1.0]


def sign_colour(field: str = "value"):
    """Blue for what counts for, orange for what counts against."""
    import altair as alt

    return alt.condition(alt.datum[field] < 0, alt.value(NEGATIVE), alt.value(POSITIVE))
