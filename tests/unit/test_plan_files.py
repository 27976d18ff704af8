"""Plans are data: they save, load and mean the same; what is not data is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import interp
from interp.hooks.errors import InterventionError
from interp.hooks.interventions import FORMAT


def double(value):
    return 2 * value


PLAN = [
    interp.Set("blocks.0.hook_resid_pre", torch.arange(4.0)),
    interp.Add("blocks.1.attn.hook_z#2@-1", 1.5, scale=-2.0),
    interp.Scale(interp.Site("conv", "in", (0,)), torch.tensor([1, 2], dtype=torch.int64)),
    interp.Zero("blocks.*.hook_mlp_out", head=None, positions=[[0, 1], [2, 3]]),
    interp.Mean("ln_final.hook_normalized", over=["a text", "another"], positions="last"),
    interp.Patch("a", torch.ones(2, 3).T, from_site="b", from_positions=3, positions="cat"),
    interp.ProjectOut("a", torch.eye(2, dtype=torch.bfloat16), head=(1, 2)),
    interp.Erase("a", torch.ones(3, 1), torch.ones(1, 3).double(), torch.zeros(3)),
    interp.Function("a", fn=math.sqrt),
]


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    return list(left) == list(right) if isinstance(left, (list, tuple)) else left == right


def test_round_trip(tmp_path):
    interp.save_plan(PLAN, tmp_path / "plan")
    with pytest.raises(interp.InterpError, match="allow_functions=True"):
        interp.load_plan(tmp_path / "plan")
    loaded = interp.load_plan(tmp_path / "plan", allow_functions=True)
    assert [type(s) for s in loaded] == [type(s) for s in PLAN]
    for old, new in zip(PLAN, loaded, strict=True):
        for name in vars(old):
            assert same(getattr(old, name), getattr(new, name)), (old.kind, name)
        assert new.where == old.where


def test_saved_tensors_are_copies(tmp_path):
    value = torch.zeros(3)
    interp.save_plan([interp.Set("a", value)], tmp_path / "plan")
    value += 1
    assert interp.load_plan(tmp_path / "plan")[0].value.abs().max() == 0


@pytest.mark.parametrize("step", [
    interp.Function("a", fn=lambda v: v),
    interp.Function("a", fn=torch.nn.ReLU()),
    interp.Function("a", fn=[].append),
    interp.Patch("a", {"input_ids": torch.ones(1, 2)}),
    interp.Set("a", object()),
], ids=["lambda", "module", "bound method", "mapping", "object"])  # fmt: skip
def test_what_is_not_data_is_refused_and_leaves_no_file(step, tmp_path):
    with pytest.raises(InterventionError):
        interp.save_plan([step], tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_plan(tmp_path):
    (tmp_path / "text").write_text("not a plan")
    with pytest.raises(InterventionError, match="text"):
        interp.load_plan(tmp_path / "text")
    save_file({"x": torch.ones(1)}, str(tmp_path / "other"))
    with pytest.raises(InterventionError, match="format"):
        interp.load_plan(tmp_path / "other")
    save_file({}, str(tmp_path / "strange"), {"format": FORMAT, "plan": json.dumps([{"kind": "shout", "site": "a"}])})
    with pytest.raises(InterventionError, match="shout"):
        interp.load_plan(tmp_path / "strange")
    save_file({}, str(tmp_path / "newer"), {"format": FORMAT, "plan": json.dumps([{"kind": "zero", "colour": "a"}])})
    with pytest.raises(InterventionError, match="colour"):
        interp.load_plan(tmp_path / "newer")
    with pytest.raises(FileNotFoundError):
        interp.load_plan(tmp_path / "nowhere")


def test_one_step_is_a_plan(tmp_path):
    interp.save_plan(interp.Zero("a"), tmp_path / "plan")
    assert len(interp.load_plan(tmp_path / "plan")) == 1


def test_second_argument_is_the_value_and_the_rest_is_named():
    assert interp.Add("a", 3.0).value == 3.0
    assert interp.Scale("a", 2.0).factor == 2.0
    assert interp.Function("a", math.sqrt).fn is math.sqrt
    with pytest.raises(TypeError):
        interp.Zero("a", 3)  # type: ignore[misc]
    with pytest.raises(TypeError):
        interp.Add("a", 3.0, position=2)  # type: ignore[call-arg]


def test_a_site_that_does_not_parse_is_refused_at_once():
    with pytest.raises(interp.InterpError, match="does not parse"):
        interp.Zero("a b")


@pytest.mark.parametrize("head", ["x", 1.5, [0.5], object()])
def test_heads_that_are_no_ints(head, unchecked):
    with pytest.raises(InterventionError, match="head="):
        interp.Zero("a", head=head)
