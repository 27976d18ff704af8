"""The packaged SmolLM2-135M: plain use is bitwise the module's own, three engines agree, sites mean what they say."""

import copy

import pytest
import torch

import interp
from interp.hooks import verify

pytestmark = pytest.mark.slow
PROMPTS = ["When Mary and John went to the store, John gave a drink to", "The Eiffel Tower is in the city of"]


@pytest.fixture(params=["eager", "sdpa"])
def attention(request, smollm2):
    """Run under one attention setting; put the other back afterwards."""
    before = smollm2.config._attn_implementation
    smollm2.module.set_attn_implementation(request.param)
    yield request.param
    smollm2.module.set_attn_implementation(before)


@pytest.fixture
def eager_copy(smollm2):
    module = copy.deepcopy(smollm2.module)
    module.set_attn_implementation("eager")
    return module


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_are_bitwise_those_of_the_module(smollm2, attention, prompt):
    ids = smollm2.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = smollm2.module(ids).logits
    assert torch.equal(smollm2.run(prompt), wanted)
    assert torch.equal(smollm2.run(ids), wanted)
    assert torch.equal(smollm2.capture(prompt, ["blocks.*.hook_resid_post", "logits"])["logits"], wanted)
    assert smollm2.config._attn_implementation == attention


@pytest.mark.parametrize("prompt", PROMPTS)
def test_identities_hold_on_real_text(smollm2, prompt):
    table = verify.identities(smollm2, inputs=prompt)
    assert [row for row in table if not row["holds"]] == []


def test_a_mixed_batch_equals_its_texts(smollm2):
    sites = ["blocks.29.hook_resid_post", "blocks.10.attn.hook_z"]
    for side in ("left", "right"):
        together = smollm2.capture(PROMPTS, sites, padding_side=side)
        for example, prompt in enumerate(PROMPTS):
            alone = smollm2.capture(prompt, sites)
            for site in sites:
                found, wanted = together[site][example][together.mask[example]], alone[site][0]
                assert (found - wanted).abs().max() <= 5e-5 * wanted.abs().max(), site


def test_patching_the_name_moves_the_answer(smollm2):
    """The last position's stream carries the answer: patch it from a run with the names exchanged."""
    mary, john = (smollm2.tokenizer.encode(name)[0] for name in (" Mary", " John"))
    swapped = "When John and Mary went to the store, Mary gave a drink to"
    plain = smollm2.run(PROMPTS[0])[0, -1]
    patched = smollm2.run(PROMPTS[0], plan=interp.Patch("blocks.24.hook_resid_post", swapped, positions="last"))[0, -1]
    assert plain[mary] > plain[john]
    assert patched[john] > patched[mary]


def test_positions_by_substring(smollm2):
    site = "blocks.3.hook_resid_post"
    found = smollm2.capture(PROMPTS[0], site, " Mary")[site]
    table = smollm2.tokens(PROMPTS[0])
    where = next(row["position"] for row in table if row["token"] == " Mary")
    assert torch.equal(found, smollm2.capture(PROMPTS[0], site, where)[site])


def agree(left, right):
    for site in left:
        a, b = left[site], right[site]
        assert a.shape == b.shape, site
        shown = (a > -1e9) & (b > -1e9)
        assert ((a > -1e9) == (b > -1e9)).all(), site
        size = b[shown].abs().max().clamp(min=1)
        assert (a - b)[shown].abs().max() <= 1e-5 * size, site


def test_bridge_agrees_at_every_site(smollm2, eager_copy, bridge_package):
    wanted = interp.attach(copy.deepcopy(eager_copy)).capture(smollm2.batch(PROMPTS[0]), "*")
    bridge = bridge_package.TransformerBridge.boot_transformers(
        "local", hf_model=eager_copy, tokenizer=smollm2.tokenizer, device="cpu"
    )
    model = interp.attach(bridge)
    agree(model.capture(smollm2.batch(PROMPTS[0]), "*"), wanted)
    ids = smollm2.batch(PROMPTS[0]).ids
    _, cache = bridge.run_with_cache(ids, names_filter=lambda n: n.endswith("hook_resid_post"))
    for layer in (0, 15, 29):
        site = f"blocks.{layer}.hook_resid_post"
        agree({site: wanted[site]}, {site: cache[site]})


def test_nnsight_agrees_at_every_site(smollm2, eager_copy, nnsight_package):
    wrapped = nnsight_package.TransformersModel(eager_copy, tokenizer=smollm2.tokenizer, task="text-generation")
    batch = smollm2.batch(PROMPTS[0])
    wanted = interp.attach(copy.deepcopy(eager_copy)).capture(batch, "*")
    model = interp.attach(wrapped)
    agree(model.capture(batch, "*"), wanted)
    with torch.no_grad(), wrapped.trace(batch.ids):
        hidden = wrapped.model.layers[15].output.save()
    agree({"blocks.15.hook_resid_post": wanted["blocks.15.hook_resid_post"]}, {"blocks.15.hook_resid_post": hidden})


def test_generate_equals_transformers(smollm2):
    encoded = smollm2.tokenizer(PROMPTS[1], return_tensors="pt")
    wanted = smollm2.module.generate(**encoded, max_new_tokens=8, do_sample=False, pad_token_id=0)
    written = smollm2.generate(PROMPTS[1], max_new_tokens=8)
    assert torch.equal(written.tokens, wanted)
    assert written.texts[0].startswith(" Paris")
