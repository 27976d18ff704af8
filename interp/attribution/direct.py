"""Direct attribution: what each component adds to an observable. The contributions sum to the measurement.

With the final norm's divisor held, u = (1/r) P(γ ⊙ W_Uᵀ n) reads the final stream linearly, and the stream is a sum:
n · logits = u · embed + Σ u · head + Σ u · b_O + Σ u · mlp + constant, with constant W_Uᵀ n · β + n · b_U. A head is
the sum over source tokens of A[t, s] u · W_O (W_V n_s + b_V); an MLP is the sum over neurons of (W_outᵀ u)_i post_i,
and u · b_out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.streams import of_terms, over_terms, readers_of
from interp.attribution.units import EMBEDDINGS, Detail, Parts, Readers, Seen, check_complete
from interp.hooks.errors import ArgumentError
from interp.hooks.inputs import Batch
from interp.hooks.model import Model
from interp.hooks.table import Rows, Table
from interp.observables.observable import Observable
from interp.observables.sequences import SequenceObservable, refuse_sequence
from interp.observables.sets import ObservableSet
from interp.propagation.starts import pre_cap_note

_LISTED = 10


@dataclass(frozen=True)
class Attribution(Rows):
    """Named contributions to an observable's measurement at one position of one prompt.

    Attributes:
        observable: What is measured.
        measurement: n · logits (before a final soft-cap).
        heads: [layer, head], or None for ``unit="component"``.
        attention: [layer]: whole attention branch, bias included.
        attention_bias: [layer]: of b_O (after a post-norm, with it).
        mlps: [layer].
        embeddings: Of the embedding and, where there are any, learned positions and token types.
        constant: Of the final norm's bias, the unembedding's, and the observable's own offset.
        rounding: What the stream's own rounding adds (matters in half precision).
        position: Token index that the logits belong to.
        note: What to know when reading the numbers.
        unit: What was asked for, as in ``source+neuron``; rows go down to it.
        sources: [layer, head, pos]: heads by the token that they read, 0 behind the position; or None.
        neurons: [layer, d_mlp], or None.
        mlp_bias: [layer]: of b_out, beside neurons; or None.
        kv_heads: [layer, kv_head]: sums over the query heads that share keys and values; or None.
        labels: Text of each token of the prompt, or None without a tokenizer.
        identity_error: How far finer parts are from what they sum to, relative to the sum of sizes.
        scale: Least value of the sum of sizes to which errors are relative (of both runs, for a difference).
    """

    observable: str
    measurement: float
    heads: Float[Tensor, "layer head"] | None = field(repr=False)
    attention: Float[Tensor, "layer"] = field(repr=False)
    attention_bias: Float[Tensor, "layer"] = field(repr=False)
    mlps: Float[Tensor, "layer"] = field(repr=False)
    embeddings: dict[str, float] = field(repr=False)
    constant: float
    rounding: float
    position: int
    note: str = ""
    unit: str = ""
    sources: Float[Tensor, "layer head pos"] | None = field(default=None, repr=False)
    neurons: Float[Tensor, "layer d_mlp"] | None = field(default=None, repr=False)
    mlp_bias: Float[Tensor, "layer"] | None = field(default=None, repr=False)
    kv_heads: Float[Tensor, "layer kv_head"] | None = field(default=None, repr=False)
    labels: list[str] | None = field(default=None, repr=False)
    identity_error: float = field(default=0.0, repr=False)
    scale: float = field(default=0.0, repr=False)

    @property
    def detail(self) -> Detail:
        """How far attention and MLPs are split in rows."""
        return Detail.of(self.unit or ("component" if self.heads is None else "head"))

    def _terms(self, detail: Detail) -> list[Tensor]:
        found = [getattr(self, key) for key in detail.keys]
        if any(value is None for value in found):
            raise ArgumentError(f"an attribution by {self.unit or 'component'}", "one by the finer unit, unit=")
        ends = torch.tensor([*self.embeddings.values(), self.constant], dtype=torch.float64)
        return [ends, *(value.double().flatten().cpu() for value in found)]

    @property
    def total(self) -> float:
        """The sum of all contributions."""
        return float(torch.cat(self._terms(self.detail)).sum()) + self.rounding

    @property
    def completeness_error(self) -> float:
        """|sum - measurement|, or the rounding where that is larger, over the sum of absolute contributions.

        Where finer parts (sources of a head, neurons of an MLP) miss what they sum to by more, it is that.
        """
        sizes = float(torch.cat(self._terms(self.detail)).abs().sum()) + abs(self.rounding)
        worst = max(abs(self.total - self.measurement), abs(self.rounding)) / max(sizes, self.scale, 1e-30)
        return max(worst, self.identity_error)

    # Single contributions --------------------------------------------------------------------------------------------

    def head(self, layer: int, head: int) -> float:
        """Contribution of one head.

        Raises:
            ArgumentError: If heads were not asked for, or there is no such head.
        """
        return self._entry(self.heads, "head()", "unit='head'", layer=layer, head=head)

    def kv_head(self, layer: int, group: int) -> float:
        """Contribution of one key/value head: the sum over the query heads that read it.

        Raises:
            ArgumentError: If heads were not asked for, or there is no such key/value head.
        """
        return self._entry(self.kv_heads, "kv_head()", "unit='kv_head'", layer=layer, kv_head=group)

    def head_from(self, layer: int, head: int, source: int) -> float:
        """What one head adds by reading one token, counted from 0, or negative from the prompt's end.

        Raises:
            ArgumentError: If sources were not asked for, or there is no such head or token.
        """
        if self.sources is not None and -self.sources.shape[-1] <= source < 0:
            source += self.sources.shape[-1]
        return self._entry(self.sources, "head_from()", "unit='source'", layer=layer, head=head, source=source)

    def mlp(self, layer: int) -> float:
        """Contribution of one MLP.

        Raises:
            ArgumentError: If there is no such layer.
        """
        return self._entry(self.mlps, "mlp()", "", layer=layer)

    def neuron(self, layer: int, index: int) -> float:
        """Contribution of one neuron.

        Raises:
            ArgumentError: If neurons were not asked for, or there is no such neuron.
        """
        return self._entry(self.neurons, "neuron()", "unit='neuron'", layer=layer, neuron=index)

    def _entry(self, values: Tensor | None, call: str, unit: str, **at: int) -> float:
        if values is None:
            raise ArgumentError(f"{call} on an attribution by {self.unit or 'component'}", unit)
        for (axis, index), size in zip(at.items(), values.shape, strict=True):
            if not 0 <= index < size:
                raise ArgumentError(f"{axis} {index}", f"{axis}s 0..{size - 1}")
        return float(values[tuple(at.values())])

    # Rows ------------------------------------------------------------------------------------------------------------

    def to_records(self, unit: str | None = None, *, neurons: int = _LISTED) -> list[dict[str, Any]]:
        """One row for each contribution; the values sum to the measurement.

        Args:
            unit: How finely; what was asked for by default.
            neurons: How many of each layer's largest neurons have rows of their own; the others share one.

        Raises:
            ArgumentError: If the unit is finer than what was asked for.
        """
        detail = self.detail if unit is None else Detail.of(unit)
        rounding = self.rounding
        if detail != self.detail:
            rounding += float(torch.cat(self._terms(self.detail)).sum() - torch.cat(self._terms(detail)).sum())
        rows = [_row(name, "embedding", None, None, value) for name, value in self.embeddings.items()]
        for layer in range(len(self.mlps)):
            rows += [*self._attention_rows(layer, detail), *self._mlp_rows(layer, detail, neurons)]
        rows.append(_row("constant", "constant", None, None, self.constant))
        return [*rows, _row("rounding", "rounding", None, None, rounding)]

    def _attention_rows(self, layer: int, detail: Detail) -> list[dict[str, Any]]:
        if detail.attention == "component":
            return [_row(f"L{layer} attention", "attention", layer, None, float(self.attention[layer]))]
        if detail.attention == "source":
            rows = self._source_rows(layer)
        else:
            values, letters = (self.heads, "H") if detail.attention == "head" else (self.kv_heads, "KV")
            assert values is not None
            numbers = enumerate(values[layer].tolist())
            rows = [_row(f"L{layer}{letters}{h}", detail.attention, layer, h, v) for h, v in numbers]
        bias = float(self.attention_bias[layer])
        return rows + ([_row(f"L{layer} attention bias", "bias", layer, None, bias)] if bias != 0 else [])

    def _source_rows(self, layer: int) -> list[dict[str, Any]]:
        assert self.sources is not None
        token = lambda s: self.labels[s] if self.labels else str(s)
        seen = self.sources[layer, :, : self.position + 1].tolist()
        return [
            _row(f"L{layer}H{h}@{s}", "source", layer, h, value) | {"source": s, "token": token(s)}
            for h, values in enumerate(seen)
            for s, value in enumerate(values)
        ]

    def _mlp_rows(self, layer: int, detail: Detail, count: int) -> list[dict[str, Any]]:
        if detail.mlp == "component":
            return [_row(f"L{layer} MLP", "mlp", layer, None, float(self.mlps[layer]))]
        assert self.neurons is not None
        assert self.mlp_bias is not None
        values = self.neurons[layer].double().clone()
        listed = values.abs().argsort(descending=True, stable=True)[: max(count, 0)].tolist()
        rows = [
            _row(f"L{layer}N{i}", "neuron", layer, None, v) | {"neuron": i}
            for i, v in zip(listed, values[listed].tolist(), strict=True)
        ]
        if len(listed) < len(values):
            values[listed] = 0
            rows.append(_row(f"L{layer} other neurons", "rest", layer, None, float(values.sum())))
        bias = float(self.mlp_bias[layer])
        return rows + ([_row(f"L{layer} MLP bias", "bias", layer, None, bias)] if bias != 0 else [])

    def top(self, k: int = 10) -> Table:
        """Return the k largest contributions by absolute value (single neurons; not what many share)."""
        rows = [r for r in self.to_records(neurons=k) if r["kind"] != "rest"]
        rows = sorted(rows, key=lambda r: -abs(r["value"]))[:k]
        shown = ("component", "token", "value") if self.detail.attention == "source" else ("component", "value")
        return Table([{c: r.get(c, "") for c in shown} for r in rows], f"{self.observable} = {self.measurement:.4f}")

    def to_json(self) -> str:
        """All numbers as JSON text."""
        return json.dumps(
            {"observable": self.observable, "measurement": self.measurement, "rows": self.to_records()}, indent=1
        )

    def _repr_html_(self) -> str:
        return self.top(12)._repr_html_()


def _row(component: str, kind: str, layer: int | None, head: int | None, value: float) -> dict[str, Any]:
    return {"component": component, "kind": kind, "layer": layer, "head": head, "value": value}


@overload
def direct_attribution(
    model: Model, observables: Observable | SequenceObservable, prompt: Any, unit: str = "head", *, position: int = -1,
    plan: Any = (),
) -> Attribution: ...  # fmt: skip


@overload
def direct_attribution(
    model: Model, observables: ObservableSet | Sequence[Observable] | Mapping[str, Observable], prompt: Any,
    unit: str = "head", *, position: int = -1, plan: Any = (),
) -> list[Attribution]: ...  # fmt: skip


@torch.no_grad()
def direct_attribution(
    model: Model, observables: Any, prompt: Any, unit: str = "head", *, position: int = -1, plan: Any = ()
) -> Attribution | list[Attribution]:
    """Return what each component adds to an observable at one position; raises if the parts do not sum to the whole.

    Each branch is read behind its post-norm, with that norm's divisor held, so that heads still sum (Gemma, OLMo 2).
    Where the model soft-caps its logits, the measurement is of the logits before the cap. Several observables share
    one run, and give what each would give alone.

    Args:
        model: A decoder with a final norm and an unembedding.
        observables: What is measured: an Observable, or several (a set, a list, or a mapping of names), of the logits
            or of one residual stream (`Observable.from_residual`: what wrote a probe's score; later layers count 0);
            or a sequence, whose terms add up.
        prompt: One text, or token ids.
        unit: ``component`` (whole attention branches), ``head``, ``kv_head`` (sums over the query heads that share
            keys and values), ``source`` (heads by the token that they read) or ``neuron`` (MLPs by neuron); one for
            attention and one for MLPs as in ``source+neuron``. Sums of the finer parts are checked against the
            coarser, and sources also against feature vectors of the stream in front of each block.
        position: Whose next-token logits; the last by default.
        plan: Interventions under which the model runs.

    Raises:
        SiteUnavailableError: If the logits are not a norm and an unembedding of a residual sum, or the model has no
            such parts (neurons of a mixture of experts).
        ArgumentError: If the unit does not exist, or there is more than one prompt.
        CompletenessError: If the contributions do not sum to the measurement, or finer parts to a coarser one.

    Source: Dunefsky & Cohan, "Observable Propagation", ICML 2024, section 3.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> obs = interp.Observable.logit_diff(model, " Mary", " John")
        >>> found = interp.direct_attribution(model, obs, "When Mary and John went out, John gave a drink to")
        >>> abs(found.total - found.measurement) < 1e-4
        True
    """
    if isinstance(observables, SequenceObservable):
        return _of_sequence(model, observables, prompt, unit, position, plan)
    wanted = read_observables(observables)
    readers = readers_of(model, wanted, Detail.of(unit))
    batch, place = one_prompt(model, prompt), readers.place(position)
    seen = readers.capture(batch, place, plan)
    _check_seen(readers, seen)
    parts = readers.parts(seen)
    check_complete(model, wanted.names, parts)
    found = attributions(readers, parts, batch, place, unit)
    return found[0] if isinstance(observables, Observable) else found


def _of_sequence(
    model: Model, observable: SequenceObservable, prompt: Any, unit: str, position: int, plan: Any
) -> Attribution:
    """Each term at its own position, by one run; then their sum."""
    readers, batch = Readers(model, observable.observables, Detail.of(unit)), one_prompt(model, prompt)
    assert batch.ids is not None
    observable.check_run(batch.ids[0, batch.starts[0] :][: batch.lengths[0]].tolist(), position)
    seen = readers.capture(batch, observable.positions, plan)
    _check_seen(readers, seen)
    parts = of_terms(readers.parts(seen))
    check_complete(model, readers.observables.names, parts)
    (found, *_) = attributions(readers, over_terms(parts), batch, max(observable.positions), unit)
    return replace(
        found, observable=observable.name, note="; ".join(filter(None, (observable.note, pre_cap_note(model))))
    )


def read_observables(observables: Any) -> ObservableSet:
    """Observables as a set.

    Raises:
        ArgumentError: If they are none.
    """
    refuse_sequence(observables)
    if not isinstance(observables, (Observable, ObservableSet, Sequence, Mapping)) or isinstance(observables, str):
        raise ArgumentError(
            f"an observable of type {type(observables).__name__}", "an Observable", "Observable.logit(...)"
        )
    return ObservableSet.of(observables)


def one_prompt(model: Model, prompt: Any) -> Batch:
    """The batch of one prompt.

    Raises:
        ArgumentError: If there are several.
    """
    batch = model.batch(prompt)
    if batch.size != 1:
        raise ArgumentError(f"{batch.size} prompts", "one", "attribute_dataset takes many")
    return batch


def attributions(
    readers: Readers, parts: Parts, batch: Batch, position: int, unit: str, note: str = ""
) -> list[Attribution]:
    """The result for each observable of one prompt's parts."""
    model = readers.model
    seen_at = pre_cap_note(model) if readers.observables.site is None else ""
    place = int(batch.positions(position)[0, 0]) - batch.starts[0]
    ids = batch.ids[0, batch.starts[0] :][: batch.lengths[0]].tolist() if batch.ids is not None else []
    labels = [model.tokenizer.decode([i]) for i in ids] if model.tokenizer is not None else None
    found = []
    for o, observable in enumerate(readers.observables[: len(parts["measurement"])]):
        notes = "; ".join(filter(None, (observable.note, seen_at, note)))
        found.append(from_parts(observable.name, {k: v[o, 0] for k, v in parts.items()}, place, notes, unit, labels))
    return found


def from_parts(
    name: str, parts: Mapping[str, Tensor], position: int, note: str, unit: str, labels: list[str] | None
) -> Attribution:
    """The result that holds the parts of one observable at one position."""
    number = lambda key: float(parts[key]) if key in parts else 0.0
    return Attribution(
        observable=name, measurement=number("measurement"), heads=parts.get("heads"), attention=parts["attention"],
        attention_bias=parts.get("attention_bias", torch.zeros_like(parts["attention"])), mlps=parts["mlps"],
        embeddings={key: float(parts[key]) for key in EMBEDDINGS if key in parts}, constant=number("constant"),
        rounding=number("rounding"), position=position, note=note, unit=unit, sources=parts.get("sources"),
        neurons=parts.get("neurons"), mlp_bias=parts.get("mlp_bias"), kv_heads=parts.get("kv_heads"), labels=labels,
        identity_error=number("identity_error"), scale=number("scale"),
    )  # fmt: skip


def _check_seen(readers: Readers, seen: Seen) -> None:
    """Refuse a plan that changes the logits behind the unembedding, where attribution does not look."""
    layout = readers.model.layout
    if layout is None or layout.logit_softcap is not None or not seen.has("logits"):
        return
    expected = readers.observables.measure(seen.at("unembed.hook_out").float() * layout.logit_scale).flatten()
    final = readers.observables.measure(seen.at("logits").float()).flatten()
    wrong = ~torch.isclose(expected, final, rtol=1e-2, atol=1e-2)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ArgumentError(
            f"logits that measure {final[i]:.4g}, from an unembedding that measures {expected[i]:.4g}",
            "a plan in front of the unembedding",
        )
