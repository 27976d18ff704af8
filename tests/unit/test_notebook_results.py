"""Results in a notebook: every public result is a table, a data frame and HTML in which raw token text is escaped."""

import base64
import inspect
import io
import re

import pytest
import torch
from PIL import Image
from torch import nn

import interp
from interp import causal, probes
from interp.attention import AttentionPatterns
from interp.hooks.notebook import coloured_tokens, small_maps
from interp.hooks.votes import Votes

HOSTILE = "<script>alert(1)</script>"
KINDS = (interp.Intervention, Exception, causal.AlignmentMap, nn.Module, interp.LinearMap)
# What is no result: models and data, descriptions of what to do, and operators on tensors.
OTHERS = {
    "ActivationStore", "Alignment", "AverageGradient", "Boundary", "BranchPoint", "CausalModel", "ClosedForms",
    "Grouping", "InterchangeDataset", "LabelledImages", "Layout", "LeaceEraser", "LeaceFitter", "LinearRelation",
    "Linearization", "MeanPoint", "Model", "Observable", "Partition", "Path", "Pool",
    "Reference", "Site", "Splits", "Step", "Task", "TokenSets", "Training", "Unit",
}  # fmt: skip


def classes() -> dict[str, type]:
    """Public classes that may be results: not by their kind something else."""
    found = {name: getattr(face, name) for face in (interp, probes, causal) for name in face.__all__}
    return {
        name: kind
        for name, kind in found.items()
        if inspect.isclass(kind) and not issubclass(kind, KINDS) and not hasattr(kind, "get_params")
    }


def test_every_public_result_has_rows_a_frame_and_html():
    ways = ("to_records", "to_frame", "_repr_html_")
    lacking = {name for name, kind in classes().items() if not all(hasattr(kind, way) for way in ways)}
    assert lacking == OTHERS, "a result derives from interp.hooks.table.Rows; anything else stands in OTHERS"


def votes(labels: list[str], values: list[float]) -> Votes:
    given = torch.tensor(values)
    total = float(given.sum())
    return Votes(given, {"hook_embed": given}, total, float(given.abs().sum()), 0.0, total, labels, HOSTILE)


def patterns() -> AttentionPatterns:
    pattern = torch.softmax(torch.randn(2, 3, 3).masked_fill(torch.ones(3, 3).triu(1) > 0, -torch.inf), -1)
    return AttentionPatterns(4, ["a", HOSTILE, "\n"], pattern)


def test_token_text_is_escaped():
    results = [votes(["a", HOSTILE], [1.0, -2.0]), patterns(), interp.Table([{HOSTILE: HOSTILE}], HOSTILE)]
    for result in results:
        shown = result._repr_html_()
        assert "<script" not in shown
        assert "&lt;script&gt;" in shown


def test_colours_of_tokens_say_sign_and_size():
    shown = coloured_tokens(["a", "b", "c"], torch.tensor([4.0, -2.0, 0.0]))
    assert re.findall(r"rgba\((\d+),\d+,\d+,([\d.]+)\)", shown) == [("47", "0.80"), ("197", "0.40"), ("47", "0.00")]
    assert coloured_tokens(["a"], torch.zeros(1)).count("rgba") == 1


@pytest.mark.parametrize("side", [3, 600])
def test_pictures_of_patterns_hold_the_pattern(side):
    weights = torch.zeros(1, side, side)
    weights[0, -1, 0] = 1.0
    (data,) = re.findall(r"base64,([^\"]+)", small_maps(weights, ["L4H0"]))
    picture = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").tobytes()))
    height = min(side, 200)
    picture = picture.reshape(height, height, 3)
    assert picture[-1, 0].tolist() == [47, 120, 179]
    assert bool((picture.flatten(0, 1).sum(1) == 765).sum() == height**2 - 1)


def test_a_layer_is_shown_head_by_head():
    shown = patterns()._repr_html_()
    assert shown.count("<img") == 2
    assert "L4H1" in shown


def test_what_a_capture_and_a_run_hold(tmp_path):
    model = interp.attach(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    acts = model.capture(torch.ones(2, 4), ["0", "1"])
    assert [(r["site"], r["shape"], r["dtype"]) for r in acts.to_records()] == [
        ("0", [2, 3], "float32"), ("1", [2, 3], "float32"),
    ]  # fmt: skip
    assert acts["0"].shape == (2, 3)
    assert list(acts) == ["0", "1"]
    run = interp.Run.create(tmp_path, "demo", {})
    run.save("votes", interp.Table([{"a": 1}]))
    assert run.to_records() == [{"name": "votes", "kind": "result"}]
    assert "<table>" in run._repr_html_()


def test_frames_hold_the_rows():
    pytest.importorskip("pandas")
    frame = patterns().to_frame()
    assert len(frame) == len(patterns().to_records())
    assert set(frame.columns) == {"layer", "head", "destination", "source", "to", "from", "weight"}
