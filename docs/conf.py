"""Sphinx: the pages of this folder, which are Markdown, and a reference made from docstrings (make docs)."""

import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interp

project, author = "interp", "the authors of interp"
release = version = interp.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"interp {release}"
html_copy_source = False
smartquotes = False

autosummary_generate = True
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_attr_annotations = False
myst_heading_anchors = 3
default_role = "literal"

_CODE = re.compile(r"(``.*?``|`.*?`)")
_ROW = re.compile(r"\s*\|.*\|\s*$")


def plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: their bars and stars are mathematics, not markup."""
    done: list[str] = []
    example = False
    for line in lines:
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if example:
            done.append(line)
        elif _ROW.match(line):
            done += _row(line, first=not (done and done[-1].lstrip().startswith(("* - ", "- "))))
        else:
            done.append(_escaped(line))
    lines[:] = done


def _escaped(text: str) -> str:
    return "".join(
        part if part.startswith("`") else re.sub(r"([*|])", r"\\\1", part) for part in _CODE.split(text)
    )  # fmt: skip


def _row(line: str, *, first: bool) -> list[str]:
    """One row of a Markdown table as one of a list-table, with its head in front of the first."""
    indent = line[: len(line) - len(line.lstrip())]
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    if all(set(cell) <= set("-: ") for cell in cells):
        return []
    head = [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""] if first else []
    stars = ["* - ", *["  - "] * (len(cells) - 1)]
    return head + [f"{indent}   {star}{_escaped(cell)}" for star, cell in zip(stars, cells, strict=True)]


def from_elsewhere(app, what, name, obj, skip, options) -> bool | None:
    """Leave out what a class has from another library: it is documented there."""
    home = getattr(getattr(obj, "fget", None) or getattr(obj, "func", None) or obj, "__module__", None)
    return True if callable(obj) and not (home or "").startswith("interp") else None


def setup(app) -> None:
    """Sphinx calls this."""
    shutil.rmtree(Path(__file__).parent / "api", ignore_errors=True)  # a name that is gone would leave its page
    app.connect("autodoc-process-docstring", plain_text, priority=100)
    app.connect("autodoc-skip-member", from_elsewhere)
