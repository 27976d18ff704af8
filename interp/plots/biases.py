"""Figures of what r is made of: signed bars of modules, and maps of where their constants act."""

from typing import Any

import torch
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.votes import BiasReport
from interp.plots import style
from interp.plots.components import sum_line
from interp.plots.pictures import Panel, picture_grid, signed
from interp.plots.style import INK, LABEL, Clicks, Sets, finish, legible, ordered
from interp.plots.votes import robust_limit

_LINES = 32


def bias_chart(
    report: BiasReport, *, figure: str = "bars", depth: int | None = None, linear: float | None = None, count: int = 8,
    columns: int = 4, size: int = 150, title: str = "",
) -> Any:  # fmt: skip
    """What each module's constants put into the output: ``bars``, signed, in the order in which they run; or ``maps``.

    Maps are of the modules with the largest sums of absolute values. So that maps of several resolutions share a scale,
    each cell is given for 1 % of the picture's area: 100 times the mean over a map is the module's contribution.

    Args:
        report: The report.
        figure: ``bars`` or ``maps``.
        depth: Modules are summed by this many parts of their path; by default as many as give few enough bars.
        linear: Value of F x, drawn as a last bar.
        count: Number of maps.
        columns: Maps in a line.
        size: Of a map.
        title: Of the figure.

    Raises:
        ArgumentError: If the figure does not exist, the depth is not positive, there are no constants, or none is a
            map.
    """
    if figure not in ("bars", "maps"):
        raise ArgumentError(f"figure={figure!r}", "'bars' or 'maps'")
    return _bars(report, depth, linear, title) if figure == "bars" else _maps(report, count, columns, size, title)


def _bars(report: BiasReport, depth: int | None, linear: float | None, title: str) -> Any:
    import altair as alt

    rows, sets = bias_rows(report, depth), Sets()
    if linear is not None:
        rows.append({"module": "F x (the input)", "key": ordered(len(rows), "F x (the input)"), "value": linear})
    parts = sets.add("parts", rows)
    picked = alt.selection_point(name="pick", fields=["module"])
    shade, tooltip = alt.condition(picked, alt.value(1), alt.value(0.3)), alt.Tooltip("value:Q", format="+.4f")
    y = alt.Y("key:N", title=None, axis=alt.Axis(labelExpr=LABEL, ticks=False))
    base = alt.Chart(parts).encode(y=y, opacity=shade, tooltip=["module:N", tooltip])
    x = alt.X(
        "value:Q", title=f"contribution to {legible(report.target)}", axis=alt.Axis(tickCount=5),
        scale=alt.Scale(domain=style.padded(r["value"] for r in rows), nice=False),
    )  # fmt: skip
    bars = base.properties(name="bars").mark_bar(cornerRadiusEnd=2, height={"band": 0.72}, cursor="pointer")
    numbers = base.mark_text(align="left", color=INK, fontSize=11).encode(
        x=alt.value(348), text=alt.Text("value:Q", format="+.2f")
    )
    drawn = alt.layer(bars.encode(x=x, color=style.sign_colour()), numbers).properties(width=340, height=18 * len(rows))
    line = sum_line(parts, len(rows), report.residual + (linear or 0.0), 340)
    return finish(alt.vconcat(drawn, line, spacing=6), sets, Clicks("module", ("bars",)), title)


def bias_rows(report: BiasReport, depth: int | None = None) -> list[dict[str, Any]]:
    """The report's terms summed by the first ``depth`` parts of the module's path; together they are r.

    Raises:
        ArgumentError: If the depth is not positive, or there are no constants.
    """
    table = report.by_module().to_records()
    if not table or (depth is not None and depth < 1):
        raise ArgumentError(f"{len(table)} modules with constants, depth {depth}", "at least one of each")
    names = lambda n: [".".join(row["module"].split(".")[:n]) for row in table]
    longest = max(row["module"].count(".") + 1 for row in table)
    fitting = (n for n in range(longest, 1, -1) if len(set(names(n))) <= _LINES)
    sums: dict[str, float] = {}
    for name, row in zip(names(depth or next(fitting, 1)), table, strict=True):
        sums[name] = sums.get(name, 0.0) + row["value"]
    return [{"module": m, "key": ordered(i, m), "value": v} for i, (m, v) in enumerate(sums.items())]


def bias_maps(report: BiasReport) -> dict[str, Tensor]:
    """Maps [height, width] by module, in order: what 1 % of the area would contribute at each cell's rate.

    100 times the mean over a map is what the module's constants contribute.
    """
    found: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    for module, each in zip(report.modules, report.maps, strict=True):
        if each.ndim == 2 and each.numel() > 1:
            key = module, tuple(each.shape)
            found[key] = found.get(key, torch.zeros(each.shape, dtype=torch.float64)) + each.double().cpu()
    names = [module for module, _ in found]
    unique = lambda name, shape: name if names.count(name) == 1 else f"{name} {shape[0]} x {shape[1]}"
    return {unique(name, shape): each * each.numel() / 100 for (name, shape), each in found.items()}


def _maps(report: BiasReport, count: int, columns: int, size: int, title: str) -> Any:
    maps = bias_maps(report)
    if not maps or count < 1:
        raise ArgumentError(f"{count} maps of {len(maps)} modules whose constants have pixels", "at least one of each")
    strongest = sorted(maps, key=lambda name: -float(maps[name].abs().mean()))[:count]
    chosen = {name: each for name, each in maps.items() if name in strongest}
    limit = robust_limit(torch.cat([_stretched(each) for each in chosen.values()]))
    panels = [
        Panel(f"{_tail(name)}\n{style.signed(100 * float(m.mean()), 2)}", signed(m, limit))
        for name, m in chosen.items()
    ]
    of = f"contribution to {legible(report.target)} of 1 % of the area"
    return picture_grid(panels, columns=columns, size=size, limit=limit, of=of, title=title)


def _stretched(values: Tensor, side: int = 64) -> Tensor:
    """As many values from a small map as from a large one, so that both count for the scale alike."""
    return torch.nn.functional.interpolate(values[None, None], (side, side)).flatten()


def _tail(name: str, width: int = 24) -> str:
    """The end of a path, which tells modules apart."""
    return name if len(name) <= width else "…" + name[1 - width :]
