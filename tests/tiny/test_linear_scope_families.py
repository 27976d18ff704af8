"""LinearScope on every language-model family, and against an independent frozen network."""

import pytest
import torch
import torch.nn.functional as F

import interp
from tests.cases import CASES, build, inputs_for

PRESETS = ("frozen", "exact", "path")
FUSED = ("llama", "gpt2", "neox-parallel", "mixtral", "vit")


def scope_of(name, linearization, **options):
    module = build(name, **options)
    return interp.LinearScope(interp.attach(module), inputs_for(name)[:1], linearization)


@pytest.mark.parametrize("linearization", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_every_family_is_affine_and_complete(name, linearization):
    scope = scope_of(name, linearization)
    rows = scope.check(probes=1)
    for row in rows:
        assert row["holds"], row
    by_one_batch = any(row["check"].startswith("one batch") for row in rows)
    assert by_one_batch == (name != "mixtral"), "experts mix the tokens of a batch"


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_gives_the_same_map(name):
    for linearization in PRESETS:
        eager, fused = scope_of(name, linearization), scope_of(name, linearization, attention="sdpa")
        w = torch.zeros_like(eager.y[0])
        w[-1] = torch.linspace(-1, 1, w.shape[-1]) if w.ndim == 2 else 1.0
        scale = eager.rmatvec(w).abs().max()
        assert (eager.rmatvec(w) - fused.rmatvec(w)).abs().max() <= 2e-5 * scale


@pytest.mark.parametrize("name", ["mistral", "qwen3", "phi3", "olmo2", "gemma2", "gemma3", "granite"])
def test_models_without_biases_have_no_residual(name):
    assert scope_of(name, "frozen").r.abs().max() == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-j"])
def test_votes_are_causal(name):
    module = build(name)
    scope = interp.LinearScope(interp.attach(module), inputs_for(name)[:1])
    votes = scope.votes(7, margin_to=9, position=3)
    assert torch.equal(votes.map[4:], torch.zeros_like(votes.map[4:])), "exactly zero behind the position"
    assert votes.map[:4].abs().min() > 0


def test_learned_positions_and_token_types_are_blocks_of_their_own():
    votes = scope_of("gpt2", "frozen").votes(7)
    assert list(votes.blocks) == ["hook_embed", "hook_pos_embed"]
    assert abs(sum(float(b.sum()) for b in votes.blocks.values()) + votes.residual - votes.value) < 1e-4
    bert = scope_of("bert", "frozen")
    assert list(bert.blocks) == ["hook_embed", "hook_pos_embed", "hook_type_embed"]


def frozen_twin(model, ids, embeddings):
    """Logits of a Llama from embeddings, every decision taken from a capture: written out, no tape."""
    names = ["attn.hook_pattern", "ln1.hook_scale", "ln2.hook_scale", "mlp.hook_pre"]
    acts = model.capture(ids, [f"blocks.*.{n}" for n in names] + ["ln_final.hook_scale"])
    x, layers = embeddings, model.module.model.layers
    heads, kv = model.layout.n_heads, model.layout.n_kv_heads
    for i, layer in enumerate(layers):
        held = {n: acts[f"blocks.{i}.{n}"].double() for n in names}
        normed = x / held["ln1.hook_scale"] * layer.input_layernorm.weight
        v = layer.self_attn.v_proj(normed).unflatten(-1, (kv, -1)).repeat_interleave(heads // kv, dim=2)
        z = torch.einsum("bhqk,bkhd->bqhd", held["attn.hook_pattern"], v)
        x = x + layer.self_attn.o_proj(z.flatten(-2))
        normed = x / held["ln2.hook_scale"] * layer.post_attention_layernorm.weight
        x = x + layer.mlp.down_proj(F.silu(held["mlp.hook_pre"]) * layer.mlp.up_proj(normed))
    return model.module.lm_head(x / acts["ln_final.hook_scale"].double() * model.module.model.norm.weight)


def test_frozen_map_equals_a_hand_written_frozen_network():
    module, ids = build("llama", dtype=torch.float64), inputs_for("llama")[:1]
    model = interp.attach(module)
    scope = interp.LinearScope(model, ids, "frozen")
    embeddings = scope.x.clone().requires_grad_()
    twin = frozen_twin(model, ids, embeddings)
    # Hugging Face computes norms and softmax in float32 even here: agreement to that, not to float64.
    torch.testing.assert_close(scope.y, twin, rtol=1e-5, atol=1e-5)
    row = torch.autograd.grad(twin[0, -1, 5], embeddings)[0][0]
    torch.testing.assert_close(scope.rows([(6, 5)])[0], row, rtol=1e-5, atol=1e-6)
    zero = frozen_twin(model, ids, torch.zeros_like(embeddings))
    torch.testing.assert_close(scope.r, zero, rtol=1e-5, atol=1e-5)


def test_exact_map_is_the_gradient():
    module, ids = build("gemma3"), inputs_for("gemma3")[:1]
    scope = interp.LinearScope(interp.attach(module), ids, "exact")
    embeddings = scope.x.clone().requires_grad_()
    # Gemma scales inside its embedding module; inputs_embeds enter behind it.
    logits = module(inputs_embeds=embeddings).logits
    wanted = torch.autograd.grad(logits[0, -1, 3], embeddings)[0][0]
    got = scope.rows([(6, 3)])[0]
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_target_strings_and_labels(tokenizer):
    model = interp.attach(build("llama"), tokenizer)
    scope = interp.LinearScope(model, "the cat sat on the mat")
    votes = scope.votes("dog", margin_to="mouse")
    assert votes.target == "'dog' - 'mouse'"
    assert votes.labels == ["the", "cat", "sat", "on", "the", "mat"]
    assert votes.top(1)[0]["token"] in votes.labels
    with pytest.raises(interp.InterpError, match="encodes to 2 ids"):
        scope.votes("the cat")
