"""Singular values of a block's Jacobian, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.linearization import LinearizationLike
from interp.hooks.model import Model
from interp.hooks.table import Rows, Table
from interp.jacobians.jacobian import jacobian


@dataclass(frozen=True, eq=False)
class LayerSpectra(Rows):
    """The largest singular values of the Jacobian between two sites of each block.

    Attributes:
        source: Site within the block that is moved.
        target: Site within the block that is read.
        layers: Which blocks.
        positions: Which tokens, each at source and target.
        values: [layer, position, k], largest first.
        linearization: What was held.
    """

    source: str
    target: str
    layers: list[int]
    positions: list[int]
    values: Float[Tensor, "layer position k"] = field(repr=False)
    linearization: str = ""

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each layer, position and singular value."""
        return [
            {"layer": layer, "position": p, "index": k, "value": v}
            for layer, by_position in zip(self.layers, self.values.tolist(), strict=True)
            for p, values in zip(self.positions, by_position, strict=True)
            for k, v in enumerate(values)
        ]

    def table(self) -> Table:
        """The rows as a table."""
        return Table(self.to_records(), f"singular values of {self.source} -> {self.target}, {self.linearization}")

    def _repr_html_(self) -> str:
        return self.table()[:12]._repr_html_()


def layer_spectra(
    model: Model, prompt: Any, source: str = "hook_resid_pre", target: str = "hook_resid_post", k: int = 8, *,
    positions: Sequence[int] = (-1,), layers: Sequence[int] | None = None, linearization: LinearizationLike = "exact",
) -> LayerSpectra:  # fmt: skip
    """Return the k largest singular values of d target / d source in each block, token by token.

    Args:
        model: A transformer.
        prompt: One text, or token ids.
        source: Name of a site within a block.
        target: Likewise, behind the source.
        k: How many values.
        positions: Tokens; the last by default. Each takes a dense Jacobian and its SVD at each layer.
        layers: Which blocks; all by default.
        linearization: What is held.

    Raises:
        ArgumentError: If there is more than one prompt, a layer does not exist, or the target does not depend on the
            source.
        SiteError: If the model has no such sites.
        PositionError: If a position lies outside the prompt.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> interp.layer_spectra(model, "The cat sat", k=3, layers=[0, 29]).values.shape
        torch.Size([2, 1, 3])
    """
    chosen = list(range(model.n_layers)) if layers is None else list(layers)
    batch = model.batch(prompt)
    if batch.size != 1 or not chosen or not all(0 <= layer < model.n_layers for layer in chosen):
        raise ArgumentError(f"{batch.size} prompts and layers {chosen}", f"one, and layers 0..{model.n_layers - 1}")
    places = (batch.positions(list(positions))[0] - batch.starts[0]).tolist()
    found, held = [], ""
    for layer in chosen:
        ends = (f"blocks.{layer}.{source}", f"blocks.{layer}.{target}")
        made = jacobian(model, prompt, *ends, places, reduce=f"svd:{k}", linearization=linearization)
        found.append(made.value.float().cpu())  # type: ignore[union-attr]
        held = made.linearization  # type: ignore[assignment]
    return LayerSpectra(source, target, chosen, places, torch.stack(found), str(held))
