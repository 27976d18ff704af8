"""Scores of heads as terms of both streams, and what a score does to an observable."""

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, PositionError
from tests.cases import DECODERS, build, inputs_for

LAYER, HEAD, TO, FROM = 2, 3, 5, 4


def scores_of(model, ids):
    site = f"blocks.{LAYER}.attn.hook_attn_scores"
    return model.capture(ids, site)[site][0]


def product(model, ids, plan=()):
    """Turned query times turned key, as the model's own scores see them."""
    q, k = (f"blocks.{LAYER}.attn.hook_rot_{part}" for part in "qk")
    acts = model.capture(ids, [q, k], plan=plan)
    group = HEAD // (model.layout.n_heads // model.layout.n_kv_heads)
    return float(acts[q][0, TO, HEAD] @ acts[k][0, FROM, group])


@pytest.mark.parametrize("name", DECODERS)
def test_terms_sum_to_the_models_own_score(name):
    model, ids = interp.attach(build(name)), inputs_for(name)[:1]
    found = interp.attention_score(model, ids, LAYER, HEAD, TO, FROM)
    cap = getattr(model.config, "attn_logit_softcapping", None)
    own = float(scores_of(model, ids)[HEAD, TO, FROM])
    own = own if cap is None else cap * torch.atanh(torch.tensor(own / cap)).item()
    assert found.score == pytest.approx(own, rel=1e-4, abs=1e-5)
    assert found.completeness_error < 1e-6
    for side in ("query", "key"):
        total = sum(row["value"] for row in found.by_component(side))
        assert total == pytest.approx(found.score, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_each_sides_vector_gives_the_score_from_its_own_stream(name):
    model, ids = interp.attach(build(name)), inputs_for(name)[:1]
    found = interp.attention_score(model, ids, LAYER, HEAD, TO, FROM)
    acts = model.capture(ids, f"blocks.{LAYER}.hook_resid_pre")
    for vector in (found.query, found.key):
        assert float(vector.score(acts)) + vector.offset == pytest.approx(found.score, rel=1e-4, abs=1e-4)
    assert (found.query.position, found.key.position) == (TO, FROM)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2", "gpt-j", "granite"])
@pytest.mark.parametrize("side", ["query", "key"])
def test_a_sides_vector_is_the_scores_gradient_with_divisors_held(name, side):
    """Moves the stream in front of the norm, holds its divisor, and reads the score again."""
    model, ids = interp.attach(build(name)), inputs_for(name)[:1]
    found = interp.attention_score(model, ids, LAYER, HEAD, TO, FROM)
    vector = found.query if side == "query" else found.key
    normed = f"blocks.{LAYER}.ln1.hook_scale"
    plan = [interp.Set(normed, value=model.capture(ids, normed)[normed])] if model.layout.ln1 else []
    step = 0.05 * torch.randn(vector.vector.shape, generator=torch.Generator().manual_seed(1))
    site = f"blocks.{LAYER}.hook_resid_pre"
    moved = []
    for sign in (1, -1):
        change = interp.Add(site, value=sign * step, positions=vector.position)
        key = f"blocks.{LAYER}.attn.hook_rot_q", f"blocks.{LAYER}.attn.hook_rot_k"
        acts = model.capture(ids, list(key), plan=[change, *plan])
        q, k = (
            acts[key[0]][0, TO, HEAD],
            acts[key[1]][0, FROM, HEAD // (model.layout.n_heads // model.layout.n_kv_heads)],
        )
        moved.append(float(q @ k))
    acts = model.capture(ids, [f"blocks.{LAYER}.attn.hook_rot_q", f"blocks.{LAYER}.attn.hook_rot_k"])
    q = acts[f"blocks.{LAYER}.attn.hook_rot_q"][0, TO, HEAD]
    k = acts[f"blocks.{LAYER}.attn.hook_rot_k"][0, FROM, HEAD // (model.layout.n_heads // model.layout.n_kv_heads)]
    scale = found.score / float(q @ k)
    assert scale * (moved[0] - moved[1]) / 2 == pytest.approx(float(vector.vector @ step), rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel", "olmo2", "granite", "qwen2"])
def test_pattern_effects_are_the_gradient_by_scores(name):
    """By finite differences of the last layer's scores, with everything behind held linear."""
    model, ids = interp.attach(build(name)), inputs_for(name)[:1]
    last = model.n_layers - 1
    observable = interp.Observable.tokens(model, [3, 5], [7], weights=[1.0, 2.0, -0.5])
    totals = interp.propagate_all(model, [observable], ids, linearization="path")
    found = interp.pattern_effects(totals, last)[0]
    site = f"blocks.{last}.attn.hook_attn_scores"
    scores, place = model.capture(ids, site)[site], ids.shape[1] - 1
    for head, source in ((0, 1), (3, 4), (2, place)):
        moved = []
        for step in (0.02, -0.02):
            changed = scores.clone()
            changed[0, head, place, source] += step
            moved.append(model.run(ids, plan=interp.Set(site, value=changed))[0, place])
        slope = float(observable.measure(moved[0]) - observable.measure(moved[1])) / 0.04
        assert float(found[head, place, source]) == pytest.approx(slope, rel=2e-2, abs=2e-3)
    assert found[:, place].sum(-1).abs().max() < 1e-4  # a common shift of scores moves nothing


def test_the_exact_gradient_is_the_value_side_and_the_query_key_side():
    """OV part by totals with the pattern held, QK part by scores' vectors: together the model's own gradient."""
    model, ids = interp.attach(build("llama", dtype=torch.float64)), inputs_for("llama")[:1]
    observable, last = interp.Observable.logit(model, 9), model.n_layers - 1
    site, length = f"blocks.{last}.hook_resid_pre", ids.shape[1]
    held = interp.Linearization(norm="frozen", attention="frozen")
    frozen = interp.propagate_all(
        model, observable, ids, linearization=held, sites=[site, f"blocks.{last}.attn.hook_z"]
    )
    both = interp.propagate_all(model, observable, ids, linearization=interp.Linearization(norm="frozen"), sites=[site])
    effects, total = interp.pattern_effects(frozen, last)[0], frozen[site][0].clone()
    place = length - 1
    for head in range(model.layout.n_heads):
        for source in range(length):
            score = interp.attention_score(model, ids, last, head, place, source)
            total[place] += effects[head, place, source] * score.query.vector
            total[source] += effects[head, place, source] * score.key.vector
    torch.testing.assert_close(total, both[site][0], rtol=1e-5, atol=1e-6)


def test_what_does_not_exist_is_refused(unchecked):
    model, ids = interp.attach(build("llama")), inputs_for("llama")[:1]
    with pytest.raises(PositionError, match="source position 5 is after destination 2"):
        interp.attention_score(model, ids, 1, 0, 2, 5)
    with pytest.raises(ArgumentError, match="head 9 out of range for layer 1"):
        interp.attention_score(model, ids, 1, 9, 5, 2)
    with pytest.raises(ArgumentError, match="layer 7"):
        interp.attention_score(model, ids, 7, 0, 5, 2)
    with pytest.raises(ArgumentError, match="'query' or 'key'"):
        interp.attention_score(model, ids, 1, 0, 5, 2).by_component("value")
