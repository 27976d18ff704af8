"""Every kind of network in every spelling: a map that holds, or a refusal by name; and the page that says so."""

import pytest

import interp
from tests import spellings
from tests.cases import CASES

# What is not the rule of the column, and why: see the page.
KNOWN = {
    ("gated cell", "operator"): "another F",
    ("gated MLP", "method"): "BilinearOpError",
    ("gated MLP", "operator"): "BilinearOpError",
}


def on_page() -> dict[tuple[str, str], str]:
    """The page's cells by row and column."""
    found, columns = {}, []
    for line in spellings.PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(("| network", "| family")):
            columns = cells[1:]
        elif line.startswith("| ") and columns:
            found |= {(cells[0], column): cell for column, cell in zip(columns, cells[1:], strict=True)}
    return found


PAGE = on_page()


def verdict_of(cell: str) -> str:
    """What a cell of the page says."""
    if cell.startswith("`"):
        return cell.strip("`")
    return "another F" if cell.endswith("another F") else "holds" if float(cell) <= 1e-5 else "fails"


@pytest.mark.parametrize("spelling", spellings.SPELLINGS)
@pytest.mark.parametrize("kind", spellings.KINDS)
def test_a_network_in_a_spelling_holds_or_is_refused_by_name(kind, spelling):
    verdict, error = spellings.spelled(kind, spelling)
    assert verdict == KNOWN.get((kind, spelling), spellings.REFUSED.get(spelling, "holds")), error
    assert verdict_of(PAGE[kind, spelling]) == verdict


def test_a_custom_function_that_is_registered_holds():
    forget = interp.register_unit(spellings.Custom.apply, interp.Unit(piecewise_linear=True))
    try:
        for row in spellings.scope("ResNet", "custom autograd", "frozen").check():
            assert row["error"] <= spellings.TOLERANCE, row
    finally:
        forget()


def test_the_page_has_every_cell_and_no_other():
    grid = {(kind, spelling) for kind in spellings.KINDS for spelling in spellings.SPELLINGS}
    assert set(PAGE) == grid | {(family, "as loaded") for family in CASES}


def test_the_page_says_of_language_models_that_all_hold():
    """tests/tiny/test_linear_scope_families.py holds each of them."""
    assert {verdict_of(PAGE[family, "as loaded"]) for family in CASES} == {"holds"}


def test_spellings_compute_the_same_and_differ_in_their_calls():
    for kind, (_, shape) in spellings.KINDS.items():
        x = spellings.draw(*shape)
        plain = spellings.network(kind, "module")(x)
        for spelling in spellings.SPELLINGS:
            assert (spellings.network(kind, spelling)(x.clone()) - plain).abs().max() < 1e-12, (kind, spelling)
    parts = lambda spelling: [type(m).__name__ for m in spellings.network("ResNet", spelling).modules()]
    assert parts("module").count("ReLU") == 3
    assert parts("reused").count("ReLU") == 1
    assert parts("functional").count("ReLU") == 0
    assert parts("scripted").count("RecursiveScriptModule") == 3
