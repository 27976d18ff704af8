"""Votes: what each input element contributes to an output under a frozen linear map."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.table import Table


@dataclass(frozen=True)
class Votes:
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
    """

    map: Float[Tensor, "..."] = field(repr=False)
    blocks: dict[str, Tensor] = field(repr=False)
    total: float
    abs_total: float
    residual: float
    value: float
    labels: list[str] | None = field(repr=False)
    target: str

    @property
    def completeness_error(self) -> float:
        """|votes + residual - value| relative to the sum of absolute terms."""
        return abs(self.total + self.residual - self.value) / max(self.abs_total + abs(self.residual), 1e-30)

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
        return Table(rows, f"votes for {self.target}")

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each entry of the map, then the residual."""
        rows = self.top(self.map.numel()).to_records()
        return [*rows, {"index": "residual", "vote": self.residual}]
