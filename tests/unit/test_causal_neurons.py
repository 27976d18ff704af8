"""Greedy search for neurons, against one that runs the whole network for each candidate."""

import itertools
import math

import pytest
import torch

import interp
from interp.causal import IdentityMap, Training, greedy_neurons, hierarchical_equality, mlp
from interp.causal.lanes import Lane
from interp.causal.neurons import NeuronSearch, search_lane
from interp.hooks.errors import ArgumentError, DegenerateDataError
from interp.saving import load_result, save_result
from tests.unit.test_causal_alignment import written

TASK = hierarchical_equality("both")
LEFT = hierarchical_equality("left")
pytestmark = pytest.mark.filterwarnings("ignore::interp.causal.report.CausalAbstractionWarning")


def slow_search(network, site, data, most):
    """One forward call in float64 for each candidate, base and sources swapped by hand."""
    network = network.double()
    behind = list(network._modules).index(site) + 1
    h = network[:behind](data.pool.inputs.double()).detach()
    taken, losses = [], []
    for _ in range(most):
        used = {i for t in taken for i in t}
        free = [i for i in range(h.shape[1]) if i not in used]
        best = (math.inf, None)
        for candidate in itertools.permutations(free, len(data.variables)):
            swapped = h[data.base].clone()
            for row in range(len(data)):
                for neurons in [*taken, candidate]:
                    for k, neuron in enumerate(neurons):
                        if data.chosen[row, k]:
                            swapped[row, neuron] = h[data.sources[row, k], neuron]
            loss = torch.nn.functional.cross_entropy(network[behind:](swapped), data.labels).item()
            if loss < best[0] - 1e-9:
                best = (loss, candidate)
        losses.append(best[0])
        taken.append(best[1])
    return [list(column) for column in zip(*taken, strict=True)], losses


@pytest.mark.parametrize(("task", "most"), [(LEFT, 3), (TASK, 2)])
def test_neurons_and_losses_are_those_of_the_slow_search(task, most):
    network, data = mlp(task, seed=3)[:1], task.sample(40, seed=1)
    network.add_module("head", torch.nn.Linear(16, 2))
    torch.manual_seed(0)
    network.head.reset_parameters()
    found = greedy_neurons(interp.attach(network.eval()), task.causal_model, "block1", data, most=most).search
    order, losses = slow_search(network, "block1", data, most)
    assert found.order == order
    assert found.losses == pytest.approx(losses, abs=1e-5)


def test_units_that_are_the_variables_are_found_and_reported_beside_controls():
    splits = TASK.splits(50, 200, 300)
    found = greedy_neurons(interp.attach(written()), TASK.causal_model, "found", splits)
    first, second = (set(block) for block in found.search.order)
    assert first in ({0, 1}, {2, 3})
    assert first | second == {0, 1, 2, 3}
    assert found.search.uncontrolled_curve == [1.0, 1.0]
    report = found.evaluate(splits, seeds=1, measure=False)
    assert report.iia.estimate == 1.0
    assert report.fit["trained"]
    assert report.controls["random_model"].value < 0.8
    assert report.controls["shuffle"].value < 0.8


def test_a_budget_changes_nothing():
    data = TASK.sample(30, seed=2)
    model = interp.attach(mlp(TASK, seed=1))
    found = [greedy_neurons(model, TASK.causal_model, "block2", data, most=2, budget=b).search
             for b in (60_000, "1MiB", "256MiB")]  # fmt: skip
    assert found[0].order == found[1].order == found[2].order
    assert found[0].losses == pytest.approx(found[2].losses, abs=1e-6)


def test_neurons_that_do_nothing_tie_and_the_lowest_is_taken():
    network = mlp(LEFT, seed=0)
    with torch.no_grad():
        network.block2[0].weight[:, :] = 0  # no neuron of block1 matters
    found = greedy_neurons(interp.attach(network), LEFT.causal_model, "block1", LEFT.sample(50, seed=0), most=3)
    assert found.search.order == [[0, 1, 2]]
    assert found.search.best == 1


def test_control_arms_search_on_their_own_network():
    data = LEFT.sample(200, seed=0, split="validation")
    lane = Lane(interp.attach(mlp(LEFT, seed=5)), "block1", IdentityMap(16), torch.zeros(1, 16, dtype=torch.bool),
                search=2)  # fmt: skip
    found = search_lane(lane, data)
    assert lane.mask[0].nonzero().flatten().tolist() == sorted(found.order[0][: found.best])


def test_a_curve_is_shown_as_uncontrolled_and_is_read_back(tmp_path):
    found = greedy_neurons(interp.attach(mlp(LEFT)), LEFT.causal_model, "block1", LEFT.splits(50, 50, 50), most=2)
    row = found.search.to_records()[0]
    assert {"uncontrolled accuracy", "uncontrolled evaluation accuracy"} <= set(row)
    assert found.training == Training()
    save_result(found.search, tmp_path / "search")
    assert load_result(tmp_path / "search") == found.search


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"most": 9}, ArgumentError, r"most=9.*1\.\.8 neurons of 16"),
    ({"most": 0}, ArgumentError, "most=0"),
    ({"test": "same"}, DegenerateDataError, "one set of pairs"),
])  # fmt: skip
def test_searches_that_mean_nothing_are_refused(options, error, text):
    data = TASK.sample(20, seed=0)
    options = {k: data if v == "same" else v for k, v in options.items()}
    with pytest.raises(error, match=text):
        greedy_neurons(interp.attach(mlp(TASK)), TASK.causal_model, "block1", data, **options)


def test_a_size_that_was_not_searched_is_refused():
    search = NeuronSearch(["v1"], [[3, 1]], [0.5, 0.6], [0.7, 0.6], 0.7, 31)
    assert search.partition().blocks == {"v1": (3,)}
    with pytest.raises(ArgumentError, match=r"size=3.*1\.\.2"):
        search.partition(3)
