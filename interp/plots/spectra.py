"""Figures of singular values and vectors."""

from typing import Any

import numpy as np
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.spectra import SVD
from interp.plots.pictures import Panel, colours, picture_grid, signed
from interp.plots.style import MUTED, NEGATIVE, POSITIVE, Sets, finish
from interp.plots.votes import robust_limit


def svd_chart(
    svd: SVD, *, figure: str = "values", count: int = 6, expected: float | None = None, size: int = 130, title: str = ""
) -> Any:
    """``values``: singular values, those not converged orange; ``pairs``: the first v (input) above u (output).

    Of windows only these are shown.

    Args:
        svd: Of a map between pictures, for pairs.
        figure: ``values`` or ``pairs``.
        count: Number of pairs.
        expected: A line across the values, say the enlargement of a super-resolution network.
        size: Of a picture.
        title: Of the figure.

    Raises:
        ArgumentError: If the figure does not exist, or pairs are not of pictures.
    """
    if figure not in ("values", "pairs"):
        raise ArgumentError(f"figure={figure!r}", "'values' or 'pairs'")
    if figure == "values":
        return _values(svd, expected, title)
    if svd.u.ndim != 4 or svd.v.ndim != 4:
        raise ArgumentError(f"pairs of vectors {list(svd.v.shape[1:])}", "pictures [channel, height, width]")
    count = min(count, len(svd.s))
    inputs, outputs = _trimmed(svd.v[:count]), _trimmed(svd.u[:count])
    panels = [Panel(f"v{i + 1}   (σ = {float(svd.s[i]):.2f})", _vector(inputs[i])) for i in range(count)]
    panels += [Panel(f"u{i + 1}", _vector(outputs[i])) for i in range(count)]
    return picture_grid(panels, columns=count, size=size, title=title)


def _trimmed(vectors: Tensor) -> Tensor:
    """Vectors [k, channel, height, width] without the margin where all are zero: what is around a window."""
    held = (vectors != 0).any(0).any(0)
    (rows,), (columns,) = (held.any(axis).nonzero(as_tuple=True) for axis in (1, 0))
    return vectors[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else vectors


def _vector(vector: Tensor) -> np.ndarray:
    """A vector on its own scale: three channels as colours about grey, others summed."""
    if len(vector) == 3:
        limit = robust_limit(vector, 100.0)
        return colours(vector, -limit, limit)
    return signed(vector.sum(0), robust_limit(vector.sum(0), 100.0))


def _values(svd: SVD, expected: float | None, title: str) -> Any:
    import altair as alt

    sets = Sets()
    rows = [{**row, "index": row["index"] + 1, "held": row["residual"] <= 1e-4} for row in svd.to_records()]
    base = alt.Chart(sets.add("values", rows)).encode(
        x=alt.X("index:Q", title="index", axis=alt.Axis(tickMinStep=1, grid=False)),
        y=alt.Y("value:Q", title="singular value", scale=alt.Scale(zero=True)),
        tooltip=["index:O", alt.Tooltip("value:Q", format=".5g"), alt.Tooltip("residual:Q", format=".1e")],
    )
    colour = alt.condition(alt.datum.held, alt.value(POSITIVE), alt.value(NEGATIVE))
    points = base.mark_point(size=46, filled=True, opacity=1).encode(color=colour)
    layers: list[Any] = [base.mark_line(color="#9dcae1", strokeWidth=1.5), points]
    if expected is not None:
        line = alt.Chart(sets.add("expected", [{"value": expected}])).encode(y="value:Q")
        layers.insert(0, line.mark_rule(color=MUTED, strokeDash=[4, 4]))
    return finish(alt.layer(*layers).properties(width=380, height=220), sets, title=title)
