"""Figures of a linear interpreter: y, F x and r as pictures, columns and rows of F, its spectrum, what r is made of."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.linear_scope import LinearScope
from interp.hooks.spectra import SVD
from interp.hooks.votes import BiasReport
from interp.plots import style
from interp.plots.components import sum_line
from interp.plots.style import INK, LABEL, MUTED, NEGATIVE, POSITIVE, Clicks, Sets, finish, legible, ordered
from interp.plots.votes import robust_limit

# Vega's "blueorange" from negative to positive, as `DIVERGING` shows it: pictures and charts agree.
_COLOURS = "994a07 c5690d e8932f fbbf74 fce0ba f2f0eb d2e5ef 9dcae1 5da2cb 2f78b3 134b85".split()
_ANCHORS = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _COLOURS], dtype=float)
_LINES, _PERCENTILE, _MARK = 32, 99.0, "#d6186f"


@dataclass(frozen=True)
class Panel:
    """One picture of a grid: its title, RGB values (uint8), and frames (top, left, bottom, right) drawn on it."""

    title: str
    pixels: np.ndarray
    marks: tuple[tuple[float, float, float, float], ...] = ()


def signed(values: Tensor, limit: float) -> np.ndarray:
    """Colours [height, width, 3] of a map [height, width]: orange below zero, blue above, full at ±limit.

    Example:
        >>> signed(torch.tensor([[-1.0, 1.0]]), 1.0).tolist()
        [[[153, 74, 7], [19, 75, 133]]]
    """
    at = (values.detach().double().cpu().numpy() / (limit or 1.0)).clip(-1, 1) * 5 + 5
    channels = [np.interp(at, np.arange(len(_ANCHORS)), _ANCHORS[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def colours(values: Tensor, low: float, high: float) -> np.ndarray:
    """Colours [height, width, 3] of a picture [3, height, width], or greys of [height, width], from low to high."""
    scaled = ((values.detach().double().cpu() - low) / ((high - low) or 1.0)).clamp(0, 1).mul(255).round()
    scaled = scaled.expand(3, *scaled.shape) if scaled.ndim == 2 else scaled
    return scaled.permute(1, 2, 0).to(torch.uint8).numpy()


def picture_grid(
    panels: Sequence[Panel], *, columns: int = 4, size: int = 150, limit: float | None = None, of: str = "",
    title: str = "",
) -> Any:  # fmt: skip
    """Pictures side by side, pixels as squares; with ``limit`` a bar that says what the signed colours mean.

    Args:
        panels: The pictures.
        columns: How many stand in a line.
        size: Of the longer side of each, in pixels of the figure.
        limit: Value at the ends of the colour bar.
        of: What the colour bar is of.
        title: Of the figure.

    Raises:
        ArgumentError: If there are no panels.
    """
    import altair as alt

    if not panels or columns < 1:
        raise ArgumentError(f"{len(panels)} panels in {columns} columns", "at least one of each")
    sets = Sets()
    drawn = [_panel(panel, n, sets, size) for n, panel in enumerate(panels)]
    lines: list[Any] = [
        alt.hconcat(*drawn[i : i + columns], spacing=12).resolve_scale(x="independent", y="independent")
        for i in range(0, len(drawn), columns)
    ]
    if limit is not None:
        lines.append(_colour_bar(sets, limit, of))
    return finish(alt.vconcat(*lines, spacing=14), sets, title=title)


def _panel(panel: Panel, number: int, sets: Sets, size: int) -> Any:
    import altair as alt

    height, width = panel.pixels.shape[:2]
    cell = size / max(height, width)
    wide, high = round(width * cell), round(height * cell)
    row = {"url": _png(panel.pixels, max(1, round(2 * cell)))}
    picture = (
        alt.Chart(sets.add(f"panel{number}", [row]))
        .mark_image(width=wide, height=high, aspect=False)
        .encode(url="url:N", x=alt.value(wide / 2), y=alt.value(high / 2))
    )
    layers: list[Any] = [picture]
    for top, left, bottom, right in panel.marks:
        where = {"x": left * cell, "x2": right * cell, "y": top * cell, "y2": bottom * cell}
        frame = alt.Chart(sets.add(f"panel{number}", [row])).mark_rect(fillOpacity=0, stroke=_MARK, strokeWidth=1.3)
        layers.append(frame.encode(**{k: alt.value(v) for k, v in where.items()}))
    text = alt.TitleParams(panel.title, fontSize=12, fontWeight="normal", color=INK, anchor="start", offset=6)
    return alt.layer(*layers).properties(width=wide, height=high, title=text)


def _png(pixels: np.ndarray, factor: int) -> str:
    """A data address of the picture, each pixel drawn as factor x factor."""
    from PIL import Image

    buffer = io.BytesIO()
    large = pixels.repeat(factor, 0).repeat(factor, 1)
    Image.fromarray(np.ascontiguousarray(large)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colour_bar(sets: Sets, limit: float, of: str) -> Any:
    import altair as alt

    data = sets.add("bar", [{"url": _png(signed(torch.linspace(-1, 1, 181)[None], 1.0), 1), "value": 0.0}])
    axis = alt.Axis(values=[-limit, 0, limit], format=".2~g", labelFlush=True, grid=False, title=of or None)
    x = alt.X("value:Q", scale=alt.Scale(domain=[-limit, limit], nice=False), axis=axis)
    image = alt.Chart(data).mark_image(width=181, height=8, aspect=False)
    image = image.encode(url="url:N", x=alt.value(90.5), y=alt.value(4))
    return alt.layer(image, alt.Chart(data).mark_point(opacity=0).encode(x=x)).properties(width=181, height=8)


_FIGURES = ("parts", "impulse", "receptive", "strip")


def scope_chart(
    scope: LinearScope, *, figure: str = "", at: Any = None, along: Sequence[tuple[int, int]] = (), radius: int = 8,
    size: int = 150, title: str = "",
) -> Any:  # fmt: skip
    """Figures of an image network at its reference.

    ``parts``: the reference, y, F x and r on one scale. ``impulse``: what one input pixel projects into the output, a
    column of F summed over the pixel's channels and averaged over the output's. ``receptive``: what one output pixel,
    or one class, reads. ``strip``: impulse responses along a moving pixel. Frames mark the pixel; colours of responses
    are full at the 99th percentile.

    Args:
        scope: Around a picture [1, channel, height, width].
        figure: By default ``parts`` for pictures out, ``receptive`` for classes.
        at: Input pixel (row, column) for ``impulse``; output pixel, class or label for ``receptive``.
        along: Input pixels of ``strip``.
        radius: Of what is shown around a pixel, in input pixels.
        size: Of a picture in the figure.
        title: Of the figure.

    Raises:
        ArgumentError: If the figure does not exist, is not of this network, or lacks its pixel.
    """
    figure = figure or ("parts" if scope.y.ndim == 4 else "receptive")
    if figure not in _FIGURES:
        raise ArgumentError(f"figure={figure!r}", f"one of {', '.join(_FIGURES)}")
    if scope.x.ndim != 4 or (scope.y.ndim != 4 and not (figure == "receptive" and scope.y.ndim == 2)):
        shapes = f"{list(scope.in_shape)} -> {list(scope.out_shape)}"
        raise ArgumentError(f"figure {figure!r} of a map {shapes}", "from pictures to pictures (receptive: or classes)")
    if figure == "parts":
        return _parts(scope, size, title)
    if (figure == "strip" and not along) or (figure != "strip" and at is None):
        needed = "along=[(row, column), ...]" if figure == "strip" else "at=, a pixel (row, column) or a class"
        raise ArgumentError(f"figure {figure!r} without its place", needed)
    draw = {"impulse": _impulse, "receptive": _receptive, "strip": _strip}[figure]
    return draw(scope, list(along) if figure == "strip" else at, radius, size, title)


def impulse_response(scope: LinearScope, pixels: Sequence[tuple[int, int]]) -> Float[Tensor, "n height width"]:
    """Return what each of n input pixels projects into the output: F e, averaged over output channels.

    e is one in all channels of the pixel and zero elsewhere, so that brightness is followed, not one colour.

    Raises:
        ArgumentError: If a pixel is outside the input.
    """
    return scope.impulse_responses(pixels).mean(1)


def receptive_filter(scope: LinearScope, at: Any) -> Float[Tensor, "height width"]:
    """Return what an output pixel (row, column) reads, or a class (index or label): Fᵀ w, summed over input channels.

    w averages the channels of the output pixel.

    Raises:
        ArgumentError: If the pixel or class does not exist.
    """
    return scope.receptive_filter(at).sum(0)


def _parts(scope: LinearScope, size: int, title: str) -> Any:
    named = {"y": scope.y, "F x": scope.Fx, "r": scope.r}
    largest = f" (largest {float(scope.r.abs().max()):.2g})"
    if scope.x.shape[1] == scope.y.shape[1] == 3:
        low, high = min(0.0, float(scope.x.min())), float(scope.x.max())
        panels = [Panel("reference x", _shown(scope, scope.x))]
        panels += [Panel(n + (largest if n == "r" else ""), colours(v[0], low, high)) for n, v in named.items()]
        return picture_grid(panels, size=size, title=title)
    named = {"reference x": scope.x} | named
    limit = robust_limit(torch.cat([v.flatten() for v in named.values()]), 100.0)
    panels = [
        Panel(n + (f", channel {c}" if v.shape[1] > 1 else ""), signed(v[0, c], limit))
        for n, v in named.items() for c in range(v.shape[1])
    ]  # fmt: skip
    columns = 4 if len(panels) == 4 else 7
    return picture_grid(panels, columns=columns, size=size, limit=limit, of="value", title=title)


def _shown(scope: LinearScope, value: Tensor) -> np.ndarray:
    """The picture of x or y [1, channel, height, width] as the network's preprocessing shows it, else on x's range."""
    undo = getattr(scope.model.preprocess, "undo", None)
    if undo is not None and value.shape[1] == 3:
        return np.asarray(undo(value).convert("RGB"))
    picture = value[0] if value.shape[1] == 3 else value[0].mean(0)
    return colours(picture, float(scope.x.min()), float(scope.x.max()))


@dataclass(frozen=True)
class _Window:
    """A window around a square, which is framed; near an edge it is moved inside the picture."""

    corner: tuple[float | int, float | int]
    side: float | int
    radius: float | int

    def cut(self, picture: Any) -> Any:
        """The part of an array or tensor [height, width, ...] in the window."""
        (y, x), n = self._start(picture), round(2 * self.radius + self.side)
        return picture[y : y + n, x : x + n]

    def panel(self, title: str, pixels: np.ndarray) -> Panel:
        """The part in the window, with the frame."""
        y, x = (float(c - s) for c, s in zip(self.corner, self._start(pixels), strict=True))
        return Panel(title, self.cut(pixels), ((y, x, y + self.side, x + self.side),))

    def _start(self, picture: Any) -> list[int]:
        sizes, n = picture.shape[:2], round(2 * self.radius + self.side)
        return [max(0, min(round(c - self.radius), s - n)) for c, s in zip(self.corner, sizes, strict=True)]


def _strip(scope: LinearScope, along: list[tuple[int, int]], radius: int, size: int, title: str) -> Any:
    responses, scale = impulse_response(scope, along), scope.out_shape[-1] / scope.in_shape[-1]
    far = [_Window((i * scale, j * scale), scale, radius * scale) for i, j in along]
    limit = robust_limit(torch.stack([w.cut(r) for w, r in zip(far, responses, strict=True)]), _PERCENTILE)
    x = _shown(scope, scope.x)
    panels = [_Window(at, 1, radius).panel(f"x {tuple(at)}", x) for at in along]
    for window, response in zip(far, responses, strict=True):
        panels.append(window.panel(f"sum {float(response.sum()):.2f}", signed(response, limit)))
    return picture_grid(panels, columns=len(along), size=size, limit=limit, of="columns of F", title=title)


def _impulse(scope: LinearScope, at: Any, radius: int, size: int, title: str) -> Any:
    response, scale = impulse_response(scope, [at])[0], scope.out_shape[-1] / scope.in_shape[-1]
    near, far = _Window(at, 1, radius), _Window((at[0] * scale, at[1] * scale), scale, radius * scale)
    panels = [near.panel(f"x around {tuple(at)}", _shown(scope, scope.x)), far.panel("y", _shown(scope, scope.y))]
    name, limit = f"impulse response, sum {float(response.sum()):.2f}", robust_limit(far.cut(response), _PERCENTILE)
    panels.append(far.panel(name, signed(response, limit)))
    return picture_grid(panels, size=size, limit=limit, of="column of F", title=title)


def _receptive(scope: LinearScope, at: Any, radius: int, size: int, title: str) -> Any:
    row, x = receptive_filter(scope, at), _shown(scope, scope.x)
    if scope.y.ndim == 2:
        limit, name = robust_limit(row), legible(str(at))
        panels = [Panel("reference x", x), Panel(f"row of F for {name}", signed(row, limit))]
        return picture_grid(panels, size=size, limit=limit, of="row of F", title=title)
    scale = scope.out_shape[-1] / scope.in_shape[-1]
    near, far = _Window((int(at[0] / scale), int(at[1] / scale)), 1, radius), _Window(at, 1, radius * scale)
    limit, name = robust_limit(near.cut(row), _PERCENTILE), f"receptive filter, sum {float(row.sum()):.2f}"
    panels = [far.panel(f"y around {tuple(at)}", _shown(scope, scope.y)), near.panel("x", x)]
    panels.append(near.panel(name, signed(row, limit)))
    return picture_grid(panels, size=size, limit=limit, of="row of F", title=title)


def svd_chart(
    svd: SVD, *, figure: str = "values", count: int = 6, expected: float | None = None, size: int = 130, title: str = ""
) -> Any:
    """``values``: singular values, those not converged orange; ``pairs``: the first v (input) above u (output).

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
    panels = [Panel(f"v{i + 1}   (σ = {float(svd.s[i]):.2f})", _vector(svd.v[i])) for i in range(count)]
    panels += [Panel(f"u{i + 1}", _vector(svd.u[i])) for i in range(count)]
    return picture_grid(panels, columns=count, size=size, title=title)


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


def bias_chart(report: BiasReport, *, depth: int | None = None, linear: float | None = None, title: str = "") -> Any:
    """Signed bars of what each module's constants put into the output, in the order in which they run.

    Args:
        report: The report.
        depth: Modules are summed by this many parts of their path; by default as many as give few enough bars.
        linear: Value of F x, drawn as a last bar.
        title: Of the figure.

    Raises:
        ArgumentError: If the depth is not positive, or there are no constants.
    """
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
