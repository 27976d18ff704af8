"""Attention patterns of one layer: how much each head looks from each token at each earlier one."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.interventions import PlanLike
from interp.hooks.model import Model
from interp.hooks.notebook import small_maps
from interp.hooks.table import Rows, Table


@dataclass(frozen=True, eq=False)
class AttentionPatterns(Rows):
    """Patterns of one layer for one prompt: softmax weights, each row of a head sums to 1.

    Attributes:
        layer: Which block.
        tokens: The prompt's tokens.
        pattern: [head, destination, source].
    """

    layer: int
    tokens: list[str]
    pattern: Float[Tensor, "head destination source"] = field(repr=False)

    def to_records(self, head: int | None = None) -> list[dict[str, Any]]:
        """One row for each head, destination and source with a weight above 0.

        Args:
            head: Of this head alone.

        Raises:
            ArgumentError: If there is no such head.
        """
        heads = range(len(self.pattern)) if head is None else [self.check_head(head)]
        return [
            {
                "layer": self.layer, "head": h, "destination": t, "source": s, "to": self.tokens[t],
                "from": self.tokens[s], "weight": weight,
            }
            for h in heads
            for t, row in enumerate(self.pattern[h].tolist())
            for s, weight in enumerate(row)
            if weight > 0
        ]  # fmt: skip

    def check_head(self, head: int) -> int:
        """Return the head's index.

        Raises:
            ArgumentError: If there is no such head.
        """
        if not 0 <= head < len(self.pattern):
            raise ArgumentError(f"head {head} of layer {self.layer}", f"heads 0..{len(self.pattern) - 1}")
        return head

    def top(self, k: int = 10, *, position: int = -1) -> Table:
        """Return the k largest weights with which any head looks from one position."""
        at = range(len(self.tokens))[position]
        flat = self.pattern[:, at].flatten()
        order = flat.argsort(descending=True, stable=True)[:k].tolist()
        places = [divmod(i, len(self.tokens)) for i in order]
        rows = [
            {
                "head": f"L{self.layer}H{h}",
                "source": s,
                "token": self.tokens[s],
                "weight": float(self.pattern[h, at, s]),
            }
            for h, s in places
        ]
        return Table(rows, f"layer {self.layer}, from {self.tokens[at]!r} (position {at})")

    def _repr_html_(self) -> str:
        names = [f"L{self.layer}H{head}" for head in range(len(self.pattern))]
        return small_maps(self.pattern, names) + self.top()._repr_html_()


@torch.no_grad()
def attention_patterns(model: Model, prompt: Any, layer: int, *, plan: PlanLike = ()) -> AttentionPatterns:
    """Return the attention patterns of all heads of one layer for one prompt, in float32.

    Args:
        model: A transformer whose patterns can be captured; it runs with eager attention.
        prompt: One text, or token ids.
        layer: Which block.
        plan: Interventions under which the model runs.

    Raises:
        ArgumentError: If there is more than one prompt, or no such layer.
        SiteError: If the model has no attention patterns.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> found = interp.attention_patterns(model, "The cat sat on the mat", layer=3)
        >>> found.pattern.shape, bool((found.pattern.sum(-1) - 1).abs().max() < 1e-5)
        (torch.Size([9, 6, 6]), True)
    """
    if not 0 <= layer < model.n_layers:
        raise ArgumentError(f"layer {layer}", f"layers 0..{model.n_layers - 1}")
    batch = model.batch(prompt)
    if batch.size != 1:
        raise ArgumentError(f"{batch.size} prompts", "one")
    site = f"blocks.{layer}.attn.hook_pattern"
    pattern = model.capture(batch, site, plan=plan)[site][0].float().cpu()
    ids = [] if batch.ids is None else batch.ids[0].tolist()
    words = [model.tokenizer.decode([i]) for i in ids] if model.tokenizer is not None else [str(i) for i in ids]
    return AttentionPatterns(layer, words or [str(i) for i in range(pattern.shape[-1])], pattern)
