"""Sites against sources that know nothing of interp: the models' own outputs, and a block written out by hand."""

import math

import pytest
import torch

import interp
from tests.cases import CASES, DECODERS, HEADS, KV_HEADS, WIDTH, build, build_hand, inputs_for

close = torch.testing.assert_close


@pytest.mark.parametrize("name", CASES)
def test_residual_stream_is_hidden_states(name):
    module = build(name)
    model = interp.attach(module)
    acts = model.capture(inputs_for(name), "blocks.*.hook_resid_*")
    with torch.no_grad():
        states = module(inputs_for(name), output_hidden_states=True).hidden_states
    for layer in range(model.n_layers):
        close(acts[f"blocks.{layer}.hook_resid_pre"], states[layer], rtol=0, atol=1e-6)
    close(acts["blocks.0.hook_resid_post"], states[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_pattern_is_output_attentions(name):
    module = build(name)
    model = interp.attach(module)
    acts = model.capture(inputs_for(name), "blocks.*.attn.hook_pattern")
    with torch.no_grad():
        patterns = module(inputs_for(name), output_attentions=True).attentions
    assert len(patterns) == model.n_layers
    for layer, pattern in enumerate(patterns):
        close(acts[f"blocks.{layer}.attn.hook_pattern"], pattern, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_last_resid_post_is_what_the_final_norm_takes(name):
    module = build(name)
    model = interp.attach(module)
    norm, seen = module.get_submodule(model.layout.final_norm), []
    handle = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    acts = model.capture(inputs_for(name), [f"blocks.{model.n_layers - 1}.hook_resid_post", "logits"])
    handle.remove()
    close(acts[f"blocks.{model.n_layers - 1}.hook_resid_post"], seen[0], rtol=0, atol=0)
    with torch.no_grad():
        close(acts["logits"], module(inputs_for(name)).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "bert"])
def test_pattern_under_sdpa_is_that_of_eager(name):
    """Attention sites switch to eager for the run: values agree with the eager model's."""
    site = "blocks.1.attn.hook_pattern"
    fused = interp.attach(build(name, attention="sdpa")).capture(inputs_for(name), site)[site]
    eager = interp.attach(build(name, attention="eager")).capture(inputs_for(name), site)[site]
    close(fused, eager, rtol=0, atol=1e-6)


def slow_llama_block(block, x, theta: float = 10000.0):
    """One Llama block in the order of its formulas, head by head and key by key, without a call to the module."""
    w = {n: p.detach() for n, p in block.named_parameters()}
    eps, d = 1e-6, WIDTH // HEADS

    def rms(value, gain):
        return value / (value.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain

    def project(value, name):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def rotate(head, position):
        out = head.clone()
        for i in range(d // 2):
            angle = position / theta ** (2 * i / d)
            a, b = head[i], head[i + d // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    batch, n = x.shape[:2]
    normed = rms(x, w["input_layernorm.weight"])
    q = project(normed, "self_attn.q_proj").reshape(batch, n, HEADS, d)
    k = project(normed, "self_attn.k_proj").reshape(batch, n, KV_HEADS, d)
    v = project(normed, "self_attn.v_proj").reshape(batch, n, KV_HEADS, d)
    rot_q, rot_k = torch.empty_like(q), torch.empty_like(k)
    scores = torch.full((batch, HEADS, n, n), -torch.inf, dtype=x.dtype)
    pattern, z = torch.zeros(batch, HEADS, n, n, dtype=x.dtype), torch.zeros_like(q)
    for b in range(batch):
        for p in range(n):
            for h in range(HEADS):
                rot_q[b, p, h] = rotate(q[b, p, h], p)
            for h in range(KV_HEADS):
                rot_k[b, p, h] = rotate(k[b, p, h], p)
        for h in range(HEADS):
            group = h // (HEADS // KV_HEADS)
            for p in range(n):
                for s in range(p + 1):
                    scores[b, h, p, s] = rot_q[b, p, h] @ rot_k[b, s, group] / math.sqrt(d)
                weights = scores[b, h, p, : p + 1].exp()
                pattern[b, h, p, : p + 1] = weights / weights.sum()
                z[b, p, h] = pattern[b, h, p] @ v[b, :, group]
    attn = project(z.flatten(-2), "self_attn.o_proj")
    mid = x + attn
    read = rms(mid, w["post_attention_layernorm.weight"])
    gate, up = project(read, "mlp.gate_proj"), project(read, "mlp.up_proj")
    post = gate / (1 + (-gate).exp()) * up
    mlp = project(post, "mlp.down_proj")
    return {
        "ln1.hook_out": normed, "attn.hook_q": q, "attn.hook_k": k, "attn.hook_v": v, "attn.hook_rot_q": rot_q,
        "attn.hook_rot_k": rot_k, "attn.hook_attn_scores": scores, "attn.hook_pattern": pattern, "attn.hook_z": z,
        "attn.hook_out": attn, "hook_attn_out": attn, "hook_resid_mid": mid, "ln2.hook_out": read,
        "mlp.hook_pre": gate, "mlp.hook_pre_linear": up, "mlp.hook_post": post, "mlp.hook_out": mlp,
        "hook_mlp_out": mlp, "hook_resid_post": mid + mlp,
        "ln1.hook_scale": (x.pow(2).mean(-1, keepdim=True) + eps).sqrt(),
        "ln1.hook_normalized": x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt(),
    }  # fmt: skip


@pytest.mark.parametrize("layer", [0, 2])
def test_a_llama_block_equals_its_slow_twin(layer):
    module = build("llama", dtype=torch.float64)
    model = interp.attach(module)
    acts = model.capture(inputs_for("llama"), f"blocks.{layer}.*")
    twin = slow_llama_block(module.model.layers[layer], acts[f"blocks.{layer}.hook_resid_pre"])
    assert {f"blocks.{layer}.{name}" for name in twin} >= {
        s for s in acts if "resid_pre" not in s and "ln2.hook_scale" not in s and "ln2.hook_norm" not in s
    }
    for name, wanted in twin.items():
        found = acts[f"blocks.{layer}.{name}"].double()  # transformers takes the softmax in float32
        hidden = wanted == -torch.inf
        assert (found[hidden] < -1e9).all()
        close(found[~hidden], wanted[~hidden], rtol=1e-6, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["gpt2", "bert", "neox-parallel", "gpt-neo"])
def test_scores_are_products_of_the_rotated_queries_and_keys(name):
    model = interp.attach(build(name, dtype=torch.float64))
    acts = model.capture(inputs_for(name), "blocks.1.attn.*")
    q, k = acts["blocks.1.attn.hook_rot_q"], acts["blocks.1.attn.hook_rot_k"]
    scale = 1.0 if name == "gpt-neo" else 1 / math.sqrt(WIDTH // HEADS)
    wanted = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = acts["blocks.1.attn.hook_attn_scores"]
    seen = acts["blocks.1.attn.hook_pattern"] > 0
    close(scores[seen].double(), wanted[seen].double(), rtol=1e-5, atol=1e-5)
    if name in ("gpt2", "bert", "gpt-neo"):
        close(q.double(), acts["blocks.1.attn.hook_q"], rtol=1e-6, atol=1e-6)
        close(k.double(), acts["blocks.1.attn.hook_k"], rtol=1e-6, atol=1e-6)


def test_interleaved_projection_equals_the_modules_own_cut():
    module = build("neox-parallel", dtype=torch.float64)
    acts = interp.attach(module).capture(inputs_for("neox-parallel"), "blocks.0.*")
    linear = module.gpt_neox.layers[0].attention.query_key_value
    rows = linear.weight.reshape(HEADS, 3, WIDTH // HEADS, WIDTH)
    bias = linear.bias.reshape(HEADS, 3, WIDTH // HEADS)
    for index, part in enumerate("qkv"):
        wanted = torch.einsum("bpi,hdi->bphd", acts["blocks.0.ln1.hook_out"], rows[:, index]) + bias[:, index]
        close(acts[f"blocks.0.attn.hook_{part}"], wanted.detach(), rtol=1e-9, atol=1e-9)


def test_gemma_embedding_is_scaled_and_its_gain_is_one_plus_the_weight():
    module = build("gemma3", dtype=torch.float64)
    model = interp.attach(module)
    acts = model.capture(inputs_for("gemma3"), ["hook_embed", "blocks.0.ln1.hook_normalized", "blocks.0.ln1.hook_out"])
    plain = module.model.embed_tokens.weight[inputs_for("gemma3")].detach()
    close(acts["hook_embed"], plain * math.sqrt(WIDTH), rtol=1e-5, atol=1e-5)
    gain = 1 + module.model.layers[0].input_layernorm.weight.detach()
    close(acts["blocks.0.ln1.hook_out"], acts["blocks.0.ln1.hook_normalized"] * gain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_hand_written_attention_with_an_explicit_layout(fused):
    from tests.cases import HAND_LAYOUT

    module = build_hand(fused)
    model = interp.attach(module, layout=interp.Layout(**HAND_LAYOUT))
    ids = inputs_for("hand")
    acts = model.capture(ids, "blocks.1.attn.*")
    twin = interp.attach(build_hand(not fused), layout=interp.Layout(**HAND_LAYOUT)).capture(ids, "blocks.1.attn.*")
    for site in acts:
        shown = twin[site].isfinite()
        close(acts[site][shown], twin[site][shown], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        close(model.run(ids), module(ids), rtol=0, atol=0)
