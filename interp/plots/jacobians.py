"""Figures of Jacobians: spectra, similarity of tokens' matrices, how a lens settles, how well a relation does."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from interp.hooks.errors import ArgumentError
from interp.jacobians.reductions import JacobianSummary
from interp.lens.jacobian_lens import JacobianLens
from interp.linear_relation import RelationScore
from interp.plots.style import DIVERGING, LABEL, MUTED, POSITIVE, Sets, finish, ordered, visible


def summary_chart(
    summary: JacobianSummary, *, labels: Sequence[str] | None = None,
    beside: Mapping[str, JacobianSummary] | None = None, name: str = "", title: str = "",
) -> Any:  # fmt: skip
    """Singular values as a line for each summary, cosines of a gram matrix as a heat map, norms and traces as bars.

    Args:
        summary: With ``svd:k``, ``gram``, ``norm`` or ``trace``.
        labels: Of its Jacobians, as a rule tokens.
        beside: Of singular values: further summaries by name.
        name: Of the first one, where there are others.
        title: Of the figure.

    Raises:
        ArgumentError: If the summary is of another kind, or labels do not fit.
    """
    if labels is not None and len(labels) != summary.count:
        raise ArgumentError(f"{len(labels)} labels", f"{summary.count}, one for each Jacobian")
    shown = [ordered(i, visible(t)) for i, t in enumerate(labels or map(str, range(summary.count)))]
    if summary.kind.startswith("svd:"):
        return _spectra({name or summary.target: summary} | dict(beside or {}), title)
    if beside is not None:
        raise ArgumentError(f"beside= of {summary.kind}", "singular values")
    if summary.kind == "gram":
        return _cosines(summary, shown, title)
    if summary.kind in ("norm", "trace"):
        return _bars(summary, shown, title)
    raise ArgumentError(f"a figure of {summary.kind}", "svd:k, gram, norm or trace")


def _spectra(summaries: dict[str, JacobianSummary], title: str) -> Any:
    import altair as alt

    for label, one in summaries.items():
        if not one.kind.startswith("svd:"):
            raise ArgumentError(f"{label}: {one.kind}", "singular values, svd:k")
    sets, names = Sets(), list(summaries)
    rows = [
        {"of": label, "index": i + 1, "value": float(value), "low": float(low), "high": float(high)}
        for label, one in summaries.items()
        for i, (value, low, high) in enumerate(
            zip(one.value.median(0).values, one.value.min(0).values, one.value.max(0).values, strict=True)
        )
    ]
    base = alt.Chart(sets.add("values", rows)).encode(
        x=alt.X("index:Q", title="index", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(grid=False)),
        color=alt.Color("of:N", sort=names, title=None, scale=alt.Scale(scheme="viridis", domain=names)),
    )
    line = base.mark_line(strokeWidth=1.8).encode(
        y=alt.Y("value:Q", title="singular value", scale=alt.Scale(type="log", nice=False)),
        tooltip=["of:N", "index:Q", alt.Tooltip("value:Q", format=".4g")],
    )
    return finish(line.properties(width=460, height=300), sets, title=title, note="line: median over tokens")


def _cosines(summary: JacobianSummary, shown: list[str], title: str) -> Any:
    import altair as alt

    norms = summary.value.diagonal().clamp(min=0).sqrt().clamp(min=1e-30)
    cosines = summary.value / torch.outer(norms, norms)
    sets, n = Sets(), len(shown)
    rows = [{"row": shown[i], "column": shown[j], "cosine": float(cosines[i, j])} for i in range(n) for j in range(n)]
    axis = alt.Axis(labelExpr=LABEL, ticks=False, grid=False)
    cells = alt.Chart(sets.add("cells", rows)).mark_rect(stroke="white", strokeWidth=0.5).encode(
        x=alt.X("column:N", title=None, axis=alt.Axis(labelExpr=LABEL, ticks=False, labelAngle=-90)),
        y=alt.Y("row:N", title=None, axis=axis),
        color=alt.Color("cosine:Q", scale=alt.Scale(domain=[-1, 1], **DIVERGING), title="cosine"),
        tooltip=["row:N", "column:N", alt.Tooltip("cosine:Q", format=".3f")],
    )  # fmt: skip
    side = max(14, min(30, 480 // n)) * n
    return finish(cells.properties(width=side, height=side), sets, title=title)


def _bars(summary: JacobianSummary, shown: list[str], title: str) -> Any:
    import altair as alt

    sets = Sets()
    rows = [{"at": at, "value": float(v)} for at, v in zip(shown, summary.value, strict=True)]
    bars = alt.Chart(sets.add("values", rows)).mark_bar(color=POSITIVE).encode(
        x=alt.X("at:N", title=None, axis=alt.Axis(labelExpr=LABEL, labelAngle=-90)),
        y=alt.Y("value:Q", title="Frobenius norm" if summary.kind == "norm" else summary.kind),
        tooltip=[alt.Tooltip("value:Q", format=".4g")],
    )  # fmt: skip
    return finish(bars.properties(width=max(120, 26 * len(rows)), height=240), sets, title=title)


def jacobian_lens_chart(lens: JacobianLens, *, figure: str = "layers", title: str = "") -> Any:
    """``layers``: how far each matrix is from the identity; ``changes``: by how much each prompt moved the mean.

    Raises:
        ArgumentError: If the figure does not exist, or the lens does not know how it was fitted.
    """
    import altair as alt

    if figure not in ("layers", "changes"):
        raise ArgumentError(f"figure={figure!r}", "'layers' or 'changes'")
    if figure == "changes" and len(lens.changes) < 2:
        raise ArgumentError(f"{len(lens.changes)} changes", "a lens fitted here on two prompts or more")
    if figure == "layers":
        rows = [{"at": r["layer"], "value": r["distance from 1"]} for r in lens.to_records()]
        names = "layer", "distance from the identity ‖J − 1‖ / ‖1‖"
    else:
        rows = [{"at": i + 1, "value": value} for i, value in enumerate(lens.changes) if i]
        names = "prompts", "relative change of the mean"
    sets = Sets()
    base = alt.Chart(sets.add("values", rows)).encode(
        x=alt.X("at:Q", title=names[0], axis=alt.Axis(tickMinStep=1, grid=False)),
        y=alt.Y("value:Q", title=names[1], scale=alt.Scale(type="log", nice=False)),
        tooltip=["at:Q", alt.Tooltip("value:Q", format=".3g")],
    )
    drawn = base.mark_line(color=POSITIVE) + base.mark_point(color=POSITIVE, filled=True, opacity=1)
    return finish(drawn.properties(width=460, height=260), sets, title=title, note=f"{lens.count} prompts")


_SHARES = ("model_accuracy", "accuracy", "faithfulness", "causality")


def relation_chart(
    score: RelationScore, *, beside: Mapping[str, RelationScore] | None = None, name: str = "relation", title: str = ""
) -> Any:
    """Shares of pairs on which the model is right, the relation is right, it agrees with the model, an edit works."""
    import altair as alt

    sets, scores = Sets(), {name: score} | dict(beside or {})
    labels = [f"{label} ({len(one.rows)})" for label, one in scores.items()]
    rows = [
        {"of": label, "share": getattr(one, key), "what": key.replace("_", " ")}
        for label, one in zip(labels, scores.values(), strict=True)
        for key in _SHARES
        if getattr(one, key) is not None
    ]
    base = alt.Chart(sets.add("shares", rows)).encode(
        y=alt.Y("what:N", sort=[key.replace("_", " ") for key in _SHARES], title=None, axis=alt.Axis(ticks=False)),
        yOffset=alt.YOffset("of:N", sort=labels),
        x=alt.X("share:Q", title="share of pairs", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
        tooltip=["of:N", "what:N", alt.Tooltip("share:Q", format=".0%")],
    )
    legend = alt.Legend(orient="top", direction="horizontal")
    scale = alt.Scale(scheme="viridis", domain=labels)
    colour = alt.Color("of:N", sort=labels, title=None, scale=scale, legend=legend)
    text = base.mark_text(align="left", dx=4, color=MUTED).encode(text=alt.Text("share:Q", format=".0%"))
    drawn = alt.layer(base.mark_bar().encode(color=colour), text).properties(width=360, height=64 * len(labels) + 40)
    return finish(drawn, sets, title=title, note="in brackets: number of pairs")
