"""Observables of several positions and of sites: propagated and attributed as autograd, or the stream, says."""

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, PositionError, SiteError, SiteUnavailableError
from interp.propagation.reference import Reference
from tests import propagation_oracles as oracles
from tests.cases import build
from tests.propagation_oracles import LOOSE, TOLERANCE, case, close, part

TERMS = [(2, (3, 1.0)), (4, (9, -2.0)), (6, (5, 0.5)), (6, (7, 1.0))]


def sequence_case(name):
    model, _, ids = case(name)
    terms = [(p, interp.Observable(f"{i}", (i,), (w,))) for p, (i, w) in TERMS]
    return model, interp.Observable.sequence(model, terms), ids


def of_terms(model, logits):
    """Σ w logits, before a soft-cap, by hand."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    return sum(w * logits[0, p, i] for p, (i, w) in TERMS)


def residual(site, width=32, seed=3, offset=0.5):
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return interp.Observable.from_residual(vector, site=site, offset=offset)


# Totals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "linearization"), [
    ("llama", "path"), ("gpt2", "frozen"), ("gemma2", "path"), ("gpt2", "exact"),
])  # fmt: skip
def test_totals_of_a_sequence_are_the_networks_gradients(name, linearization):
    model, observable, ids = sequence_case(name)
    found = interp.propagate_all(model, observable, ids, linearization=linearization)
    wanted = oracles.network_gradients(model, ids, linearization, readout=lambda kept, logits: of_terms(model, logits))
    assert found.position == 6
    assert float(found.measurement[0]) == pytest.approx(float(of_terms(model, model.run(ids))), rel=1e-5)
    for site, value in wanted.items():
        limit = TOLERANCE.get(name, LOOSE) if linearization != "exact" else 2e-5
        close(found[site][0], value.reshape(found[site][0].shape), limit)
    assert all(row["holds"] for row in found.check())
    terms = [interp.propagate_all(model, o, ids, position=p, linearization=linearization) for p, o in observable.terms]
    for site, value in found.items():
        close(value, sum(one[site] for one in terms), 1e-6)


def test_a_sequence_stands_beside_other_observables():
    model, observable, ids = sequence_case("llama")
    n = interp.Observable.logit_diff(model, 3, 9)
    both = interp.propagate_all(model, [n, observable], ids, position=-1)
    for i, one in enumerate((n, observable)):
        alone = interp.propagate_all(model, one, ids)
        close(both["blocks.1.hook_resid_pre"][i], alone["blocks.1.hook_resid_pre"][0], 1e-12)
    f = interp.propagate(model, observable, ids, site="blocks.1.hook_resid_pre@2")
    close(f.vector, both["blocks.1.hook_resid_pre"][1, 2], 1e-12)
    acts = model.capture(ids, "blocks.1.hook_resid_pre")
    assert float(f.score(acts)[0]) + f.offset == pytest.approx(float(both.measurement[1]), rel=1e-5)


# Where an observable is read, and which of the kept tensors that is.
READ = {
    "blocks.2.hook_resid_pre@4": ("blocks.2.hook_resid_pre", lambda x: x[0, 4]),
    "blocks.1.hook_resid_post@last": ("blocks.2.hook_resid_pre", lambda x: x[0, -1]),
    "blocks.2.attn.hook_z#1@5": ("blocks.2.attn.hook_z", lambda x: x[0, 5].reshape(4, -1)[1]),
    "blocks.1.attn.hook_z@5": ("blocks.1.attn.hook_z", lambda x: x[0, 5]),
    "blocks.1.mlp.hook_post@3": ("blocks.1.mlp.hook_post", lambda x: x[0, 3]),
}


@pytest.mark.parametrize("site", list(READ))
@pytest.mark.parametrize(("name", "linearization"), [
    ("llama", "path"), ("llama", "exact"), ("gpt2", "frozen"), ("neox-parallel", "path"),
])  # fmt: skip
def test_totals_of_a_vector_at_a_site_are_the_networks_gradients(name, site, linearization):
    model, _, ids = case(name)
    key, read = READ[site]
    width = {"mlp": 128 if name == "gpt2" else 48, "attn": 8 if "#" in site else 32}.get(site.split(".")[2], 32)
    observable = residual(site, width)
    n = observable.vector
    wanted = oracles.network_gradients(model, ids, linearization, readout=lambda kept, _: read(kept[key]) @ n + 0.5)
    found = interp.propagate_all(model, observable, ids, linearization=linearization)
    x = model.capture(ids, interp.Site.parse(site).whole)
    acts = x[str(interp.Site.parse(site).whole)]
    assert float(found.measurement[0]) == pytest.approx(float(read(acts.flatten(2)) @ n) + 0.5, rel=1e-6)
    compared = [s for s in wanted if s in found and s != str(interp.Site.parse(site).whole)]
    assert compared
    for one in compared:
        limit = TOLERANCE.get(name, LOOSE) if linearization != "exact" else 2e-5
        close(found[one][0], wanted[one].reshape(found[one][0].shape), limit)
    assert all(row["holds"] for row in found.check())


@pytest.mark.parametrize("site", ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid",
                                  "ln_final.hook_out"])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_closed_form_and_backward_pass_agree_from_any_start(name, site, monkeypatch):
    model, _, ids = case(name)
    ref, observable = Reference(model, ids), residual(site)
    closed = interp.propagate_all(model, observable, ref, position=4, linearization="frozen")
    monkeypatch.setattr(Reference, "activation", lambda self, layer: None)
    swept = interp.propagate_all(model, observable, ref, position=4, linearization="frozen")
    assert set(closed) == set(swept) - {s for s in swept if not swept[s].any()}
    for one, value in closed.items():
        close(swept[one], value, 1e-5)


# Paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("site", "steps"), [
    ("blocks.2.hook_resid_pre@5", ((0, 2, 3), (1, None, None))),
    ("blocks.2.hook_resid_mid@5", ((1, None, None), (2, 1, 4))),
    ("blocks.2.hook_resid_post@5", ((0, 2, 3), (2, None, None))),
    ("blocks.1.hook_mlp_out@5", ((0, 2, 3), (1, None, None))),
    ("blocks.1.hook_attn_out@5", ((1, 2, 3),)),
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_path_to_a_site_is_autograd(name, site, steps):
    model, _, ids = case(name)
    observable = residual(site)
    y, here = observable.vector, 5
    for layer, head, source in reversed(steps):
        y = oracles.branch_pull(model, ids, layer, y, here, head, source)
        here = here if source is None else source
    found = interp.propagate(model, observable, ids, path=interp.Path(tuple(interp.Step(*s) for s in steps)))
    assert found.position == here
    assert found.path.endswith(f"-> {site}")
    close(found.vector, y, TOLERANCE.get(name, LOOSE))
    empty = interp.propagate(model, observable, ids, path="")
    assert (str(empty.site), empty.offset) == (site, 0.5)
    assert torch.equal(empty.vector, observable.vector)


def test_a_data_free_path_to_a_site():
    model, _, _ = case("llama")
    observable = residual("blocks.2.hook_resid_pre")
    gain = part(model, "input_layernorm", 1).weight
    v = part(model, "self_attn.v_proj", 1).weight[:8]
    o = part(model, "self_attn.o_proj", 1).weight[:, 8:16]
    found = interp.propagate(model, observable, path="L1H1")
    close(found.vector, gain * (v.T @ (o.T @ observable.vector)), 1e-12)
    assert str(found.site) == "blocks.1.ln1.hook_normalized"


# Patterns left out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "granite"])
def test_without_the_pattern_a_path_is_divided_by_it(name):
    model, n, ids = case(name)
    pattern = model.capture(ids, "blocks.*.attn.hook_pattern")
    probability = float(pattern["blocks.2.attn.hook_pattern"][0, 1, -1, 4])
    probability *= float(pattern["blocks.0.attn.hook_pattern"][0, 2, 4, 3])
    path = "L0H2@3 -> L1MLP -> L2H1@4"
    ov, held = (interp.propagate(model, n, ids, path=path, attn=a) for a in ("ov", "pattern"))
    close(ov.vector * probability, held.vector, 1e-9)
    assert (ov.form, str(ov.site)) == ("ov", str(held.site))
    assert ", ov)" in repr(ov)
    assert torch.equal(held.vector, interp.propagate(model, n, ids, path=path).vector)
    with pytest.raises(ArgumentError, match="one linearisation"):
        interp.cosine(ov, held)


def test_without_the_pattern_one_head_is_its_weights_and_divisors():
    """y = (1/r) γ ⊙ W_Vᵀ W_Oᵀ u at the source's own divisor, offset 0 without biases."""
    model = interp.attach(build("qwen3", dtype=torch.float64))
    ids = torch.tensor([[3, 17, 42, 8, 25, 9, 33]])
    n = interp.Observable.logit_diff(model, 3, 9)
    layer = model.module.model.layers[2]
    x = model.capture(ids, "blocks.2.hook_resid_pre")["blocks.2.hook_resid_pre"][0, 4]
    final = model.capture(ids, "blocks.2.hook_resid_post")["blocks.2.hook_resid_post"][0, -1]
    eps = model.config.rms_norm_eps
    r, r_final = ((v.pow(2).mean() + eps).sqrt() for v in (x, final))
    rows = model.module.lm_head.weight
    u = model.module.model.norm.weight * (rows[3] - rows[9]) / r_final
    w_v, w_o = layer.self_attn.v_proj.weight[16:], layer.self_attn.o_proj.weight[:, 48:64]
    wanted = layer.input_layernorm.weight * (w_v.T @ (w_o.T @ u)) / r
    found = interp.propagate(model, n, ids, path="L2H3@4", attn="ov", linearization="frozen")
    close(found.vector, wanted, LOOSE)


@pytest.mark.parametrize(("options", "text"), [
    ({"path": "L1H1", "attn": "pattern"}, "attn='pattern' without a prompt"),
    ({"prompt": [[3, 4, 5]], "site": "hook_embed@1", "attn": "ov"}, "attn='ov' at site='hook_embed@1'; needed: a path"),
    ({"prompt": [[3, 4, 5]], "path": "L1H1@1", "attn": "qk"}, "attn='qk'; needed: 'pattern' or 'ov'"),
])  # fmt: skip
def test_other_pattern_choices_are_refused(options, text, unchecked):
    model, n, _ = case("llama")
    with pytest.raises(ArgumentError, match=text):
        interp.propagate(model, n, **options)
    assert interp.propagate(model, n, path="L1H1", attn="ov").form == "data-free"


# Direct attribution ---------------------------------------------------------------------------------

PARTS = ("heads", "attention", "attention_bias", "mlps", "neurons", "mlp_bias", "sources", "kv_heads")


@pytest.mark.parametrize("unit", ["component", "source+neuron", "kv_head"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_attribution_of_a_sequence_is_the_sum_over_its_terms(name, unit):
    model, observable, ids = sequence_case(name)
    found = interp.direct_attribution(model, observable, ids, unit)
    alone = [interp.direct_attribution(model, o, ids, unit, position=p) for p, o in observable.terms]
    for key in PARTS:
        values = [getattr(one, key) for one in alone]
        assert (getattr(found, key) is None) == (values[0] is None)
        if values[0] is not None and values[0].any():
            close(getattr(found, key), sum(values), 1e-10)
    for key, value in found.embeddings.items():
        assert value == pytest.approx(sum(one.embeddings[key] for one in alone), abs=1e-9)
    assert found.constant == pytest.approx(sum(one.constant for one in alone), abs=1e-9)
    assert found.measurement == pytest.approx(float(of_terms(model, model.run(ids))), rel=1e-5)
    assert found.total == pytest.approx(found.measurement, rel=1e-5)
    assert (found.observable, found.position) == (observable.name, 6)
    assert len({r["component"] for r in found.to_records()}) == len(found.to_records())
    assert ("soft-cap" in found.note) == (name == "gemma2")


@pytest.mark.parametrize(("site", "depth"), [
    ("blocks.1.hook_resid_pre", (1, 1)), ("blocks.1.hook_resid_mid@4", (2, 1)), ("blocks.2.hook_resid_post", (3, 3)),
    ("blocks.0.hook_resid_pre", (0, 0)),
])  # fmt: skip
def test_attribution_of_a_probe_is_what_wrote_its_score(site, depth):
    """Twin: the model's own modules, W_O slice by slice."""
    model, _, ids = case("llama")
    observable, place = residual(site), 4 if "@" in site else 6
    n, kept = observable.vector, {}

    def keeps(key):
        return lambda module, args, out: kept.__setitem__(key, (args[0][0, place], out[0, place]))

    with oracles.hooks() as handles:
        for layer in range(3):
            o, down = (part(model, p, layer) for p in ("self_attn.o_proj", "mlp.down_proj"))
            handles.append(o.register_forward_hook(keeps(("o", layer))))
            handles.append(down.register_forward_hook(keeps(("mlp", layer))))
        model.module(ids)
    found = interp.direct_attribution(model, observable, ids, "head+neuron")
    for layer in range(3):
        o, down = (part(model, p, layer) for p in ("self_attn.o_proj", "mlp.down_proj"))
        z, post = kept["o", layer][0].unflatten(0, (4, -1)), kept["mlp", layer][0]
        heads = torch.einsum("d,dhk,hk->h", n, o.weight.unflatten(1, (4, -1)), z) * (layer < depth[0])
        neurons = (n @ down.weight) * post * (layer < depth[1])
        torch.testing.assert_close(found.heads[layer], heads.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.neurons[layer], neurons.detach(), rtol=1e-9, atol=1e-12)
        assert found.mlp(layer) == pytest.approx(float(n @ kept["mlp", layer][1]) * (layer < depth[1]), abs=1e-9)
    assert found.embeddings["embedding"] == pytest.approx(
        float(n @ part(model, "model.embed_tokens").weight[ids[0, place]])
    )
    stream = str(interp.Site.parse(site).whole)
    x = model.capture(ids, stream)[stream][0, place]
    assert found.measurement == pytest.approx(float(x @ n) + 0.5, rel=1e-9)
    assert found.total == pytest.approx(found.measurement, rel=1e-6)
    assert (found.constant, found.position) == (0.5, place)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "neox-parallel", "mixtral"])
def test_probes_are_attributed_in_every_layout(name):
    """Identities are verified on each call: sources, heads and vectors of the stream must agree."""
    model, _, ids = case(name)
    observables = [residual("blocks.2.hook_resid_pre", seed=i) for i in (3, 4)]
    found = interp.direct_attribution(model, observables, ids, "source", position=4)
    for one in found:
        assert one.total == pytest.approx(one.measurement, rel=1e-5)
        assert one.sources[:2].any()
        assert not one.heads[2].any()
    clean, corrupt = ids, torch.tensor([[5, 11, 50, 29, 7, 14, 60]])
    gap = interp.contrast_attribution(model, observables[0], clean, corrupt)
    both = [interp.direct_attribution(model, observables[0], rows) for rows in (clean, corrupt)]
    assert gap.measurement == pytest.approx(both[0].measurement - both[1].measurement, rel=1e-5)
    rows = interp.attribute_dataset(model, observables[0], [*clean.tolist(), *corrupt.tolist()])
    torch.testing.assert_close(rows.mean["heads"][0], sum(e.heads for e in both).double() / 2, rtol=1e-5, atol=1e-6)


# What is refused ------------------------------------------------------------------------------------


def test_sequences_where_they_have_no_meaning_are_refused(unchecked):
    model, observable, ids = sequence_case("llama")
    made = interp.Observable.sequence_log_prob(model, ids[:, :5], [9, 33])
    assert interp.direct_attribution(model, made, ids).total == pytest.approx(
        float(made.measure(model.run(ids))[0]), rel=1e-5
    )
    other = torch.tensor([[5, 11, 50, 29, 7, 14, 60]])
    for call in (interp.direct_attribution, interp.propagate_all):
        with pytest.raises(
            ArgumentError, match=r"prompt of 7 tokens that are not those of .*the continuation among them"
        ):
            call(model, made, other)
        with pytest.raises(ArgumentError, match=r"position=3 for the sequence .*leave position= out"):
            call(model, observable, ids, position=3)
        with pytest.raises(PositionError, match=r"position 6 of .*needed: one in 0\.\.3"):
            call(model, observable, ids[:, :4])
    with pytest.raises(ArgumentError, match=r"the sequence .*give observable\.terms one by one"):
        interp.propagate(model, observable, ids, path="L1H1@2")
    for call in (
        lambda: interp.direct_attribution(model, [observable, observable], ids),
        lambda: interp.attribute_dataset(model, observable, ids.tolist()),
        lambda: interp.contrast_attribution(model, observable, ids, other),
        lambda: interp.head_norms(model, observable),
        lambda: interp.find_paths(model, observable, ids, other),
        lambda: interp.dose_response(
            model, observable, ids, interp.propagate(model, observable, ids, site="hook_embed@1")
        ),
        lambda: interp.compare_observables(model, observable, observable, observable, ids, path="L1H1@2"),
    ):
        with pytest.raises(ArgumentError, match=r"sequence|SequenceObservable"):
            call()


@pytest.mark.parametrize(("site", "call", "error", "text"), [
    ("blocks.1.hook_mlp_out", "direct", ArgumentError, r"attribution of an observable of blocks\.1\.hook_mlp_out; .*"
     "of a residual stream; propagate_all"),
    ("blocks.1.hook_resid_middle", "direct", SiteError, r"unknown site .*did you mean 'blocks\.1\.hook_resid_mid'"),
    ("blocks.1.hook_resid_middle", "all", SiteError, r"unknown site .*did you mean 'blocks\.1\.hook_resid_mid'"),
    ("blocks.1.hook_resid_middle", "path", SiteError, r"unknown site .*did you mean 'blocks\.1\.hook_resid_mid'"),
    ("blocks.1.attn.hook_pattern", "all", ArgumentError, r"whose axes are batch head pos key"),
    ("blocks.1.attn.hook_z#1", "path", ArgumentError, r"total vectors \(site=\) start from any site"),
    ("blocks.1.hook_resid_pre", "path", ArgumentError, r"goes backwards: L1H1@2 cannot feed blocks\.1\.hook_resid_pre"),
    ("blocks.1.hook_mlp_out", "path", ArgumentError, r"goes backwards: L1H1@2 cannot feed blocks\.1\.hook_mlp_out"),
    ("blocks.2.hook_resid_pre@3", "all", ArgumentError, r"position=5 for an observable of .*its own position"),
    ("blocks.2.hook_resid_pre@3", "direct", ArgumentError, r"position=5 for an observable of .*its own position"),
    ("blocks.2.hook_resid_pre@3,4", "all", ArgumentError, r"a site with one position"),
    ("blocks.0.hook_resid_pre", "behind", SiteError, r"totals at blocks\.1\.hook_resid_pre; needed: sites in front of"),
])  # fmt: skip
def test_vectors_at_sites_where_they_have_no_meaning_are_refused(site, call, error, text):
    model, _, ids = case("llama")
    observable = residual(site)
    calls = {
        "direct": lambda: interp.direct_attribution(model, observable, ids, position=5),
        "all": lambda: interp.propagate_all(model, observable, ids, position=5),
        "path": lambda: interp.propagate(model, observable, ids, path="L1H1@2"),
        "behind": lambda: interp.propagate_all(model, observable, ids, sites=["blocks.1.hook_resid_pre"]),
    }
    with pytest.raises(error, match=text):
        calls[call]()


def test_vectors_of_another_width_or_kind_are_refused():
    model, n, ids = case("llama")
    for call in (interp.direct_attribution, interp.propagate_all):
        with pytest.raises(ArgumentError, match=r"length 31; needed: 32, as blocks\.1\.hook_resid_pre has"):
            call(model, residual("blocks.1.hook_resid_pre", 31), ids)
        with pytest.raises(ArgumentError, match="observables of the logits and blocks"):
            call(model, [n, residual("blocks.1.hook_resid_pre")], ids)
    with pytest.raises(ArgumentError, match=r"length 31; needed: 32"):
        interp.propagate(model, residual("blocks.2.hook_resid_pre", 31), path="L1H1")
    with pytest.raises(SiteUnavailableError, match=r"pull-backs through Bert"):
        interp.direct_attribution(interp.attach(build("bert")), residual("blocks.1.hook_resid_pre"), ids)
