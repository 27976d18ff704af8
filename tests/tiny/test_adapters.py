"""PSRP on models of every kind: the identity at first, only its own parameters trained, and no trace."""

import pytest
import torch
from torch import nn

from interp.hooks.errors import ArgumentError, ModelStateError, UnknownFamilyError
from interp.probes import MomentHead, PSRPAdapter, train_adapter
from interp.probes.adapters import PSRP, BranchPoint, branch_points
from tests.cases import CASES, build, inputs_for

PARALLEL = ("neox-parallel", "gpt-j", "phi", "cohere")


def swin():
    from transformers import SwinConfig, SwinModel

    return SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4)
    )


def convnext():
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, layer_scale_init_value=0.5))


def dinov2():
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    )


IMAGE = {"swin": (swin, [16, 32, 32]), "convnext": (convnext, [8, 16, 16]), "dinov2": (dinov2, [32, 32])}
NAMES = [name for name in CASES if name not in PARALLEL] + list(IMAGE)


def model_and_inputs(name):
    torch.manual_seed(0)
    if name in IMAGE:
        return IMAGE[name][0]().eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    inputs = inputs_for(name)
    key = "pixel_values" if torch.is_floating_point(torch.as_tensor(inputs)) else "input_ids"
    return build(name), {key: torch.as_tensor(inputs)}


def first(output):
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()  # with gradients torch may take other kernels where a weight is frozen
def output(model, inputs):
    return first(model(**inputs))


def perturbed(adapter):
    with torch.no_grad():
        for generator in adapter.generators:
            nn.init.normal_(generator.scale.weight, std=0.3)
            nn.init.normal_(generator.shift.weight, std=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_the_identity_and_nothing_stays_behind(name):
    model, inputs = model_and_inputs(name)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    keys, plain = set(model.state_dict()), output(model, inputs)
    with PSRPAdapter.wrap(model, rank=3) as adapter:
        assert torch.equal(output(adapter, inputs), plain)
        perturbed(adapter)
        changed = first(adapter(**inputs))
        assert not torch.allclose(changed, plain, rtol=1e-3, atol=1e-3)
        changed.square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters())
        assert all(p.grad is None for p in model.parameters())
        assert set(model.state_dict()) == keys
    assert torch.equal(output(model, inputs), plain)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not hasattr(model, "_psrp")


@pytest.mark.parametrize("name", IMAGE)
def test_widths_are_those_of_the_stages(name):
    model, _ = model_and_inputs(name)
    assert [point.width for point in branch_points(model)] == IMAGE[name][1]


def test_a_block_is_recalibrated_as_the_formula_says():
    model, inputs = model_and_inputs("vit")
    seen = {}
    layer = model.get_submodule(branch_points(model)[0].branch.rsplit(".", 1)[0])
    layer.register_forward_hook(lambda m, a, out: seen.update(out=out))
    layer.layernorm_after.register_forward_pre_hook(lambda m, a: seen.update(t=a[0]))
    adapter = PSRPAdapter.wrap(model, rank=3)
    perturbed(adapter)
    adapter(**inputs)
    t, g = seen["t"], adapter.generators[0]
    shared = torch.relu(t @ g.down.weight.T)
    w, b = shared @ g.scale.weight.T, shared @ g.shift.weight.T
    adapter.remove()
    with torch.no_grad():
        expected = t + b + (1 + w) * layer.mlp(layer.layernorm_after(t))
    torch.testing.assert_close(seen["out"], expected)


def test_parameters_of_a_block():
    assert sum(p.numel() for p in PSRP(768, 16).parameters()) == 36_864


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_blocks_are_refused(name):
    with pytest.raises(ArgumentError, match="parallel layout"):
        PSRPAdapter.wrap(build(name))


def test_other_refusals():
    with pytest.raises(UnknownFamilyError, match="BranchPoint"):
        PSRPAdapter.wrap(nn.Sequential(nn.Linear(3, 3)))
    model, inputs = model_and_inputs("llama")
    with pytest.raises(ArgumentError, match="no modules nowhere"):
        PSRPAdapter.wrap(model, points=[BranchPoint("nowhere", "nowhere", 3)])
    with pytest.raises(ArgumentError, match="rank=0"):
        PSRPAdapter.wrap(model, rank=0)
    adapter = PSRPAdapter.wrap(model)
    with pytest.raises(ModelStateError, match="adapted already"):
        PSRPAdapter.wrap(model)
    adapter.remove()
    adapter.remove()
    with pytest.raises(ModelStateError, match="removed"):
        adapter(**inputs)


def test_an_adapter_is_no_estimator():
    assert not hasattr(PSRPAdapter, "fit")
    assert not hasattr(PSRPAdapter, "get_params")


def test_training_changes_the_adapter_and_the_head_alone():
    model, inputs = model_and_inputs("vit")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pixels = inputs["pixel_values"].repeat(4, 1, 1, 1) + torch.randn(4 * len(inputs["pixel_values"]), 1, 1, 1)
    labels = torch.arange(len(pixels)) % 2
    adapter = PSRPAdapter.wrap(model, rank=4)
    head = MomentHead(adapter.points[0].width, 2, hidden=28, first="cls")
    losses = train_adapter(
        adapter, head, lambda out: (out.hidden_states[-1],),
        lambda: [({"pixel_values": pixels, "output_hidden_states": True}, labels)], epochs=25, lr=1e-2,
    )  # fmt: skip
    assert losses[-1] < losses[0] / 2
    assert any(bool(g.scale.weight.any()) for g in adapter.generators)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
