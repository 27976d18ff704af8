"""Budgets, chunks that fit them, and the operator that is given to SciPy."""

import numpy as np
import pytest
import torch
from torch import nn

import interp
from interp.hooks.budget import Chunked, Meter, bytes_of
from interp.hooks.errors import ArgumentError, LinearizationError, SizeError
from interp.hooks.linear_map import LinearMap
from tests.nets import draw, scope_of

NET = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 40))


@pytest.fixture
def matrix():
    return draw(5, 7)


def map_of(matrix, sizes=None, **options):
    """The matrix as a map that writes down how many probes it was given at once."""
    sizes = [] if sizes is None else sizes

    def push(v):
        sizes.append(len(v))
        return v @ matrix.T

    def pull(w):
        sizes.append(len(w))
        return w @ matrix

    return LinearMap(push, pull, (7,), (5,), matrix, **options)


def test_budgets_as_numbers_and_texts():
    texts = {"2GiB": 2 << 30, "512MiB": 512 << 20, "1.5 GB": 1_500_000_000, "64kB": 64_000, "10 b": 10, "3kib": 3072}
    assert {text: bytes_of(text) for text in texts} == texts
    assert bytes_of(7) == 7
    for wrong in ("2 apples", "", "GiB", "-1GiB", 0, -5, True, "0.1B"):
        with pytest.raises(ArgumentError, match="positive number of bytes"):
            bytes_of(wrong)


@pytest.mark.parametrize("chunk", [1, 3, 100, "auto"])
def test_chunks_change_nothing(chunk, matrix):
    scope = scope_of(NET, draw(1, 2, 8, 8), chunk=chunk)
    whole = scope_of(NET, draw(1, 2, 8, 8), chunk=1000)
    v, w = draw(13, 2, 8, 8, seed=1), draw(13, 40, seed=2)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    close(scope.matvec(v), whole.matvec(v))
    close(scope.rmatvec(w), whole.rmatvec(w))
    close(scope.columns(range(9), chunk=chunk), whole.columns(range(9)))
    close(scope.dense(), whole.dense())
    assert map_of(matrix, chunk=chunk).matvec(matrix[:0]).shape == (0, 5)


def test_a_chunk_is_at_most_what_was_asked_and_what_fits(matrix):
    sizes = []
    each = map_of(matrix, sizes, chunk=4)
    each.matvec(draw(10, 7)), each.rmatvec(draw(3, 5)), each.rows(range(5), chunk=2)
    assert sizes == [4, 4, 2, 3, 2, 2, 1]
    sizes.clear()
    small = map_of(matrix, sizes, chunk=4, budget=3 * 96)
    small.matvec(draw(10, 7))
    assert sizes == [3, 3, 3, 1], "12 numbers of 8 bytes for each probe"
    sizes.clear()
    map_of(matrix, sizes, budget=2 * 96).columns(range(7))
    assert max(sizes) == 2


@pytest.mark.parametrize(("slow", "wanted"), [("batch", 1), ("call", 16)])
def test_auto_keeps_what_is_faster(slow, wanted, monkeypatch):
    import interp.hooks.budget as budget

    clock, sizes = [0.0], []

    def apply(probes):
        sizes.append(len(probes))
        clock[0] += 1.0 if slow == "call" else len(probes) ** 2
        return probes

    monkeypatch.setattr(budget, "_now", lambda like: clock[0])
    product = Chunked(apply, 1, 1 << 30, "auto")
    assert torch.equal(product(torch.arange(5.0)), torch.arange(5.0))
    assert sizes == [5], "too few to time"
    sizes.clear()
    assert torch.equal(product(torch.arange(50.0)), torch.arange(50.0))
    assert sizes[:3] == [1, 1, 4]
    assert max(sizes[3:]) == wanted
    sizes.clear()
    product(torch.arange(32.0))
    assert set(sizes) == {wanted}, "chosen once"


def test_a_budget_too_small_for_one_probe_is_refused_with_the_bytes_that_it_takes():
    net = NET.double().eval()
    with pytest.raises(SizeError, match=r"a budget of 100 bytes; needed: [\d,]+ bytes for one probe") as caught:
        scope_of(net, draw(1, 2, 8, 8), budget=100)
    needed = int("".join(c for c in caught.value.needed.split(" bytes")[0] if c.isdigit()))
    largest = 6 * 6 * 6 * 8
    assert largest < needed < 20 * largest
    with pytest.raises(SizeError, match="for one probe of rmatvec"):
        scope_of(net, draw(1, 2, 8, 8), budget=needed)
    fits = scope_of(net, draw(1, 2, 8, 8), budget=2 * needed)
    assert fits.columns(range(9)).shape == (9, 40)
    with pytest.raises(SizeError, match=r"a 40 x 128 matrix of 40,960 bytes; needed: at most"):
        scope_of(net, draw(1, 2, 8, 8), budget=40_000).dense()
    for wrong in (0, -1, True):
        with pytest.raises(ArgumentError, match="chunk"):
            scope_of(net, draw(1, 2, 8, 8), chunk=wrong)
        with pytest.raises(ArgumentError, match="chunk"):
            fits.rows([0], chunk=wrong)


def test_the_meter_counts_what_is_alive_at_once():
    meter = Meter()
    one = torch.zeros(10)
    view = one.view(2, 5)
    meter.see((one, view)), meter.see(one)
    assert (meter.peak, meter.largest) == (40, 40), "a view, and the same tensor again, take nothing"
    meter.see(two := torch.zeros(20))
    del one, view
    meter.see(torch.zeros(15))
    assert meter.peak == 80 + 60
    del two
    assert (meter.now, meter.peak) == (0, 140)


def test_a_narrow_network_takes_what_its_widest_places_take():
    """A chain frees each value behind it: its length costs nothing, its width does."""
    chain = lambda n, width: nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(n)])
    of = lambda n, width: scope_of(chain(n, width), draw(1, width)).network.push_bytes
    assert of(12, 64) == of(3, 64)
    assert of(3, 128) == 2 * of(3, 64)


# SciPy ---


def test_scipy_operator_with_one_and_several_vectors(matrix):
    sizes = []
    operator = map_of(matrix, sizes, chunk=100).to_scipy()
    dense, v, w = matrix.numpy(), draw(7, 3).numpy(), draw(5, 4).numpy()
    sizes.clear()
    np.testing.assert_allclose(operator @ v, dense @ v, rtol=1e-12)
    np.testing.assert_allclose(operator.rmatmat(w), dense.T @ w, rtol=1e-12)
    assert sizes == [3, 4], "several vectors are one batch"
    np.testing.assert_allclose(operator @ v[:, 0], dense @ v[:, 0], rtol=1e-12)
    np.testing.assert_allclose(operator @ v[:, :1], dense @ v[:, :1], rtol=1e-12)
    np.testing.assert_allclose(operator.T @ w[:, 0], dense.T @ w[:, 0], rtol=1e-12)


def test_scipy_operator_whose_adjoint_is_another_matrix_is_refused(matrix):
    wrong = LinearMap(lambda v: v @ matrix.T, lambda w: 1.001 * w @ matrix, (7,), (5,), matrix)
    with pytest.raises(LinearizationError, match=r"<v, Fᵀ w> differ"):
        wrong.to_scipy()
    zero = LinearMap(lambda v: v.new_zeros(len(v), 5), lambda w: w.new_zeros(len(w), 7), (7,), (5,), matrix)
    assert (zero.to_scipy() @ np.ones(7)).tolist() == [0.0] * 5


def test_restricted_maps_keep_the_budget():
    scope = scope_of(NET, draw(1, 2, 8, 8), budget="64MiB")
    from interp.hooks.windows import restricted

    part = restricted(scope, window=slice(0, 9))
    assert part.budget == 64 << 20
    assert part._pull.most == scope._pull.most
    torch.testing.assert_close(part.dense(), scope.dense()[:9])


def test_public_scope_takes_the_arguments():
    scope = interp.LinearScope(interp.attach(nn.Linear(3, 2)), torch.ones(1, 3), chunk=2, budget=10_000)
    torch.testing.assert_close(scope.dense(), scope.model.module.weight.detach())
