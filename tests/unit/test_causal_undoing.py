"""Maps that training drives beyond what float32 can undo: such a state is never the one that is kept."""

import pytest
import torch

import interp
from interp.causal import (
    Alignment,
    CausalAbstractionWarning,
    Partition,
    RevNetMap,
    Training,
    hierarchical_equality,
    mlp,
    training,
)
from interp.hooks.errors import NonInvertibleMapError

TASK = hierarchical_equality()
MODEL = interp.attach(mlp(TASK))


@pytest.fixture(scope="module")
def splits():
    return TASK.splits(400, 200, 100)


def fitted(splits, **options):
    found = Alignment(MODEL, TASK.causal_model, "block1", RevNetMap(16, 2, 16, seed=1), Partition({"v1": 8, "v2": 8}))
    found.fit(splits, training=Training(batch_size=100, patience=99, **options))
    return found


def test_a_state_that_does_not_undo_itself_is_not_chosen(splits, monkeypatch):
    early = fitted(splits, steps=12, validate_every=12, lr=1e-2)
    plain = training.refuse_not_invertible

    def refuse(tau, acts, when):
        if when == "after 24 steps":
            raise NonInvertibleMapError("the state at 24", "another")
        return plain(tau, acts, when)

    whole = fitted(splits, steps=24, validate_every=12, lr=1e-2)
    assert whole.result.losses[1] < whole.result.losses[0]
    monkeypatch.setattr(training, "refuse_not_invertible", refuse)
    with pytest.warns(CausalAbstractionWarning, match="1 validations left out"):
        found = fitted(splits, steps=24, validate_every=12, lr=1e-2)
    assert found.result.losses == whole.result.losses
    assert found.result.validation_loss == found.result.losses[0]
    for one, other in zip(found.tau.parameters(), early.tau.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_map_that_no_validation_finds_undoing_itself_is_refused(splits):
    with pytest.raises(NonInvertibleMapError, match=r"after \d+ steps: the way back misses"):
        fitted(splits, steps=6, validate_every=3, lr=1.0)
