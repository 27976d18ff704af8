"""Weights that accelerate brings in for each call: capture and steering work; closed forms say what they need."""

import pytest
import torch

import interp
from interp.hooks.errors import MetaWeightsError
from tests.cases import build, inputs_for


@pytest.fixture(params=["llama", "gpt2"])
def offloaded(request):
    from accelerate import cpu_offload

    plain = interp.attach(build(request.param))
    module = build(request.param)
    cpu_offload(module, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in module.parameters())
    return plain, interp.attach(module), inputs_for(request.param)


def test_capture_and_logits_equal_the_model_in_memory(offloaded):
    plain, model, ids = offloaded
    sites = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern", "blocks.*.attn.hook_z"]
    wanted, found = plain.capture(ids, sites), model.capture(ids, sites)
    assert all(torch.equal(wanted[s], found[s]) for s in wanted)
    assert torch.equal(plain.run(ids), model.run(ids))
    assert all(p.is_meta for p in model.module.parameters()), "an early stop would leave weights behind"


def test_interventions_work(offloaded):
    plain, model, ids = offloaded
    plan = [interp.Zero("blocks.1.hook_mlp_out"), interp.Scale("blocks.0.attn.hook_z", head=1, factor=2.0)]
    assert torch.equal(plain.run(ids, plan=plan), model.run(ids, plan=plan))


def test_closed_forms_name_what_they_need(offloaded):
    _, model, ids = offloaded
    observable = interp.Observable("3 - 5", (3, 5), (1.0, -1.0))
    with pytest.raises(MetaWeightsError, match="offloaded"):
        interp.direct_attribution(model, observable, ids[:1])


def test_meta_weights_without_hooks_are_refused():
    with torch.device("meta"):
        module = torch.nn.Linear(2, 3)
    with pytest.raises(MetaWeightsError, match="weight is on the meta device"):
        interp.attach(module)
