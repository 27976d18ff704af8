"""Attribution of observables that read a residual stream, as a probe does, and of sequences.

A stream is the sum of what was written to it, so that v · x splits with no norm in between; a sequence is the sum of
its terms, each split at its own position.
"""

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.units import Detail, Parts, Readers, Seen
from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.observables.sets import ObservableSet
from interp.propagation.reference import Weights
from interp.propagation.starts import own_position

_STREAM = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)")


def readers_of(model: Model, observables: ObservableSet, detail: Detail) -> Readers:
    """Readers of observables of the logits, or of one residual stream.

    Raises:
        ArgumentError: If the observables read another site.
        SiteUnavailableError: If what they read is not a residual sum, or the model has no such parts.
    """
    return (Readers if observables.site is None else StreamReaders)(model, observables, detail)


class StreamReaders(Readers):
    """Readers of vectors at a residual stream: components up to there count v · it, later ones 0."""

    def _begin(self) -> None:
        site = self.observables.site
        assert site is not None
        self.weights = Weights(self.model)
        self.model.resolve(site)
        match = _STREAM.fullmatch(site.address)
        if match is None:
            raise ArgumentError(
                f"direct attribution of an observable of {site}", "one of the logits, or of a residual stream",
                "propagate_all(model, observable, prompt, linearization='frozen') splits it over earlier sites",
            )  # fmt: skip
        self.w = torch.stack(
            [o.weights_or_vector.to(self.weights.device, self.weights.dtype) for o in self.observables]
        )
        width = self.weights.sizes["d_model"]
        if self.w.shape[1] != width:
            raise ArgumentError(f"observable vector of length {self.w.shape[1]}", f"{width}, as {site} has")
        self.offsets = self.constant = self.w.new_tensor([o.offset for o in self.observables])
        self.c, self.stream = self.w, str(site.whole)
        layer, part = int(match[1]), match[2]
        self.depth = (layer + (part != "pre"), layer + (part == "post"))

    def place(self, position: Any) -> Any:
        """The site's own position, where it names one."""
        site = self.observables.site
        assert site is not None
        return position if site.positions is None else own_position(site, -1 if position == "last" else position)

    def _end_sites(self, logits: bool) -> list[str]:
        return []

    def divisor(self, seen: Seen) -> Float[Tensor, "example"]:
        """1: no norm lies in between."""
        x = seen.at(self.stream)
        return x.new_ones(len(x))

    def _measurement(self, seen: Seen, logits: bool) -> Float[Tensor, "obs example"]:
        return self.observables.measure(seen.at(self.stream)).T.to(self.c)


def of_terms(parts: Parts) -> dict[str, Tensor]:
    """Of each term of a sequence, the row of its own position: [term, 1, ...] of parts [term, row, ...]."""
    return {key: value.diagonal(dim1=0, dim2=1).movedim(-1, 0)[:, None] for key, value in parts.items()}


def over_terms(parts: Parts) -> dict[str, Tensor]:
    """The terms of a sequence as one: parts add up, and of the identities' errors the largest counts."""
    largest = lambda key: key == "identity_error"
    return {key: (value.amax(0) if largest(key) else value.sum(0))[None] for key, value in parts.items()}
