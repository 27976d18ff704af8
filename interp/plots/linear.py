"""Figures of a linear interpreter: y, F x and r, columns and rows of F, votes of several classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.output_parts import output_parts
from interp.hooks.errors import ArgumentError
from interp.hooks.linear_scope import LinearScope
from interp.hooks.windows import pool
from interp.plots.parts import parts_chart
from interp.plots.pictures import Panel, blank, colours, picture_grid, picture_lines, signed
from interp.plots.pixels import pixels_chart
from interp.plots.style import Sets, finish, legible
from interp.plots.style import signed as said
from interp.plots.votes import robust_limit

_PERCENTILE = 99.0
_PICKED = 170  # Half the side of a picture whose pixels are clicked, in pixels of the figure.


def scope_chart(
    scope: LinearScope, *, figure: str = "", at: Any = None, along: Sequence[tuple[int, int]] = (), radius: int = 8,
    top: int = 0, cell: int = 8, size: int = 150, title: str = "",
) -> Any:  # fmt: skip
    """Figures of a network at its reference.

    ``parts``: the reference, y, F x and r on one scale. ``impulse``: what one input pixel projects into the output, a
    column of F summed over the pixel's channels and averaged over the output's. ``receptive``: what one output pixel,
    or one class, reads. ``strip``: impulse responses along a moving pixel. ``outputs``: F x, r and their sum for the
    largest classes or tokens. ``votes``: for the largest classes, and the margin of the first to the second, votes
    above rows of F. ``pixels``: the reference, each pixel to be clicked. Frames mark the pixel; colours of responses
    are full at the 99th percentile, of votes and rows of classes at the 99.5th.

    Args:
        scope: Around a picture [1, channel, height, width]; ``outputs`` also of tokens.
        figure: By default ``parts`` for pictures out, ``receptive`` for classes with ``at``, else ``outputs``.
        at: Input pixel (row, column) for ``impulse``; output pixel, class or label for ``receptive``; output position
            for ``outputs`` of tokens.
        along: Input pixels of ``strip``.
        radius: Of what is shown around a pixel, in input pixels.
        top: How many classes or tokens; 8 for ``outputs`` and 3 for ``votes`` by default.
        cell: Side of the squares in which votes are summed, in pixels.
        size: Of a picture in the figure.
        title: Of the figure.

    Raises:
        ArgumentError: If the figure does not exist, is not of this network, or lacks its pixel.
    """
    figure = figure or _usual(scope, at)
    _check_figure(scope, figure, at, along)
    if figure == "outputs":
        return parts_chart(output_parts(scope, top or 8, position=-1 if at is None else at), title=title)
    if figure == "votes":
        return _class_votes(scope, top or 3, cell, size, title)
    if figure == "parts":
        return _parts(scope, size, title)
    if figure == "pixels":
        return pixels_chart(_shown(scope, scope.x), at, max(size, 2 * _PICKED), title)
    draw = {"impulse": _impulse, "receptive": _receptive, "strip": _strip}[figure]
    return draw(scope, list(along) if figure == "strip" else at, radius, size, title)


_PICTURES = "from pictures to pictures"
_NEEDS = {
    "parts": _PICTURES, "impulse": _PICTURES, "strip": _PICTURES,
    "receptive": _PICTURES + " or classes",
    "votes": "from pictures to classes", "outputs": "to classes or tokens",
    "pixels": _PICTURES,
}  # fmt: skip


def _usual(scope: LinearScope, at: Any) -> str:
    if scope.y.ndim == 4:
        return "parts"
    return "receptive" if at is not None and scope.x.ndim == 4 else "outputs"


def _check_figure(scope: LinearScope, figure: str, at: Any, along: Sequence[Any]) -> None:
    """Refuse a figure that does not exist, that this network does not have, or that lacks its place."""
    if figure not in _NEEDS:
        raise ArgumentError(f"figure={figure!r}", f"one of {', '.join(_NEEDS)}")
    picture, out = scope.x.ndim == 4, scope.y.ndim
    fits = {"outputs": out in (2, 3), "votes": picture and out == 2, "receptive": picture and out in (2, 4)}
    if not fits.get(figure, picture and out == 4):
        shapes = f"{list(scope.in_shape)} -> {list(scope.out_shape)}"
        raise ArgumentError(f"figure {figure!r} of a map {shapes}", f"a map {_NEEDS[figure]}")
    if (figure == "strip" and not along) or (figure in ("impulse", "receptive") and at is None):
        needed = "along=[(row, column), ...]" if figure == "strip" else "at=, a pixel (row, column) or a class"
        raise ArgumentError(f"figure {figure!r} without its place", needed)


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


def _class_votes(scope: LinearScope, top: int, cell: int, size: int, title: str) -> Any:
    """Votes summed in cells, above rows of F summed over channels: each line on one scale, the margin at its end."""
    found = scope.y[0].topk(min(top, scope.y.shape[1])).indices.tolist()
    margin = [(found[0], found[1])] if len(found) > 1 else []
    pairs: list[tuple[int, int | None]] = [*((k, None) for k in found), *margin]
    votes = [scope.votes(k, margin_to=other) for k, other in pairs]
    cells = [pool(v.map, cell).float() for v in votes]
    one = lambda k: scope.direction(k)
    rows = [scope.rmatvec(one(k) if other is None else one(k) - one(other)).sum(0) for k, other in pairs]
    sets, limits = Sets(), [robust_limit(torch.stack(maps)) for maps in (cells, rows)]
    first = Panel("reference x", _shown(scope, scope.x))
    names = [_name(scope, k) + ("" if other is None else f" − {_name(scope, other)}") for k, other in pairs]
    above = [
        Panel(f"{n}  {said(v.total, 1)}", signed(c, limits[0])) for n, v, c in zip(names, votes, cells, strict=True)
    ]
    below = [Panel(f"row of F: {n}", signed(r, limits[1])) for n, r in zip(names, rows, strict=True)]
    options: Any = {"columns": len(pairs) + 1, "size": size, "sets": sets}
    lines = picture_lines([first, *above], limit=limits[0], of=f"votes of {cell} x {cell} pixels", **options)
    lines += picture_lines([blank(first), *below], limit=limits[1], of="row of F", **options)
    import altair as alt

    return finish(alt.vconcat(*lines, spacing=14), sets, title=title)


def _name(scope: LinearScope, k: int) -> str:
    return legible(scope.model.labels[k]) if scope.model.labels else f"output {k}"
