"""Norms, cosines and couplings of the data-free feature vectors of every head, without making those vectors.

The vector of head h is y = D W_Vᵀ a with a = W_O P (γ_f ⊙ W_Uᵀ n) and D the gain and centring of the norm in front, so
y · y' = aᵀ (W_V D² W_Vᵀ) a': one Gram matrix [d_head, d_head] for each key/value head serves all observables.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.direct import read_observables
from interp.attribution.units import check_readout
from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.hooks.table import Rows, Table
from interp.propagation.feature_vectors import ZeroVectorWarning
from interp.propagation.reference import Weights
from interp.propagation.stages import pull_gain


@dataclass(frozen=True, eq=False)
class HeadNorms(Rows):
    """Norms of observables' feature vectors at each head, and what is needed for products of any two.

    A norm is the standard deviation of the score on an input of independent standard normal components: a ranking
    without data. A head with a large vector may never attend to what carries the feature.

    Attributes:
        observables: Names.
        norms: [obs, layer, head], of the vector that reads the head's normalised input.
        readers: a [obs, layer, head, d_head].
        grams: [layer, kv_head, d_head, d_head].
        starts: Products of the observables' vectors at the final norm's output [obs, obs].
    """

    observables: list[str]
    norms: Float[Tensor, "obs layer head"] = field(repr=False)
    readers: Float[Tensor, "obs layer head d_head"] = field(repr=False)
    grams: Float[Tensor, "layer kv_head d_head d_head"] = field(repr=False)
    starts: Float[Tensor, "obs obs"] = field(repr=False)

    def inner(self, f: int | str, g: int | str) -> Float[Tensor, "layer head"]:
        """Products of two observables' vectors, for every head."""
        return _products(self.readers[self.index(f)], self.grams, self.readers[self.index(g)])

    def cosine(self, f: int | str, g: int | str) -> Float[Tensor, "layer head"]:
        """Cosines of two observables' vectors, for every head; NaN with a warning where one is zero.

        They tell something only against `start_cosine` and a control observable.
        """
        return self._ratio(self.inner(f, g), self.norms[self.index(f)] * self.norms[self.index(g)], "a cosine")

    def coupling(self, f: int | str, g: int | str) -> Float[Tensor, "layer head"]:
        """C(f -> g) = f · g / ‖f‖² for every head; NaN with a warning where f is zero."""
        return self._ratio(self.inner(f, g), self.norms[self.index(f)].square(), "a coupling")

    def start_cosine(self, f: int | str, g: int | str) -> float:
        """Cosine of what was pulled back: the observables' vectors at the final norm's output."""
        i, j = self.index(f), self.index(g)
        return float(self._ratio(self.starts[i, j], (self.starts[i, i] * self.starts[j, j]).sqrt(), "a cosine"))

    @staticmethod
    def _ratio(top: Tensor, bottom: Tensor, what: str) -> Tensor:
        if (bottom == 0).any():
            warnings.warn(f"{what} with a vector of norm zero is NaN", ZeroVectorWarning, stacklevel=3)
        return torch.where(bottom == 0, torch.nan, top / bottom)

    def index(self, observable: int | str) -> int:
        """Place of an observable that is given by its name or place.

        Raises:
            ArgumentError: If there is none.
        """
        if isinstance(observable, str) and self.observables.count(observable) == 1:
            return self.observables.index(observable)
        if isinstance(observable, int) and 0 <= observable < len(self.observables):
            return observable
        raise ArgumentError(f"observable {observable!r}", f"one of {self.observables[:10]}, or its index")

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each observable and head."""
        return [
            {"observable": name, "component": f"L{layer}H{head}", "layer": layer, "head": head, "norm": value}
            for name, layers in zip(self.observables, self.norms.tolist(), strict=True)
            for layer, heads in enumerate(layers)
            for head, value in enumerate(heads)
        ]

    def top(self, k: int = 10, observable: int | str = 0) -> Table:
        """Return the k heads with the largest vectors of one observable."""
        index = self.index(observable)
        values = self.norms[index]
        order = values.flatten().argsort(descending=True, stable=True)[:k].tolist()
        heads = values.shape[1]
        rows = [{"component": f"L{i // heads}H{i % heads}", "norm": float(values.flatten()[i])} for i in order]
        return Table(rows, f"data-free norms of {self.observables[index]}")

    def _repr_html_(self) -> str:
        return self.top(12)._repr_html_()


@torch.no_grad()
def head_norms(model: Model, observables: Any) -> HeadNorms:
    """Return the norms of observables' data-free feature vectors at every head: those of `propagate(path="LlHh")`.

    Gains and weights alone: y = P (γ_1 ⊙ W_Vᵀ W_O P (γ_f ⊙ W_Uᵀ n)). Divisors are left out: the final one is common to
    all heads; that in front of a head cancels, since what the head reads has norm √d.

    Args:
        model: A decoder.
        observables: One, or several (a set, a list, or a mapping of names).

    Raises:
        SiteUnavailableError: If the logits are not a norm and an unembedding of a residual sum.
        ArgumentError: If there are no observables, or they are not of the logits.

    Source: Dunefsky & Cohan, "Observable Propagation", ICML 2024, section 3.2; the Gram form is an extension.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> n = interp.Observable.logit_diff(model, " she", " he")
        >>> found, f = interp.head_norms(model, n), interp.propagate(model, n, path="L20H3")
        >>> abs(float(found.norms[0, 20, 3]) / f.norm - 1) < 1e-5
        True
    """
    wanted = read_observables(observables)
    check_readout(model)
    weights = Weights(model)
    start, _ = wanted.pull_to_stream(model)
    wide = torch.float32 if start.device.type == "mps" else torch.float64
    c, _ = pull_gain(start.to(weights.dtype), weights.norm("ln_final"))
    readers, grams = [], []
    for layer in range(model.n_layers):
        y, _ = pull_gain(c * weights.layout.branch_scale, weights.norm(f"blocks.{layer}.ln1_post"))
        output, values = weights.output(layer), weights.values(layer).weight
        readers.append(output.pull(y.to(output.weight.device)).to(start.device, wide))
        rows, _ = pull_gain(values.permute(1, 2, 0).to(wide), weights.norm(f"blocks.{layer}.ln1"))
        grams.append((rows @ rows.mT).to(start.device))
    a, gram = torch.stack(readers, 1), torch.stack(grams)
    norms = _products(a, gram, a).clamp(min=0).sqrt()
    start = start.to(wide)
    return HeadNorms(list(wanted.names), norms, a, gram, start @ start.T)


def _products(f: Tensor, grams: Tensor, g: Tensor) -> Tensor:
    """f · Gram · g of each head; query heads of a group share a Gram matrix."""
    split = lambda a: a.unflatten(-2, (grams.shape[-3], -1))
    return torch.einsum("...lkhi,lkij,...lkhj->...lkh", split(f), grams, split(g)).flatten(-2)
