"""Observables on models: token lookup, pull-back to the stream, soft-caps, sites, sequences, dictionaries."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

import interp
from interp import Observable, ObservableSet
from interp.hooks.errors import ArgumentError, InputError, SiteError, TokenError
from interp.observables.readout import Readout
from tests.cases import DECODERS, VOCAB, WIDTH, build, inputs_for

FAMILIES = ["llama", "gpt2", "gpt-j", "cohere", "granite", "gemma2"]


def model_and_ids(name, **options):
    return interp.attach(build(name, **options)), inputs_for(name)[:1]


def a_set(model):
    generator = torch.Generator().manual_seed(2)
    return ObservableSet(
        [
            Observable.tokens(model, [3, 5], [7], weights=[1.0, 2.0, -0.5]),
            Observable.from_vector(torch.randn(VOCAB, generator=generator), name="v", model=model),
            Observable.logit_diff(model, 9, 4),
            Observable.from_vector(torch.randn(VOCAB, generator=generator), name="u"),
            Observable("shifted", (1, 2), (1.0, -1.0), offset=0.75),
        ]
    )


# Pull-back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_the_pull_back_measures_the_logits_at_the_final_norm(name):
    """w · N(x) + offset is n · logits before the cap, for each observable of the set and for each alone."""
    model, ids = model_and_ids(name)
    acts = model.capture(ids, ["unembed.hook_out", "ln_final.hook_normalized"])
    together = a_set(model)
    w, offsets = together.pull_to_stream(model)
    head = model.module.get_output_embeddings()
    inputs = []
    handle = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.run(ids)
    handle.remove()
    wanted = together.measure(acts["unembed.hook_out"] * model.layout.logit_scale)
    torch.testing.assert_close(inputs[0] @ w.T + offsets, wanted, rtol=1e-4, atol=1e-5)
    for i, observable in enumerate(together):
        one, offset = observable.pull_to_stream(model)
        torch.testing.assert_close(one, w[i], rtol=1e-5, atol=1e-6)
        assert offset == pytest.approx(float(offsets[i]), rel=1e-5, abs=1e-6)


def test_float64_weights_are_pulled_in_float64():
    model, _ = model_and_ids("gpt-j", dtype=torch.float64)
    head = model.module.lm_head.requires_grad_(False)
    w, offset = Observable("x", (3, 8), (0.1, 0.2)).pull_to_stream(model)
    torch.testing.assert_close(w, 0.1 * head.weight[3] + 0.2 * head.weight[8], rtol=1e-15, atol=1e-15)
    assert offset == pytest.approx(float(0.1 * head.bias[3] + 0.2 * head.bias[8]), rel=1e-14)


def test_rows_are_gathered_in_parts_of_any_size(monkeypatch):
    import interp.observables.readout as readout

    model, _ = model_and_ids("gpt-j", dtype=torch.bfloat16)
    w, offsets = a_set(model).pull_to_stream(model)
    monkeypatch.setattr(readout, "_ROWS", 4)
    small, small_offsets = a_set(model).pull_to_stream(model)
    torch.testing.assert_close(small, w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(small_offsets, offsets, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_the_model_is_refused():
    model, _ = model_and_ids("llama")
    with pytest.raises(ArgumentError, match=r"length 60; needed: the model's vocabulary, 61 \(unembedding rows\)"):
        Observable.from_vector(torch.ones(60), model=model)
    with pytest.raises(ArgumentError, match=r"length 60; needed: the model's vocabulary, 61"):
        Observable.from_vector(torch.ones(60)).pull_to_stream(model)
    with pytest.raises(ArgumentError, match="token id 61; needed: ids below 61"):
        Observable("x", (61,), (1.0,)).pull_to_stream(model)
    probe = Observable.from_residual(torch.ones(WIDTH), site="blocks.1.hook_resid_post")
    with pytest.raises(ArgumentError, match=r"of blocks\.1\.hook_resid_post; needed: an observable of the logits"):
        probe.pull_to_stream(model)
    with pytest.raises(ArgumentError, match="no unembedding"):
        Observable("x", (1,), (1.0,)).pull_to_stream(interp.attach(build("llama", base=True)))


# Soft-cap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_the_linearised_softcap_is_the_tangent(index):
    """Slope by autograd, value at the reference by the capped logits; attribution then measures the model's own."""
    model, ids = model_and_ids("gemma2")
    cap, observable = model.layout.logit_softcap, a_set(model)[index]
    logits = model.run(ids)[0, -1]
    z = (cap * torch.atanh(logits.double() / cap)).requires_grad_()
    (slope,) = torch.autograd.grad(observable.measure(cap * torch.tanh(z / cap)), z)
    tangent = observable.linearize_softcap(model, logits)
    torch.testing.assert_close(tangent.measure(z), observable.measure(logits).double(), rtol=1e-5, atol=1e-6)
    moved = torch.randn(VOCAB, dtype=torch.float64)
    torch.testing.assert_close(tangent.measure(z + moved) - tangent.measure(z), slope @ moved, rtol=1e-5, atol=1e-6)
    assert "soft-cap linearised" in tangent.note
    found = interp.direct_attribution(model, tangent, ids)
    assert found.measurement == pytest.approx(float(observable.measure(logits)), rel=1e-4, abs=1e-4)
    assert "soft-cap linearised" in found.note
    w, offset = observable.pull_to_stream(model, softcap="linearize", logits=logits)
    wanted, wanted_offset = tangent.pull_to_stream(model)
    torch.testing.assert_close(w, wanted)
    assert offset == wanted_offset
    together, _ = a_set(model).pull_to_stream(model, softcap="linearize", logits=logits)
    torch.testing.assert_close(together[index], w)


def test_softcaps_that_are_refused():
    model, ids = model_and_ids("gemma2")
    observable = Observable.logit_diff(model, 3, 4)
    logits = model.run(ids)[0, -1]
    with pytest.raises(ArgumentError, match="without logits"):
        observable.pull_to_stream(model, softcap="linearize")
    with pytest.raises(ArgumentError, match="with logits"):
        observable.pull_to_stream(model, logits=logits)
    with pytest.raises(ArgumentError, match=r"reference logits up to .*soft-cap of 3"):
        observable.linearize_softcap(model, logits * 10)
    with pytest.raises(ArgumentError, match="saturated"):
        observable.linearize_softcap(model, torch.full((VOCAB,), 3.0))
    uncapped, ids = model_and_ids("llama")
    assert observable.linearize_softcap(uncapped, uncapped.run(ids)[0, -1]) is observable


# A centred unembedding ---------------------------------------------------------------------------------------------


def test_a_centred_unembedding_is_noticed_once_and_only_where_it_matters():
    model, ids = model_and_ids("gpt2")
    before = model.run(ids)[0, -1]
    single, pair = Observable.logit(model, 3), Observable.logit_diff(model, 3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single.pull_to_stream(model)
    module = build("gpt2")
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach() - module.lm_head.weight.detach().mean(0))
    centred = interp.attach(module)
    after = centred.run(ids)[0, -1]
    torch.testing.assert_close(pair.measure(after), pair.measure(before), rtol=1e-4, atol=1e-4)
    assert abs(single.measure(after) - single.measure(before)) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.pull_to_stream(centred)
    with pytest.warns(UserWarning, match=r"'logit 3' has n\.sum\(\) = 1, and the unembedding of this model is centred"):
        single.pull_to_stream(centred)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single.pull_to_stream(centred)


# Sites -------------------------------------------------------------------------------------------------------------


def test_a_functional_of_a_site_reads_its_own_site_only():
    model, ids = model_and_ids("llama")
    acts = model.capture(ids, ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "blocks.0.attn.hook_z#2", "logits"])
    v = torch.randn(WIDTH)
    at_stream = Observable.from_residual(v, site="blocks.1.hook_resid_post", offset=2.0)
    torch.testing.assert_close(at_stream.read(acts), acts["blocks.1.hook_resid_post"] @ v + 2.0)
    all_heads = Observable.from_residual(v, site="blocks.0.attn.hook_z")
    torch.testing.assert_close(all_heads.read(acts), (acts["blocks.0.attn.hook_z"] * v.view(4, 8)).sum((-1, -2)))
    one = Observable.from_residual(v[:8], site="blocks.0.attn.hook_z#2")
    torch.testing.assert_close(one.read(acts), acts["blocks.0.attn.hook_z"][:, :, 2] @ v[:8])
    both = ObservableSet([all_heads, Observable.from_residual(-2 * v, site="blocks.0.attn.hook_z")])
    torch.testing.assert_close(both.read(acts), all_heads.read(acts)[..., None] * torch.tensor([1.0, -2.0]))
    pair = Observable.logit_diff(model, 3, 8)
    torch.testing.assert_close(pair.read(acts), pair.measure(acts["logits"]))
    for other in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post@2"):
        with pytest.raises(SiteError, match="was not captured"):
            Observable.from_residual(v, site=other).read(acts)
    alone = model.capture(ids, "blocks.0.attn.hook_z#2")
    with pytest.raises(SiteError, match="a capture of these heads"):
        all_heads.read(alone)


# Sequences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "granite"])
def test_attributions_of_the_terms_sum_to_the_sequence(name):
    model, ids = model_and_ids(name)
    vector = torch.linspace(-1, 1, VOCAB)
    found = Observable.sequence(model, [(1, 42), (3, vector), (5, Observable.logit_diff(model, 3, 8))])
    logits = model.run(ids)
    wanted = logits[0, 1, 42] + logits[0, 3] @ vector + logits[0, 5, 3] - logits[0, 5, 8]
    torch.testing.assert_close(found.measure(logits), wanted[None], rtol=1e-5, atol=1e-5)
    parts = [interp.direct_attribution(model, o, ids, position=p).total for p, o in found.terms]
    assert sum(parts) == pytest.approx(float(wanted), rel=1e-4, abs=1e-4)
    assert len(found.observables) == 3
    assert found.to_records()[0] == {
        "position": 1, "observable": "logit 42", "n.sum": 1.0, "zero_sum": False, "note": "",
    }  # fmt: skip


def test_a_sequences_log_probability_is_read_by_its_gradient():
    model, ids = model_and_ids("llama")
    prompt, tail = ids[:, :4], ids[0, 4:].tolist()
    found = Observable.sequence_log_prob(model, prompt, tail)
    logits = model.run(ids)[0].double().requires_grad_()
    log_p = sum(torch.log_softmax(logits[3 + i], -1)[token] for i, token in enumerate(tail))
    (gradient,) = torch.autograd.grad(log_p, logits)
    log_p = log_p.detach()
    assert found.log_probability == pytest.approx(float(log_p), rel=1e-5)
    assert found.ids == tuple(ids[0].tolist())
    assert found.positions == (3, 4, 5)
    torch.testing.assert_close(
        found.measure(logits.detach()[None]), (gradient * logits.detach()).sum()[None], rtol=1e-4, atol=1e-5
    )
    assert abs(float(found.measure(logits.detach()[None])) - float(log_p)) > 0.1
    assert "not to the log-probability" in found.note
    assert found.is_zero_sum
    one = Observable.log_prob_gradient(model, tail[0], logits[3].detach())
    torch.testing.assert_close(one.vector, gradient[3], rtol=1e-6, atol=1e-7)


def test_sequences_that_are_refused(unchecked):
    model, ids = model_and_ids("llama")
    with pytest.raises(ArgumentError, match=r"a pair \(position, token\)"):
        Observable.sequence(model, [3])
    with pytest.raises(ArgumentError, match="counts from the start"):
        Observable.sequence(model, [(-1, 3)])
    with pytest.raises(TokenError, match="token id 61"):
        Observable.sequence(model, [(0, 61)])
    with pytest.raises(ArgumentError, match="length 3"):
        Observable.sequence(model, [(0, torch.ones(3))])
    with pytest.raises(InputError, match="2 prompts"):
        Observable.sequence_log_prob(model, inputs_for("llama"), [3])
    with pytest.raises(InputError, match="at least one token"):
        Observable.sequence_log_prob(model, ids, [])
    with pytest.raises(InputError, match="give token ids"):
        Observable.sequence_log_prob(model, ids, " she")


# Tokens of several ids ---------------------------------------------------------------------------------------------


def test_strings_of_several_ids(tokenizer):
    model = interp.attach(build("llama"), tokenizer)
    logits = torch.randn(VOCAB)
    with pytest.raises(
        TokenError, match=r"'a cat' encodes to 2 ids \[5, 6\]; .*multi_token='first' or 'mean'.*sequence"
    ):
        Observable.logit_diff(model, "a cat", "dog")
    target, foil = ("a", "cat", "cat"), ("a", "dog", "bird")
    first = Observable.logit_diff(model, " ".join(target), " ".join(foil), multi_token="first")
    assert first.measure(logits) == logits[6] - logits[7]
    assert "first differing ids [6, 7]" in first.note
    assert "behind the ids [5] that all share" in first.note
    mean = Observable.logit_diff(model, " ".join(target), "dog", multi_token="mean")
    torch.testing.assert_close(mean.measure(logits), (logits[5] + 2 * logits[6]) / 3 - logits[7])
    assert "'a cat cat' is the mean of the unembedding rows of ids [5, 6, 6] (a heuristic)" in mean.note
    assert Observable.logit(model, "a cat", multi_token="first").ids == (5,)
    three = Observable.tokens(model, ["a cat", "dog"], ["bird"], mean=True, multi_token="mean")
    torch.testing.assert_close(three.measure(logits), (logits[5] + logits[6]) / 4 + logits[7] / 2 - logits[9])
    assert interp.direct_attribution(model, mean, inputs_for("llama")[:1]).note == mean.note
    plain = Observable.logit_diff(model, "cat", "dog", multi_token="first")
    assert (plain.ids, plain.note) == ((6, 7), "")
    with pytest.raises(TokenError, match=r"token 'a' has the ids \[5\], with which every other token begins"):
        Observable.logit_diff(model, "a", "a cat", multi_token="first")
    with pytest.raises(TokenError, match="have the same first id 5"):
        Observable.tokens(model, ["a cat", "bird"], ["a dog"], multi_token="first")


def test_an_unknown_way_with_several_ids_is_refused(tokenizer, unchecked):
    model = interp.attach(build("llama"), tokenizer)
    with pytest.raises(ArgumentError, match="multi_token='last'; needed: 'error', 'first' or 'mean'"):
        Observable.logit(model, "a cat", multi_token="last")
    with pytest.raises(ArgumentError, match="softcap='post'"):
        Observable.logit(model, "cat").pull_to_stream(model, softcap="post")


# Dictionaries ------------------------------------------------------------------------------------------------------


def dictionary_of(tmp_path, weights, **config):
    config = {"architecture": "standard", "d_in": WIDTH, "d_sae": 50, "apply_b_dec_to_input": True} | config
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "sae_weights.safetensors")
    return interp.Dictionary.load(tmp_path)


@pytest.mark.parametrize("site", ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"])
def test_a_dictionary_reads_its_site_of_a_model(site, tmp_path):
    model, ids = model_and_ids("llama")
    weights = {"W_enc": torch.randn(WIDTH, 50), "W_dec": torch.randn(50, WIDTH)}
    weights |= {"b_enc": torch.randn(50), "b_dec": torch.randn(WIDTH)}
    found = dictionary_of(tmp_path, weights, hook_name=site, hook_layer=1, hook_head_index=None)
    acts = model.capture(ids, found.site)
    x = acts[site].flatten(2)
    latents = found.read(acts)
    wanted = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    torch.testing.assert_close(latents, wanted)
    parts = found.decoder_observables().read(acts)
    torch.testing.assert_close(parts, x @ weights["W_dec"].T, rtol=1e-4, atol=1e-4)
    pre = found.encoder_observable(7).read(acts)
    torch.testing.assert_close(pre.relu(), latents[..., 7], rtol=1e-4, atol=1e-4)
    with pytest.raises(SiteError, match="was not captured"):
        found.read(model.capture(ids, "blocks.0.hook_resid_pre"))


def test_exact_directions_reconstruct_and_steer(tmp_path):
    """A dictionary of both signs of an orthonormal basis reconstructs; adding its direction moves its observable."""
    model, ids = model_and_ids("llama")
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    both = torch.cat([basis, -basis])
    weights = {"W_enc": both.T.contiguous(), "W_dec": both, "b_enc": torch.zeros(64), "b_dec": torch.randn(WIDTH)}
    site = "blocks.1.hook_resid_post"
    found = dictionary_of(tmp_path, weights, d_sae=64, metadata={"hook_name": site})
    acts = model.capture(ids, site)
    assert found.reconstruction_error(acts[site]).max() < 1e-5
    observable = found.observable(5)
    moved = model.capture(ids, site, plan=[interp.Add(site, value=2.0 * found.direction(5))])
    torch.testing.assert_close(observable.read(moved), observable.read(acts) + 2.0, rtol=1e-4, atol=1e-4)


# TransformerLens ---------------------------------------------------------------------------------------------------


def test_a_processed_bridge_is_seen_as_it_is(tokenizer, bridge_package):
    """Its W_U is centred, its logits are shifted: zero-sum measurements are the original's, others are warned about."""
    plain, ids = model_and_ids("gpt2")
    bridge = bridge_package.TransformerBridge.boot_transformers(
        "local", hf_model=build("gpt2"), tokenizer=tokenizer, device="cpu"
    )
    bridge.enable_compatibility_mode()
    model = interp.attach(bridge)
    assert Readout.of(model).is_centred
    assert not Readout.of(plain).is_centred
    with pytest.warns(UserWarning, match="is centred"):
        Observable.logit(model, 3).pull_to_stream(model)
    shift = (model.run(ids) - plain.run(ids))[0, -1]
    assert shift.std() < 1e-4 < shift.abs().min()
    pair = Observable.logit_diff(model, 3, 8)
    torch.testing.assert_close(pair.measure(model.run(ids)), pair.measure(plain.run(ids)), rtol=1e-4, atol=1e-4)
