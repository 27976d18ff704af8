"""Direct attribution: what each component adds to an observable. The contributions sum to the measurement.

With the final norm's divisor held, u = (1/r) P(γ ⊙ W_Uᵀ n) reads the final stream linearly, and the stream is a sum:
n · logits = u · embed + Σ u · head + Σ u · b_O + Σ u · mlp + constant, with constant W_Uᵀ n · β + n · b_U.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.errors import ArgumentError, CompletenessError, SiteUnavailableError
from interp.hooks.layouts import child
from interp.hooks.model import Model
from interp.hooks.table import Table
from interp.hooks.weights import Norm, linear_bias, linear_weight
from interp.observables import Observable
from interp.readout import Readout

Unit = Literal["component", "head"]
# Hugging Face computes norms in float32 even in a float64 model.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


@dataclass(frozen=True)
class Attribution:
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

    @property
    def total(self) -> float:
        """The sum of all contributions."""
        return sum(row["value"] for row in self.to_records())

    @property
    def completeness_error(self) -> float:
        """|sum - measurement|, or the rounding where that is larger, over the sum of absolute contributions."""
        scale = max(sum(abs(r["value"]) for r in self.to_records()), 1e-30)
        return max(abs(self.total - self.measurement), abs(self.rounding)) / scale

    def head(self, layer: int, head: int) -> float:
        """Contribution of one head.

        Raises:
            ArgumentError: If heads were not asked for, or there is no such head.
        """
        if self.heads is None:
            raise ArgumentError("head() on an attribution by component", "unit='head'")
        layers, heads = self.heads.shape
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ArgumentError(f"L{layer}H{head}", f"layers 0..{layers - 1} and heads 0..{heads - 1}")
        return float(self.heads[layer, head])

    def mlp(self, layer: int) -> float:
        """Contribution of one MLP.

        Raises:
            ArgumentError: If there is no such layer.
        """
        if not 0 <= layer < len(self.mlps):
            raise ArgumentError(f"layer {layer}", f"0..{len(self.mlps) - 1}")
        return float(self.mlps[layer])

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each contribution; the values sum to the measurement."""
        rows = [
            {"component": name, "kind": "embedding", "layer": None, "head": None, "value": v}
            for name, v in self.embeddings.items()
        ]
        for layer in range(len(self.mlps)):
            rows += self._layer_rows(layer)
        rows.append({"component": "constant", "kind": "constant", "layer": None, "head": None, "value": self.constant})
        rows.append({"component": "rounding", "kind": "rounding", "layer": None, "head": None, "value": self.rounding})
        return rows

    def _layer_rows(self, layer: int) -> list[dict[str, Any]]:
        row = lambda name, kind, head, value: {
            "component": name,
            "kind": kind,
            "layer": layer,
            "head": head,
            "value": float(value),
        }
        if self.heads is None:
            rows = [row(f"L{layer} attention", "attention", None, self.attention[layer])]
        else:
            rows = [row(f"L{layer}H{h}", "head", h, v) for h, v in enumerate(self.heads[layer])]
            if self.attention_bias[layer] != 0:
                rows.append(row(f"L{layer} attention bias", "bias", None, self.attention_bias[layer]))
        return [*rows, row(f"L{layer} MLP", "mlp", None, self.mlps[layer])]

    def top(self, k: int = 10) -> Table:
        """Return the k largest contributions by absolute value."""
        rows = sorted(self.to_records(), key=lambda r: -abs(r["value"]))[:k]
        return Table(
            [{"component": r["component"], "value": r["value"]} for r in rows],
            f"{self.observable} = {self.measurement:.4f}",
        )

    def to_json(self) -> str:
        """All numbers as JSON text."""
        return json.dumps(
            {"observable": self.observable, "measurement": self.measurement, "rows": self.to_records()}, indent=1
        )

    def _repr_html_(self) -> str:
        return self.top(12)._repr_html_()


@torch.no_grad()
def direct_attribution(
    model: Model, observable: Observable, prompt: Any, unit: Unit = "head", *, position: int = -1, plan=()
) -> Attribution:
    """Return what each component adds to an observable at one position; raises if the parts do not sum to the whole.

    Each branch is read behind its post-norm, with that norm's divisor held, so that heads still sum (Gemma, OLMo 2).
    Where the model soft-caps its logits, the measurement is of the logits before the cap.

    Args:
        model: A decoder with a final norm and an unembedding.
        observable: What is measured.
        prompt: One text, or token ids.
        unit: ``head`` or ``component`` (whole attention branches).
        position: Whose next-token logits; the last by default.
        plan: Interventions under which the model runs.

    Raises:
        SiteUnavailableError: If the logits are not a norm and an unembedding of a residual sum.
        ArgumentError: If the unit does not exist, or there is more than one prompt.
        CompletenessError: If the contributions do not sum to the measurement.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> obs = interp.Observable.logit_diff(model, " Mary", " John")
        >>> found = interp.direct_attribution(model, obs, "When Mary and John went out, John gave a drink to")
        >>> abs(found.total - found.measurement) < 1e-4
        True
    """
    if not isinstance(observable, Observable):
        raise ArgumentError(
            f"an observable of type {type(observable).__name__}", "an Observable", "Observable.logit(...)"
        )
    if unit not in ("component", "head"):
        raise ArgumentError(f"unit={unit!r}", "'component' or 'head'")
    _check_readout(model)
    observable.check_logits(Readout.of(model).vocab)
    batch = model.batch(prompt)
    if batch.size != 1:
        raise ArgumentError(f"{batch.size} prompts", "one")
    acts = model.capture(batch, _sites(model), positions=position, plan=plan)
    _check_seen(model, observable, acts)
    reader = _Reader(model, observable, acts)
    found = reader.attribute(unit, int(batch.positions(position)[0, 0]))
    limit = _TOLERANCE.get(model.dtype, 2e-2)
    if not found.completeness_error <= limit:
        raise CompletenessError(
            f"contributions without rounding sum to {found.total - found.rounding:.6g}, measurement is "
            f"{found.measurement:.6g} (relative {found.completeness_error:.1e})",
            f"at most {limit:.0e}",
            f"largest: {', '.join(r['component'] for r in found.top(3))}",
        )
    return found


def _check_readout(model: Model) -> None:
    layout = model.layout
    if layout is None or layout.post_ln or layout.final_norm is None or layout.unembed is None:
        raise SiteUnavailableError(
            f"direct attribution on {type(model.module).__name__} ({model.family})",
            "logits that are norm and unembedding of a residual sum",
            "use LinearScope for other networks",
        )


def _check_seen(model: Model, observable: Observable, acts: Activations) -> None:
    """Refuse a plan that changes the logits behind the unembedding, where attribution does not look."""
    layout = model.layout
    if layout is None or layout.logit_softcap is not None:
        return
    expected = observable.measure(acts["unembed.hook_out"][0, 0].float() * layout.logit_scale)
    final = observable.measure(acts["logits"][0, 0].float())
    if not torch.isclose(expected, final, rtol=1e-2, atol=1e-2):
        raise ArgumentError(
            f"logits that measure {final:.4g}, from an unembedding that measures {expected:.4g}",
            "a plan in front of the unembedding",
        )


def _sites(model: Model) -> list[str]:
    known = model.bindings.by_address  # type: ignore[union-attr]
    names = ["hook_embed", "hook_pos_embed", "hook_type_embed", "ln_final.hook_scale", "unembed.hook_out", "logits"]
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    for layer in range(model.n_layers):
        block = f"blocks.{layer}"
        names += [f"{block}.attn.hook_z", f"{block}.hook_attn_out", f"{block}.hook_mlp_out"]
        names += [f"{block}.ln1_post.hook_scale"]
    return [name for name in [*names, last] if name in known]


class _Reader:
    """The final stream's linear reader u, and what it reads out of each component (float32 or better)."""

    def __init__(self, model: Model, observable: Observable, acts: Activations):
        self.model, self.acts, self.observable = model, acts, observable
        self.norms = model.bindings.norms  # type: ignore[union-attr]
        w, self.unembed_offset = observable.pull_to_stream(model)
        final: Norm = self.norms["ln_final"]
        self.dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.w = w.to(self.dtype)
        scale = self._at("ln_final.hook_scale")
        scaled = self.w if final.gain is None else self.w * final.gain.to(self.w)
        self.u = (scaled - scaled.mean() if final.centred else scaled) / scale.to(self.w.device)
        self.constant = float(self.w @ final.bias.to(self.w)) if final.bias is not None else 0.0

    def _at(self, site: str) -> Tensor:
        """A site's value at the one position, in the working dtype."""
        return self.acts[site][0, 0].to(self.w.device if hasattr(self, "w") else "cpu", self.dtype)

    def attribute(self, unit: Unit, position: int) -> Attribution:
        layout, n = self.model.layout, self.model.n_layers
        assert layout is not None
        attention = torch.stack([self.u @ self._at(f"blocks.{i}.hook_attn_out") for i in range(n)])
        mlps = torch.stack([self.u @ self._at(f"blocks.{i}.hook_mlp_out") for i in range(n)])
        heads, bias = self._heads() if unit == "head" else (None, torch.zeros(n))
        names = {"embedding": "hook_embed", "positions": "hook_pos_embed", "token types": "hook_type_embed"}
        embeddings = {k: float(self.u @ self._at(site)) for k, site in names.items() if site in self.acts}
        final = float(self.u @ self._at(f"blocks.{n - 1}.hook_resid_post"))
        parts = float(heads.sum() + bias.sum()) if heads is not None else float(attention.sum())
        capped = "" if layout.logit_softcap is None else "measured on the logits before the soft-cap"
        note = "; ".join(filter(None, (self.observable.note, capped)))
        measured = float(self.observable.measure(self._at("unembed.hook_out") * layout.logit_scale))
        return Attribution(
            observable=self.observable.name, measurement=measured, heads=heads, attention=attention,
            attention_bias=bias, mlps=mlps, embeddings=embeddings, constant=self.constant + self.unembed_offset,
            rounding=final - sum(embeddings.values()) - parts - float(mlps.sum()), position=position, note=note,
        )  # fmt: skip

    def _heads(self) -> tuple[Tensor, Tensor]:
        """Contributions [layer, head] and of biases [layer]: u_l · W_O z, with u_l behind the branch's post-norm."""
        heads, biases = [], []
        for layer in range(self.model.n_layers):
            reader, offset = self._branch_reader(layer)
            path = self.model.layout.block(layer, self.model.layout.o)  # type: ignore[union-attr]
            module = child(self.model.module, path)
            weight, bias = linear_weight(module, path), linear_bias(module)  # type: ignore[arg-type]
            z = self._at(f"blocks.{layer}.attn.hook_z")
            pulled = (reader.to(weight.device) @ weight.to(self.dtype)).to(z.device).reshape(z.shape)
            heads.append((pulled * z).sum(-1))
            biases.append(offset + (reader @ bias.to(reader) if bias is not None else 0.0))
        return torch.stack(heads), torch.as_tensor(biases)

    def _branch_reader(self, layer: int) -> tuple[Tensor, float]:
        """u pulled back through the branch's multiplier and post-norm, and the post-norm bias's contribution."""
        u = self.u * self.model.layout.branch_scale  # type: ignore[union-attr]
        norm = self.norms.get(f"blocks.{layer}.ln1_post")
        if norm is None:
            return u, 0.0
        scaled = u if norm.gain is None else u * norm.gain.to(u)
        scaled = scaled - scaled.mean() if norm.centred else scaled
        offset = float(u @ norm.bias.to(u)) if norm.bias is not None else 0.0
        return scaled / self._at(f"blocks.{layer}.ln1_post.hook_scale"), offset
