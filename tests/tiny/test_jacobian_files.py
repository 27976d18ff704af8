"""Jacobians on disk: what anybody reads there, killed and gone on with, refused where something else made it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import interp
from interp.hooks.errors import ArgumentError, SizeError, StoreError
from interp.jacobians import files
from interp.saving import load_result, save_result
from tests.cases import HAND_LAYOUT, IDS, MIXED, build_hand

ENDS = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"
TIGHT = 100_000  # three maps of 32 x 32 in float64 for each example's chunk


@pytest.fixture(scope="module")
def hand():
    return interp.attach(build_hand().double(), layout=interp.Layout(**HAND_LAYOUT))


@pytest.fixture(scope="module")
def wanted(hand):
    return interp.jacobian(hand, MIXED, *ENDS, "same").dense()


def test_a_file_is_plain_safetensors_and_opens_without_the_model(hand, wanted, tmp_path):
    path = tmp_path / "j.safetensors"
    stored = interp.jacobian(hand, MIXED, *ENDS, "same", out=path, budget=TIGHT)
    assert torch.equal(load_file(path)["jacobians"], wanted)
    assert not path.with_name("j.safetensors.progress.json").exists()
    opened = interp.Jacobians.open(path, budget=TIGHT)
    for one in (stored, opened):
        assert one.shape == (15, 32, 32)
        assert torch.equal(torch.cat([chunk for _, chunk in one]), wanted)
        assert len(list(one)) > 1
        v = torch.randn(32, dtype=torch.float64)
        torch.testing.assert_close(one[-1].matvec(v), wanted[-1] @ v)
        torch.testing.assert_close(one[3].rmatvec(v), v @ wanted[3])
        torch.testing.assert_close(one.reduce("mean").value, wanted.mean(0))
        torch.testing.assert_close(one.reduce("gram").value, wanted.flatten(1) @ wanted.flatten(1).T)
    assert opened.to_records()[7]["example"] == 1
    assert opened.record["linearization"] == interp.Linearization.of("exact").to_dict()
    with pytest.raises(SizeError):
        opened.dense()
    with pytest.raises(IndexError):
        opened[15]


def test_half_precision_is_scaled_by_each_map(hand, wanted, tmp_path):
    large = 1e6  # beyond float16
    hand_large = interp.attach(build_hand().double(), layout=interp.Layout(**HAND_LAYOUT), check=False)
    path = tmp_path / "half"
    stored = interp.jacobian(hand, MIXED, *ENDS, "same", out=path, out_dtype=torch.float16)
    assert (stored.dense() - wanted).norm() / wanted.norm() < 3e-4
    assert path.stat().st_size < wanted.nbytes / 3.5
    brain = interp.jacobian(hand, MIXED, *ENDS, "same", out=tmp_path / "bf16", out_dtype=torch.bfloat16)
    assert 1e-4 < (brain.dense() - wanted).norm() / wanted.norm() < 3e-3
    with torch.no_grad():
        hand_large.module.get_submodule(HAND_LAYOUT["unembed"]).weight.mul_(large)
    stored = interp.jacobian(
        hand_large, IDS[:1], ENDS[0], "logits", [3], out=tmp_path / "large", out_dtype=torch.float16
    )
    dense = interp.jacobian(hand_large, IDS[:1], ENDS[0], "logits", [3]).dense()
    assert dense.abs().max() > 65504
    assert (stored.dense() - dense).norm() / dense.norm() < 3e-4


def test_shards_above_a_size(hand, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 4 * 32 * 32 * 8)
    stored = interp.jacobian(hand, MIXED, *ENDS, "same", out=tmp_path / "many", budget=TIGHT)
    names = sorted(p.name for p in (tmp_path / "many").iterdir())
    assert names == [f"jacobians-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert torch.equal(interp.Jacobians.open(tmp_path / "many").dense(), wanted)
    assert torch.equal(stored[13].dense(), wanted[13])
    (tmp_path / "many" / names[2]).unlink()
    with pytest.raises(StoreError, match="all 15"):
        interp.Jacobians.open(tmp_path / "many")


KILLED = """
import os, signal, sys, torch, interp
from tests.cases import HAND_LAYOUT, MIXED, build_hand
from interp.jacobians.results import Jacobians
right, seen = Jacobians._matrices, []
def matrices(self, span, out=None):
    seen.append(span)
    if len(seen) == 4:
        out[0] = 7.0  # a half-written chunk
        os.kill(os.getpid(), signal.SIGKILL)
    return right(self, span, out)
Jacobians._matrices = matrices
hand = interp.attach(build_hand().double(), layout=interp.Layout(**HAND_LAYOUT))
interp.jacobian(hand, MIXED, "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "same", out=sys.argv[1], budget=%d)
"""


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with(hand, tmp_path, monkeypatch):
    path, whole = tmp_path / "j.safetensors", tmp_path / "whole.safetensors"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED % TIGHT, path], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    progress = path.with_name("j.safetensors.progress.json")
    assert len(json.loads(progress.read_text())["done"]) == 3
    with pytest.raises(StoreError, match="not finished"):
        interp.Jacobians.open(path)
    with pytest.raises(StoreError, match="linearization"):
        interp.jacobian(hand, MIXED, *ENDS, "same", out=path, budget=TIGHT, linearization="path")

    made, right = [], interp.Jacobians._matrices
    watch = lambda self, span, out=None: made.append(span.start) or right(self, span, out)
    monkeypatch.setattr(interp.Jacobians, "_matrices", watch)
    interp.jacobian(hand, MIXED, *ENDS, "same", out=path, budget=TIGHT)
    went_on = list(made)
    interp.jacobian(hand, MIXED, *ENDS, "same", out=whole, budget=TIGHT)
    assert len(went_on) == len(made) - len(went_on) - 3
    assert path.read_bytes() == whole.read_bytes()
    assert not progress.exists()
    made.clear()
    interp.jacobian(hand, MIXED, *ENDS, "same", out=path, budget=TIGHT)
    assert not made  # it is all there


def test_what_something_else_made_is_refused(hand, tmp_path):
    path = tmp_path / "j"
    interp.jacobian(hand, IDS, *ENDS, "same", out=path, check=False)
    other = interp.attach(build_hand().double(), layout=interp.Layout(**HAND_LAYOUT))
    with torch.no_grad():
        next(other.module.parameters())[0, 0] += 1
    given = {"model": hand, "inputs": IDS, "positions": "same", "check": False}
    for field, change in {
        "model": {"model": other}, "inputs": {"inputs": [IDS[0], IDS[0]]},
        "places": {"positions": [1, 2]}, "linearization": {"linearization": "frozen"}, "rows": {"rows": [1]},
        "dtype": {"out_dtype": torch.float32},
    }.items():  # fmt: skip
        with pytest.raises(StoreError, match=f"^{field} is"):
            interp.jacobian(source=ENDS[0], target=ENDS[1], out=path, **given | change)
    (tmp_path / "text").write_text("nothing of ours")
    for refused in ("text", "."):
        with pytest.raises(StoreError, match=r"cannot be read|without files"):
            interp.jacobian(hand, MIXED, *ENDS, "same", out=tmp_path / refused)
    with pytest.raises(StoreError, match="folder that exists"):
        interp.jacobian(hand, MIXED, *ENDS, "same", out=tmp_path / "no" / "where")
    with pytest.raises(ArgumentError, match="path as out"):
        interp.jacobian(hand, MIXED, *ENDS, "same", out_dtype=torch.float16)
    with pytest.raises(ArgumentError, match="float16"):
        interp.jacobian(hand, MIXED, *ENDS, "same", out=path, out_dtype=torch.int8)


def test_damage_is_noticed(hand, tmp_path, monkeypatch):
    path = tmp_path / "j"
    interp.jacobian(hand, MIXED, *ENDS, "same", out=path)
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(StoreError, match="as its header says"):
        interp.Jacobians.open(path)
    path.write_bytes(data[:20])
    with pytest.raises(StoreError, match="cannot be read"):
        interp.Jacobians.open(path)
    path.write_bytes(data.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(StoreError, match="update interp"):
        interp.Jacobians.open(path)
    monkeypatch.setattr(files, "_free", lambda path: 1000)
    with pytest.raises(SizeError, match="are free"):
        interp.jacobian(hand, MIXED, *ENDS, "same", out=tmp_path / "full")
    assert not list(tmp_path.glob("full*"))


def test_summaries_and_means_are_saved_without_pickle(hand, wanted, tmp_path):
    summary = interp.jacobian(hand, MIXED, *ENDS, "same", reduce="svd:3")
    save_result(summary, tmp_path / "svd")
    again = load_result(tmp_path / "svd")
    assert torch.equal(again.value, summary.value)
    assert again.to_records() == summary.to_records()
    mean = interp.mean_jacobian(hand, [[one] for one in MIXED], *ENDS, "same")
    torch.testing.assert_close(mean.value, wanted.mean(0))
    old, new = wanted[:7].mean(0), wanted[:10].mean(0)
    torch.testing.assert_close(mean.changes[0], (new - old).norm() / new.norm())
    save_result(mean, tmp_path / "mean")
    again = load_result(tmp_path / "mean")
    parts = [interp.mean_jacobian(hand, [some], *ENDS, "same") for some in (MIXED[:1], MIXED[1:])]
    both = parts[0].merge(parts[1])
    assert both.count == again.count == 15
    torch.testing.assert_close(both.value, again.value)
    assert both.merge(again).count == 30
    parts = interp.attention_parts(hand, IDS[:1], 1, [(2, 5)])
    save_result(parts, tmp_path / "parts")
    assert torch.equal(load_result(tmp_path / "parts").whole, parts.whole)


def test_means_stop_when_settled_and_refuse_what_is_not_alike(hand):
    read = []

    def same():
        for i in range(50):
            read.append(i)
            yield IDS[:1]

    mean = interp.mean_jacobian(hand, same(), *ENDS, [4], tolerance=1e-6)
    assert len(read) == 3
    assert mean.count == 3
    assert mean.to_records()[0]["change"] < 1e-12
    others = [
        interp.mean_jacobian(hand, [IDS[:1]], *ENDS, [4], linearization="path"),
        interp.mean_jacobian(hand, [IDS[:1]], ENDS[0], "blocks.0.hook_resid_post", [4]),
        interp.mean_jacobian(hand, [IDS[:1]], *ENDS, [4], rows=range(32)),
    ]
    for other in others:
        with pytest.raises(ArgumentError, match="means of one thing"):
            mean.merge(other)
    for options, text in (({"tolerance": 0.0}, "positive"), ({"reduce": "norm"}, "reduce=")):
        with pytest.raises(ArgumentError, match=text):
            interp.mean_jacobian(hand, [IDS[:1]], *ENDS, **options)
    with pytest.raises(ArgumentError, match="no batches"):
        interp.mean_jacobian(hand, [], *ENDS)
