"""The explorer's page Alignment: a saved run of alignments, its figures and its interventions, without a model."""

import pytest

from interp.runs.specs import execute, read_spec
from tests.apps.explorer_app import App, check_scripts
from tests.apps.test_run_alignments import SPEC


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alignments")
    (folder / "spec.yaml").write_text(SPEC)
    return execute(read_spec(folder / "spec.yaml"), folder / "runs")


@pytest.fixture
def app(run, monkeypatch):
    from interp.apps.explorer import desk

    desk.workshop.cache_clear()
    monkeypatch.setenv("INTERP_EXPLORE_RUN", str(run.path))
    return App(page="Alignment", run=run.path.name).settle()


def test_grid_frontier_and_scripts(app):
    assert app.errors == []
    assert check_scripts(app) == 2
    app.set("measure", "selectivity")
    app.set("complexity", "parameters")
    assert any("parameters" in text for text in app.scripts)
    assert check_scripts(app) == 2


def test_interventions_are_stepped_through(app, run):
    rows = run.load("examples")
    for number in (1, 4):
        app.set("example", number)
        row = rows[number - 1]
        shown = app.at.dataframe[0].value.to_dict("records")
        assert shown[0]["given"] == row["base"]
        assert [s["input"] for s in shown[1:]] == [f"source of {v}" for v in ("v1", "v2") if row[f"source of {v}"]]
        assert ("not as the algorithm does" in app.words) == (not row["right"])


def test_a_run_without_alignments_has_no_page(explorer, tiny_run, monkeypatch):
    monkeypatch.setenv("INTERP_EXPLORE_RUN", str(tiny_run.path))
    assert "Alignment" not in App(run=tiny_run.path.name, page="Runs").settle().at.radio[0].options
