"""Propagation on every decoder family, against autograd through the model's own modules."""

import math
import warnings

import pytest
import torch
from torch import nn

import interp
from interp.hooks.errors import (
    ArgumentError,
    CompletenessError,
    NonFiniteError,
    PositionError,
    SiteError,
    SiteUnavailableError,
    TrainModeError,
    UnknownFamilyError,
)
from interp.hooks.linearization import Linearization
from interp.propagation.mlp_points import NoBoundaryWarning
from interp.propagation.reference import Reference
from interp.propagation.stages import MLP, pull_heads
from tests import propagation_oracles as oracles
from tests.cases import DECODERS, build, perturb
from tests.propagation_oracles import case, close, hooks, part

DENSE = [name for name in DECODERS if name != "mixtral"]
THROUGH_ALL = ((0, 2, 3), (1, None, None), (2, 1, 4))


def custom(model_class, config_class, dtype=torch.float64, seed=1, **options):
    """A tiny model of two layers with options of one's own, perturbed as all others."""
    import transformers

    config = getattr(transformers, config_class)(**options)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return perturb(getattr(transformers, model_class)(config), seed).eval().to(dtype)


def gpt2(**more):
    options = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=32, pad_token_id=0) | more
    return custom("GPT2LMHeadModel", "GPT2Config", **options)


def llama(**more):
    options = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
    return custom("LlamaForCausalLM", "LlamaConfig", **options | more)


# The whole network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("linearization", ["path", "frozen"])
@pytest.mark.parametrize("name", DENSE)
def test_totals_are_the_networks_gradients(name, linearization):
    oracles.totals_are_autograd(name, linearization)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-j", "gemma2", "cohere", "mixtral"])
def test_exact_totals_are_plain_gradients(name):
    oracles.totals_are_autograd(name, "exact")


@pytest.mark.parametrize("name", DECODERS)
def test_totals_sum_to_the_measurement_at_every_layer(name):
    oracles.totals_sum_to_the_measurement(name)


@pytest.mark.parametrize(("name", "modes"), [
    ("gpt2", [("tangent", "tangent", "tangent")]), ("gemma2", [("gain", "frozen", "gate")]),
    ("neox-parallel", [("gain", "tangent", "tangent"), ("tangent", "frozen", "gate")]),
    ("llama", [("gain", "frozen", "split"), ("tangent", "tangent", "gate"), ("gain", "tangent", "tangent")]),
])  # fmt: skip
def test_closed_form_and_backward_pass_agree_in_every_mode(name, modes, monkeypatch):
    model, observable, ids = case(name)
    ref = Reference(model, ids)
    for activation, norm, product in modes:
        held = Linearization(activation, norm, "frozen", product)
        closed = interp.propagate_all(model, observable, ref, linearization=held)
        with monkeypatch.context() as patch:
            patch.setattr(Reference, "activation", lambda self, layer: None)
            swept = interp.propagate_all(model, observable, ref, linearization=held)
        assert set(closed) == set(swept)
        for site, value in closed.items():
            close(swept[site], value, 1e-5)


@pytest.mark.parametrize(("name", "linearization"), [
    ("gpt2", "frozen"), ("gpt2", "path"), ("llama", "frozen"), ("neox", "frozen"), ("gemma2", "path"),
])  # fmt: skip
def test_paths_sum_to_the_total(name, linearization):
    if name == "neox":
        module = custom(
            "GPTNeoXForCausalLM", "GPTNeoXConfig", vocab_size=61, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32, rotary_pct=0.5,
        )  # fmt: skip
    elif name == "gemma2":
        module = custom(
            "Gemma2ForCausalLM", "Gemma2Config", vocab_size=61, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
            final_logit_softcapping=3.0, pad_token_id=0,
        )  # fmt: skip
    else:
        module = {"gpt2": gpt2, "llama": llama}[name]()
    oracles.paths_sum_to_the_total(name, interp.attach(module), linearization)


# Paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_a_path_through_attention_mlp_attention_is_autograd(name):
    oracles.path_is_autograd(name, THROUGH_ALL)


@pytest.mark.parametrize("steps", [((1, None, None),), ((2, 3, 4),), ((0, 1, 5), (2, None, None)), ()])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "granite"])
def test_shorter_paths_are_autograd(name, steps):
    oracles.path_is_autograd(name, steps)


@pytest.mark.parametrize("step", [(1, None, None), (2, 3, 4)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-j", "gemma2", "olmo2", "granite"])
def test_score_and_offset_are_what_flows_along_the_path(name, step):
    oracles.path_offset_is_what_flows(name, (step,))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_rule_is_autograd_with_the_pattern_detached(kv_heads):
    """Check 7: MQA, GQA, MHA, with biases."""
    module = llama(num_attention_heads=4, num_key_value_heads=kv_heads, attention_bias=True)
    model, ids = interp.attach(module), torch.tensor([[3, 17, 42, 8, 25]])
    ref, y = Reference(model, ids), torch.randn(5, 32, dtype=torch.float64)
    leaf, out = [], []

    def start(m, a, o):
        leaf.append(o.detach().requires_grad_())
        return leaf[0]

    with hooks() as handles, oracles.frozen_patterns():
        handles.append(module.model.layers[1].input_layernorm.register_forward_hook(start))
        handles.append(module.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, a, o: out.append(o)))
        module(ids)
    value = (out[0][0] * y).sum()
    wanted = torch.autograd.grad(value, leaf[0])[0][0]
    found, _, _, offset = pull_heads(ref.weights, y, 1, ref.pattern(1))
    close(found, wanted, 1e-12)
    assert float((found * leaf[0][0]).sum() + offset) == pytest.approx(float(value), rel=1e-11)


def test_grouped_heads_are_their_expansion_to_one_value_head_each():
    """Check 8: copying each key/value head to its query heads changes no number."""
    grouped = llama(num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    full = llama(num_attention_heads=4, num_key_value_heads=4, attention_bias=True)
    state = grouped.state_dict()
    for key in list(state):
        if ".k_proj." in key or ".v_proj." in key:
            state[key] = state[key].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    one, two = interp.attach(grouped), interp.attach(full)
    n = interp.Observable.logit_diff(one, 3, 5)
    ids = torch.tensor([[3, 17, 42, 8, 25]])
    for head in range(4):
        for prompt, path in ((ids, f"L0H{head}@2 -> L1H{3 - head}@3"), (None, f"L0H{head} -> L1H{3 - head}")):
            f, g = (interp.propagate(m, n, prompt, path=path) for m in (one, two))
            close(f.vector, g.vector, 1e-10)
            assert f.offset == pytest.approx(g.offset, rel=1e-6)
    f, g = (interp.propagate_all(m, n, ids, linearization="frozen") for m in (one, two))
    close(f["blocks.0.hook_resid_pre"], g["blocks.0.hook_resid_pre"], 1e-10)
    close(f["blocks.1.attn.hook_z"], g["blocks.1.attn.hook_z"], 1e-10)
    close(f["blocks.1.attn.hook_v"], g["blocks.1.attn.hook_v"].unflatten(2, (2, 2)).sum(3), 1e-10)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_an_mlps_variant_is_told_by_its_values(activation, gated):
    """Check 5 on modules: the pull-back is autograd through the model's own MLP."""
    if gated:
        module = llama(hidden_act=activation, mlp_bias=True)
        inner = module.model.layers[1].mlp
    else:
        module = gpt2(activation_function=activation)
        inner = module.transformer.h[1].mlp
    ref = Reference(interp.attach(module), torch.tensor([[3, 17, 42, 8, 25]]))
    v, y = ref.mlp_input(1).requires_grad_(), torch.randn(5, 32, dtype=torch.float64)
    value = (inner(v[None])[0] * y).sum()
    (wanted,) = torch.autograd.grad(value, v)
    found, _, offset = MLP(ref, 1).pull(y, Linearization.of("path"), v.detach())
    close(found, wanted, 1e-12)
    assert float((found * v).sum() + offset.sum()) == pytest.approx(float(value), rel=1e-11)


def test_an_activation_in_place_changes_nothing_that_was_captured():
    from tests.cases import HAND_LAYOUT, HandLM

    class InPlace(HandLM):
        def __init__(self):
            super().__init__(fused=False)
            for block in self.stack:
                block.act = nn.SiLU(inplace=True)
                block.forward = lambda x, b=block: (
                    (h := x + b.mix(b.n1(x))) + b.down(b.act(b.up(b.n2(h))))
                )  # fmt: skip

    torch.manual_seed(0)
    model = interp.attach(perturb(InPlace()).eval().double(), layout=interp.Layout(**HAND_LAYOUT))
    ids = torch.tensor([[3, 17, 42, 8]])
    for held in ("path", "frozen"):
        ref = Reference(model, ids)
        before = {site: value.clone() for site, value in ref.acts.items()}
        found = interp.propagate_all(model, interp.Observable.logit_diff(model, 3, 5), ref, linearization=held)
        assert all(row["error"] < 1e-7 for row in found.check())
        assert all(torch.equal(value, before[site]) for site, value in ref.acts.items())


# Invariances ----------------------------------------------------------------------------------------


def test_exact_jacobians_times_activations_do_not_sum_to_the_measurement():
    """Check 15: they sum to (m - constant) ε/r²."""
    model = interp.attach(gpt2(layer_norm_epsilon=1e-2))
    ids, n = torch.tensor([[3, 17, 42, 8, 25]]), interp.Observable.logit(model, 3)
    with torch.no_grad():
        m = float(model.module(ids).logits[0, -1, 3])
    x = model.capture(ids, "blocks.1.hook_resid_post")["blocks.1.hook_resid_post"][0, -1]
    r2 = float((x - x.mean()).pow(2).mean() + 1e-2)
    constant = float((model.module.lm_head.weight[3] @ model.module.transformer.ln_f.bias).detach())
    exact = interp.propagate(model, n, ids, path="logits@-1", linearization="path")
    frozen = interp.propagate(model, n, ids, path="logits@-1", linearization="frozen")
    assert float(exact.score(x)) == pytest.approx((m - constant) * 1e-2 / r2, abs=1e-9)
    assert float(frozen.score(x)) == pytest.approx(m - constant, abs=1e-9)
    assert exact.offset + float(exact.score(x)) == pytest.approx(m, abs=1e-6)
    assert abs(m - constant) > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_vectors_are_linear_in_the_observable_and_batches_equal_loops(name):
    model, _, ids = case(name)
    n1, n2 = interp.Observable("1", (3, 9), (1.0, -1.0)), interp.Observable("2", (9, 20), (0.5, 2.0))
    both = interp.Observable("both", (3, 9, 20), (2.0, -2.0 - 1.5, -6.0))  # 2 n1 - 3 n2
    together = interp.propagate_all(model, [n1, n2, both], ids)
    alone = [interp.propagate_all(model, n, ids) for n in (n1, n2, both)]
    for site, value in together.items():
        close(2 * value[0] - 3 * value[1], value[2], 1e-6)
        for one, row in zip(alone, value, strict=True):
            close(one[site][0], row, 1e-12)
    f, g, h = (interp.propagate(model, n, ids, path="L0H2@3 -> L1H1@4") for n in (n1, n2, both))
    close(2 * f.vector - 3 * g.vector, h.vector, 1e-6)
    assert h.offset == pytest.approx(2 * f.offset - 3 * g.offset, rel=1e-5)


def test_an_observables_own_constant_is_not_scaled_with_the_logits():
    model, _, ids = case("cohere")
    plain, moved = interp.Observable("m", (3,), (1.0,)), interp.Observable("m", (3,), (1.0,), offset=2.0)
    one, two = (interp.propagate_all(model, n, ids, linearization="frozen") for n in (plain, moved))
    assert float(two.measurement[0] - one.measurement[0]) == pytest.approx(2.0, abs=1e-5)
    gap = two.offsets["hook_embed"] - one.offsets["hook_embed"]
    assert float(gap[0]) == pytest.approx(2.0, abs=1e-5)


def test_swapping_target_and_foil_negates_everything():
    model, _, ids = case("llama")
    n, swapped = interp.Observable.logit_diff(model, 3, 9), interp.Observable.logit_diff(model, 9, 3)
    one, two = (interp.propagate_all(model, o, ids) for o in (n, swapped))
    assert all(torch.equal(one[site], -two[site]) for site in one)
    f, g = (interp.propagate(model, o, ids, path="L1MLP -> L2H1@4") for o in (n, swapped))
    assert torch.equal(f.vector, -g.vector)
    assert f.offset == -g.offset


def test_zero_sum_observables_do_not_see_a_shift_of_all_rows():
    """Check 18: a constant added to all rows of W_U moves a single logit, and no difference of logits."""
    model, moved = (interp.attach(gpt2(tie_word_embeddings=False)) for _ in range(2))
    moved.module.lm_head.weight.data += torch.randn(32, dtype=torch.float64)
    ids = torch.tensor([[3, 17, 42, 8, 25]])
    for observable, same in (
        (interp.Observable.logit_diff(model, 3, 5), True),
        (interp.Observable.logit(model, 3), False),
    ):
        for prompt, path in ((ids, "L0H1@2 -> L1MLP"), (None, "L0H1 -> L1H0")):
            f, g = (interp.propagate(m, observable, prompt, path=path).vector for m in (model, moved))
            gap = float((f - g).norm() / f.norm())
            assert (gap < 1e-5) if same else (gap > 1e-2)


def test_folding_gains_into_the_next_weights_changes_no_vector_at_the_stream():
    plain, folded = gpt2(tie_word_embeddings=False), gpt2(tie_word_embeddings=False)
    with torch.no_grad():
        for block in folded.transformer.h:
            for norm, linear in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
                linear.bias += norm.bias @ linear.weight
                linear.weight *= norm.weight[:, None]
                norm.weight.fill_(1.0)
                norm.bias.zero_()
        folded.lm_head.weight *= folded.transformer.ln_f.weight
        folded.transformer.ln_f.bias /= folded.transformer.ln_f.weight
        folded.transformer.ln_f.weight.fill_(1.0)
    one, two = interp.attach(plain), interp.attach(folded)
    ids, n = torch.tensor([[3, 17, 42, 8, 25]]), interp.Observable.logit_diff(one, 3, 5)
    close(*(interp.propagate(m, n, ids, path="L0H1@2 -> L0MLP -> L1H0@3").vector for m in (one, two)), 1e-6)
    close(*(interp.propagate(m, n, path="L0H1 -> L1H0").vector for m in (one, two)), 1e-6)
    for site in ("blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"):
        f, g = (interp.propagate_all(m, n, ids, linearization="frozen", sites=[site])[site] for m in (one, two))
        close(f, g, 1e-6)


@pytest.mark.parametrize(("name", "linearization"), [
    ("llama", "path"), ("gpt2", "frozen"), ("gemma3", "path"), ("llama", "exact"),
])  # fmt: skip
def test_padding_changes_nothing(name, linearization):
    model, n, ids = case(name, dtype=torch.float32)
    alone = interp.propagate_all(model, n, ids, linearization=linearization)
    for left, right in ((3, 0), (0, 2)):
        row = torch.cat([torch.zeros(1, left), ids, torch.zeros(1, right)], 1).long()
        mask = torch.tensor([[0] * left + [1] * ids.shape[1] + [0] * right])
        padded = interp.propagate_all(model, n, {"input_ids": row, "attention_mask": mask}, linearization=linearization)
        assert padded.position == alone.position
        for site, value in alone.items():
            close(padded[site], value, 1e-5)
        prompt = {"input_ids": row, "attention_mask": mask}
        f, g = (interp.propagate(model, n, p, path="L1MLP -> L2H1@4") for p in (prompt, ids))
        close(f.vector, g.vector, 1e-5)
        assert f.position == g.position


def test_a_prompt_that_gives_nan_is_refused():
    """A float64 model's mask overflows in the float32 softmax of transformers, and its padding holds NaN."""
    model, n, ids = case("llama")
    padded = {"input_ids": torch.cat([ids[:, :2], ids], 1), "attention_mask": torch.tensor([[0, 0, *[1] * 7]])}
    with pytest.raises(NonFiniteError, match=r"residual stream .* holds NaN.*without padding"):
        interp.propagate(model, n, padded, path="L1H1@2")


def test_later_tokens_change_nothing_before_them():
    model, n, ids = case("llama")
    whole = interp.propagate_all(model, n, ids, position=3)
    cut = interp.propagate_all(model, n, ids[:, :4])
    for site, value in cut.items():
        close(whole[site][:, :4], value, 1e-6)
        assert not whole[site][:, 4:].any()


# Results --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel"])
def test_total_vectors_at_every_kind_of_site(name):
    model, n, ids = case(name)
    totals = interp.propagate_all(model, n, ids, linearization="frozen")
    for site in ("blocks.1.hook_resid_pre@3", "blocks.1.attn.hook_z#2@last", "blocks.1.attn.hook_v#1@3",
                 "blocks.1.mlp.hook_post@last", "blocks.1.ln1.hook_out@3", "blocks.1.ln2.hook_out@last",
                 "ln_final.hook_out@last", "hook_embed@2"):  # fmt: skip
        f = interp.propagate(model, n, ids, site=site, linearization="frozen")
        where = interp.Site.parse(site)
        row = totals[where.whole][0, f.position]
        assert torch.equal(f.vector, row if where.head is None else row[where.head[0]])
        # At the reference, score and offset are the measurement.
        acts = model.capture(ids, str(where.whole))
        assert float(f.score(acts)[0]) + f.offset == pytest.approx(float(totals.measurement[0]), rel=1e-5)
        if where.head is not None:
            own = model.capture(ids, f"{where.whole}#{where.head[0]}")
            assert float(f.score(own)[0]) == pytest.approx(float(f.score(acts)[0]), rel=1e-9)
            with pytest.raises(SiteError, match=f"head {where.head[0]}, the vector's own"):
                f.score(model.capture(ids, f"{where.whole}#0"))


def test_totals_print_short_and_answer_for_sites_they_lack():
    model, n, ids = case("gemma2")
    totals = interp.propagate_all(model, n, ids, sites=["blocks.*.hook_resid_pre"])
    assert len(totals) == 3
    assert "blocks.9.hook_resid_pre" not in totals
    assert totals.get("nothing") is None
    with pytest.raises(SiteError, match=r"totals at hook_embed; needed: one of blocks"):
        totals["hook_embed"]
    assert repr(totals).endswith("3 sites, measured on the logits before the soft-cap)")
    assert "<table>" in totals._repr_html_()
    assert len(totals.to_records()) == 3
    f = totals.vector("blocks.1.hook_resid_pre@2")
    assert f.note == "measured on the logits before the soft-cap"
    assert f.to_records()[0]["note"] == f.note
    assert "soft-cap" in interp.propagate(model, n, path="L1H1").note
    assert interp.propagate(*case("llama"), path="L1H1@2").note == ""


def test_a_reference_is_used_again_and_belongs_to_its_model():
    model, n, ids = case("llama")
    ref, runs = Reference(model, ids), []
    handle = model.module.register_forward_pre_hook(lambda *args: runs.append(1))
    for path in ("L1H1@2", "L0MLP -> L2H3@4"):
        interp.propagate(model, n, ref, path=path)
    interp.propagate_all(model, n, ref)
    handle.remove()
    assert not runs
    other = interp.attach(build("llama"))
    for call in (lambda: interp.propagate(other, n, ref, path="L1H1@2"), lambda: interp.propagate_all(other, n, ref)):
        with pytest.raises(ArgumentError, match="a Reference of another model"):
            call()
    assert repr(ref) == "Reference(LlamaForCausalLM, 7 tokens, torch.float64)"


def test_half_precision_casts_each_matrix_once_and_stays_near():
    model, n, ids = case("llama", dtype=torch.bfloat16)
    ref = Reference(model, ids)
    assert ref.weights.values(1) is ref.weights.values(1)
    found = interp.propagate_all(model, n, ref)["blocks.0.hook_resid_pre"]
    assert found.dtype == torch.float32
    wide = interp.propagate_all(*case("llama"))["blocks.0.hook_resid_pre"]
    assert torch.nn.functional.cosine_similarity(found.flatten(), wide.float().flatten(), dim=0) > 0.98


def test_overrides_take_the_backward_pass():
    """They are not dropped: a whole MLP held as a constant leaves what the other branches carry."""
    model, n, ids = case("llama")
    held = Linearization("tangent", "tangent", "frozen", "tangent", {"model.layers.2.mlp.down_proj": "constant"})
    plain = interp.propagate_all(model, n, ids)
    overridden = interp.propagate_all(model, n, ids, linearization=held)["blocks.2.hook_resid_mid"]
    close(overridden, plain["blocks.2.hook_resid_post"], 1e-5)
    assert float((overridden - plain["blocks.2.hook_resid_mid"]).norm()) > 1e-2
    with pytest.raises(ArgumentError, match=r"a path under overrides .*down_proj"):
        interp.propagate(model, n, ids, path="L1H1@2", linearization=held)


def test_compared_observables_stand_beside_start_and_control():
    model, _, ids = case("gpt2")
    she, her, control = (
        interp.Observable(n, i, (1.0, -1.0)) for n, i in (("a", (3, 5)), ("b", (3, 9)), ("c", (20, 30)))
    )
    for options in ({"path": "L1H1"}, {"prompt": ids, "path": "L1H1@2"}, {"prompt": ids, "site": "hook_embed@2"}):
        found = interp.compare_observables(model, she, her, control, **options)
        f, g, h = (interp.propagate(model, n, **options) for n in (she, her, control))
        assert (found.cosine, found.control_cosine) == (interp.cosine(f, g), interp.cosine(f, h))
        assert found.coupling * found.coupling_back == pytest.approx(found.cosine**2)
        rows = model.module.lm_head.weight.detach()
        u, v = rows[3] - rows[5], rows[3] - rows[9]
        assert found.starting_cosine == pytest.approx(float(u @ v / (u.norm() * v.norm())), abs=1e-6)
    assert "a, c (control)" in repr(found)


# Reference points -----------------------------------------------------------------------------------

HIGH, LOW = [[9, 2, 42, 8, 31, 9, 12]], [[44, 2, 19, 23, 31]]


def mlp_case(name="gpt2"):
    model, n, ids = case(name)
    ref = Reference(model, ids)
    u = interp.propagate(model, n, ref, path="").vector
    inputs = [Reference(model, p).mlp_input(2)[-1] for p in (HIGH, LOW)]
    own = part(model, model.layout.mlp, 2)
    return model, n, ref, u, inputs, lambda v: own(v[None, None])[0, 0]


def test_boundary_is_where_the_contribution_has_its_target():
    """Check 23: by the model's own MLP."""
    model, n, ref, u, (high, low), mlp = mlp_case()
    with torch.no_grad():
        ends = [float(mlp(v) @ u) for v in (low, high)]
    for point, target in (
        (interp.Boundary(HIGH, LOW), 0.0 if ends[0] * ends[1] < 0 else sum(ends) / 2),
        (
            interp.Boundary(Reference(model, LOW), Reference(model, HIGH)),
            0.0 if ends[0] * ends[1] < 0 else sum(ends) / 2,
        ),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoBoundaryWarning)
            (found,) = point.points(ref, MLP(ref, 2), u, ref.length - 1, 0.0)
        with torch.no_grad():
            assert abs(float(mlp(found) @ u) - target) <= 1e-10 * abs(ends[1] - ends[0])
        part_of = float((found - low) @ (high - low) / (high - low).pow(2).sum())
        assert 0 < part_of < 1
        close(found, low + part_of * (high - low), 1e-10)
    # The path's vector is the gradient there.
    point = found.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(mlp(point) @ u, point)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoBoundaryWarning)
        f = interp.propagate(model, n, ref, path="L2MLP", reference=interp.Boundary(HIGH, LOW), linearization="path")
    x = ref.at("blocks.2.hook_resid_mid")[-1].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(part(model, "ln_2", 2)(x) @ wanted, x)
    close(f.vector, wanted, 1e-8)


def test_a_boundary_with_an_offset_is_the_root_of_the_whole():
    _, _, ref, u, (high, low), mlp = mlp_case()
    with torch.no_grad():
        ends = [float(mlp(v) @ u) for v in (low, high)]
        behind = -(0.3 * ends[0] + 0.7 * ends[1])
        (found,) = interp.Boundary(HIGH, LOW, behind=True).points(ref, MLP(ref, 2), u, ref.length - 1, behind)
        assert abs(float(mlp(found) @ u) + behind) <= 1e-10 * abs(ends[1] - ends[0])


def test_a_boundary_that_is_not_bracketed_warns_and_names_the_fallback():
    model, n, ref, *_ = mlp_case()
    with pytest.warns(NoBoundaryWarning, match=r"g\(v\+\) = .* and g\(v-\) = .* same sign; using the midpoint value"):
        interp.propagate(model, n, ref, path="L2MLP", reference=interp.Boundary(HIGH, HIGH))


def test_average_gradient_is_complete():
    """Integrated gradients: mean gradient · (v+ - v-) = g(v+) - g(v-)."""
    _, _, ref, u, (high, low), mlp = mlp_case()
    own = MLP(ref, 2)
    points = interp.AverageGradient(HIGH, LOW, steps=400).points(ref, own, u, ref.length - 1, 0.0)
    pulled, _, _ = own.pull(u.expand(len(points), -1), Linearization.of("path"), points)
    with torch.no_grad():
        wanted = float((mlp(high) - mlp(low)) @ u)
    assert float(pulled.mean(0) @ (high - low)) == pytest.approx(wanted, rel=1e-4)
    assert abs(float(pulled[0] @ (high - low)) / wanted - 1) > 1e-2
    with pytest.raises(ArgumentError, match="steps=0"):
        interp.AverageGradient(HIGH, LOW, steps=0)


@pytest.mark.parametrize("name", ["gpt2", "olmo2"])
def test_mean_point_is_the_mean_over_real_tokens(name):
    model, _, ids = case(name)
    ref, rows = Reference(model, ids), [[3, 17, 42, 8, 25], [5, 11, 50]]
    u = torch.randn(32, dtype=torch.float64)
    (found,) = interp.MeanPoint(rows).points(ref, MLP(ref, 1), u, 0, 0.0)
    alone = torch.cat([Reference(model, [row]).mlp_input(1)[1:] for row in rows])
    close(found, alone.mean(0), 1e-6)
    with pytest.raises(ArgumentError, match="inputs of one token each"):
        interp.MeanPoint([[3], [5]]).points(ref, MLP(ref, 1), u, 0, 0.0)


# What is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path", "error", "text"), [
    ("llama", "L2H1@2 -> L1H0@1", ArgumentError, r"path goes backwards: L2H1@2 cannot feed L1H0@1"),
    ("llama", "L1MLP -> L1H1@2", ArgumentError, "path goes backwards: L1MLP cannot feed L1H1@2"),
    ("gpt-j", "L1H1@2 -> L1MLP", ArgumentError, "L1 attention and MLP are parallel in this model"),
    ("llama", "L1H4@2", ArgumentError, r"head 4 out of range for layer 1; needed: 4 query heads \(0-3\), 2 key/value"),
    ("llama", "L3H1@2", ArgumentError, r"layer 3 of L3H1@2; needed: layers 0-2"),
    ("llama", "L2MLP -> L9MLP", ArgumentError, r"layer 9 of L9MLP"),
    ("llama", "L1H1@5 -> L2H1@3", PositionError, "source position 5 is after destination 3"),
    ("llama", "L1H1@4 -> logits@2", PositionError, "source position 4 is after destination 2"),
    ("llama", "L1H1@7", PositionError, r"position 7; needed: an int in -7\.\.6"),
    ("llama", "L1H1", ArgumentError, "L1H1 without a source position"),
    ("llama", "L1KV1@2", ArgumentError, r"path step 'L1KV1@2'; needed: the form"),
    ("mixtral", "L1MLP", SiteUnavailableError, r"closed form of blocks\.1\.mlp"),
])  # fmt: skip
def test_paths_that_do_not_exist(name, path, error, text):
    model, n, ids = case(name)
    with pytest.raises(error, match=text):
        interp.propagate(model, n, ids, path=path)


@pytest.mark.parametrize(("options", "text"), [
    ({"path": "L1H1", "linearization": "path"}, r"linearisation 'path' needs activations; needed: a prompt"),
    ({"path": "L1H1", "linearization": "frozen"}, "leave linearization= out for the data-free form"),
    ({"path": "L1H1", "reference": interp.AverageGradient(HIGH, LOW)}, "reference=.* without a prompt"),
    ({"site": "blocks.1.hook_resid_pre@2"}, r"site='blocks\.1\.hook_resid_pre@2' without a prompt"),
    ({"path": "L1MLP"}, "L1MLP on a path without a prompt"),
    ({"path": "L1H1@2"}, "L1H1@2 on a path without a prompt"),
    ({"path": "embed -> L1H1"}, "embed on a path without a prompt"),
    ({}, "exactly one of them"),
    ({"path": "L1H1", "site": "hook_embed@1"}, "exactly one of them"),
])  # fmt: skip
def test_what_needs_a_prompt_is_refused_without_one(options, text):
    model, n, _ = case("llama")
    with pytest.raises(ArgumentError, match=text):
        interp.propagate(model, n, **options)


def test_other_bad_calls(unchecked):
    model, n, ids = case("llama")
    for options, text in (
        ({"path": "L1H1@2", "linearization": "exact"}, "a path under attention='tangent'"),
        (
            {"path": "L1H1@2", "linearization": "gradient"},
            "linearization 'gradient'; needed: one of exact, frozen, path",
        ),
        ({"site": "hook_embed@1", "reference": interp.Boundary(HIGH, LOW)}, "site= with reference="),
        ({"site": "blocks.1.hook_resid_pre"}, "one position"),
    ):
        with pytest.raises(ArgumentError, match=text):
            interp.propagate(model, n, ids, **options)
    for site, text in (
        ("blocks.1.attn.hook_z@2", r"covector at one position is \[4, 8\]; needed: one head"),
        ("blocks.1.attn.hook_z#4@2", r"head 4 of .* out of range; needed: heads 0-3"),
        ("blocks.1.attn.hook_v#2@2", r"head 2 of .* out of range; needed: heads 0-1"),
        ("blocks.1.hook_resid_middle@2", "hook_resid_middle"),
        ("blocks.1.attn.hook_pattern@2", r"totals at blocks\.1\.attn\.hook_pattern"),
    ):
        with pytest.raises(SiteError, match=text):
            interp.propagate(model, n, ids, site=site)
    with pytest.raises(ArgumentError, match="2 prompts"):
        interp.propagate(model, n, [[3, 4], [5, 6]], path="L1H1@0")
    with pytest.raises(ArgumentError, match=r"observables=\[\]"):
        interp.propagate_all(model, [], ids)


def test_activations_of_another_site_are_refused():
    model, n, ids = case("llama")
    f = interp.propagate(model, n, ids, path="L1H1@2")
    with pytest.raises(SiteError, match=r"blocks\.1\.hook_resid_pre, the vector's own site"):
        f.score(model.capture(ids, "blocks.2.hook_resid_pre"))
    with pytest.raises(SiteError, match="position 2, the vector's own"):
        f.score(model.capture(ids, "blocks.1.hook_resid_pre", positions=[1, 3]))
    with pytest.raises(ArgumentError, match="activations of width 31; needed: 32"):
        f.score(torch.zeros(31))


def test_models_that_cannot_be_pulled_through_are_refused():
    _, n, ids = case("llama")
    training = interp.attach(build("llama"))
    training.module.config.attention_dropout = 0.1
    training.module.train()
    for layer in training.module.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(TrainModeError, match="training mode"):
        interp.propagate(training, n, ids, path="L1H1@2")
    with pytest.raises(SiteUnavailableError, match=r"pull-backs through Bert.*LinearScope"):
        interp.propagate(interp.attach(build("bert")), n, ids, path="L1H1@2")
    cnn = interp.attach(nn.Sequential(nn.Linear(3, 3)))
    for prompt in (None, torch.ones(1, 3)):
        with pytest.raises(SiteUnavailableError, match="pull-backs through Sequential"):
            interp.propagate(cnn, n, prompt, path="L1H1")
    with pytest.raises(SiteUnavailableError, match="pull-backs through Sequential"):
        interp.propagate_all(cnn, n, torch.ones(1, 3))


def test_weights_that_are_not_one_plain_matrix_are_refused():
    model, n, ids = case("llama")
    ref, proj = Reference(model, ids), model.module.model.layers[1].self_attn.v_proj
    proj.base_layer = nn.Linear(2, 2)
    with pytest.raises(UnknownFamilyError, match=r"adds to another layer's output; .*merge the adapter"):
        interp.propagate(model, n, ref, path="L1H1@2")
    del proj.base_layer
    proj.weight = nn.Parameter(proj.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnknownFamilyError, match=r"v_proj.*without a plain floating-point weight.*quantisation"):
        interp.propagate(model, n, ref, path="L1H1@2")


@pytest.mark.parametrize("linearization", ["path", "exact"])
def test_parts_that_do_not_sum_are_refused(linearization, monkeypatch):
    model, n, ids = case("llama")
    ref = Reference(model, ids)
    right = Reference.logits
    monkeypatch.setattr(Reference, "logits", lambda self, position: right(self, position) * 1.1)
    with pytest.raises(CompletenessError, match=r"misses the measurement by .* at most 1e-06"):
        interp.propagate_all(model, n, ref, linearization=linearization)
    assert math.isfinite(float(right(ref, 0).sum()))
