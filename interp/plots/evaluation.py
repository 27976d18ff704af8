"""Figures of an evaluation: reliability, learning curves, transfer between sources, permutations over sites."""

from typing import Any

from interp.plots.style import LABEL, MUTED, NEGATIVE, POSITIVE, Sets, finish, ordered, visible


def calibration_chart(calibration: Any, *, title: str = "") -> Any:
    """Accuracy against confidence, one point for each bin of equal mass; on the diagonal a probe is calibrated.

    Args:
        calibration: What `calibration` of `interp.probes` gave.
        title: Above the figure.
    """
    import altair as alt

    sets = Sets()
    x = alt.X("confidence:Q", title="mean probability of the predicted class")
    y = alt.Y("accuracy:Q", title="share that is right", scale=alt.Scale(domain=[0, 1]))
    low = min(row["confidence"] for row in calibration.to_records())
    ends = [{"confidence": v, "accuracy": v} for v in (low, 1.0)]
    diagonal = alt.Chart(sets.add("diagonal", ends)).mark_line(color=MUTED, strokeDash=[4, 3]).encode(x=x, y=y)
    points = alt.Chart(sets.add("bins", calibration.to_records()))
    tips = [alt.Tooltip("confidence:Q", format=".3f"), alt.Tooltip("accuracy:Q", format=".3f"), alt.Tooltip("n:Q")]
    marks = points.mark_line(point=True, color=POSITIVE).encode(
        x=x.scale(alt.Scale(zero=False)), y=y, tooltip=tips, order=alt.Order("confidence:Q")
    )
    note = f"ECE {calibration.ece:.3f} in {calibration.bins} bins of equal mass."
    return finish(alt.layer(diagonal, marks).properties(width=320, height=320), sets, title=title, note=note)


def learning_chart(curve: Any, *, title: str = "") -> Any:
    """Balanced accuracy by number of labels, with the spread over folds and seeds; dashed: chance.

    Args:
        curve: What `learning_curve` of `interp.probes` gave.
        title: Above the figure.
    """
    import altair as alt

    rows = []
    for row in curve.to_records():
        value, spread = row["balanced_accuracy"], row["spread"] if row["spread"] == row["spread"] else 0.0
        rows.append({"labels": row["labels"], "value": value, "low": value - spread, "high": value + spread})
    sets = Sets()
    x = alt.X("labels:Q", title="labels in training", scale=alt.Scale(type="log"))
    y = alt.Y("value:Q", title="balanced accuracy", scale=alt.Scale(zero=False))
    base = alt.Chart(sets.add("curve", rows))
    band = base.mark_area(opacity=0.15, color=POSITIVE).encode(x=x, y=alt.Y("low:Q", title=None), y2="high:Q")
    line = base.mark_line(point=True, color=POSITIVE).encode(
        x=x, y=y, tooltip=[alt.Tooltip("labels:Q"), alt.Tooltip("value:Q", format=".3f")]
    )
    floor = alt.Chart(sets.add("chance", [{"value": curve.chance}])).mark_rule(color=MUTED, strokeDash=[4, 3])
    layers = alt.layer(band, line, floor.encode(y=y)).properties(width=420, height=260)
    return finish(layers, sets, title=title, note="Band: spread over folds and seeds. Dashed: chance.")


def transfer_chart(matrix: Any, *, title: str = "") -> Any:
    """Balanced accuracy by source fitted on (rows) and tested on (columns); the diagonal is held out.

    Args:
        matrix: What `transfer_matrix` of `interp.probes` gave.
        title: Above the figure.
    """
    import altair as alt

    place = {name: ordered(i, visible(name)) for i, name in enumerate(matrix.sources)}
    rows = [
        {"fitted": place[row["fitted on"]], "tested": place[row["tested on"]], "value": row["balanced_accuracy"]}
        for row in matrix.to_records()
    ]
    sets = Sets()
    x = alt.X("tested:N", title="tested on", axis=alt.Axis(labelExpr=LABEL, labelAngle=-40))
    y = alt.Y("fitted:N", title="fitted on", axis=alt.Axis(labelExpr=LABEL))
    shade = alt.Scale(scheme="blues", domain=[matrix.chance, 1], clamp=True)
    base = alt.Chart(sets.add("pairs", rows)).encode(x=x, y=y)
    cells = base.mark_rect().encode(color=alt.Color("value:Q", scale=shade, title="balanced accuracy"))
    middle = (1 + matrix.chance) / 2
    dark = alt.condition(f"datum.value > {middle}", alt.value("white"), alt.value("black"))
    text = base.mark_text().encode(text=alt.Text("value:Q", format=".2f"), color=dark)
    size = 56 * len(place)
    note = f"Diagonal: held out. Chance {matrix.chance:.3f}."
    return finish(alt.layer(cells, text).properties(width=size, height=size), sets, title=title, note=note)


def permutation_chart(test: Any, *, title: str = "") -> Any:
    """Score of each site, beside where 95 % of shuffled labels end: at the site, and at the best site of each draw.

    Args:
        test: What `permutation_test` of `interp.probes` gave.
        title: Above the figure.
    """
    import altair as alt
    import numpy as np

    ends, best = np.quantile(test.null, 0.95, axis=0).tolist(), float(np.quantile(test.null.max(1), 0.95))
    rows = [
        {"at": ordered(i, visible(row["site"])), "value": row["balanced_accuracy"], "null": end, "p": row["p_max"]}
        for i, (row, end) in enumerate(zip(test.to_records(), ends, strict=True))
    ]
    sets = Sets()
    base = alt.Chart(sets.add("sites", rows))
    x = alt.X("at:N", title="site", axis=alt.Axis(labelExpr=LABEL, labelAngle=-40))
    y = alt.Y("value:Q", title="balanced accuracy", scale=alt.Scale(zero=False))
    tips = [alt.Tooltip("value:Q", format=".3f"), alt.Tooltip("p:Q", title="p, all sites", format=".3f")]
    line = base.mark_line(point=True, color=POSITIVE).encode(x=x, y=y, tooltip=tips)
    null = base.mark_line(strokeDash=[4, 3], color=NEGATIVE).encode(x=x, y=alt.Y("null:Q", title=None))
    rule = alt.Chart(sets.add("best", [{"value": best}])).mark_rule(color=MUTED).encode(y=y)
    note = f"95 % of {len(test.null)} shuffles end below the dashed line at a site, below the grey one at their best."
    return finish(alt.layer(line, null, rule).properties(width=640, height=280), sets, title=title, note=note)
