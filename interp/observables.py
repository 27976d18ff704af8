"""Observables: linear functionals of the logits.

Source: Dunefsky & Cohan, "Observable Propagation: Uncovering Feature Vectors in Transformers", ICML 2024
(arXiv 2312.16291).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError, NonFiniteError
from interp.hooks.layouts import child
from interp.hooks.model import Model
from interp.hooks.text import token_id
from interp.hooks.weights import linear_bias, linear_weight

Token = str | int


@dataclass(frozen=True, eq=False)
class Observable:
    """A linear functional of the logits: m = n · logits, with n given by tokens and weights, or by a vector.

    Attributes:
        name: What it is called in tables.
        ids: Token ids with a weight each; empty where ``vector`` is given.
        weights: Their weights.
        vector: n itself [vocab], or None.

    Example:
        >>> import torch
        >>> Observable("a - b", (0, 1), (1.0, -1.0)).measure(torch.tensor([3.0, 1.0, 0.0])).item()
        2.0
    """

    name: str
    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    vector: Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        """Refuse an observable that is zero or not finite.

        Raises:
            ArgumentError: If n is zero.
            NonFiniteError: If n holds NaN or infinity.
        """
        values = self.vector if self.vector is not None else torch.tensor(self.weights)
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"observable {self.name!r} holds NaN or infinity", "finite weights")
        totals: dict[int, float] = {}
        for i, w in zip(self.ids, self.weights, strict=True):
            totals[i] = totals.get(i, 0.0) + w
        if not any(totals.values()) and (self.vector is None or not self.vector.any()):
            raise ArgumentError(f"observable {self.name!r} is zero", "a target that differs from the foil")

    @classmethod
    def logit(cls, model: Model, token: Token, *, name: str | None = None) -> "Observable":
        """Return the logit of one token.

        Raises:
            TokenError: If the token is not exactly one.
        """
        return cls(name or f"logit {token!r}", (token_id(model, token),), (1.0,))

    @classmethod
    def logit_diff(cls, model: Model, target: Token, foil: Token, *, name: str | None = None) -> "Observable":
        """Return the logit of ``target`` minus the logit of ``foil``.

        Raises:
            TokenError: If a token is not exactly one.
            ArgumentError: If target equals foil.
        """
        return cls(name or f"{target!r} - {foil!r}", (token_id(model, target), token_id(model, foil)), (1.0, -1.0))

    @classmethod
    def tokens(
        cls, model: Model, positive: Sequence[Token], negative: Sequence[Token] = (), *,
        weights: Sequence[float] | None = None, mean: bool = False, name: str | None = None,
    ) -> "Observable":  # fmt: skip
        """Return Σ logits of ``positive`` - Σ logits of ``negative``.

        Args:
            model: The model whose tokens are meant.
            positive: Tokens that count up.
            negative: Tokens that count down.
            weights: One weight for each token, positive ones first; ±1 by default.
            mean: Average each side instead of summing it.
            name: What it is called in tables.

        Raises:
            TokenError: If a token is not exactly one.
            ArgumentError: If there are no tokens, or the weights do not match them.
        """
        if isinstance(positive, str) or isinstance(negative, str):
            raise ArgumentError(f"a string {positive if isinstance(positive, str) else negative!r}", "a list of tokens")
        both = [*positive, *negative]
        signs = [1.0 / len(positive) if mean else 1.0] * len(positive)
        signs += [-1.0 / len(negative) if mean else -1.0] * len(negative)
        if weights is not None and (mean or len(weights) != len(both)):
            raise ArgumentError(
                f"{len(weights)} weights for {len(both)} tokens (mean={mean})", "one for each, without mean"
            )
        ids = tuple(token_id(model, t) for t in both)
        return cls(name or f"{list(positive)} - {list(negative)}", ids, tuple(weights) if weights else tuple(signs))

    @classmethod
    def from_vector(cls, vector: Any, *, name: str = "vector") -> "Observable":
        """Return m = vector · logits.

        Raises:
            ArgumentError: If the vector is not one-dimensional, or zero.
        """
        vector = torch.as_tensor(vector)
        if vector.ndim != 1:
            raise ArgumentError(f"an observable vector of shape {list(vector.shape)}", "[vocab]")
        return cls(name, vector=vector.detach().clone())

    @property
    def is_zero_sum(self) -> bool:
        """Whether m does not change when all logits of a position move by the same amount."""
        n = self.vector if self.vector is not None else torch.tensor(self.weights)
        return bool(n.sum().abs() <= 1e-6 * n.abs().sum())

    def measure(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
        """Return n · logits.

        Raises:
            ArgumentError: If the vocabulary has another size than the vector.
        """
        if self.vector is not None:
            self._check_vocab(logits.shape[-1])
            return logits @ self.vector.to(logits)
        if max(self.ids) >= logits.shape[-1]:
            raise ArgumentError(f"token id {max(self.ids)}", f"ids below {logits.shape[-1]}")
        return logits[..., list(self.ids)] @ torch.tensor(self.weights).to(logits)

    def __call__(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
        """As `measure`."""
        return self.measure(logits)

    def pull_to_stream(self, model: Model) -> tuple[Float[Tensor, "d_model"], float]:
        """Return (W_Uᵀ n, n · b_U) in float32, times the logit scale: the observable at the final norm's output.

        Token observables gather rows of W_U; a dense n is never made.

        Raises:
            ArgumentError: If the model has no unembedding, or another vocabulary.
        """
        layout = model.layout
        if layout is None or layout.unembed is None:
            raise ArgumentError(f"{type(model.module).__name__} has no unembedding", "a model with logits")
        head = child(model.module, layout.unembed)
        weight, bias = linear_weight(head, layout.unembed), linear_bias(head)  # type: ignore[arg-type]
        if self.vector is not None:
            self._check_vocab(weight.shape[0])
            n = self.vector.to(weight.device, torch.float32)
            w, offset = n @ weight.detach().float(), 0.0 if bias is None else float(n @ bias.detach().float())
        else:
            ids, n = list(self.ids), torch.tensor(self.weights, device=weight.device)
            w = n @ weight.detach()[ids].float()
            offset = 0.0 if bias is None else float(n @ bias.detach()[ids].float())
        return w * layout.logit_scale, offset * layout.logit_scale

    def _check_vocab(self, size: int) -> None:
        if self.vector is not None and len(self.vector) != size:
            raise ArgumentError(
                f"observable vector has length {len(self.vector)}", f"the model's vocabulary, {size} (unembedding rows)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data (a vector as a list)."""
        found: dict[str, Any] = {"name": self.name}
        if self.vector is not None:
            return found | {"vector": self.vector.tolist()}
        return found | {"ids": list(self.ids), "weights": list(self.weights)}
