"""Views: how a site's tensor lies inside what a module takes or gives.

`get` reads the site out of the base tensor; `put` returns the base with the site replaced. ``given`` is the
module's input, which norm views need and in which they note their edits. Shapes: base [batch, pos, width]; sites as
`sites` lists them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from interp.hooks.errors import SiteError
from interp.hooks.weights import Norm


@dataclass
class Given:
    """What a module was given in one call; for a norm also the divisor and the normalised value that edits put."""

    x: Tensor
    scale: Tensor | None = None
    normalized: Tensor | None = None


@runtime_checkable
class View(Protocol):
    """A two-way window on a base tensor."""

    def get(self, base: Any, given: Given | None) -> Any:
        """The site's tensor."""
        ...

    def put(self, base: Any, new: Tensor, given: Given | None) -> Any:
        """The base with the site replaced."""
        ...


@dataclass(frozen=True)
class Whole:
    """The base itself."""

    def get(self, base, given):
        """The base."""
        return base

    def put(self, base, new, given):
        """The new tensor."""
        return new


@dataclass(frozen=True)
class Scaled:
    """A branch that the block multiplies by a constant before it adds it."""

    factor: float

    def get(self, base, given):
        """What is added to the stream."""
        return base * self.factor

    def put(self, base, new, given):
        """The branch whose multiple is ``new``."""
        return new / self.factor


@dataclass(frozen=True)
class Heads:
    """Columns start:start+n·d of the base, cut into n heads of width d."""

    n: int
    d: int
    start: int = 0

    def get(self, base, given):
        """[batch, pos, n, d]."""
        return base[..., self.start : self.start + self.n * self.d].unflatten(-1, (self.n, self.d))

    def put(self, base, new, given):
        """The base with these columns replaced."""
        base = base.clone()
        base[..., self.start : self.start + self.n * self.d] = new.flatten(-2)
        return base


@dataclass(frozen=True)
class Interleaved:
    """Part ``index`` (0 q, 1 k, 2 v) of a fused projection whose columns are [head, 3, d]."""

    n: int
    d: int
    index: int

    def get(self, base, given):
        """[batch, pos, n, d]."""
        return base.unflatten(-1, (self.n, 3, self.d))[..., self.index, :]

    def put(self, base, new, given):
        """The base with this part replaced."""
        base = base.clone()
        base.unflatten(-1, (self.n, 3, self.d))[..., self.index, :] = new
        return base


@dataclass(frozen=True)
class Columns:
    """Columns start:stop of the base."""

    start: int
    stop: int

    def get(self, base, given):
        """[batch, pos, stop - start]."""
        return base[..., self.start : self.stop]

    def put(self, base, new, given):
        """The base with these columns replaced."""
        base = base.clone()
        base[..., self.start : self.stop] = new
        return base


@dataclass(frozen=True)
class NormScale:
    """The divisor r(x) of a norm."""

    norm: Norm

    def get(self, base, given):
        """[batch, pos, 1]."""
        return self.norm.scale(given.x) if given.scale is None else given.scale

    def put(self, base, new, given):
        """The norm's output under another divisor."""
        given.scale = new
        return self.norm.finish(self.norm.centre(given.x) / new).to(base.dtype)


@dataclass(frozen=True)
class NormNormalized:
    """P x / r(x): the norm's output before its gain."""

    norm: Norm

    def get(self, base, given):
        """[batch, pos, d]."""
        scale = self.norm.scale(given.x) if given.scale is None else given.scale
        return self.norm.centre(given.x) / scale if given.normalized is None else given.normalized

    def put(self, base, new, given):
        """The norm's output for another normalised input."""
        given.normalized = new
        return self.norm.finish(new).to(base.dtype)


@dataclass(frozen=True)
class GroupedKeys:
    """Keys as the scores see them, [batch, H, d, key], read as [batch, key, K, d] without the repetition."""

    n_kv: int

    def get(self, base, given):
        """[batch, key, K, d]."""
        repeats = base.shape[1] // self.n_kv
        return base[:, ::repeats].permute(0, 3, 1, 2)

    def put(self, base, new, given):
        """The repeated keys."""
        repeats = base.shape[1] // self.n_kv
        return new.permute(0, 2, 3, 1).repeat_interleave(repeats, dim=1)


@dataclass(frozen=True)
class Queries:
    """Queries as the scores see them, [batch, H, pos, d], read as [batch, pos, H, d]."""

    def get(self, base, given):
        """[batch, pos, H, d]."""
        return base.transpose(1, 2)

    def put(self, base, new, given):
        """[batch, H, pos, d]."""
        return new.transpose(1, 2)


@dataclass(frozen=True)
class Selected:
    """What a module gives, narrowed by keys into tuples and mappings."""

    keys: tuple[int | str, ...]

    def get(self, base, given):
        """The selected value."""
        for key in self.keys:
            if not _has(base, key):
                raise SiteError(f"output selector [{key}] on {_describe(base)}", _keys(base))
            base = base[key]
        if not isinstance(base, Tensor):
            raise SiteError(f"a module output that is {_describe(base)}", _keys(base), "add a selector to the site")
        return base

    def put(self, base, new, given):
        """The output, in its own form, with the selected value replaced."""
        return _replaced(base, self.keys, new)


@dataclass(frozen=True)
class Argument:
    """What a module is given: its first tensor, or the argument that a key names (an index or a keyword)."""

    keys: tuple[int | str, ...]

    def get(self, base, given):
        """The selected argument."""
        return Selected(self.keys[1:]).get(self._side(base)[self._key(base)], None)

    def put(self, base, new, given):
        """(args, kwargs) with the argument replaced."""
        key = self._key(base)
        new = _replaced(self._side(base)[key], self.keys[1:], new)
        args, kwargs = base
        return (args, kwargs | {key: new}) if isinstance(key, str) else (_replaced(args, (key,), new), kwargs)

    def _key(self, base):
        args, kwargs = base
        if self.keys:
            key = self.keys[0]
            if (key not in kwargs) if isinstance(key, str) else (not _has(args, key)):
                raise SiteError(f"input selector [{key}]", f"an index below {len(args)} or one of {sorted(kwargs)}")
            return key
        for key, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, Tensor):
                return key
        raise SiteError("a module called without a tensor", "a module that takes one")

    def _side(self, base):
        return base[1] if isinstance(self._key(base), str) else base[0]


def _has(base, key) -> bool:
    if isinstance(base, Mapping):
        return key in base
    return isinstance(base, (tuple, list)) and isinstance(key, int) and -len(base) <= key < len(base)


def _describe(base) -> str:
    return f"a {type(base).__name__}"


def _keys(base) -> str:
    if isinstance(base, Mapping):
        return f"one of the keys {', '.join(map(str, base))}"
    return f"an index below {len(base)}" if isinstance(base, (tuple, list)) else "no selector on a tensor"


def _replaced(base, keys, new):
    if not keys:
        return new
    inner = _replaced(base[keys[0]], keys[1:], new)
    if isinstance(base, Mapping):
        return type(base)(**{**base, keys[0]: inner})
    items = list(base)
    items[keys[0]] = inner
    return type(base)(*items) if hasattr(base, "_fields") else type(base)(items)


def first_tensor(value):
    """The tensor that a module's output carries first: itself, or item 0 of a tuple."""
    return value[0] if isinstance(value, (tuple, list)) else value


def with_first(value, new: Tensor):
    """The module's output, in its own form, with the first tensor replaced."""
    if isinstance(value, tuple):
        return (new, *value[1:])
    if isinstance(value, list):
        return [new, *value[1:]]
    return new


def cast(new: Tensor, like: Tensor) -> Tensor:
    """``new`` on the device and in the dtype of ``like``."""
    return new.to(device=like.device, dtype=like.dtype) if isinstance(new, Tensor) else torch.as_tensor(new).to(like)
