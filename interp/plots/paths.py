"""Paths: the exact effect of each path that was found as a bar, its score as a mark beside it."""

import re
from typing import Any

from interp.hooks.errors import ArgumentError
from interp.plots.agreement import agreement
from interp.plots.style import (
    INK,
    LABEL,
    MUTED,
    Clicks,
    Sets,
    finish,
    legible,
    ordered,
    padded,
    sign_colour,
    signed,
    visible,
)
from interp.propagation.path_search import PathSearch

_WIDE = 420
_PLACE = re.compile(r"@(\d+)")


def paths_chart(found: PathSearch, *, figure: str = "bars", top: int = 15, title: str = "") -> Any:
    """Bars of the exact effects of the best paths, with their scores; or scores against effects.

    Args:
        found: What `find_paths` gave.
        figure: ``bars``, or ``agreement``: scores against exact effects.
        top: How many paths have a bar.
        title: Above the figure.

    Raises:
        ArgumentError: If there is no such figure, or no path.
    """
    if figure not in ("bars", "agreement") or top < 1 or not found.paths:
        raise ArgumentError(
            f"figure={figure!r}, top={top}, {len(found.paths)} paths", "'bars' or 'agreement' of at least one path"
        )
    note = (
        f"Clean prompt {signed(found.measurement, 2)}"
        + (f", corrupt {signed(found.corrupt_measurement, 2)}" if found.corrupt_measurement is not None else "")
        + f"; {found.score} scores of {found.tried:,} candidates and exact effects correlate by {found.correlation:.3f}"
    )
    title = title or f"Paths that carry {legible(found.observable)}"
    if figure == "agreement":
        rows = [{"predicted": r["score"], "measured": r["exact effect"], "name": r["path"]} for r in found.to_records()]
        return agreement(rows, f"{found.score} score (logits)", "exact effect (logits)", title=title, note=note)
    return _bars(found, top, title, note)


def _bars(found: PathSearch, top: int, title: str, note: str) -> Any:
    import altair as alt

    rows = [
        {
            "key": ordered(i, _named(found, r["path"])),
            "path": r["path"],
            "effect": r["exact effect"],
            "score": r["score"],
        }
        for i, r in enumerate(found.to_records()[:top])
    ]
    ends = padded((r[k] for r in rows for k in ("effect", "score")), share=0.16)
    sets = Sets()
    picked = alt.selection_point(name="pick", fields=["path"])
    base = alt.Chart(sets.add("paths", rows)).encode(
        opacity=alt.condition(picked, alt.value(1), alt.value(0.35)),
        y=alt.Y("key:N", title=None, axis=alt.Axis(labelExpr=LABEL, ticks=False, labelLimit=420, labelFontSize=11)),
        tooltip=[
            "path:N", alt.Tooltip("effect:Q", title="exact effect", format="+.4f"),
            alt.Tooltip("score:Q", format="+.4f"),
        ],
    )  # fmt: skip
    scale = alt.Scale(domain=ends, nice=False)
    axis = "drop when what flows along the path is replaced (logits)"
    note = f"{note}. Bars: exact effect; diamonds: {found.score} score"
    x = alt.X("effect:Q", title=axis, scale=scale, axis=alt.Axis(tickCount=6, titleLimit=_WIDE + 200))
    drawn = base.properties(name="bars").mark_bar(cornerRadiusEnd=2, height={"band": 0.66}, cursor="pointer")
    bars = drawn.encode(x=x, color=sign_colour("effect"))
    marks = base.mark_point(shape="diamond", filled=True, size=70, color=INK, stroke="white", strokeWidth=1).encode(
        x=alt.X("score:Q", scale=scale, title=axis)
    )
    zero = alt.Chart(sets.add("zero", [{"zero": 0.0}])).mark_rule(color=MUTED).encode(x=alt.X("zero:Q", title=axis))
    numbers = base.mark_text(align="left", color=INK, fontSize=11, dx=8).encode(
        x=alt.value(_WIDE), text=alt.Text("effect:Q", format="+.2f")
    )
    figure = alt.layer(zero, bars, marks, numbers).properties(width=_WIDE, height=24 * len(rows))
    return finish(figure, sets, Clicks("path", ("bars",)), title=title, note=note)


def _named(found: PathSearch, path: str) -> str:
    """A path with the token that each position holds: ``L9H1@3 ␣John → L13H11``."""
    tokens = found.tokens or []
    word = lambda m: f"@{m[1]} {visible(tokens[int(m[1])], 12)}" if int(m[1]) < len(tokens) else m[0]
    return _PLACE.sub(word, path).replace(" -> ", " → ")
