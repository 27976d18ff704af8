"""The last token of a decoder run again from a block on, with the keys and values of the tokens before it kept."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp.causal.data import Pool
from interp.causal.stages import Stage, frozen, picked
from interp.hooks.layouts import child
from interp.hooks.model import Model, main_tensor
from interp.hooks.site import Site

_CHUNK = 64
_TOLERANCE = 1e-3
_CHECKED = 4  # inputs on which the short way is compared with the whole network


def fits(model: Model, site: Site) -> bool:
    """Whether a site is the stream at the last token of a decoder that keeps keys and values."""
    return _block(model, site) is not None and model.reader.kind == "tokens" and _cache_keyword(model) is not None


def _block(model: Model, site: Site) -> int | None:
    """Number of the block behind which the stream is read."""
    if model.layout is None or site.head is not None or site.positions not in ("last", (-1,)):
        return None
    names = {f"blocks.{layer}.hook_resid_post": layer for layer in range(model.n_layers)}
    names |= {f"blocks.{layer + 1}.hook_resid_pre": layer for layer in range(model.n_layers - 1)}
    return names.get(site.address)


def _cache_keyword(model: Model) -> str | None:
    accepts = model.reader.accepts
    keyword = next((k for k in ("cache", "past_key_values") if k in accepts), None)
    return keyword if {"use_cache", "attention_mask", "position_ids", "input_ids"} <= accepts else None


class DecoderStage(Stage):
    """A decoder cut at the stream of the last token: blocks above the site are run again for that token alone.

    The stream of earlier tokens is not changed by the swap, so their keys and values are read once, for the blocks
    above the site. The network's own code runs: on a shallow copy of its outer modules, in which the blocks below the
    site pass on what they get and the block at the site gives h.
    """

    path = "last token: blocks above the site, with keys and values kept"

    def __init__(self, model: Model, sites: Sequence[Site], pool: Pool):
        super().__init__(model, sites, pool)
        block = _block(model, sites[0])
        assert block is not None
        self.block, self.keyword = block, str(_cache_keyword(model))
        self.copy, self.inject, self.head = _shortened(model, block)
        self._keep()
        self._check()

    def _keep(self) -> None:
        """Read keys and values of all tokens but the last, left-padded to one length."""
        batch = self.model.batch(self.pool.inputs, padding_side="left")
        assert batch.ids is not None
        assert batch.mask is not None
        self.ids, self.mask = batch.ids[:, -1:], batch.mask.long()
        self.places = self.mask.cumsum(1) - 1
        self.kept: list[tuple[Tensor, Tensor]] = []
        if self.mask.shape[1] == 1:
            return
        found: list[list[tuple[Tensor, Tensor]]] = []
        for rows in torch.arange(len(self.ids)).split(_CHUNK):
            ids, mask, places = batch.ids[rows, :-1], self.mask[rows, :-1], self.places[rows, :-1].clamp(min=0)
            mask = torch.where(mask.any(1, keepdim=True), mask, 1)  # a text of one token has nothing before it
            cache = self._new_cache()
            arguments = {"attention_mask": mask, "position_ids": places, self.keyword: cache, "use_cache": True}
            with torch.no_grad():
                self.model.module(input_ids=ids, **arguments)
            found.append([(layer.keys, layer.values) for layer in cache.layers[self.block + 1 :]])
        self.kept = [
            (torch.cat([part[i][0] for part in found]), torch.cat([part[i][1] for part in found]))
            for i in range(len(found[0]))
        ]

    @staticmethod
    def _new_cache() -> Any:
        from transformers.cache_utils import DynamicCache

        return DynamicCache()

    def logits(self, h, rows, candidates=None):
        """The blocks above, the final norm, and the wanted rows of the unembedding."""
        cache = self._cache(rows)
        self.inject.value = h.to(self.model.dtype)[:, None]
        self.head.tokens = candidates
        arguments = {"attention_mask": self.mask[rows], "position_ids": self.places[rows, -1:].clamp(min=0)}
        with frozen(self.model.module):
            out = self.copy(input_ids=self.ids[rows], **arguments, **{self.keyword: cache}, use_cache=True)
        self.inject.value = None
        return picked(main_tensor(out)[:, -1], None if self.head.narrow or candidates is None else candidates)

    def _cache(self, rows: Tensor) -> Any:
        """Keys and values of these inputs; of the blocks below only the length is asked for."""
        cache = self._new_cache()
        if not self.kept:
            return cache
        keys, _ = self.kept[0]
        nothing = keys[:1, :1, :, :1].expand(len(rows), -1, -1, -1)
        for layer in range(self.block + 1):
            cache.update(nothing, nothing, layer)
        for layer, (keys, values) in enumerate(self.kept, self.block + 1):
            cache.update(keys[rows], values[rows], layer)
        return cache

    def _check(self) -> None:
        """Compare with the whole network on some inputs, and give the short way up where it differs."""
        rows = torch.arange(min(_CHECKED, len(self.pool)))
        with torch.no_grad():
            gap = (self.logits(self.acts[rows], rows) - self.plain(rows)).abs().max()
        self.exact = bool(gap <= _TOLERANCE * max(1.0, float(self.plain(rows).abs().max())))


class _Inject(nn.Module):
    """Stands in for the block at the site: gives h in the form in which blocks answer."""

    def __init__(self, as_tuple: bool):
        super().__init__()
        self.as_tuple = as_tuple
        self.value: Tensor | None = None

    def forward(self, hidden, *args, **kwargs):
        value = hidden if self.value is None else self.value
        return (value,) if self.as_tuple else value


class _Pass(_Inject):
    """Stands in for a block below the site."""


class _Rows(nn.Module):
    """An unembedding that gives the wanted tokens only."""

    def __init__(self, head: nn.Module | None):
        super().__init__()
        self.whole: Any = head
        self.tokens: Tensor | None = None
        self.narrow = type(head) is nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is None or not self.narrow:
            return self.whole(x)
        weight, bias = self.whole.weight[self.tokens], self.whole.bias
        out = torch.einsum("bpd,bkd->bpk", x, weight)
        return out if bias is None else out + bias[self.tokens][:, None]


def _shortened(model: Model, block: int) -> tuple[nn.Module, _Inject, _Rows]:
    """A shallow copy that shares the weights, with the blocks up to one replaced."""
    layout = model.layout
    assert layout is not None
    blocks = child(model.module, layout.blocks)
    assert isinstance(blocks, nn.ModuleList)
    as_tuple = _answers_in_tuples(blocks[0])
    inject = _Inject(as_tuple)
    stand_ins: list[nn.Module] = [*(_Pass(as_tuple) for _ in range(block)), inject]
    new = nn.ModuleList([*stand_ins, *list(blocks)[block + 1 :]])
    for one, original in zip(stand_ins, blocks, strict=False):
        _copy_marks(original, one)
    found = _with(model.module, layout.blocks.split("."), new)
    head = _Rows(child(model.module, layout.unembed) if layout.unembed else None)
    if layout.unembed and head.narrow:
        found = _with(found, layout.unembed.split("."), head)
    return found, inject, head


def _copy_marks(original: nn.Module, stand_in: nn.Module) -> None:
    """Plain attributes of a block that its model may read, such as the kind of its attention."""
    for name, value in vars(original).items():
        if isinstance(value, (str, int, bool)) and name != "training" and not name.startswith("_"):
            setattr(stand_in, name, value)


def _answers_in_tuples(block: nn.Module) -> bool:
    text = str(inspect.signature(block.forward).return_annotation).lower()
    return "tuple" in text


def _with(module: nn.Module, path: Sequence[str], new: nn.Module) -> nn.Module:
    """A copy of a module that shares all but what lies on a path, at whose end is another module."""
    found = copy.copy(module)
    vars(found).pop("forward", None)  # nnsight's is bound to the module that was copied, and would run that one
    found._modules = dict(module._modules)
    found._modules[path[0]] = new if len(path) == 1 else _with(module._modules[path[0]], path[1:], new)  # type: ignore[arg-type]
    return found
