"""Figures: found by type, true to the numbers, safe with any token."""

import json
import math
from dataclasses import replace

import pytest
import torch

from interp.hooks.errors import ArgumentError
from interp.hooks.stability import Stability
from interp.hooks.table import Table
from interp.hooks.windows import pool
from interp.plots import can_draw, chart, visible
from interp.plots.style import legible, ordered, padded
from interp.plots.votes import robust_limit, token_rows
from tests.apps.samples import HOSTILE, attribution, lens, picture_votes, token_votes, tokens_table

TOKENS = ["The", " cat", " sat", " on", " cat"]
RESULTS = {
    "lens": lambda: lens(TOKENS), "lens without followed": lambda: lens(TOKENS, followed=()), "heads": attribution,
    "components": lambda: attribution(heads=None), "token votes": lambda: token_votes(TOKENS),
    "picture votes": picture_votes, "tokens": lambda: tokens_table(TOKENS),
    "classes": lambda: Table([{"class": "palace, castle", "probability": 0.5}]),
}  # fmt: skip


def compiled(drawn) -> dict:
    """The figure as Vega understands it: raises where Vega-Lite would refuse it."""
    import vl_convert

    return vl_convert.vegalite_to_vega(json.loads(json.dumps(drawn.to_dict(), allow_nan=False)))


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_a_figure_is_found_by_type_and_compiles(make, recwarn):
    result = make()
    assert can_draw(result)
    assert compiled(chart(result))["marks"]
    assert [w for w in recwarn if "altair" in str(w.message).lower() or "dedup" in str(w.message)] == []


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_hostile_titles_and_all_options_are_taken(make):
    assert chart(make(), title=HOSTILE[0]).to_dict()["title"]["text"] == HOSTILE[0]


def test_what_cannot_be_drawn_is_refused():
    assert not can_draw(3)
    with pytest.raises(ArgumentError, match=r"figure of int; needed: one of .*LogitLens"):
        chart(3)
    with pytest.raises(ArgumentError, match=r"option 'colr'.*needed: one of colour"):
        chart(lens(TOKENS), colr="entropy")
    with pytest.raises(ArgumentError, match="columns a; needed: columns token or class"):
        chart(Table([{"a": 1}]))
    with pytest.raises(ArgumentError, match="colour='red'"):
        chart(lens(TOKENS), colour="red")
    with pytest.raises(ArgumentError, match="position 9"):
        chart(lens(TOKENS), position=9)
    with pytest.raises(ArgumentError, match="follows no token"):
        chart(lens(TOKENS, followed=()), figure="ranks")


def test_drawing_is_repeatable():
    assert chart(attribution()).to_json() == chart(attribution()).to_json()


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Mary", "␣Mary"), ("\n", "\\n"), ("\n\n", "\\n\\n"), ("  ", "␣␣"), ("", "∅"), ("a b ", "a b␣"),
        ("\t", "\\t"), ("\\n", "\\\\n"), ("\u202e", "\\u202e"), ("\x00", "\\u0000"), ("\u00a0", "\\u00a0"),
        ("</script>", "</script>"), ("ü", "ü"),
    ],
)  # fmt: skip
def test_tokens_are_legible_and_told_apart(token, shown):
    assert visible(token) == shown


def test_long_tokens_are_cut_only_where_asked():
    assert visible("x" * 100) == "x" * 100
    assert visible("x" * 100, 5) == "xxxx…"
    assert len(visible(" " * 30, 1)) == 2


def test_names_of_observables_are_shown_as_tokens_are():
    assert legible("' Mary' - ' John'") == "␣Mary − ␣John"
    assert legible("'\\n' - ' a'") == "\\n − ␣a"
    assert legible("palace, castle - church") == "palace − church"


def test_keys_of_an_axis_are_unique_and_in_order():
    keys = [ordered(i, "cat") for i in range(300)]
    assert sorted(keys) == keys
    assert len(set(keys)) == 300


@pytest.mark.parametrize("values", [[1.0, 2.0], [-1.0, 2.0], [-3.0], [0.0], []])
def test_an_axis_holds_zero_and_every_value(values):
    low, high = padded(values)
    assert low < high
    assert low <= 0 <= high
    assert all(low < v < high for v in values if v)


# Pooling


@pytest.mark.parametrize(("height", "width", "cell"), [(224, 224, 8), (20, 28, 8), (7, 5, 3), (4, 4, 1), (3, 3, 10)])
def test_pooling_keeps_the_sum_and_the_place(height, width, cell):
    values = torch.randn(height, width, generator=torch.Generator().manual_seed(1))
    pooled = pool(values, cell)
    assert pooled.shape == (math.ceil(height / cell), math.ceil(width / cell))
    assert pooled.dtype == torch.float64
    torch.testing.assert_close(pooled.sum(), values.double().sum(), rtol=1e-12, atol=1e-9)
    slow = [
        [values[i : i + cell, j : j + cell].double().sum() for j in range(0, width, cell)]
        for i in range(0, height, cell)
    ]
    torch.testing.assert_close(pooled, torch.tensor(slow, dtype=torch.float64))


def test_a_cell_needs_a_size():
    with pytest.raises(ArgumentError, match="cell=0"):
        pool(torch.ones(2, 2), 0)


def test_the_colour_scale_is_robust_and_never_empty():
    values = torch.ones(1000)
    values[0] = 1e6
    assert robust_limit(values) == 1.0
    assert robust_limit(values, 100.0) == 1e6
    assert robust_limit(torch.zeros(4)) == 1.0
    assert robust_limit(torch.tensor([0.0] * 999 + [2.0]), 50.0) == 2.0
    with pytest.raises(ArgumentError, match=r"percentile=0\.0"):
        robust_limit(values, 0.0)


# What is drawn is what was computed


def test_cells_of_a_picture_sum_to_its_votes():
    votes = picture_votes()
    drawn = chart(votes, cell=8).to_dict()
    cells = drawn["datasets"]["cells"]
    assert len(cells) == 3 * 4
    assert sum(c["value"] for c in cells) == pytest.approx(votes.total, abs=1e-9)
    assert max(c["x2"] for c in cells) == 28
    assert max(c["y2"] for c in cells) == 20
    sums = {row["kind"]: row["value"] for row in drawn["datasets"]["sums"]}
    assert sums["all votes"] + sums["r (constants)"] == pytest.approx(sums["output"])


def test_the_scale_of_votes_is_symmetric():
    found = json.dumps(compiled(chart(picture_votes()))["scales"])
    low, high = next(s["domain"] for s in json.loads(found) if s["name"].endswith("color"))
    assert low == -high


def test_a_figure_of_votes_says_how_stable_they_are():
    assert chart(picture_votes()).to_dict()["title"]["text"] == ["stability not tested"]
    assert chart(picture_votes(), title="palace").to_dict()["title"]["subtitle"][0] == "stability not tested"
    numbers = torch.tensor([0.5, 0.7])
    tested = Stability(0.01, numbers, numbers, numbers, numbers / 10, None, None, "palace", cell=8)
    lines = chart(replace(token_votes(TOKENS), stability=tested)).to_dict()["title"]["text"]
    assert " ".join(lines).startswith("under noise 0.01: cosine of the row 0.600, of votes 0.600")
    assert " ".join(lines).endswith("6.00% of units flip")


def test_token_votes_and_r_sum_to_the_value():
    votes = token_votes(TOKENS)
    rows = token_rows(votes)
    assert [r["token"] for r in rows] == ["The", "␣cat", "␣sat", "␣on", "␣cat", "r (constants)"]
    assert sum(r["value"] for r in rows) == pytest.approx(votes.value)
    assert rows[-1]["value"] == votes.residual


def test_parts_of_an_attribution_sum_to_the_measurement():
    found = attribution()
    parts = chart(found).to_dict()["datasets"]["parts"]
    assert sum(p["value"] for p in parts) == pytest.approx(found.measurement, abs=1e-5)
    assert [p["rank"] for p in sorted(parts, key=lambda p: -abs(p["value"]))] == list(range(len(parts)))


def test_clicks_reach_every_view_of_an_attribution():
    (click,) = chart(attribution()).to_dict()["params"]
    assert [v.rpartition("_")[0] or v for v in click["views"]] == ["heads", "mlps", "bars"]


def test_a_photograph_lies_under_the_cells_in_grey():
    from PIL import Image

    drawn = chart(picture_votes(), picture=Image.new("RGB", (28, 20), "red")).to_dict()
    assert drawn["datasets"]["photograph"][0]["url"].startswith("data:image/png;base64,")


def test_values_that_json_lacks_become_null():
    found = attribution()
    found.mlps[0] = float("nan")
    parts = chart(found).to_dict()["datasets"]["parts"]
    assert next(p for p in parts if p["component"] == "L0 MLP")["value"] is None


def test_hostile_tokens_are_data_in_every_figure():
    for result in (lens(HOSTILE), token_votes(HOSTILE), tokens_table(HOSTILE)):
        assert compiled(chart(result))


def test_a_long_prompt_is_drawn_without_words():
    drawn = chart(lens([f" w{i}" for i in range(120)])).to_dict()
    assert len(drawn["hconcat"][0]["layer"]) == 2
    assert compiled(chart(lens(["a"])))
