"""Observables over several positions of one teacher-forced run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError, InputError, PositionError
from interp.hooks.model import Model
from interp.hooks.table import Rows, Table
from interp.observables.observable import Observable
from interp.observables.reading import working
from interp.observables.readout import Readout
from interp.observables.sets import ObservableSet


@dataclass(frozen=True, eq=False)
class SequenceObservable(Rows):
    """m = Σ n_p · logits_p over positions p, each with an observable of its own; made by `Observable.sequence`.

    Attributes:
        name: What it is called in tables.
        terms: Pairs (position, observable of the logits there). A position counts from the start.
        ids: Token ids of the run that is meant, where the observable was made from one; else None.
        log_probability: log p of the continuation at the reference (natural logarithm), where it was made from one.
        note: What to know when reading the numbers.
    """

    name: str
    terms: tuple[tuple[int, Observable], ...] = field(repr=False)
    ids: tuple[int, ...] | None = field(default=None, repr=False)
    log_probability: float | None = None
    note: str = ""

    def __post_init__(self):
        """Refuse no terms, and positions that do not count from the start.

        Raises:
            ArgumentError: If there are no terms, a position is not an index from 0, or a term is not of the logits.
        """
        if not self.terms:
            raise ArgumentError(f"observable {self.name!r} has no terms", "at least one pair (position, token)")
        for position, observable in self.terms:
            if isinstance(position, bool) or not isinstance(position, int) or position < 0:
                raise ArgumentError(f"position {position!r} of a sequence", "an index that counts from the start, 0")
            if not isinstance(observable, Observable) or observable.site is not None:
                raise ArgumentError(f"a term {observable!r}", "an Observable of the logits")

    @property
    def positions(self) -> tuple[int, ...]:
        """Position of each term."""
        return tuple(position for position, _ in self.terms)

    @property
    def observables(self) -> ObservableSet:
        """The terms' observables, in order."""
        return ObservableSet([observable for _, observable in self.terms])

    @property
    def is_zero_sum(self) -> bool:
        """Whether each term is."""
        return all(observable.is_zero_sum for _, observable in self.terms)

    def check_run(self, ids: Sequence[int], position: int = -1) -> None:
        """Refuse a run of other tokens than the sequence was made from, and a position beside its own.

        Raises:
            ArgumentError: For such a run or position.
            PositionError: If the run is shorter than the positions that the terms name.
        """
        if position != -1:
            raise ArgumentError(
                f"position={position} for the sequence {self.name!r}", "its own positions", "leave position= out"
            )
        if self.ids is not None and tuple(ids) != self.ids:
            raise ArgumentError(
                f"a prompt of {len(ids)} tokens that are not those of {self.name!r}",
                f"the {len(self.ids)} tokens that it was made from, the continuation among them",
                "pass [list(observable.ids)]",
            )
        if max(self.positions) >= len(ids):
            raise PositionError(f"position {max(self.positions)} of {self.name!r}", f"one in 0..{len(ids) - 1}")

    def measure(self, logits: Float[Tensor, "*batch pos vocab"]) -> Float[Tensor, "*batch"]:
        """Return Σ n_p · logits_p.

        Raises:
            ArgumentError: If there are fewer positions than the terms name.
        """
        if max(self.positions) >= logits.shape[-2]:
            raise ArgumentError(f"logits at {logits.shape[-2]} positions", f"position {max(self.positions)} among them")
        return torch.stack([observable.measure(logits[..., p, :]) for p, observable in self.terms]).sum(0)

    def __call__(self, logits: Float[Tensor, "*batch pos vocab"]) -> Float[Tensor, "*batch"]:
        """As `measure`."""
        return self.measure(logits)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each term."""
        return [
            {"position": p, "observable": o.name, "n.sum": o.weight_sum, "zero_sum": o.is_zero_sum, "note": o.note}
            for p, o in self.terms
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = {"name": self.name, "terms": [[p, o.to_dict()] for p, o in self.terms]}
        ids = None if self.ids is None else list(self.ids)
        optional = {"ids": ids, "log_probability": self.log_probability, "note": self.note or None}
        return found | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SequenceObservable":
        """Return the observable that `to_dict` wrote.

        Raises:
            ArgumentError: If there is a key that no such observable has.
        """
        if not {"name", "terms"} <= set(data) <= {"name", "terms", "ids", "log_probability", "note"}:
            raise ArgumentError(f"a sequence observable with the keys {sorted(data)}", "name, terms, ids and a note")
        fields: dict[str, Any] = dict(data) | {"terms": tuple((p, Observable.from_dict(o)) for p, o in data["terms"])}
        if "ids" in data:
            fields["ids"] = tuple(data["ids"])
        return cls(**fields)

    def _repr_html_(self) -> str:
        return Table(self.to_records(), self.name)._repr_html_()


def refuse_sequence(observable: Any) -> None:
    """Refuse a sequence where an observable is read at one position.

    Raises:
        ArgumentError: For a sequence.
    """
    if isinstance(observable, SequenceObservable):
        raise ArgumentError(
            f"the sequence {observable.name!r}, read at positions {observable.positions}",
            "an observable of one position",
            "give observable.terms one by one, each with its position; direct_attribution and propagate_all (or "
            "propagate with site=) take a sequence as it is",
        )


def sequence(model: Model, terms: Sequence[tuple[int, Any]], name: str | None) -> SequenceObservable:
    """Return the observable of pairs (position, token, vector or Observable); see `Observable.sequence`."""
    found = []
    for pair in terms:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ArgumentError(f"a term {pair!r}", "a pair (position, token)")
        found.append((pair[0], _observable(model, pair[1])))
    return SequenceObservable(name or " + ".join(f"{o.name} @ {p}" for p, o in found), tuple(found))


def _observable(model: Model, what: Any) -> Observable:
    if isinstance(what, Observable):
        what.check_logits(Readout.of(model).vocab)
        return what
    if isinstance(what, str) or (hasattr(what, "__index__") and getattr(what, "ndim", 0) == 0):
        return Observable.logit(model, what)
    return Observable.from_vector(what, model=model)


@torch.no_grad()
def sequence_log_prob(model: Model, prompt: Any, continuation: Any, name: str | None) -> SequenceObservable:
    """Return the linear form of log p(continuation | prompt); see `Observable.sequence_log_prob`."""
    batch = model.batch(prompt)
    if batch.size != 1 or batch.ids is None:
        raise InputError(f"{batch.size} prompts", "one prompt of tokens")
    Readout.of(model)
    if isinstance(continuation, str):
        if model.tokenizer is None:
            raise InputError(f"continuation {continuation!r}", "a tokenizer", "give token ids")
        continuation = model.tokenizer.encode(continuation, add_special_tokens=False)
    tokens = torch.as_tensor(continuation).flatten().tolist()
    if not tokens:
        raise InputError(f"continuation {continuation!r}", "at least one token")
    before = batch.ids[0].tolist()
    ids = [*before, *tokens]
    logits = working(model.run([ids])[0])
    terms, log_p = [], 0.0
    for position, token in enumerate(tokens, start=len(before) - 1):
        terms.append((position, Observable.log_prob_gradient(model, token, logits[position])))
        log_p += float(torch.log_softmax(logits[position], -1)[token])
    note = "linear at the reference: sums to n·logits, not to the log-probability"
    return SequenceObservable(name or f"log p of {len(tokens)} tokens", tuple(terms), tuple(ids), log_p, note)
