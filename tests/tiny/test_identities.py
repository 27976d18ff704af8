"""The identities on a few families and engines, on all of them (slow), and the page that says so."""

from dataclasses import replace

import pytest

from tests import identities
from tests.cases import DECODERS

pytestmark = pytest.mark.filterwarnings("ignore:.*which nnsight already serves", "ignore::DeprecationWarning")

# What is refused, and by which error; all else holds.
REFUSED = {("mixtral", name): "SiteUnavailableError" for name in ("5 paths", "path, autograd")}
REFUSED |= {("bert", name): "SiteUnavailableError" for name in identities.IDENTITIES}
REFUSED |= {
    ("gpt-neo", "TransformerBridge"): "UnknownFamilyError", ("gpt-neo", "compatibility mode"): "UnknownFamilyError",
    ("phi", "compatibility mode"): "RuntimeError of the engine", ("phi3", "TransformerBridge"): "SiteError",
    ("phi3", "compatibility mode"): "SiteError",
    ("cohere", "compatibility mode"): "LayoutError",
}  # fmt: skip


def on_page() -> dict[tuple[str, str], str]:
    """The page's cells by row and column."""
    found, columns = {}, []
    for line in identities.PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| family"):
            columns = cells[1:]
        elif not line.startswith("|"):
            columns = []
        elif columns and not line.startswith("|---"):
            found |= {(cells[0], column): cell for column, cell in zip(columns, cells[1:], strict=True)}
    return found


PAGE = on_page()


def holds(family: str, column: str, error: float | str, limit: float) -> None:
    """Assert that an error is small, or the one by which this is refused, and that the page says the same."""
    cell, wanted = PAGE[family, column], REFUSED.get((family, column))
    if wanted is not None:
        assert (error, cell) == (wanted, f"`{wanted}`")
        return
    assert isinstance(error, float), (family, column, error)
    assert error <= limit, (family, column)
    assert float(cell) <= limit, (family, column)


def test_the_page_has_every_cell_and_no_other():
    grid = {(family, column) for family in (*DECODERS, "bert") for column in identities.IDENTITIES}
    assert set(PAGE) == grid | {(family, engine) for family in DECODERS for engine in identities.ENGINES}


@pytest.mark.parametrize("family", [
    name if name in ("neox-parallel", "gemma2", "bert") else pytest.param(name, marks=pytest.mark.slow)
    for name in (*DECODERS, "bert")
])  # fmt: skip
def test_identities_hold(family, unchecked):
    for column, error in identities.errors(family).items():
        holds(family, column, error, identities.TOLERANCE)


@pytest.mark.parametrize("family", [
    name if name == "gpt2" else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS
])  # fmt: skip
@pytest.mark.parametrize("engine", identities.ENGINES)
def test_engines_give_the_same(engine, family, tokenizer, bridge_package, nnsight_package):
    holds(family, engine, identities.engine_error(family, engine, tokenizer), identities.ENGINE_TOLERANCE)


def test_a_value_head_read_from_the_wrong_group_is_seen(monkeypatch, unchecked):
    from interp.propagation.reference import Weights

    right = Weights.values
    rolled = lambda self, layer: replace(right(self, layer), weight=right(self, layer).weight.roll(1, 1))
    monkeypatch.setattr(Weights, "values", rolled)
    found = identities.errors("llama")
    for column in ("3 feature vectors", "4 whole network", "path, autograd", "totals, autograd"):
        assert not isinstance(found[column], float) or found[column] > 1e-3, column
