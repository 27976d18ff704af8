"""The explorer's page Jacobians."""

from tests.apps.explorer_app import check_scripts


def test_spectra_and_similarity_are_asked_for(explorer):
    app = explorer(page="Jacobians").settle()
    assert app.figures == []
    app.press("Compute 8 singular values").press("Compute the Jacobians")
    assert app.titles == ["Spectra by layer", "Token by token at one layer", "A lens of averaged Jacobians"]
    assert check_scripts(app) == 3
    rows = app.figures[1]["cells"]
    assert all(abs(r["cosine"] - 1) < 1e-6 for r in rows if r["row"] == r["column"])
    app.set("between", "MLP").press("Compute 8 singular values")
    assert "hook_mlp_out" in app.scripts[0]


def test_a_lens_is_fitted_on_the_texts_of_the_page(explorer):
    long = "Mary gave the book to John and the cat sat on the mat"
    app = explorer(page="Jacobians", texts=f"{long} {long}\nthe cat and {long} {long}", target="John").settle()
    app.press("Fit a lens on 2 texts")
    assert check_scripts(app) == 2
    assert "JacobianLens.fit" in app.scripts[0]
    assert "['John']" in app.scripts[0].replace('"', "'")
    app.set("texts", " ")
    assert any("no text" in e for e in app.errors)
    assert len(app.figures) == 0
