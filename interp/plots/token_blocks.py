"""Token blocks as a heat map: input tokens across, output positions down, colour the norm of a block of F."""

from typing import Any

from interp.hooks.errors import ArgumentError
from interp.hooks.token_blocks import TokenBlocks
from interp.plots.style import INK, LABEL, Sets, finish, ordered, visible
from interp.plots.votes import robust_limit

_MOST_CELLS, _WIDE, _LEGIBLE = 4096, 620, 30


def blocks_chart(
    blocks: TokenBlocks, *, scale: str = "log", percentile: float = 99.5, size: int = _WIDE, title: str = ""
) -> Any:
    """Heat map of ‖F_ts‖; blocks that are exactly zero, those ahead of the position, stay white.

    The first token's own block is often larger than all others by orders of magnitude, so that it does not count for
    the colours. Where cells are large enough, norms are written into them.

    Args:
        blocks: The norms.
        scale: Of the colours: ``log`` or ``linear``.
        percentile: Of the norms that are not zero, at which the colour is full.
        size: Of the longer side, in pixels.
        title: Of the figure.

    Raises:
        ArgumentError: If there are too many blocks to be told apart, or no such scale or percentile.
    """
    import altair as alt

    rows, columns = blocks.norms.shape
    if scale not in ("log", "linear"):
        raise ArgumentError(f"scale={scale!r}", "'log' or 'linear'")
    if rows * columns > _MOST_CELLS:
        raise ArgumentError(
            f"a heat map of {rows} x {columns} blocks", f"at most {_MOST_CELLS:,}", "give token_blocks fewer positions"
        )
    sets, cell = Sets(), max(8.0, min(42.0, size / max(rows, columns)))
    low, high = _ends(blocks, percentile)
    keys = {"from": _keys(blocks, range(columns)), "to": _keys(blocks, blocks.positions)}
    titles = {"from": "input token s", "to": "output position t"}
    axis = alt.Axis(labelExpr=LABEL, ticks=False, grid=False, labelFontSize=11, labelOverlap=cell < 11)
    encode = lambda name: {
        "field": name, "type": "nominal", "title": titles[name], "scale": alt.Scale(domain=keys[name]), "axis": axis
    }  # fmt: skip
    estimated = blocks.standard_errors is not None
    tooltip = [alt.Tooltip(f"{name}:N", title=titles[name]) for name in keys]
    tooltip += [alt.Tooltip("norm:Q", format=".4g"), *[alt.Tooltip("error:Q", format=".2g")] * estimated]
    base = alt.Chart(sets.add("blocks", _rows(blocks, keys, low, high))).encode(
        x=alt.X(**encode("from")), y=alt.Y(**encode("to")), tooltip=tooltip
    )
    colour = alt.Scale(scheme="blues", domain=[low if scale == "log" else 0.0, high], type=scale, clamp=True)
    legend = alt.Legend(
        title="norm of the block" + (" (estimated)" if estimated else ""), orient="top", direction="horizontal",
        gradientLength=180, gradientThickness=8, titleOrient="left", titlePadding=10, tickCount=3, format=".2~s",
    )  # fmt: skip
    cells = base.mark_rect(stroke="white", strokeWidth=1 if cell > 14 else 0.3).encode(
        color=alt.Color("norm:Q", scale=colour, legend=legend)
    )
    layers: list[Any] = [cells]
    if cell >= _LEGIBLE:
        ink = alt.condition(alt.datum.dark, alt.value("white"), alt.value(INK))
        layers.append(base.mark_text(fontSize=10).encode(text=alt.Text("norm:Q", format=".2~s"), color=ink))
    drawn = alt.layer(*layers).properties(width=round(cell * columns), height=round(cell * rows))
    return finish(drawn, sets, title=title)


def _ends(blocks: TokenBlocks, percentile: float) -> tuple[float, float]:
    """The smallest norm and the percentile of those that are not zero, without the first token's own block."""
    counted = blocks.norms.clone()
    if len(counted) > 1 and blocks.positions[0] == 0:
        counted[0, 0] = 0
    counted = counted[counted > 0]
    if not len(counted):
        return 0.5, 1.0
    high = robust_limit(counted, percentile)
    return min(float(counted.min()), high / 2), high


def _keys(blocks: TokenBlocks, positions: Any) -> list[str]:
    return [ordered(p, visible(blocks.tokens[p], 16) if blocks.tokens else str(p)) for p in positions]


def _rows(blocks: TokenBlocks, keys: dict[str, list[str]], low: float, high: float) -> list[dict[str, Any]]:
    """One row for each block that is not zero; a number on it is white where the colour is dark."""
    errors, middle = blocks.standard_errors, (low * high) ** 0.5
    return [
        {
            "to": keys["to"][t], "from": keys["from"][s], "norm": float(norm), "dark": float(norm) > middle,
            **({} if errors is None else {"error": float(errors[t, s])}),
        }
        for t, line in enumerate(blocks.norms)
        for s, norm in enumerate(line)
        if norm != 0
    ]  # fmt: skip
