"""Engine: what computes Jacobians of one example, by rows, columns or as a matrix."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.guards import WeightsHeld
from interp.jacobians.kernels.device import float32_products
from interp.jacobians.places import Place


class Engine(ABC):
    """Pushes and pulls between two sites of one example.

    Values carry a leading axis of probes, then positions where the site has them, then the site's own shape.

    Attributes:
        method: In words, for the plan.
        shapes: Shape of source and of target at one position (whole, where there are no positions).
        chunk: How many probes run at once.
        like: A tensor of the dtype and device that results have.
        tf32: Whether float32 products on a GPU may round their factors to tf32.
        prepared: The weights that it was prepared with.
    """

    method: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    chunk: int
    like: Tensor
    tf32: bool = False
    prepared: WeightsHeld | None = None

    @property
    def precision(self) -> str:
        """Of sums and products, in a word."""
        return "tf32" if self.tf32 else str(self.like.dtype).removeprefix("torch.")

    @contextmanager
    def products(self) -> Iterator[None]:
        """No gradients, and float32 products as precise as was asked for, whatever the process-wide flag says."""
        self.refuse_new_weights()
        with float32_products(self.like, self.tf32), torch.no_grad():
            yield

    def refuse_new_weights(self) -> None:
        """Refuse weights that were written since the engine was prepared.

        Raises:
            ModelStateError: Naming the first.
        """
        if self.prepared is not None:
            self.prepared.check()

    @abstractmethod
    def push(self, place: Place, v: Float[Tensor, "k ..."]) -> Float[Tensor, "k ..."]:
        """J v: tangents at the place's source as tangents at its target."""

    @abstractmethod
    def pull(self, place: Place, w: Float[Tensor, "k ..."]) -> Float[Tensor, "k ..."]:
        """Jᵀ w: covectors at the place's target as covectors at its source."""

    def dense(
        self, place: Place, rows: Tensor | None, columns: Tensor | None, out: Tensor | None = None
    ) -> Float[Tensor, "out in"]:
        """The matrix [outputs, inputs] of a place, between the kept components."""
        n_in, n_out = self.count(place, 0, columns), self.count(place, 1, rows)
        out = self.like.new_empty(n_out, n_in) if out is None else out
        by_columns = self.by_columns(n_in, n_out)
        for start in range(0, n_in if by_columns else n_out, self.chunk):
            stop = min(start + self.chunk, n_in if by_columns else n_out)
            if by_columns:
                probe = self.basis(place, 0, columns, start, stop)
                out[:, start:stop] = self.keep(place, 1, rows, self.push(place, probe)).T
            else:
                probe = self.basis(place, 1, rows, start, stop)
                out[start:stop] = self.keep(place, 0, columns, self.pull(place, probe))
        return out

    def dense_all(self, places: list[Place], rows: Tensor | None, columns: Tensor | None, out: Tensor) -> None:
        """Fill ``out`` [places, outputs, inputs] with the matrices of places of one shape."""
        for place, one in zip(places, out, strict=True):
            self.dense(place, rows, columns, one)

    def by_columns(self, n_in: int, n_out: int) -> bool:
        """Whether a matrix is made of columns rather than of rows."""
        return n_in < n_out

    def count(self, place: Place, end: int, indices: Tensor | None) -> int:
        """How many components an end has."""
        each = math.prod(self.shapes[end]) if indices is None else len(indices)
        return each * (len(self.positions(place, end) or (0,)))

    @staticmethod
    def positions(place: Place, end: int) -> tuple[int, ...] | None:
        """The positions of an end."""
        return place.targets if end else place.sources

    def full_shape(self, place: Place, end: int) -> tuple[int, ...]:
        """Shape of a value at an end, without the axis of probes."""
        positions = self.positions(place, end)
        return self.shapes[end] if positions is None else (len(positions), *self.shapes[end])

    def basis(self, place: Place, end: int, indices: Tensor | None, start: int, stop: int) -> Tensor:
        """Unit vectors start:stop of an end's kept components."""
        each = math.prod(self.shapes[end])
        which = torch.arange(start, stop, device=self.like.device)
        if indices is not None:
            kept = indices.to(which.device)
            which = which // len(kept) * each + kept[which % len(kept)]
        probes = self.like.new_zeros(stop - start, math.prod(self.full_shape(place, end)))
        probes.scatter_(1, which[:, None], 1.0)
        return probes.reshape(stop - start, *self.full_shape(place, end))

    def keep(self, place: Place, end: int, indices: Tensor | None, value: Tensor) -> Tensor:
        """The kept components of values, flat: [k, n]."""
        if indices is None:
            return value.flatten(1)
        parts = value.reshape(len(value), -1, math.prod(self.shapes[end]))
        return parts[..., indices.to(value.device)].flatten(1)

    def spread(self, place: Place, end: int, indices: Tensor | None, value: Tensor) -> Tensor:
        """Values of the kept components in the end's full shape, zero elsewhere."""
        if indices is not None:
            parts = value.reshape(len(value), -1, len(indices))
            full = parts.new_zeros(*parts.shape[:2], math.prod(self.shapes[end]))
            full.index_add_(2, indices.to(value.device), parts)
            value = full
        return value.reshape(len(value), *self.full_shape(place, end))
