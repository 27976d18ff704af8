"""Layout: where a transformer keeps its parts; and the table of known layouts.

A layout is recognised by structure (which children a block has), never by the model's name. What each site
then means is checked by identities: see `verify`.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from interp.hooks.errors import ArgumentError, UnknownFamilyError


@dataclass(frozen=True)
class Layout:
    """Paths of a transformer's parts: absolute for the model's own, block-relative for a block's.

    Give one to `interp.attach(module, layout=...)` for an architecture that is not recognised. A field that is
    None says that the model has no such part; its sites are then refused.

    Attributes:
        name: What the layout is called in tables.
        modality: ``tokens`` (decoder), ``encoder`` (tokens, not causal), ``image``.
        embed: Token (or patch) embedding module.
        blocks: ModuleList of blocks.
        attn: Attention module of a block.
        o: Output projection of attention; its input is the heads' z, concatenated.
        q: Query projection (with ``k`` and ``v``), or None where ``qkv`` is fused.
        qkv: Fused projection, and ``fused`` how its output is cut: ``split`` q|k|v, ``interleaved`` per head.
        mlp: MLP module, or None where its parts lie in the block itself (BERT).
        mlp_pre: Projection whose output is the (gate) pre-activation; ``mlp_up`` the other factor of a gated MLP;
            ``gate_up`` both fused; ``mlp_down`` the projection back to the stream.
        experts: Experts of a mixture; the MLP then has no neurons of its own.
        ln1, ln2: Norms in front of attention and MLP (post-LN encoders: behind each sum).
        ln1_post, ln2_post: Norms on the branches' outputs (Gemma 2/3, OLMo 2).
        parallel: Attention and MLP both read the block's input.
        post_ln: The stream itself is normalised behind each sum (BERT).
        branch_scale: Factor on each branch before it is added (Granite).
        logit_scale: Factor on the unembedding's output.
        logit_softcap: Final soft-cap c: logits = c tanh(z/c).
    """

    name: str
    embed: str
    blocks: str
    attn: str
    o: str
    n_heads: int = 0
    n_kv_heads: int = 0
    modality: Literal["tokens", "encoder", "image"] = "tokens"
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    fused: Literal["split", "interleaved"] | None = None
    mlp: str | None = None
    mlp_pre: str | None = None
    mlp_up: str | None = None
    gate_up: str | None = None
    mlp_down: str | None = None
    experts: str | None = None
    ln1: str | None = None
    ln2: str | None = None
    ln1_post: str | None = None
    ln2_post: str | None = None
    final_norm: str | None = None
    unembed: str | None = None
    pos_embed: str | None = None
    type_embed: str | None = None
    embed_norm: str | None = None
    parallel: bool = False
    post_ln: bool = False
    branch_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def block(self, layer: int, part: str = "") -> str:
        """Path of a block, or of one of its parts."""
        return f"{self.blocks}.{layer}" + (f".{part}" if part else "")

    @property
    def kind(self) -> str:
        """Which list of identities holds: sequential, parallel, post-norm branches or post-LN."""
        if self.post_ln:
            return "post-LN"
        if self.parallel:
            return "parallel"
        return "post-norm branches" if self.ln1_post else "sequential"


_QKV: dict[str, Any] = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


def _within(attn: str, parts: dict[str, str]) -> dict[str, Any]:
    return {key: f"{attn}.{value}" for key, value in parts.items()}


_LLAMA = Layout(
    "llama", embed="embed_tokens", blocks="layers", attn="self_attn", o="self_attn.o_proj", final_norm="norm",
    **_within("self_attn", _QKV), mlp="mlp", mlp_pre="mlp.gate_proj", mlp_up="mlp.up_proj",
    mlp_down="mlp.down_proj", ln1="input_layernorm", ln2="post_attention_layernorm",
)  # fmt: skip
_MOE: dict[str, Any] = {"mlp_pre": None, "mlp_up": None, "mlp_down": None, "experts": "mlp.experts"}
_GPT2 = Layout(
    "gpt2", embed="wte", pos_embed="wpe", blocks="h", attn="attn", o="attn.c_proj", qkv="attn.c_attn", fused="split",
    final_norm="ln_f", mlp="mlp", mlp_pre="mlp.c_fc", mlp_down="mlp.c_proj", ln1="ln_1", ln2="ln_2",
)  # fmt: skip
_NEOX = Layout(
    "gpt-neox", embed="embed_in", blocks="layers", attn="attention", o="attention.dense", fused="interleaved",
    qkv="attention.query_key_value", final_norm="final_layer_norm", mlp="mlp", mlp_pre="mlp.dense_h_to_4h",
    mlp_down="mlp.dense_4h_to_h", ln1="input_layernorm", ln2="post_attention_layernorm",
)  # fmt: skip

TABLE: tuple[Layout, ...] = (
    replace(
        _LLAMA, name="gemma", ln1_post="post_attention_layernorm", ln2="pre_feedforward_layernorm",
        ln2_post="post_feedforward_layernorm",
    ),
    replace(
        _LLAMA, name="olmo2", ln1=None, ln2=None, ln1_post="post_attention_layernorm",
        ln2_post="post_feedforward_layernorm",
    ),
    _LLAMA,
    replace(
        _LLAMA, name="phi3", q=None, k=None, v=None, qkv="self_attn.qkv_proj", fused="split", mlp_pre=None,
        mlp_up=None, gate_up="mlp.gate_up_proj",
    ),
    replace(_LLAMA, name="llama, mixture of experts", **_MOE),
    replace(_LLAMA, name="starcoder2", mlp_pre="mlp.c_fc", mlp_up=None, mlp_down="mlp.c_proj"),
    replace(
        _LLAMA, name="phi", o="self_attn.dense", mlp_pre="mlp.fc1", mlp_up=None, mlp_down="mlp.fc2", ln2=None,
        final_norm="final_layernorm", parallel=True,
    ),
    replace(_LLAMA, name="cohere", ln2=None, parallel=True),
    _GPT2,
    replace(
        _GPT2, name="gpt-neo", o="attn.attention.out_proj", attn="attn.attention", qkv=None, fused=None,
        **_within("attn.attention", _QKV),
    ),
    replace(
        _GPT2, name="gpt-j", pos_embed=None, o="attn.out_proj", qkv=None, fused=None, **_within("attn", _QKV),
        mlp_pre="mlp.fc_in", mlp_down="mlp.fc_out", ln2=None, parallel=True,
    ),
    _NEOX,
    Layout(
        "bert", modality="encoder", embed="embeddings.word_embeddings", pos_embed="embeddings.position_embeddings",
        type_embed="embeddings.token_type_embeddings", embed_norm="embeddings.LayerNorm", blocks="encoder.layer",
        attn="attention.self", o="attention.output.dense", q="attention.self.query", k="attention.self.key",
        v="attention.self.value", mlp_pre="intermediate.dense", mlp_down="output.dense",
        ln1="attention.output.LayerNorm", ln2="output.LayerNorm", post_ln=True,
    ),
    Layout(
        "vit", modality="image", embed="embeddings.patch_embeddings", blocks="layers", attn="attention",
        o="attention.o_proj", **_within("attention", _QKV), mlp="mlp", mlp_pre="mlp.fc1", mlp_down="mlp.fc2",
        ln1="layernorm_before", ln2="layernorm_after", final_norm="layernorm",
    ),
)  # fmt: skip

_BLOCK_PARTS = (
    "attn", "o", "q", "k", "v", "qkv", "mlp", "mlp_pre", "mlp_up", "gate_up", "mlp_down", "experts",
    "ln1", "ln2", "ln1_post", "ln2_post",
)  # fmt: skip
_MODEL_PARTS = ("embed", "pos_embed", "type_embed", "embed_norm", "final_norm")
_ROOT_DEPTH = 3


def child(module: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at a dotted path, or None."""
    for part in path.split(".") if path else []:
        module = getattr(module, part, None)  # type: ignore[assignment]
        if not isinstance(module, nn.Module):
            return None
    return module


def recognise(module: nn.Module) -> Layout | None:
    """Return the layout of a model, with absolute paths and head counts, or None if no row of the table fits.

    A row fits where a root at most three levels down has all of the row's model parts, and every block has all of
    its block parts and no norm that the row does not account for.
    """
    for root, candidate in _roots(module):
        for row in TABLE:
            if _fits(candidate, row):
                return _resolve(module, root, row)
    return None


def _roots(module: nn.Module):
    for name, sub in module.named_modules():
        if name.count(".") < _ROOT_DEPTH and not isinstance(sub, nn.ModuleList):
            yield name, sub


def _fits(root: nn.Module, row: Layout) -> bool:
    blocks = child(root, row.blocks)
    if not _is_block_list(blocks):
        return False
    if any(child(root, path) is None for part in _MODEL_PARTS if (path := getattr(row, part)) is not None):
        return False
    return all(_block_fits(block, row) for block in blocks)  # type: ignore[union-attr]


def _is_block_list(blocks: nn.Module | None) -> bool:
    return blocks is not None and hasattr(blocks, "__len__") and hasattr(blocks, "__getitem__") and len(blocks) > 0  # type: ignore[arg-type]


def _block_fits(block: nn.Module, row: Layout) -> bool:
    paths = {getattr(row, part) for part in _BLOCK_PARTS} - {None}
    if any(child(block, path) is None for path in paths):
        return False
    norms = {n for n, _ in block.named_children() if "norm" in n.lower() or n.startswith("ln_")}
    known = {getattr(row, part) for part in ("ln1", "ln2", "ln1_post", "ln2_post")}
    return norms <= known


def _resolve(module: nn.Module, root: str, row: Layout) -> Layout:
    prefix = f"{root}." if root else ""
    paths = {part: prefix + path for part in (*_MODEL_PARTS, "blocks") if (path := getattr(row, part)) is not None}
    layout = replace(row, **paths, unembed=_unembedding(module))
    config = _text_config(module)
    if config is None:
        return layout
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    kv_heads = _first(config, "num_key_value_heads") or heads
    if row.name == "gpt-neox":
        layout = replace(layout, parallel=bool(config.use_parallel_residual))
    return replace(
        layout,
        n_heads=heads,
        n_kv_heads=kv_heads,
        branch_scale=float(_first(config, "residual_multiplier") or 1.0),
        logit_scale=float(_first(config, "logit_scale") or 1.0 / (_first(config, "logits_scaling") or 1.0)),
        logit_softcap=_first(config, "final_logit_softcapping"),
    )


def _text_config(module: nn.Module) -> Any:
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first(config, *names: str):
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def _unembedding(module: nn.Module) -> str | None:
    get = getattr(module, "get_output_embeddings", None)
    head = get() if callable(get) else None
    names = [name for name, sub in module.named_modules() if sub is head] if head is not None else []
    return names[0] if names else None


def check_explicit(module: nn.Module, layout: Layout) -> Layout:
    """Return a user's layout after checking that each of its paths exists.

    Raises:
        ArgumentError: If a path is missing, or the head count is not given.
    """
    needed = ("embed", "blocks", "attn", "o", *(("ln1", "ln2") if layout.post_ln else ()))
    for part in needed:
        if not getattr(layout, part):
            raise ArgumentError(f"layout.{part}={getattr(layout, part)!r}", "the path of a submodule")
    for part in (*_MODEL_PARTS, "blocks", "unembed"):
        path = getattr(layout, part)
        if path is not None and child(module, path) is None:
            raise ArgumentError(f"layout.{part}={path!r}", "the path of a submodule", _near(module, path))
    blocks = child(module, layout.blocks)
    if not _is_block_list(blocks):
        raise ArgumentError(f"layout.blocks={layout.blocks!r}", "a ModuleList with at least one block")
    for part in _BLOCK_PARTS:
        path = getattr(layout, part)
        for index, block in enumerate(blocks):  # type: ignore[arg-type]
            if path is not None and child(block, path) is None:
                raise ArgumentError(
                    f"layout.{part}={path!r} in block {index}",
                    "a path inside every block",
                    _near(block, path),
                )
    if layout.n_heads < 1:
        raise ArgumentError(f"layout.n_heads={layout.n_heads}", "the number of query heads")
    return layout if layout.n_kv_heads else replace(layout, n_kv_heads=layout.n_heads)


def _near(module: nn.Module, path: str) -> str:
    import difflib

    near = difflib.get_close_matches(path, [n for n, _ in module.named_modules() if n], n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else ""


def unknown_family(module: nn.Module) -> UnknownFamilyError:
    """The error for a language model that no row fits."""
    children = ", ".join(n for n, _ in module.named_children())
    return UnknownFamilyError(
        f"{type(module).__name__} (children: {children}) matches no known transformer layout",
        "the paths of its parts",
        "pass layout=interp.Layout(name=..., embed=..., blocks=..., attn=..., o=..., n_heads=..., ...), "
        "or layout='modules' for module paths only",
    )
