"""Singular and eigen analysis against dense decompositions."""

import pytest
import torch

from interp.hooks.errors import ArgumentError
from interp.hooks.linear_map import LinearMap
from interp.hooks.spectra import NotConvergedWarning
from interp.hooks.windows import restricted


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


def test_a_window_restricts_outputs_and_inputs():
    maps, matrix = operator(12, 30)
    mask = torch.zeros(12)
    mask[3:7] = 1
    for window in (mask, mask.bool(), slice(3, 7), (slice(3, 7),), (Ellipsis, slice(3, 7))):
        found = maps.svd(3, window=window)
        torch.testing.assert_close(found.s, torch.linalg.svdvals(matrix[3:7])[:3], rtol=1e-7, atol=1e-9)
        assert found.u[:, mask == 0].abs().max() == 0
        assert found.residuals.max() < 1e-6, "residuals are those of the restricted operator"
    both = maps.svd(3, window=slice(3, 7), input_window=slice(0, 20, 2))
    torch.testing.assert_close(both.s, torch.linalg.svdvals(matrix[3:7, :20:2])[:3], rtol=1e-7, atol=1e-9)
    assert both.v[:, 1::2].abs().max() == 0
    assert both.v.shape == (3, 30)


def test_a_window_of_pictures_keeps_its_shape():
    made = torch.Generator().manual_seed(3)
    matrix = torch.randn(2, 4, 5, 3, 6, generator=made, dtype=torch.float64)
    maps = LinearMap(
        lambda v: torch.einsum("abcde,nde->nabc", matrix, v), lambda w: torch.einsum("abcde,nabc->nde", matrix, w),
        (3, 6), (2, 4, 5), matrix,
    )  # fmt: skip
    part = restricted(maps, (slice(None), slice(1, 3), slice(2, 5)), (..., slice(4, 6)))
    assert (part.out_shape, part.in_shape) == ((2, 2, 3), (3, 2))
    wanted = matrix[:, 1:3, 2:5, :, 4:6]
    torch.testing.assert_close(part.dense(), wanted.reshape(12, 6))
    torch.testing.assert_close(part.rows([(1, 0, 2)])[0], wanted[1, 0, 2])
    torch.testing.assert_close(part.columns([(2, 1)])[0], wanted[..., 2, 1])
    found = maps.svd(2, window=(1, 3))
    torch.testing.assert_close(found.s, torch.linalg.svdvals(matrix[1, 3].reshape(5, 18))[:2])
    assert found.u.shape == (2, 2, 4, 5)


def test_an_eigenvector_within_a_window():
    maps, matrix = operator(20, 20)
    found = maps.eig(3, window=slice(5, 15))
    wanted = torch.linalg.eigvals(matrix[5:15, 5:15])
    wanted = wanted[wanted.abs().argsort(descending=True)][:3]
    torch.testing.assert_close(found.values.abs(), wanted.abs(), rtol=1e-6, atol=1e-9)
    assert found.vectors[:, :5].abs().max() == 0
    assert found.residuals.max() < 1e-6


def test_the_common_shift_of_classes_can_be_removed():
    maps, matrix = operator(12, 30)
    shifted = matrix + torch.linspace(1, 9, 30).double()
    maps = LinearMap(lambda v: v @ shifted.T, lambda w: w @ shifted, (30,), (12,), shifted)
    assert abs(maps.svd(1).u[0].sum()) > 3, "the shift of all classes comes first"
    found = maps.svd(3, centred=True)
    torch.testing.assert_close(found.s, torch.linalg.svdvals(matrix - matrix.mean(0))[:3], rtol=1e-7, atol=1e-9)
    assert found.u.sum(1).abs().max() < 1e-10
    some = maps.svd(2, centred=True, window=slice(0, 4))
    torch.testing.assert_close(some.s, torch.linalg.svdvals((matrix - matrix.mean(0))[:4])[:2], rtol=1e-7, atol=1e-9)


def test_windows_that_do_not_fit_are_refused(unchecked):
    maps, _ = operator(12, 30)
    for options, text in (
        (dict(window=torch.ones(11)), r"shape \[11\].*\[12\]"),
        (dict(input_window=torch.ones(12)), r"shape \[12\].*\[30\]"),
        (dict(window=torch.full((12,), 0.5)), "other than 0 and 1"),
        (dict(window=torch.zeros(12)), "without outputs"),
        (dict(window=slice(5, 5)), "without outputs"),
        (dict(input_window=(slice(0, 5), 3)), "too many indices"),
        (dict(window=(40,)), "out of bounds"),
        (dict(window=slice(0, 3)), "k=3 of a 3 x 30 map"),
        (dict(window="left"), "slices, integers"),
    ):
        with pytest.raises(ArgumentError, match=text):
            maps.svd(3, **options)
    pictures = LinearMap(lambda v: v, lambda w: w, (2, 3, 3), (2, 3, 3), torch.ones(1))
    with pytest.raises(ArgumentError, match="last axis"):
        pictures.svd(2, centred=True)


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
