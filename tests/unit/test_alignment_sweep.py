"""Sweeps of alignments: each cell against an alignment by itself, curves and intervals by hand, kills and locks."""

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from scipy.stats import t

import interp
from interp.causal import (
    Alignment,
    AlignmentSweep,
    CausalModel,
    Partition,
    Training,
    build_map,
    hierarchical_equality,
    map_name,
    mlp,
    sweep,
)  # fmt: skip
from interp.causal.networks import untrained
from interp.hooks.errors import ArgumentError, RunError, ShapeMismatchError, SiteNotFoundError
from interp.runs.kept import Kept
from interp.saving import load_result, save_result

TASK = hierarchical_equality()
TRAINING = Training(steps=16, batch_size=64, lr=1e-2)
REVNET = {"kind": "revnet", "blocks": 1, "hidden": 4}
pytestmark = pytest.mark.filterwarnings("ignore::interp.causal.report.CausalAbstractionWarning")


@pytest.fixture(scope="module")
def data():
    return TASK.splits(300, 200, 400)


@pytest.fixture(scope="module")
def networks():
    """Untrained, with weights so large that a swap changes answers."""
    found = [mlp(TASK, seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        for network in found:
            for parameter in network.parameters():
                parameter.mul_(2)
    return [interp.attach(network) for network in found]


@pytest.fixture(scope="module")
def swept(data, networks):
    return sweep(
        networks, data, ["block1", "block2"], ["identity", "orthogonal", REVNET], sizes=[4, 8], seeds=(0, 1),
        training=TRAINING, restarts=2, measure=False,
    )  # fmt: skip


def alone(data, network, site, spec, size, seed):
    """Validation loss and test accuracy of one alignment that is trained by itself."""
    tau = build_map(spec, 16, seed=seed)
    found = Alignment(network, TASK.causal_model, site, tau, Partition({"v1": size, "v2": size}))
    loss = found.fit(data, training=TRAINING).validation_loss
    return loss, found.evaluate(data, controls=(), measure=False).scores[0].headline.estimate


# Rows ---


def test_there_is_a_row_for_each_cell(swept):
    assert len(swept.rows) == 3 * 2 * 2 * 2
    assert (swept.maps, swept.sites) == (["identity", "orthogonal", "revnet 1x4"], ["block1", "block2"])
    assert len({(r["map"], r["site"], r["size"], r["seed"]) for r in swept.rows}) == len(swept.rows)
    assert list(swept.to_frame()["seed"][:2]) == [0, 1]


@pytest.mark.parametrize(("site", "size", "seed"), [("block1", 8, 0), ("block2", 4, 1)])
def test_a_cell_is_an_alignment_by_itself_and_its_control_the_best_on_an_untrained_network(
    swept, data, networks, site, size, seed
):
    (row,) = [r for r in swept.rows if (r["map"], r["site"], r["size"], r["seed"]) == ("revnet 1x4", site, size, seed)]
    loss, accuracy = alone(data, networks[seed], site, REVNET, size, seed)
    assert row["validation loss"] == pytest.approx(loss, abs=1e-5)
    assert row["iia"] == pytest.approx(accuracy, abs=0.01)
    network = untrained(networks[seed], 10_000 + seed)
    restarts = [alone(data, network, site, REVNET, size, 10_000 * (r + 1) + seed) for r in range(2)]
    best = min(restarts)
    assert row["random validation loss"] == pytest.approx(best[0], abs=1e-5)
    assert row["random"] == pytest.approx(best[1], abs=0.01)
    assert row["random restarts"] == pytest.approx([r[1] for r in restarts], abs=0.01)
    assert row["selectivity"] == row["iia"] - row["random"]


def test_shuffled_labels_are_those_of_the_control(swept, data, networks):
    (row,) = [r for r in swept.rows if (r["map"], r["site"], r["size"], r["seed"]) == ("orthogonal", "block1", 8, 0)]
    found = Alignment(
        networks[0], TASK.causal_model, "block1", build_map({"kind": "orthogonal"}, 16, seed=0),
        Partition({"v1": 8, "v2": 8}),
    )  # fmt: skip
    found.fit(data.train.shuffled(10_000), data.validation.shuffled(10_000), TRAINING)
    score = found.evaluate(data, controls=(), measure=False).scores[0]
    assert row["shuffled"] == pytest.approx(score.headline.estimate, abs=0.01)
    assert all(r["shuffled"] is None for r in swept.rows if r["map"] == "identity")


def test_stack_size_changes_nothing(swept, data, networks):
    one = sweep(
        networks, data, ["block1", "block2"], [REVNET], sizes=[4, 8], seeds=(0, 1), training=TRAINING, restarts=2,
        measure=False, lanes=1,
    )  # fmt: skip
    rows = [r for r in swept.rows if r["map"] == "revnet 1x4"]
    assert [r["validation loss"] for r in one.rows] == pytest.approx([r["validation loss"] for r in rows], abs=1e-5)
    assert [r["plain"] for r in one.rows] == pytest.approx([r["plain"] for r in rows], abs=0.01)


def test_further_controls(data, networks):
    crossed = lambda x, y: (x[:, 0] > 0) == (y[:, 0] > 0)
    wrong = CausalModel(
        ["x1", "x2", "x3", "x4"], {"v1": (["x1", "x3"], crossed), "v2": (["x2", "x4"], crossed)},
        (["v1", "v2"], lambda a, b: a == b), name="wrong",
    )  # fmt: skip
    found = sweep(
        networks[0], data, ["block1"], ["orthogonal"], sizes=[4], training=TRAINING, restarts=1, wrong=wrong,
        permuted=True, measure=False,
    )  # fmt: skip
    row = found.rows[0]
    one = Alignment(
        networks[0], TASK.causal_model, "block1", build_map({"kind": "orthogonal"}, 16, seed=0),
        Partition({"v1": 4, "v2": 4}),
    )  # fmt: skip
    one.fit(data, training=TRAINING)
    report = one.evaluate(data, controls=("permuted",), measure=False)
    assert row["permuted"] == pytest.approx(report.controls["permuted"].value, abs=0.01)
    assert 0.2 < row["wrong algorithm"] < 0.8
    assert row["effective dimension"] == (16**2 - 2 * 4**2 - 8**2) / 2
    assert "algorithm wrong" in found.controls


# Summary, choice and frontier ---


def made(*cells):
    """A sweep of given numbers: (map, complexity, iia by seed, random by seed, which random were trained)."""
    rows = []
    for name, complexity, iia, random, trained in cells:
        for seed, (value, control, left) in enumerate(zip(iia, random, trained, strict=True)):
            rows.append({
                "map": name, "site": "s", "size": 1, "seed": seed, "split": "test", "iia": value, "low": 0.1,
                "high": 0.9, "plain": value, "random": control, "random plain": control, "random trained": left,
                "shuffled": 0.5, "trained": True, "best constant": 0.5, "model accuracy": 1.0,
                "validation loss": 1 - value, "random validation loss": 1 - control, "effective dimension": complexity,
            })  # fmt: skip
    return AlignmentSweep(rows, "algorithm", ["v"], "budget", "controls")


CURVES = made(
    ("plain", 0.0, [0.6, 0.6], [0.5, 0.5], [True, True]), ("worse", 9.0, [0.5, 0.55], [0.52, 0.52], [True, True]),
    ("middle", 9.0, [0.7, 0.9], [0.5, 0.6], [False, True]), ("large", 99.0, [0.9, 1.0], [0.9, 0.9], [True, True]),
)  # fmt: skip


def test_a_summary_has_students_intervals_and_leaves_out_controls_that_did_not_train():
    row = CURVES.summary()[2]
    half = t.ppf(0.975, 1) * math.sqrt(0.02) / math.sqrt(2)
    assert (row["iia"], row["low"], row["high"]) == (pytest.approx(0.8), max(0, 0.8 - half), min(1, 0.8 + half))
    assert row["sd"] == pytest.approx(math.sqrt(0.02))
    assert (row["random"], row["random trained"]) == (0.6, 1)
    assert row["selectivity"] == pytest.approx(0.3)
    large = CURVES.summary()[3]
    half = t.ppf(0.975, 1) * math.sqrt(0.005) / math.sqrt(2)
    assert large["selectivity low"] == pytest.approx(0.05 - half)
    assert made(("m", 1.0, [0.7], [0.5], [True])).summary()[0]["high"] == 0.9


def test_the_frontier_drops_what_a_simpler_map_reaches_and_its_area_is_that_of_steps():
    found = CURVES.frontier()
    assert [r["map"] for r in found.rows] == ["plain", "middle", "worse", "large"]
    assert [r["map"] for r in found.kept] == ["plain", "middle", "large"]
    assert [r["random best"] for r in found.rows] == [0.5, 0.6, 0.6, 0.9]
    # log10(1 + 0, 9, 99) = 0, 1, 2: 0.6 - 0.5 over the first half, 0.8 - 0.6 over the second.
    assert found.areas == {"s": pytest.approx((0.1 + 0.2) / 2)}
    flat = CURVES.frontier(measure="selectivity")
    assert [r["random best"] for r in flat.rows] == [0.0] * 4
    assert [r["map"] for r in flat.kept] == ["plain", "middle"]


def test_test_pairs_have_no_part_in_the_choice():
    found = made(("a", 1.0, [0.6], [0.5], [True]), ("b", 1.0, [0.9], [0.85], [True]))
    assert found.best()["map"] == "a"
    for row in found.rows:
        row["iia"] = 1 - row["iia"]
    assert found.best()["map"] == "a"
    assert found.best("b")["map"] == "b"
    with pytest.raises(ArgumentError, match=r"map='c'.*one of \['a', 'b'\]"):
        found.best("c")


def test_no_accuracy_is_shown_without_its_controls(swept):
    text = repr(swept)
    assert "random N" in text
    assert "shuffled" in text
    assert "selectivity" in text
    assert "16 steps" in text
    assert "frontier from that of untrained networks" in text
    assert "random best" in repr(swept.frontier("block1"))


def test_what_a_frontier_cannot_be_drawn_for_is_refused(swept):
    for options in ({"site": "block9"}, {"measure": "loss"}, {"complexity": "stretch max"}, {"split": "names"}):
        with pytest.raises((ArgumentError, TypeCheckError)):
            swept.frontier(**options)


def test_a_sweep_is_saved_and_read_back(swept, tmp_path):
    for result in (swept, swept.frontier()):
        save_result(result, tmp_path / "found")
        read = load_result(tmp_path / "found")
        assert (read.to_records(), repr(read)) == (result.to_records(), repr(result))


# Folders ---


def small(folder, progress):
    """Four stacks: one for each map and site."""
    return sweep(
        interp.attach(mlp(TASK)), TASK.splits(100, 50, 60), ["block1", "block2"], ["orthogonal", "invertible"],
        sizes=[4, 8], training=Training(steps=16, batch_size=64), restarts=1, measure=False, lanes=6, path=folder,
        progress=progress,
    )  # fmt: skip


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tests.unit.test_alignment_sweep import small
small(sys.argv[1], lambda line: line.startswith("stack 3 of 4") and os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_as_one_that_was_not(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 4
    said = []
    found = small(tmp_path, said.append)
    assert {line.split(",")[0] for line in said} == {"stack 3 of 4", "stack 4 of 4"}
    assert found.rows == small(None, said.append).rows


def test_finished_cells_are_read_and_a_line_that_was_cut_off_is_computed_again(data, networks, tmp_path):
    options = {"sizes": [4], "training": Training(steps=8, batch_size=64), "restarts": 1, "measure": False}
    lines = []
    call = lambda maps, **more: sweep(
        networks[0], data, ["block1"], maps, path=tmp_path, progress=lines.append, **options | more
    )
    first = call(["orthogonal"])
    assert lines
    lines.clear()
    assert call(["orthogonal"]).rows == first.rows
    assert lines == []
    both = call(["invertible", "orthogonal"])
    assert not [line for line in lines if "orthogonal" in line]
    assert both.rows[1] == first.rows[0]
    call(["orthogonal"], training=Training(steps=9, batch_size=64))
    file = tmp_path / "cells.jsonl"
    assert len(file.read_text().splitlines()) == 3
    file.write_text(file.read_text()[:-30])
    assert call(["orthogonal"], training=Training(steps=9, batch_size=64)).rows[0]["steps"] == 9
    with Kept(tmp_path, "cells.jsonl") as kept:
        assert len(kept.rows) == 3


def test_a_folder_belongs_to_one_process(data, networks, tmp_path):
    with Kept(tmp_path, "cells.jsonl"), pytest.raises(RunError, match="one process at a time"):
        sweep(networks[0], data, ["block1"], ["identity"], sizes=[4], path=tmp_path)
    with Kept(tmp_path, "cells.jsonl"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="a folder that can be written"), Kept(tmp_path / "file", "cells.jsonl"):
        pass


# What is refused before any work ---


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"maps": []}, ArgumentError, "different maps"), ({"maps": ["pca", "pca"]}, ArgumentError, "different maps"),
        ({"maps": ["curved"]}, ArgumentError, "a kind: identity"),
        ({"maps": [{"kind": "revnet", "depth": 3}]}, ArgumentError, "options of RevNetMap"),
        ({"sites": ["block7"]}, SiteNotFoundError, "block7"), ({"sites": []}, ArgumentError, "different sites"),
        ({"sizes": [9]}, ShapeMismatchError, "at most 16 coordinates"), ({"sizes": [4, 4]}, ArgumentError, "sizes"),
        ({"seeds": (1, 1)}, ArgumentError, "different seeds"), ({"seeds": range(3)}, ArgumentError, "2 networks for 3"),
        ({"restarts": 0}, ArgumentError, "restarts=0"), ({"random_models": []}, ArgumentError, "0 networks for 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_work(data, networks, change, error, words, tmp_path):
    options = {"sites": ["block1"], "maps": ["orthogonal"], "sizes": [4], "seeds": (0, 1)} | change
    said = []
    with pytest.raises(error, match=words):
        sweep(
            networks,
            data,
            options.pop("sites"),
            options.pop("maps"),
            path=tmp_path / "f",
            progress=said.append,
            **options,
        )
    assert said == []
    assert not Path(tmp_path / "f").exists()


def test_names_of_maps():
    assert map_name("pca") == "pca"
    assert map_name(REVNET) == "revnet 1x4"
    assert map_name({"kind": "boundless", "variables": 2, "price": 0.5}) == "boundless price=0.5 variables=2"
