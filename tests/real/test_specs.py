"""The specifications beside the tutorials: all can be read, and one is computed as its reader would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from interp.runs.again import verify
from interp.runs.run import Run
from interp.runs.specs import execute, kind_of, make_spec, read_spec

ROOT = Path(__file__).parents[2]
SPECS = sorted(p for p in (ROOT / "tutorials" / "specs").iterdir() if p.suffix in (".yaml", ".toml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_a_specification_can_be_read(path):
    spec = read_spec(path)
    stored = json.loads(json.dumps(spec.model_dump(mode="json")))
    assert make_spec(kind_of(spec), stored, "stored") == spec


def computed(name: str, folder: Path) -> Run:
    """The finished run of a specification, as its reader would make it."""
    command = [sys.executable, "-m", "interp.apps.cli", "run", str(ROOT / "tutorials/specs" / name)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
    (path,) = (folder / "runs").iterdir()
    run = Run.open(path)
    assert run.state == "finished"
    assert (path / "report.html").is_file()
    assert len(run.figures) == len(list((path / "figures").glob("*.png")))
    return run


@pytest.mark.slow
@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_a_specification_gives_the_same_again(path, tmp_path, smollm2):
    done = verify(execute(read_spec(path), tmp_path / "first"), tmp_path / "second")
    assert done.holds, done.table()
    assert len(done.to_records()) > 1


@pytest.mark.slow
def test_pronouns_are_computed(tmp_path, smollm2):
    run = computed("pronouns.yaml", tmp_path)
    assert all(row["completeness error"] < 1e-5 for row in run.load("completeness"))
    found = run.load("couplings")
    assert found.paths[0] == "L26H2"
    assert (found.predicted - found.slopes)[:, 0, 1].abs().max() < 0.1
    assert run.load("paths").correlation > 0.9


@pytest.mark.slow
def test_patching_is_computed(tmp_path, smollm2):
    run = computed("patching.yaml", tmp_path)
    exact, heads = run.load("grid-1"), run.load("grid-2")
    assert exact.clean - exact.corrupt > 5
    # Where the prompts differ, the embedding is all that differs.
    differs = next(i for i, token in enumerate(exact.tokens) if "/" in token)
    assert float(exact.normalised[0, differs]) == pytest.approx(1.0, abs=1e-4)
    assert heads.audit["correlation"] > 0.9


@pytest.mark.slow
def test_the_language_model_is_computed(tmp_path, smollm2):
    run = computed("language_model.yaml", tmp_path)
    assert len(run.figures) == 5
    margin, blocks = run.load("input-1-votes-2"), run.load("input-1-blocks")
    assert (margin.target, margin.residual) == ("' Mary' - ' John'", 0.0)
    assert margin.value == pytest.approx(6.12, abs=0.01)
    assert blocks.norms.triu(1).abs().max() == 0
    assert all(row["completeness error"] < 1e-5 for row in run.load("completeness"))


@pytest.mark.slow
def test_alignments_are_computed_and_the_gap_between_maps_is_the_papers(tmp_path):
    """Hierarchical equality, blocks 1 and 3, two seeds: the ranges of Sutter et al. 2025, at a reduced budget."""
    run = computed("alignments.yaml", tmp_path)
    assert min(run.load("networks").to_frame()["accuracy"]) > 0.99
    found = {(r["map"], r["site"]): r for r in run.load("summary")}
    at = lambda name, block: found[name, f"block{block}"]["plain"]
    assert 0.68 < at("orthogonal", 1) < 0.98
    assert at("orthogonal", 1) < at("invertible", 1)
    assert at("revnet 1x16", 1) > 0.95
    assert at("revnet 1x16", 3) > 0.9
    assert all(0.4 < at(name, 3) < 0.6 for name in ("orthogonal", "invertible"))
    assert all(0.45 < row["random plain"] < 0.55 for row in found.values())
    assert all(row["shuffled"] < 0.8 for (name, _), row in found.items() if name != "identity")
    kept = [r["map"] for r in run.load("frontier").kept if r["site"] == "block1"]
    assert kept == ["identity", "orthogonal", "invertible", "revnet 1x16"]
