"""The real demo, twice: bit for bit the same; and its report in a real browser."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def demo(folder, *words: str):
    command = [sys.executable, "-m", "interp.apps.cli", "demo", "--out", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, smollm2):
    """Two runs of the demo. (Asking for the model first skips, or fails in CI, where it cannot be had.)"""
    folder = tmp_path_factory.mktemp("demo")
    for words in ([], ["--no-report"]):
        done = demo(folder, *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert "completeness error" in done.stdout
        assert str(folder) in done.stdout
    return sorted(folder.iterdir())


def test_two_runs_are_bit_identical(runs):
    first, second = ({p.name: p.read_bytes() for p in (run / "results").iterdir()} for run in runs)
    assert len(first) >= 20
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_every_decomposition_is_complete(runs):
    from interp.runs.run import Run

    table = Run.open(runs[0]).load("completeness")
    assert len(table) == 6
    assert all(row["completeness error"] < 1e-5 for row in table)


@pytest.fixture(scope="module")
def report(runs):
    return runs[0] / "report.html"


@pytest.mark.browser
def test_the_report_opens_without_network_or_errors(report, open_page):
    page, seen = open_page(report)
    assert seen == {"requests": [report.resolve().as_uri()], "errors": [], "dialogs": []}
    assert page.locator("figure svg.marks").count() == 11
    assert page.title() == report.parent.name


TEXTS = "f => [...document.querySelectorAll(`[data-figure='${f}'] svg.marks text`)].map(t => t.textContent)"


def texts(page, figure: str) -> str:
    """All words of a figure."""
    return " | ".join(page.evaluate(TEXTS, figure))


def clicked(page, figure: str, view: str, number: int) -> str:
    """Click in the middle of a mark, whatever word lies on it; return the figure's words once they have changed."""
    before = page.evaluate(TEXTS, figure)
    page.locator(f"[data-figure='{figure}'] [class*='role-mark {view}'] path").nth(number).click(force=True)
    page.wait_for_function(f"([f, old]) => ({TEXTS})(f).join() != old", arg=[figure, ",".join(before)])
    return texts(page, figure)


@pytest.mark.browser
def test_a_clicked_head_is_shown_in_the_bars_and_summed(report, open_page):
    from interp.runs.run import Run

    page, seen = open_page(report)
    found = Run.open(report.parent).load("prompt-1-attribution")
    quiet = int(found.heads.abs().argmin())
    name = "L{}H{}".format(*divmod(quiet, found.heads.shape[1]))
    assert name not in texts(page, "prompt-1-attribution").split(" | ")
    after = clicked(page, "prompt-1-attribution", "heads", quiet)
    assert name in after.split(" | ")
    assert f"1 marked: {found.heads.flatten()[quiet]:+.3f} of {found.measurement:+.3f}".replace("-", "−") in after
    assert seen["errors"] == []


@pytest.mark.browser
def test_clicked_cells_of_a_picture_are_summed(report, open_page):
    from interp.plots.votes import pool
    from interp.runs.run import Run

    page, seen = open_page(report)
    cells = pool(Run.open(report.parent).load("image-votes").map).flatten()
    best = int(cells.argmax())
    text = clicked(page, "image-votes", "cells", best)
    assert f"marked cells  +{float(cells[best]):.3f}" in re.sub(r"\s+\+", "  +", text)
    assert seen["errors"] == []


@pytest.mark.browser
def test_a_clicked_token_is_marked(report, open_page):
    page, seen = open_page(report)
    text = clicked(page, "prompt-1-votes", "bars", 1)
    assert re.search(r"1 marked: \+3\.7\d\d of \+6\.1", text)
    faded = page.locator("[data-figure='prompt-1-votes'] [class*='role-mark bars'] path[opacity='0.3']")
    assert faded.count() == 14
    assert seen["errors"] == []


@pytest.mark.browser
def test_a_clicked_column_changes_the_ranks(report, open_page):
    page, seen = open_page(report)
    assert "behind ␣to" in texts(page, "prompt-1-lens")
    assert "behind ␣Mary" in clicked(page, "prompt-1-lens", "cells", 1)
    assert seen["errors"] == []
