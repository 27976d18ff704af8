"""The notebook of the first look runs in a real kernel, and results show as HTML there."""

import os
from importlib import util
from pathlib import Path

import pytest
from nbformat import v4

from tests.conftest import missing
from tests.notebooks import TUTORIALS, notebook

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_first_look_runs_in_a_kernel(tmp_path, smollm2, monkeypatch):
    if lacking := [name for name in ("nbclient", "ipykernel") if util.find_spec(name) is None]:
        missing(f"{', '.join(lacking)} not installed")
    from nbclient import NotebookClient

    made = notebook((TUTORIALS / "first_look.py").read_text(encoding="utf-8"), "first_look")
    made.cells.append(v4.new_code_cell("interp.attention_patterns(model, prompt, 23)"))
    made.cells.append(v4.new_code_cell('interp.LinearScope(model, prompt).votes(" Mary", margin_to=" John")'))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    NotebookClient(made, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    patterns, votes = (cell.outputs[-1].data["text/html"] for cell in made.cells[-2:])
    assert patterns.count("<img") == smollm2.layout.n_heads
    assert 'title="3.7' in votes
    assert "Mary" in "".join(output.get("text", "") for cell in made.cells[:-2] for output in cell.get("outputs", []))
