"""The explorer's page Jacobians."""

from tests.apps.explorer_app import check_scripts


def test_spectra_and_similarity_are_asked_for(explorer):
    app = explorer(page="Jacobians").settle()
    assert app.figures == []
    app.press("Compute 8 singular values").press("Compute the Jacobians")
    assert app.titles == ["Spectra by layer", "Token by token at one layer"]
    assert check_scripts(app) == 3
    rows = app.figures[1]["cells"]
    assert all(abs(r["cosine"] - 1) < 1e-6 for r in rows if r["row"] == r["column"])
    app.set("between", "MLP").press("Compute 8 singular values")
    assert "hook_mlp_out" in app.scripts[0]
