"""Make notebooks from the tutorials, without outputs: python -m tests.notebooks [FOLDER]."""

import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode, v4

TUTORIALS = Path(__file__).parents[1] / "tutorials"
_CELL, _MARKDOWN = "# %%", "# %% [markdown]"


def notebook(script: str, name: str) -> NotebookNode:
    """The notebook of a percent script: each cell's text as it stands there, prose without its comment signs."""
    before, *cells = ("\n" + script).split(f"\n{_CELL}")
    if before.strip():
        raise ValueError(f"{name}: text in front of the first cell")
    made = v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    for number, cell in enumerate(cells):
        mark, _, text = cell.partition("\n")
        if mark.strip() not in ("", "[markdown]"):
            raise ValueError(f"{name}, cell {number}: {_CELL}{mark} is neither {_CELL} nor {_MARKDOWN}")
        new = v4.new_markdown_cell(_prose(text, name)) if mark.strip() else v4.new_code_cell(text.strip())
        new["id"] = f"{name.replace('_', '-')}-{number}"
        made.cells.append(new)
    nbformat.validate(made)
    return made


def _prose(text: str, name: str) -> str:
    lines = text.strip().splitlines()
    if bare := [line for line in lines if not line.startswith("#")]:
        raise ValueError(f"{name}: {bare[0]!r} in a cell of prose")
    return "\n".join(line[2:] if line.startswith("# ") else line[1:] for line in lines)


def write_notebooks(folder: Path) -> list[Path]:
    """Write the notebook of every tutorial into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for script in sorted(TUTORIALS.glob("*.py")):
        written.append(folder / f"{script.stem}.ipynb")
        nbformat.write(notebook(script.read_text(encoding="utf-8"), script.stem), written[-1])
    return written


if __name__ == "__main__":
    for path in write_notebooks(Path(sys.argv[1] if len(sys.argv) > 1 else "tutorials/notebooks")):
        print(path)
