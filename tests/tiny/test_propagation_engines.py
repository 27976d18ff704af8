"""Scores of attention through every engine, and compatibility mode's shift; attribution is in test_identities.py."""

import pytest
import torch

import interp
from tests import identities
from tests.cases import build, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:.*which nnsight already serves")


@pytest.mark.parametrize(("name", "engine"), [
    ("gpt2", "TransformerBridge"), ("llama", "TransformerBridge"), ("gemma2", "TransformerBridge"),
    ("gpt2", "compatibility mode"), ("gpt2", "nnsight"), ("llama", "nnsight"),
])  # fmt: skip
def test_scores_of_attention_are_the_same(name, engine, tokenizer, bridge_package, nnsight_package):
    ids = inputs_for(name)[:1]
    models = identities.ENGINES[engine](name, tokenizer), interp.attach(build(name))
    found, wanted = (interp.attention_score(model, ids, 1, 2, -1, 2) for model in models)
    assert found.score == pytest.approx(wanted.score, rel=1e-3, abs=1e-3)
    if engine != "compatibility mode":
        torch.testing.assert_close(found.matrix, wanted.matrix, rtol=1e-4, atol=1e-4)
        sides = [pulled(model, ids) for model in models]
        for part, value in sides[1].items():
            torch.testing.assert_close(sides[0][part], value.to(sides[0][part]), rtol=1e-4, atol=1e-4, msg=part)


def pulled(model, ids):
    """What the exact gradient of one readout is at patterns and at the embedding."""
    totals = interp.propagate_all(model, interp.Observable.logit_diff(model, 3, 7), ids, linearization="exact")
    return {"effects": interp.pattern_effects(totals, 1), "gradient": totals["hook_embed"]}


def linearised(model, ids):
    """What a scope, and a Jacobian, say of the network's own code: rows by pulling, columns by pushing."""
    scope = interp.LinearScope(model, ids, output="blocks.1.hook_resid_post")
    assert all(row["holds"] for row in scope.check())
    jacobian = interp.jacobian(model, ids, source="blocks.0.hook_resid_post", target="blocks.2.hook_resid_pre")
    return {"r": scope.r, "Fx": scope.Fx, "row": scope.rows([(6, 3)]), "Jacobian": jacobian.dense()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_raw_bridge_is_linearised_as_the_model(name, tokenizer, bridge_package):
    """A bridge computes the scales of its hooked norms under no_grad, and does not go on with them."""
    ids = inputs_for(name)[:1]
    bridge, plain = (linearised(model, ids) for model in (
        identities.ENGINES["TransformerBridge"](name, tokenizer), interp.attach(build(name))
    ))  # fmt: skip
    for part, wanted in plain.items():
        torch.testing.assert_close(bridge[part], wanted.to(bridge[part]), rtol=1e-4, atol=1e-4, msg=part)


def test_compatibility_mode_moves_all_logits_of_a_position_alike(tokenizer, bridge_package):
    """It centres the unembedding: that is why only zero-sum observables measure the same."""
    ids = inputs_for("gpt2")[:1]
    processed, plain = identities.processed("gpt2", tokenizer), interp.attach(build("gpt2"))
    shift = processed.run(ids)[0, -1] - plain.run(ids)[0, -1]
    torch.testing.assert_close(shift, shift.mean().expand_as(shift), rtol=0, atol=1e-4)
    assert abs(float(shift.mean())) > 1e-3
