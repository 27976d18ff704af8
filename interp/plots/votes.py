"""Votes: a bar for each token, or a map over the photograph; r is always drawn beside them."""

import base64
import io
from typing import Any

import torch
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.windows import pool
from interp.plots.components import sum_line
from interp.plots.style import (
    DIVERGING,
    INK,
    LABEL,
    NEUTRAL,
    Clicks,
    Sets,
    finish,
    legible,
    ordered,
    padded,
    sign_colour,
    visible,
)

_ROW = 22


def votes_chart(
    votes: Any, *, picture: Any = None, cell: int = 8, percentile: float = 99.5, size: int = 448, title: str = ""
) -> Any:
    """Bars for votes of tokens or of a vector; for a picture, a map of cells.

    Raises:
        ArgumentError: If votes are neither of a sequence nor of a picture, or the cells or percentile are no such.
    """
    if votes.map.ndim == 1:
        return _token_votes(votes, title)
    if votes.map.ndim != 2:
        raise ArgumentError(f"a figure of votes {list(votes.map.shape)}", "[pos] or [height, width]")
    return _picture_votes(votes, picture, cell, percentile, size, title)


# Tokens ---------------------------------------------------------------------------------------------------------------


def token_rows(votes: Any) -> list[dict[str, Any]]:
    """One row for each token (embedding, learned position and token type together), then r; they sum to the value."""
    same = [b for b in votes.blocks.values() if b.shape == votes.map.shape] or [votes.map]
    names = votes.labels or [str(i) for i in range(len(votes.map))]
    values = torch.stack([b.double().cpu() for b in same]).sum(0).tolist()
    rows = [
        {"position": i, "key": ordered(i, visible(n, 24)), "token": visible(n), "value": v}
        for i, (n, v) in enumerate(zip(names, values, strict=True))
    ]
    others = {k: float(b.double().sum()) for k, b in votes.blocks.items() if b.shape != votes.map.shape}
    for name, value in [*others.items(), ("r (constants)", votes.residual)]:
        rows.append({"position": len(rows), "key": ordered(len(rows), name), "token": name, "value": value})
    return rows


def _token_votes(votes: Any, title: str) -> Any:
    import altair as alt

    rows, sets = token_rows(votes), Sets()
    parts = sets.add("parts", rows)
    picked = alt.selection_point(name="pick", fields=["position"])
    base = alt.Chart(parts).encode(
        y=alt.Y(
            "key:N", title=None,
            axis=alt.Axis(labelExpr=LABEL, ticks=False),
        ),
        opacity=alt.condition(picked, alt.value(1), alt.value(0.3)),
        tooltip=["token:N", "position:O", alt.Tooltip("value:Q", title="vote", format="+.4f")],
    )  # fmt: skip
    bars = (
        base.properties(name="bars").mark_bar(cornerRadiusEnd=2, height={"band": 0.72}, cursor="pointer")
        .encode(
            x=alt.X(
                "value:Q", title=f"vote for {legible(votes.target)}", axis=alt.Axis(tickCount=5),
                scale=alt.Scale(domain=padded(r["value"] for r in rows), nice=False),
            ),
            color=sign_colour(),
        )
    )  # fmt: skip
    numbers = base.mark_text(align="left", color=INK, fontSize=11).encode(
        x=alt.value(348), text=alt.Text("value:Q", format="+.2f")
    )
    drawn = alt.layer(bars, numbers).properties(width=340, height=_ROW * len(rows))
    line = sum_line(parts, len(rows), votes.value, 340)
    return finish(alt.vconcat(drawn, line, spacing=6), sets, Clicks("position", ("bars",)), title, votes.caption)


# Pictures -------------------------------------------------------------------------------------------------------------


def robust_limit(values: Tensor, percentile: float = 99.5) -> float:
    """The colour scale's end: this percentile of absolute values; the largest where that is zero, 1 for all zeros.

    Raises:
        ArgumentError: If the percentile is not in (0, 100].
    """
    if not 0 < percentile <= 100:
        raise ArgumentError(f"percentile={percentile}", "a number above 0, at most 100")
    size = values.detach().double().abs().flatten()
    return float(torch.quantile(size, percentile / 100)) or float(size.max()) or 1.0


def _picture_votes(votes: Any, picture: Any, cell: int, percentile: float, size: int, title: str) -> Any:
    import altair as alt

    height, width = votes.map.shape
    pooled = pool(votes.map, cell)
    limit = robust_limit(pooled, percentile)
    rows = [
        {
            "cell": i * pooled.shape[1] + j, "x": j * cell, "x2": min((j + 1) * cell, width), "y": i * cell,
            "y2": min((i + 1) * cell, height), "value": float(v), "strength": min(abs(float(v)) / limit, 1.0),
        }
        for i, line in enumerate(pooled)
        for j, v in enumerate(line)
    ]  # fmt: skip
    for row in rows:
        row["where"] = "rows {y}-{y2}, columns {x}-{x2}".format(**{**row, "y2": row["y2"] - 1, "x2": row["x2"] - 1})
    sets, high = Sets(), round(size * height / width)
    parts = sets.add("cells", rows)
    cells = _cells(parts, width, height, limit)
    layers = [cells] if picture is None else [_photograph(picture, sets, size, high), cells]
    view = alt.layer(*layers).properties(width=size, height=high)
    sums = _vote_sums(parts, votes, pooled, sets, size)
    return finish(alt.vconcat(view, sums, spacing=14), sets, Clicks("cell", ("cells",)), title, votes.caption)


def _cells(parts: Any, width: int, height: int, limit: float) -> Any:
    import altair as alt

    picked = alt.selection_point(name="pick", fields=["cell"])
    return (
        alt.Chart(parts, name="cells")
        .mark_rect(cursor="pointer")
        .encode(
            x=alt.X("x:Q", scale=alt.Scale(domain=[0, width], nice=False), axis=None),
            x2="x2:Q",
            y=alt.Y("y:Q", scale=alt.Scale(domain=[height, 0], nice=False), axis=None),
            y2="y2:Q",
            color=alt.Color(
                "value:Q", scale=alt.Scale(domain=[-limit, limit], **DIVERGING),
                legend=alt.Legend(
                    title="vote of a cell", orient="top", direction="horizontal", gradientLength=160,
                    gradientThickness=8, titleOrient="left", titlePadding=10, format="+.2~f", tickCount=3,
                ),
            ),
            fillOpacity=alt.FillOpacity("strength:Q", scale=alt.Scale(domain=[0, 1], range=[0.12, 0.92]), legend=None),
            stroke=alt.condition(picked, alt.value("#000"), alt.value("transparent"), empty=False),
            strokeWidth=alt.condition(picked, alt.value(2), alt.value(0), empty=False),
            tooltip=[alt.Tooltip("value:Q", title="vote", format="+.4f"), alt.Tooltip("where:N", title="pixels")],
        )
    )  # fmt: skip


def _photograph(picture: Any, sets: Sets, width: int, height: int) -> Any:
    """The picture in grey, pale, under the cells."""
    import altair as alt
    from PIL import Image

    image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
    buffer = io.BytesIO()
    image.convert("L").save(buffer, format="PNG", optimize=True)
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return (
        alt.Chart(sets.add("photograph", [{"url": url}]))
        .mark_image(width=width, height=height, opacity=0.75, aspect=False)
        .encode(url="url:N", x=alt.value(width / 2), y=alt.value(height / 2))
    )


def _vote_sums(parts: Any, votes: Any, pooled: Tensor, sets: Sets, width: int) -> Any:
    """Bars: all votes, r, their sum (the network's output), and what the marked cells sum to."""
    import altair as alt

    kinds = ["all votes", "r (constants)", "output", "marked cells"]
    values = dict(zip(kinds, (votes.total, votes.residual, votes.value), strict=False))
    y = alt.Y("kind:N", sort=kinds, scale=alt.Scale(domain=kinds), axis=None)
    ends = padded([*values.values(), float(pooled.max()), float(pooled.min())])
    scale = alt.Scale(domain=ends, nice=False, clamp=True)
    x = alt.X("value:Q", title=None, stack=None, scale=scale, axis=alt.Axis(tickCount=5))
    fixed = alt.Chart(sets.add("sums", ({"kind": k, "value": v} for k, v in values.items())))
    marked = (
        alt.Chart(parts)
        .transform_filter({"param": "pick", "empty": False})
        .transform_aggregate(value="sum(value)")
        .transform_calculate(kind="'marked cells'")
    )
    layers, wide = [], width - 150
    for base, colour in ((fixed, sign_colour()), (marked, alt.value(NEUTRAL))):
        said = base.transform_calculate(line="datum.kind + '  ' + format(datum.value, '+.3f')")
        layers.append(base.mark_bar(height={"band": 0.7}, cornerRadiusEnd=2).encode(x=x, y=y, color=colour))
        layers.append(
            said.mark_text(align="left", color=INK, fontSize=12).encode(y=y, x=alt.value(wide + 12), text="line:N")
        )
    return alt.layer(*layers).properties(width=wide, height=20 * len(kinds))
