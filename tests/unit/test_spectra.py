"""Singular and eigen analysis against dense decompositions."""

import pytest
import torch

from interp.hooks.errors import ArgumentError
from interp.hooks.linear_map import LinearMap
from interp.hooks.spectra import NotConvergedWarning


def operator(rows, columns, decay=0.6, seed=0):
    made = torch.Generator().manual_seed(seed)
    n = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, n, generator=made, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, n, generator=made, dtype=torch.float64))[0]
    matrix = left @ torch.diag(decay ** torch.arange(n, dtype=torch.float64)) @ right.T
    return LinearMap(lambda v: v @ matrix.T, lambda w: w @ matrix, (columns,), (rows,), matrix), matrix


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("method", ["lanczos", "randomised"])
def test_singular_triplets_are_those_of_the_matrix(shape, method):
    found, matrix = operator(*shape)[0].svd(4, method=method), operator(*shape)[1]
    u, s, vh = torch.linalg.svd(matrix)
    torch.testing.assert_close(found.s, s[:4], rtol=1e-7, atol=1e-9)
    assert found.residuals.max() < 1e-5
    for i in range(4):
        assert abs(found.u[i] @ u[:, i]) == pytest.approx(1, abs=1e-6)
        assert abs(found.v[i] @ vh[i]) == pytest.approx(1, abs=1e-6)
        assert found.u[i, found.u[i].abs().argmax()] > 0
    torch.testing.assert_close(matrix @ found.v[0], found.s[0] * found.u[0], rtol=1e-7, atol=1e-9)
    assert found.table()[0]["value"] == pytest.approx(float(s[0]))


def test_a_window_restricts_the_outputs():
    maps, matrix = operator(12, 30)
    window = torch.zeros(12)
    window[3:7] = 1
    found = maps.svd(3, window=window)
    torch.testing.assert_close(found.s, torch.linalg.svdvals(matrix[3:7])[:3], rtol=1e-7, atol=1e-9)
    assert found.u[:, :3].abs().max() < 1e-8
    with pytest.raises(ArgumentError, match="window"):
        maps.svd(3, window=torch.ones(11))


def test_a_flat_spectrum_warns_instead_of_underestimating_in_silence():
    maps, _ = operator(60, 60, decay=0.999)
    with pytest.warns(NotConvergedWarning, match="residual above"):
        maps.svd(3, method="randomised")


def test_eigenpairs_of_a_square_map():
    maps, matrix = operator(20, 20)
    found = maps.eig(4)
    wanted = torch.linalg.eigvals(matrix)
    wanted = wanted[wanted.abs().argsort(descending=True)][:4]
    torch.testing.assert_close(found.values.abs(), wanted.abs(), rtol=1e-6, atol=1e-9)
    assert found.residuals.max() < 1e-6
    assert len(found.to_records()) == 4


def test_bad_arguments(unchecked):
    maps, _ = operator(12, 30)
    for call, text in (
        (lambda: maps.svd(0), "k=0"),
        (lambda: maps.svd(12), "k=12 of a 12 x 30"),
        (lambda: maps.svd(2, method="power"), "method='power'"),
        (lambda: maps.eig(2), "equal shapes"),
        (lambda: operator(20, 20)[0].eig(19), "k=19"),
    ):
        with pytest.raises(ArgumentError, match=text):
            call()
