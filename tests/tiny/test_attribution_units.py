"""Sources, neurons, key/value heads, several observables and contrasts, on every decoder family."""

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, CompletenessError, SiteUnavailableError
from interp.plots import chart
from interp.saving import load_result, save_result
from tests.cases import DECODERS, build, inputs_for

FINEST = {name: "source" if name == "mixtral" else "source+neuron" for name in DECODERS}
VARIED = ["llama", "gpt2", "gemma2", "olmo2", "neox-parallel", "phi3", "granite", "qwen3"]
# Norms and softmax in the model's own dtype: LayerNorm families, where patterns are cast behind the softmax at most.
WIDE = ["gpt2", "gpt-neo", "gpt-j", "neox-parallel", "neox-sequential", "phi", "starcoder2"]


def model_and_ids(name, **options):
    return interp.attach(build(name, **options)), inputs_for(name)[:1]


def weighted(model):
    return interp.Observable.tokens(model, [3, 5], [7], weights=[1.0, 2.0, -0.5])


def removed(model, ids, observable, change):
    """Slow twin: what a change in the last layer takes from the measurement, all divisors behind it held."""
    last = f"blocks.{model.n_layers - 1}"
    held = ["ln_final.hook_scale", f"{last}.ln1_post.hook_scale", f"{last}.ln2_post.hook_scale"]
    if not str(change.site).endswith("hook_post"):
        held.append(f"{last}.hook_mlp_out")
    held = [site for site in held if site in model.bindings.by_address]
    acts = model.capture(ids, [*held, "unembed.hook_out"])
    plan = [change, *(interp.Set(site, value=acts[site]) for site in held)]
    changed = model.capture(ids, "unembed.hook_out", plan=plan)["unembed.hook_out"]
    scale = model.layout.logit_scale
    return float(observable.measure((acts["unembed.hook_out"] - changed)[0, -1] * scale))


def reader(model, ids):
    """u by hand, the constant, and the final stream, in float32 or better: what contributions must sum against."""
    acts = model.capture(ids, [f"blocks.{model.n_layers - 1}.hook_resid_post"], positions=-1)
    x = next(iter(acts.values()))[0, 0]
    x = x if x.dtype == torch.float64 else x.float()
    norm, w = model.bindings.norms["ln_final"], weighted(model).pull_to_stream(model)
    centred = x - x.mean() if norm.centred else x
    r = (centred.square().mean() + norm.eps).sqrt()
    u = w[0].to(x) * norm.gain.to(x) / r
    bias = 0.0 if norm.bias is None else float(w[0].to(x) @ norm.bias.to(x))
    return (u - u.mean() if norm.centred else u), bias + w[1], x


@pytest.mark.parametrize("name", DECODERS)
def test_every_unit_sums_to_the_measurement_and_to_the_coarser_unit(name):
    model, ids = model_and_ids(name)
    found = interp.direct_attribution(model, weighted(model), ids, FINEST[name])
    whole = interp.direct_attribution(model, weighted(model), ids, "component")
    assert found.completeness_error < 2e-6
    assert found.total == pytest.approx(whole.measurement, rel=1e-4, abs=1e-5)
    size = whole.attention.abs().max()
    torch.testing.assert_close(found.sources.sum(-1), found.heads, rtol=0, atol=1e-5 * float(size))
    torch.testing.assert_close(
        found.heads.sum(-1) + found.attention_bias, whole.attention, rtol=0, atol=1e-5 * float(size)
    )
    if found.neurons is not None:
        torch.testing.assert_close(
            found.neurons.sum(-1) + found.mlp_bias, whole.mlps, rtol=0, atol=1e-5 * float(whole.mlps.abs().max())
        )
    for unit in (None, "head", "kv_head", "component", "source"):
        assert sum(r["value"] for r in found.to_records(unit)) == pytest.approx(found.measurement, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", VARIED)
def test_a_source_is_what_deleting_one_entry_of_the_pattern_takes(name):
    model, ids = model_and_ids(name)
    layer, head, source = model.n_layers - 1, 2, 5
    found = interp.direct_attribution(model, weighted(model), ids, "source")
    site = f"blocks.{layer}.attn.hook_pattern"
    pattern = model.capture(ids, site)[site].clone()
    pattern[0, head, -1, source] = 0
    wanted = removed(model, ids, weighted(model), interp.Set(site, value=pattern))
    assert abs(wanted) > 1e-4, "a contribution of zero would prove nothing"
    assert found.head_from(layer, head, source) == pytest.approx(wanted, rel=2e-3, abs=2e-6)
    assert found.head_from(layer, head, source - ids.shape[1]) == found.head_from(layer, head, source)


@pytest.mark.parametrize("name", VARIED)
def test_a_neuron_is_what_silencing_it_takes(name):
    model, ids = model_and_ids(name)
    layer = model.n_layers - 1
    found = interp.direct_attribution(model, weighted(model), ids, "neuron")
    index = int(found.neurons[layer].abs().argmax())
    site = f"blocks.{layer}.mlp.hook_post"
    post = model.capture(ids, site)[site].clone()
    post[..., index] = 0
    wanted = removed(model, ids, weighted(model), interp.Set(site, value=post))
    assert found.neuron(layer, index) == pytest.approx(wanted, rel=2e-3, abs=2e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_key_value_heads_sum_the_query_heads_that_read_them(name):
    model, ids = model_and_ids(name)
    found = interp.direct_attribution(model, weighted(model), ids, "kv_head")
    groups = model.layout.n_kv_heads
    size = model.layout.n_heads // groups
    for group in range(groups):
        members = [found.head(1, h) for h in range(group * size, (group + 1) * size)]
        assert found.kv_head(1, group) == pytest.approx(sum(members), rel=1e-5)
    kinds = [r["kind"] for r in found.to_records()]
    assert kinds.count("kv_head") == 3 * groups
    assert "head" not in kinds


@pytest.mark.parametrize("name", DECODERS)
def test_identities_hold_in_double_precision(name):
    if name == "mixtral":
        pytest.skip("its experts do not run in float64")
    model, ids = model_and_ids(name, dtype=torch.float64)
    found = interp.direct_attribution(model, weighted(model), ids, "source+neuron")
    assert found.completeness_error < (1e-12 if name in WIDE else 1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite"])
def test_half_precision_sums_with_the_rounding_term(name):
    model, ids = model_and_ids(name, dtype=torch.bfloat16)
    found = interp.direct_attribution(model, weighted(model), ids, "source+neuron")
    u, constant, x = reader(model, ids)
    sizes = sum(abs(r["value"]) for r in found.to_records("head"))
    assert abs(found.total - float(u @ x) - constant) < 1e-5 * sizes
    assert abs(found.rounding) > 1e-5 * sizes, "bfloat16 rounds"
    for unit in ("component", "kv_head", "source"):
        assert abs(sum(r["value"] for r in found.to_records(unit)) - found.total) < 1e-6 * sizes


def test_post_norms_that_centre_and_have_a_bias():
    """No family has one: LayerNorms behind the branches of a Gemma."""
    module = build("gemma2")
    for layer in module.model.layers:
        layer.post_attention_layernorm, layer.post_feedforward_layernorm = (
            torch.nn.LayerNorm(32),
            torch.nn.LayerNorm(32),
        )
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            torch.nn.init.normal_(norm.weight, 1.0, 0.2)
            torch.nn.init.normal_(norm.bias, 0.0, 0.2)
    model, ids = interp.attach(module.eval()), inputs_for("gemma2")[:1]
    found = interp.direct_attribution(model, weighted(model), ids, "source+neuron")
    assert found.completeness_error < 2e-6
    assert found.attention_bias.abs().min() > 1e-5
    assert interp.attribute_dataset(model, weighted(model), ids, "neuron").completeness_error < 2e-6


def test_positions_before_the_last_read_no_later_token():
    model, ids = model_and_ids("mistral")
    found = interp.direct_attribution(model, weighted(model), ids, "source", position=3)
    assert found.position == 3
    assert not found.sources[..., 4:].any()
    assert {r["source"] for r in found.to_records() if r["kind"] == "source"} == {0, 1, 2, 3}


def test_rows_of_the_pattern_that_do_not_sum_to_one():
    """A sink takes half of each row: sources still sum to the head that runs."""
    model, ids = model_and_ids("llama", dtype=torch.float32)
    plan = [interp.Scale("blocks.1.attn.hook_pattern", factor=0.5)]
    found = interp.direct_attribution(model, weighted(model), ids, "source", plan=plan)
    assert found.completeness_error < 2e-6
    assert found.head(1, 0) == pytest.approx(float(found.sources[1, 0].sum()), rel=1e-4)


@pytest.mark.parametrize("site", ["attn.hook_z", "attn.hook_v", "mlp.hook_post"])
def test_a_plan_that_parts_finer_units_from_their_sum_is_refused(site):
    """Values changed where the model's next step does not read them: sources or neurons would not be what ran."""
    model, ids = model_and_ids("llama")
    broken = {"attn.hook_z": "source", "attn.hook_v": "source", "mlp.hook_post": "neuron"}[site]
    step = interp.Scale(f"blocks.1.{site}", factor=3.0)
    plan = [step] if site != "mlp.hook_post" else [interp.Scale("blocks.1.mlp.hook_out", factor=3.0)]
    if site == "attn.hook_v":
        # Later steps read the changed values, but feature vectors of the stream do not know of the change.
        assert interp.direct_attribution(model, weighted(model), ids, "head", plan=plan).completeness_error < 2e-6
    with pytest.raises(CompletenessError, match="finer parts miss theirs"):
        interp.direct_attribution(model, weighted(model), ids, broken, plan=plan)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-j"])
def test_several_observables_in_one_call_are_the_loop(name):
    model, ids = model_and_ids(name)
    many = [weighted(model), interp.Observable.logit_diff(model, 3, 9), interp.Observable.logit(model, 60)]
    together = interp.direct_attribution(model, many, ids, "source+neuron")
    assert [a.observable for a in together] == [n.name for n in many]
    for one, observable in zip(together, many, strict=True):
        alone = interp.direct_attribution(model, observable, ids, "source+neuron")
        for part in ("heads", "attention", "attention_bias", "mlps", "sources", "neurons", "mlp_bias"):
            torch.testing.assert_close(getattr(one, part), getattr(alone, part), rtol=1e-5, atol=1e-6)
        assert one.measurement == pytest.approx(alone.measurement, rel=1e-5, abs=1e-6)
    named = interp.direct_attribution(model, {"a": many[0]}, ids)
    assert [a.observable for a in named] == ["a"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2"])
def test_contrasts_sum(name):
    model, ids = model_and_ids(name)
    observable, other = weighted(model), inputs_for(name)[1:]
    runs = [interp.direct_attribution(model, observable, i, "source+neuron") for i in (ids, other)]
    own = interp.contrast_attribution(model, observable, ids, other, "source+neuron", readers="own")
    assert own.total == pytest.approx(runs[0].measurement - runs[1].measurement, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(own.heads, runs[0].heads - runs[1].heads, rtol=1e-4, atol=1e-6)
    shared = interp.contrast_attribution(model, observable, ids, other, "source+neuron")
    (u, _, x), (_, _, y) = reader(model, ids), reader(model, other)
    assert shared.total == pytest.approx(float(u @ (x - y)), rel=1e-4, abs=1e-5)
    assert shared.total != pytest.approx(own.total, rel=1e-3)
    assert shared.constant == 0
    assert "clean minus corrupt" in shared.note
    assert max(own.completeness_error, shared.completeness_error) < 2e-6
    same = interp.contrast_attribution(model, observable, ids, ids)
    assert same.total == 0
    assert same.completeness_error < 1e-6


def test_contrasts_of_other_lengths():
    model, ids = model_and_ids("llama")
    found = interp.contrast_attribution(model, weighted(model), ids, ids[:, 1:], readers="own")
    assert found.completeness_error < 2e-6
    with pytest.raises(ArgumentError, match="clean has 7 tokens, corrupt 6"):
        interp.contrast_attribution(model, weighted(model), ids, ids[:, 1:], "source")
    with pytest.raises(ArgumentError, match="readers='corrupt'"):
        interp.contrast_attribution(model, weighted(model), ids, ids, readers="corrupt")


def test_rows_name_tokens_and_the_largest_neurons(tokenizer):
    model = interp.attach(build("llama"), tokenizer)
    found = interp.direct_attribution(model, weighted(model), "the cat sat on the mat", "source+neuron")
    rows = found.to_records(neurons=3)
    assert [r["token"] for r in rows if r["component"].startswith("L1H2@")] == ["the", "cat", "sat", "on", "the", "mat"]
    assert sum(r["value"] for r in rows) == pytest.approx(found.measurement, rel=1e-4, abs=1e-4)
    assert sum(r["kind"] == "neuron" for r in rows) == 3 * model.n_layers
    best = max(float(found.sources.abs().max()), float(found.neurons.abs().max()))
    single = [r for r in found.top(40) if "@" in r["component"] or "N" in r["component"]]
    assert max(abs(r["value"]) for r in single) == pytest.approx(best)
    assert not any("other" in r["component"] for r in found.top(200))


def test_a_float64_result_is_not_changed_by_its_rows():
    model, ids = model_and_ids("gpt2", dtype=torch.float64)
    found = interp.direct_attribution(model, weighted(model), ids, "neuron")
    before = found.neurons.clone()
    found.to_records()
    assert torch.equal(before, found.neurons)


def test_saved_and_drawn(tmp_path):
    model, ids = model_and_ids("llama")
    found = interp.direct_attribution(model, weighted(model), ids, "source+neuron")
    save_result(found, tmp_path / "one")
    back = load_result(tmp_path / "one")
    assert torch.equal(back.sources, found.sources)
    assert back.to_records() == found.to_records()
    rows = chart(found).to_dict()["datasets"]["parts"]
    assert sum(r["kind"] == "head" for r in rows) == found.heads.numel()
    cells = chart(found, figure="sources", layer=1).to_dict()["datasets"]["cells"]
    assert sum(r["value"] for r in cells) == pytest.approx(float(found.sources[1].sum()), rel=1e-5)
    assert len(chart(found, figure="sources", top=2).to_dict()["datasets"]["cells"]) == 2 * ids.shape[1]


def test_units_that_do_not_exist_are_refused():
    model, ids = model_and_ids("llama")
    for unit in ("", "heads", "source+head", "neuron+neuron", "head+"):
        with pytest.raises(ArgumentError, match="unit="):
            interp.direct_attribution(model, weighted(model), ids, unit)
    found = interp.direct_attribution(model, weighted(model), ids)
    for call in (lambda: found.head_from(0, 0, 0), lambda: found.neuron(0, 0), lambda: found.to_records("source")):
        with pytest.raises(ArgumentError, match="attribution by head"):
            call()
    with pytest.raises(ArgumentError, match=r"kv_head 2; needed: kv_heads 0\.\.1"):
        found.kv_head(0, 2)
    mixture = interp.attach(build("mixtral"))
    with pytest.raises(SiteUnavailableError, match="hook_post"):
        interp.direct_attribution(mixture, weighted(mixture), ids, "neuron")
