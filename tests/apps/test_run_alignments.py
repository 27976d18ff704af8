"""Runs and figures of alignments: computed, drawn, reported; and refused before there is a folder."""

import json

import pytest
import torch
from safetensors.torch import load_model
from typer.testing import CliRunner

from interp.apps import cli
from interp.apps.report import sections
from interp.causal import load_alignment, mlp
from interp.causal.scoring import score_lanes
from interp.causal.sweep_result import AlignmentSweep
from interp.hooks.attach import attach
from interp.hooks.errors import ArgumentError
from interp.plots import can_draw, chart
from interp.runs import alignment_specs
from interp.runs.again import resume
from interp.runs.run import Run
from interp.runs.specs import execute, read_spec
from tests.apps.samples import HOSTILE

SPEC = """
kind: alignment_sweep
task: hierarchical_equality
algorithm: both
network: {blocks: 2, samples: 1024, epochs: 1}
sites: [block1, block2]
maps: [identity, orthogonal, {kind: revnet, blocks: 1, hidden: 4}]
sizes: [8]
seeds: [0, 3]
pairs: {train: 200, validation: 100, test: 100}
training: {steps: 4, batch_size: 64}
restarts: 1
measure: false
"""


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(text: str):
        (tmp_path / "spec.yaml").write_text(text)
        return CliRunner().invoke(cli.app, ["run", "spec.yaml"])

    return run


def test_alignments_are_computed_drawn_and_reported(call, tmp_path):
    result = call(SPEC)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "runs").iterdir()
    run = Run.open(path)
    assert run.state == "finished"
    assert run.names == ["networks", "sweep", "summary", "frontier", "alignment", "examples"]
    best, kept = run.load("sweep").best(), run.load("alignment")
    assert kept.sites == [best["site"]]
    assert {r["right"] for r in run.load("examples")} <= {True, False}
    found = run.load("sweep")
    assert {r["seed"] for r in found.rows} == {0, 3}
    assert found.maps == ["identity", "orthogonal", "revnet 1x4"]
    assert len((path / "cells" / "cells.jsonl").read_text().splitlines()) == len(found.rows) == 3 * 2 * 2
    (section,) = sections(run)
    assert (section.text, len(section.figures)) == ("hierarchical equality: both equalities", 2)
    assert "Accuracy against complexity" in (path / "report.html").read_text()
    assert len(list((path / "figures").glob("*.png"))) == 2


@pytest.mark.parametrize("kind", ["pca", "identity", "orthogonal"])
def test_the_map_that_is_kept_scores_as_it_did_in_the_sweep(tmp_path, kind):
    (tmp_path / "spec.yaml").write_text(
        SPEC.replace("[identity, orthogonal, {kind: revnet, blocks: 1, hidden: 4}]", f"[{kind}]")
    )
    spec = read_spec(tmp_path / "spec.yaml")
    run = execute(spec, tmp_path / "runs")
    best, task = run.load("sweep").best(), spec.made()
    network = mlp(task, blocks=2)
    load_model(network, str(run.path / "cells" / "network-0.safetensors"))
    kept = load_alignment(run.path / "results" / "alignment", attach(network), task.causal_model)
    (score,) = score_lanes([kept.lane], task.splits(**spec.pairs.model_dump()).test)
    (row,) = [r for r in run.load("sweep").rows if (r["seed"], r["site"]) == (0, best["site"])]
    assert score.headline.estimate == pytest.approx(row["iia"], abs=0.02)
    if kind == "pca":
        inputs = task.splits(**spec.pairs.model_dump()).train.pool.inputs
        acts = network[: int(best["site"][-1])](inputs).double()
        axes = torch.linalg.svd(acts - acts.mean(0), full_matrices=False).Vh
        agreement = (axes[:4] @ kept.tau.matrix.double()[:, :4]).abs()
        torch.testing.assert_close(agreement, torch.eye(4).double(), atol=1e-3, rtol=0)
    shown = run.load("examples")
    assert len(shown) == 40
    assert abs(sum(r["right"] for r in shown) / 40 - score.plain) < 0.25


def test_a_run_that_was_interrupted_goes_on_with_its_networks_and_cells(tmp_path, monkeypatch):
    (tmp_path / "spec.yaml").write_text(SPEC)
    spec = read_spec(tmp_path / "spec.yaml")
    whole = execute(spec, tmp_path / "whole")

    def interrupt(line):
        if line.startswith("stack 3 of 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(spec, tmp_path / "runs", interrupt)
    (path,) = (tmp_path / "runs").iterdir()
    assert Run.open(path).names == ["networks"]
    monkeypatch.setattr(alignment_specs, "train_mlps", None)
    said = []
    again = resume(Run.open(path), said.append)
    assert [line for line in said if line.startswith("stack")] == ["stack 3 of 3, revnet 1x4"]
    assert again.load("sweep").rows == whole.load("sweep").rows
    assert again.state == "finished"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("algorithm: both", "algorithm: and_or", "one of both, left, first_argument"),
        ("[block1, block2]", "[block1, block9]", "block9"), ("sizes: [8]", "sizes: [9]", "at most 16 coordinates"),
        ("[identity,", "[curved,", "a kind: identity"), ("hidden: 4", "depth: 4", "options of RevNetMap"),
        ("{kind: revnet,", "{", "a kind, with its options"), ("seeds: [0, 3]", "seeds: [3, 3]", "different seeds"),
        ("steps: 4", "stepps: 4", "did you mean steps"), ("steps: 4", "steps: 0", "greater than or equal to 1"),
        ("restarts: 1", "restart: 1", "did you mean restarts"), ("task: hier", "task: her", "distributive_law"),
    ],
)  # fmt: skip
def test_a_wrong_specification_makes_no_folder(call, tmp_path, old, new, words):
    assert old in SPEC
    result = call(SPEC.replace(old, new))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "runs").exists()


# Figures ---


def sweep_of(names=("plain", "curved"), sizes=(4,)):
    rows = [
        {
            "map": name, "site": site, "size": size, "seed": seed, "split": "test", "iia": 0.6 + 0.1 * n, "low": 0.1,
            "high": 0.9, "plain": 0.6, "random": 0.5 + 0.1 * n, "random plain": 0.5, "random trained": True,
            "shuffled": None if n == 0 else 0.5, "trained": True, "best constant": 0.5, "model accuracy": 1.0,
            "validation loss": 0.1, "random validation loss": 0.2, "effective dimension": 9.0 * n,
        }
        for n, name in enumerate(names) for site in ("block1", "block2") for size in sizes for seed in (0, 1)
    ]  # fmt: skip
    return AlignmentSweep(rows, "algorithm", ["v"], "budget", "controls")


def compiled(drawn):
    import vl_convert

    return vl_convert.vegalite_to_vega(json.loads(json.dumps(drawn.to_dict(), allow_nan=False)))


@pytest.mark.parametrize("options", [{}, {"figure": "grid"}, {"site": "block2", "measure": "selectivity"}])
def test_a_sweep_is_drawn(options):
    for found in (sweep_of(), sweep_of(HOSTILE[:3], (1, 2))):
        assert can_draw(found)
        drawn = chart(found, title=HOSTILE[0], **options)
        assert compiled(drawn)["marks"]
        assert drawn.to_dict()["title"]["text"] == HOSTILE[0]


def test_the_curve_of_untrained_networks_is_beside_that_of_trained_ones():
    found = sweep_of().frontier("block1")
    drawn = chart(found).to_dict()
    curves = drawn["datasets"]["curves0"]
    values = {
        name: [c["value"] for c in curves if c["network"] == name] for name in ("trained network", "untrained network")
    }
    assert values == {"trained network": pytest.approx([0.6, 0.7]), "untrained network": pytest.approx([0.5, 0.6])}
    assert [c["at"] for c in curves[:2]] == [0.0, 1.0]


def test_a_grid_shows_controls_beside_accuracies():
    cells = chart(sweep_of(), figure="grid").to_dict()["datasets"]["cells"]
    assert len(cells) == 4
    assert all({"iia", "random", "shuffled", "selectivity"} <= set(cell) for cell in cells)


def test_rows_of_a_grid_are_those_of_all_maps_where_one_has_no_control():
    drawn = chart(sweep_of(), figure="grid").to_dict()
    names = sorted({cell["map"] for cell in drawn["datasets"]["cells"]})
    panels = [panel["layer"][0]["encoding"]["y"]["scale"]["domain"] for panel in drawn["hconcat"]]
    assert panels == [names] * 4


def test_no_such_figure():
    with pytest.raises(ArgumentError, match="frontier or grid"):
        chart(sweep_of(), figure="bars")
