"""A picture whose pixels answer clicks."""

from typing import Any

import numpy as np

from interp.hooks.errors import ArgumentError
from interp.plots.pictures import MARK, png
from interp.plots.style import Clicks, Sets, finish

_MOST = 96


def pixels_chart(picture: np.ndarray, at: tuple[int, int] | None, size: int, title: str) -> Any:
    """The picture, each pixel a cell that can be clicked; its name is ``row,column``.

    Args:
        picture: RGB values [height, width, 3], uint8.
        at: A pixel that is framed.
        size: Of the longer side.
        title: Above the figure.

    Raises:
        ArgumentError: If there are more than 96 pixels along a side.
    """
    import altair as alt

    height, width = picture.shape[:2]
    if max(height, width) > _MOST:
        raise ArgumentError(f"{height} x {width} pixels to click on", f"at most {_MOST} along a side", "crop the input")
    cell = max(1, size // max(height, width))
    sets = Sets()
    image = (
        alt.Chart(sets.add("picture", [{"url": png(picture, cell)}]))
        .mark_image(width=cell * width, height=cell * height, aspect=False)
        .encode(url="url:N", x=alt.value(cell * width / 2), y=alt.value(cell * height / 2))
    )
    cells = [
        {"pixel": f"{i},{j}", "x": j, "x2": j + 1, "y": i, "y2": i + 1, "rgb": str(picture[i, j].tolist())}
        for i in range(height)
        for j in range(width)
    ]
    x = alt.X("x:Q", scale=alt.Scale(domain=[0, width], nice=False), axis=None)
    y = alt.Y("y:Q", scale=alt.Scale(domain=[height, 0], nice=False), axis=None)
    picked = alt.selection_point(name="pick", fields=["pixel"])
    answer = (
        alt.Chart(sets.add("cells", cells), name="cells")
        .mark_rect(fillOpacity=0, cursor="pointer")
        .encode(
            x=x, y=y, x2="x2:Q", y2="y2:Q", tooltip=["pixel:N", "rgb:N"],
            stroke=alt.condition(picked, alt.value(MARK), alt.value("transparent"), empty=False),
            strokeWidth=alt.value(2),
        )
    )  # fmt: skip
    layers: list[Any] = [image]
    if at is not None:
        frame = [{"x": at[1], "x2": at[1] + 1, "y": at[0], "y2": at[0] + 1}]
        marked = alt.Chart(sets.add("frame", frame)).mark_rect(fillOpacity=0, stroke=MARK, strokeWidth=2)
        layers.append(marked.encode(x=x, y=y, x2="x2:Q", y2="y2:Q"))
    drawn = alt.layer(*layers, answer).properties(width=cell * width, height=cell * height)
    return finish(drawn, sets, Clicks("pixel", ("cells",)), title)
