"""Tiny seeded models of every family, with weights far from their initial symmetry; a tiny tokenizer.

Every norm gain differs from 1, every bias from 0, attention is far from uniform: a formula that forgets one is seen.
"""

import copy
import functools

import torch
from torch import nn

VOCAB = 61
WIDTH, HEADS, KV_HEADS, LAYERS = 32, 4, 2, 3
WORDS = (
    "the a cat dog mouse bird sat ran saw on in under mat house tree river red blue small old and then Mary John store "
    "gave drink to book went when"
).split()
IDS = [[3, 17, 42, 8, 25, 9, 33], [5, 11, 50, 29, 7, 14, 60]]
MIXED = [[3, 17, 42, 8, 25, 9, 33], [5, 11, 50], [44, 2, 19, 23, 31]]


def perturb(module: nn.Module, seed: int = 1) -> nn.Module:
    """Draw weights that make every part matter: matrices of gain about 1, vectors moved by 0.2."""
    generator = torch.Generator().manual_seed(seed)
    done = set()
    for name, parameter in module.named_parameters():
        if parameter.data_ptr() in done:
            continue
        done.add(parameter.data_ptr())
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim >= 2:
            embedding = any(word in name for word in ("embed", "wte", "wpe", "position"))
            parameter.data.copy_(noise * (0.7 if embedding else 1.2 / parameter.shape[-1] ** 0.5))
        else:
            parameter.data.add_(0.2 * noise)
    return module


def _llama(**more):
    return dict(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ) | more  # fmt: skip


def _gpt2(**more):
    return dict(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=32, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    ) | more  # fmt: skip


def _neox(**more):
    options = _llama(rotary_pct=0.5, **more)
    options.pop("num_key_value_heads")
    return options


_BERT = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip
_GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4)

# name: (model class, config class, options of the config)
CASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _llama(attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralForCausalLM", "MistralConfig", _llama(sliding_window=4, head_dim=8)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _llama()),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _llama(head_dim=16)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _gpt2()),
    "gpt-neo": (
        "GPTNeoForCausalLM", "GPTNeoConfig",
        dict(vocab_size=VOCAB, hidden_size=WIDTH, num_layers=LAYERS, num_heads=HEADS, max_position_embeddings=32,
             attention_types=[[["global", "local", "global"], 1]], window_size=4, bos_token_id=1, eos_token_id=2),
    ),
    "neox-parallel": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _neox(use_parallel_residual=True)),
    "neox-sequential": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _neox(use_parallel_residual=False)),
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", _gpt2(rotary_dim=4)),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        _llama(**_GEMMA, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    ),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", _llama(**_GEMMA, final_logit_softcapping=3.0),
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _llama()),
    "phi": ("PhiForCausalLM", "PhiConfig", _llama(partial_rotary_factor=0.5)),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _llama(use_bias=True)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _llama()),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _llama(num_local_experts=3, num_experts_per_tok=2)),
    "cohere": ("CohereForCausalLM", "CohereConfig", _llama(logit_scale=0.5, use_qk_norm=True)),
    "granite": (
        "GraniteForCausalLM", "GraniteConfig",
        _llama(residual_multiplier=0.22, embedding_multiplier=3.0, logits_scaling=2.0, attention_multiplier=0.3),
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "vit": (
        "ViTForImageClassification", "ViTConfig",
        dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
             image_size=12, patch_size=4, num_channels=3, num_labels=5),
    ),
}  # fmt: skip
DECODERS = [name for name in CASES if name not in ("bert", "vit")]
BASE_CLASS = {
    "llama": "LlamaModel", "gpt2": "GPT2Model", "neox-parallel": "GPTNeoXModel", "gpt-j": "GPTJModel",
    "gemma2": "Gemma2Model", "gemma3": "Gemma3TextModel", "olmo2": "Olmo2Model", "cohere": "CohereModel",
    "bert": "BertModel", "vit": "ViTModel",
}  # fmt: skip


@functools.cache
def _built(name: str, base: bool, attention: str) -> nn.Module:
    import transformers

    model_class, config_class, options = CASES[name]
    config = getattr(transformers, config_class)(**options)
    cls = getattr(transformers, BASE_CLASS[name] if base else model_class)
    config.architectures = [cls.__name__]
    config._attn_implementation = attention
    torch.manual_seed(0)
    return perturb(cls(config)).eval()


def build(name: str, *, base: bool = False, attention: str = "eager", dtype: torch.dtype | None = None) -> nn.Module:
    """Return a fresh tiny model of a family, in evaluation mode."""
    module = copy.deepcopy(_built(name, base, attention))
    return module if dtype is None else module.to(dtype)


def inputs_for(name: str):
    """Two examples that every family takes: token ids, or images."""
    if name == "vit":
        return torch.linspace(0, 30, 2 * 3 * 12 * 12).sin().reshape(2, 3, 12, 12)
    return torch.tensor(IDS)


def save_tokenizer(folder):
    """Return a word tokenizer that was saved to a folder and read back; pad 0, bos 1, eos 2, unknown 3."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    vocab |= {f"w{i}": i for i in range(len(vocab), VOCAB)}
    inner = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="right",
    ).save_pretrained(folder)  # fmt: skip
    return AutoTokenizer.from_pretrained(folder)


class Bottleneck(nn.Module):
    """A small vision network with batch norm, in-place ReLU, a skip and a pooled head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.skip = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        hidden = self.act(self.norm(self.conv(x)))
        hidden = self.act(self.skip(hidden)) + hidden
        return self.head(hidden.mean((2, 3)))


def build_cnn() -> nn.Module:
    """Return the vision network with running statistics that are not the identity."""
    torch.manual_seed(0)
    module = perturb(Bottleneck())
    with torch.no_grad():
        module.train()(torch.randn(8, 3, 6, 6))
    return module.eval()


class HandAttention(nn.Module):
    """Causal attention by F.scaled_dot_product_attention (fused) or by its formula."""

    def __init__(self, width: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        if self.fused:
            z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            z = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return self.wo(z.transpose(1, 2).flatten(-2))


class HandBlock(nn.Module):
    """A pre-norm block as people write it, with names of its own."""

    def __init__(self, width: int, heads: int, fused: bool):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = HandAttention(width, heads, fused)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.down(torch.relu(self.up(self.n2(x))))


class HandLM(nn.Module):
    """A language model that no table knows, with the main_input_name by which it is recognised as one."""

    main_input_name = "input_ids"

    def __init__(self, fused: bool = True, layers: int = 2):
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.stack = nn.ModuleList(HandBlock(WIDTH, HEADS, fused) for _ in range(layers))
        self.last = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids):
        x = self.words(input_ids)
        for block in self.stack:
            x = block(x)
        return self.out(self.last(x))


HAND_LAYOUT = dict(
    name="hand", embed="words", blocks="stack", attn="mix", o="mix.wo", q="mix.wq", k="mix.wk", v="mix.wv",
    n_heads=HEADS, mlp_pre="up", mlp_down="down", ln1="n1", ln2="n2", final_norm="last", unembed="out",
)  # fmt: skip


def build_hand(fused: bool = True) -> nn.Module:
    """Return the hand-written language model."""
    torch.manual_seed(0)
    return perturb(HandLM(fused)).eval()
