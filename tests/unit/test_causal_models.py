"""Algorithms, pairs and splits of causal abstraction, against sums done by hand."""

import pytest
import torch
from jaxtyping import TypeCheckError

from interp.causal import (
    CausalModel,
    InterchangeDataset,
    Partition,
    Pool,
    Splits,
    distributive_law,
    hierarchical_equality,
)
from interp.hooks.errors import ArgumentError, DegenerateDataError, ShapeMismatchError, UnmatchedVariableError

NOT_A_CHOICE = (ArgumentError, TypeCheckError)  # where types are checked, as in these tests, they refuse it first
TASKS = {
    "both": hierarchical_equality("both"), "left": hierarchical_equality("left"),
    "first argument": hierarchical_equality("first_argument"), "and-or": distributive_law("and_or"),
    "and-or-and": distributive_law("and_or_and"),
}  # fmt: skip


def adder(**changes):
    options = {
        "inputs": ["a", "b", "c"], "nodes": {"sum": (["a", "b"], torch.add), "big": (["sum"], lambda s: s > 3)},
        "output": (["big", "c"], lambda big, c: big == (c > 0)),
    }  # fmt: skip
    return CausalModel(**options | changes)


# Algorithms ---


def test_a_run_and_an_intervention_by_hand():
    model = adder()
    inputs = {"a": [1, 3], "b": [1, 2], "c": [1, 1]}
    found = model.run(inputs)
    assert found["sum"].tolist() == [2, 5]
    assert found["output"].tolist() == [0, 1]
    assert model.run(inputs, do={"sum": [9, 0]})["output"].tolist() == [1, 0]
    assert model.run(inputs, do={"big": [True, True]})["output"].tolist() == [1, 1]
    part = model.run(inputs, do={"sum": [9, 0]}, where={"sum": torch.tensor([False, True])})
    assert part["output"].tolist() == [0, 0]


def test_an_interchange_takes_the_value_of_the_source_s_run():
    model, one, other = adder(), {"a": [1], "b": [1], "c": [1]}, {"a": [3], "b": [3], "c": [0]}
    assert model.interchange(one, {"big": other}).tolist() == [1]
    assert model.interchange(other, {"big": one}).tolist() == [1]
    assert model.interchange(one, {"sum": one}).tolist() == model.run(one)["output"].tolist()


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"inputs": ["a", "a", "b", "c"]}, ArgumentError, "a used twice"),
    ({"nodes": {"sum": (["a", "z"], torch.add)}, "output": (["sum"], lambda s: s > 0)}, ArgumentError, "z"),
    ({"nodes": {"u": (["v"], torch.neg), "v": (["u"], torch.neg)}, "output": (["u"], lambda u: u > 0)}, ArgumentError,
     "cycle"),
])  # fmt: skip
def test_a_graph_that_is_none_is_refused(change, error, text):
    with pytest.raises(error, match=text):
        adder(**change)


@pytest.mark.parametrize(("inputs", "do", "error", "text"), [
    ({"a": [1], "b": [1]}, None, UnmatchedVariableError, "no value for c"),
    ({"a": [1, 2], "b": [1], "c": [1]}, None, ShapeMismatchError, "examples"),
    ({"a": [1], "b": [1], "c": [1]}, {"summ": [1]}, UnmatchedVariableError, "summ"),
    ({"a": [1], "b": [1], "c": [1]}, {"sum": None}, UnmatchedVariableError, "None"),
    ({"a": [1], "b": [1], "c": [1]}, {"sum": [1, 2]}, ShapeMismatchError, "2 values"),
])  # fmt: skip
def test_inputs_and_interventions_that_do_not_fit_are_refused(inputs, do, error, text):
    with pytest.raises(error, match=text):
        adder().run(inputs, do)


# Pairs ---


def by_hand(x, task):
    """Labels of the bases from the vectors themselves."""
    vectors = x.unflatten(1, (-1, 4))
    equal = [(vectors[:, i] == vectors[:, i + 1]).all(1) for i in range(0, vectors.shape[1], 2)]
    if task.name == "hierarchical equality":
        return equal[0] == equal[1]
    return (equal[0] & equal[1]) | (equal[1] & equal[2])


@pytest.mark.parametrize("name", TASKS)
def test_labels_are_what_the_vectors_say(name):
    data = TASKS[name].sample(400, seed=3)
    wanted = by_hand(data.pool.inputs, TASKS[name]).long()
    assert torch.equal(data.pool.settings["output"], wanted)
    assert 0.3 < float(wanted[data.base].float().mean()) < 0.7


@pytest.mark.parametrize("name", TASKS)
def test_labels_of_pairs_are_the_algorithm_s_pair_by_pair(name):
    task = TASKS[name]
    data, model = task.sample(60, seed=5), task.causal_model
    for i in range(len(data)):
        row = lambda j: {k: data.pool.settings[k][j : j + 1] for k in model.inputs}
        chosen = [v for k, v in enumerate(data.variables) if data.chosen[i, k]]
        sources = {v: row(int(data.sources[i, data.variables.index(v)])) for v in chosen}
        assert int(model.interchange(row(int(data.base[i])), sources)) == int(data.labels[i])


@pytest.mark.parametrize("name", ["both", "and-or", "first argument"])
def test_interventions_and_flips_are_balanced(name):
    data = TASKS[name].sample(2000, seed=1)
    sets = data.intervened()
    for one in set(sets):
        assert sets.count(one) / len(sets) == pytest.approx(1 / len(set(sets)), abs=0.05)
    assert float(data.flips.float().mean()) == pytest.approx(0.5, abs=0.06)
    asked = TASKS[name].sample(2000, seed=1, flip=0.8)
    assert float(asked.flips.float().mean()) == pytest.approx(0.8, abs=0.04)


def test_the_draw_is_the_seed_s():
    one, same, other = (TASKS["both"].sample(50, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.pool.inputs, same.pool.inputs)
    assert not torch.equal(one.pool.inputs[:50], other.pool.inputs[:50])


def test_shuffled_labels_keep_their_number_and_lose_their_pairs():
    data = TASKS["both"].sample(500, seed=1)
    mixed = data.shuffled(0)
    assert int(mixed.labels.sum()) == int(data.labels.sum())
    assert 0.4 < float((mixed.labels == data.labels).float().mean()) < 0.6


# Splits ---


def test_splits_that_share_a_pair_are_refused():
    task = TASKS["both"]
    data = task.sample(100, seed=1, split="train")
    splits = task.splits(100, 50, 50)
    with pytest.raises(DegenerateDataError, match="pairs in both train and test"):
        Splits(data, splits.validation, {"test": data.take(torch.arange(10), "test")})


def test_splits_of_pools_of_their_own_with_the_same_vectors_are_refused():
    task = TASKS["both"]
    one, again, other = (
        task.sample(100, seed=seed, split=split) for seed, split in ((1, "train"), (1, "test"), (2, "v"))
    )
    with pytest.raises(DegenerateDataError, match="100 pairs in both train and test"):
        Splits(one, other, {"test": again})


def test_splits_that_share_a_declared_group_are_refused():
    model = CausalModel(["a"], {"v": (["a"], torch.clone)}, (["v"], lambda v: v > 0))

    def part(values, names, split):
        a = torch.tensor(values)
        pool = Pool(a[:, None].float(), model.run({"a": a}), {"names": torch.tensor(names)[:, None]})
        base, sources = torch.arange(len(a)), torch.arange(len(a)).roll(1)[:, None]
        return InterchangeDataset.pair(model, pool, base, sources, torch.ones(len(a), 1, dtype=torch.bool), split=split)

    train, validation = part([1, -1, 2], [1, 2, 3], "train"), part([3, -3, 4], [4, 5, 6], "validation")
    Splits(train, validation, {"names": part([5, -5], [7, 8], "names")}, ("names",))
    with pytest.raises(DegenerateDataError, match=r"names \[2\] in both"):
        Splits(train, validation, {"names": part([5, -5], [7, 2], "names")}, ("names",))
    with pytest.raises(DegenerateDataError, match="templates"):
        Splits(train, validation, {"test": part([5, -5], [7, 8], "test")}, ("templates",))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda t: t.sample(0, seed=1), ArgumentError, "n=0"),
    (lambda t: t.sample(5, seed=1, flip=2.0), ArgumentError, "flip=2.0"),
    (lambda t: t.sample(5, seed=1, interventions=[["w"]]), UnmatchedVariableError, "w"),
    (lambda t: t.with_variables("w"), UnmatchedVariableError, "w"),
    (lambda t: hierarchical_equality("right"), NOT_A_CHOICE, "right"),
    (lambda t: distributive_law("or"), NOT_A_CHOICE, "or"),
])  # fmt: skip
def test_draws_that_are_not_legal_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(TASKS["both"])


# Partitions ---


def test_blocks_are_disjoint_and_fill_from_the_front():
    partition = Partition({"u": 2, "v": [1], "w": 1})
    assert partition.indices(5) == {"u": [0, 2], "v": [1], "w": [3]}
    mask = partition.mask(("w", "v"), 5)
    assert mask.int().tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]
    assert partition.permuted(5).indices(5) == {"u": [1], "v": [3], "w": [0, 2]}


@pytest.mark.parametrize(("blocks", "width", "text"), [
    ({"u": 0}, 4, "at least one coordinate"), ({"u": [1], "v": [1]}, 4, "disjoint"), ({"u": 3, "v": 2}, 4, "at most 4"),
    ({"u": [9]}, 4, "at most 4"),
])  # fmt: skip
def test_blocks_that_do_not_fit_are_refused(blocks, width, text):
    with pytest.raises(ShapeMismatchError, match=text):
        Partition(blocks).indices(width)
