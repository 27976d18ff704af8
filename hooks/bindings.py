"""Bindings: which tap of which module carries each site of a layout, and what the site means."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from interp.hooks.errors import LayoutError
from interp.hooks.layouts import Layout, child
from interp.hooks.views import (
    Columns,
    GroupedKeys,
    Heads,
    Interleaved,
    NormNormalized,
    NormScale,
    Queries,
    Scaled,
    View,
    Whole,
)
from interp.hooks.weights import Norm, plain, read_norm

Where = Literal["in", "shared_in", "out", "rot_q", "rot_k", "scores", "pattern", "raw_in", "raw_out"]
ATTENTION_TAPS = ("rot_q", "rot_k", "scores", "pattern")

STREAM = ("batch", "pos", "d_model")
QUERY_HEADS = ("batch", "pos", "head", "d_head")
KV_HEADS = ("batch", "pos", "kv_head", "d_head")
PATTERN = ("batch", "head", "pos", "key")


@dataclass(frozen=True)
class Binding:
    """One site of one model.

    Attributes:
        address: Canonical name.
        module: Path of the module that is tapped.
        where: ``in`` (its input), ``shared_in`` (its input, which the residual sum reads too, so that an edit is
            made in place), ``out``, a place inside attention, or all that a module takes or gives (``raw_``).
        view: How the site lies in the tapped tensor.
        axes: Name of each axis.
        meaning: In words.
        order: Place in execution order.
    """

    address: str
    module: str
    where: Where
    view: View
    axes: tuple[str, ...]
    meaning: str
    order: int = 0

    @property
    def pos_axis(self) -> int | None:
        """Axis of token positions."""
        return self.axes.index("pos") if "pos" in self.axes else None

    @property
    def head_axis(self) -> int | None:
        """Axis of heads."""
        return next((self.axes.index(a) for a in ("head", "kv_head") if a in self.axes), None)


def sizes(module: nn.Module, layout: Layout) -> dict[str, int]:
    """Return the size of each named axis of the layout's sites."""
    width_in = _features(child(module, layout.block(0, layout.o)), "in")
    found = {"head": layout.n_heads, "kv_head": layout.n_kv_heads, "d_head": width_in // layout.n_heads}
    found["d_model"] = _features(child(module, layout.block(0, layout.o)), "out")
    if layout.mlp_down:
        found["d_mlp"] = _features(child(module, layout.block(0, layout.mlp_down)), "in")
    if layout.unembed:
        found["vocab"] = _features(child(module, layout.unembed), "out")
    return found


def _features(module: nn.Module | None, side: str) -> int:
    inner: Any = plain(module)  # type: ignore[arg-type]
    named = getattr(inner, f"{side}_features", None)
    if named is not None:
        return int(named)
    weight = inner.weight
    transposed = type(inner).__name__.startswith("Conv1D")
    return int(weight.shape[0 if (side == "in") == transposed else 1])


class Bindings:
    """All sites of a model with a layout, in execution order."""

    def __init__(self, module: nn.Module, layout: Layout):
        self.module, self.layout = module, layout
        self.sizes = sizes(module, layout)
        self.norms: dict[str, Norm] = {}
        self.by_address: dict[str, Binding] = {}
        self.n_layers = len(child(module, layout.blocks))  # type: ignore[arg-type]
        self._model_entry()
        for layer in range(self.n_layers):
            self._block(layer)
        self._model_exit()

    def _add(self, address: str, module: str, where: Where, view: View, axes: tuple[str, ...], meaning: str) -> None:
        self.by_address[address] = Binding(address, module, where, view, axes, meaning, len(self.by_address))

    def _norm(self, address: str, path: str, what: str) -> None:
        norm = read_norm(child(self.module, path), path, self.sizes["d_model"])  # type: ignore[arg-type]
        self.norms[address] = norm
        axes = ("batch", "pos", "one")
        self._add(f"{address}.hook_scale", path, "out", NormScale(norm), axes, f"divisor of {what}")
        self._add(
            f"{address}.hook_normalized",
            path,
            "out",
            NormNormalized(norm),
            STREAM,
            f"{what}, before its gain",
        )
        self._add(f"{address}.hook_out", path, "out", Whole(), STREAM, f"{what}, after gain and bias")

    def _model_entry(self) -> None:
        layout = self.layout
        if layout.pos_embed is None and layout.modality == "tokens":
            self._add(
                "hook_embed",
                layout.block(0),
                "in",
                Whole(),
                STREAM,
                "token embedding, after a family's scale",
            )
            return
        what = "patch embedding, without class token and positions" if layout.modality == "image" else "token embedding"
        self._add("hook_embed", layout.embed, "out", Whole(), STREAM, what)
        if layout.type_embed:
            self._add("hook_type_embed", layout.type_embed, "out", Whole(), STREAM, "token-type embedding")
        if layout.pos_embed:
            self._add("hook_pos_embed", layout.pos_embed, "out", Whole(), STREAM, "learned position embedding")
        if layout.embed_norm:
            self._norm("embed.ln", layout.embed_norm, "norm of the embeddings' sum")

    def _block(self, layer: int) -> None:
        layout, name = self.layout, f"blocks.{layer}"
        self._add(f"{name}.hook_resid_pre", layout.block(layer), "in", Whole(), STREAM, "stream entering the block")
        if layout.ln1 and not layout.post_ln:
            self._norm(f"{name}.ln1", layout.block(layer, layout.ln1), "norm in front of attention")
        self._attention(layer, name)
        if layout.post_ln:
            self._norm(f"{name}.ln1", layout.block(layer, layout.ln1 or ""), "norm of stream + attention")
            path = layout.block(layer, layout.ln1 or "")
            self._add(
                f"{name}.hook_resid_mid",
                path,
                "out",
                Whole(),
                STREAM,
                "stream between attention and MLP (normalised)",
            )
        elif not layout.parallel:
            path = layout.block(layer, layout.ln2 or layout.mlp or layout.mlp_pre or "")
            self._add(
                f"{name}.hook_resid_mid",
                path,
                "shared_in",
                Whole(),
                STREAM,
                "stream between attention and MLP",
            )
        if layout.ln2 and not layout.post_ln:
            self._norm(f"{name}.ln2", layout.block(layer, layout.ln2), "norm in front of the MLP")
        self._mlp(layer, name)
        if layout.post_ln:
            self._norm(f"{name}.ln2", layout.block(layer, layout.ln2 or ""), "norm of stream + MLP")
        self._add(f"{name}.hook_resid_post", layout.block(layer), "out", Whole(), STREAM, "stream leaving the block")

    def _attention(self, layer: int, name: str) -> None:
        layout, attn = self.layout, self.layout.block(layer, self.layout.attn)
        heads, kv, d = layout.n_heads, layout.n_kv_heads, self.sizes["d_head"]
        for part, module, view, axes in self._projections(layer):
            self._add(f"{name}.attn.hook_{part}", module, "out", view, axes, f"{_QKV[part]}, before norm and rotary")
        self._add(f"{name}.attn.hook_rot_q", attn, "rot_q", Queries(), QUERY_HEADS, "queries as the scores see them")
        self._add(f"{name}.attn.hook_rot_k", attn, "rot_k", GroupedKeys(kv), KV_HEADS, "keys as the scores see them")
        scores = "scores before the softmax: scaled, soft-capped, masked"
        self._add(f"{name}.attn.hook_attn_scores", attn, "scores", Whole(), PATTERN, scores)
        self._add(f"{name}.attn.hook_pattern", attn, "pattern", Whole(), PATTERN, "attention probabilities")
        out = layout.block(layer, layout.o)
        self._add(f"{name}.attn.hook_z", out, "in", Heads(heads, d), QUERY_HEADS, "heads' weighted values")
        self._add(f"{name}.attn.hook_out", out, "out", Whole(), STREAM, "heads' sum plus b_O")
        self._branch(layer, f"{name}.hook_attn_out", out, layout.ln1_post, f"{name}.ln1_post", "attention")

    def _projections(self, layer: int):
        layout, d = self.layout, self.sizes["d_head"]
        widths = {"q": layout.n_heads, "k": layout.n_kv_heads, "v": layout.n_kv_heads}
        axes = {"q": QUERY_HEADS, "k": KV_HEADS, "v": KV_HEADS}
        if layout.qkv is None:
            for part in "qkv":
                path = getattr(layout, part)
                full = path and layout.block(layer, path)
                fits = full and _features(child(self.module, full), "out") == widths[part] * d
                if full and not fits and _features(child(self.module, full), "out") % (widths[part] * d):
                    raise self._widths(full, f"{widths[part]} heads of width {d}, or of a multiple")
                if full and part == "v" and not fits:
                    # z fixes the width of a head's values: queries and keys may be wider, values may not.
                    raise self._widths(full, f"{widths[part]} heads of width {d}")
                if fits:
                    yield part, full, Heads(widths[part], d), axes[part]
            return
        full, start = layout.block(layer, layout.qkv), 0
        if _features(child(self.module, full), "out") != sum(widths.values()) * d:
            raise self._widths(full, f"{layout.n_heads} queries, {layout.n_kv_heads} keys and values of width {d}")
        attn = layout.block(layer, layout.attn)
        for index, part in enumerate("qkv"):
            split = f"{attn}.{part}"
            if child(self.module, split) is not None and child(self.module, split) is not child(self.module, full):
                # A TransformerLens bridge computes a fused projection as three and never calls the fused one.
                yield part, split, Heads(widths[part], d), axes[part]
            elif layout.fused == "interleaved":
                yield part, full, Interleaved(widths[part], d, index), axes[part]
            else:
                yield part, full, Heads(widths[part], d, start), axes[part]
                start += widths[part] * d

    def _widths(self, path: str, wanted: str) -> LayoutError:
        given = _features(child(self.module, path), "out")
        return LayoutError(f"{path} has {given} outputs", wanted, "check n_heads and n_kv_heads of the layout")

    def _branch(self, layer: int, address: str, path: str, post: str | None, norm: str, what: str) -> None:
        """What a branch adds to the stream: after its post-norm and its multiplier."""
        if post:
            path = self.layout.block(layer, post)
            self._norm(norm, path, f"norm of the {what} branch")
        factor = self.layout.branch_scale
        view = Whole() if factor == 1.0 else Scaled(factor)
        self._add(address, path, "out", view, STREAM, f"what {what} adds to the stream")

    def _mlp(self, layer: int, name: str) -> None:
        layout = self.layout
        hidden, axes = self.sizes.get("d_mlp", 0), ("batch", "pos", "d_mlp")
        if layout.gate_up:
            path = layout.block(layer, layout.gate_up)
            self._add(f"{name}.mlp.hook_pre", path, "out", Columns(0, hidden), axes, "gate's pre-activation")
            self._add(
                f"{name}.mlp.hook_pre_linear",
                path,
                "out",
                Columns(hidden, 2 * hidden),
                axes,
                "factor that is gated",
            )
        elif layout.mlp_pre:
            what = "gate's pre-activation" if layout.mlp_up else "pre-activation"
            self._add(f"{name}.mlp.hook_pre", *self._side(layer, layout.mlp_pre, "out"), Whole(), axes, what)
        if layout.mlp_up:
            side = self._side(layer, layout.mlp_up, "out")
            self._add(f"{name}.mlp.hook_pre_linear", *side, Whole(), axes, "factor that is gated")
        if layout.mlp_down:
            side = self._side(layer, layout.mlp_down, "in")
            self._add(f"{name}.mlp.hook_post", *side, Whole(), axes, "neurons, after activation and gate")
        out = layout.block(layer, layout.mlp or layout.mlp_down or "")
        self._add(f"{name}.mlp.hook_out", out, "out", Whole(), STREAM, "output of the MLP, with bias")
        self._branch(layer, f"{name}.hook_mlp_out", out, layout.ln2_post, f"{name}.ln2_post", "the MLP")

    def _side(self, layer: int, part: str, side: Literal["in", "out"]) -> tuple[str, Literal["in", "out"]]:
        """Where an MLP's projection is seen: a bridge in compatibility mode calls hook points, not modules."""
        path = self.layout.block(layer, part)
        mlp = child(self.module, self.layout.block(layer, self.layout.mlp)) if self.layout.mlp else None
        if getattr(mlp, "_use_processed_weights", False) and hasattr(child(self.module, path), f"hook_{side}"):
            return f"{path}.hook_{side}", "out"
        return path, side

    def _model_exit(self) -> None:
        if self.layout.final_norm:
            self._norm("ln_final", self.layout.final_norm, "final norm")
        if self.layout.unembed:
            axes = ("batch", "pos", "vocab")
            self._add(
                "unembed.hook_out",
                self.layout.unembed,
                "out",
                Whole(),
                axes,
                "logits before a final scale or soft-cap",
            )
            self._add("logits", "", "out", Whole(), axes, "logits as the model returns them")


_QKV = {"q": "queries", "k": "keys", "v": "values"}
