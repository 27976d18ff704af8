"""Notebooks say what the tutorials say, cell by cell."""

import ast

import nbformat
import pytest

from tests.notebooks import TUTORIALS, notebook, write_notebooks

SCRIPT = "# %% [markdown]\n# # Title\n#\n# A line.\n\n# %%\nx = 1\n\n# %%\n# a comment\nprint(x)\n"


def test_cells_of_a_script():
    prose, first, second = notebook(SCRIPT, "one").cells
    assert (prose.cell_type, prose.source) == ("markdown", "# Title\n\nA line.")
    assert (first.cell_type, first.source) == ("code", "x = 1")
    assert second.source == "# a comment\nprint(x)"


@pytest.mark.parametrize(
    ("script", "word"),
    [("x = 1\n# %%\n", "in front"), ("# %% [markdwn]\n# a\n", "neither"), ("# %% [markdown]\nx = 1\n", "prose")],
)
def test_what_is_no_percent_script_is_refused(script, word):
    with pytest.raises(ValueError, match=word):
        notebook(script, "one")


def test_every_tutorial_converts_and_loses_no_code(tmp_path):
    written = write_notebooks(tmp_path)
    assert [path.stem for path in written] == sorted(path.stem for path in TUTORIALS.glob("*.py"))
    for path in written:
        read = nbformat.read(path, as_version=4)
        code = "\n".join(cell.source for cell in read.cells if cell.cell_type == "code")
        script = (TUTORIALS / f"{path.stem}.py").read_text(encoding="utf-8")
        assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(script))
        assert read.cells[0].source.startswith("# "), "a tutorial begins with its title"
        assert not any(cell.get("outputs") for cell in read.cells)
