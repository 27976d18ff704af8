"""Right shape, finite, wrong meaning: each of these once went through without a word."""

import threading

import pytest
import torch
from torch import nn

import interp
from interp.hooks.errors import ArgumentError, InputError, InterventionError, LayoutError, SiteError
from tests.cases import CASES, IDS, MIXED, build, build_cnn, inputs_for


def attached(name, **options):
    return interp.attach(build(name, **options))


def test_left_padding_on_an_encoder_is_refused():
    with pytest.raises(InputError, match="left padding"):
        attached("bert").run(MIXED, padding_side="left")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_patch_from_the_same_texts_changes_nothing_on_either_side(side):
    model = attached("llama")
    plain = model.run(MIXED, padding_side=side)
    patched = model.run(MIXED, plan=[interp.Patch("blocks.1.hook_resid_post", source=MIXED)], padding_side=side)
    mask = model.batch(MIXED, side).mask
    assert torch.equal(patched[mask], plain[mask])
    acts = model.capture(MIXED, "blocks.1.hook_resid_post", padding_side="left")
    with pytest.raises(InterventionError, match="another side"):
        model.run(MIXED, plan=[interp.Patch("blocks.1.hook_resid_post", source=acts)], padding_side="right")


def test_a_patch_of_the_prompt_from_itself_leaves_the_written_text():
    model = attached("llama")
    plan = [interp.Patch("blocks.1.hook_resid_post", source=MIXED, positions="prompt")]
    plain, patched = (model.generate(MIXED, max_new_tokens=4, plan=p) for p in ([], plan))
    assert torch.equal(plain.tokens, patched.tokens)


@pytest.mark.parametrize("site", ["attn.hook_pattern", "attn.hook_attn_scores"])
def test_the_mean_of_a_pattern_is_refused(site):
    for over in (None, MIXED):
        with pytest.raises(InterventionError, match="keys of one text"):
            attached("llama").run(IDS, plan=[interp.Mean(f"blocks.1.{site}", over=over)])


def test_positions_at_a_module_whose_output_has_none_are_refused():
    model = attached("llama")
    ids = torch.tensor(IDS[:1])
    with pytest.raises(SiteError, match=r"gives \[1, 4, 7, 7\]"):
        model.capture(ids, "model.layers.0.self_attn[1]", positions="last")
    bert = interp.attach(build("bert", base=True))
    with pytest.raises(SiteError, match=r"positions at pooler, which gives \[2, 32\]"):
        bert.capture(IDS, "pooler", positions="last")
    with pytest.raises(SiteError, match="positions at pooler"):
        bert.run(IDS, plan=[interp.Zero("pooler", positions="last")])


def test_a_query_head_patched_from_values_reads_its_own_group():
    model, ids = attached("llama"), torch.tensor(IDS[:1])
    values = model.capture(ids, "blocks.1.attn.hook_v")["blocks.1.attn.hook_v"]
    for head in range(4):
        plan = [interp.Patch("blocks.1.attn.hook_z", head=head, from_site="blocks.1.attn.hook_v")]
        z = model.capture(ids, "blocks.1.attn.hook_z", plan=plan)["blocks.1.attn.hook_z"]
        assert torch.equal(z[:, :, head], values[:, :, head // 2])
    with pytest.raises(InterventionError, match="the query head to read"):
        model.run(
            ids, plan=[interp.Patch("blocks.1.attn.hook_v", head=1, source=ids, from_site="blocks.1.attn.hook_z")]
        )


@pytest.mark.parametrize("site", ["ln_final.hook_normalized", "unembed.hook_out", "logits"])
def test_a_lens_under_a_plan_that_it_cannot_see_is_refused(site):
    model, ids = attached("llama"), torch.tensor(IDS[:1])
    with pytest.raises(ArgumentError, match="not the last stream's readout"):
        interp.logit_lens(model, ids, plan=[interp.Scale(site, 0.5)])


def test_attribution_under_a_plan_on_the_logits_is_refused():
    model, ids = attached("llama"), torch.tensor(IDS[:1])
    observable = interp.Observable.logit_diff(model, 3, 9)
    with pytest.raises(ArgumentError, match="in front of the unembedding"):
        interp.direct_attribution(model, observable, ids, plan=[interp.Scale("logits", 0.1)])


def test_a_patched_model_of_a_verified_configuration_is_verified_again():
    attached("llama")
    module = build("llama")
    block = module.model.layers[1]
    right = block.forward
    block.forward = lambda *args, **kwargs: right(*args, **kwargs) * 2
    with pytest.raises(LayoutError, match="is off by"):
        interp.attach(module)

    class Adapter(nn.Module):
        """A low-rank addition, as adapters wrap a projection."""

        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias
            self.in_features, self.out_features = base.in_features, base.out_features
            self.low = nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.low(x)

    module = build("llama")
    module.model.layers[0].self_attn.q_proj = Adapter(module.model.layers[0].self_attn.q_proj)
    interp.attach(module)
    module.model.layers[0].self_attn.o_proj = Adapter(module.model.layers[0].self_attn.o_proj)
    with pytest.raises(LayoutError, match="W_O z"):
        interp.attach(module)


def test_threads_on_one_model_do_not_see_each_others_plans():
    model, ids = attached("llama"), torch.tensor(IDS)
    plain = model.run(ids)
    edited = model.run(ids, plan=[interp.Zero("blocks.1.hook_mlp_out")])
    wrong, stop = [], threading.Event()

    def steer():
        while not stop.is_set():
            if not torch.allclose(model.run(ids, plan=[interp.Zero("blocks.1.hook_mlp_out")]), edited, atol=1e-4):
                wrong.append("edited")

    other = threading.Thread(target=steer)
    other.start()
    try:
        for _ in range(60):
            if not torch.allclose(model.run(ids), plain, atol=1e-4):
                wrong.append("plain")
            acts = model.capture(ids, "blocks.2.hook_resid_post")
            assert acts["blocks.2.hook_resid_post"].shape[0] == 2
    finally:
        stop.set()
        other.join()
    assert not wrong


def test_a_users_hook_that_calls_the_model_within_a_capture():
    module = build("llama")
    ids, other = torch.tensor(IDS[:1]), torch.tensor(IDS[1:])
    wanted = interp.attach(module).capture(ids, "blocks.*.hook_resid_post")
    inside = []

    def hook(m, args, output):
        if not inside:
            inside.append(True)
            module(other)

    handle = module.model.layers[1].register_forward_hook(hook)
    found = interp.attach(module, check=False).capture(ids, "blocks.*.hook_resid_post")
    handle.remove()
    assert inside
    assert all(torch.equal(found[s], wanted[s]) for s in wanted)


def test_beams_in_a_models_own_settings_are_not_used():
    module = build("llama")
    module.generation_config.num_beams = 2
    written = interp.attach(module).generate(IDS, max_new_tokens=3, capture="blocks.0.hook_resid_post")
    assert written.tokens.shape[0] == written.positions.shape[0] == 2
    assert written.activations["blocks.0.hook_resid_post"].shape[:2] == written.positions.shape


def test_a_token_table_of_several_texts_is_refused(tokenizer):
    with pytest.raises(InputError, match="2 texts"):
        interp.attach(build("llama"), tokenizer).tokens(["the cat", "the dog sat"])


def test_hidden_dimensions_are_not_called_tokens(tokenizer):
    model = interp.attach(build("bert", base=True), tokenizer)
    assert interp.LinearScope(model, "the cat sat").votes(5).target == "5"
    head = interp.attach(build("llama"), tokenizer)
    assert interp.LinearScope(head, "the cat sat").votes(5).target == "'a'"
    logits = head.run("the cat sat")[0, -1]
    assert interp.LinearScope(head, "the cat sat").votes(logits.argmax()).value == pytest.approx(
        float(logits.max()), rel=1e-4
    )


def test_votes_in_half_precision_can_fail():
    scope = interp.LinearScope(attached("llama", dtype=torch.bfloat16), torch.tensor(IDS[:1]))
    assert scope.tolerance <= 0.02
    scope.r = scope.r + 2.0
    with pytest.raises(ArithmeticError, match="against"):
        scope.votes(5)


IMAGE = torch.ones(1, 3, 6, 6)
BAD = {
    "a float64 image": (lambda: interp.attach(build_cnn()).run(IMAGE.double()), InputError, "float64"),
    "an unknown keyword": (lambda: interp.attach(build_cnn()).run({"y": IMAGE}), InputError, r"\['y'\]"),
    "heads twice": (lambda: interp.Zero("blocks.0.attn.hook_z#1", head=2), InterventionError, "head in the site"),
    "half a token": (lambda: attached("llama").generate(IDS, max_new_tokens=2.5), ArgumentError, "whole number"),
    "a plan of letters": (lambda: attached("llama").generate(IDS, plan="x"), InterventionError, "type str"),
    "an observable of letters": (
        lambda: interp.direct_attribution(attached("llama"), " Mary", IDS[:1]), ArgumentError, "type str",
    ),
    "a string to follow": (
        lambda: interp.logit_lens(attached("llama"), IDS[:1], " Mary"), ArgumentError, "a list of tokens",
    ),
    "a token beyond": (
        lambda: interp.Observable("x", (999,), (1.0,)).measure(torch.zeros(61)), ArgumentError, "token id 999",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_each_has_a_named_error(what, unchecked):
    call, error, text = BAD[what]
    with pytest.raises(error, match=text):
        call()


def test_a_model_that_returns_a_mapping_with_logits():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, x):
            return {"logits": self.net(x)}

    assert interp.attach(Mapped()).run(torch.ones(1, 3)).shape == (1, 2)


def test_swapped_projections_of_an_explicit_layout_are_refused():
    from dataclasses import replace

    module = build("llama")
    layout = interp.attach(module).layout
    with pytest.raises(interp.InterpError):
        interp.attach(module, layout=replace(layout, q=layout.k, k=layout.q))


def test_all_families_have_cases():
    assert {"phi", "starcoder2"} <= set(CASES)
    assert inputs_for("phi") is not None
