"""Many observables at once, along one leading axis."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Union, overload

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.hooks.site import Site
from interp.hooks.table import Rows, Table
from interp.observables.observable import Observable
from interp.observables.reading import rows_at, working
from interp.observables.readout import Readout, sparse_rows
from interp.observables.softcap import Softcap, read_softcap

ObservablesLike = Union["ObservableSet", Observable, Sequence[Observable], Mapping[str, Observable]]


class ObservableSet(Rows, Sequence[Observable]):
    """Observables of the logits, or all of one site, as one map: m = N x + offsets, with N [obs, vocab or feature].

    N is never made for observables of tokens: their terms gather what they name.

    Args:
        observables: A list, or a mapping whose keys become the names.

    Attributes:
        names: Name of each observable, in order.
        site: The site that all of them read, or None for the logits.

    Example:
        >>> import torch
        >>> pair = ObservableSet([Observable("a", (0,), (1.0,)), Observable("a - b", (0, 1), (1.0, -1.0))])
        >>> pair.measure(torch.tensor([[3.0, 1.0, 0.0]]))
        tensor([[3., 2.]])
        >>> pair["a - b"].ids
        (0, 1)
    """

    def __init__(self, observables: Sequence[Observable] | Mapping[str, Observable]):
        named = isinstance(observables, Mapping)
        items = list(observables.values()) if named else list(observables)
        wrong = [o for o in items if not isinstance(o, Observable)]
        if wrong or not items:
            raise ArgumentError(f"{wrong[0]!r} among observables" if wrong else "no observables", "Observables")
        if named:
            items = [replace(o, name=str(key)) for key, o in observables.items()]
        sites = list(dict.fromkeys(o.site for o in items))
        if len(sites) > 1:
            raise ArgumentError(
                f"observables of {' and '.join(str(s or 'the logits') for s in sites[:3])} in one set",
                "all of the logits, or all of one site",
                "make a set for each",
            )
        self.site: Site | None = sites[0]
        self.names = tuple(o.name for o in items)
        self._items = tuple(items)

    @classmethod
    def of(cls, observables: ObservablesLike) -> "ObservableSet":
        """Return a set: of one observable, a list or a mapping of them, or a set as it is."""
        if isinstance(observables, ObservableSet):
            return observables
        return cls([observables] if isinstance(observables, Observable) else observables)

    @classmethod
    def from_matrix(
        cls, matrix: Any, *, names: Sequence[str] | None = None, model: Model | None = None
    ) -> "ObservableSet":
        """Return one observable for each row of a dense matrix [obs, vocab].

        Raises:
            ArgumentError: If the matrix does not have two axes, the names do not match, or a row is zero.
        """
        rows = torch.as_tensor(matrix)
        if rows.ndim != 2:
            raise ArgumentError(f"a matrix of shape {list(rows.shape)}", "[obs, vocab]")
        return cls(
            [
                Observable.from_vector(r, name=n, model=model)
                for n, r in zip(_names(names, len(rows)), rows, strict=True)
            ]
        )

    @classmethod
    def from_rows(
        cls, rows: Sequence[tuple[Sequence[int], Sequence[float]]], *, names: Sequence[str] | None = None
    ) -> "ObservableSet":
        """Return one observable for each sparse row (token ids, weights).

        Raises:
            ArgumentError: If the names do not match, or a row's ids and weights do not.
        """
        return cls(
            [
                Observable(name, tuple(int(i) for i in ids), tuple(float(w) for w in weights))
                for name, (ids, weights) in zip(_names(names, len(rows)), rows, strict=True)
            ]
        )

    def measure(self, x: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch obs"]:
        """Return N x + offsets, in float32 or better: x are logits, or rows of the set's site.

        Raises:
            ArgumentError: If x does not fit an observable.
        """
        if self.site is None:
            for observable in self:
                observable.check_logits(x.shape[-1])
        x = working(x)
        out = x.new_zeros(*x.shape[:-1], len(self))
        ids, weights, rows = sparse_rows(self._items, x.device)
        out.index_add_(-1, rows, x[..., ids] * weights.to(x))
        dense = [i for i, o in enumerate(self) if o.vector is not None]
        if dense:
            n = torch.stack([self._items[i].vector.to(x) for i in dense])  # type: ignore[union-attr]
            if n.shape[1] != x.shape[-1]:
                raise ArgumentError(f"rows of width {x.shape[-1]} at {self.site}", f"{n.shape[1]}, as the vectors have")
            out[..., dense] = x @ n.T
        return out + torch.tensor([o.offset for o in self], dtype=x.dtype, device=x.device)

    def __call__(self, x: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch obs"]:
        """As `measure`."""
        return self.measure(x)

    def read(self, acts: Activations) -> Float[Tensor, "batch *pos obs"]:
        """Return the measurements at the set's own site (the logits, where it has none) in a capture.

        Raises:
            SiteError: If that site was not captured.
        """
        return self.measure(rows_at(acts, self.site or Site("logits")))

    def pull_to_stream(
        self, model: Model, *, softcap: Softcap = "pre",
        logits: Float[Tensor, "vocab"] | None = None,
    ) -> tuple[Float[Tensor, "obs d_model"], Float[Tensor, "obs"]]:  # fmt: skip
        """Return (N W_U, N b_U + offsets), times the logit scale: the observables at the final norm's output.

        Args:
            model: A model with an unembedding.
            softcap: As for `Observable.pull_to_stream`.
            logits: The one reference for ``linearize``.

        Raises:
            ArgumentError: If the model has no unembedding or another vocabulary, or the reference is missing.
        """
        return Readout.of(model).pull([read_softcap(o, model, softcap, logits) for o in self])

    @overload
    def __getitem__(self, index: int | str) -> Observable: ...

    @overload
    def __getitem__(self, index: slice) -> "ObservableSet": ...

    def __getitem__(self, index):
        """The observable of an index or a name, or the set of a slice."""
        if isinstance(index, slice):
            return ObservableSet(self._items[index])
        if isinstance(index, str):
            if self.names.count(index) != 1:
                raise ArgumentError(f"observable {index!r}", f"one of {', '.join(map(repr, self.names[:10]))}")
            return self._items[self.names.index(index)]
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Observable]:
        return iter(self._items)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each observable."""
        return [
            {
                "observable": o.name,
                "of": str(o.site) if o.site else "logits",
                "terms": len(o.ids) or "vector",
                "n.sum": o.weight_sum,
                "zero_sum": o.is_zero_sum,
                "note": o.note,
            }
            for o in self
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"observables": [o.to_dict() for o in self]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ObservableSet":
        """Return the set that `to_dict` wrote.

        Raises:
            ArgumentError: If the data are not a set's.
        """
        if set(data) != {"observables"}:
            raise ArgumentError(f"an observable set with the keys {sorted(data)}", "observables")
        return cls([Observable.from_dict(o) for o in data["observables"]])

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        return Table(self.to_records(), f"{len(self)} observables of {self.site or 'the logits'}")


def _names(names: Sequence[str] | None, count: int) -> Sequence[str]:
    if names is not None and (isinstance(names, str) or len(names) != count):
        raise ArgumentError(f"names {names!r} for {count} observables", "one for each")
    return [f"row {i}" for i in range(count)] if names is None else names
