"""Plan: how Jacobians will be computed and what that costs, before it is done; memory budgets."""

import time
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch

from interp.hooks.errors import SizeError
from interp.hooks.table import Rows

# Of a budget, the part that probes may use: results, weights in the working dtype and copies take the rest.
_FOR_PROBES = 0.25
_MOST_PROBES = 256


@dataclass(frozen=True)
class Plan(Rows):
    """How a batch of Jacobians is computed.

    Attributes:
        method: In words.
        shape: [maps, outputs, inputs] of the whole result; outputs and inputs of the largest map.
        flops: Of the dense result.
        result_bytes: Of the dense result.
        scratch_bytes: Beyond the result.
        budget: Bytes that result and scratch may take.
        maps: How many matrices one chunk holds.
        probes: How many rows or columns run at once.
        seconds: Predicted, from the speed of one matrix product here.
        precision: Of sums and products.
        check: Largest relative error against autograd in the self-check, or None where there was none.
        notes: What else to know: why no closed form was used.
    """

    method: str
    shape: tuple[int, int, int]
    flops: float
    result_bytes: int
    scratch_bytes: int
    budget: int
    maps: int
    probes: int
    seconds: float
    precision: str
    check: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_records(self) -> list[dict[str, Any]]:
        """One row."""
        return [asdict(self)]

    def __str__(self) -> str:
        n, rows, columns = self.shape
        error = "not checked" if self.check is None else f"self-check {self.check:.1e}"
        lines = [
            f"{n} Jacobians {rows} x {columns} by {self.method}, {self.precision}, {error}",
            f"{self.flops:.3g} flop, about {self.seconds:.2g} s; result {readable(self.result_bytes)}, scratch "
            f"{readable(self.scratch_bytes)}, budget {readable(self.budget)}",
            f"chunks of {self.maps} maps, {self.probes} probes at once",
        ]
        return "\n".join([*lines, *self.notes])


def readable(size: float | int) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def probes_within(budget: int, bytes_each: int) -> int:
    """Return how many probes fit the part of a budget that is theirs.

    Raises:
        SizeError: If not even one does.
    """
    if bytes_each > budget:
        raise SizeError(
            f"one row needs about {readable(bytes_each)}, the budget is {readable(budget)}",
            f"budget={int(bytes_each) + 1} or more",
            "shorten the input, name one target position, or choose sites that are nearer to each other",
        )
    return max(1, min(_MOST_PROBES, int(_FOR_PROBES * budget / max(bytes_each, 1))))


def refuse_large(needed: int, budget: int, maps: int, rows: int, columns: int) -> None:
    """Refuse a dense result that the budget cannot hold, with the smallest remedies.

    Raises:
        SizeError: With the bytes that it needs.
    """
    if needed <= budget:
        return
    few = max(1, int(rows * budget / needed))
    kept = f"keep {few} of {rows} rows (rows=)" if maps * columns * 4 <= budget else "keep fewer positions (positions=)"
    raise SizeError(
        f"{maps} Jacobians {rows} x {columns} need {needed:,} bytes ({readable(needed)}), the budget is "
        f"{readable(budget)}",
        f"budget={needed} or more",
        f"or iterate over the chunks; or reduce= what you need of them (mean, norm, gram, trace, svd:k); or {kept}",
    )


@cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Flops per second of one matrix product here, measured once."""
    a = torch.randn(384, 384, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, a)
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        best = min(best, time.perf_counter() - start)
    return 2 * 384**3 / best
