"""Attribution: a grid of layers and heads beside the largest parts; a click in either marks parts in both."""

from typing import Any

from interp.attribution.direct import Attribution
from interp.hooks.errors import ArgumentError
from interp.plots.sources import sources_chart
from interp.plots.style import DIVERGING, INK, LABEL, MUTED, Clicks, Sets, finish, legible, ordered, padded, sign_colour

_HIGH = 440


def attribution_chart(
    attribution: Attribution, *, figure: str = "parts", top: int = 20, layer: int | None = None, title: str = ""
) -> Any:
    """Layer x head grid, the MLPs beside it, and bars of the largest parts and of those that were clicked.

    Args:
        attribution: What is drawn.
        figure: ``parts``, or ``sources``: heads by the token that they read (of ``unit="source"``).
        top: How many bars, or heads.
        layer: For sources: all heads of this layer.
        title: Above the figure.

    Raises:
        ArgumentError: If there is no such figure, or sources were not asked for.
    """
    if figure not in ("parts", "sources") or (layer is not None and figure == "parts"):
        raise ArgumentError(f"figure={figure!r}, layer={layer}", "'parts', or 'sources' with a layer or without")
    if figure == "sources":
        return sources_chart(attribution, layer=layer, top=top, title=title)
    import altair as alt

    rows, sets = _rows(attribution), Sets()
    whole = sets.add("parts", rows)
    picked = alt.selection_point(name="pick", fields=["component"])
    limit = max((abs(r["value"]) for r in rows if r["layer"] is not None), default=0.0) or 1.0
    scale = alt.Scale(domain=[-limit, limit], **DIVERGING)
    heads = attribution.heads.shape[1] if attribution.heads is not None else 1
    grids = [_grid(whole, "head" if attribution.heads is not None else "attention", heads, attribution, scale, picked)]
    grids.append(_grid(whole, "mlp", 1, attribution, scale, picked))
    left = alt.hconcat(*grids, spacing=10).resolve_scale(color="independent")
    bars = alt.vconcat(
        _bars(whole, attribution, top, picked), sum_line(whole, len(rows), attribution.measurement, 330), spacing=6
    )
    return finish(alt.hconcat(left, bars, spacing=46), sets, Clicks("component", ("heads", "mlps", "bars")), title)


def _records(attribution: Attribution) -> list[dict[str, Any]]:
    """Contributions by head, however much finer they are known."""
    return attribution.to_records("component" if attribution.heads is None else "head")


def _rows(attribution: Attribution) -> list[dict[str, Any]]:
    """Contributions with their rank by size; ``column`` is the head, or the kind of part."""
    rows = [r for r in _records(attribution) if r["kind"] != "rounding" or r["value"]]
    order = sorted(range(len(rows)), key=lambda i: -abs(rows[i]["value"]))
    rank = {i: n for n, i in enumerate(order)}
    column = lambda r: r["head"] if r["head"] is not None else {"mlp": "MLP", "attention": "attention"}.get(r["kind"])
    return [
        {**r, "rank": rank[i], "key": ordered(rank[i], r["component"]), "column": str(column(r))}
        for i, r in enumerate(rows)
    ]


def _grid(parts: Any, kind: str, columns: int, attribution: Attribution, scale: Any, picked: Any) -> Any:
    """Cells of heads, or of MLPs: first layer at the bottom, last on top."""
    import altair as alt

    layers = list(range(len(attribution.mlps)))[::-1]
    first = kind != "mlp"
    legend = alt.Legend(
        title="contribution", orient="top", direction="horizontal", gradientLength=180, gradientThickness=8,
        titleOrient="left", titlePadding=10, format="+.1f", tickCount=3,
    )  # fmt: skip
    wide = max(12, min(44, 440 // columns)) * columns if first else 44
    return (
        alt.Chart(parts, name="heads" if first else "mlps")
        .transform_filter(alt.datum.kind == kind)
        .mark_rect(stroke="#f1f3f5", strokeWidth=1, cursor="pointer")
        .encode(
            x=alt.X(
                "column:O", title="head" if attribution.heads is not None and first else None,
                sort=[str(n) for n in range(columns)],
                axis=alt.Axis(ticks=False, labelAngle=0, labelOverlap=True, orient="bottom"),
            ),
            y=alt.Y(
                "layer:O", sort=layers, title="layer" if first else None,
                axis=alt.Axis(ticks=False, labels=first, labelFontSize=11),
            ),
            color=alt.Color("value:Q", scale=scale, legend=legend if first else None),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.35)),
            stroke=alt.condition(picked, alt.value(INK), alt.value("#f1f3f5"), empty=False),
            tooltip=["component:N", alt.Tooltip("value:Q", format="+.4f")],
        )
        .properties(width=wide, height=_HIGH)
    )  # fmt: skip


def _bars(parts: Any, attribution: Attribution, top: int, picked: Any) -> Any:
    """The largest parts, and any other that is marked in the grid."""
    import altair as alt

    marked: Any = {"or": [{"param": "pick", "empty": False}, f"datum.rank < {top}"]}
    base = (
        alt.Chart(parts)
        .transform_filter(marked)
        .encode(
            y=alt.Y("key:N", title=None, axis=alt.Axis(labelExpr=LABEL, ticks=False)),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.3)),
            tooltip=["component:N", alt.Tooltip("value:Q", format="+.4f")],
        )
    )
    bars = (
        base.properties(name="bars")
        .mark_bar(cornerRadiusEnd=2, height={"band": 0.72}, cursor="pointer")
        .encode(
            x=alt.X(
                "value:Q",
                title=f"contribution to {legible(attribution.observable)}",
                axis=alt.Axis(tickCount=5),
                scale=alt.Scale(domain=padded(r["value"] for r in _records(attribution)), nice=False),
            ),
            color=sign_colour(),
        )
    )
    numbers = base.mark_text(align="left", color=INK, fontSize=11).encode(
        x=alt.value(338), text=alt.Text("value:Q", format="+.2f")
    )
    return alt.layer(bars, numbers).properties(width=330, height=_HIGH - 40)


def sum_line(parts: Any, count: int, measurement: float, width: int) -> Any:
    """One line: what the marked parts sum to (all parts where none is marked).

    Args:
        parts: Data with a ``value`` column; the selection is called ``pick``.
        count: How many parts there are.
        measurement: What all parts sum to.
        width: In pixels.
    """
    import altair as alt

    whole = f"'all {count} parts sum to ' + format(datum.total, '+.3f')"
    some = f"datum.n + ' marked: ' + format(datum.total, '+.3f') + ' of ' + format({measurement!r}, '+.3f')"
    return (
        alt.Chart(parts, name="sum")
        .transform_filter({"param": "pick"})
        .transform_aggregate(total="sum(value)", n="count()")
        .transform_calculate(line=f"datum.n == {count} ? {whole} : {some}")
        .mark_text(align="left", baseline="middle", fontSize=13, fontWeight=600, color=MUTED)
        .encode(text="line:N", x=alt.value(0), y=alt.value(10))
        .properties(width=width, height=20)
    )
