"""Memory budgets: what a user may write, how much live values take, and products that are made in chunks that fit."""

import re
import time
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from interp.hooks.calls import tensors
from interp.hooks.errors import ArgumentError, SizeError

_PREFIXES = ("", "k", "m", "g", "t")
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b\s*", re.IGNORECASE)

Chunk = int | Literal["auto"]

# Sizes that `auto` compares: one by one against a few at once, and what it takes where a few at once are faster.
_SINGLES, _FEW, _MANY = 2, 4, 16


def bytes_of(budget: int | str) -> int:
    """Return a budget in bytes: an int as it is, or a text such as ``"2GiB"``, ``"512 MiB"``, ``"1.5GB"``.

    Raises:
        ArgumentError: If it is not a positive number of bytes.

    Example:
        >>> bytes_of("2GiB"), bytes_of("1.5kB"), bytes_of(64)
        (2147483648, 1500, 64)
    """
    needed = "a positive number of bytes, or a text such as '2GiB', '512MiB', '1.5GB'"
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise ArgumentError(f"budget={budget!r}", needed)
    if isinstance(budget, str):
        found = _TEXT.fullmatch(budget)
        if found is None:
            raise ArgumentError(f"budget={budget!r}", needed)
        number, prefix, binary = found.groups()
        budget = int(float(number) * (1024 if binary else 1000) ** _PREFIXES.index(prefix.lower()))
    if budget <= 0:
        raise ArgumentError(f"budget={budget!r}", needed)
    return budget


class Meter:
    """How many bytes of results are alive at once.

    Attributes:
        peak: The most that were alive at one time.
        largest: The largest single result.
    """

    def __init__(self):
        self.now = self.peak = self.largest = 0

    def see(self, value: Any) -> None:
        """Count the tensors in a value that own their memory, for as long as they live."""
        for t in tensors(value):
            if t._base is None and not hasattr(t, "_interp_metered"):
                t._interp_metered = True  # type: ignore[attr-defined]
                self.now += t.nbytes
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, t.nbytes)
                weakref.finalize(t, self._gone, t.nbytes).atexit = False

    def _gone(self, size: int) -> None:
        self.now -= size


class Chunked:
    """A product with any number of probes, made in chunks that fit a budget.

    ``auto`` times a few probes one by one against a few at once, the first time that there are enough of them, and
    keeps the faster. The chunk changes a result by rounding only.

    Args:
        apply: Probes [n, ...] -> results [n, ...].
        bytes_each: Memory that one probe takes.
        budget: Bytes that a chunk may take.
        chunk: How many probes at once, or ``auto``; never more than fit.
        what: What is made, for messages.

    Raises:
        ArgumentError: If the chunk is no positive number.
        SizeError: If the budget is too small for one probe.
    """

    def __init__(
        self, apply: Callable[[Tensor], Tensor], bytes_each: int, budget: int, chunk: Chunk, what: str = "a product"
    ):
        self.apply, self.bytes_each, self.budget = apply, max(1, bytes_each), budget
        self.chunk: Chunk = _checked(chunk)
        if self.bytes_each > budget:
            raise SizeError(
                f"a budget of {budget:,} bytes", f"{self.bytes_each:,} bytes for one probe of {what}",
                "raise budget=, or scope a smaller part of the network with output=",
            )  # fmt: skip
        self._singles: list[float] = []  # seconds; the first is a warm-up
        self._chosen: int | None = None

    @property
    def most(self) -> int:
        """How many probes fit the budget."""
        return self.budget // self.bytes_each

    def __call__(self, probes: Tensor) -> Tensor:
        """Return the product with probes [n, ...]."""
        return self.over(len(probes), lambda some: probes[some])

    def over(self, n: int, probes: Callable[[slice], Tensor], chunk: Chunk | None = None) -> Tensor:
        """Return the product with n probes, each chunk of them made when it is needed."""
        fixed = self.chunk if chunk is None else _checked(chunk)
        out, start = None, 0
        while out is None or start < n:
            size = min(fixed if isinstance(fixed, int) else self._size(n - start), self.most)
            some = slice(start, min(start + size, n))
            part = self._timed(probes(some), fixed == "auto")
            if some.stop - start == n:
                return part
            out = part.new_empty(n, *part.shape[1:]) if out is None else out
            out[some] = part
            start = some.stop
        return out

    def _size(self, left: int) -> int:
        """The next chunk: what was chosen; else sizes to time, while enough probes are left to be worth it."""
        if self._chosen is not None:
            return self._chosen
        if left < _SINGLES + _FEW and not self._singles:
            return left
        return 1 if len(self._singles) < _SINGLES else _FEW

    def _timed(self, probes: Tensor, auto: bool) -> Tensor:
        start = _now(probes)
        part = self.apply(probes)
        if auto and self._chosen is None:
            self._note(len(probes), (_now(part) - start) / max(1, len(probes)))
        return part

    def _note(self, size: int, each: float) -> None:
        """Write down the time of a probe alone; choose, once there is that of a few at once."""
        if size == 1 and len(self._singles) < _SINGLES:
            self._singles.append(each)
        elif size == min(_FEW, self.most) and len(self._singles) == _SINGLES:
            self._chosen = _MANY if each < self._singles[-1] else 1


def _checked(chunk: Chunk) -> Chunk:
    if chunk != "auto" and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ArgumentError(f"chunk={chunk!r}", "a positive number, or 'auto'")
    return chunk


def _now(like: Tensor) -> float:
    """The time when everything that was asked of the tensor's device is done."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
