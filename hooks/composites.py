"""Calls that torch makes as one and that hold several decisions: fused attention, gated units.

Each is written out here in calls that have rules; the tape runs it in place of the fused call.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interp.hooks.attention import explicit_attention
from interp.hooks.errors import UnsupportedOpError


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """a · sigmoid(b), a and b the halves of the input."""
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


def normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """v / max(‖v‖_p, eps)."""
    if out is not None:
        raise UnsupportedOpError("normalize with out=", "a call that returns its result")
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps).expand_as(input)


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """v / (k + alpha · mean of v² over neighbouring channels)^beta."""
    padding = (*(0, 0) * (input.ndim - 2), size // 2, (size - 1) // 2)
    mean = F.pad(input.pow(2), padding).unfold(1, size, 1).mean(-1)
    return input / (mean * alpha + k) ** beta


def var_mean(input: Tensor, dim: Any = None, *, keepdim: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """Variance and mean as two calls."""
    return torch.var(input, dim, keepdim=keepdim, **options), input.mean(dim, keepdim=keepdim)


def std_mean(input: Tensor, dim: Any = None, *, keepdim: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean as two calls."""
    return torch.std(input, dim, keepdim=keepdim, **options), input.mean(dim, keepdim=keepdim)


def softmin(input: Tensor, dim: int, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    """The softmax of the negative."""
    return torch.softmax(-input, dim, dtype)


def lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:
    """a + w (b - a)."""
    return input + weight * (end - input)


def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """a + c b₁ ⊙ b₂."""
    return input + value * (tensor1 * tensor2)


def addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """a + c b₁ / b₂."""
    return input + value * (tensor1 / tensor2)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """<a, b> / (max(‖a‖, eps) max(‖b‖, eps))."""
    lengths = [x.norm(2, dim, keepdim=True).clamp_min(eps) for x in (x1, x2)]
    return ((x1 / lengths[0]) * (x2 / lengths[1])).sum(dim)


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, in_weight: Tensor | None,
    in_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
    out_weight: Tensor, out_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None, static_v: Tensor | None = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of `torch.nn.MultiheadAttention`, [pos, batch, d] or [pos, d]; its weights are not returned."""
    odd = {"bias_k": bias_k, "bias_v": bias_v, "static_k": static_k, "static_v": static_v}
    given = [name for name, v in odd.items() if v is not None] + (["add_zero_attn"] if add_zero_attn else [])
    if given or (training and dropout_p):
        what = ", ".join(given) or "live dropout"
        raise UnsupportedOpError(f"multi-head attention with {what}", "plain attention in evaluation mode")
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    parts: Any = separate if use_separate_proj_weight or in_weight is None else in_weight.chunk(3)
    biases = (None,) * 3 if in_bias is None else in_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(0, -2)
        for x, w, b in zip((query, key, value), parts, biases, strict=True)
    )
    mask = _mask(attn_mask, key_padding_mask, heads, q)
    z = explicit_attention(q, k, v, mask).transpose(0, -2).flatten(-2)
    return F.linear(z, out_weight, out_bias), None


def _mask(attn_mask: Tensor | None, padding: Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    """The additive mask for scores [heads, (batch,) pos, key]; True masks a key out, as in the module."""
    add = lambda m: torch.zeros_like(m, dtype=like.dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m
    total = None
    if attn_mask is not None:
        total = add(attn_mask)
        if total.ndim == 3:
            total = total.unflatten(0, (-1, heads)).transpose(0, 1)
    if padding is not None:
        per_key = add(padding).unsqueeze(-2)
        total = per_key if total is None else total + per_key
    return total


COMPOSITES: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": explicit_attention,
    "multi_head_attention_forward": multi_head_attention,
    "glu": glu,
    "normalize": normalize,
    "local_response_norm": local_response_norm,
    "var_mean": var_mean,
    "std_mean": std_mean,
    "softmin": softmin,
    "lerp": lerp,
    "addcmul": addcmul,
    "addcdiv": addcdiv,
    "cosine_similarity": cosine_similarity,
}
