"""The inside of attention: queries, keys, scores and pattern, seen while the model runs its own code.

No module carries these tensors. A function mode sees the calls that an attention module makes: the last product of
two activations in front of a softmax over keys is query times key; the softmax's input are the scores, its output is
the pattern. The model's attention setting is `eager` for the length of the run, and then what it was.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp.hooks.errors import SiteUnavailableError

_MATMUL = ("matmul", "__matmul__", "bmm", "baddbmm")
Tap = Callable[[str, str, Tensor], Tensor]


@contextmanager
def eager_attention(module: nn.Module) -> Iterator[None]:
    """Run Hugging Face models with eager attention inside the block; restore each config afterwards."""
    configs: dict[int, Any] = {
        id(c): c for m in module.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation_internal")
    }
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
) -> Tensor:
    """Fused attention written out as scores, softmax, product, with the same arguments and result."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    scores = torch.matmul(query, key.transpose(-2, -1)) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~keep, -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    pattern = torch.softmax(scores, dim=-1)
    if dropout_p:
        pattern = torch.dropout(pattern, dropout_p, train=True)
    return torch.matmul(pattern, value)


class AttentionTaps(TorchFunctionMode):
    """Calls ``tap(path, part, value)`` for each part of each attention module that runs, and uses what it returns.

    ``enter`` and ``leave`` are called from hooks on the attention modules. Only the modules in ``wanted`` are tapped,
    and nothing while ``paused()``.
    """

    def __init__(self, wanted: dict[str, set[str]], tap: Tap, paused: Callable[[], bool] = lambda: False):
        super().__init__()
        self.wanted, self.tap, self.paused = wanted, tap, paused
        self._stack: list[str] = []
        self._seen: set[str] = set()

    def enter(self, path: str) -> None:
        """An attention module begins."""
        if self.paused():
            return
        self._stack.append(path)
        self._seen.discard(path)

    def leave(self, path: str) -> None:
        """An attention module ends.

        Raises:
            SiteUnavailableError: If it called no softmax over scores that could be seen.
        """
        if self.paused():
            return
        self._stack.pop()
        if path not in self._seen:
            raise SiteUnavailableError(
                f"{path} computes attention in a fused or foreign kernel",
                "scores, softmax and product as separate calls",
                "load the model with attn_implementation='eager'",
            )  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Tap the calls of the innermost wanted attention module."""
        kwargs = kwargs or {}
        if not self._stack or self.paused():
            return func(*args, **kwargs)
        path, name = self._stack[-1], getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            with self:
                return explicit_attention(*args, **kwargs)
        if path in self._seen or not args:
            return func(*args, **kwargs)
        if name in _MATMUL and len(args) > 1 and all(isinstance(a, Tensor) and a.ndim >= 3 for a in args[:2]):
            return self._score_product(path, func, args, kwargs)
        if name == "softmax" and args[0].ndim >= 3:
            return self._softmax(path, func, args, kwargs)
        return func(*args, **kwargs)

    def _score_product(self, path: str, func, args, kwargs):
        query, keys = args[0], args[1]
        if "baddbmm" in getattr(func, "__name__", "") and self.wanted[path] & {"rot_q", "rot_k"}:
            raise SiteUnavailableError(
                f"{path} adds to its scores while it multiplies (baddbmm)",
                "queries and keys in a product of their own",
                "set reorder_and_upcast_attn=False in the model's configuration",
            )  # fmt: skip
        if "rot_q" in self.wanted[path]:
            query = self.tap(path, "rot_q", query)
        if "rot_k" in self.wanted[path]:
            keys = self.tap(path, "rot_k", keys)
        return func(query, keys, *args[2:], **kwargs)

    def _softmax(self, path: str, func, args, kwargs):
        self._seen.add(path)
        scores = args[0]
        if "scores" in self.wanted[path]:
            scores = self.tap(path, "scores", scores)
        pattern = func(scores, *args[1:], **kwargs)
        return self.tap(path, "pattern", pattern) if "pattern" in self.wanted[path] else pattern
