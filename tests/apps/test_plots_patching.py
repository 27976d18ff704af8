"""Figures of patching grids, and the cells that they show."""

import json

import pytest
import torch

from interp.hooks.errors import ArgumentError
from interp.patching.grid import PatchGrid
from interp.plots import can_draw, chart
from tests.apps.samples import HOSTILE


def grid(axes, tokens=None, corrupt=-1.0):
    runs = torch.randn(1, *map(len, axes.values()), generator=torch.Generator().manual_seed(0))
    return PatchGrid(
        "' a' - ' b'", "patching", "denoise", axes, tokens, runs, torch.tensor([2.0]), torch.tensor([corrupt])
    )


def compiled(drawn) -> dict:
    import vl_convert

    return vl_convert.vegalite_to_vega(json.loads(json.dumps(drawn.to_dict(), allow_nan=False)))


GRIDS = {
    "layer position": lambda: grid({"layer": [0, 1, 2], "position": [0, 1]}, [HOSTILE[0], "x/y"]),
    "layer head": lambda: grid({"layer": [0, 1], "head": [0, 1, 2]}),
    "one axis": lambda: grid({"sender": ["L0H0", "L1MLP"]}),
    "no axis": lambda: grid({}),
    "sites": lambda: grid({"site": ["z", "q"], "layer": [0, 1], "position": [0, 1], "head": [0, 1]}, ["a", ""]),
    "edges": lambda: grid({"source": ["embed", "L0H0"], "destination": ["L0H0.q", "logits"]}),
}


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
def test_every_grid_has_a_figure_with_all_of_its_cells(make):
    found = make()
    assert can_draw(found)
    drawn = chart(found, title=HOSTILE[0])
    assert compiled(drawn)["marks"]
    rows = drawn.to_dict()["datasets"]["cells"]
    assert len(rows) == found.values.numel()
    assert [r["shown"] for r in rows] == pytest.approx(found.normalised.flatten().tolist())
    wanted = [r["effect"] for r in chart(found, show="effect").to_dict()["datasets"]["cells"]]
    assert wanted == pytest.approx(found.effects.flatten().tolist())


def test_effects_are_shown_where_there_is_no_normalised_form():
    found = grid({"layer": [0, 1], "head": [0, 1]}, corrupt=2.0)
    rows = chart(found).to_dict()["datasets"]["cells"]
    assert [r["shown"] for r in rows] == pytest.approx(found.effects.flatten().tolist())


def test_too_many_panels_and_unknown_values_are_refused():
    with pytest.raises(ArgumentError, match="show='colour'"):
        chart(grid({"layer": [0]}), show="colour")
    with pytest.raises(ArgumentError, match="65 panels"):
        chart(grid({"layer": [0], "position": [0], "head": list(range(65))}))
