"""Examples of interventions: what stands in a row is what the algorithm and the network say when run by hand."""

import pytest
import torch

import interp
from interp.causal import Alignment, IdentityMap, Partition, hierarchical_equality, mlp
from interp.hooks.errors import ArgumentError, UnmatchedVariableError

TASK = hierarchical_equality()


@pytest.fixture
def alignment():
    network = mlp(TASK, seed=3)
    with torch.no_grad():  # as it is drawn, it answers the same to nearly everything
        outputs = network(TASK.sample(200, seed=5).pool.inputs)
        network.head.bias -= outputs.median(0).values
    return Alignment(
        interp.attach(network), TASK.causal_model, "block2", IdentityMap(16), Partition({"v1": 8, "v2": 8})
    )


def test_rows_are_the_interventions_run_by_hand(alignment):
    data = TASK.sample(60, seed=1)
    found = alignment.examples(data, 10).to_records()
    network = alignment.model.module
    h = network[:2](data.pool.inputs)
    for row in found:
        i = row["pair"]
        base, swapped = h[data.base[i]].clone(), []
        for k, variable in enumerate(data.variables):
            own = int(data.pool.settings[variable][data.base[i]])
            if data.chosen[i, k]:
                swapped.append(variable)
                base[8 * k : 8 * k + 8] = h[data.sources[i, k], 8 * k : 8 * k + 8]
                assert row[variable] == f"{own} → {int(data.pool.settings[variable][data.sources[i, k]])}"
                numbers = [float(x) for x in row[f"source of {variable}"].split()]
                torch.testing.assert_close(
                    torch.tensor(numbers), data.pool.inputs[data.sources[i, k]], atol=6e-3, rtol=0
                )
            else:
                assert (row[variable], row[f"source of {variable}"]) == (str(own), "")
        assert row["set"] == "+".join(swapped)
        assert row["network"] == str(int(network[2:](base).argmax()))
        assert row["network before"] == str(int(network(data.pool.inputs[data.base[i]]).argmax()))
        assert row["algorithm"] == str(int(data.labels[i]))
        assert row["right"] == (row["network"] == row["algorithm"])
    assert len({r["network"] for r in found}) == 2
    assert any(r["network"] != r["network before"] for r in found)


def test_pairs_that_flip_and_pairs_that_stay_take_turns(alignment):
    found = alignment.examples(TASK.sample(60, seed=1), 8).to_records()
    assert [r["algorithm"] != r["algorithm before"] for r in found] == [True, False] * 4


def test_refused(alignment):
    with pytest.raises(ArgumentError, match="n=0"):
        alignment.examples(TASK.sample(20, seed=0), 0)
    with pytest.raises(UnmatchedVariableError):
        alignment.examples(TASK.with_variables("v1").sample(20, seed=0))
