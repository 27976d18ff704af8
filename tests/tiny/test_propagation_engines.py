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


def numbers(model, ids, scored=True):
    """What each method says of one zero-sum observable: measurement, parts, path, total, score of a head."""
    observable = interp.Observable.logit_diff(model, 3, 7)
    direct = interp.direct_attribution(model, observable, ids)
    path = interp.propagate(model, observable, ids, path="L0H1@2 -> L1MLP -> L2H3@2")
    total = interp.propagate(model, observable, ids, site="blocks.1.hook_resid_pre@3", linearization="frozen")
    acts = model.capture(ids, ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"])
    return {
        "measurement": torch.tensor(direct.measurement), "heads": direct.heads, "MLPs": direct.mlps,
        "path": path.score(acts) + path.offset, "path's vector": path.vector, "total": total.vector,
    } | (scores(model, ids) if scored else {})  # fmt: skip


def scores(model, ids):
    score = interp.attention_score(model, ids, 1, 2, -1, 2)
    return {"score": torch.tensor(score.score), "terms": score.matrix}


def same(found, wanted, names=None):
    for name in names or wanted:
        torch.testing.assert_close(found[name], wanted[name].to(found[name]), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox-sequential"])
def test_a_raw_bridge_gives_the_same(name, tokenizer):
    ids = inputs_for(name)[:1]
    # A bridge computes its hooked norms' scales under no_grad, which a tape refuses: there is no score by its own code.
    scored = name == "gpt2"
    bridge = interp.attach(bridge_of(build(name), tokenizer))
    same(numbers(bridge, ids, scored), numbers(interp.attach(build(name)), ids, scored))


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
