"""What holds for which model family: the identities of `interp.hooks.verify` on tiny random models.

Weights are drawn so that every part matters: gains differ from 1 and biases from 0, attention is far from uniform. A
formula that forgets one of them is off by more than rounding.
"""

from collections.abc import Iterable
from typing import Any

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Table

_SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_LLAMA = _SMALL | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_NEOX = _SMALL | {"rotary_pct": 0.5, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_NEO = {
    "vocab_size": 61, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 32,
    "attention_types": [[["global", "local", "global"], 1]], "window_size": 4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}
_VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 12,
    "patch_size": 4, "num_channels": 3, "num_labels": 5,
}  # fmt: skip

# family: (transformers class of the model, of the configuration, its options)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 4, "head_dim": 8}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", _LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"head_dim": 16}),
    "Phi": ("PhiForCausalLM", "PhiConfig", _LLAMA | {"partial_rotary_factor": 0.5}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "StarCoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _LLAMA | {"sliding_window": 4}),
    "Granite": (
        "GraniteForCausalLM", "GraniteConfig",
        _LLAMA | {"residual_multiplier": 0.22, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
                  "attention_multiplier": 0.3},
    ),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", _LLAMA),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA | {"attn_logit_softcapping": 2.0}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
    "Cohere": ("CohereForCausalLM", "CohereConfig", _LLAMA | {"logit_scale": 0.5, "use_qk_norm": True}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "GPT-Neo": ("GPTNeoForCausalLM", "GPTNeoConfig", _NEO),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NEOX | {"use_parallel_residual": True}),
    "GPT-NeoX, sequential": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NEOX | {"use_parallel_residual": False}),
    "BERT": ("BertForMaskedLM", "BertConfig", _SMALL),
    "ViT": ("ViTForImageClassification", "ViTConfig", _VIT),
}  # fmt: skip

# column: how the names of the identities in it begin
GROUPS = {
    "stream": ("resid_",),
    "norms": ("LayerNorm", "RMSNorm", "ln1 ", "ln2 ", "ln_final"),
    "pattern": ("pattern", "hook_q"),
    "heads": ("z ", "attn.hook_out", "attn_out"),
    "MLP": ("mlp.", "mlp_out"),
    "logits": ("unembed", "logits"),
}
_ELSE = "other"


def build(family: str, seed: int = 1) -> Any:
    """Return a tiny random model of a family, in evaluation mode.

    Raises:
        ArgumentError: If there is no such family.
    """
    if family not in FAMILIES:
        raise ArgumentError(f"family {family!r}", f"one of {', '.join(FAMILIES)}")
    import torch
    import transformers

    model_class, config_class, options = FAMILIES[family]
    config = getattr(transformers, config_class)(**options)
    config.architectures = [model_class]
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    return _perturb(getattr(transformers, model_class)(config), seed).eval()


def _perturb(module: Any, seed: int) -> Any:
    """Matrices of gain about 1; vectors (gains, biases) moved by 0.2. Tied weights are drawn once."""
    import torch

    generator, done = torch.Generator().manual_seed(seed), set()
    for name, parameter in module.named_parameters():
        if parameter.data_ptr() in done:
            continue
        done.add(parameter.data_ptr())
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data.add_(0.2 * noise)
        else:
            embedding = any(word in name for word in ("embed", "wte", "wpe", "position"))
            parameter.data.copy_(noise * (0.7 if embedding else 1.2 / parameter.shape[-1] ** 0.5))
    return module


def family_tables(families: Iterable[str] | None = None) -> tuple[Table, Table]:
    """Return (family x group of identities with the worst relative error, the identities of each group).

    A cell is "-" where the family has no such identity, and says FAILS where one does not hold.
    """
    from interp.hooks.attach import attach
    from interp.hooks.verify import identities

    rows, named = [], {group: set() for group in (*GROUPS, _ELSE)}
    for family in FAMILIES if families is None else families:
        model = attach(build(family), check=False)
        if model.layout is None:
            raise ArgumentError(f"family {family!r}", "a layout that is recognised")
        found: dict[str, list[Any]] = {group: [] for group in named}
        for row in identities(model):
            found[_group(row["identity"])].append(row)
            named[_group(row["identity"])].add(row["identity"])
        row = {"family": family, "layout": f"{model.layout.name}, {model.layout.kind}"}
        rows.append(row | {group: _cell(found[group]) for group in named})
    groups = [{"column": g, "identities": "; ".join(sorted(names))} for g, names in named.items() if names]
    for row in rows:
        for group in set(named) - {g["column"] for g in groups}:
            row.pop(group)
    title = "largest relative error of what each site should mean, on tiny random models in float32"
    return Table(rows, title), Table(groups, "what is checked")


def _group(identity: str) -> str:
    return next((group for group, starts in GROUPS.items() if identity.startswith(starts)), _ELSE)


def _cell(rows: list[Any]) -> str:
    if not rows:
        return "-"
    worst = max(row["error"] for row in rows)
    text = f"{worst:.0e}" if worst else "0"
    return text if all(row["holds"] for row in rows) else f"FAILS {text}"
