"""The report: complete, self-contained, safe with any token, and alive in a real browser."""

import html
import json
import re

import pytest

from interp.apps.report import render, sections, write_report
from interp.hooks.errors import RunError
from interp.hooks.table import Table
from interp.runs.run import Run
from tests.apps.samples import HOSTILE, attribution, lens, token_votes, tokens_table


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """A run whose prompt and tokens try to leave their place."""
    text = "".join(HOSTILE)
    spec = {"prompts": [{"prompt": text, "target": HOSTILE[0], "foil": HOSTILE[3]}], "model": HOSTILE[0]}
    run = Run.create(tmp_path_factory.mktemp("runs"), "demo", spec)
    run.provenance["models"] = {"language": {"name": HOSTILE[0], "licence": HOSTILE[3], "sha256": "0"}}
    run.save("prompt-1-next-tokens", tokens_table(HOSTILE))
    run.save("prompt-1-lens", lens(HOSTILE, followed=(HOSTILE[0], HOSTILE[3])))
    run.save("prompt-1-attribution", attribution(name=repr(HOSTILE[0])))
    run.save("prompt-1-votes", token_votes(HOSTILE))
    run.save("completeness", Table([{"where": HOSTILE[0], "of": HOSTILE[3], "completeness error": 1e-9}]))
    run.status("failed")
    return run


@pytest.fixture(scope="module")
def tiny_report(tiny_run):
    return write_report(tiny_run)


def test_results_are_grouped_by_what_they_are_about(tiny_run):
    found = sections(tiny_run)
    assert [(s.name, s.kind, s.text) for s in found] == [
        ("prompt-1", "prompt", "Mary gave the book to"), ("prompt-2", "prompt", "the cat sat on"),
        ("image", "picture", "china.jpg"),
    ]  # fmt: skip
    names = [[f.name for f in s.figures] for s in found]
    assert names[0] == [f"prompt-1-{n}" for n in ("next-tokens", "votes", "lens", "attribution")]
    assert names[2] == ["image-classes", "image-votes", "image-margin"]
    assert (found[0].target, found[0].foil) == ("John", "Mary")
    assert all(f.caption.sees and f.caption.silent for s in found for f in s.figures)


def test_every_error_and_the_provenance_are_printed(tiny_run, tiny_report):
    text = tiny_report.read_text()
    assert f"<title>{tiny_run.path.name}</title>" in text
    for row in tiny_run.load("completeness"):
        assert f"{row['completeness error']:.1e}" in text or row["completeness error"] == 0
    for word in ("tiny-words", "tiny-eyes", "licence none", "0" * 64, tiny_run.provenance["versions"]["torch"]):
        assert word in text
    assert text.count("Not shown:") == 11


def test_the_report_is_the_same_each_time(tiny_run):
    assert render(tiny_run) == render(tiny_run)


def test_no_element_names_another_file(tiny_report):
    page = re.sub(r"<script>.*?</script>", "", tiny_report.read_text(), flags=re.DOTALL)
    page = html.unescape(page)
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)""", page) == []
    assert "connect-src" not in page
    assert "default-src 'none'" in page


def test_the_report_is_written_whole_or_not_at_all(tiny_run, tmp_path):
    path = write_report(tiny_run, tmp_path / "other.html")
    assert path.read_text().endswith("</html>\n") or path.read_text().endswith("</html>")
    assert [p.name for p in tmp_path.iterdir()] == ["other.html"]
    with pytest.raises(RunError, match="a file that can be written"):
        write_report(tiny_run, tmp_path / "nowhere" / "report.html")


def test_hostile_text_stays_text(hostile_run):
    text = render(hostile_run)
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "{{ 7 * 7 }}" in text
    assert "This run is failed" in text
    specs = re.findall(r'<script type="application/json" id="[^"]*">(.*?)</script>', text, flags=re.DOTALL)
    assert len(specs) == 4
    assert all(json.loads(spec)["datasets"] for spec in specs)


def test_a_run_without_results_has_a_report(tmp_path):
    run = Run.create(tmp_path, "demo", {})
    assert "This run is created" in render(run)


# In a browser


@pytest.mark.browser
def test_hostile_text_runs_nothing(hostile_run, open_page):
    path = write_report(hostile_run)
    page, seen = open_page(path)
    page.locator("[data-figure='prompt-1-votes'] .role-mark path").first.hover()
    page.wait_for_selector("#vg-tooltip-element")
    page.locator("[data-figure='prompt-1-lens'] [class*='role-mark cells'] path").first.hover(force=True)
    page.get_by_text(f"rank of {HOSTILE[3]}").wait_for()
    assert HOSTILE[0] in page.locator("h2").first.inner_text()
    assert seen == {"requests": [path.resolve().as_uri()], "errors": [], "dialogs": []}


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 1440])
def test_the_page_is_no_wider_than_the_window(tiny_report, open_page, width):
    page, seen = open_page(tiny_report, width)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert seen["errors"] == []


@pytest.mark.browser
def test_figures_can_be_saved_and_lead_nowhere(tiny_report, open_page):
    page, seen = open_page(tiny_report)
    figure = page.locator("[data-figure='image-votes']")
    figure.locator("summary").click()
    assert figure.locator(".vega-actions a").all_inner_texts() == ["Save as SVG", "Save as PNG"]
    for label, head in (("Save as PNG", b"\x89PNG"), ("Save as SVG", b"<svg")):
        with page.expect_download() as saved:
            figure.get_by_text(label).click()
        assert saved.value.path().read_bytes().startswith(head)
        assert saved.value.suggested_filename.startswith("image-votes")
    assert seen["errors"] == []


@pytest.mark.browser
def test_nothing_can_be_fetched(tiny_report, open_page):
    page, _ = open_page(tiny_report)
    blocked = "fetch('https://example.org').then(() => 'fetched', () => 'blocked')"
    assert page.evaluate(blocked) == "blocked"
