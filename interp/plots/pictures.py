"""Pictures in figures: signed colours, grids of panels with frames, one colour bar for what is compared."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.plots.style import INK, Sets, finish

# Vega's "blueorange" from negative to positive, as `DIVERGING` shows it: pictures and charts agree.
_COLOURS = "994a07 c5690d e8932f fbbf74 fce0ba f2f0eb d2e5ef 9dcae1 5da2cb 2f78b3 134b85".split()
_ANCHORS = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _COLOURS], dtype=float)
_PALE, _DEEP = np.array([239.0, 243.0, 249.0]), np.array([8.0, 69.0, 148.0])
MARK = "#d6186f"


@dataclass(frozen=True)
class Panel:
    """One picture of a grid: its title (perhaps of several lines), RGB values (uint8), and frames drawn on it.

    A frame is (top, left, bottom, right).
    """

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


def shades(values: Tensor, empty: Tensor) -> np.ndarray:
    """Blues [height, width, 3] of a map [height, width] from 0 to 1; white where it is empty."""
    at = values.detach().double().cpu().numpy().clip(0, 1)[..., None]
    found = (_PALE + at * (_DEEP - _PALE)).round().astype(np.uint8)
    found[empty.cpu().numpy()] = 255
    return found


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

    sets = Sets()
    lines = picture_lines(panels, columns=columns, size=size, limit=limit, of=of, sets=sets)
    return finish(alt.vconcat(*lines, spacing=14), sets, title=title)


def picture_lines(
    panels: Sequence[Panel], *, columns: int, size: int, limit: float | None, of: str, sets: Sets
) -> list[Any]:
    """The lines of a grid, and its colour bar, as parts of a figure whose data are in ``sets``.

    Raises:
        ArgumentError: If there are no panels.
    """
    import altair as alt

    if not panels or columns < 1:
        raise ArgumentError(f"{len(panels)} panels in {columns} columns", "at least one of each")
    first = len(sets)
    drawn = [_panel(panel, first + n, sets, size) for n, panel in enumerate(panels)]
    lines: list[Any] = [
        alt.hconcat(*drawn[i : i + columns], spacing=12).resolve_scale(x="independent", y="independent")
        for i in range(0, len(drawn), columns)
    ]
    if limit is not None:
        lines.append(_colour_bar(sets, limit, of))
    return lines


def blank(like: Panel) -> Panel:
    """An empty panel of another's size, which keeps the others in their columns."""
    return Panel("", np.full_like(like.pixels, 255))


def _panel(panel: Panel, number: int, sets: Sets, size: int) -> Any:
    import altair as alt

    height, width = panel.pixels.shape[:2]
    cell = size / max(height, width)
    wide, high = round(width * cell), round(height * cell)
    row = {"url": png(panel.pixels, max(1, round(2 * cell)))}
    picture = (
        alt.Chart(sets.add(f"panel{number}", [row]))
        .mark_image(width=wide, height=high, aspect=False)
        .encode(url="url:N", x=alt.value(wide / 2), y=alt.value(high / 2))
    )
    layers: list[Any] = [picture]
    for top, left, bottom, right in panel.marks:
        where = {"x": left * cell, "x2": right * cell, "y": top * cell, "y2": bottom * cell}
        frame = alt.Chart(sets.add(f"panel{number}", [row])).mark_rect(fillOpacity=0, stroke=MARK, strokeWidth=1.3)
        layers.append(frame.encode(**{k: alt.value(v) for k, v in where.items()}))
    lines = panel.title.split("\n")
    text = alt.TitleParams(
        lines if len(lines) > 1 else panel.title, fontSize=12, fontWeight="normal", color=INK, anchor="start", offset=6
    )
    return alt.layer(*layers).properties(width=wide, height=high, title=text)


def png(pixels: np.ndarray, factor: int) -> str:
    """A data address of the picture, each pixel drawn as factor x factor."""
    from PIL import Image

    buffer = io.BytesIO()
    large = pixels.repeat(factor, 0).repeat(factor, 1)
    Image.fromarray(np.ascontiguousarray(large)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colour_bar(sets: Sets, limit: float, of: str) -> Any:
    import altair as alt

    data = sets.add(f"bar{len(sets)}", [{"url": png(signed(torch.linspace(-1, 1, 181)[None], 1.0), 1), "value": 0.0}])
    axis = alt.Axis(
        values=[-limit, 0, limit], format=".2~g", labelFlush=True, grid=False, title=of or None, titleAnchor="start"
    )
    x = alt.X("value:Q", scale=alt.Scale(domain=[-limit, limit], nice=False), axis=axis)
    image = alt.Chart(data).mark_image(width=181, height=8, aspect=False)
    image = image.encode(url="url:N", x=alt.value(90.5), y=alt.value(4))
    return alt.layer(image, alt.Chart(data).mark_point(opacity=0).encode(x=x)).properties(width=181, height=8)
