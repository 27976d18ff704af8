"""Figures that the explorer brought: true to the numbers, about zero where they are signed, safe with any token."""

import json

import pytest
import torch
import vl_convert
from torch import nn

import interp
from interp.hooks.errors import ArgumentError
from interp.plots import chart
from tests.apps.samples import HOSTILE


def compiled(drawn) -> dict:
    """The figure's plain data, after Vega-Lite has taken it."""
    spec = drawn.to_dict()
    vl_convert.vegalite_to_vega(json.loads(json.dumps(spec, allow_nan=False)))
    return spec


def patterns(n: int, heads: int = 3) -> interp.AttentionPatterns:
    scores = torch.randn(heads, n, n, generator=torch.Generator().manual_seed(0)).tril()
    weights = scores.exp().tril()
    return interp.AttentionPatterns(2, (HOSTILE * n)[:n], weights / weights.sum(-1, keepdim=True))


def test_patterns_of_all_heads_are_pictures_and_one_head_has_its_tokens():
    found = patterns(6)
    pictures = [rows for name, rows in compiled(chart(found))["datasets"].items() if name.startswith("panel")]
    assert len(pictures) == 3
    cells = compiled(chart(found, head=1))["datasets"]["cells"]
    assert len(cells) == 21
    assert sum(c["weight"] for c in cells) == pytest.approx(6)
    with pytest.raises(ArgumentError, match="head 7"):
        chart(found, head=7)


def test_patterns_of_many_tokens_stay_small():
    assert len(json.dumps(compiled(chart(patterns(400, 2))))) < 400_000
    assert len(json.dumps(compiled(chart(patterns(400, 2), head=0)))) < 2_000_000


def test_doses_are_lines_with_a_band():
    response = interp.DoseResponse(
        "' a'", "hook_embed@1", torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 3.0]), torch.tensor([0.5, 2.5]),
        torch.tensor([[1.0, 1.0], [2.0, 2.0]]), 5.0,
    )  # fmt: skip
    sets = compiled(chart(response))["datasets"]
    assert [(r["dose"], r["value"]) for r in sets["lines"] if r["line"] == "measured"] == [(-1.0, 0.0), (1.0, 3.0)]
    assert sets["band"][0]["high"] == pytest.approx(1.5 + 0.5**0.5)


def test_spectra_are_lines_along_the_layers():
    found = interp.LayerSpectra("a", "b", [0, 3], [1, 2], torch.tensor([[[4.0, 2.0], [2.0, 2.0]], [[1.0, 1.0]] * 2]))
    rows = compiled(chart(found))["datasets"]["values"]
    assert [(r["layer"], r["rank"], r["value"]) for r in rows] == [(0, 1, 3.0), (0, 2, 2.0), (3, 1, 1.0), (3, 2, 1.0)]


def test_pixels_answer_by_row_and_column():
    model = interp.attach(nn.Conv2d(3, 3, 1))
    scope = interp.LinearScope(model, torch.rand(1, 3, 4, 5))
    sets = compiled(chart(scope, figure="pixels", at=(1, 2)))["datasets"]
    assert [c["pixel"] for c in sets["cells"]][:6] == ["0,0", "0,1", "0,2", "0,3", "0,4", "1,0"]
    assert sets["frame"] == [{"x": 2, "x2": 3, "y": 1, "y2": 2}]
    large = interp.LinearScope(model, torch.rand(1, 3, 100, 5))
    with pytest.raises(ArgumentError, match="crop"):
        chart(large, figure="pixels")
