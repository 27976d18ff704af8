"""How far to trust a row: what small noise, and other rounding, do to F.

F jumps where a unit changes its decision, while F x + r does not: a row that is not stable shows texture of the
decisions, not of the network's function.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.frozen import FrozenNetwork
from interp.hooks.table import Rows, Table
from interp.hooks.windows import pool

if TYPE_CHECKING:
    from interp.hooks.linear_scope import LinearScope
    from interp.hooks.tape import Entry


NOISE, CELL = 0.01, 8


@dataclass(frozen=True)
class Stability(Rows):
    """Rows, votes and decisions around a reference, against those at it.

    Attributes:
        noise: Size of the noise relative to the input's norm (of the first block).
        cosines: Cosine of the row at each noisy input with the row at the reference [sample].
        votes: Cosine of the votes at each noisy input with the votes at the reference [sample].
        cells: The same for votes summed over cells of a picture; for other inputs as ``votes`` [sample].
        flips: Share of unit decisions that changed at each noisy input [sample].
        float64_cosine: Cosine of the row in float64 with the row in the model's dtype, or None.
        float64_flips: Share of unit decisions that differ in float64, or None.
        target: What the row is for.
        cell: Side of a cell in pixels, or None where the input is no picture.
        noise_std: Standard deviation of the noise in input units where it was given so, or None.
        linearization: What was held.
    """

    noise: float
    cosines: Float[Tensor, "sample"] = field(repr=False)
    votes: Float[Tensor, "sample"] = field(repr=False)
    cells: Float[Tensor, "sample"] = field(repr=False)
    flips: Float[Tensor, "sample"] = field(repr=False)
    float64_cosine: float | None
    float64_flips: float | None
    target: str
    cell: int | None = None
    noise_std: float | None = None
    linearization: str = ""

    @property
    def mean_cosine(self) -> float:
        """Mean over the noisy inputs."""
        return float(self.cosines.mean())

    @property
    def mean_flips(self) -> float:
        """Mean over the noisy inputs."""
        return float(self.flips.mean())

    @property
    def caption(self) -> str:
        """One line: what noise and float64 do to the row, to its votes and to the decisions."""
        cells = "" if self.cell is None else f", of votes in cells of {self.cell} {float(self.cells.mean()):.3f}"
        text = (
            f"under {self._change}: cosine of the row {self.mean_cosine:.3f}, of votes {float(self.votes.mean()):.3f}"
        )
        text += f"{cells}{_flips_text(self.mean_flips)}"
        if self.float64_cosine is not None and self.float64_flips is not None:
            text += f"; in float64: row {self.float64_cosine:.4f}{_flips_text(self.float64_flips)}"
        return text

    @property
    def _change(self) -> str:
        return f"noise {self.noise:.3g}" + ("" if self.noise_std is None else f" (deviation {self.noise_std:.3g})")

    def to_records(self) -> list[dict[str, Any]]:
        """One row for the noise, one for the precision."""
        row = {"change": self._change, "row cosine": self.mean_cosine, "votes cosine": float(self.votes.mean())}
        if self.cell is not None:
            row["cells cosine"] = float(self.cells.mean())
        rows = [{**row, "unit flips": self.mean_flips}]
        if self.float64_cosine is not None:
            rows.append({"change": "float64", "row cosine": self.float64_cosine, "unit flips": self.float64_flips})
        return rows

    def table(self) -> Table:
        """The rows as a table."""
        return Table(self.to_records(), f"stability of the row for {self.target}")


def stability(
    scope: "LinearScope", w: Tensor, target: str, *, noise: float | None, noise_std: float | None, samples: int,
    float64: bool, cell: int, seed: int,
) -> Stability:  # fmt: skip
    """Return what noise of a relative size or of a deviation, and float64, do to the row Fᵀ w and to its votes.

    Raises:
        ArgumentError: If noise or samples are not positive, or both sizes of noise are given.
    """
    if (noise is None) == (noise_std is None):
        raise ArgumentError(f"noise={noise} and noise_std={noise_std}", "one of them", "the other is None")
    if not (noise if noise_std is None else noise_std) > 0 or samples < 1 or cell < 1:  # type: ignore[operator]
        given = f"noise={noise}, noise_std={noise_std}, samples={samples}, cell={cell}"
        raise ArgumentError(given, "all positive")
    network, block = scope.network, next(iter(scope.blocks))
    here = network.values[block]
    row = network.pull(block, w[None])[0]
    votes = scope.reduce(row * (here - scope.origin)[0])
    made = torch.Generator().manual_seed(seed)
    found: list[tuple[float, ...]] = []
    for _ in range(samples):
        values = {name: _noisy(value, noise, noise_std, made) for name, value in network.values.items()}
        moved = FrozenNetwork(scope.model, scope.batch, network.held, network.select, values, network.dtype)
        other = moved.pull(block, w[None])[0]
        their = scope.reduce(other * (values[block] - scope.origin)[0])
        cells = [pool(v, cell) if here.ndim == 4 else v for v in (votes, their)]
        found.append((
            _cosine(other, row), _cosine(their, votes), _cosine(*cells), flipped(network.entries, moved.entries),
            float((values[block] - here).norm() / here.norm().clamp(min=1e-30)),
        ))  # fmt: skip
    cosines, of_votes, of_cells, flips, sizes = torch.tensor(found).T
    exact = _in_float64(scope) if float64 else None
    return Stability(
        noise=float(sizes.mean()) if noise is None else noise, noise_std=noise_std, cosines=cosines, votes=of_votes,
        cells=of_cells, flips=flips, target=target, cell=cell if here.ndim == 4 else None,
        float64_cosine=None if exact is None else _cosine(exact.pull(block, w[None].double())[0], row),
        float64_flips=None if exact is None else flipped(network.entries, exact.entries),
        linearization=network.held.name,
    )  # fmt: skip


def _flips_text(share: float) -> str:
    return "" if math.isnan(share) else f", {share:.2%} of units flip"


def _noisy(value: Tensor, noise: float | None, noise_std: float | None, made: torch.Generator) -> Tensor:
    """The value with noise of a norm relative to its own, or of a standard deviation."""
    step = torch.randn(value.shape, generator=made).to(value)
    if noise_std is not None:
        return value + noise_std * step
    return value + (noise or 0.0) * value.norm() / step.norm() * step


def flipped(here: "list[Entry]", there: "list[Entry]") -> float:
    """Return the share of element-wise units whose tangent slope differs between two tapes of one network.

    Not a number where the network has no unit with a tangent: smooth gates under ``frozen`` do not flip.
    """
    changed = total = 0
    for one, two in zip(here, there, strict=True):
        if one.mode == "tangent" and isinstance(one.held, tuple):
            differs = one.held[0] != two.held[0].to(one.held[0])
            changed, total = changed + int(differs.sum()), total + differs.numel()
    return changed / total if total else float("nan")


def _in_float64(scope: "LinearScope") -> FrozenNetwork:
    """The same reference in a float64 copy of the model (norms that cast to float32 stay so)."""
    from interp.hooks.attach import attach

    module = copy.deepcopy(scope.model.module).double()
    model = attach(module, layout=scope.model.layout or "modules", check=False)
    wide = lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
    batch = replace(
        scope.batch, args=tuple(map(wide, scope.batch.args)), kwargs={k: wide(v) for k, v in scope.batch.kwargs.items()}
    )
    values = {name: value.double() for name, value in scope.network.values.items()}
    return FrozenNetwork(model, batch, scope.network.held, scope.network.select, values)


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))
