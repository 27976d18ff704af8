"""Probes by site: what they reach on held-out parts, beside the same on control labels."""

from typing import Any

from interp.plots.style import LABEL, MUTED, NEGATIVE, POSITIVE, Sets, finish, ordered, visible

_COLOURS = (POSITIVE, NEGATIVE, "#5b8c5a", "#8064a2", "#7f7f7f")
_WIDE = 640


def sweep_chart(sweep: Any, *, title: str = "") -> Any:
    """Means of each probe along the sites, with the spread over folds; dashed: on control labels; grey: majority.

    Args:
        sweep: What `sweep` of `interp.probes` gave.
        title: Above the figure.
    """
    import altair as alt

    curve, metric = sweep.curve().to_records(), sweep.metric
    sites = list(dict.fromkeys(row["site"] for row in curve))
    pools = {row["pool"] for row in curve}
    rows, controls = [], []
    for row in curve:
        name = row["probe"] if len(pools) == 1 else f"{row['probe']}, {row['pool']}"
        at = {"at": ordered(sites.index(row["site"]), visible(row["site"])), "probe": visible(name)}
        spread = row["spread"] if row["spread"] == row["spread"] else 0.0
        value = row[metric]
        rows.append(at | {"value": value, "low": value - spread, "high": value + spread})
        if row["control"] == row["control"]:
            controls.append(at | {"value": row["control"]})
    sets, names = Sets(), list(dict.fromkeys(row["probe"] for row in rows))
    x = alt.X("at:N", title="site", axis=alt.Axis(labelExpr=LABEL, labelAngle=-40))
    y = alt.Y("value:Q", title=metric.replace("_", " "), scale=alt.Scale(zero=False))
    colour = alt.Color("probe:N", scale=alt.Scale(domain=names, range=list(_COLOURS)), title="probe")
    base = alt.Chart(sets.add("probes", rows))
    tips = [alt.Tooltip("probe:N"), alt.Tooltip("value:Q", format=".3f"), alt.Tooltip("low:Q", format=".3f"),
            alt.Tooltip("high:Q", format=".3f")]  # fmt: skip
    band = base.mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q", title=None), y2="high:Q", color=colour)
    line = base.mark_line(point=True).encode(x=x, y=y, color=colour, tooltip=tips)
    control = alt.Chart(sets.add("controls", controls)).mark_line(strokeDash=[4, 3]).encode(x=x, y=y, color=colour)
    layers = [band, line, control]
    if metric == "accuracy":
        floor = alt.Chart(sets.add("floor", [{"value": sweep.majority}]))
        layers.append(floor.mark_rule(color=MUTED).encode(y=y))
    note = f"Dashed: {sweep.control}. The highest point of a curve was looked for: report best(), the nested score."
    return finish(alt.layer(*layers).properties(width=_WIDE, height=280), sets, title=title, note=note)
