"""Agreement: what was predicted against what was measured, with the line on which both are equal."""

from typing import Any

from interp.plots.style import INK, MUTED, Sets, finish

_COLOURS = ("#2f78b3", "#c5690d", "#5b8c5a", "#8064a2", "#b0417a", "#7f7f7f", "#2a9d8f", "#a67c00")
_SIDE = 380


def agreement(
    rows: list[dict[str, Any]],
    predicted: str,
    measured: str,
    *,
    group: str = "",
    weight: str = "",
    title: str = "",
    note: str = "",
) -> Any:
    """Points at (predicted, measured), the diagonal, and the axes at zero, on one square scale.

    Args:
        rows: With ``predicted``, ``measured``, ``name`` and, where points are told apart, ``group``.
        predicted: What stands along.
        measured: What stands upwards.
        group: What the colours tell apart.
        weight: What the rows' ``weight``, from 0 to 1, is: points of little weight are pale.
        title: Above the figure.
        note: Under the title.
    """
    import altair as alt

    sets, values = Sets(), [r[key] for r in rows for key in ("predicted", "measured")]
    low, high = min(values, default=-1.0), max(values, default=1.0)
    air = 0.08 * ((high - low) or 1.0)
    domain = [low - air, high + air]
    x, y = (
        alt.X("predicted:Q", title=predicted, scale=alt.Scale(domain=domain, nice=False), axis=alt.Axis(tickCount=6)),
        alt.Y("measured:Q", title=measured, scale=alt.Scale(domain=domain, nice=False), axis=alt.Axis(tickCount=6)),
    )
    ends = alt.Chart(sets.add("line", [{"predicted": v, "measured": v} for v in domain]))
    layers: list[Any] = [ends.mark_line(color=MUTED, strokeDash=[5, 4]).encode(x=x, y=y)]
    if low < 0 < high:
        zero = alt.Chart(sets.add("zero", [{"zero": 0.0}]))
        layers += [zero.mark_rule(color="#c9ced6").encode(x=alt.X("zero:Q", title=predicted))]
        layers += [zero.mark_rule(color="#c9ced6").encode(y=alt.Y("zero:Q", title=measured))]
    names = list(dict.fromkeys(r["group"] for r in rows if "group" in r))
    colour = (
        alt.Color("group:N", title=group, scale=alt.Scale(domain=names, range=list(_COLOURS)))
        if names
        else alt.value(_COLOURS[0])
    )
    tips = [alt.Tooltip("name:N", title="of"), alt.Tooltip("predicted:Q", title=predicted, format="+.3f")]
    tips += [alt.Tooltip("measured:Q", title=measured, format="+.3f")]
    tips += [alt.Tooltip(f"{key}:Q", format=".3f") for key in ("r2", "cosine") if rows and key in rows[0]]
    points = alt.Chart(sets.add("points", rows)).mark_circle(size=90, opacity=0.85, stroke=INK, strokeWidth=0.4)
    pale = alt.Opacity("weight:Q", title=weight, scale=alt.Scale(domain=[0, 1], range=[0.12, 1]))
    points = points.encode(x=x, y=y, color=colour, tooltip=tips)
    layers.append(points.encode(opacity=pale) if weight else points)
    return finish(alt.layer(*layers).properties(width=_SIDE, height=_SIDE), sets, title=title, note=note)
