"""The explorer's pages Runs and Probes: saved runs without a model, broken ones, two compared."""

import json
import shutil

import numpy as np
import pytest
import torch

import interp
from interp.hooks.table import Table
from interp.intervals import Interval
from interp.probes.curves import LearningCurve, TransferMatrix
from interp.probes.sweeps import ProbeSweep
from interp.probes.use import ProbeUse
from tests.apps.explorer_app import check_scripts


@pytest.fixture
def runs(explorer, monkeypatch, tiny_run, tmp_path):
    """An explorer on a copy of the tiny demo's run; loading a model fails."""

    def load(name, **_):
        raise AssertionError("a saved run needs no model")

    monkeypatch.setattr(interp, "load", load)
    copy = tmp_path / "runs" / tiny_run.path.name
    shutil.copytree(tiny_run.path, copy)
    monkeypatch.setenv("INTERP_EXPLORE_RUN", str(copy))
    return lambda **fields: explorer(**fields), copy


def test_a_run_opens_without_its_model(runs):
    open_, path = runs
    app = open_().settle()
    assert app.errors == []
    assert len(app.figures) >= 8
    assert check_scripts_of(app) == len(app.figures)
    assert any(path.name in c.value for c in app.at.get("dataframe") or []) or path.name in app.words.replace("\\", "")


def check_scripts_of(app):
    """As `check_scripts`, of the scripts that end in a figure."""
    texts = [t for t in app.scripts if "figure = " in t]

    class Shown:
        scripts, figures = texts, app.figures

    return check_scripts(Shown)


def test_a_newer_format_is_said_and_listed(runs):
    open_, path = runs
    provenance = json.loads((path / "provenance.json").read_text())
    (path / "provenance.json").write_text(json.dumps(provenance | {"format": 99}))
    app = open_().settle()
    assert "format 99" in app.errors[0]
    assert "update interp" in app.errors[0]


BROKEN = {
    "cut off": lambda data: data[: len(data) // 2],
    "no JSON": lambda _: b"{",
    "without fields": lambda _: json.dumps({"format": 1, "type": "LogitLens", "fields": {}}).encode(),
}


@pytest.mark.parametrize("how", BROKEN.values(), ids=BROKEN)
def test_a_broken_result_is_said_and_the_others_are_shown(runs, how):
    open_, path = runs
    whole = len(open_().settle().figures)
    file = path / "results" / "prompt-1-lens.json"
    file.write_bytes(how(file.read_bytes()))
    app = open_().settle()
    assert len(app.errors) == 1
    assert "prompt" in app.errors[0]
    assert len(app.figures) == whole - 1


def test_cut_off_tensors_are_said(runs):
    open_, path = runs
    file = path / "results" / "prompt-1-lens.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    app = open_().settle()
    assert "cannot be read" in app.errors[0]


def test_two_runs_are_compared(runs, tiny_run):
    open_, path = runs
    other = path.with_name("demo-00000000-002")
    shutil.copytree(path, other)
    found = interp.Run.open(other)
    table = found.load("completeness").to_records()
    table[0]["value"] += 1.0
    found.save("completeness", Table(table))
    app = open_(other=other.name).settle()
    assert app.titles[-1] == "Two runs"
    compared = interp.compare_runs(interp.Run.open(path), found)
    rows = {row["result"]: row for row in compared.to_records()}
    assert rows["completeness"]["deviation"] == pytest.approx(1.0)
    assert [r["result"] for r in compared.to_records() if r["deviation"]] == ["completeness"]
    assert compared.fields == []


def test_an_empty_folder_is_said(explorer):
    app = explorer(page="Runs").settle()
    assert "no runs" in app.errors[0]
    assert "interp demo" in app.errors[0].replace("\\", "")


def test_addresses_do_not_leave_the_folder(runs):
    open_, _ = runs
    assert "the name of a run" in open_(page="Runs", run="../elsewhere").settle().errors[0]


# Probes


def sweep() -> ProbeSweep:
    rows = [
        {"site": f"blocks.{layer}.hook_resid_post", "pool": "mean", "probe": "LP", "seed": 0, "fold": fold,
         "value": 0.6 + 0.1 * layer, "control": 0.5, "inner": -0.6 + 0.1 * layer, "n": 10, "fit_seconds": 0.1,
         "converged": True}
        for layer in range(3) for fold in range(2)
    ]  # fmt: skip
    return ProbeSweep(rows, "balanced_accuracy", 0.5, "shuffled labels")


def test_results_of_probing_have_a_page(runs):
    open_, path = runs
    assert "Probes" not in open_().settle().at.radio[0].options
    run = interp.Run.open(path)
    run.save("movies-sweep", sweep())
    run.save("movies-curve", LearningCurve([8, 64], np.array([[0.6, 0.7], [0.8, 0.9]]), 0.5))
    run.save("movies-transfer", TransferMatrix(["a", "b"], np.array([[0.9, 0.6], [0.5, 0.8]]), 0.5))
    app = open_(page="Probes").settle()
    assert app.errors == []
    assert len(app.figures) == 3
    assert check_scripts(app) == 3
    assert "did not see" in app.words


def test_what_a_direction_does_stands_beside_the_sweep(runs):
    open_, path = runs
    run, made = interp.Run.open(path), np.random.default_rng(0)
    change, others = made.normal(size=30) + 3, made.normal(size=(20, 30))
    score = Interval(3.0, 2.0, 4.0, 0.95, "examples")
    run.save("movies-use", ProbeUse("blocks.1", 1, np.zeros(30), change, others, others, 0.2, 0.2, score))
    assert "Probes" not in open_().settle().at.radio[0].options
    run.save("movies-sweep", sweep())
    app = open_(page="Probes").settle()
    assert app.errors == []
    assert "decodable and used" in app.words
    (shown,) = [frame.value for frame in app.at.dataframe if "mean change" in frame.value.columns]
    assert float(shown["mean change"][0]) == pytest.approx(change.mean())


def test_comparison_sees_shapes_words_and_what_is_missing(tmp_path):
    first, second = (interp.Run.create(tmp_path, "demo", {"k": k, "same": [1]}) for k in (1, 2))
    for run, tensor, word in ((first, torch.zeros(2), "a"), (second, torch.ones(3), "b")):
        run.save("rows", Table([{"word": word, "n": 1.0}]))
        run.save("svd", interp.LayerSpectra("a", "b", [0], [0], tensor.reshape(1, 1, -1)))
    first.save("alone", Table([{"n": 1}]))
    found = interp.compare_runs(first, second)
    rows = {row["result"]: row for row in found.to_records()}
    assert rows["rows"]["note"] == "1 words differ"
    assert rows["rows"]["deviation"] == 0
    assert "shapes [1, 1, 2] and [1, 1, 3]" in rows["svd"]["note"]
    assert rows["alone"]["note"] == f"not in {second.path.name}"
    assert [(r["field"], r["first"], r["second"]) for r in found.fields if r["what"] == "specification"] == [
        ("k", "1", "2")
    ]
