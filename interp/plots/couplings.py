"""Couplings: a heat map for each path, or coefficients against the slopes of real activations."""

from typing import Any

from interp.hooks.errors import ArgumentError
from interp.plots.agreement import agreement
from interp.plots.style import DIVERGING, INK, LABEL, MUTED, Sets, finish, legible, ordered
from interp.propagation.couplings import Couplings

_CELL, _MOST, _COLUMNS = 64, 64, 3
_OF = {"coupling": "coupling coefficient C(row → column)", "cosine": "cosine", "slope": "measured slope"}


def couplings_chart(couplings: Couplings, *, figure: str = "matrix", of: str = "coupling", title: str = "") -> Any:
    """Heat maps of couplings between observables, one for each path; or the slopes that they predict.

    Args:
        couplings: What `couplings` gave.
        figure: ``matrix``, or ``slopes``: each pair's coefficient against its slope, with the line of equality.
        of: What a matrix shows: ``coupling``, ``cosine`` or ``slope``.
        title: Above the figure.

    Raises:
        ArgumentError: If there is no such figure, or no slopes were measured.
    """
    if figure not in ("matrix", "slopes") or of not in _OF:
        raise ArgumentError(f"figure={figure!r}, of={of!r}", f"'matrix' or 'slopes', and one of {', '.join(_OF)}")
    if couplings.slopes is None and "slope" in (of, figure.rstrip("s")):
        raise ArgumentError("slopes of couplings without texts", "couplings(..., texts)")
    return _slopes(couplings, title) if figure == "slopes" else _matrix(couplings, of, title)


def _slopes(found: Couplings, title: str) -> Any:
    rows = [
        {
            "predicted": r["coupling"], "measured": r["slope"], "r2": r["r2"], "cosine": r["cosine"],
            "group": r["path"], "weight": abs(r["cosine"]),
            "name": f"{legible(r['from'])} → {legible(r['to'])}, {r['path']}",
        }
        for r in found.to_records()
    ]  # fmt: skip
    note = (
        f"A point is an ordered pair of observables along one path; slopes are fitted over {found.n:,} activations. "
        "On the dashed line the coefficient, which needs weights alone, is the slope, as is expected where cosines are "
        "high."
    )
    title = title or "Coupling coefficients against measured slopes"
    names = "coupling coefficient (predicted slope)", "slope over activations"
    return agreement(rows, *names, group="path", weight="|cosine|", title=title, note=note)


def _matrix(found: Couplings, of: str, title: str) -> Any:
    import altair as alt

    if len(found.paths) > _MOST:
        raise ArgumentError(f"{len(found.paths)} heat maps, one for each path", f"at most {_MOST}")
    values = {"coupling": found.predicted, "cosine": found.cosines, "slope": found.slopes}[of]
    assert values is not None
    names = [ordered(i, legible(name)) for i, name in enumerate(found.observables)]
    limit = float(values.nan_to_num().abs().max()) or 1.0
    cells = [
        {
            "path": path, "from": names[i], "to": names[j], "value": v, "deep": abs(v) > 0.6 * limit,
            "pair": f"{legible(found.observables[i])} → {legible(found.observables[j])}",
        }
        for path, matrix in zip(found.paths, values.tolist(), strict=True)
        for i, line in enumerate(matrix)
        for j, v in enumerate(line)
    ]  # fmt: skip
    sets = Sets()
    data = sets.add("cells", cells)
    legend = alt.Legend(
        title=_OF[of], orient="top", direction="horizontal", gradientLength=180, gradientThickness=8,
        titleOrient="left", titlePadding=10, titleLimit=320, format="+.2f", tickCount=3,
    )  # fmt: skip
    scale = alt.Scale(domain=[-limit, limit], **DIVERGING)
    panels, columns = [], 2 if len(found.paths) == 4 else _COLUMNS
    for n, path in enumerate(found.paths):
        base = alt.Chart(data).transform_filter(alt.datum.path == path)
        beside = alt.Axis(labelExpr=LABEL, ticks=False, labels=n % columns == 0)
        base = base.encode(
            x=alt.X("to:N", title="to", axis=alt.Axis(labelExpr=LABEL, labelAngle=-40, ticks=False)),
            y=alt.Y("from:N", title="from" if n % columns == 0 else None, axis=beside),
            tooltip=["pair:N", alt.Tooltip("value:Q", title=of, format="+.4f")],
        )
        rects = base.mark_rect(stroke="white", strokeWidth=2).encode(
            color=alt.Color("value:Q", scale=scale, legend=legend)
        )
        ink = alt.condition(alt.datum.deep, alt.value("white"), alt.value(INK))
        text = base.mark_text(fontSize=12).encode(text=alt.Text("value:Q", format="+.2f"), color=ink)
        head = alt.TitleParams(path, fontSize=12, color=MUTED, fontWeight="normal", anchor="middle", offset=6)
        panels.append((rects + text).properties(width=_CELL * len(names), height=_CELL * len(names) * 0.72, title=head))
    figure = panels[0] if len(panels) == 1 else alt.concat(*panels, columns=columns)
    return finish(figure, sets, title=title or "Couplings of observables' feature vectors")
