"""Bars of a table: next tokens, classes."""

from typing import Any

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Table
from interp.plots.parts import parts_chart
from interp.plots.style import INK, LABEL, POSITIVE, Sets, finish, ordered, visible

_NAMES = ("token", "class")


def table_chart(table: Table, *, top: int = 10, title: str = "", width: int = 280) -> Any:
    """Horizontal bars of probabilities, most likely first; of F x, r and their sum where the table holds these.

    Raises:
        ArgumentError: If the table has no token or class column, or no probabilities.
    """
    import altair as alt

    if {"F x", "r", "sum"} <= set(table.columns):
        return parts_chart(table, top=max(top, 12), title=title)
    name = next((n for n in _NAMES if n in table.columns), None)
    if name is None or "probability" not in table.columns or not len(table):
        raise ArgumentError(
            f"a figure of a table with columns {', '.join(table.columns)}", "columns token or class, and probability"
        )
    rows = [
        {"key": ordered(i, _short(str(r[name]), name)), "name": visible(str(r[name])), **_numbers(r)}
        for i, r in enumerate(table.to_records()[:top])
    ]
    sets = Sets()
    base = alt.Chart(sets.add("rows", rows)).encode(
        y=alt.Y("key:N", title=None, axis=alt.Axis(labelExpr=LABEL, ticks=False)),
        tooltip=[
            alt.Tooltip("name:N", title=name),
            alt.Tooltip("probability:Q", format=".4g"),
            *([alt.Tooltip("logit:Q", format=".4f")] if "logit" in table.columns else []),
        ],
    )
    bars = base.mark_bar(color=POSITIVE, cornerRadiusEnd=2, height={"band": 0.72}).encode(
        x=alt.X("probability:Q", title="probability", axis=alt.Axis(format="%", tickCount=4))
    )
    labels = base.mark_text(align="left", color=INK, dx=5).encode(
        x="probability:Q", text=alt.Text("probability:Q", format=".1%")
    )
    return finish((bars + labels).properties(width=width, height=22 * len(rows)), sets, title=title)


def _short(text: str, kind: str) -> str:
    """A class's first name of several (``castle, fortress``); a token as it is."""
    return visible(text.split(",")[0] if kind == "class" else text, 24)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(row[key]) for key in ("probability", "logit") if key in row}
