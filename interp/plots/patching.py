"""Patching grids: a heat map for each pair of axes; a click marks a cell and names it."""

from typing import Any

from interp.hooks.errors import ArgumentError
from interp.patching.grid import PatchGrid
from interp.plots.agreement import agreement
from interp.plots.style import DIVERGING, INK, LABEL, MUTED, Clicks, Sets, finish, legible, ordered, visible

_SHOWN = {"normalised": "normalised effect", "effect": "effect", "value": "value"}
_WIDE, _HIGH, _MOST_PANELS = 640, 560, 64


def patch_chart(grid: PatchGrid, *, figure: str = "cells", show: str = "", title: str = "") -> Any:
    """Heat map of a grid: layers upwards, the next axis along, one panel for each place of further axes.

    Args:
        grid: The grid.
        figure: ``cells``, or ``audit``: estimates against exact patches of the audited cells.
        show: ``normalised`` (by default, where it is defined), ``effect`` or ``value``.
        title: Of the figure.

    Raises:
        ArgumentError: If an option is not among the legal ones, there would be more than 64 panels, or nothing was
            audited.
    """
    if figure not in ("cells", "audit"):
        raise ArgumentError(f"figure={figure!r}", "'cells' or 'audit'")
    if figure == "audit":
        return _audit(grid, title)
    import altair as alt

    records = grid.to_records()
    show = show or ("effect" if any(r["normalised"] != r["normalised"] for r in records) else "normalised")
    if show not in _SHOWN:
        raise ArgumentError(f"show={show!r}", f"one of {', '.join(_SHOWN)}")
    up, along, others = _axes(grid)
    panels = _panels(grid, others)
    if len(panels) > _MOST_PANELS:
        raise ArgumentError(f"{len(panels)} panels, one for each {' and '.join(others)}", f"at most {_MOST_PANELS}")
    rows = _rows(grid, records, show, up, along, others)
    sets = Sets()
    data = sets.add("cells", rows)
    limit = max((abs(r["shown"]) for r in rows), default=0.0) or 1.0
    drawn = [_panel(data, grid, panel, show, up, along, limit, len(panels)) for panel in panels]
    drawn = drawn[0] if len(drawn) == 1 else alt.concat(*drawn, columns=max(1, 4 if len(grid.axes[along]) < 20 else 2))
    note = [f"{legible(grid.metric)}: clean {grid.clean:+.3f}, corrupt {grid.corrupt:+.3f}; {grid.direction}"]
    clicks = Clicks("place", ("cells", *(f"cells{i}" for i in range(len(panels)))))
    return finish(drawn, sets, clicks, title or note[0])


def _audit(grid: PatchGrid, title: str) -> Any:
    rows = [
        {
            "predicted": r["effect"], "measured": r["exact effect"],
            "name": ", ".join(f"{name} {r[name]}" for name in grid.axes),
        }
        for r in grid.to_records()
        if r.get("exact effect") is not None
    ]  # fmt: skip
    found = grid.audit
    if not rows or found is None:
        raise ArgumentError(f"an audit of a grid by {grid.method}", "estimates with exact patches beside them: audit=")
    note = f"{found['cells']:.0f} cells were patched exactly; correlation {found['correlation']:.3f}, same sign in "
    note += f"{found['sign_agreement']:.0%}, largest difference {found['max_difference']:.3g}."
    names = f"effect by {grid.method} (logits)", "effect of the exact patch (logits)"
    return agreement(rows, *names, title=title or f"Estimates against exact patches: {legible(grid.metric)}", note=note)


def _axes(grid: PatchGrid) -> tuple[str | None, str, list[str]]:
    """The axis that runs upwards (None where there is one axis), the axis along, and the rest."""
    names = list(grid.axes)
    if len(names) < 2:
        return None, (names or ["cell"])[0], []
    up = "layer" if "layer" in names else names[0]
    rest = [n for n in names if n != up]
    along = "position" if "position" in rest else rest[-1]
    return up, along, [n for n in rest if n != along]


def _panels(grid: PatchGrid, others: list[str]) -> list[str]:
    found = [""]
    for name in others:
        found = [f"{p}{', ' if p else ''}{name} {c}" for p in found for c in grid.axes[name]]
    return found


def _rows(
    grid: PatchGrid, records: list[dict[str, Any]], show: str, up: str | None, along: str, others: list[str]
) -> list[dict[str, Any]]:
    order = {name: {c: i for i, c in enumerate(places)} for name, places in grid.axes.items()}
    label = lambda r: _label(grid, along, r)
    rows = []
    for record in records:
        place = ", ".join(f"{name} {record[name]}" for name in grid.axes) or "all"
        row = {
            "place": place, "panel": ", ".join(f"{n} {record[n]}" for n in others), "shown": record[show],
            "x": ordered(order[along][record[along]], label(record)) if along in record else ordered(0, "all"),
            "y": ordered(order[up][record[up]], str(record[up])) if up else ordered(0, ""),
            "token": visible(record["token"]) if "token" in record else "",
            "value": record["value"], "effect": record["effect"], "normalised": record["normalised"],
        }  # fmt: skip
        rows.append(row)
    return rows


def _label(grid: PatchGrid, along: str, record: dict[str, Any]) -> str:
    if along != "position" or grid.tokens is None:
        return str(record[along])
    token = record["token"]
    return f"{record[along]} {visible(token, 16)}" if token else str(record[along])


def _panel(
    data: Any, grid: PatchGrid, panel: str, show: str, up: str | None, along: str, limit: float, panels: int
) -> Any:
    import altair as alt

    columns, lines = len(grid.axes.get(along, [0])), len(grid.axes[up]) if up else 1
    wide = max(9.0, min(44.0, (_WIDE if panels == 1 else 320) / columns))
    high = max(9.0, min(24.0, (_HIGH if panels == 1 else 320) / lines))
    legend = alt.Legend(
        title=_SHOWN[show], orient="top", direction="horizontal", gradientLength=180, gradientThickness=8,
        titleOrient="left", titlePadding=10, format="+.2f", tickCount=3,
    )  # fmt: skip
    name = "cells" if panels == 1 else f"cells{_panels(grid, _axes(grid)[2]).index(panel)}"
    picked = alt.selection_point(name="pick", fields=["place"])
    upwards = alt.Axis(labelExpr=LABEL, ticks=False, labels=bool(up), labelOverlap=True)
    tooltip = [alt.Tooltip("place:N"), *([alt.Tooltip("token:N")] if grid.tokens is not None else [])]
    tooltip += [alt.Tooltip(f"{key}:Q", format="+.4f") for key in ("value", "effect", "normalised")]
    return (
        alt.Chart(data, name=name)
        .transform_filter(alt.datum.panel == panel)
        .mark_rect(stroke="#f1f3f5", strokeWidth=1, cursor="pointer")
        .encode(
            x=alt.X("x:N", title=along, axis=alt.Axis(labelExpr=LABEL, ticks=False, labelAngle=-90)),
            y=alt.Y("y:N", sort="descending", title=up, axis=upwards),
            color=alt.Color("shown:Q", scale=alt.Scale(domain=[-limit, limit], **DIVERGING), legend=legend),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.35)),
            stroke=alt.condition(picked, alt.value(INK), alt.value("#f1f3f5"), empty=False),
            tooltip=tooltip,
        )
        .properties(
            width=wide * columns, height=high * lines,
            **({"title": alt.TitleParams(panel, color=MUTED, fontSize=12)} if panel else {}),
        )
    )  # fmt: skip
