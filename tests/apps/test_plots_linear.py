"""Figures of linear interpreters: true to F, y and r, with the right place marked, and refusals."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from torch import nn

from interp.attribution.output_parts import output_parts
from interp.hooks.attach import attach
from interp.hooks.errors import ArgumentError
from interp.hooks.linear_scope import LinearScope
from interp.hooks.spectra import SVD
from interp.hooks.token_blocks import TokenBlocks
from interp.hooks.votes import BiasReport
from interp.hooks.windows import pool
from interp.plots import can_draw, chart
from interp.plots.biases import bias_maps, bias_rows
from interp.plots.linear import impulse_response, receptive_filter
from interp.plots.pictures import Panel, colours, picture_grid, signed
from interp.plots.votes import robust_limit


class Enlarger(nn.Module):
    """Three channels in, ``out`` channels of twice the size out, or class scores."""

    def __init__(self, out: int = 3, classes: int = 0, channels: int = 3):
        super().__init__()
        self.first, self.relu = nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, out, 3, padding=1))
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Linear(out, classes) if classes else None

    def forward(self, x):
        y = self.up(self.body(self.relu(self.first(x))))
        return y if self.head is None else self.head(y.mean((2, 3)))


def scope(**options) -> LinearScope:
    torch.manual_seed(0)
    model = attach(Enlarger(**options).eval(), layout="modules", labels=["a, b", "c", "d", "e"])
    return LinearScope(model, torch.rand(1, options.get("channels", 3), 10, 12))


def compiled(drawn) -> dict:
    import vl_convert

    return vl_convert.vegalite_to_vega(json.loads(json.dumps(drawn.to_dict(), allow_nan=False)))


def pixels(drawn, panel: int) -> np.ndarray:
    """What a panel of a figure shows."""
    from PIL import Image

    url = drawn.to_dict()["datasets"][f"panel{panel}"][0]["url"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def titles(drawn) -> list[str]:
    return [part["title"]["text"] for line in drawn.to_dict()["vconcat"] for part in line.get("hconcat", [])]


FIGURES = {
    "parts": lambda: chart(scope()), "parts of one channel": lambda: chart(scope(out=1, channels=1)),
    "parts of two channels": lambda: chart(scope(out=2)),
    "impulse": lambda: chart(scope(), figure="impulse", at=(3, 4)),
    "impulse in a corner": lambda: chart(scope(), figure="impulse", at=(0, 11)),
    "receptive": lambda: chart(scope(), figure="receptive", at=(7, 9), radius=3),
    "receptive of a class": lambda: chart(scope(classes=4), at="a, b"),
    "strip": lambda: chart(scope(), figure="strip", along=[(3, 1), (3, 2), (3, 3)], radius=2),
    "values": lambda: chart(scope().svd(4), expected=2.0), "pairs": lambda: chart(scope().svd(4), figure="pairs"),
    "pairs of one channel": lambda: chart(scope(out=1, channels=1).svd(3), figure="pairs", count=2),
    "outputs": lambda: chart(scope(classes=4)), "votes of classes": lambda: chart(scope(classes=4), figure="votes"),
    "maps of constants": lambda: chart(scope(classes=4).bias_report(1), figure="maps"),
    "token blocks": lambda: chart(token_blocks()),
    "bias": lambda: chart(scope(classes=4).bias_report(1), linear=0.5),
}  # fmt: skip


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_found_by_type_and_compiles(make, recwarn):
    assert compiled(make())["marks"]
    assert [w for w in recwarn if "altair" in str(w.message).lower()] == []


def test_types_that_can_be_drawn():
    found = scope(classes=4)
    assert all(map(can_draw, (found, found.bias_report(0), found.svd(2))))


# Pictures


def test_signed_colours_are_those_of_the_charts():
    ends = signed(torch.tensor([[-2.0, -1.0, 0.0, 1.0, 5.0]]), 1.0)[0].tolist()
    assert ends[0] == ends[1] == [0x99, 0x4A, 0x07]
    assert ends[2] == [0xF2, 0xF0, 0xEB]
    assert ends[3] == ends[4] == [0x13, 0x4B, 0x85]
    assert signed(torch.zeros(2, 2), 0.0).shape == (2, 2, 3)


def test_pictures_are_clipped_to_their_range():
    assert colours(torch.tensor([[-1.0, 0.5, 2.0]]), 0.0, 1.0)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    assert colours(torch.ones(3, 4, 5), 1.0, 1.0).shape == (4, 5, 3)


def test_a_panel_shows_each_pixel_as_a_square():
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    shown = pixels(picture_grid([Panel("", picture)], size=40), 0)
    assert shown.shape == (40, 80, 3)
    assert (shown[10, 10::20] == picture[0]).all()


def test_a_grid_has_lines_of_columns_and_one_scale():
    panels = [Panel(str(n), np.zeros((2, 2, 3), np.uint8)) for n in range(5)]
    drawn = picture_grid(panels, columns=2, limit=3.0, of="F").to_dict()
    assert [len(line.get("hconcat", [])) for line in drawn["vconcat"]] == [2, 2, 1, 0]
    bar = drawn["vconcat"][-1]["layer"][1]["encoding"]["x"]
    assert bar["scale"]["domain"] == [-3.0, 3.0]
    assert bar["axis"]["title"] == "F"
    with pytest.raises(ArgumentError, match="0 panels in 4 columns"):
        picture_grid([])


# What is drawn is what was computed


def test_responses_are_columns_and_rows_of_f():
    held = scope()
    whole = held.dense().reshape(3, 20, 24, 3, 10, 12)
    torch.testing.assert_close(impulse_response(held, [(3, 4)])[0], whole[:, :, :, :, 3, 4].sum(-1).mean(0))
    torch.testing.assert_close(receptive_filter(held, (7, 9)), whole[:, 7, 9].mean(0).sum(0), atol=1e-6, rtol=1e-4)
    classes = scope(classes=4)
    torch.testing.assert_close(receptive_filter(classes, "c"), classes.rows([1])[0].sum(0))


def test_parts_share_one_scale():
    held = scope(out=1, channels=1)
    drawn = chart(held)
    limit = max(float(v.abs().max()) for v in (held.x, held.y, held.Fx, held.r))
    for n, value in enumerate((held.x, held.y, held.Fx, held.r)):
        shown = pixels(drawn, n)
        factor = shown.shape[0] // value.shape[2]
        assert (shown[factor // 2 :: factor, factor // 2 :: factor] == signed(value[0, 0], limit)).all()
    assert titles(drawn) == ["reference x", "y", "F x", "r"]
    assert titles(chart(scope(out=2)))[-1] == "r, channel 1"


@pytest.mark.parametrize("at", [(5, 6), (0, 0), (9, 11), (1, 10)])
def test_the_frame_is_on_the_pixel_even_in_corners(at):
    held = scope(out=1, channels=1)
    drawn = chart(held, figure="impulse", at=at, radius=2, size=100)
    frame = drawn.to_dict()["vconcat"][0]["hconcat"][0]["layer"][1]["encoding"]
    x, y = (frame[name]["value"] for name in ("x", "y"))
    corner = [max(0, min(c - 2, n - 5)) for c, n in zip(at, (10, 12), strict=True)]
    assert (y / 20 + corner[0], x / 20 + corner[1]) == at
    shown = pixels(drawn, 0)
    factor = shown.shape[0] // 5
    mine = shown[int(y / 20 * factor) + factor // 2, int(x / 20 * factor) + factor // 2]
    low, high = float(held.x.min()), float(held.x.max())
    assert (mine == colours(held.x[0, 0], low, high)[at]).all()


def test_a_strip_has_a_response_below_each_place():
    drawn = chart(scope(), figure="strip", along=[(3, 1), (3, 2)], radius=2)
    assert [title.split()[0] for title in titles(drawn)] == ["x", "x", "sum", "sum"]


def test_values_that_did_not_converge_are_marked():
    found = SVD(torch.ones(2, 3), torch.tensor([2.0, 1.0]), torch.ones(2, 3), torch.tensor([1e-7, 1e-2]))
    assert [row["held"] for row in chart(found).to_dict()["datasets"]["values"]] == [True, False]


def test_pairs_show_v_above_u():
    assert titles(chart(scope().svd(4), figure="pairs", count=2))[2:] == ["u1", "u2"]


def test_bars_of_constants_and_the_linear_part_sum_to_the_output():
    held = scope(classes=4)
    votes, report = held.votes(1, margin_to=2), held.bias_report(1, margin_to=2)
    parts = chart(report, linear=votes.total).to_dict()["datasets"]["parts"]
    assert sum(part["value"] for part in parts) == pytest.approx(votes.value, abs=1e-6)
    assert parts[-1]["module"] == "F x (the input)"
    assert [row["module"] for row in bias_rows(report)] == list(dict.fromkeys(report.modules))


def test_modules_are_summed_by_the_start_of_their_path():
    report = scope(classes=4).bias_report(0)
    rows = bias_rows(report, depth=1)
    assert [row["module"] for row in rows] == ["first", "body", "head"]
    assert sum(row["value"] for row in rows) == pytest.approx(report.residual, abs=1e-6)


def test_many_modules_are_summed_so_that_bars_fit():
    torch.manual_seed(0)
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(20)])
    held = LinearScope(attach(deep, layout="modules"), torch.randn(1, 4))
    assert len(bias_rows(held.bias_report(0))) == 20


# Refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"figure": "rows"}, "figure='rows'; needed: one of parts, impulse"),
        ({"figure": "impulse"}, "without its place"),
        ({"figure": "strip"}, "along="),
        ({"figure": "impulse", "at": (10, 0)}, r"pixel \(10, 0\); needed: \(row, column\) inside 10 x 12"),
        ({"figure": "receptive", "at": (0, 24)}, "inside 20 x 24"),
        ({"figure": "receptive", "at": 3}, "pixel 3"),
        ({"at_": 3}, "option 'at_' for a figure of LinearScope"),
    ],
)
def test_a_figure_without_its_place_is_refused(options, said):
    with pytest.raises(ArgumentError, match=said):
        chart(scope(), **options)


def test_what_is_no_picture_is_refused():
    held = scope(classes=4)
    with pytest.raises(ArgumentError, match=r"'parts' of a map \[3, 10, 12\] -> \[4\]"):
        chart(held, figure="parts")
    with pytest.raises(ArgumentError, match="figure='spectrum'"):
        chart(held.svd(2), figure="spectrum")
    with pytest.raises(ArgumentError, match="pairs of vectors"):
        chart(held.svd(2), figure="pairs")
    with pytest.raises(ArgumentError, match="depth 0"):
        chart(held.bias_report(0), depth=0)


# Classes, maps of constants, token blocks


def test_outputs_are_drawn_as_f_x_and_r_that_sum():
    held = scope(classes=4)
    table = output_parts(held, top=2, centred=False)
    rows = chart(table).to_dict()["datasets"]["parts"]
    assert {row["name"] for row in rows} == {held.model.labels[r["index"]] for r in table}
    for row in table:
        assert row["F x"] == pytest.approx(float(held.Fx[0, row["index"]]), abs=1e-6)
        assert row["sum"] == pytest.approx(float(held.y[0, row["index"]]), abs=1e-6)
        assert row["F x"] + row["r"] == pytest.approx(row["sum"], abs=1e-5)
    marked = {row["part"]: row["name"] for row in rows if row["largest"]}
    assert marked["sum"] == held.model.labels[int(held.y.argmax())]
    assert marked["r"] == held.model.labels[int(held.r.argmax())]


def test_parts_of_outputs_follow_the_origin_and_may_be_centred():
    held = scope(classes=4)
    moved = LinearScope(held.model, held.x, origin=torch.full((1, 3, 1, 1), 0.5))
    plain, other = (
        {r["index"]: r for r in output_parts(s, top=4, centred=c)} for s, c in ((held, False), (moved, True))
    )
    shift = held.matvec(torch.full(held.in_shape, 0.5))
    mean = float((held.r[0] + shift).mean())
    for k, row in other.items():
        assert row["r"] == pytest.approx(plain[k]["r"] + float(shift[k]) - mean, abs=1e-5)
    assert sum(row["sum"] for row in other.values()) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ArgumentError, match="the 0 largest"):
        output_parts(held, top=0)
    with pytest.raises(ArgumentError, match="classes, or tokens"):
        output_parts(scope())


def test_votes_of_classes_share_one_scale():
    held = scope(classes=4)
    drawn = chart(held, figure="votes", top=2, cell=2)
    best = held.y[0].topk(2).indices.tolist()
    cells = [pool(held.votes(k, margin_to=o).map, 2) for k, o in ((best[0], None), (best[1], None), tuple(best))]
    limit = robust_limit(torch.stack(cells).float())
    for n, each in enumerate(cells, start=1):
        shown = pixels(drawn, n)
        factor = shown.shape[0] // each.shape[0]
        assert (shown[factor // 2 :: factor, factor // 2 :: factor] == signed(each.float(), limit)).all()


def test_the_mean_of_a_map_of_constants_is_what_the_module_contributes():
    report = scope(classes=4).bias_report(1)
    values = {row["module"]: row["value"] for row in report.by_module()}
    maps = bias_maps(report)
    assert set(maps) == set(values) - {"head"}
    for module, each in maps.items():
        assert 100 * float(each.mean()) == pytest.approx(values[module], rel=1e-4)
    weakest = min(maps, key=lambda name: float(maps[name].abs().mean()))
    shown = [title[0] for title in titles(chart(report, figure="maps", count=2))]
    assert shown == [name for name in maps if name != weakest], "in the order in which they run"
    with pytest.raises(ArgumentError, match="figure='map'"):
        chart(report, figure="map")
    with pytest.raises(ArgumentError, match="whose constants have pixels"):
        chart(BiasReport(["a"], ["linear"], torch.ones(1).double(), [torch.tensor(1.0)], 1.0, "x"), figure="maps")


def token_blocks(n: int = 4, **options) -> TokenBlocks:
    norms = (torch.arange(n * n).reshape(n, n) + 1.0).double().tril()
    tokens = [" a", "\n", " a", "</script>"] if n == 4 else None
    return TokenBlocks(norms, None, list(range(n)), tokens, 2 * norms)


def test_blocks_are_drawn_where_they_are_not_zero():
    drawn = chart(token_blocks()).to_dict()
    rows = drawn["datasets"]["blocks"]
    assert len(rows) == 10
    assert rows[-1]["value"] == 16.0
    assert chart(token_blocks(), of="contributions").to_dict()["datasets"]["blocks"][-1]["value"] == 32.0
    colour = drawn["layer"][0]["encoding"]["color"]["scale"]
    assert colour["type"] == "log"
    assert colour["domain"][0] == 5.0, "the first token's own block does not count"
    assert 15.9 < colour["domain"][1] <= 16.0
    assert chart(token_blocks(), scale="linear").to_dict()["layer"][0]["encoding"]["color"]["scale"]["domain"][0] == 0


def test_blocks_without_norms_with_errors_and_too_many():
    assert compiled(chart(TokenBlocks(torch.zeros(2, 2).double(), None, [0, 1], None, torch.zeros(2, 2))))["marks"]
    norms, errors = torch.ones(2, 6).double(), torch.full((2, 6), 0.1).double()
    estimated = TokenBlocks(norms, errors, [2, 5], [*"abcdef"], norms)
    assert chart(estimated).to_dict()["datasets"]["blocks"][0]["error"] == pytest.approx(0.1)
    with pytest.raises(ArgumentError, match=r"65 x 65 blocks; needed: at most 4,096; give token_blocks fewer"):
        chart(token_blocks(65))
    for option, value in {"scale": "square", "of": "norm"}.items():
        with pytest.raises(ArgumentError, match=f"{option}='{value}'"):
            chart(token_blocks(), **{option: value})
