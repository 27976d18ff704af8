"""Observables and sets of them without a model, against dense algebra in float64."""

import pytest
import torch

from interp import Observable, ObservableSet, SequenceObservable, Site
from interp.hooks.errors import ArgumentError, NonFiniteError, SiteError

V = 11
LOGITS = torch.linspace(-2, 3, 3 * 4 * V, dtype=torch.float64).sin().reshape(3, 4, V)


def some_observables():
    return [
        Observable("a", (4,), (1.0,)),
        Observable.from_vector(torch.linspace(-1, 2, V, dtype=torch.float64), name="v"),
        Observable("b - c", (2, 9, 2), (0.1, -1.0, 0.3)),
        Observable.from_vector([0.0] * 10 + [2.0], name="last"),
    ]


def dense(observable):
    if observable.vector is not None:
        return observable.vector.double()
    n = torch.zeros(V, dtype=torch.float64)
    for i, w in zip(observable.ids, observable.weights, strict=True):
        n[i] += w
    return n


def test_a_measurement_is_the_dense_product():
    for observable in some_observables():
        torch.testing.assert_close(observable.measure(LOGITS), LOGITS @ dense(observable), rtol=1e-14, atol=1e-14)
        assert observable.weight_sum == pytest.approx(float(dense(observable).sum()), abs=1e-15)


def test_half_precision_logits_are_summed_in_float32():
    observable = Observable("sum", tuple(range(V)), (1.0,) * V)
    half = LOGITS.bfloat16()
    assert observable.measure(half).dtype == torch.float32
    torch.testing.assert_close(observable.measure(half), half.float().sum(-1))


def test_a_set_is_its_observables_one_by_one():
    found = ObservableSet(some_observables())
    wanted = torch.stack([LOGITS @ dense(o) for o in some_observables()], -1)
    torch.testing.assert_close(found.measure(LOGITS), wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found[::-1].measure(LOGITS), wanted.flip(-1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found.measure(LOGITS[0, 0]), wanted[0, 0], rtol=1e-14, atol=1e-14)
    assert found.names == ("a", "v", "b - c", "last")
    assert [o.name for o in found] == list(found.names)
    assert found["v"] is found[1]
    assert len(found) == len(found.to_records()) == 4
    assert "4 observables of the logits" in repr(found)


def test_ways_to_make_a_set():
    one, *_ = some_observables()
    assert ObservableSet.of(one)[0] is one
    assert ObservableSet.of([one])[0] is one
    same = ObservableSet([one])
    assert ObservableSet.of(same) is same
    assert ObservableSet({"renamed": one})["renamed"].name == "renamed"
    matrix = torch.eye(3, V, dtype=torch.float64) - 0.5
    rows = [(range(V), matrix[i].tolist()) for i in range(3)]
    for found in (ObservableSet.from_matrix(matrix, names=["x", "y", "z"]), ObservableSet.from_rows(rows)):
        torch.testing.assert_close(found.measure(LOGITS), LOGITS @ matrix.T, rtol=1e-14, atol=1e-14)


def test_sets_that_are_none_are_refused(unchecked):
    one = some_observables()[0]
    with pytest.raises(ArgumentError, match="no observables"):
        ObservableSet([])
    with pytest.raises(ArgumentError, match="'she' among observables"):
        ObservableSet(["she"])
    with pytest.raises(ArgumentError, match=r"the logits and blocks\.0\.hook_resid_pre in one set"):
        ObservableSet([one, Observable.from_residual([1.0], site="blocks.0.hook_resid_pre")])
    with pytest.raises(ArgumentError, match=r"'b'; needed: one of 'a'"):
        ObservableSet([one])["b"]
    with pytest.raises(ArgumentError, match=r"names \['x'\] for 3"):
        ObservableSet.from_matrix(torch.eye(3), names=["x"])
    with pytest.raises(ArgumentError, match=r"\[obs, vocab\]"):
        ObservableSet.from_matrix(torch.ones(3))
    with pytest.raises(ArgumentError, match="token id 9; needed: ids below 5"):
        ObservableSet(some_observables()[::2]).measure(torch.zeros(5))


def test_zero_sum():
    assert Observable("d", (1, 2), (1.0, -1.0)).is_zero_sum
    assert not Observable("s", (1,), (1.0,)).is_zero_sum
    assert not Observable("two to one", (1, 2, 3), (1.0, 1.0, -1.0)).is_zero_sum
    shifted = Observable.from_vector(torch.randn(V) - 3)
    assert shifted.measure(LOGITS + 1) - shifted.measure(LOGITS) == pytest.approx(shifted.weight_sum, rel=1e-6)


def test_a_functional_of_a_site_carries_it():
    probe = Observable.from_residual([1.0, 2.0], site="blocks.2.hook_resid_post", offset=-3.0)
    assert probe.site == Site("blocks.2.hook_resid_post")
    assert probe.measure(torch.tensor([[1.0, 1.0], [0.0, 5.0]])).tolist() == [0.0, 7.0]
    with pytest.raises(ArgumentError, match=r"rows of width 3 at blocks\.2\.hook_resid_post; needed: 2"):
        probe.measure(torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"of blocks\.2\.hook_resid_post; needed: an observable of the logits"):
        probe.check_logits(2)
    with pytest.raises(SiteError, match="does not parse"):
        Observable.from_residual([1.0], site="not a site")


@pytest.mark.parametrize("observable", [
    *some_observables(),
    Observable.from_residual([1.0, 0.1], site="blocks.1.attn.hook_z#3@last", offset=0.5, name="probe"),
    Observable("noted", (1,), (0.1,), note="a heuristic"),
])  # fmt: skip
def test_plain_data_there_and_back(observable):
    import json

    data = json.loads(json.dumps(observable.to_dict()))
    back = Observable.from_dict(data)
    assert back.to_dict() == observable.to_dict()
    assert (back.name, back.ids, back.weights, back.site) == (
        observable.name, observable.ids, observable.weights, observable.site,
    )  # fmt: skip
    assert ObservableSet.from_dict(ObservableSet([observable]).to_dict()).to_dict()["observables"] == [data]
    if observable.site is None:
        both = SequenceObservable("s", ((0, observable), (2, observable)), ids=(1, 2, 3), log_probability=-1.0)
        assert SequenceObservable.from_dict(json.loads(json.dumps(both.to_dict()))).to_dict() == both.to_dict()
    with pytest.raises(ArgumentError, match="vectr"):
        Observable.from_dict(data | {"vectr": []})


@pytest.mark.parametrize("make", [
    lambda: Observable("x", (1, 2), (1.0,)),
    lambda: Observable("x", (-1,), (1.0,)),
    lambda: Observable("x", (1,), (1.0,), torch.ones(3)),
    lambda: Observable("x", (1,), (1.0,), site=Site("hook_embed")),
    lambda: Observable("x"),
    lambda: Observable("x", (1, 1), (1.0, -1.0)),
    lambda: Observable.from_vector(torch.zeros(3)),
    lambda: Observable.from_vector(torch.ones(2, 2)),
    lambda: Observable.from_vector("she"),
    lambda: Observable.from_vector(torch.ones(2, dtype=torch.complex64)),
])  # fmt: skip
def test_what_is_no_observable_is_refused(make):
    with pytest.raises(ArgumentError, match=r"observable|token ids"):
        make()


@pytest.mark.parametrize("make", [
    lambda: Observable("x", (1,), (float("nan"),)),
    lambda: Observable.from_vector([1.0, float("inf")]),
    lambda: Observable.from_residual([1.0], site="hook_embed", offset=float("nan")),
])  # fmt: skip
def test_nan_is_refused(make):
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        make()


def test_a_sequence_sums_over_its_positions(unchecked):
    a, v, *_ = some_observables()
    both = SequenceObservable("both", ((0, a), (3, v), (3, a)))
    wanted = LOGITS[:, 0, 4] + LOGITS[:, 3] @ dense(v) + LOGITS[:, 3, 4]
    torch.testing.assert_close(both.measure(LOGITS), wanted, rtol=1e-14, atol=1e-14)
    assert both.positions == (0, 3, 3)
    assert not both.is_zero_sum
    with pytest.raises(ArgumentError, match="logits at 2 positions; needed: position 3"):
        both.measure(LOGITS[:, :2])
    for position in (-1, True, 1.0):
        with pytest.raises(ArgumentError, match="counts from the start"):
            SequenceObservable("x", ((position, a),))
    with pytest.raises(ArgumentError, match="no terms"):
        SequenceObservable("x", ())
