"""The same sites through a Hugging Face model, a TransformerBridge and nnsight; their own use goes on working."""

import pytest
import torch

import interp
from interp.hooks import verify
from tests.cases import build, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:.*which nnsight already serves")
NAMES = ["llama", "gpt2", "neox-parallel", "gpt-j", "gemma3", "bert"]


def bridge_of(module, tokenizer):
    from transformer_lens import TransformerBridge

    return TransformerBridge.boot_transformers("local", hf_model=module, tokenizer=tokenizer, device="cpu")


def nnsight_of(module, tokenizer):
    from nnsight import NNsight, TransformersModel

    if type(module).__name__.startswith("Bert"):  # fill-mask wants a mask token
        return NNsight(module)
    return TransformersModel(module, tokenizer=tokenizer, task="text-generation")


def assert_same(left, right, tolerance=1e-5):
    assert list(left) == list(right)
    for site in left:
        a, b = left[site], right[site]
        assert a.shape == b.shape, site
        shown = (a > -1e9) & (b > -1e9)  # Masked scores are -inf in one engine, the smallest number in another.
        assert ((a > -1e9) == (b > -1e9)).all(), site
        assert (a - b)[shown].abs().max() <= tolerance * max(1, b[shown].abs().max()), site


@pytest.mark.parametrize("name", NAMES)
def test_bridge_gives_every_site_of_the_model(name, tokenizer, bridge_package):
    wanted = interp.attach(build(name)).capture(inputs_for(name), "*")
    bridge = bridge_of(build(name), tokenizer)
    before = bridge(inputs_for(name), return_type="logits")
    model = interp.attach(bridge)
    assert model.tokenizer is bridge.tokenizer
    assert_same(model.capture(inputs_for(name), "*"), wanted)
    assert all(row["holds"] for row in verify.identities(model, inputs=inputs_for(name)))
    torch.testing.assert_close(bridge(inputs_for(name), return_type="logits"), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel"])
def test_bridge_own_hooks_and_ours_live_side_by_side(name, tokenizer, bridge_package):
    ids = inputs_for(name)
    bridge = bridge_of(build(name), tokenizer)
    model = interp.attach(bridge)
    acts = model.capture(ids, "blocks.1.hook_resid_post")
    _, cache = bridge.run_with_cache(ids)
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"], acts["blocks.1.hook_resid_post"], rtol=0, atol=1e-5)

    calls = []
    bridge.add_hook("blocks.1.hook_mlp_out", lambda value, hook: calls.append(1) or value * 0)
    theirs = bridge(ids, return_type="logits")
    calls.clear()
    seen = model.run(ids)
    assert calls, "a bridge's hook still fires while interp runs the model"
    torch.testing.assert_close(seen, theirs, rtol=0, atol=1e-5)
    bridge.reset_hooks()
    torch.testing.assert_close(model.run(ids, plan=[interp.Zero("blocks.1.hook_mlp_out")]), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel", "gpt-j"])
def test_edits_do_the_same_in_a_bridge(name, tokenizer, bridge_package):
    ids = inputs_for(name)
    plain, bridge = interp.attach(build(name)), interp.attach(bridge_of(build(name), tokenizer))
    sites = [row["site"] for row in plain.sites("blocks.1.*")]
    for site in sites:
        plan = [interp.Scale(site, 0.5)]
        difference = (plain.run(ids, plan=plan) - bridge.run(ids, plan=plan)).abs().max()
        assert difference <= 2e-5, site


@pytest.mark.parametrize("name", NAMES)
def test_nnsight_gives_every_site_of_the_model(name, tokenizer, nnsight_package):
    module = build(name)
    wanted = interp.attach(build(name)).capture(inputs_for(name), "*")
    wrapped = nnsight_of(module, tokenizer)
    model = interp.attach(wrapped)
    assert model.module is module
    assert_same(model.capture(inputs_for(name), "*"), wanted)


def test_nnsight_traces_before_and_after(tokenizer, nnsight_package):
    ids = inputs_for("llama")
    wrapped = nnsight_of(build("llama"), tokenizer)

    def trace():
        with torch.no_grad(), wrapped.trace(ids):
            hidden = wrapped.model.layers[1].output.save()
            logits = wrapped.lm_head.output.save()
        return hidden, logits

    before = trace()
    model = interp.attach(wrapped)
    acts = model.capture(ids, ["blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern", "logits"])
    after = trace()
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(acts["blocks.1.hook_resid_post"], after[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(acts["logits"], after[1], rtol=0, atol=1e-5)


def test_plain_nnsight_wrapper(nnsight_package):
    from nnsight import NNsight

    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    model = interp.attach(NNsight(module))
    x = torch.randn(2, 3)
    assert model.module is module
    torch.testing.assert_close(model.capture(x, "0")["0"], module[0](x).detach(), rtol=0, atol=0)
