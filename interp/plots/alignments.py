"""Figures of alignments: accuracy against complexity beside untrained networks, and grids of maps by sites."""

import math
from typing import Any

from interp.hooks.errors import ArgumentError
from interp.plots.style import INK, LABEL, MUTED, NEGATIVE, POSITIVE, Sets, finish, ordered, visible

_PANELS = {"iia": "IIA", "random": "untrained network", "shuffled": "permuted labels", "selectivity": "IIA − untrained"}
_NOTE = (
    "Orange: the same maps on untrained networks. Only the distance between the curves says something of the network."
)


def alignments_chart(
    sweep: Any, *, figure: str = "frontier", site: str | None = None, measure: str = "iia",
    complexity: str = "effective dimension", split: str | None = None, title: str = "",
) -> Any:  # fmt: skip
    """Draw a sweep over alignment maps.

    Args:
        sweep: What `sweep` of `interp.causal` gave.
        figure: ``frontier``: accuracy against complexity with the curve of untrained networks; ``grid``: accuracy,
            controls and selectivity by map and site.
        site: Of the frontier; by default each.
        measure: Of the frontier.
        complexity: Of the frontier.
        split: Which pairs.
        title: Above the figure.

    Raises:
        ArgumentError: If there is no such figure.
    """
    if figure not in ("frontier", "grid"):
        raise ArgumentError(f"figure={figure!r}", "frontier or grid")
    if figure == "frontier":
        found = sweep.frontier(site, measure=measure, complexity=complexity, split=split)
        return frontier_chart(found, title=title)
    return _grid(sweep, split, title)


def frontier_chart(frontier: Any, *, title: str = "") -> Any:
    """Accuracy of each map with its interval against log10(1 + complexity), with both curves as steps.

    Args:
        frontier: What `frontier` of a sweep gave.
        title: Above the figure.
    """
    import altair as alt

    sets, panels = Sets(), []
    for number, (site, area) in enumerate(frontier.areas.items()):
        panels.append(_panel(frontier, site, area, sets, number).properties(width=300, height=240))
    return finish(alt.hconcat(*panels).resolve_scale(y="shared"), sets, title=title, note=_NOTE)


def _panel(frontier: Any, site: str, area: float, sets: Sets, number: int) -> Any:
    import altair as alt

    rows, several = [r for r in frontier.rows if r["site"] == site], len({r["size"] for r in frontier.rows}) > 1
    points = [
        {
            "at": math.log10(1 + r[frontier.complexity]), "map": _named(r, several),
            "complexity": r[frontier.complexity], "value": r["value"], "low": r["low"], "high": r["high"],
            "random": r["random"], "trained": f"{r['random trained']} of {r['seeds']}", "on": r["on frontier"],
        }
        for r in rows
    ]  # fmt: skip
    names = {"best": "trained network", "random best": "untrained network"}
    curves = [
        {"at": p["at"], "value": r[key], "network": name}
        for key, name in names.items()
        for p, r in zip(points, rows, strict=True)
    ]
    span = [p["at"] for p in points]
    x = alt.X(
        "at:Q", title=f"log10(1 + {frontier.complexity})", scale=alt.Scale(domain=[min(span), max(span)], nice=True)
    )
    y = alt.Y("value:Q", title=frontier.measure, scale=alt.Scale(zero=False))
    colour = alt.Color(
        "network:N", title=None, scale=alt.Scale(domain=list(names.values()), range=[POSITIVE, NEGATIVE])
    )
    tips = ["map:N", "complexity:Q", *(alt.Tooltip(f"{n}:Q", format=".3f") for n in ("value", "low", "high", "random")),
            alt.Tooltip("trained:N", title="untrained networks that left chance")]  # fmt: skip
    base = alt.Chart(sets.add(f"points{number}", points))
    ends = alt.Chart(sets.add(f"curves{number}", curves))
    line = ends.mark_line(interpolate="step-after", strokeWidth=2).encode(x=x, y=y, color=colour)
    bars = base.mark_rule(color=MUTED).encode(x=x, y=alt.Y("low:Q", title=None), y2="high:Q")
    dots = base.mark_point(size=70, color=POSITIVE).encode(
        x=x, y=y, tooltip=tips, fill=alt.condition(alt.datum.on, alt.value(POSITIVE), alt.value("white"))
    )
    random = base.mark_point(size=45, color=NEGATIVE, shape="cross").encode(
        x=x, y=alt.Y("random:Q", title=None), tooltip=tips
    )
    text = base.transform_filter(alt.datum.on).mark_text(align="left", dx=7, dy=9, color=INK, fontSize=11)
    heading = alt.TitleParams(f"{visible(site)}: distance {area:+.3f}", fontSize=12, fontWeight="normal")
    return alt.layer(line, bars, random, dots, text.encode(x=x, y=y, text="map:N")).properties(title=heading)


def _named(row: dict[str, Any], several: bool) -> str:
    return visible(row["map"] + (f", {row['size']}" if several else ""))


def _grid(sweep: Any, split: str | None, title: str) -> Any:
    import altair as alt

    sets, rows = Sets(), sweep.summary(split).to_records()
    several = len({r["size"] for r in rows}) > 1
    names = list(dict.fromkeys((r["map"], r["size"]) for r in rows))
    cells = [
        {
            "site": ordered(sweep.sites.index(r["site"]), visible(r["site"])),
            "map": ordered(names.index((r["map"], r["size"])), _named(r, several)),
            "trained": f"{r['trained']} of {r['seeds']}", "control trained": f"{r['random trained']} of {r['seeds']}",
            **{k: r[k] for k in (*_PANELS, "low", "high")},
        }
        for r in rows
    ]  # fmt: skip
    # A control that a map has not leaves a gap in its row: rows are those of all panels.
    data, panels, every = sets.add("cells", cells), [], sorted({cell["map"] for cell in cells})
    for number, (key, name) in enumerate(_PANELS.items()):
        axis = alt.Axis(labelExpr=LABEL) if number == 0 else None
        signed = key == "selectivity"
        scale = alt.Scale(scheme="blueorange", reverse=True, domain=[-0.5, 0.5]) if signed else alt.Scale(
            scheme="blues", domain=[0.4, 1.0], clamp=True
        )  # fmt: skip
        base = alt.Chart(data).encode(
            x=alt.X("site:N", title=None, axis=alt.Axis(labelExpr=LABEL, labelAngle=-40)),
            y=alt.Y("map:N", title=None, axis=axis, scale=alt.Scale(domain=every)),
            tooltip=["map:N", "site:N", *(alt.Tooltip(f"{k}:Q", format=".3f") for k in (*_PANELS, "low", "high")),
                     "trained:N", "control trained:N"],
        )  # fmt: skip
        dark = f"datum['{key}'] > 0.8" if not signed else f"abs(datum['{key}']) > 0.35"
        text = (
            base.transform_filter(f"isValid(datum['{key}'])")
            .mark_text(fontSize=11)
            .encode(
                text=alt.Text(f"{key}:Q", format="+.2f" if signed else ".2f"),
                color=alt.condition(dark, alt.value("white"), alt.value(INK)),
            )
        )
        shown = base.mark_rect().encode(color=alt.Color(f"{key}:Q", scale=scale, legend=None))
        panels.append((shown + text).properties(
            width=alt.Step(54), height=alt.Step(26), title=alt.TitleParams(name, fontSize=12, fontWeight="normal")
        ))  # fmt: skip
    note = f"Means over seeds. Controls at the same budget: {sweep.controls}."
    return finish(alt.hconcat(*panels).resolve_scale(color="independent"), sets, title=title, note=note)
