"""Token blocks as a heat map: input tokens across, output positions down, colour the norm of a block of F."""

from typing import Any

from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.token_blocks import TokenBlocks
from interp.plots.style import INK, LABEL, Sets, finish, ordered, visible
from interp.plots.votes import robust_limit

_MOST_CELLS, _WIDE, _LEGIBLE = 4096, 620, 30


def blocks_chart(
    blocks: TokenBlocks,
    *,
    of: str = "norms",
    scale: str = "log",
    percentile: float = 99.5,
    size: int = _WIDE,
    title: str = "",
) -> Any:
    """Heat map of ‖F_ts‖, or of ‖F_ts E_s‖, what a token's own embedding contributes.

    Blocks that are exactly zero, those ahead of the position, stay white.

    The first token's own block is often larger than all others by orders of magnitude, so that it does not count for
    the colours. Where cells are large enough, norms are written into them.

    Args:
        blocks: The blocks.
        of: ``norms`` or ``contributions``.
        scale: Of the colours: ``log`` or ``linear``.
        percentile: Of the norms that are not zero, at which the colour is full.
        size: Of the longer side, in pixels.
        title: Of the figure.

    Raises:
        ArgumentError: If there are too many blocks to be told apart, or an option has another value.
    """
    import altair as alt

    _check(blocks, of, scale)
    values = blocks.norms if of == "norms" else blocks.contributions
    rows, columns = values.shape
    sets, cell = Sets(), max(8.0, min(42.0, size / max(rows, columns)))
    low, high = _ends(values, blocks.positions, percentile)
    keys = {"from": _keys(blocks, range(columns)), "to": _keys(blocks, blocks.positions)}
    titles = {"from": "input token s", "to": "output position t"}
    axis = alt.Axis(labelExpr=LABEL, ticks=False, grid=False, labelFontSize=11, labelOverlap=cell < 11)
    encode = lambda name: {
        "field": name, "type": "nominal", "title": titles[name], "scale": alt.Scale(domain=keys[name]), "axis": axis
    }  # fmt: skip
    errors = blocks.standard_errors if of == "norms" else None
    tooltip = [alt.Tooltip(f"{name}:N", title=titles[name]) for name in keys]
    tooltip.append(alt.Tooltip("value:Q", title=of.removesuffix("s"), format=".4g"))
    if errors is not None:
        tooltip.append(alt.Tooltip("error:Q", title="standard error", format=".2g"))
    base = alt.Chart(sets.add("blocks", _rows(values, errors, keys, (low * high) ** 0.5))).encode(
        x=alt.X(**encode("from")), y=alt.Y(**encode("to")), tooltip=tooltip
    )
    ends = [low if scale == "log" else 0.0, high]
    colour = alt.Scale(scheme="blues", domain=ends, type="log" if scale == "log" else "linear", clamp=True)
    said = "norm of the block" if of == "norms" else "what the token contributes (norm)"
    legend = alt.Legend(
        title=said + (" (estimated)" if errors is not None else ""), orient="top", direction="horizontal",
        gradientLength=180, gradientThickness=8, titleOrient="left", titlePadding=10, tickCount=3, format=".2~s",
        titleLimit=300,
    )  # fmt: skip
    cells = base.mark_rect(stroke="white", strokeWidth=1 if cell > 14 else 0.3).encode(
        color=alt.Color("value:Q", scale=colour, legend=legend)
    )
    layers: list[Any] = [cells]
    if cell >= _LEGIBLE:
        ink = alt.condition(alt.datum.dark, alt.value("white"), alt.value(INK))
        layers.append(base.mark_text(fontSize=10).encode(text=alt.Text("value:Q", format=".2~s"), color=ink))
    drawn = alt.layer(*layers).properties(width=round(cell * columns), height=round(cell * rows))
    return finish(drawn, sets, title=title)


def _check(blocks: TokenBlocks, of: str, scale: str) -> None:
    if of not in ("norms", "contributions"):
        raise ArgumentError(f"of={of!r}", "'norms' or 'contributions'")
    if scale not in ("log", "linear"):
        raise ArgumentError(f"scale={scale!r}", "'log' or 'linear'")
    rows, columns = blocks.norms.shape
    if rows * columns > _MOST_CELLS:
        raise ArgumentError(
            f"a heat map of {rows} x {columns} blocks", f"at most {_MOST_CELLS:,}", "give token_blocks fewer positions"
        )


def _ends(values: Tensor, positions: list[int], percentile: float) -> tuple[float, float]:
    """The smallest value and the percentile of those that are not zero, without the first token's own block."""
    counted = values.clone()
    if len(counted) > 1 and positions[0] == 0:
        counted[0, 0] = 0
    counted = counted[counted > 0]
    if not len(counted):
        return 0.5, 1.0
    high = robust_limit(counted, percentile)
    return min(float(counted.min()), high / 2), high


def _keys(blocks: TokenBlocks, positions: Any) -> list[str]:
    return [ordered(p, visible(blocks.tokens[p], 16) if blocks.tokens else str(p)) for p in positions]


def _rows(values: Tensor, errors: Tensor | None, keys: dict[str, list[str]], middle: float) -> list[dict[str, Any]]:
    """One row for each block that is not zero; a number on it is white where the colour is dark."""
    return [
        {
            "to": keys["to"][t], "from": keys["from"][s], "value": float(value), "dark": float(value) > middle,
            **({} if errors is None else {"error": float(errors[t, s])}),
        }
        for t, line in enumerate(values)
        for s, value in enumerate(line)
        if value != 0
    ]  # fmt: skip
