"""What each site means, for every family; and layouts that are wrong on purpose must be refused."""

from dataclasses import replace

import pytest
import torch

import interp
from interp.hooks import verify
from interp.hooks.errors import LayoutError
from interp.hooks.layouts import recognise
from tests.cases import BASE_CLASS, CASES, build, inputs_for

KIND = {
    **dict.fromkeys(("neox-parallel", "gpt-j", "phi", "cohere"), "parallel"),
    **dict.fromkeys(("gemma2", "gemma3", "olmo2"), "post-norm branches"), "bert": "post-LN",
}  # fmt: skip


def failures(table) -> list:
    return [row for row in table if not row["holds"]]


EAGER_ONLY = ("gpt-neo", "gemma2")  # transformers refuses sdpa for these


@pytest.mark.parametrize(("name", "attention"), [
    (name, attention) for name in CASES for attention in ("eager", "sdpa")
    if attention == "eager" or name not in EAGER_ONLY
])  # fmt: skip
def test_every_identity_holds(name, attention):
    model = interp.attach(build(name, attention=attention))
    table = verify.identities(model, inputs=inputs_for(name))
    assert failures(table) == []
    assert len(table) >= 8
    assert model.layout.kind == KIND.get(name, "sequential")


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_identities_hold_in_bfloat16(name):
    model = interp.attach(build(name, dtype=torch.bfloat16))
    assert failures(verify.identities(model, inputs=inputs_for(name))) == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_identities_hold_in_float64(name):
    model = interp.attach(build(name, dtype=torch.float64))
    assert failures(verify.identities(model, inputs=inputs_for(name))) == []


@pytest.mark.parametrize("name", BASE_CLASS)
def test_base_models_without_a_head(name):
    model = interp.attach(build(name, base=True))
    assert failures(verify.identities(model, inputs=inputs_for(name))) == []
    assert not [row for row in model.sites() if row["site"] in ("logits", "unembed.hook_out")]


def _swap_norms(layout):
    return replace(layout, ln1=layout.ln2, ln2=layout.ln1)


MUTATIONS = [
    ("llama", "norms swapped", _swap_norms),
    ("gpt2", "norms swapped", _swap_norms),
    ("bert", "norms swapped", _swap_norms),
    ("llama", "key/value heads wrong", lambda x: replace(x, n_kv_heads=4)),
    ("llama", "one key/value head", lambda x: replace(x, n_kv_heads=1)),
    ("llama", "query heads wrong", lambda x: replace(x, n_heads=8, n_kv_heads=4)),
    ("phi3", "key/value heads wrong", lambda x: replace(x, n_kv_heads=4)),
    ("granite", "branch scale forgotten", lambda x: replace(x, branch_scale=1.0)),
    ("granite", "logit scale forgotten", lambda x: replace(x, logit_scale=1.0)),
    ("gemma2", "soft-cap forgotten", lambda x: replace(x, logit_softcap=None)),
    ("gemma3", "post-norm taken for the MLP's norm",
     lambda x: replace(x, ln1_post=None, ln2="post_attention_layernorm", ln2_post=None)),
    ("gemma2", "post-norms forgotten", lambda x: replace(x, ln1_post=None, ln2_post=None)),
    ("olmo2", "post-norms taken for pre-norms",
     lambda x: replace(x, ln1=x.ln1_post, ln2=x.ln2_post, ln1_post=None, ln2_post=None)),
    ("gpt2", "fused order wrong", lambda x: replace(x, fused="interleaved")),
    ("neox-parallel", "fused order wrong", lambda x: replace(x, fused="split")),
    ("neox-parallel", "parallel taken for sequential", lambda x: replace(x, parallel=False)),
    ("neox-sequential", "sequential taken for parallel", lambda x: replace(x, parallel=True)),
    ("llama", "sequential taken for parallel", lambda x: replace(x, parallel=True)),
    ("cohere", "parallel taken for sequential", lambda x: replace(x, parallel=False)),
    ("llama", "values and keys swapped", lambda x: replace(x, k=x.v, v=x.k)),
    ("bert", "queries and keys swapped", lambda x: replace(x, q=x.k, k=x.q)),
    ("llama", "gate and up swapped", lambda x: replace(x, mlp_pre=x.mlp_up, mlp_up=x.mlp_pre)),
    ("llama", "a block's norm taken for the final one",
     lambda x: replace(x, final_norm="model.layers.2.input_layernorm")),
    ("bert", "taken for a causal pre-norm model", lambda x: replace(x, post_ln=False, modality="tokens")),
    ("gpt2", "positions forgotten", lambda x: replace(x, pos_embed=None, modality="encoder")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "mutate"), MUTATIONS, ids=[f"{n}: {w}" for n, w, _ in MUTATIONS])
def test_a_wrong_layout_is_refused(name, what, mutate):
    module = build(name)
    right = recognise(module)
    interp.attach(module, layout=right)
    with pytest.raises(LayoutError):
        interp.attach(module, layout=mutate(right))
