"""The unembedding as observables see it: logits = softcap(scale · (W_U x + b_U)), and its pull-back of many at once."""

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.hooks.errors import ArgumentError
from interp.hooks.layouts import child
from interp.hooks.model import Model
from interp.hooks.weights import linear_bias, linear_weight, plain

if TYPE_CHECKING:
    from interp.observables.observable import Observable

_ROWS = 4096  # rows of W_U that are brought to float64 at a time
_CENTRED = (
    1e-4  # |mean row| over mean |row|: 1/sqrt(vocab) for weights that nobody centred, rounding for those somebody did
)
_warned: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_centred: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, int], bool]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Readout:
    """A model's unembedding.

    Attributes:
        head: The module.
        weight: W_U [vocab, d_model], in the model's dtype.
        bias: b_U [vocab], or None.
        scale: Factor on its output.
        softcap: c where the model's logits are c tanh(z/c), else None.
    """

    head: nn.Module
    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, "vocab"] | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Model) -> "Readout":
        """Return the model's readout.

        Raises:
            ArgumentError: If the model has no unembedding.
        """
        layout = model.layout
        if layout is None or layout.unembed is None:
            raise ArgumentError(f"{type(model.module).__name__} has no unembedding", "a model with logits")
        head = child(model.module, layout.unembed)
        weight, bias = linear_weight(head, layout.unembed), linear_bias(head)  # type: ignore[arg-type]
        bias = None if bias is None else bias.detach()
        return cls(plain(head), weight.detach(), bias, layout.logit_scale, layout.logit_softcap)  # type: ignore[arg-type]

    @property
    def vocab(self) -> int:
        """Number of rows of W_U."""
        return self.weight.shape[0]

    @property
    def is_centred(self) -> bool:
        """Whether the rows of W_U have mean 0, as after TransformerLens's processing: logits are then shifted.

        Read off the weights, once for each state of them: |mean row| against the mean |row|.
        """
        state = (self.weight.data_ptr(), self.weight._version)
        if self.head not in _centred or _centred[self.head][0] != state:
            _centred[self.head] = (state, self._measure_centre())
        return _centred[self.head][1]

    def _measure_centre(self) -> bool:
        total, norms = torch.zeros(self.weight.shape[1], dtype=torch.float64), 0.0
        for start in range(0, self.vocab, _ROWS):
            rows = self.weight[start : start + _ROWS].float()
            total += rows.sum(0).double().cpu()
            norms += float(rows.norm(dim=1).sum())
        return float(total.norm()) <= _CENTRED * norms

    def pull(self, observables: "Sequence[Observable]") -> tuple[Float[Tensor, "obs d_model"], Float[Tensor, "obs"]]:
        """Return (W_Uᵀ n, n · b_U) for each observable, times the scale, in float32 or better.

        Tokens gather rows of W_U; a dense n is made for vectors only. Sums run in float64 (float32 where the device has
        none): over a vocabulary, e_a - p loses four digits to float32.

        Raises:
            ArgumentError: If an observable is not of these logits.
        """
        for observable in observables:
            observable.check_logits(self.vocab)
        self._warn_where_shifted(observables)
        device = self.weight.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        w = torch.zeros(len(observables), self.weight.shape[1], dtype=dtype, device=device)
        offsets = torch.zeros(len(observables), dtype=dtype, device=device)
        self._add_tokens(observables, w, offsets)
        self._add_vectors(observables, w, offsets)
        own = torch.tensor([o.offset for o in observables], dtype=torch.float64).to(offsets)
        given = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return (w * self.scale).to(given), (offsets * self.scale + own).to(given)

    def _add_tokens(self, observables: "Sequence[Observable]", w: Tensor, offsets: Tensor) -> None:
        ids, weights, rows = sparse_rows(observables, w.device)
        for part in torch.arange(len(ids), device=w.device).split(_ROWS):
            n = weights[part].to(w)
            w.index_add_(0, rows[part], self.weight[ids[part]].to(w.dtype) * n[:, None])
            if self.bias is not None:
                offsets.index_add_(0, rows[part], self.bias[ids[part]].to(w.dtype) * n)

    def _add_vectors(self, observables: "Sequence[Observable]", w: Tensor, offsets: Tensor) -> None:
        where = [i for i, o in enumerate(observables) if o.vector is not None]
        if not where:
            return
        n = torch.stack([observables[i].vector.to(w) for i in where])  # type: ignore[union-attr]
        for start in range(0, self.vocab, _ROWS):
            w[where] += n[:, start : start + _ROWS] @ self.weight[start : start + _ROWS].to(w.dtype)
        if self.bias is not None:
            offsets[where] = n @ self.bias.to(w.dtype)

    def _warn_where_shifted(self, observables: "Sequence[Observable]") -> None:
        """Say once for each model that its logits are not the original's, where an observable would see it."""
        seen = [o for o in observables if not o.is_zero_sum]
        if not seen or self.head in _warned or not self.is_centred:
            return
        _warned.add(self.head)
        warnings.warn(
            f"observable {seen[0].name!r} has n.sum() = {seen[0].weight_sum:.4g}, and the unembedding of this model is "
            "centred: its logits differ from the original model's by a constant c for each position, and n·logits by "
            "c·n.sum(). A zero-sum observable, such as Observable.logit_diff, is the same in both.",
            stacklevel=5,
        )


def sparse_rows(observables: "Sequence[Observable]", device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids, weights, row) of all token terms, [term] each, weights in float64 where the device has it."""
    terms = [
        (i, w, row)
        for row, o in enumerate(observables)
        for i, w in zip(o.ids, o.weights, strict=True)
    ]  # fmt: skip
    ids, weights, rows = zip(*terms, strict=True) if terms else ((), (), ())
    weight_dtype = torch.float32 if device.type == "mps" else torch.float64
    return (
        torch.tensor(ids, dtype=torch.long, device=device),
        torch.tensor(weights, dtype=weight_dtype, device=device),
        torch.tensor(rows, dtype=torch.long, device=device),
    )
