"""Couplings of several observables along several paths, against Gram matrices and numpy's least squares."""

import numpy as np
import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError
from interp.saving import load_result, save_result
from tests.cases import MIXED, build

PATHS = ["L0H1", "L2H3"]


@pytest.fixture
def case():
    model = interp.attach(build("llama", dtype=torch.float64))
    pairs = {"a": (3, 7), "b": (5, 11), "c": (9, 2)}
    return model, [interp.Observable.logit_diff(model, *pair, name=name) for name, pair in pairs.items()]


def test_coefficients_are_those_of_the_gram_matrices(case):
    model, observables = case
    found, norms = interp.couplings(model, observables, PATHS), interp.head_norms(model, observables)
    for p, (layer, head) in enumerate([(0, 1), (2, 3)]):
        for i in range(3):
            for j in range(3):
                wanted = norms.coupling(i, j)[layer, head], norms.cosine(i, j)[layer, head]
                torch.testing.assert_close(found.predicted[p, i, j], wanted[0], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(found.cosines[p, i, j], wanted[1], rtol=1e-9, atol=1e-12)
                assert found.start_cosines[i, j] == pytest.approx(norms.start_cosine(i, j), rel=1e-9, abs=1e-12)
    assert (found.slopes, found.n) == (None, 0)


def test_slopes_are_least_squares_over_real_tokens_without_the_first(case):
    model, observables = case
    found = interp.couplings(model, observables, PATHS, MIXED)
    assert found.n == sum(len(row) - 1 for row in MIXED)
    vectors = [interp.propagate(model, n, path="L2H3").vector.numpy() for n in observables]
    site = "blocks.2.ln1.hook_normalized"
    rows = np.concatenate([model.capture(torch.tensor([ids]), site)[site][0, 1:].numpy() for ids in MIXED])
    for i, j in ((0, 1), (1, 0), (2, 1)):
        x, y = rows @ vectors[i], rows @ vectors[j]
        assert float(found.slopes[1, i, j]) == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-6)
        assert float(found.r2[1, i, j]) == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, rel=1e-6)


def test_rows_and_files(case, tmp_path):
    found = interp.couplings(*case, PATHS, MIXED)
    rows = found.to_records()
    assert len(rows) == 2 * 6
    assert list(rows[0]) == ["path", "from", "to", "coupling", "cosine", "starting cosine", "slope", "r2"]
    save_result(found, tmp_path / "found")
    again = load_result(tmp_path / "found")
    assert again.to_records() == rows
    assert "<table>" in again._repr_html_()


@pytest.mark.parametrize(("count", "paths", "text"), [(1, PATHS, "1 observables"), (3, [], "a list of paths")])
def test_what_gives_no_pair_is_refused(case, count, paths, text):
    model, observables = case
    with pytest.raises(ArgumentError, match=text):
        interp.couplings(model, observables[:count], paths)
