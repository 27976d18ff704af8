"""Figures of paths and couplings: what is drawn is the result's numbers, on scales that are symmetric around zero."""

import pytest
import torch

from interp.hooks.errors import ArgumentError
from interp.patching.grid import PatchGrid
from interp.plots import chart
from interp.propagation.couplings import Couplings
from interp.propagation.path_search import PathSearch
from tests.apps.samples import HOSTILE


def search(count: int = 3) -> PathSearch:
    paths = ["L1H2@3 -> logits@4", "L0MLP -> L1H0@1 -> logits@4", "embed -> logits"][:count]
    return PathSearch(
        "' a' - ' b'", 2.5, -1.0, "linear", paths,
        torch.tensor([2.0, -1.0, 0.5])[:count], torch.tensor([1.75, -1.25, 0.5])[:count], 0.99, 120, [*HOSTILE[:5]],
    )  # fmt: skip


def couplings(paths: int = 2, measured: bool = True) -> Couplings:
    values = torch.randn(paths, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes = (values + 0.1, values.abs().clamp(max=1)) if measured else (None, None)
    return Couplings(
        ["' a' - ' b'", HOSTILE[0], "c"], [f"L{i}H0" for i in range(paths)], ["site"] * paths, values, values.tanh(),
        torch.eye(3, dtype=torch.float64), *slopes, 20,
    )  # fmt: skip


def scales(spec, name="color"):
    """All domains of an encoding in a figure."""
    found = [spec["encoding"][name]["scale"]["domain"]] if "scale" in spec.get("encoding", {}).get(name, {}) else []
    parts = [p for kind in ("layer", "hconcat", "vconcat", "concat") for p in spec.get(kind, [])]
    return found + [domain for part in parts for domain in scales(part, name)]


def test_paths_are_bars_of_exact_effects_with_scores():
    spec = chart(search()).to_dict()
    rows = spec["datasets"]["paths"]
    assert [(r["effect"], r["score"]) for r in rows] == [(1.75, 2.0), (-1.25, -1.0), (0.5, 0.5)]
    assert rows[0]["key"].endswith("L1H2@3 <img src=x … → logits@4 {{ 7 * 7 }}")
    low, high = scales(spec, "x")[0]
    assert low < -1.25 < 0 < 2.0 < high
    assert len(chart(search(), top=1).to_dict()["datasets"]["paths"]) == 1
    points = chart(search(), figure="agreement").to_dict()["datasets"]["points"]
    assert [(p["predicted"], p["measured"]) for p in points][1] == (-1.0, -1.25)


@pytest.mark.parametrize("of", ["coupling", "cosine", "slope"])
def test_a_matrix_of_couplings_is_centred_at_zero(of):
    found = couplings()
    spec = chart(found, of=of).to_dict()
    values = {"coupling": found.predicted, "cosine": found.cosines, "slope": found.slopes}[of]
    assert [r["value"] for r in spec["datasets"]["cells"]] == values.flatten().tolist()
    assert all(low == -high for low, high in scales(spec))
    assert len(spec["concat"]) == 2


def test_predicted_slopes_stand_against_measured_ones_on_one_scale():
    found = couplings()
    spec = chart(found, figure="slopes", title="t").to_dict()
    points = spec["datasets"]["points"]
    assert len(points) == 12
    assert all(p["measured"] == pytest.approx(p["predicted"] + 0.1) for p in points)
    assert spec["datasets"]["line"][0]["predicted"] == spec["datasets"]["line"][0]["measured"]
    assert scales(spec, "x") == [scales(spec, "y")[0]] * len(scales(spec, "x"))


def test_an_audit_is_drawn_from_exact_cells_only():
    runs = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    grid = PatchGrid(
        "m", "attribution", "denoise", {"layer": [0, 1], "head": [0, 1]}, None, runs,
        torch.tensor([5.0]), torch.tensor([0.0]), torch.tensor([1, 3]), torch.tensor([2.5, 3.5]),
    )  # fmt: skip
    points = chart(grid, figure="audit").to_dict()["datasets"]["points"]
    assert [(p["predicted"], p["measured"]) for p in points] == [(2.0, 2.5), (4.0, 3.5)]
    assert points[0]["name"] == "layer 0, head 1"
    bare = PatchGrid("m", "patching", "denoise", grid.axes, None, grid.runs, grid.clean_runs, grid.corrupt_runs)
    with pytest.raises(ArgumentError, match="exact patches beside"):
        chart(bare, figure="audit")


@pytest.mark.parametrize(("result", "options"), [
    (search(), {"figure": "graph"}), (search(), {"top": 0}), (search(0), {}), (couplings(), {"figure": "bars"}),
    (couplings(), {"of": "norm"}), (couplings(measured=False), {"figure": "slopes"}),
    (couplings(measured=False), {"of": "slope"}), (couplings(65), {}),
])  # fmt: skip
def test_figures_that_do_not_exist_are_refused(result, options):
    with pytest.raises(ArgumentError):
        chart(result, **options)


@pytest.mark.parametrize("options", [{}, {"figure": "slopes"}])
def test_figures_render(options):
    import vl_convert

    for spec in (chart(couplings(), **options).to_dict(), chart(search()).to_dict()):
        assert vl_convert.vegalite_to_svg(spec).startswith("<svg")
