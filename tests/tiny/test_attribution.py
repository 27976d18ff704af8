"""Observables, direct attribution and the logit lens on every decoder family."""

from dataclasses import replace

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, CompletenessError, SiteUnavailableError, TokenError
from tests.cases import DECODERS, build, inputs_for


def model_and_ids(name, **options):
    return interp.attach(build(name, **options)), inputs_for(name)[:1]


def weighted(model):
    return interp.Observable.tokens(model, [3, 5], [7], weights=[1.0, 2.0, -0.5])


def softcapped(model, logits):
    cap = model.layout.logit_softcap
    return logits if cap is None else cap * torch.atanh(logits / cap)


@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize("name", DECODERS)
def test_parts_sum_to_the_measurement(name, position):
    model, ids = model_and_ids(name)
    found = interp.direct_attribution(model, weighted(model), ids, position=position)
    logits = softcapped(model, model.run(ids)[0, position])
    wanted = logits[3] + 2 * logits[5] - 0.5 * logits[7]
    assert found.measurement == pytest.approx(float(wanted), rel=1e-4, abs=1e-4)
    assert found.completeness_error < 2e-6
    assert found.position == position % ids.shape[1]


@pytest.mark.parametrize("name", DECODERS)
def test_heads_and_bias_sum_to_their_branch(name):
    model, ids = model_and_ids(name)
    by_head = interp.direct_attribution(model, weighted(model), ids, "head")
    by_branch = interp.direct_attribution(model, weighted(model), ids, "component")
    summed = by_head.heads.sum(1) + by_head.attention_bias
    assert (summed - by_branch.attention).abs().max() <= 1e-5 * by_branch.attention.abs().max()
    assert by_branch.heads is None
    with pytest.raises(ArgumentError, match="unit='head'"):
        by_branch.head(0, 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "neox-parallel"])
def test_a_heads_contribution_is_what_zeroing_it_removes_with_divisors_held(name):
    """Slow twin: zero one head's z, run the last norm with the old divisor, and read the difference."""
    model, ids = model_and_ids(name)
    last, head = model.n_layers - 1, 2
    found = interp.direct_attribution(model, weighted(model), ids)
    scale = model.capture(ids, "ln_final.hook_scale")["ln_final.hook_scale"]
    plan = [interp.Zero(f"blocks.{last}.attn.hook_z", head=head), interp.Set("ln_final.hook_scale", value=scale)]
    hold = [f"blocks.{last}.ln1_post.hook_scale", f"blocks.{last}.hook_mlp_out"]
    plan += [interp.Set(s, value=model.capture(ids, s)[s]) for s in hold if s in model.bindings.by_address]
    without = model.capture(ids, "unembed.hook_out", plan=plan)["unembed.hook_out"][0, -1]
    measured = float(weighted(model).measure(without)) * model.layout.logit_scale
    assert found.head(last, head) == pytest.approx(found.measurement - measured, rel=1e-3, abs=1e-5)


def test_swapping_target_and_foil_negates_everything():
    model, ids = model_and_ids("llama")
    one = interp.direct_attribution(model, interp.Observable.logit_diff(model, 3, 9), ids)
    two = interp.direct_attribution(model, interp.Observable.logit_diff(model, 9, 3), ids)
    assert torch.equal(one.heads, -two.heads)
    assert torch.equal(one.mlps, -two.mlps)
    assert one.measurement == -two.measurement


def test_constant_holds_the_norms_and_the_unembeddings_bias():
    model, ids = model_and_ids("gpt-j")
    assert abs(interp.direct_attribution(model, weighted(model), ids).constant) > 1e-2


def test_half_precision_reports_its_rounding():
    model, ids = model_and_ids("llama", dtype=torch.bfloat16)
    found = interp.direct_attribution(model, weighted(model), ids)
    assert 0 < abs(found.rounding) < 0.02 * sum(abs(r["value"]) for r in found.to_records())


def test_under_a_plan_and_records():
    model, ids = model_and_ids("llama")
    found = interp.direct_attribution(model, weighted(model), ids, plan=[interp.Zero("blocks.1.hook_mlp_out")])
    assert found.mlp(1) == 0
    assert sum(r["value"] for r in found.to_records()) == pytest.approx(found.measurement, rel=1e-4, abs=1e-4)
    assert len(found.top(3)) == 3


def test_a_wrong_part_is_caught(monkeypatch):
    """Planted error: heads read with a rolled W_O do not sum, and the call raises."""
    from interp.propagation.reference import Weights

    model, ids = model_and_ids("llama")
    right = Weights.output
    rolled = lambda self, layer: replace(right(self, layer), weight=right(self, layer).weight.roll(1, 1))
    monkeypatch.setattr(Weights, "output", rolled)
    with pytest.raises(CompletenessError, match="contributions without rounding sum to"):
        interp.direct_attribution(model, weighted(model), ids)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_models_without_a_readout_are_refused(name):
    model = interp.attach(build(name))
    with pytest.raises(SiteUnavailableError, match="direct attribution"):
        interp.direct_attribution(model, interp.Observable("x", (1,), (1.0,)), inputs_for(name)[:1])
    with pytest.raises(SiteUnavailableError, match="logit lens"):
        interp.logit_lens(model, inputs_for(name)[:1])


# Observables -------------------------------------------------------------------------------------------------------


def test_token_lookup(tokenizer):
    model = interp.attach(build("llama"), tokenizer)
    assert interp.Observable.logit(model, "cat").ids == (6,)
    with pytest.raises(TokenError, match=r"encodes to 2 ids \[5, 6\]"):
        interp.Observable.logit(model, "a cat")
    with pytest.raises(TokenError, match="token id 61"):
        interp.Observable.logit(model, 61)
    with pytest.raises(TokenError, match="non-empty"):
        interp.Observable.logit(model, "")


def test_observables_that_are_zero_or_do_not_fit_are_refused():
    model, _ = model_and_ids("llama")
    with pytest.raises(ArgumentError, match="is zero"):
        interp.Observable.logit_diff(model, 4, 4)
    with pytest.raises(ArgumentError, match="is zero"):
        interp.Observable.from_vector(torch.zeros(61))
    with pytest.raises(ArithmeticError, match="NaN"):
        interp.Observable.from_vector(torch.full((61,), torch.nan))
    with pytest.raises(ArgumentError, match=r"length 60; needed: .*61"):
        interp.Observable.from_vector(torch.ones(60)).measure(torch.zeros(61))
    with pytest.raises(ArgumentError, match="a list of tokens"):
        interp.Observable.tokens(model, "cat")
    with pytest.raises(ArgumentError, match="2 weights for 3"):
        interp.Observable.tokens(model, [1, 2], [3], weights=[1.0, 1.0])


def test_vector_and_token_forms_agree():
    model, ids = model_and_ids("granite")
    tokens = weighted(model)
    vector = torch.zeros(61)
    vector[[3, 5, 7]] = torch.tensor([1.0, 2.0, -0.5])
    dense = interp.Observable.from_vector(vector)
    logits = model.run(ids)
    torch.testing.assert_close(tokens.measure(logits), dense.measure(logits))
    one, two = (interp.direct_attribution(model, o, ids) for o in (tokens, dense))
    torch.testing.assert_close(one.heads, two.heads)
    assert not tokens.is_zero_sum
    assert interp.Observable.logit_diff(model, 1, 2).is_zero_sum
    mean = interp.Observable.tokens(model, [1, 2], [3], mean=True)
    assert mean.weights == (0.5, 0.5, -1.0)


# Logit lens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_last_layer_of_the_lens_is_the_model(name):
    model, ids = model_and_ids(name)
    lens = interp.logit_lens(model, ids, [3, 9], k=4)
    wanted = torch.softmax(model.module(ids).logits[0].float(), -1)
    torch.testing.assert_close(lens.top_probabilities[-1], wanted.topk(4).values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lens.probabilities[-1], wanted[:, [3, 9]], rtol=1e-4, atol=1e-6)
    order = wanted.argsort(-1, descending=True)
    assert int(lens.ranks[-1, 2, 0]) == order[2].tolist().index(3)


def test_lens_reads_each_layer_by_the_formula():
    model, ids = model_and_ids("gpt2")
    lens = interp.logit_lens(model, ids, k=1)
    hidden = model.module(ids, output_hidden_states=True).hidden_states
    inner = model.module
    for layer in range(3):
        wanted = torch.softmax(inner.lm_head(inner.transformer.ln_f(hidden[layer])), -1)[0].max(-1).values
        torch.testing.assert_close(lens.top_probabilities[layer, :, 0], wanted, rtol=1e-4, atol=1e-6)
    entropy = lens.entropy[0]
    p = torch.softmax(inner.lm_head(inner.transformer.ln_f(hidden[0])), -1)[0]
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-5)


def test_lens_refuses_bad_arguments():
    model, ids = model_and_ids("gpt2")
    for bad in ({"k": 0}, {"k": 99}):
        with pytest.raises(ArgumentError, match=r"k in 1\.\.61"):
            interp.logit_lens(model, ids, **bad)
    with pytest.raises(ArgumentError, match="2 prompts"):
        interp.logit_lens(model, inputs_for("gpt2"))
