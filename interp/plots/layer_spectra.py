"""Singular values of blocks' Jacobians, layer by layer."""

from typing import Any

from interp.jacobians.layer_spectra import LayerSpectra
from interp.plots.style import Clicks, Sets, finish


def spectra_chart(spectra: LayerSpectra, *, height: int = 280, title: str = "") -> Any:
    """Singular values along the layers, the largest darkest; means over positions where there are several.

    Args:
        spectra: By layer.
        height: In pixels.
        title: Above the figure.
    """
    import altair as alt

    rows = [
        {"layer": layer, "rank": k + 1, "value": v}
        for layer, values in zip(spectra.layers, spectra.values.mean(1).tolist(), strict=True)
        for k, v in enumerate(values)
    ]
    sets, count = Sets(), spectra.values.shape[-1]
    colour = alt.Color(
        "rank:Q", scale=alt.Scale(scheme="blues", reverse=True, domain=[1, max(count * 1.6, 2)]),
        legend=alt.Legend(title="rank", orient="right", values=[1, count], gradientLength=80),
    )  # fmt: skip
    base = alt.Chart(sets.add("values", rows)).encode(
        x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, grid=False)),
        y=alt.Y("value:Q", title="singular value", scale=alt.Scale(type="log")),
        color=colour, detail="rank:N",
        tooltip=["layer:O", "rank:O", alt.Tooltip("value:Q", format=".4g")],
    )  # fmt: skip
    points = base.properties(name="points").mark_point(size=34, filled=True, opacity=1, cursor="pointer")
    drawn = alt.layer(base.mark_line(strokeWidth=1.5), points).properties(width=620, height=height)
    note = f"d {spectra.target} / d {spectra.source}, {spectra.linearization}"
    return finish(drawn, sets, Clicks("layer", ("points",)), title or note)
