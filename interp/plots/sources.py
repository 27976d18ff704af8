"""Grids: what one head adds by each token that it reads, layer by head; and norms of every head's feature vector."""

from typing import Any

from interp.attribution.direct import Attribution
from interp.attribution.head_norms import HeadNorms
from interp.hooks.errors import ArgumentError
from interp.plots.style import DIVERGING, LABEL, Clicks, Sets, finish, legible, ordered, visible

_WIDE = 740


def sources_chart(attribution: Attribution, *, layer: int | None = None, top: int = 20, title: str = "") -> Any:
    """Heads by the token that they read: the heads with the largest single sources, or all heads of one layer.

    Args:
        attribution: By ``unit="source"``.
        layer: Show this layer's heads; by default the largest heads of all layers.
        top: How many heads, without a layer.
        title: Above the figure.

    Raises:
        ArgumentError: If sources were not asked for, or there is no such layer.
    """
    if attribution.sources is None:
        raise ArgumentError("sources of an attribution without them", "unit='source'")
    layers, heads, _ = attribution.sources.shape
    if layer is not None and not 0 <= layer < layers:
        raise ArgumentError(f"layer {layer}", f"layers 0..{layers - 1}")
    sizes = attribution.sources.abs().amax(-1).flatten()
    order = sizes.argsort(descending=True, stable=True)[:top].tolist()
    chosen = [divmod(i, heads) for i in order] if layer is None else [(layer, h) for h in range(heads)]
    rank = {where: place for place, where in enumerate(chosen)}
    cells = [
        {
            "row": ordered(rank[r["layer"], r["head"]], f"L{r['layer']}H{r['head']}"),
            "at": ordered(r["source"], visible(r["token"], 12)), "component": r["component"], "value": r["value"],
        }
        for r in attribution.to_records("source")
        if r["kind"] == "source" and (r["layer"], r["head"]) in rank
    ]  # fmt: skip
    limit = max((abs(r["value"]) for r in cells), default=0.0) or 1.0
    scale = {"domain": [-limit, limit], **DIVERGING}
    name = f"contribution to {legible(attribution.observable)}"
    return _grid(cells, "token that is read", "head", scale, name, title)


def head_norms_chart(norms: HeadNorms, *, observable: int | str = 0, title: str = "") -> Any:
    """Layer by head: norms of one observable's data-free feature vectors.

    Args:
        norms: What `head_norms` gave.
        observable: Which one, by name or index.
        title: Above the figure.

    Raises:
        ArgumentError: If there is no such observable.
    """
    index = norms.index(observable)
    values = norms.norms[index].tolist()
    cells = [
        {
            "row": ordered(len(values) - 1 - layer, str(layer)), "at": ordered(head, str(head)),
            "component": f"L{layer}H{head}", "value": value,
        }
        for layer, heads in enumerate(values)
        for head, value in enumerate(heads)
    ]  # fmt: skip
    name = f"norm of {legible(norms.observables[index])}"
    scale = {"domain": [0.0, max(r["value"] for r in cells) or 1.0], "scheme": "blues"}
    return _grid(cells, "head", "layer", scale, name, title)


def _grid(cells: list[dict[str, Any]], below: str, beside: str, scale: dict[str, Any], name: str, title: str) -> Any:
    """Cells by their row and the column that they are at."""
    import altair as alt

    sets = Sets()
    columns, rows = ({r[key] for r in cells} for key in ("at", "row"))
    wide = max(14, min(44, _WIDE // max(len(columns), 1)))
    legend = alt.Legend(
        title=name, orient="top", direction="horizontal", gradientLength=180, gradientThickness=8, titleOrient="left",
        titlePadding=10, titleLimit=420, tickCount=3,
    )  # fmt: skip
    picked = alt.selection_point(name="pick", fields=["component"])
    figure = (
        alt.Chart(sets.add("cells", cells), name="cells")
        .mark_rect(stroke="#f1f3f5", strokeWidth=1, cursor="pointer")
        .encode(
            x=alt.X("at:N", title=below, axis=alt.Axis(labelExpr=LABEL, labelAngle=-90, ticks=False)),
            y=alt.Y("row:N", title=beside, axis=alt.Axis(labelExpr=LABEL, ticks=False, labelFontSize=11)),
            color=alt.Color("value:Q", scale=alt.Scale(**scale), legend=legend),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.35)),
            tooltip=["component:N", alt.Tooltip("value:Q", format="+.4f")],
        )
        .properties(width=wide * len(columns), height=max(14, min(22, 440 // max(len(rows), 1))) * len(rows))
    )
    return finish(figure, sets, Clicks("component", ("cells",)), title)
