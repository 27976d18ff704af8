"""Feature vectors by the tokens that they read, and what steering along them does."""

from typing import Any

from interp.plots.style import (
    INK,
    LABEL,
    MUTED,
    NEGATIVE,
    NEUTRAL,
    POSITIVE,
    Sets,
    finish,
    legible,
    ordered,
    padded,
    sign_colour,
    visible,
)
from interp.propagation.feature_vectors import FeatureVector
from interp.steering import DoseResponse

_LINE = 21


def feature_chart(vector: FeatureVector, *, top: int = 8, width: int = 300, title: str = "") -> Any:
    """The tokens whose embeddings score highest and lowest on a feature vector.

    Args:
        vector: With its model.
        top: How many on each side.
        width: Of the bars.
        title: Above the figure.

    Raises:
        ArgumentError: If the vector has no model, or reads no stream.
    """
    import altair as alt

    found = vector.top_tokens(top).to_records()
    rows = [
        {"key": ordered(i, visible(r["token"], 24)), "name": visible(r["token"]), "id": r["id"], "value": r["score"]}
        for i, r in enumerate(found)
    ]
    sets, scale = Sets(), alt.Scale(domain=padded(r["value"] for r in rows), nice=False)
    what = f"score of the embedding, {legible(vector.observable)} at {vector.site}"
    base = alt.Chart(sets.add("rows", rows)).encode(
        y=alt.Y("key:N", title=None, axis=alt.Axis(labelExpr=LABEL, ticks=False)),
        tooltip=["name:N", "id:O", alt.Tooltip("value:Q", title="score", format="+.4f")],
    )
    bars = base.mark_bar(cornerRadiusEnd=2, height={"band": 0.72}).encode(
        x=alt.X("value:Q", title=what, axis=alt.Axis(tickCount=5), scale=scale), color=sign_colour()
    )
    numbers = base.mark_text(align="left", color=INK, fontSize=11).encode(
        x=alt.value(width + 8), text=alt.Text("value:Q", format="+.3f")
    )
    return finish(alt.layer(bars, numbers).properties(width=width, height=_LINE * len(rows)), sets, title=title)


def dose_chart(found: DoseResponse, *, width: int = 380, height: int = 240, title: str = "") -> Any:
    """A measurement by dose: measured, first order, and the spread of random directions.

    Args:
        found: What steering gave.
        width: In pixels.
        height: In pixels.
        title: Above the figure.
    """
    import altair as alt

    records, sets = found.to_records(), Sets()
    names = ("measured", "first order", "random mean")
    rows = [{"dose": r["dose"], "line": n, "value": r[n]} for r in records for n in names]
    band = [
        {"dose": r["dose"], "low": r["random mean"] - r["random spread"], "high": r["random mean"] + r["random spread"]}
        for r in records
    ]
    x = alt.X("dose:Q", title=f"dose, in units of the stream's norm ({found.size:.3g})")
    y = alt.Y("value:Q", title=legible(found.observable), scale=alt.Scale(zero=False))
    colour = alt.Color(
        "line:N", scale=alt.Scale(domain=list(names), range=[POSITIVE, NEGATIVE, NEUTRAL]),
        legend=alt.Legend(title=None, orient="top", direction="horizontal"),
    )  # fmt: skip
    dash = alt.StrokeDash("line:N", scale=alt.Scale(domain=list(names), range=[[1, 0], [5, 4], [2, 2]]), legend=None)
    lines = alt.Chart(sets.add("lines", rows)).encode(
        x=x, y=y, color=colour, tooltip=["line:N", "dose:Q", alt.Tooltip("value:Q", format="+.4f")]
    )
    spread = alt.Chart(sets.add("band", band)).mark_area(opacity=0.2, color=MUTED)
    drawn = alt.layer(
        spread.encode(x="dose:Q", y=alt.Y("low:Q", title=None), y2="high:Q"),
        lines.mark_line(strokeWidth=2).encode(strokeDash=dash),
        lines.mark_point(size=30, filled=True, opacity=1),
    )
    return finish(drawn.properties(width=width, height=height), sets, title=title)
