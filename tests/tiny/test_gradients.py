"""Gradients at sites against finite differences and against autograd by hooks of our own, in float64."""

import pytest
import torch

import interp
from interp.hooks.errors import InputError, SiteError
from tests.cases import MIXED, build, build_cnn, inputs_for

SITES = [
    "hook_embed", "blocks.0.hook_resid_mid", "blocks.1.ln1.hook_scale", "blocks.1.ln1.hook_normalized",
    "blocks.1.ln1.hook_out", "blocks.1.attn.hook_q", "blocks.1.attn.hook_k", "blocks.1.attn.hook_v",
    "blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_attn_scores",
    "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z", "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid",
    "blocks.1.mlp.hook_post", "blocks.1.mlp.hook_out", "blocks.2.hook_resid_post", "ln_final.hook_normalized",
    "unembed.hook_out", "logits",
]  # fmt: skip


def target(logits):
    """A scalar of the last two positions, different for each example."""
    return (logits[:, -2:, 5].tanh() - 0.3 * logits[:, -2:, 11] ** 2).sum(1) * torch.tensor([1.0, 2.0]).to(logits)


def moved(model, x, site, index, step):
    def fn(value):
        value = value.clone()
        value[index] += step
        return value

    return target(model.run(x, plan=[interp.Function(site, fn)])).sum()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "neox-parallel", "bert"])
def test_gradients_equal_finite_differences(name):
    model, x = interp.attach(build(name, dtype=torch.float64)), inputs_for(name)
    sites = [s for s in SITES if s in model.bindings.by_address]
    acts = model.capture(x, sites, gradient_of=target)
    assert list(acts.gradients) == list(acts) == sites
    for site in sites:
        gradient = acts.gradients[site]
        assert gradient.shape == acts[site].shape, site
        assert not acts[site].requires_grad
        if gradient.dtype != torch.float64:
            continue  # transformers takes the softmax in float32: too coarse for differences
        index = tuple(int(i) for i in (gradient.abs() == gradient.abs().max()).nonzero()[0])
        step = 3e-3  # not smaller: decoders take softmax and RMS norm in float32 whatever their dtype
        difference = (moved(model, x, site, index, step) - moved(model, x, site, index, -step)) / (2 * step)
        torch.testing.assert_close(gradient[index], difference, rtol=5e-3, atol=5e-4, msg=lambda m, s=site: f"{s}: {m}")


@pytest.mark.parametrize(("site", "path", "where"), [
    ("blocks.1.hook_resid_post", "model.layers.1", "out"), ("blocks.1.hook_resid_pre", "model.layers.1", "in"),
    ("blocks.1.hook_attn_out", "model.layers.1.self_attn.o_proj", "out"),
    ("blocks.1.attn.hook_q", "model.layers.1.self_attn.q_proj", "out"),
    ("blocks.1.attn.hook_z", "model.layers.1.self_attn.o_proj", "in"),
    ("blocks.1.ln2.hook_out", "model.layers.1.post_attention_layernorm", "out"),
    ("blocks.1.mlp.hook_post", "model.layers.1.mlp.down_proj", "in"),
])  # fmt: skip
def test_gradients_equal_autograd_by_hooks(site, path, where):
    module, x = build("llama", dtype=torch.float64), inputs_for("llama")
    acts, kept = interp.attach(module).capture(x, site, gradient_of=target), []

    def keep(value):
        value.retain_grad()
        kept.append(value)

    sub = module.get_submodule(path)
    if where == "out":
        handle = sub.register_forward_hook(lambda m, a, o: keep(o[0] if isinstance(o, tuple) else o))
    else:
        handle = sub.register_forward_pre_hook(lambda m, a: keep(a[0]))
    target(module(x).logits).sum().backward()
    handle.remove()
    wanted = kept[0].grad.reshape(acts.gradients[site].shape)
    torch.testing.assert_close(acts.gradients[site], wanted, rtol=1e-9, atol=1e-12)


def test_asking_for_more_sites_changes_no_gradient():
    model, x = interp.attach(build("llama", dtype=torch.float64)), inputs_for("llama")
    together = model.capture(x, SITES, gradient_of=target)
    for site in SITES:
        alone = model.capture(x, site, gradient_of=target)
        torch.testing.assert_close(alone.gradients[site], together.gradients[site], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[site], together[site], rtol=1e-5, atol=1e-5)


def test_scale_and_normalized_are_nested():
    """The gradient at a norm's divisor goes through its normalised output: d/dr of c/r is -n/r."""
    model, x = interp.attach(build("gpt2", dtype=torch.float64)), inputs_for("gpt2")
    scale, normalized = "blocks.1.ln1.hook_scale", "blocks.1.ln1.hook_normalized"
    acts = model.capture(x, [scale, normalized], gradient_of=target)
    wanted = -(acts.gradients[normalized] * acts[normalized] / acts[scale]).sum(-1, keepdim=True)
    torch.testing.assert_close(acts.gradients[scale], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("positions", [2, "last", [[1, 3], [0, -1]]])
def test_gradients_at_positions_and_heads(positions):
    model, x = interp.attach(build("llama", dtype=torch.float64)), inputs_for("llama")
    for site in ("blocks.1.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.1.attn.hook_v"):
        full = model.capture(x, site, gradient_of=target).gradients[site]
        part = model.capture(x, site, positions, gradient_of=target)
        where = model.batch(x).positions(positions)
        wanted = torch.stack([full[i, row] for i, row in enumerate(where)])
        torch.testing.assert_close(part.gradients[site], wanted, rtol=1e-9, atol=1e-12)
    head = model.capture(x, "blocks.1.attn.hook_z#2", gradient_of=target).gradients["blocks.1.attn.hook_z#2"]
    full = model.capture(x, "blocks.1.attn.hook_z", gradient_of=target).gradients["blocks.1.attn.hook_z"]
    torch.testing.assert_close(head, full[:, :, 2:3], rtol=1e-9, atol=1e-12)


def test_gradients_under_a_plan():
    model, x = interp.attach(build("llama", dtype=torch.float64)), inputs_for("llama")
    site, plan = "blocks.1.hook_mlp_out", [interp.Scale("blocks.1.hook_mlp_out", 0.5)]
    acts = model.capture(x, site, plan=plan, gradient_of=target)
    fixed = [interp.Set(site, acts[site])]
    again = model.capture(x, site, plan=fixed, gradient_of=target)
    torch.testing.assert_close(acts.gradients[site], again.gradients[site], rtol=1e-9, atol=1e-12)
    before = model.capture(x, "blocks.1.mlp.hook_out", plan=plan, gradient_of=target)
    torch.testing.assert_close(
        before.gradients["blocks.1.mlp.hook_out"], acts.gradients[site] * 0.5, rtol=1e-9, atol=1e-12
    )


def test_gradients_in_a_padded_batch():
    model, site = interp.attach(build("llama")), "blocks.0.hook_resid_post"
    for side in ("left", "right"):
        batch = model.batch(MIXED, side)
        last = batch.positions("last")[:, 0]
        acts = model.capture(batch, site, gradient_of=lambda y, last=last: y[torch.arange(3), last, 7])
        for example, row in enumerate(MIXED):
            alone = model.capture([row], site, gradient_of=lambda y: y[:, -1, 7]).gradients[site][0]
            found = acts.gradients[site][example]
            torch.testing.assert_close(found[batch.mask[example]], alone, rtol=1e-4, atol=1e-5)
            assert found[~batch.mask[example]].abs().max() < 1e-12 if (~batch.mask[example]).any() else True


def test_gradients_of_a_convolutional_network():
    module = build_cnn().double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    acts = interp.attach(module).capture(x, ["conv:in", "norm", "skip", "head:in"], gradient_of=lambda y: y[:, 1])
    x.requires_grad_(True)
    (wanted,) = torch.autograd.grad(module(x)[:, 1].sum(), x)
    torch.testing.assert_close(acts.gradients["conv:in"], wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(acts.gradients["head:in"], module.head.weight[1].expand(2, -1).detach())


def test_no_gradient_is_an_error():
    model, x = interp.attach(build("llama")), inputs_for("llama")
    for constant in (lambda y: y.detach().sum(), lambda y: 3.0, lambda y: (y > 0).sum()):
        with pytest.raises(InputError, match="gradient"):
            model.capture(x, "hook_embed", gradient_of=constant)
    side = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "ignored": torch.nn.Linear(2, 2)})

    class Side(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = side

        def forward(self, x):
            self.parts["ignored"](x)
            return self.parts["used"](x)

    with pytest.raises(SiteError, match="ignored"):
        interp.attach(Side()).capture(torch.ones(1, 2), ["parts.used", "parts.ignored"], gradient_of=lambda y: y.sum())
