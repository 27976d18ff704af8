"""The specifications beside the tutorials: all can be read, and one is computed as its reader would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interp.runs import Run
from interp.specs import read_spec

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "tutorials" / "specs").glob("*.yaml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_a_specification_can_be_read(path):
    assert read_spec(path).inputs


@pytest.mark.slow
def test_the_language_model_is_computed(tmp_path, smollm2):
    command = [sys.executable, "-m", "interp.apps.cli", "run", str(ROOT / "tutorials/specs/language_model.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
    (path,) = (tmp_path / "runs").iterdir()
    run = Run.open(path)
    assert run.state == "finished"
    assert (path / "report.html").is_file()
    assert len(run.figures) == len(list((path / "figures").glob("*.png"))) == 5
    margin, blocks = run.load("input-1-votes-2"), run.load("input-1-blocks")
    assert (margin.target, margin.residual) == ("' Mary' - ' John'", 0.0)
    assert margin.value == pytest.approx(6.12, abs=0.01)
    assert blocks.norms.triu(1).abs().max() == 0
    assert all(row["completeness error"] < 1e-5 for row in run.load("completeness"))
