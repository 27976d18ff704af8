"""How far to trust a row: what small noise, and other rounding, do to F.

F jumps where a unit changes its decision, while F x + r does not: a row that is not stable shows texture of the
decisions, not of the network's function.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.frozen import FrozenNetwork
from interp.hooks.table import Table

if TYPE_CHECKING:
    from interp.hooks.linear_scope import LinearScope
    from interp.hooks.tape import Entry


@dataclass(frozen=True)
class Stability:
    """Rows and decisions around a reference, against those at it.

    Attributes:
        noise: Size of the noise relative to the input's norm.
        cosines: Cosine of the row at each noisy input with the row at the reference [sample].
        flips: Share of unit decisions that changed at each noisy input [sample].
        float64_cosine: Cosine of the row in float64 with the row in the model's dtype, or None.
        float64_flips: Share of unit decisions that differ in float64, or None.
        target: What the row is for.
    """

    noise: float
    cosines: Float[Tensor, "sample"] = field(repr=False)
    flips: Float[Tensor, "sample"] = field(repr=False)
    float64_cosine: float | None
    float64_flips: float | None
    target: str

    @property
    def mean_cosine(self) -> float:
        """Mean over the noisy inputs."""
        return float(self.cosines.mean())

    @property
    def mean_flips(self) -> float:
        """Mean over the noisy inputs."""
        return float(self.flips.mean())

    def to_records(self) -> list[dict[str, Any]]:
        """One row for the noise, one for the precision."""
        rows = [{"change": f"noise {self.noise:g}", "row cosine": self.mean_cosine, "unit flips": self.mean_flips}]
        if self.float64_cosine is not None:
            rows.append({"change": "float64", "row cosine": self.float64_cosine, "unit flips": self.float64_flips})
        return rows

    def table(self) -> Table:
        """The rows as a table."""
        return Table(self.to_records(), f"stability of the row for {self.target}")


def stability(
    scope: "LinearScope", w: Tensor, target: str, noise: float, samples: int, float64: bool, seed: int
) -> Stability:
    """Return what noise of a relative size, and float64, do to the row Fᵀ w.

    Raises:
        ArgumentError: If noise or samples are not positive.
    """
    if noise <= 0 or samples < 1:
        raise ArgumentError(f"noise={noise} and samples={samples}", "both positive")
    network, block = scope.network, next(iter(scope.blocks))
    row = network.pull(block, w[None])[0]
    made = torch.Generator().manual_seed(seed)
    cosines, flips = [], []
    for _ in range(samples):
        values = {}
        for name, value in network.values.items():
            step = torch.randn(value.shape, generator=made).to(value)
            values[name] = value + noise * value.norm() / step.norm() * step
        moved = FrozenNetwork(scope.model, scope.batch, network.held, network.select, values)
        cosines.append(_cosine(moved.pull(block, w[None])[0], row))
        flips.append(flipped(network.entries, moved.entries))
    exact = _in_float64(scope) if float64 else None
    return Stability(
        noise=noise, cosines=torch.tensor(cosines), flips=torch.tensor(flips),
        float64_cosine=None if exact is None else _cosine(exact.pull(block, w[None].double())[0], row),
        float64_flips=None if exact is None else flipped(network.entries, exact.entries), target=target,
    )  # fmt: skip


def flipped(here: "list[Entry]", there: "list[Entry]") -> float:
    """Return the share of element-wise units whose tangent slope differs between two tapes of one network."""
    changed = total = 0
    for one, two in zip(here, there, strict=True):
        if one.mode == "tangent" and isinstance(one.held, tuple):
            differs = one.held[0] != two.held[0].to(one.held[0])
            changed, total = changed + int(differs.sum()), total + differs.numel()
    return changed / total if total else 0.0


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
