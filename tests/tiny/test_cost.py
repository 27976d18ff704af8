"""A capture runs no further, keeps no more and costs no more than what was asked for."""

import gc

import pytest
import torch

import interp
from tests.cases import build, build_cnn, inputs_for

SITE = "blocks.1.hook_mlp_out"


def count_calls(module, act):
    """Names of the modules that ran to their beginning, in order."""
    seen = []
    handles = [
        sub.register_forward_pre_hook(lambda m, a, name=name: seen.append(name)) for name, sub in module.named_modules()
    ]
    act()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("site", "last"), [
    ("blocks.1.hook_mlp_out", "model.layers.1.mlp.down_proj"), ("blocks.0.hook_resid_pre", "model.layers.0"),
    ("blocks.1.attn.hook_pattern", "model.layers.1.self_attn.v_proj"),
    ("blocks.1.attn.hook_z", "model.layers.1.self_attn.o_proj"),
    ("blocks.1.ln2.hook_scale", "model.layers.1.post_attention_layernorm"), ("logits", "lm_head"),
])  # fmt: skip
def test_nothing_runs_behind_the_last_site(site, last):
    module, x = build("llama"), inputs_for("llama")
    model = interp.attach(module)
    names = [n for n, _ in module.named_modules()]
    seen = count_calls(module, lambda: model.capture(x, ["hook_embed", site]))
    assert seen[-1] == last
    plan = [interp.Zero("blocks.2.hook_mlp_out")]
    seen = count_calls(module, lambda: model.capture(x, ["hook_embed", site], plan=plan))
    assert "model.layers.2.mlp.down_proj" in seen, "an edit behind the last site still runs"
    full = count_calls(module, lambda: model.capture(x, site, gradient_of=lambda y: y.sum()))
    assert full[-1] == "lm_head"
    assert set(seen) <= set(names)


def test_early_stop_changes_no_value():
    model, x = interp.attach(build("llama")), inputs_for("llama")
    stopped, ran_on = model.capture(x, SITE), model.capture(x, [SITE, "logits"])
    assert torch.equal(stopped[SITE], ran_on[SITE])


def test_early_stop_outside_of_transformers():
    module = build_cnn()
    model, x = interp.attach(module), torch.ones(1, 3, 6, 6)
    first = count_calls(module, lambda: model.capture(x, "norm"))
    assert first[-1] == "head", "the first time, to see that the module runs once"
    assert count_calls(module, lambda: model.capture(x, "norm"))[-1] == "norm"


def test_a_module_that_runs_twice_is_refused():
    """Which of its two values was meant? And early stop would give the first, a longer run the last."""
    model, x = interp.attach(build_cnn()), torch.ones(1, 3, 6, 6)
    for sites in ("act", ["act", "head"], ["conv", "act:in"]):
        for _ in range(2):
            with pytest.raises(interp.InterpError, match="more than once"):
                model.capture(x, sites)


def test_one_site_at_one_position_keeps_only_that():
    model = interp.attach(build("llama"))
    x = torch.arange(2 * 40).reshape(2, 40) % 60
    for site, numbers in (
        ("blocks.1.hook_resid_post", 32), ("blocks.1.mlp.hook_post", 48), ("blocks.1.attn.hook_z#1", 8),
        ("blocks.1.attn.hook_pattern#0", 40), ("blocks.1.ln1.hook_scale", 1), ("logits", 61),
    ):  # fmt: skip
        value = model.capture(x, site, "last")[site]
        assert value.untyped_storage().nbytes() == 2 * numbers * 4, site
        whole = model.capture(x, "blocks.1.hook_resid_post")["blocks.1.hook_resid_post"]
        assert whole.untyped_storage().nbytes() == whole.numel() * 4
        assert whole.grad_fn is None


def live_tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


@pytest.mark.parametrize("what", ["capture", "pattern", "run", "gradients", "refused", "generate"])
def test_two_hundred_visits_leave_no_tensor_behind(what):
    model, x = interp.attach(build("llama")), inputs_for("llama")[:, :3]
    plan = [interp.Scale(SITE, 2.0), interp.Patch("blocks.2.hook_resid_pre", from_site="blocks.0.hook_resid_post")]

    def refused():
        with pytest.raises(interp.InterpError):
            model.run(x, plan=[interp.Add(SITE, torch.ones(3))])

    act = {
        "capture": lambda: model.capture(x, SITE, plan=plan),
        "pattern": lambda: model.capture(x, ["blocks.*.attn.hook_pattern", "blocks.0.attn.hook_rot_k"]),
        "run": lambda: model.run(x, plan=plan),
        "gradients": lambda: model.capture(x, [SITE, "hook_embed"], gradient_of=lambda y: y.sum()),
        "refused": refused,
        "generate": lambda: model.generate(x, max_new_tokens=2, capture=SITE),
    }[what]
    for _ in range(3):
        act()
    before = live_tensors()
    for _ in range(40 if what == "generate" else 200):
        act()
    assert live_tensors() <= before


def test_a_results_memory_is_its_own():
    model, x = interp.attach(build("llama")), inputs_for("llama")
    acts = model.capture(x, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
    one, two = acts.values()
    assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr()


def test_a_plain_run_installs_no_hooks():
    module, x = build("llama"), inputs_for("llama")
    model, hooks = interp.attach(module), []
    module.lm_head.register_forward_hook(
        lambda m, a, o: hooks.append(sum(len(s._forward_hooks) + len(s._forward_pre_hooks) for s in module.modules()))
    )
    model.run(x)
    model.run(x, plan=[interp.Zero(SITE)])
    assert hooks == [1, 4], "the hook of one site, and two that follow the outermost call"


def test_a_model_that_moves_takes_its_inputs_along():
    """dtype (and so device) are looked up when they are needed, not when the model was attached."""
    module = build("vit")
    model = interp.attach(module)
    module.double()
    assert model.run(inputs_for("vit")).dtype == torch.float64
    assert model.dtype == torch.float64
    assert model.batch(inputs_for("vit")).args[0].dtype == torch.float64
