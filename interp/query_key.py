"""The query-key side: why a head looks where it looks, as terms that sum to its score.

A score is bilinear, S[t, s] = scale (R_t q_t) · (R_s k_s). With the other side, the norm's divisors and the rotation
held, each side is linear in its stream: an observable of its own. Observable propagation itself holds patterns, so that
what moves them, such as an induction head's match, is invisible to it; this is the other half.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.block_weights import projection_to
from interp.hooks.errors import ArgumentError, CompletenessError, PositionError, SiteUnavailableError
from interp.hooks.frozen_gradients import frozen_gradients
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.hooks.site import Site
from interp.hooks.table import Rows, Table
from interp.propagation.components import Components, components, written_sites
from interp.propagation.feature_vectors import FeatureVector
from interp.propagation.reference import Reference
from interp.propagation.stages import centred_gain, pull_norm_at
from interp.propagation.totals import Totals

Side = Literal["query", "key"]
_HELD = Linearization.of("frozen")
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class AttentionScore(Rows):
    """One score of one head, before soft-cap and mask: which parts of either stream make it.

    Attributes:
        layer: Block.
        head: Query head.
        destination: Position that looks, from 0.
        source: Position that is looked at.
        score: scale (R_t q) · (R_s k).
        probability: What the softmax makes of it.
        query: Its vector on the destination's stream; score = query.vector · x + query.offset.
        key: Its vector on the source's stream.
        names: Components of the two streams.
        matrix: [destination component, source component]: their terms; with biases of q and k as the last row and
            column, they sum to the score.
    """

    layer: int
    head: int
    destination: int
    source: int
    score: float
    probability: float
    query: FeatureVector
    key: FeatureVector
    names: tuple[list[str], list[str]] = field(repr=False)
    matrix: Float[Tensor, "destination source"] = field(repr=False)

    @property
    def completeness_error(self) -> float:
        """|sum of terms - score| over the sum of absolute terms."""
        return abs(float(self.matrix.sum()) - self.score) / max(float(self.matrix.abs().sum()), 1e-30)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each pair of destination and source component; the values sum to the score."""
        pairs = itertools.product(*self.names)
        return [
            {"destination": d, "source": s, "value": v}
            for (d, s), v in zip(pairs, self.matrix.flatten().tolist(), strict=True)
        ]

    def by_component(self, side: Side = "query") -> Table:
        """Return the terms of one side's stream, largest first; they sum to the score.

        Raises:
            ArgumentError: If the side is neither ``query`` nor ``key``.
        """
        if side not in ("query", "key"):
            raise ArgumentError(f"side={side!r}", "'query' or 'key'")
        axis = 1 if side == "query" else 0
        names, values = self.names[1 - axis], self.matrix.sum(axis).tolist()
        rows = [{"component": n, "value": v} for n, v in zip(names, values, strict=True)]
        title = f"L{self.layer}H{self.head} {self.destination} -> {self.source}: score {self.score:.4f} by {side} side"
        return Table(sorted(rows, key=lambda r: -abs(r["value"])), title)

    def top(self, k: int = 10) -> Table:
        """Return the k largest pairs of destination and source component."""
        rows = sorted(self.to_records(), key=lambda row: -abs(row["value"]))[:k]
        return Table(rows, f"L{self.layer}H{self.head} {self.destination} -> {self.source}: score {self.score:.4f}")

    def _repr_html_(self) -> str:
        return self.top(12)._repr_html_()


@torch.no_grad()
def attention_score(model: Model, prompt: Any, layer: int, head: int, destination: int, source: int) -> AttentionScore:
    """Return a head's score from one position to another, taken apart by what the streams are made of.

    With n the normalised streams, S = Σ_ij n_t^i B n_s^j + biases, B = scale W_Q R_tᵀ R_s W_Kᵀ; i and j run over
    embeddings, heads and MLPs of earlier layers. Divisors of the block's norm, and of norms on queries and keys, are
    held at their values, as in attribution; the terms then sum exactly.

    Args:
        model: A decoder.
        prompt: One text or token ids.
        layer: Block of the head.
        head: Query head.
        destination: Position that looks (negative from the end).
        source: Position that is looked at; not behind the destination.

    Raises:
        ArgumentError: If the layer or head does not exist.
        PositionError: If a position lies outside the prompt, or the source behind the destination.
        SiteUnavailableError: If queries or keys cannot be seen apart.
        CompletenessError: If the terms do not sum to the model's own score.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> found = interp.attention_score(model, "one two three one two", 5, 3, destination=-1, source=2)
        >>> abs(float(found.matrix.sum()) - found.score) < 1e-3 * float(found.matrix.abs().sum())
        True
    """
    _check(model, layer, head)
    name = f"blocks.{layer}"
    inner = [f"{name}.attn.hook_{part}" for part in ("q", "k", "rot_q", "rot_k", "attn_scores")]
    ref = Reference(model, prompt, (*written_sites(model), *_known(model, inner)))
    t, s = ref.position(destination), ref.position(source)
    if s > t:
        raise PositionError(f"source position {s} is after destination {t}", "a source that the destination sees")
    group = ref.weights.group(head)
    left = _Side(ref, layer, "q", head, t)
    right = _Side(ref, layer, "k", group, s)
    scale = score_scale(ref, layer)
    score = scale * float(left.turned @ right.turned)
    matrix = scale * (left.parts() @ right.parts().T)
    vectors = [
        _vector(ref, one, scale * (other.turned @ one.map), score, layer, side, head)
        for one, other, side in ((left, right, "query"), (right, left, "key"))
    ]
    found = AttentionScore(
        layer, head, t, s, score, float(ref.pattern(layer)[head, t, s]), vectors[0], vectors[1],
        (left.names, right.names), matrix,
    )  # fmt: skip
    if not found.completeness_error <= _TOLERANCE:
        raise CompletenessError(
            f"terms of {name}#{head} sum to {float(matrix.sum()):.6g}, the score is {score:.6g}",
            f"a relative difference below {_TOLERANCE:.0e}",
        )
    return found


def _check(model: Model, layer: int, head: int) -> None:
    heads = 0 if model.layout is None else model.layout.n_heads
    if not 0 <= layer < model.n_layers:
        raise ArgumentError(f"layer {layer}", f"0..{model.n_layers - 1}")
    if not 0 <= head < heads:
        raise ArgumentError(f"head {head} out of range for layer {layer}", f"query heads 0-{heads - 1}")


def _known(model: Model, sites: list[str]) -> list[str]:
    known = model.bindings.by_address if model.bindings else {}
    missing = [site for site in sites if site not in known]
    if missing:
        raise SiteUnavailableError(f"{missing[0]} of {type(model.module).__name__}", "queries and keys of plain heads")
    return sites


class _Side:
    """Queries, or keys, of one head at one position: parts of the stream through norm, projection and rotation."""

    def __init__(self, ref: Reference, layer: int, part: str, head: int, position: int):
        self.ref, self.layer, self.head, self.position = ref, layer, head, position
        self.site = f"blocks.{layer}.attn.hook_{part}"
        self.projection = projection_to(ref.model, self.site, ref.weights.dtype)
        self.plain = ref.at(self.site)[position, head]
        self.turned = ref.at(f"blocks.{layer}.attn.hook_rot_{part}")[position, head]
        self.map = _turn(ref, self.site, f"blocks.{layer}.attn.hook_rot_{part}", position, head)
        self.stream: Components = components(ref, f"blocks.{layer}.hook_resid_pre", position)
        self.names = [*self.stream.names, "norm's bias", f"b_{part.upper()}"]

    def parts(self) -> Float[Tensor, "component d_head"]:
        """Each component's part of the turned query or key, then the norm's bias and the projection's."""
        name = f"blocks.{self.layer}.ln1"
        norm = self.ref.weights.norm(name)
        values = self.stream.values
        bias = values.new_zeros(values.shape[-1])
        if norm is not None:
            values = centred_gain(values, norm) / self.ref.at(f"{name}.hook_scale")[self.position]
            bias = bias if norm.bias is None else norm.bias.to(values)
        weight = self.projection.weight[:, self.head]
        own = values.new_zeros(weight.shape[-1]) if self.projection.bias is None else self.projection.bias[self.head]
        plain = torch.cat([values @ weight, (bias @ weight)[None], own[None]])
        return plain @ self.map.T


def _turn(ref: Reference, plain: str, turned: str, position: int, head: int) -> Float[Tensor, "turned plain"]:
    """The map from a query (key) to what the scores see: rotation, and a norm with its divisor held."""
    start = ref.batch.starts[0]
    with torch.enable_grad():
        found, _ = frozen_gradients(
            ref.model, ref.batch, [plain], turned, lambda x: x[0, start + position, head], _HELD
        )  # fmt: skip
    return found[plain][:, start + position, head].to(ref.weights.dtype)


def score_scale(ref: Reference, layer: int) -> float:
    """The factor between the product of queries and keys and the scores, read off the scores themselves."""
    name = f"blocks.{layer}.attn"
    q, k = ref.at(f"{name}.hook_rot_q"), ref.at(f"{name}.hook_rot_k")
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    product = torch.einsum("thd,shd->hts", q, k).double()
    scores = ref.at(f"{name}.hook_attn_scores").double()
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril() & (scores > -1e4)
    cap = getattr(ref.model.config, "attn_logit_softcapping", None)
    plain = scores if cap is None else cap * torch.atanh((scores / cap).clamp(-1 + 1e-7, 1 - 1e-7))
    keep = seen if cap is None else seen & (scores.abs() < 0.9 * cap)
    x, y = product[keep], plain[keep]
    scale = float((x @ y) / (x @ x))
    off = float((y - scale * x).abs().max()) if len(x) else float("inf")
    if not off <= 1e-2 * float(y.abs().max()):
        raise SiteUnavailableError(
            f"scores of {name} that are no multiple of queries times keys (off by {off:.1e})",
            "scores without a positional term of their own",
        )
    return scale


def _vector(
    ref: Reference, side: _Side, on_plain: Tensor, score: float, layer: int, what: str, head: int
) -> FeatureVector:
    y = side.projection.weight[:, side.head] @ on_plain
    y, _ = pull_norm_at(ref, y, f"blocks.{layer}.ln1", "frozen", side.position)
    x = ref.at(f"blocks.{layer}.hook_resid_pre")[side.position]
    site = Site(f"blocks.{layer}.hook_resid_pre").at(positions=side.position)
    name, offset = f"score of L{layer}H{head}", score - float(y @ x)
    return FeatureVector(y, offset, site, name, f"{what} side", _HELD, "reference", ref.model)


@torch.no_grad()
def pattern_effects(totals: Totals, layer: int) -> Float[Tensor, "observable head destination source"]:
    """Return the derivative of each observable by each score of a layer, through the pattern alone.

    ∂m/∂S[t, s] = A[t, s] (c_s - Σ_s' A[t, s'] c_s'), with c_s = (W_O y_t) · v_s. It is 0 where a head's values agree:
    moving the pattern then moves nothing.

    Args:
        totals: Covectors with ``attn.hook_z`` of the layer.
        layer: Which block.

    Raises:
        SiteError: If the totals were not swept at this layer's z.
    """
    ref = totals.reference
    z = totals[f"blocks.{layer}.attn.hook_z"]
    values = ref.weights.values(layer)
    name = f"blocks.{layer}.ln1"
    norm = ref.weights.norm(name)
    x = ref.at(f"{name}.hook_normalized") if norm is not None else ref.at(f"blocks.{layer}.hook_resid_pre")
    v = values(x if norm is None else norm.finish(x).to(x)).repeat_interleave(z.shape[-2] // values.weight.shape[1], 1)
    gains = torch.einsum("othd,shd->ohts", z, v)
    pattern = ref.pattern(layer)
    return pattern * (gains - (pattern * gains).sum(-1, keepdim=True))
