"""Batch: what one forward call is given, with the true extent of each example."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.hooks.errors import InputError, PositionError


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward call.

    Attributes:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        size: Number of examples.
        ids: Token ids [batch, pos], or None.
        mask: True at real tokens [batch, pos], or None where there are no tokens.
        spans: Of each text, the character span of each token, where the tokenizer gives them.
        texts: The texts, where texts were given.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    ids: Tensor | None = None
    mask: Tensor | None = None
    texts: tuple[str, ...] | None = None
    spans: tuple[tuple[tuple[int, int], ...], ...] | None = field(default=None, repr=False)

    @property
    def lengths(self) -> list[int]:
        """Number of real tokens of each example."""
        return [] if self.mask is None else self.mask.sum(1).tolist()

    @property
    def starts(self) -> list[int]:
        """Padded index of each example's first token."""
        return [] if self.mask is None else self.mask.int().argmax(1).tolist()

    @property
    def extent(self) -> tuple[int, ...] | None:
        """[batch, pos] of the padded tokens, or None."""
        return None if self.mask is None else tuple(self.mask.shape)

    @property
    def padding_side(self) -> str:
        """``left`` if an example starts behind padding, else ``right``."""
        return "left" if any(self.starts) else "right"

    def positions(self, wanted) -> Tensor:
        """Return padded indices [batch, n] of the wanted positions.

        Args:
            wanted: An int or ints (of every example, negative from its end), a list of such lists (one for each
                example), ``"last"``, or another string: the tokens that cover it in each text.

        Raises:
            PositionError: If a position lies outside an example, examples would get different counts, or a
                substring occurs not exactly once.
        """
        if self.mask is None:
            raise PositionError(f"positions={wanted!r}", "token inputs", "this model's inputs have no token positions")
        rows = self._rows(wanted)
        counts = {len(row) for row in rows}
        if len(counts) != 1 or 0 in counts:
            raise PositionError(
                f"positions={wanted!r} gives {[len(r) for r in rows]} positions in {len(rows)} examples",
                "the same number, at least one, in each",
                "give one list of ints for each example",
            )
        resolved = []
        for index, (row, length, start) in enumerate(zip(rows, self.lengths, self.starts, strict=True)):
            for p in row:
                if isinstance(p, bool) or not hasattr(p, "__index__") or not -length <= p < length:
                    raise PositionError(
                        f"position {p!r} in example {index}",
                        f"an int in {-length}..{length - 1} ({length} tokens)",
                    )
            resolved.append([start + operator.index(p) % length for p in row])
        return torch.tensor(resolved)

    def _rows(self, wanted) -> list[list[Any]]:
        if hasattr(wanted, "tolist"):
            wanted = wanted.tolist()  # a tensor or an array
        if isinstance(wanted, int):
            return [[wanted]] * self.size
        if wanted == "last":
            return [[-1]] * self.size
        if isinstance(wanted, str):
            return [self._covering(index, wanted) for index in range(self.size)]
        if isinstance(wanted, Sequence) and wanted and all(isinstance(p, (list, tuple)) for p in wanted):
            if len(wanted) != self.size:
                raise PositionError(f"{len(wanted)} lists of positions", f"one for each of {self.size} examples")
            return [list(p) for p in wanted]
        if isinstance(wanted, Sequence):
            return [list(wanted)] * self.size
        raise PositionError(f"positions={wanted!r}", "ints, lists of ints, 'last' or a substring of the text")

    def _covering(self, index: int, text: str) -> list[int]:
        if self.texts is None or self.spans is None:
            raise PositionError(
                f"positions={text!r}", "texts as inputs (and a fast tokenizer)", "give token indices instead"
            )
        found = [i for i in range(len(self.texts[index])) if self.texts[index].startswith(text, i)]
        if len(found) != 1:
            raise PositionError(
                f"{text!r} occurs {len(found)} times in {self.texts[index]!r}",
                "exactly one occurrence",
                "give token indices instead",
            )
        begin, end = found[0], found[0] + len(text)
        return [i for i, (a, b) in enumerate(self.spans[index]) if a < end and b > begin]


@dataclass(frozen=True)
class Reader:
    """Turns what a user gives into a Batch.

    Attributes:
        kind: ``tokens`` (causal), ``encoder``, ``image`` or ``any``.
        accepts: Keywords that the forward call takes.
        vocab: Number of token ids, or None.
        context: Longest sequence that learned positions allow, or None.
        open_ended: Whether the forward call takes any keyword.
        has_weights: Whether the model has floating-point weights, so that its dtype is its own.
    """

    kind: str
    tokenizer: Any
    preprocess: Any
    accepts: frozenset[str]
    device: torch.device
    dtype: torch.dtype
    vocab: int | None = None
    context: int | None = None
    open_ended: bool = False
    has_weights: bool = True

    def read(self, inputs, padding_side: str | None = None) -> Batch:
        """Return the batch.

        Raises:
            InputError: If the inputs are of the wrong kind, shape or range.
        """
        if isinstance(inputs, Batch):
            return inputs
        if self.kind in ("tokens", "encoder"):
            return self._tokens(inputs, padding_side)
        if self.preprocess is None and _is_text(inputs):
            raise InputError(f"text {inputs!r:.60}", "a tensor (this model takes no text)")
        if self.kind == "image":
            return self._image(inputs)
        return self._anything(inputs)

    def _anything(self, inputs) -> Batch:
        if self.preprocess is not None and not isinstance(inputs, (Tensor, Mapping, tuple)):
            inputs = self.preprocess(inputs)
        if isinstance(inputs, Tensor):
            inputs = (inputs,)
        if isinstance(inputs, Mapping):
            tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
            args, kwargs = (), dict(inputs)
        elif isinstance(inputs, tuple):
            tensors, args, kwargs = [v for v in inputs if isinstance(v, Tensor)], inputs, {}
        else:
            raise InputError(
                f"inputs of type {type(inputs).__name__}",
                "a tensor, a tuple of arguments or a mapping of keywords",
            )
        unknown = [k for k in kwargs if k not in self.accepts]
        if unknown and not self.open_ended:
            raise InputError(
                f"keywords {unknown}", f"keywords of the model's forward: {', '.join(sorted(self.accepts))}"
            )
        wrong = [v.dtype for v in tensors if v.is_floating_point() and v.dtype != self.dtype]
        if wrong and self.has_weights:
            raise InputError(f"a {wrong[0]} tensor", f"{self.dtype}, the model's dtype", f"use .to({self.dtype})")
        if not tensors or tensors[0].ndim == 0 or tensors[0].numel() == 0:
            raise InputError(
                "inputs without a tensor that has a batch axis", "at least one non-empty tensor [batch, ...]"
            )
        move = lambda v: v.to(self.device) if isinstance(v, Tensor) else v
        return Batch(tuple(map(move, args)), {k: move(v) for k, v in kwargs.items()}, tensors[0].shape[0])

    def _image(self, inputs) -> Batch:
        if not isinstance(inputs, (Tensor, Mapping)) and self.preprocess is not None:
            inputs = self.preprocess(inputs)
        pixels = inputs.get("pixel_values") if isinstance(inputs, Mapping) else inputs
        if (
            not isinstance(pixels, Tensor)
            or not pixels.is_floating_point()
            or pixels.ndim not in (3, 4)
            or pixels.numel() == 0
        ):
            given = (
                f"{type(inputs).__name__}"
                if not isinstance(pixels, Tensor)
                else f"a {pixels.dtype} tensor {list(pixels.shape)}"
            )
            raise InputError(f"{given} to an image model", "a float tensor [batch, channel, height, width]")
        pixels = pixels if pixels.ndim == 4 else pixels[None]
        return Batch((pixels.to(self.device, self.dtype),), {}, pixels.shape[0])

    def _tokens(self, inputs, padding_side: str | None) -> Batch:
        texts = spans = None
        if isinstance(inputs, str):
            inputs = [inputs]
        if hasattr(inputs, "__array__") and not isinstance(inputs, Tensor):
            inputs = torch.as_tensor(inputs)
        if isinstance(inputs, Mapping):
            ids, mask = self._encoding(inputs)
        elif isinstance(inputs, Tensor):
            ids = inputs[None] if inputs.ndim == 1 else inputs
            mask = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        elif isinstance(inputs, (list, tuple)) and inputs:
            if all(isinstance(i, str) for i in inputs):
                texts = tuple(inputs)
                rows, spans = self._tokenize(texts)
            else:
                rows = list(inputs) if isinstance(inputs[0], (list, tuple, Tensor)) else [inputs]
            ids, mask = self._pad(rows, padding_side)
        else:
            raise InputError(
                f"inputs of type {type(inputs).__name__} ({inputs!r:.60})",
                "text, texts, token ids or an encoding with input_ids",
            )
        self._check(ids, mask)
        ids, mask = ids.to(self.device, torch.long), mask.to(self.device)
        extra = {
            key: value.to(self.device) if isinstance(value, Tensor) else value
            for key, value in (inputs.items() if isinstance(inputs, Mapping) else ())
            if key not in ("input_ids", "attention_mask")
        }
        kwargs = self._call(ids, mask) | extra
        args = () if "input_ids" in self.accepts else (kwargs.pop("input_ids"),)
        return Batch(args, kwargs, ids.shape[0], ids, mask, texts, spans)

    def _call(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"input_ids": ids}
        if not mask.all():
            left = not bool(mask[:, 0].all())
            if left and self.kind == "encoder":
                raise InputError("left padding", "right padding", "an encoder's learned positions count from the left")
            if "attention_mask" in self.accepts:
                kwargs["attention_mask"] = mask.long()
            elif left or self.kind != "tokens":
                # In a causal model tokens never see the padding behind them, mask or none.
                raise InputError("a padded batch", "one length", "this model's forward takes no attention_mask")
            if left and self.kind == "tokens":
                if "position_ids" not in self.accepts:
                    raise InputError("left padding", "right padding", "this model's forward takes no position_ids")
                kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        if "use_cache" in self.accepts:
            kwargs["use_cache"] = False
        return kwargs

    def _tokenize(self, texts: tuple[str, ...]):
        if self.tokenizer is None:
            raise InputError(f"text {texts[0]!r:.60}", "a tokenizer", "pass tokenizer= to attach, or token ids")
        empty = [i for i, t in enumerate(texts) if not t]
        if empty:
            raise InputError(f"text {empty[0]} is empty", "at least one character")
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(list(texts), return_offsets_mapping=fast) if fast else self.tokenizer(list(texts))
        spans = tuple(tuple(map(tuple, s)) for s in encoded["offset_mapping"]) if fast else None
        return encoded["input_ids"], spans

    def _encoding(self, inputs: Mapping) -> tuple[Tensor, Tensor]:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise InputError(
                f"a mapping with keys {sorted(map(str, inputs))}",
                "input_ids as a tensor",
                "call the tokenizer with return_tensors='pt'",
            )
        unknown = [k for k in inputs if k not in self.accepts]
        if unknown and self.accepts:
            raise InputError(f"keys {unknown}", "keywords that the model's forward takes")
        mask = inputs.get("attention_mask")
        mask = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool()
        if mask.shape != ids.shape:
            raise InputError(f"attention_mask {list(mask.shape)} with input_ids {list(ids.shape)}", "equal shapes")
        return ids, mask

    def _pad(self, rows, side: str | None) -> tuple[Tensor, Tensor]:
        tensors = [_ids(row) for row in rows]
        if any(t.ndim != 1 for t in tensors):
            raise InputError("token ids nested deeper than [example][token]", "a list of ids for each example")
        side = side or getattr(self.tokenizer, "padding_side", None) or "right"
        if side not in ("left", "right"):
            raise InputError(f"padding_side={side!r}", "'left' or 'right'")
        longest = max(len(t) for t in tensors)
        ids = torch.zeros(len(tensors), longest, dtype=torch.long)
        mask = torch.zeros(len(tensors), longest, dtype=torch.bool)
        pad = getattr(self.tokenizer, "pad_token_id", None)
        ids += pad if pad is not None else 0
        for row, t in enumerate(tensors):
            where = slice(0, len(t)) if side == "right" else slice(longest - len(t), longest)
            ids[row, where], mask[row, where] = t, True
        return ids, mask

    def _check(self, ids: Tensor, mask: Tensor) -> None:
        if ids.ndim != 2 or ids.shape[0] == 0 or not mask.any(1).all():
            raise InputError(
                f"token ids of shape {list(ids.shape)}",
                "[batch, pos] with at least one token in each example",
                "the prompt may be empty",
            )
        _integers(ids)
        gaps = (mask.int().diff(dim=1) != 0).sum(1) > 1
        if gaps.any():
            raise InputError(
                f"attention_mask of example {int(gaps.int().argmax())} has gaps", "padding on one side only"
            )
        low, high = int(ids[mask].min()), int(ids[mask].max())
        if low < 0 or (self.vocab is not None and high >= self.vocab):
            raise InputError(f"token id {low if low < 0 else high}", f"ids in 0..{(self.vocab or 0) - 1}")
        longest = int(mask.sum(1).max())
        if self.context is not None and longest > self.context:
            raise InputError(
                f"{longest} tokens",
                f"at most {self.context} (the model's learned positions)",
                "shorten the text",
            )


def _ids(row) -> Tensor:
    try:
        ids = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"token ids {row!r:.60}", "texts only, or a list of ints for each example") from None
    return _integers(ids) if ids.numel() else ids.long()


def _integers(ids: Tensor) -> Tensor:
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex():
        raise InputError(f"token ids of dtype {ids.dtype}", "integers")
    return ids


def _is_text(inputs) -> bool:
    return isinstance(inputs, str) or (isinstance(inputs, (list, tuple)) and any(isinstance(i, str) for i in inputs))
