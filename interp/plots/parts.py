"""Bars of F x, of r and of their sum over classes or tokens, on one scale; the largest of each part is marked."""

from typing import Any

from interp.hooks.table import Table
from interp.plots.style import INK, LABEL, Sets, finish, ordered, padded, sign_colour, visible

_PARTS = ("F x", "r", "sum")
_NAMES = ("class", "token", "output")


def parts_chart(table: Table, *, top: int = 12, title: str = "", width: int = 170) -> Any:
    """Three sets of bars side by side: F x alone, r alone, and their sum, which is the network's output."""
    import altair as alt

    kind = next(name for name in _NAMES if name in table.columns)
    records = table.to_records()[:top]
    ends = padded((row[part] for row in records for part in _PARTS), share=0.36)
    sets = Sets()
    data = sets.add("parts", [row for part in _PARTS for row in _rows(records, part, kind)])
    drawn = []
    for part in _PARTS:
        axis = alt.Axis(labelExpr=LABEL, ticks=False, labels=part == _PARTS[0])
        base = (
            alt.Chart(data)
            .transform_filter(alt.datum.part == part)
            .encode(
                y=alt.Y("key:N", title=None, axis=axis),
                opacity=alt.condition(alt.datum.largest, alt.value(1), alt.value(0.45)),
                tooltip=[alt.Tooltip("name:N", title=kind), alt.Tooltip("value:Q", title=part, format="+.4f")],
            )
        )
        scale = alt.Scale(domain=ends, nice=False)
        bars = base.mark_bar(cornerRadiusEnd=2, height={"band": 0.72}).encode(
            x=alt.X("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=4)), color=sign_colour()
        )
        written: list[Any] = [
            base.transform_filter(alt.datum.value >= 0 if up else alt.datum.value < 0)
            .mark_text(align="left" if up else "right", dx=4 if up else -4, color=INK, fontSize=11)
            .encode(x="value:Q", text=alt.Text("value:Q", format="+.2f"), opacity=alt.value(1))
            for up in (True, False)
        ]
        head = {"F x": "F x alone", "r": "r alone", "sum": "F x + r = output"}[part]
        text = alt.TitleParams(head, fontSize=12, fontWeight="normal", color=INK, anchor="start", offset=6)
        drawn.append(alt.layer(bars, *written).properties(width=width, height=22 * len(records), title=text))
    return finish(alt.hconcat(*drawn, spacing=16), sets, title=title)


def _rows(records: list[dict[str, Any]], part: str, kind: str) -> list[dict[str, Any]]:
    best = max(row[part] for row in records)
    short = lambda text: visible(text if kind == "token" else text.split(",")[0], 24)
    return [
        {
            "part": part, "key": ordered(i, short(str(row[kind]))), "name": visible(str(row[kind])),
            "value": row[part], "largest": row[part] == best,
        }
        for i, row in enumerate(records)
    ]  # fmt: skip
