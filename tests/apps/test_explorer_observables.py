"""The explorer's page Observables: grid, sources, paths, feature vectors, steering."""

from tests.apps.explorer_app import check_scripts


def test_a_path_is_followed_and_steered_along(explorer):
    app = explorer(page="Observables", target="John", foil="Mary").settle()
    assert app.titles[:2] == ["Which heads and MLPs", "What the heads of layer 0 read"]
    assert len(app.figures) == 4
    first = app.figures[-1]["paths"][0]["path"]
    app.set("path", first)
    assert all(f'"{first}"' in text for text in (app.scripts[3], app.scripts[-1]))
    assert len(app.figures) == 8
    assert check_scripts(app) == 8


def test_a_dose_moves_the_logits(explorer):
    app = explorer(page="Observables", target="John", foil="Mary", path="L1H0@1 -> logits@-1", dose="0").settle()
    before, same = (figure["rows"] for figure in app.figures[-2:])
    assert [r["name"] for r in before] == [r["name"] for r in same]
    app.set("dose", 1.5)
    assert app.figures[-1]["rows"] != same
    assert "interp.Add(" in app.scripts[-1]


def test_a_path_is_taken_back_step_by_step(explorer):
    app = explorer(page="Observables", path="L0H1@1 -> L1H0@2 -> logits@-1").settle()
    app.press("Back")
    assert app.at.session_state["link"]["path"] == "L1H0@2 -> logits@-1"
    app.press("Back")
    assert app.at.session_state["link"]["path"] == ""


def test_a_path_that_is_none_is_refused(explorer):
    app = explorer(page="Observables", path="L0H1 to logits").settle()
    assert "path step" in app.errors[0]
    assert len(app.figures) >= 2
