"""Observables, attributions and feature vectors: the same numbers through Hugging Face, TransformerLens and nnsight."""

import pytest
import torch

import interp
from tests.cases import build, inputs_for
from tests.tiny.test_engines import bridge_of, nnsight_of

pytestmark = pytest.mark.filterwarnings("ignore:.*which nnsight already serves")


@pytest.fixture(autouse=True)
def packages(bridge_package, nnsight_package):
    """Both libraries, or a skip with a reason."""


def numbers(model, ids):
    """What each method says of one zero-sum observable: measurement, parts, path, total, score of a head."""
    observable = interp.Observable.logit_diff(model, 3, 7)
    direct = interp.direct_attribution(model, observable, ids)
    path = interp.propagate(model, observable, ids, path="L0H1@2 -> L1MLP -> L2H3@2")
    total = interp.propagate(model, observable, ids, site="blocks.1.hook_resid_pre@3", linearization="frozen")
    acts = model.capture(ids, ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"])
    return {
        "measurement": torch.tensor(direct.measurement), "heads": direct.heads, "MLPs": direct.mlps,
        "path": path.score(acts) + path.offset, "path's vector": path.vector, "total": total.vector,
    } | scores(model, ids)  # fmt: skip


def scores(model, ids):
    score = interp.attention_score(model, ids, 1, 2, -1, 2)
    observable = interp.Observable.logit_diff(model, 3, 7)
    totals = interp.propagate_all(model, observable, ids, linearization="exact")
    return {
        "score": torch.tensor(score.score), "terms": score.matrix, "effects": interp.pattern_effects(totals, 1),
        "gradient": totals["hook_embed"],
    }  # fmt: skip


def linearised(model, ids):
    """What a scope, and a Jacobian, say of the network's own code: rows by pulling, columns by pushing."""
    scope = interp.LinearScope(model, ids, output="blocks.1.hook_resid_post")
    assert all(row["holds"] for row in scope.check())
    jacobian = interp.jacobian(model, ids, source="blocks.0.hook_resid_post", target="blocks.2.hook_resid_pre")
    return {
        "r": scope.r, "Fx": scope.Fx, "row": scope.rows([(6, 3)]), "Jacobian": jacobian.dense(),
    }  # fmt: skip


def same(found, wanted, names=None):
    for name in names or wanted:
        torch.testing.assert_close(found[name], wanted[name].to(found[name]), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_raw_bridge_gives_the_same(name, tokenizer):
    ids = inputs_for(name)[:1]
    bridge, plain = interp.attach(bridge_of(build(name), tokenizer)), interp.attach(build(name))
    same(numbers(bridge, ids), numbers(plain, ids))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_raw_bridge_is_linearised_as_the_model(name, tokenizer):
    """A bridge computes the scales of its hooked norms under no_grad, and does not go on with them."""
    ids = inputs_for(name)[:1]
    bridge, plain = interp.attach(bridge_of(build(name), tokenizer)), interp.attach(build(name))
    same(linearised(bridge, ids), linearised(plain, ids))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nnsight_gives_the_same(name, tokenizer):
    ids = inputs_for(name)[:1]
    same(numbers(interp.attach(nnsight_of(build(name), tokenizer)), ids), numbers(interp.attach(build(name)), ids))


def test_a_processed_bridge_gives_the_same_for_zero_sum_observables(tokenizer):
    """Compatibility mode folds gains, centres what is written to the stream and the unembedding.

    Logits move by a constant for each position, so that a difference stays, and so do shares of heads and MLPs; vectors
    at the stream change by a multiple of ones, which reads nothing of a centred stream.
    """
    ids = inputs_for("gpt2")[:1]
    bridge = bridge_of(build("gpt2"), tokenizer)
    bridge.enable_compatibility_mode()
    processed, plain = interp.attach(bridge), interp.attach(build("gpt2"))
    logits = [model.run(ids)[0, -1] for model in (processed, plain)]
    shift = logits[0] - logits[1]
    torch.testing.assert_close(shift, shift.mean().expand_as(shift), rtol=0, atol=1e-4)
    assert abs(float(shift.mean())) > 1e-3
    observable = interp.Observable.logit_diff(plain, 3, 7)
    found, wanted = (interp.direct_attribution(model, observable, ids) for model in (processed, plain))
    assert found.measurement == pytest.approx(wanted.measurement, rel=1e-4, abs=1e-4)
    same({"heads": found.heads, "MLPs": found.mlps}, {"heads": wanted.heads, "MLPs": wanted.mlps}, ["MLPs"])
    scores = [interp.attention_score(model, ids, 1, 2, -1, 2).score for model in (processed, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-3)
