"""Choice between a fused kernel and torch: one short trial for each size, dtype and device, kept for the process."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

_ROUNDS = 5
_KNOWN: dict[Hashable, "Choice"] = {}


@dataclass(frozen=True)
class Choice:
    """Which way won.

    Attributes:
        tile: The kernel's tile, or None for torch.
        seconds: Of each way that was tried, by tile; None is torch. Empty where nothing was tried.
    """

    tile: Any
    seconds: dict[Any, float] = field(repr=False)

    @property
    def fused(self) -> bool:
        """Whether the kernel runs."""
        return self.tile is not None

    def __str__(self) -> str:
        if not self.seconds:
            return "scaled weights and matrix products"
        kernels = {tile: time for tile, time in self.seconds.items() if tile is not None}
        best = min(kernels, key=kernels.__getitem__)
        times = f"in a trial {kernels[best] * 1e3:.3g} ms fused ({best}), {self.seconds[None] * 1e3:.3g} ms in torch"
        return f"{'fused kernel' if self.fused else 'scaled weights and matrix products'}: {times}"


def choose(key: Hashable, candidates: Callable[[], dict[Any, Callable[[], Any]]]) -> Choice:
    """Return the fastest of some calls, by the name that each has; timed at the first call with a key."""
    if key not in _KNOWN:
        seconds = {name: _seconds(call) for name, call in candidates().items()}
        _KNOWN[key] = Choice(min(seconds, key=seconds.__getitem__), seconds)
    return _KNOWN[key]


def _seconds(call: Callable[[], Any]) -> float:
    """The best of a few runs on the GPU, after one that compiles and warms up."""
    call()
    best = float("inf")
    for _ in range(_ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return best
