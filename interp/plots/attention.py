"""Attention patterns: all heads of a layer as small pictures, or one head with its tokens."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.attention import AttentionPatterns
from interp.plots.pictures import Panel, picture_grid, shades
from interp.plots.style import LABEL, Clicks, Sets, finish, ordered, visible

_MOST_CELLS = 128
_WIDE = 620


def attention_chart(
    patterns: AttentionPatterns, *, head: int | None = None, size: int = 0, columns: int = 5, title: str = ""
) -> Any:
    """Every head as a picture (row: token that looks, column: token that is looked at), or one head's heat map.

    A heat map of more than 128 tokens is drawn as a picture, without words along its sides.

    Args:
        patterns: Of one layer.
        head: This head alone.
        size: Longer side of a picture, or of the heat map; 150 and 620 by default.
        columns: Pictures in a line.
        title: Of the figure.

    Raises:
        ArgumentError: If there is no such head.
    """
    if head is None:
        panels = [Panel(f"L{patterns.layer}H{h}", _shaded(p, size or 150)) for h, p in enumerate(patterns.pattern)]
        return picture_grid(panels, columns=columns, size=size or 150, title=title)
    patterns.check_head(head)
    if len(patterns.tokens) > _MOST_CELLS:
        panel = Panel(f"L{patterns.layer}H{head}", _shaded(patterns.pattern[head], size or _WIDE))
        return picture_grid([panel], size=size or _WIDE, title=title)
    return _heat_map(patterns, head, size or _WIDE, title)


def _shaded(pattern: Tensor, size: int) -> np.ndarray:
    """Square roots, so that small weights are seen; what lies ahead stays white; at most 2 pixels for one of size."""
    step = -(-len(pattern) // (2 * size))
    pattern = torch.nn.functional.max_pool2d(pattern[None], step, ceil_mode=True)[0]
    return shades(pattern.clamp(0, 1).sqrt(), ~torch.ones_like(pattern, dtype=torch.bool).tril() & (pattern == 0))


def _heat_map(patterns: AttentionPatterns, head: int, size: int, title: str) -> Any:
    import altair as alt

    cell = max(7.0, min(34.0, size / len(patterns.tokens)))
    keys = [ordered(i, visible(t, 14)) for i, t in enumerate(patterns.tokens)]
    rows = [
        {**{k: r[k] for k in ("destination", "source", "weight")}, "to": keys[r["destination"]],
         "from": keys[r["source"]]}
        for r in patterns.to_records(head)
    ]  # fmt: skip
    sets, axis = Sets(), {"labelExpr": LABEL, "ticks": False, "grid": False, "labelFontSize": 11, "labelOverlap": True}
    picked = alt.selection_point(name="pick", fields=["source"])
    legend = alt.Legend(
        title=f"attention of L{patterns.layer}H{head}", orient="top", direction="horizontal", gradientLength=160,
        gradientThickness=8, titleOrient="left", titlePadding=10, format="%", tickCount=3,
    )  # fmt: skip
    drawn = (
        alt.Chart(sets.add("cells", rows), name="cells")
        .mark_rect(stroke="white", strokeWidth=0.5, cursor="pointer")
        .encode(
            x=alt.X("from:N", title="token that is read", scale=alt.Scale(domain=keys),
                    axis=alt.Axis(labelAngle=-90, **axis)),
            y=alt.Y("to:N", title="token that looks", scale=alt.Scale(domain=keys), axis=alt.Axis(**axis)),
            color=alt.Color("weight:Q", scale=alt.Scale(scheme="blues", domain=[0, 1], type="sqrt"), legend=legend),
            opacity=alt.condition(picked, alt.value(1), alt.value(0.4)),
            tooltip=[alt.Tooltip("to:N"), alt.Tooltip("from:N"), alt.Tooltip("weight:Q", format=".3f")],
        )
        .properties(width=cell * len(keys), height=cell * len(keys))
    )  # fmt: skip
    return finish(drawn, sets, Clicks("source", ("cells",)), title)
