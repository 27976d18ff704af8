"""Jacobians: a batch of linear maps between two sites, dense, applied, reduced or streamed."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.budget import bytes_of
from interp.hooks.errors import ArgumentError, InputError
from interp.hooks.linear_map import LinearMap
from interp.hooks.linearization import Linearization
from interp.hooks.site import Site
from interp.hooks.spectra import SVD
from interp.hooks.table import Rows
from interp.jacobians.costs import probe_bytes
from interp.jacobians.engine import Engine
from interp.jacobians.graph import GraphEngine
from interp.jacobians.places import End, Place
from interp.jacobians.plan import Plan, readable, refuse_large
from interp.jacobians.stored import StoredJacobians

if TYPE_CHECKING:
    from interp.jacobians.reductions import JacobianSummary

_SVD_DENSE = 1200


class JacobianMap(LinearMap):
    """One Jacobian. Its matrix comes from a closed form where there is one.

    Attributes:
        place: Example and positions.
        source: Site, with its positions.
        target: Site, with its positions.
    """

    def __init__(self, owner: "Jacobians", place: Place):
        self._owner, self.place, self._engine = owner, place, owner.engines[place.example]
        self.source, self.target = (_placed(end.site, p) for end, p in zip(owner.ends, _both(place), strict=True))
        shapes = owner.shapes_of(place)
        each = probe_bytes(self._engine)
        super().__init__(
            self._of_engine(0), self._of_engine(1), *shapes, self._engine.like, owner.linearization,
            budget=owner.plan.budget, push_bytes=each, pull_bytes=each,
        )  # fmt: skip

    def _of_engine(self, end: int) -> Callable[[Tensor], Tensor]:
        engine, place, ends = self._engine, self.place, self._owner.ends

        def apply(v: Tensor) -> Tensor:
            full = engine.spread(place, end, ends[end].indices, v.flatten(1))
            with engine.products():
                out = engine.pull(place, full) if end else engine.push(place, full)
            flat = engine.keep(place, 1 - end, ends[1 - end].indices, out)
            return flat.reshape(len(v), *(self.in_shape if end else self.out_shape))

        return apply

    def dense(self, max_bytes: int | str | None = None) -> Float[Tensor, "out in"]:
        """Return the matrix [numel of output, numel of input], output index first: d out_o / d in_i.

        Raises:
            SizeError: If it would be larger than ``max_bytes`` (the budget, where none is given).
            ArgumentError: If ``max_bytes`` is no number of bytes.
        """
        rows, columns = math.prod(self.out_shape), math.prod(self.in_shape)
        size = rows * columns * self._engine.like.element_size()
        refuse_large(size, self.budget if max_bytes is None else bytes_of(max_bytes), 1, rows, columns)
        source, target = self._owner.ends
        with self._engine.products():
            return self._engine.dense(self.place, target.indices, source.indices)

    def __repr__(self) -> str:
        return f"JacobianMap({self.target} by {self.source}, {list(self.out_shape)} x {list(self.in_shape)})"


class Jacobians(Rows):
    """Jacobians J[n, o, i] = d out_o / d in_i between two sites: by token, position pair or example.

    An index gives one as a `LinearMap`; iteration gives (slice, matrices of those maps) in chunks within the budget.

    Attributes:
        plan: How they are computed, and what that costs. Nothing is computed before it is asked for.
        places: Example, source and target positions of each.
        linearization: What is held.
    """

    def __init__(
        self, ends: tuple[End, End], places: list[Place], engines: dict[int, Engine], linearization: Linearization,
        plan: Plan, out: Tensor | None = None,
    ):  # fmt: skip
        self.ends, self.places, self.engines = ends, places, engines
        self.linearization, self.plan, self.out = linearization, plan, out

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> JacobianMap:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Jacobian {index} of {len(self)}")
        return JacobianMap(self, self.places[index])

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for span in self._chunks():
            yield span, self._matrices(span)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[maps, outputs, inputs].

        Raises:
            ArgumentError: If the maps differ in shape.
        """
        sizes = {tuple(math.prod(s) for s in self.shapes_of(place)) for place in self.places}
        if len(sizes) != 1:
            raise ArgumentError(
                f"{len(self)} Jacobians of {len(sizes)} different shapes", "one shape", "index them one by one"
            )
        columns, rows = next(iter(sizes))
        return len(self), rows, columns

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device that matrices have."""
        return self.engines[self.places[0].example].like

    @property
    def site_names(self) -> tuple[str, str]:
        """Source and target."""
        return str(self.ends[0].site), str(self.ends[1].site)

    @property
    def method(self) -> str:
        """How they are computed, in words."""
        return self.plan.method

    @property
    def budget(self) -> int:
        """Bytes that scratch and dense result may take."""
        return self.plan.budget

    @staticmethod
    def open(path: str | Path, budget: int | str = "2GiB") -> StoredJacobians:
        """Return the Jacobians that ``jacobian(..., out=path)`` wrote; no model is needed.

        Raises:
            StoreError: If the path holds no Jacobians, or not all of them yet.
        """
        return StoredJacobians(path, budget)

    def shapes_of(self, place: Place) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape of input and of output of one map."""
        found = []
        for end, single in ((0, place.single[0]), (1, place.single[1])):
            indices, positions = self.ends[end].indices, _both(place)[end]
            shape = self.engines[place.example].shapes[end] if indices is None else (len(indices),)
            found.append(shape if single or positions is None else (len(positions), *shape))
        return found[0], found[1]

    def dense(self, out: Tensor | None = None) -> Float[Tensor, "n out in"]:
        """Return all matrices, into ``out`` (or the tensor that `jacobian` was given) where there is one.

        Raises:
            SizeError: If they do not fit the budget; with the smallest remedies.
            ArgumentError: If ``out`` does not fit, or the maps differ in shape.
        """
        out = self.out if out is None else out
        shape = self.shape
        if out is None:
            refuse_large(math.prod(shape) * self.like.element_size(), self.plan.budget, *shape)
            out = self.like.new_empty(shape)
        check_out(out, shape, self.like)
        for span in self._chunks():
            self._matrices(span, out[span])
        return out

    def _chunks(self) -> Iterator[slice]:
        """Spans of maps of one example that fit the budget together."""
        start = 0
        for index in range(1, len(self) + 1):
            done = index == len(self) or self.places[index].example != self.places[start].example
            if done or index - start >= self.plan.maps:
                yield slice(start, index)
                start = index

    def _matrices(self, span: slice, out: Tensor | None = None) -> Tensor:
        places = self.places[span]
        engine = self.engines[places[0].example]
        source, target = self.ends
        rows, columns = target.indices, source.indices
        if out is None:
            shapes = [math.prod(s) for s in self.shapes_of(places[0])]
            out = engine.like.new_empty(len(places), shapes[1], shapes[0])
        if isinstance(engine, GraphEngine) and engine.local and all(p.single == (True, True) for p in places):
            engine.refuse_new_weights()
            found = engine.rows_of_all(rows)[[engine.start + (p.sources or (0,))[0] for p in places]]
            return out.copy_(found if columns is None else found[..., columns.to(found.device)])
        with engine.products():
            engine.dense_all(places, rows, columns, out)
        return out

    def matvec(self, v: Float[Tensor, "..."]) -> Float[Tensor, "n ..."]:
        """Return J v of each map, [n, *out]: of one v for all, or of one for each [n, *in].

        Raises:
            InputError: If v has another shape.
        """
        return self._apply(v, 0)

    def rmatvec(self, w: Float[Tensor, "..."]) -> Float[Tensor, "n ..."]:
        """Return Jᵀ w of each map, [n, *in]: of one w for all, or of one for each [n, *out].

        Raises:
            InputError: If w has another shape.
        """
        return self._apply(w, 1)

    def _apply(self, v: Tensor, end: int) -> Tensor:
        self.shape  # noqa: B018 - refuses maps of several shapes
        shape = self.shapes_of(self.places[0])[end]
        v = torch.as_tensor(v)
        if tuple(v.shape) == shape:
            v = v.expand(len(self), *shape)
        elif tuple(v.shape) != (len(self), *shape):
            name = ("matvec", "rmatvec")[end]
            raise InputError(f"{name} of a tensor {list(v.shape)}", f"{list(shape)}, or {[len(self), *shape]}")
        found = [self._apply_span(v[span], span, end) for span in self._spans_of_examples()]
        return torch.cat(found)

    def _spans_of_examples(self) -> list[slice]:
        starts = [i for i, p in enumerate(self.places) if i == 0 or p.example != self.places[i - 1].example]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(self)], strict=True)]

    def _apply_span(self, v: Tensor, span: slice, end: int) -> Tensor:
        places = self.places[span]
        engine = self.engines[places[0].example]
        apply = engine.pull if end else engine.push
        v = v.to(engine.like)
        where = [(p.sources or (0,))[0] for p in places]
        single = all(p.single == (True, True) and p.sources == p.targets for p in places)
        if single and getattr(engine, "local", False) and len(set(where)) == len(where) > 1:
            # Positions do not mix: all of them go through at once.
            together = replace(places[0], sources=tuple(where), targets=tuple(where), single=(False, False))
            full = engine.spread(together, end, self.ends[end].indices, v.flatten()[None])
            with engine.products():
                flat = engine.keep(together, 1 - end, self.ends[1 - end].indices, apply(together, full))
            return flat.reshape(len(places), *self.shapes_of(places[0])[1 - end])
        maps = [JacobianMap(self, place) for place in places]
        return torch.stack([m.rmatvec(x) if end else m.matvec(x) for m, x in zip(maps, v, strict=True)])

    def svd(self, k: int = 6, **options: Any) -> list[SVD]:
        """Return the k largest singular triplets of each map, with their residuals.

        Matrices up to 1200 wide are decomposed as such; larger ones are never formed, and options are those of
        `LinearMap.svd`.

        Raises:
            ArgumentError: If k is out of range.
        """
        _, rows, columns = self.shape
        if options or max(rows, columns) > _SVD_DENSE:
            return [self[i].svd(k, **options) for i in range(len(self))]
        if not 1 <= k <= min(rows, columns):
            raise ArgumentError(f"k={k} of a {rows} x {columns} map", f"1..{min(rows, columns)}")
        found = []
        for span, chunk in self:
            found += [self._decompose(m, place, k) for m, place in zip(chunk, self.places[span], strict=True)]
        return found

    def _decompose(self, matrix: Tensor, place: Place, k: int) -> SVD:
        u, s, vh = (t[..., :k, :] if i == 2 else t[..., :k] for i, t in enumerate(torch.linalg.svd(matrix, False)))
        u, v = u.T, vh
        sign = torch.sign(u.gather(1, u.abs().argmax(1, keepdim=True)))
        u, v = u * sign, v * sign
        left = (v @ matrix.T - s[:, None] * u).norm(dim=1)
        right = (u @ matrix - s[:, None] * v).norm(dim=1)
        residuals = torch.maximum(left, right) / s[0].clamp(min=1e-30)
        shapes = self.shapes_of(place)
        return SVD(u.reshape(k, *shapes[1]), s, v.reshape(k, *shapes[0]), residuals, self.linearization.name)

    def reduce(self, how: str | Callable[[Tensor], Any]) -> "JacobianSummary":
        """Return a summary without forming more than a chunk of matrices; see `jacobian` for what there is.

        Raises:
            ArgumentError: If there is no such summary.
            SizeError: If the summary itself does not fit the budget.
        """
        from interp.jacobians.reductions import reduce

        return reduce(self, how)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each map: example, sites with positions, shapes."""
        return [
            {
                "example": p.example, "source": str(self[i].source), "target": str(self[i].target),
                "inputs": list(self.shapes_of(p)[0]), "outputs": list(self.shapes_of(p)[1]),
                "linearization": self.linearization.name,
            }
            for i, p in enumerate(self.places)
        ]  # fmt: skip

    def __repr__(self) -> str:
        source, target = (end.site for end in self.ends)
        size = readable(self.plan.result_bytes)
        return f"{len(self)} Jacobians of {target} by {source} ({self.linearization.name}; {size} when dense)"


def check_out(out: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Refuse a tensor that the matrices cannot be written to.

    Raises:
        ArgumentError: If shape, dtype or device differ, it is part of a graph, or several entries share memory.
    """
    shared = any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True))
    fits = tuple(out.shape) == shape and out.dtype == like.dtype and out.device == like.device
    if not fits or out.requires_grad or shared:
        given = f"out: a {out.dtype} tensor {list(out.shape)} on {out.device}"
        more = " that requires a gradient" if out.requires_grad else " whose entries share memory" if shared else ""
        raise ArgumentError(given + more, f"a {like.dtype} tensor {list(shape)} on {like.device} without a gradient")


def _both(place: Place) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    return place.sources, place.targets


def _placed(site: Site, positions: tuple[int, ...] | None) -> Site:
    return site if positions is None else site.at(positions=positions)
