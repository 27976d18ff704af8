"""The logit lens: what each layer would say next, and how the followed tokens rise through the layers."""

from typing import Any

from interp.hooks.errors import ArgumentError
from interp.lens.logit_lens import LogitLens
from interp.plots.style import INK, LABEL, LINE, MUTED, NEGATIVE, POSITIVE, Clicks, Sets, finish, ordered, visible

_COLOURS = (POSITIVE, NEGATIVE, "#5b8c5a", "#8064a2", "#7f7f7f")
_WIDE, _LEGIBLE = 740, 34


def lens_chart(
    lens: LogitLens, *, colour: str = "probability", figure: str = "both", position: int = -1, title: str = ""
) -> Any:
    """Layer x position heat map beside rank lines of the followed tokens; a click picks the position of the lines.

    Raises:
        ArgumentError: If colour, figure or position is not among the legal ones.
    """
    if colour not in ("probability", "entropy") or figure not in ("both", "heat", "ranks"):
        raise ArgumentError(
            f"colour={colour!r}, figure={figure!r}", "'probability' or 'entropy'; 'both', 'heat' or 'ranks'"
        )
    n = len(lens.tokens)
    if not -n <= position < n:
        raise ArgumentError(f"position {position}", f"an index into {n} tokens")
    if figure == "ranks" and not lens.followed:
        raise ArgumentError("ranks of a lens that follows no token", "logit_lens(..., follow=[...])")
    import altair as alt

    picked = alt.selection_point(name="column", fields=["position"])
    place = lens.places[position]
    column = Clicks("position", ("cells",), "column", place)
    sets = Sets()
    if figure == "ranks":
        return finish(_ranks(lens, sets, alt.datum.position == place), sets, title=title)
    heat = _heat(lens, sets, colour, picked)
    if figure == "heat" or not lens.followed:
        return finish(heat, sets, column, title)
    return finish(alt.hconcat(heat, _ranks(lens, sets, picked, labels=False), spacing=14), sets, column, title)


def _sizes(lens: LogitLens) -> tuple[float, float]:
    """Width and height of a cell."""
    return max(14.0, min(64.0, _WIDE / len(lens.tokens))), max(11.0, min(19.0, 560 / len(lens.layers)))


def _layers(title: str | None = "layer", labels: bool = True) -> Any:
    """The y axis: input at the bottom, output on top."""
    import altair as alt

    return alt.Y(
        "row:N", sort="descending", title=title if labels else None,
        axis=alt.Axis(ticks=False, labels=labels, labelExpr=LABEL, labelFontSize=11, grid=False),
    )  # fmt: skip


def _heat(lens: LogitLens, sets: Sets, colour: str, picked: Any) -> Any:
    import altair as alt

    wide, high = _sizes(lens)
    rows = _cells(lens, int(wide / 6.3))
    names = [_column(lens, j) for j in range(len(lens.tokens))]
    top = 1.0 if colour == "probability" else float(lens.entropy.max())
    scheme = "blues" if colour == "probability" else "purples"
    titles = {"token": "behind", "layer": "layer", "likely": "most likely", "entropy": "entropy"}
    titles |= {f"rank{n}": f"rank of {name}" for n, name in enumerate(_names(lens))}
    tooltip = [alt.Tooltip(f"{key}:N", title=title) for key, title in titles.items()]
    base = alt.Chart(sets.add("cells", rows)).encode(
        x=alt.X(
            "at:N", title="prompt (each column: what is read behind this token)",
            axis=alt.Axis(labelExpr=LABEL, labelAngle=0 if wide >= _LEGIBLE else -90, ticks=False),
        ),
        y=_layers(),
        tooltip=tooltip,
    )  # fmt: skip
    cells = base.properties(name="cells").mark_rect(stroke="white", strokeWidth=1, cursor="pointer").encode(
        color=alt.Color(
            f"{colour}:Q",
            scale=alt.Scale(scheme=scheme, domain=[0, top]),
            legend=alt.Legend(
                title=("probability of the top token" if colour == "probability" else "entropy (nats)"),
                orient="top", direction="horizontal", gradientLength=160, gradientThickness=8, titleOrient="left",
                titlePadding=10, format="%" if colour == "probability" else ".1f", tickCount=3,
            ),
        )
    )  # fmt: skip
    frame = (
        alt.Chart(
            sets.add("columns", ({"position": j, "at": name} for j, name in zip(lens.places, names, strict=True)))
        )
        .mark_rect(fillOpacity=0, stroke=INK, strokeWidth=1.5)
        .encode(x="at:N")
        .transform_filter(picked)
    )
    words = base.mark_text(fontSize=min(10.5, high - 4), cursor="pointer").encode(
        text="word:N",
        color=alt.condition(alt.datum[colour] > 0.55 * top, alt.value("white"), alt.value(INK)),
    )
    layers = [cells, words, frame] if wide >= _LEGIBLE else [cells, frame]
    return alt.layer(*layers).properties(width=wide * len(lens.tokens), height=high * len(lens.layers))


def _ranks(lens: LogitLens, sets: Sets, at: Any, labels: bool = True) -> Any:
    """Rank of each followed token by layer, on a log scale, at one position."""
    import altair as alt

    names = _names(lens)
    rows = [
        {
            "position": lens.places[j], "token": visible(token), "layer": layer, "row": ordered(i, layer), "depth": i,
            "followed": names[n], "rank": int(lens.ranks[i, j, n]) + 1,
            "probability": float(lens.probabilities[i, j, n]),
        }
        for i, layer in enumerate(lens.layers)
        for j, token in enumerate(lens.tokens)
        for n in range(len(names))
    ]  # fmt: skip
    scale = alt.Scale(domain=names, range=[_COLOURS[n % len(_COLOURS)] for n in range(len(names))])
    base = (
        alt.Chart(sets.add("ranks", rows))
        .transform_filter(at)
        .encode(
            y=_layers(labels=labels),
            x=alt.X(
                "rank:Q", title="rank (1 = most likely)",
                scale=alt.Scale(type="log", domain=[1, int(lens.ranks.max()) + 1], nice=False),
                axis=alt.Axis(tickCount=4, format="~s"),
            ),
            color=alt.Color(
                "followed:N", scale=scale,
                legend=alt.Legend(title=None, orient="top", direction="horizontal", symbolType="circle"),
            ),
            order="depth:Q",
            tooltip=[
                "followed:N", "layer:N", "rank:Q", alt.Tooltip("probability:Q", format=".3g"),
                alt.Tooltip("token:N", title="behind"),
            ],
        )
    )  # fmt: skip
    drawn = base.mark_line(strokeWidth=2, interpolate="monotone") + base.mark_point(size=26, filled=True, opacity=1)
    first = alt.Chart(sets.add("first", [{"rank": 1}])).mark_rule(color=LINE, strokeDash=[3, 3]).encode(x="rank:Q")
    behind = [{"position": j, "text": f"behind {visible(t)}"} for j, t in zip(lens.places, lens.tokens, strict=True)]
    note = (
        alt.Chart(sets.add("behind", behind))
        .transform_filter(at)
        .mark_text(align="right", baseline="bottom", color=MUTED, fontSize=12)
        .encode(text="text:N", x=alt.value(220), y=alt.value(-4))
    )
    return alt.layer(first, drawn, note).properties(width=220, height=_sizes(lens)[1] * len(lens.layers))


def _column(lens: LogitLens, position: int) -> str:
    return ordered(position, visible(lens.tokens[position], max(4, int(_sizes(lens)[0] / 6))))


def _names(lens: LogitLens) -> list[str]:
    shown = [visible(t) for t in lens.followed]
    return [t if shown.count(t) == 1 else f"{t} ({n + 1})" for n, t in enumerate(shown)]


def _cells(lens: LogitLens, width: int) -> list[dict[str, Any]]:
    """One row for each layer and position, with all that the tooltip shows as text."""
    rows = []
    for i, layer in enumerate(lens.layers):
        for j, token in enumerate(lens.tokens):
            words = [visible(lens.vocabulary[int(t)]) for t in lens.top_ids[i, j]]
            top = zip(words, lens.top_probabilities[i, j].tolist(), strict=True)
            row = {
                "layer": layer, "row": ordered(i, layer), "position": lens.places[j], "at": _column(lens, j),
                "token": f"{visible(token)} (position {lens.places[j]})",
                "word": visible(lens.vocabulary[int(lens.top_ids[i, j, 0])], max(width, 2)),
                "probability": float(lens.top_probabilities[i, j, 0]), "entropy": round(float(lens.entropy[i, j]), 4),
                "likely": "   ".join(f"{word} {_percent(p)}" for word, p in top),
            }  # fmt: skip
            for n, p in enumerate(lens.probabilities[i, j].tolist()):
                row[f"rank{n}"] = f"{int(lens.ranks[i, j, n]) + 1}, probability {p:.3g}"
            rows.append(row)
    return rows


def _percent(p: float) -> str:
    return f"{p:.1%}" if p >= 0.001 else f"{p:.0e}"
