"""What each site means, as identities between captured tensors; one list for each layout.

The list is checked in tests for every family, and once for each attached configuration on a few tokens.
"""

import hashlib
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interp.hooks import guards
from interp.hooks.activations import Activations
from interp.hooks.errors import LayoutError
from interp.hooks.interventions import Function
from interp.hooks.layouts import child
from interp.hooks.table import Table
from interp.hooks.weights import linear_bias, linear_weight, plain

if TYPE_CHECKING:
    from interp.hooks.model import Model

_TOKENS = 6
_IMAGE = 32
_VERIFIED: set[str] = set()
_VERIFIED_MODULES: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-5}

Claim = tuple[str, Tensor, Tensor]


def once(model: "Model") -> None:
    """Verify the first, a middle and the last block, once for each configuration; offloaded models are not run.

    Raises:
        LayoutError: Naming the identity that does not hold.
    """
    if model._offloaded or guards.live_in_training(model.module):
        return
    # Without a configuration nothing says that two modules compute the same: then each is verified for itself.
    done = _VERIFIED if model.config is not None else _VERIFIED_MODULES.setdefault(model.module, set())
    key = _key(model)
    if key in done:
        return
    last = model.n_layers - 1
    for row in identities(model, sorted({0, last // 2, last})):
        if not row["holds"]:
            raise LayoutError(
                f"layout {model.family!r}: {row['identity']} is off by {row['error']:.1e} (relative){row['shapes']}",
                f"at most {row['tolerance']:.0e}",
                "give explicit paths with layout=interp.Layout(...), or layout='modules' for module paths only",
            )  # fmt: skip
    done.add(key)


def _key(model: "Model") -> str:
    config = model.config
    text = config.to_json_string() if hasattr(config, "to_json_string") else repr(config)
    # A bridge in compatibility mode runs other code in the same modules, on other weights.
    kinds = " ".join(
        f"{name}:{type(m).__module__}.{type(m).__qualname__}{':patched' * ('forward' in m.__dict__)}"
        f"{':processed' * bool(m.__dict__.get('_use_processed_weights'))}"
        for name, m in model.module.named_modules()
    )
    return hashlib.sha256(f"{kinds} {model.layout} {model.dtype} {text}".encode()).hexdigest()


@torch.no_grad()
def identities(model: "Model", layers: list[int] | None = None, inputs=None) -> Table:
    """Return the table of identities: name, largest relative error, tolerance, whether it holds.

    Args:
        model: A model with a layout.
        layers: Blocks to check; all by default.
        inputs: Inputs of the run; a few tokens (or one image) by default.
    """
    layers = list(range(model.n_layers)) if layers is None else layers
    names = [f"blocks.{n}." for n in sorted({*layers, *(x + 1 for x in layers if x + 1 < model.n_layers)})]
    sites = [a for a in model.bindings.by_address if not a.startswith("blocks.") or a.startswith(tuple(names))]  # type: ignore[union-attr]
    inputs = _inputs(model) if inputs is None else inputs
    acts = model.capture(inputs, sites)
    tolerance = _TOLERANCE.get(model.dtype, 4e-2)
    found: dict[str, float] = {}
    shapes: dict[str, str] = {}
    for name, left, right in chain(claims(model, acts, layers), _queries(model, acts, layers[0], inputs)):
        scale = right.abs().max().clamp(min=1e-6) if torch.isfinite(right).all() else torch.tensor(1.0)
        if left.shape != right.shape:
            shapes[name], found[name] = f": {list(left.shape)} against {list(right.shape)}", float("inf")
            continue
        error = float((left.double() - right.double()).abs().max() / scale.double())
        found[name] = max(found.get(name, 0.0), error if error == error else float("inf"))
    return Table(
        [
            {"identity": n, "error": e, "tolerance": tolerance, "holds": e <= tolerance, "shapes": shapes.get(n, "")}
            for n, e in found.items()
        ]
    )


def _inputs(model: "Model"):
    if model.layout.modality == "image":  # type: ignore[union-attr]
        size = getattr(model.config, "image_size", _IMAGE)
        size = size if isinstance(size, (tuple, list)) else (size, size)
        channels = getattr(model.config, "num_channels", 3)
        pixels = torch.linspace(0, 40, channels * size[0] * size[1]).sin().reshape(1, channels, *size)
        return pixels.to(model.device, model.dtype)
    vocab = model.reader.vocab or 2
    return (torch.arange(1, _TOKENS + 1) * max(vocab // (_TOKENS + 2), 1)) % vocab


def claims(model: "Model", acts: Activations, layers: list[int]) -> Iterator[Claim]:
    """Yield (name, left, right) for every identity of the model's layout."""
    layout = model.layout
    assert layout is not None
    yield from _entry(model, acts)
    for layer in layers:
        block = f"blocks.{layer}"
        get = lambda name, block=block: acts[f"{block}.{name}"]
        yield from _stream(model, get)
        if layer + 1 < model.n_layers:
            yield (
                "resid_pre[l+1] = resid_post[l]",
                acts[f"blocks.{layer + 1}.hook_resid_pre"],
                get("hook_resid_post"),
            )
        yield from _attention(model, acts, layer)
        yield from _norms(model, acts, block)
        yield from _mlp(model, acts, layer)
    yield from _exit(model, acts)


def _entry(model, acts) -> Iterator[Claim]:
    layout, first = model.layout, "blocks.0.hook_resid_pre"
    if first not in acts or layout.modality == "image":
        return
    total = acts["hook_embed"]
    for extra in ("hook_pos_embed", "hook_type_embed"):
        if extra in acts:
            total = total + acts[extra]
    name = "resid_pre[0] = sum of embeddings"
    if layout.embed_norm:
        norm = model.bindings.norms["embed.ln"]
        yield f"{name}, normalised", norm(total), acts[first].float()
    else:
        yield name, total, acts[first]


def _stream(model, get) -> Iterator[Claim]:
    layout = model.layout
    pre, post = get("hook_resid_pre"), get("hook_resid_post")
    if layout.parallel:
        yield (
            "resid_post = resid_pre + attn_out + mlp_out",
            pre + get("hook_attn_out") + get("hook_mlp_out"),
            post,
        )
        return
    mid = get("hook_resid_mid")
    if layout.post_ln:
        summed = pre + get("hook_attn_out")
        yield (
            "ln1 reads resid_pre + attn_out",
            get("ln1.hook_normalized") * get("ln1.hook_scale"),
            summed - summed.mean(-1, keepdim=True),
        )
        yield "resid_mid = ln1.hook_out", get("ln1.hook_out"), mid
        summed = mid + get("hook_mlp_out")
        yield (
            "ln2 reads resid_mid + mlp_out",
            get("ln2.hook_normalized") * get("ln2.hook_scale"),
            summed - summed.mean(-1, keepdim=True),
        )
        yield "resid_post = ln2.hook_out", get("ln2.hook_out"), post
        return
    yield "resid_mid = resid_pre + attn_out", pre + get("hook_attn_out"), mid
    yield "resid_post = resid_mid + mlp_out", mid + get("hook_mlp_out"), post


def _attention(model, acts, layer: int) -> Iterator[Claim]:
    layout, block = model.layout, f"blocks.{layer}"
    pattern, scores = (
        acts[f"{block}.attn.hook_pattern"].float(),
        acts[f"{block}.attn.hook_attn_scores"].float(),
    )
    if pattern.shape[1] != layout.n_heads:
        yield "pattern has the layout's heads", torch.tensor(pattern.shape[1]), torch.tensor(layout.n_heads)
        return
    z = acts[f"{block}.attn.hook_z"].float()
    if pattern.shape[-1] != z.shape[1]:
        yield "pattern has one column for each key", pattern[..., 0], pattern[..., 0] + torch.inf
        return
    rows = torch.ones_like(pattern[..., 0])
    yield "pattern rows sum to 1", pattern.sum(-1), rows
    yield "pattern = softmax(attn_scores)", torch.softmax(scores, -1), pattern
    if layout.modality == "tokens":
        yield "pattern is causal", pattern.triu(1) + 1, torch.ones_like(pattern)
    if f"{block}.attn.hook_v" in acts:
        v = acts[f"{block}.attn.hook_v"].float().repeat_interleave(layout.n_heads // layout.n_kv_heads, dim=2)
        yield "z = pattern · v", torch.einsum("bhqk,bkhd->bqhd", pattern, v), z
    path = layout.block(layer, layout.o)
    yield (
        "attn.hook_out = W_O z + b_O",
        _linear(model, path, z.flatten(-2)),
        acts[f"{block}.attn.hook_out"].float(),
    )
    name = "attn_out = what attention adds"
    yield from _branch(model, acts, name, f"{block}.attn.hook_out", f"{block}.hook_attn_out", f"{block}.ln1_post")


def _queries(model, acts, layer: int, inputs) -> Iterator[Claim]:
    """Queries and keys have like shapes and no closed form behind rotary: tell them apart by what they cause."""
    block = f"blocks.{layer}.attn"
    if f"{block}.hook_q" not in acts:
        return
    where = acts[f"{block}.hook_q"].shape[1] // 2
    silence = Function(f"{block}.hook_q", fn=lambda q: q.index_fill(1, torch.tensor(where, device=q.device), 0.0))
    moved = model.capture(inputs, f"{block}.hook_pattern", plan=[silence])[f"{block}.hook_pattern"]
    others = [i for i in range(moved.shape[2]) if i != where]
    yield (
        "hook_q moves only its own row of the pattern",
        moved[:, :, others],
        acts[f"{block}.hook_pattern"][:, :, others],
    )


def _branch(model, acts, name: str, inner: str, outer: str, post: str) -> Iterator[Claim]:
    value = acts[inner].float()
    if f"{post}.hook_out" in acts:
        value = model.bindings.norms[post](value)
        yield f"{name} (after its post-norm)", value * model.layout.branch_scale, acts[outer].float()
    else:
        yield name, value * model.layout.branch_scale, acts[outer].float()


def _norms(model, acts, block: str) -> Iterator[Claim]:
    for part in ("ln1", "ln2", "ln1_post", "ln2_post"):
        address = f"{block}.{part}"
        if f"{address}.hook_out" in acts:
            yield from _norm(model, acts, address)
    if model.layout.post_ln:
        return
    if f"{block}.ln1.hook_scale" in acts:
        yield from _reads(model, acts, f"{block}.ln1", f"{block}.hook_resid_pre", "ln1 reads resid_pre")
    if f"{block}.ln2.hook_scale" in acts:
        source = "hook_resid_pre" if model.layout.parallel else "hook_resid_mid"
        yield from _reads(model, acts, f"{block}.ln2", f"{block}.{source}", f"ln2 reads {source[5:]}")


def _norm(model, acts, address: str) -> Iterator[Claim]:
    norm = model.bindings.norms[address]
    what = "LayerNorm" if norm.centred else "RMSNorm"
    yield (
        f"{what}: hook_out = gain · normalized + bias",
        norm.finish(acts[f"{address}.hook_normalized"].float()),
        acts[f"{address}.hook_out"].float(),
    )


def _reads(model, acts, address: str, source: str, name: str) -> Iterator[Claim]:
    centred = model.bindings.norms[address].centre(acts[source])
    yield name, acts[f"{address}.hook_normalized"] * acts[f"{address}.hook_scale"], centred


def _mlp(model, acts, layer: int) -> Iterator[Claim]:
    layout, block = model.layout, f"blocks.{layer}"
    if layout.mlp_down:
        post = acts[f"{block}.mlp.hook_post"].float()
        act = _activation(model, layer)
        if act is not None:
            # forward, not a call: a user's hooks are not ours to fire.
            units = act.forward(acts[f"{block}.mlp.hook_pre"]).float()
            gated = f"{block}.mlp.hook_pre_linear" in acts
            units = units * acts[f"{block}.mlp.hook_pre_linear"].float() if gated else units
            yield "mlp.hook_post = act(hook_pre)" + (" · hook_pre_linear" if gated else ""), units, post
        path = layout.block(layer, layout.mlp_down)
        yield (
            "mlp.hook_out = W_out post + b_out",
            _linear(model, path, post),
            acts[f"{block}.mlp.hook_out"].float(),
        )
    name = "mlp_out = what the MLP adds"
    yield from _branch(model, acts, name, f"{block}.mlp.hook_out", f"{block}.hook_mlp_out", f"{block}.ln2_post")


def _activation(model, layer: int) -> nn.Module | None:
    """The module of the MLP's activation function, beside its first projection, where there is one."""
    path = model.layout.mlp_pre or model.layout.gate_up
    host = child(model.module, model.layout.block(layer, path.rpartition(".")[0])) if path else None
    found = (getattr(host, name, None) for name in ("act_fn", "act", "activation_fn", "intermediate_act_fn"))
    return next((plain(act) for act in found if isinstance(act, nn.Module)), None)


def _exit(model, acts) -> Iterator[Claim]:
    layout = model.layout
    if layout.final_norm:
        yield from _norm(model, acts, "ln_final")
        yield from _reads(
            model,
            acts,
            "ln_final",
            f"blocks.{model.n_layers - 1}.hook_resid_post",
            "ln_final reads the last resid_post",
        )
    if layout.unembed and layout.final_norm:
        raw = acts["unembed.hook_out"].float()
        yield (
            "unembed.hook_out = W_U ln_final.hook_out + b_U",
            _linear(model, layout.unembed, acts["ln_final.hook_out"].float()),
            raw,
        )
        scaled = raw * layout.logit_scale
        capped = (
            scaled if layout.logit_softcap is None else layout.logit_softcap * torch.tanh(scaled / layout.logit_softcap)
        )
        yield "logits = unembed.hook_out (scaled, soft-capped)", capped, acts["logits"].float()


def _linear(model, path: str, x: Tensor) -> Tensor:
    module = plain(child(model.module, path))  # type: ignore[arg-type]
    out = x @ linear_weight(module, path).float().T
    bias = linear_bias(module)
    return out if bias is None else out + bias.float()
