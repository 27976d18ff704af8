"""Votes: what each input element contributes to an output under a frozen linear map."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.notebook import coloured_tokens
from interp.hooks.stability import Stability
from interp.hooks.table import Rows, Table
from interp.hooks.windows import Window, WindowLike

if TYPE_CHECKING:
    from interp.hooks.tape import Constant


@dataclass(frozen=True)
class Votes(Rows):
    """How each input element votes for an output direction w: map + residual sum to <w, y>.

    Attributes:
        map: Signed votes: [pos] for tokens, [height, width] for images, else shaped like the input.
        blocks: Votes by input block: the tokens' and, where there are any, learned positions' and token types'.
        total: Sum of all votes.
        abs_total: Sum of their absolute values.
        residual: <w, r>: what constants contribute.
        value: <w, y> of the network itself.
        labels: What each entry of the map is (token strings), or None.
        target: What the votes are for.
        origin: Origin o of the input space, which votes and bias share depend on; its name.
        linearization: What was held.
        stability: How the row and its votes stand small noise; None where that was not asked for.
    """

    map: Float[Tensor, "..."] = field(repr=False)
    blocks: dict[str, Tensor] = field(repr=False)
    total: float
    abs_total: float
    residual: float
    value: float
    labels: list[str] | None = field(repr=False)
    target: str
    origin: str = "zero"
    linearization: str = ""
    stability: Stability | None = None

    @property
    def caption(self) -> str:
        """One line for a figure or a table: how far these votes can be read."""
        return "stability not tested" if self.stability is None else self.stability.caption

    def __repr__(self) -> str:
        return (
            f"Votes for {self.target}: {self.total:.4g} + residual {self.residual:.4g} = {self.value:.4g} "
            f"(bias share {self.bias_share:.0%}, votes cancel {self.cancellation:.3g}-fold)\n"
            f"{self.linearization or 'linearization not recorded'}, origin {self.origin}; {self.caption}"
            + (": votes(..., stability=True)" if self.stability is None else "")
        )

    @property
    def completeness_error(self) -> float:
        """|votes + residual - value| relative to the sum of absolute terms."""
        return abs(self.total + self.residual - self.value) / max(self.abs_total + abs(self.residual), 1e-30)

    @property
    def value_error(self) -> float:
        """|votes + residual - value| relative to the value: what cancellation leaves of the precision."""
        return abs(self.total + self.residual - self.value) / max(abs(self.value), 1e-30)

    @property
    def cancellation(self) -> float:
        """Sum of absolute votes over the absolute sum: how much votes cancel."""
        return self.abs_total / max(abs(self.total), 1e-30)

    @property
    def bias_share(self) -> float:
        """residual / value; legitimately outside [0, 1]. It depends on the origin of the input space."""
        return self.residual / self.value if self.value else float("nan")

    def top(self, k: int = 10) -> Table:
        """Return the k entries with the largest absolute votes."""
        flat = self.map.flatten()
        order = flat.abs().argsort(descending=True)[:k].tolist()
        shape = self.map.shape
        rows = []
        for i in order:
            index = tuple(int(n) for n in torch.unravel_index(torch.tensor(i), shape))
            name = {"token": self.labels[i]} if self.labels else {}
            rows.append({"index": index[0] if len(index) == 1 else index, **name, "vote": float(flat[i])})
        return Table(rows, f"votes for {self.target} ({self.caption})")

    def _repr_html_(self) -> str:
        tokens = self.labels if self.map.ndim == 1 else None
        return (coloured_tokens(tokens, self.map, repr(self)) if tokens else "") + self.top(12)._repr_html_()

    def inside(self, window: WindowLike) -> float:
        """Return the sum of the map's votes within a window: a mask of its shape, or a box of slices.

        Raises:
            ArgumentError: If the window does not fit the map.
        """
        return float(Window(window, tuple(self.map.shape), "votes").take(self.map[None]).double().sum())

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each entry of the map, then the residual."""
        rows = self.top(self.map.numel()).to_records()
        return [*rows, {"index": "residual", "vote": self.residual}]


@dataclass(frozen=True)
class BiasReport(Rows):
    """Which call put what into r, for an output direction w.

    Attributes:
        modules: Path of the module in which each constant entered.
        ops: The call that added it.
        values: Its contribution <G, c> to r · w, in float64.
        maps: Spatial map of each contribution, summed over channels ([height, width], [pos], or a scalar).
        residual: r · w.
        target: What it is for.
        origin: Origin o of the input space; its name.
        linearization: What was held.
    """

    modules: list[str]
    ops: list[str]
    values: Float[Tensor, "term"] = field(repr=False)
    maps: list[Tensor] = field(repr=False)
    residual: float
    target: str
    origin: str = "zero"
    linearization: str = ""

    @property
    def total(self) -> float:
        """The sum of all terms."""
        return float(self.values.sum())

    @property
    def completeness_error(self) -> float:
        """|sum - r · w| over the sum of absolute terms."""
        return abs(self.total - self.residual) / max(float(self.values.abs().sum()), abs(self.residual), 1e-30)

    def by_module(self) -> Table:
        """Return the terms summed by module, in execution order."""
        sums: dict[str, float] = {}
        for path, value in zip(self.modules, self.values.tolist(), strict=True):
            sums[path] = sums.get(path, 0.0) + value
        return Table(
            [{"module": p or "(the model)", "value": v} for p, v in sums.items()], f"constants in {self.target}"
        )

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each call that adds a constant."""
        return [
            {"module": m, "op": o, "value": v}
            for m, o, v in zip(self.modules, self.ops, self.values.tolist(), strict=True)
        ]

    def top(self, k: int = 10) -> Table:
        """Return the k terms with the largest absolute values."""
        rows = sorted(self.to_records(), key=lambda r: -abs(r["value"]))[:k]
        return Table(rows, f"r for {self.target} = {self.residual:.4f}")


def _spatial(product: Tensor) -> Tensor:
    """Sum over channels: of [1, channel, height, width] the second axis, else the last."""
    if product.ndim == 4:
        return product.sum((0, 1))
    # Some layers flatten batch and positions into one axis, which then is the positions.
    flat = product[0] if product.ndim > 1 and product.shape[0] == 1 else product
    return flat.sum(-1) if flat.ndim else flat


def report_biases(terms: list[tuple["Constant", Tensor]], moved: Tensor, **fields: Any) -> BiasReport:
    """Return the report of constants and the gradients at their outputs, and of what the origin adds (Fᵀ w ⊙ o)."""
    values, maps = [], []
    for constant, gradient in terms:
        value = constant.value.double().expand_as(gradient)
        if constant.value.isinf().any():  # a mask adds -inf to scores that then have no influence
            value = value.masked_fill(value.isinf() & (gradient == 0), 0.0)
        product = gradient.double() * value
        values.append(product.sum().cpu())
        maps.append(_spatial(product).float())
    modules, ops = [c.path for c, _ in terms], [c.op for c, _ in terms]
    if moved.any():
        values.append(moved.double().sum().cpu())
        maps.append(_spatial(moved[None].double()).float())
        modules.append("(origin of the input space)")
        ops.append("F o")
    stacked = torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)
    return BiasReport(modules, ops, stacked, maps, **fields)
