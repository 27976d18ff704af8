"""The built pages: no warning, a page for each public name, nothing that a browser would fetch from elsewhere."""

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

import interp
from interp import causal, probes
from tests.conftest import missing

ROOT = Path(__file__).parents[2]
FACES = {"interp": interp, "interp.probes": probes, "interp.causal": causal}
PUBLIC = [f"{module}.{name}" for module, face in FACES.items() for name in face.__all__]


def listed() -> list[str]:
    """Names on the page of the reference, in order."""
    names, module = [], ""
    for line in (ROOT / "docs" / "reference.md").read_text(encoding="utf-8").splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.removeprefix(".. currentmodule:: ")
        elif re.fullmatch(r"   \w+", line):
            names.append(f"{module}.{line.strip()}")
    return names


def test_the_reference_lists_each_public_name_once():
    assert sorted(listed()) == sorted(PUBLIC), "docs/reference.md lists the public names by subject"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The pages, built as `make docs` does."""
    lacking = [name for name in ("sphinx", "myst_parser", "furo") if util.find_spec(name) is None]
    if lacking:
        missing(f"{', '.join(lacking)} not installed: pip install 'interp[docs]'")
    folder = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "2", "-b", "html", "docs", str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.slow
def test_each_public_name_has_a_page_with_its_text(built):
    for name in PUBLIC:
        page = (built / "api" / f"{name}.html").read_text(encoding="utf-8")
        assert f'id="{name}"' in page, name
        assert "<dd><p>" in page, f"{name} has no text"


@pytest.mark.slow
def test_shapes_are_readable_in_signatures(built):
    page = re.sub(r"<[^>]+>", "", (built / "api" / "interp.AttentionPatterns.html").read_text(encoding="utf-8"))
    assert "pattern: Float[Tensor, 'head destination source']" in page


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(built):
    fetched = r"<(?:script|img|iframe)[^>]+src=\"(https?:)?//|<link[^>]+href=\"(https?:)?//"
    pages = list(built.rglob("*.html"))
    assert len(pages) > len(PUBLIC)
    assert not [p.name for p in pages if re.search(fetched, p.read_text(encoding="utf-8"))]
    styles = [p for p in built.rglob("*.css") if re.search(r"url\([\"']?(https?:)?//|@import", p.read_text())]
    assert not styles
