"""After any use, ended well or badly, the model is exactly what it was."""

import pytest
import torch
from torch.nn.modules import module as global_hooks

import interp
from interp.hooks.errors import InterpError
from tests.cases import build, build_cnn, inputs_for

NAMES = ["llama", "gpt2", "gemma3", "bert"]
HOOK_DICTS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks", "_state_dict_pre_hooks",
)  # fmt: skip
GLOBAL_DICTS = [name for name in vars(global_hooks) if name.startswith("_global_") and name.endswith("_hooks")]


def snapshot(module):
    """Everything about a module, and about torch, that a visit could change."""
    configs = {
        name: (c.to_json_string(), getattr(c, "_attn_implementation", None))
        for name, sub in module.named_modules()
        if hasattr(c := getattr(sub, "config", None), "to_json_string")
    }
    generation = getattr(module, "generation_config", None)
    return {
        "hooks": [[list(getattr(m, d)) for d in HOOK_DICTS] for m in module.modules()],
        "global hooks": [list(getattr(global_hooks, d)) for d in GLOBAL_DICTS],
        "attributes": [sorted(vars(m)) for m in module.modules()],
        "forwards": [vars(m).get("forward") for m in module.modules()],
        "training": [m.training for m in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "grads": [None if p.grad is None else p.grad.double().numpy().tobytes() for p in module.parameters()],
        "versions": [t._version for t in (*module.parameters(), *module.buffers())],
        "state": {k: v.double().numpy().tobytes() for k, v in module.state_dict().items()},
        "tensors": [(id(t), t.dtype, t.data_ptr()) for t in (*module.parameters(), *module.buffers())],
        "configs": configs,
        "generation": None if generation is None else generation.to_dict(),
        "random": torch.get_rng_state().numpy().tobytes(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "modes": torch._C._len_torch_function_stack(),
        "threads": torch.get_num_threads(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()),
    }


def plain(module, inputs):
    with torch.no_grad():
        output = module(inputs)
    return getattr(output, "logits", output).clone()


def explode(error):
    def fn(value):
        raise error

    return fn


def the_pattern_and_all(model, x):
    model.capture(x, "blocks.*")


def steered(model, x):
    model.run(
        x, plan=[interp.Add("blocks.1.hook_resid_mid", torch.ones(32)), interp.Zero("blocks.0.attn.hook_pattern")]
    )


def gradients(model, x):
    model.capture(x, ["blocks.1.hook_resid_mid", "blocks.0.attn.hook_pattern"], gradient_of=lambda y: y[:, -1].sum())


def nested(model, x):
    calls, last = [], ["blocks.2.attn.hook_pattern", "blocks.2.hook_resid_post"]
    alone = model.capture(x, last)

    def look_again(value):
        calls.append(model.capture(x, last))
        return value

    for site in ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_q", "blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_z"):
        calls.clear()
        outer = model.capture(x, last, plan=[interp.Function(site, look_again)])
        assert len(calls) == 1
        for found in (outer, calls[0]):
            for name in last:
                torch.testing.assert_close(found[name], alone[name], rtol=0, atol=1e-5)


def raising(error, site):
    def act(model, x):
        plan = [interp.Function(site, explode(error))]
        with pytest.raises(type(error)):
            model.run(x, plan=plan)
        with pytest.raises(type(error)):
            model.capture(x, "blocks.2.attn.hook_pattern", plan=plan)
        with pytest.raises(type(error)):
            model.capture(x, "hook_embed", plan=plan, gradient_of=lambda y: y.sum())

    return act


def refused(model, x):
    for site in ("blocks.9.hook_resid_pre", "blocks.0.attn.hook_q#77", "blocks.1.hook_resid_post[3]"):
        with pytest.raises(InterpError):
            model.capture(x, site)
    with pytest.raises(InterpError):
        model.run(x, plan=[interp.Set("blocks.1.hook_resid_pre", torch.ones(5))])
    with pytest.raises(InterpError):
        model.run(x, plan=[interp.Function("blocks.1.attn.hook_pattern", lambda v: v[:1, :1])])


ACTIONS = {
    "capture of everything": the_pattern_and_all,
    "run with a plan": steered,
    "gradients": gradients,
    "a capture inside an intervention": nested,
    "an exception": raising(ZeroDivisionError("on purpose"), "blocks.1.hook_mlp_out"),
    "an exception inside attention": raising(ZeroDivisionError("on purpose"), "blocks.1.attn.hook_attn_scores"),
    "an interrupt": raising(KeyboardInterrupt(), "blocks.1.attn.hook_rot_q"),
    "refusals": refused,
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left(name, action, attention):
    module, x = build(name, attention=attention), inputs_for(name)
    plain(module, x)  # transformers places things of its own at the first call
    before, logits = snapshot(module), plain(module, x)
    model = interp.attach(module)
    assert snapshot(module) == before
    ACTIONS[action](model, x)
    after = snapshot(module)
    for key, value in before.items():
        assert after[key] == value, key
    assert torch.equal(plain(module, x), logits)
    assert torch.equal(model.run(x), logits)


def test_nothing_is_left_by_attach_alone_on_a_fresh_model():
    module = build("qwen3")
    before = snapshot(module)
    interp.attach(module, check=True)
    after = snapshot(module)
    assert {k for k in before if before[k] != after[k]} == set()


@pytest.mark.parametrize("how", ["well", "badly"])
def test_nothing_is_left_by_generate(how):
    module = build("llama", attention="sdpa")
    x = torch.tensor([[3, 17, 42]])
    module.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=2, pad_token_id=0)
    before = snapshot(module)
    model = interp.attach(module)
    if how == "well":
        model.generate(
            x, max_new_tokens=3, capture="blocks.1.*_post", plan=[interp.Scale("blocks.0.hook_mlp_out", 2.0)]
        )
        model.generate(x, max_new_tokens=3, do_sample=True, seed=7)
    else:
        plan = [interp.Function("blocks.0.hook_mlp_out", explode(KeyboardInterrupt()), positions="generated")]
        with pytest.raises(KeyboardInterrupt):
            model.generate(x, max_new_tokens=3, plan=plan)
    after = snapshot(module)
    assert {k for k in before if before[k] != after[k]} == set()


@pytest.mark.parametrize("action", ["capture of everything", "a capture inside an intervention", "an exception"])
def test_user_hooks_stay_and_fire(action):
    module, x = build("llama"), inputs_for("llama")
    model, fired = interp.attach(module), []
    layer = module.model.layers[0]
    layer.register_forward_hook(lambda m, a, o: fired.append("after"))
    layer.register_forward_pre_hook(lambda m, a: fired.append("before"))
    layer.mlp.register_full_backward_hook(lambda m, a, o: fired.append("back"))
    before = snapshot(module)
    ACTIONS[action](model, x)
    assert "before" in fired
    assert "after" in fired
    after = snapshot(module)
    assert {k for k in before if before[k] != after[k]} == set()
    fired.clear()
    model.capture(x, "blocks.0.hook_resid_pre", gradient_of=lambda y: y.sum())
    assert fired == ["before", "after", "back"]


def test_a_user_hook_that_changes_the_model_is_seen():
    module, x = build("gpt2"), inputs_for("gpt2")
    model = interp.attach(module)
    module.transformer.h[0].mlp.register_forward_hook(lambda m, a, o: o * 0)
    assert model.capture(x, "blocks.0.hook_mlp_out")["blocks.0.hook_mlp_out"].abs().max() == 0
    assert torch.equal(model.run(x), plain(module, x))


def test_existing_gradients_and_frozen_parameters_stay():
    module, x = build("llama"), inputs_for("llama")
    module.model.embed_tokens.requires_grad_(False)
    module(x).logits.sum().backward()
    before = snapshot(module)
    gradients(interp.attach(module), x)
    after = snapshot(module)
    assert {k for k in before if before[k] != after[k]} == set()


def test_gradients_when_every_parameter_is_frozen():
    module, x = build("llama").requires_grad_(False), inputs_for("llama")
    free = interp.attach(build("llama")).capture(x, "blocks.1.hook_resid_mid", gradient_of=lambda y: y[:, -1, 3])
    held = interp.attach(module).capture(x, "blocks.1.hook_resid_mid", gradient_of=lambda y: y[:, -1, 3])
    assert torch.equal(*(a.gradients["blocks.1.hook_resid_mid"] for a in (free, held)))


@pytest.mark.parametrize("how", ["no_grad", "enable_grad", "inference_mode"])
def test_grad_mode_of_the_caller(how):
    model, x = interp.attach(build("llama")), inputs_for("llama")
    with getattr(torch, how)():
        state = torch.is_grad_enabled()
        value = model.capture(x, "blocks.1.hook_resid_post")["blocks.1.hook_resid_post"]
        assert torch.is_grad_enabled() == state
    assert not value.requires_grad
    assert not model.run(x).requires_grad


def test_convolutions_with_batch_norm_and_in_place_units():
    module = build_cnn()
    x = torch.randn(2, 3, 6, 6)
    logits, before = plain(module, x), snapshot(module)
    model = interp.attach(module)
    model.capture(x, ["conv", "norm:in", "skip", "head:in"])
    model.run(x, plan=[interp.Zero("conv")])
    assert snapshot(module) == before
    assert torch.equal(plain(module, x), logits)
