"""Totals: an observable's covector at every site, over all paths; one sweep through the linearised network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError, CompletenessError, SiteError
from interp.hooks.frozen_gradients import frozen_gradients
from interp.hooks.linearization import Linearization, LinearizationLike
from interp.hooks.model import Model
from interp.hooks.site import Site, SiteLike
from interp.hooks.table import Table
from interp.observables import Observable
from interp.propagation.feature_vectors import FeatureVector
from interp.propagation.reference import Reference
from interp.propagation.stages import MLP, pull_branch, pull_heads, pull_norm_at

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


@dataclass(frozen=True, eq=False)
class Totals(Mapping[str, Tensor]):
    """Covectors of observables by site, [observable, pos, ...]: the rows of the linearised network.

    At every residual site Σ_pos G · x + offset is the measurement. Positions behind the measured one are zero.

    Attributes:
        covectors: By site, in the order of the backward sweep.
        offsets: Constant terms [observable] at residual sites.
        observables: Names.
        position: Whose logits are measured.
        measurement: n · logits of each observable (before a final soft-cap).
        linearization: What was held.
        reference: The run around which the network was linearised.
    """

    covectors: dict[str, Tensor] = field(repr=False)
    offsets: dict[str, Tensor] = field(repr=False)
    observables: list[str]
    position: int
    measurement: Float[Tensor, "observable"]
    linearization: Linearization
    reference: Reference = field(repr=False)

    def __getitem__(self, site: SiteLike) -> Tensor:
        if str(site) not in self.covectors:
            near = ", ".join(list(self.covectors)[:4])
            raise SiteError(f"totals at {site}", f"one of {near}, ...", "name it in sites=")
        return self.covectors[str(site)]

    def __iter__(self):
        return iter(self.covectors)

    def __len__(self) -> int:
        return len(self.covectors)

    def vector(self, site: SiteLike, observable: int | str = 0) -> FeatureVector:
        """Return one covector as a feature vector; the site names its position, and its head where it has heads.

        Raises:
            SiteError: If the site was not swept, or names no single position.
            ArgumentError: If there is no such observable.
        """
        site = Site.parse(site)
        if not isinstance(site.positions, tuple) or len(site.positions) != 1:
            raise SiteError(f"{site}", "one position, as in blocks.6.hook_resid_pre@3")
        index = self._index(observable)
        position = self.reference.position(site.positions[0])
        value = self[site.whole][index, position]
        if site.head is not None:
            if len(site.head) != 1 or value.ndim != 2 or not site.head[0] < len(value):
                raise SiteError(f"{site}", "one head of a site with heads")
            value = value[site.head[0]]
        if value.ndim != 1:
            raise SiteError(f"{site}, whose covector is {list(value.shape)}", "one head, as in ...hook_z#3@5")
        # What other positions carry is constant here: score + offset is the measurement at the reference.
        score = float(value @ self._own(site, position))
        offset = float(self.measurement[index]) - score if str(site.whole) in self.offsets else float("nan")
        placed = site.at(positions=position)
        name = self.observables[index]
        return FeatureVector(
            value, offset, placed, name, "all paths", self.linearization, "reference", self.reference.model
        )

    def _own(self, site: Site, position: int) -> Tensor:
        known = self.reference.has(str(site.whole))
        value = self.reference.at(str(site.whole))[position] if known else torch.zeros_like(self[site.whole][0, 0])
        return value[site.head[0]] if site.head is not None else value

    def _index(self, observable: int | str) -> int:
        if isinstance(observable, str):
            if observable not in self.observables:
                raise ArgumentError(f"observable {observable!r}", f"one of {self.observables}")
            return self.observables.index(observable)
        if not -len(self.observables) <= observable < len(self.observables):
            raise ArgumentError(f"observable {observable}", f"an index below {len(self.observables)}")
        return observable % len(self.observables)

    def check(self) -> Table:
        """Return, for each residual site that was swept, how far Σ G · x + offset is from the measurement."""
        rows = []
        for site, offset in self.offsets.items():
            terms = self.covectors[site] * self.reference.at(site)
            found = terms.flatten(1).sum(1) + offset
            scale = terms.flatten(1).abs().sum(1) + offset.abs()
            error = float(((found - self.measurement).abs() / scale.clamp(min=1e-30)).max())
            rows.append({"site": site, "error": error, "holds": error <= _tolerance(self.reference.model)})
        return Table(rows, f"Σ G x + offset = measurement ({self.linearization.name})")


def _tolerance(model: Model) -> float:
    return _TOLERANCE.get(model.dtype, 5e-2)


def propagate_all(
    model: Model, observables: "Observable | Sequence[Observable]", prompt: Any, *, position: int = -1,
    linearization: LinearizationLike = "path", sites: Sequence[SiteLike] | None = None,
) -> Totals:  # fmt: skip
    """Return the covectors of observables at every site, over all paths, from one backward sweep.

    With the pattern held the sweep is in closed form, all observables as one batch axis. Where the linearisation
    differentiates the pattern, or an MLP has no closed form, it is one batched backward pass through the network with
    the rest held. Both give the same (tested).

    Args:
        model: A decoder.
        observables: One, or several.
        prompt: One text or token ids, or a `Reference`.
        position: Whose next-token logits are measured.
        linearization: ``path``, ``frozen``, ``exact`` or another.
        sites: Sites to keep: residual streams, ``hook_attn_out``, ``hook_mlp_out``, ``attn.hook_z``, ``attn.hook_v``,
            ``mlp.hook_post``, ``hook_embed``, ``hook_pos_embed``; all of them by default. Globs select.

    Raises:
        SiteUnavailableError: If the model has no residual stream.
        SiteError: If a site is not one of these.
        CompletenessError: If the parts at a residual site do not sum to the measurement.

    Source: Dunefsky & Cohan 2024; the sum over all paths is an extension.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> n = interp.Observable.logit_diff(model, " Mary", " John")
        >>> found = interp.propagate_all(model, n, "When Mary and John went out, John gave a drink to")
        >>> found["blocks.10.hook_resid_pre"].shape
        torch.Size([1, 12, 576])
    """
    held = Linearization.of(linearization)
    ref = prompt if isinstance(prompt, Reference) else Reference(model, prompt)
    many = [observables] if isinstance(observables, Observable) else list(observables)
    if not many or not all(isinstance(n, Observable) for n in many):
        raise ArgumentError(f"observables={observables!r:.80}", "an Observable, or a list of them")
    place = ref.position(position)
    wanted = _wanted(model, sites)
    closed = held.attention == "frozen" and all(ref.activation(i) is not None for i in range(model.n_layers))
    sweep = _Sweep(ref, many, place, held)
    if closed:
        sweep.run(wanted)
    else:
        sweep.run_autograd(wanted)
    found = Totals(
        {s: v for s, v in sweep.values.items() if s in wanted}, {s: c for s, c in sweep.offsets.items() if s in wanted},
        [n.name for n in many], place, sweep.measurement, held, ref,
    )  # fmt: skip
    wrong = [row for row in found.check() if not row["holds"]]
    if wrong:
        raise CompletenessError(
            f"Σ G x + offset at {wrong[0]['site']} misses the measurement by {wrong[0]['error']:.1e} (relative)",
            f"at most {_tolerance(model):.0e}",
        )
    return found


_SWEPT = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
_INNER = ("attn.hook_z", "attn.hook_v", "mlp.hook_post")


def _wanted(model: Model, sites: Sequence[SiteLike] | None) -> set[str]:
    assert model.bindings is not None
    known = set(model.bindings.by_address)
    names = ["hook_embed", "hook_pos_embed"]
    names += [f"blocks.{i}.{part}" for i in range(model.n_layers) for part in (*_SWEPT, *_INNER)]
    legal = [name for name in names if name in known]
    if sites is None:
        return set(legal)
    chosen = {str(site.whole) for site, _ in model.resolve([Site.parse(s).whole for s in sites])}
    odd = sorted(chosen - set(legal))
    if odd:
        raise SiteError(f"totals at {', '.join(odd[:3])}", f"sites ending in {', '.join((*_SWEPT, *_INNER))}")
    return chosen


class _Sweep:
    """Covectors [observable, pos, d] moved from the final norm to the embedding."""

    def __init__(self, ref: Reference, observables: list[Observable], position: int, held: Linearization):
        self.ref, self.model, self.held, self.position = ref, ref.model, held, position
        self.observables = observables
        pulled = [n.pull_to_stream(self.model) for n in observables]
        self.start = torch.stack([w for w, _ in pulled]).to(ref.weights.dtype)
        self.constant = torch.tensor([c for _, c in pulled], dtype=ref.weights.dtype, device=self.start.device)
        logits = ref.at("unembed.hook_out")[position]
        scale = ref.weights.layout.logit_scale
        self.measurement = torch.stack([n.measure(logits) for n in observables]).to(self.start) * scale
        self.values: dict[str, Tensor] = {}
        self.offsets: dict[str, Tensor] = {}

    def run(self, wanted: set[str]) -> None:
        """The closed form."""
        model, last = self.model, self.model.n_layers - 1
        y, offset = pull_norm_at(self.ref, self.start, "ln_final", self.held.norm, self.position)
        total = y.new_zeros(len(y), self.ref.length, y.shape[-1])
        total[:, self.position] = y
        self._keep(f"blocks.{last}.hook_resid_post", total, self.constant + offset)
        for layer in reversed(range(model.n_layers)):
            total = self._block(layer, total, wanted)
        for name in ("hook_embed", "hook_pos_embed"):
            self.values[name] = total
        if not self.ref.has("hook_pos_embed"):
            self.offsets["hook_embed"] = self.offset

    def _keep(self, site: str, total: Tensor, offset: Tensor) -> None:
        self.values[site], self.offsets[site], self.offset = total, offset, offset

    def _block(self, layer: int, total: Tensor, wanted: set[str]) -> Tensor:
        parallel, name = self.ref.weights.layout.parallel, f"blocks.{layer}"
        self.values[f"{name}.hook_mlp_out"] = total
        through_mlp, mlp_offset = self._mlp(layer, total, wanted)
        if not parallel:
            total = total + through_mlp
            self._keep(f"{name}.hook_resid_mid", total, self.offset + mlp_offset)
        self.values[f"{name}.hook_attn_out"] = total
        through_heads, offset = self._attention(layer, total)
        if parallel:
            total, offset = total + through_mlp, offset + mlp_offset
        total = total + through_heads
        self._keep(f"{name}.hook_resid_pre", total, self.offset + offset)
        if layer:
            self._keep(f"blocks.{layer - 1}.hook_resid_post", total, self.offset)
        return total

    def _mlp(self, layer: int, total: Tensor, wanted: set[str]) -> tuple[Tensor, Tensor]:
        y, post_norm = pull_branch(self.ref, total, layer, "ln2_post", self.held.norm)
        pulled, post, offset = MLP(self.ref, layer).pull(y, self.held, self.ref.mlp_input(layer))
        if f"blocks.{layer}.mlp.hook_post" in wanted:
            self.values[f"blocks.{layer}.mlp.hook_post"] = post
        x, norm = pull_norm_at(self.ref, pulled, self.ref.mlp_norm(layer), self.held.norm)
        return x, (post_norm + offset + norm).sum(-1)

    def _attention(self, layer: int, total: Tensor) -> tuple[Tensor, Tensor]:
        name = f"blocks.{layer}"
        y, post_norm = pull_branch(self.ref, total, layer, "ln1_post", self.held.norm)
        pulled, z, v, offset = pull_heads(self.ref.weights, y, layer, self.ref.pattern(layer))
        self.values[f"{name}.attn.hook_z"], self.values[f"{name}.attn.hook_v"] = z, v
        x, norm = pull_norm_at(self.ref, pulled, f"{name}.ln1", self.held.norm)
        return x, offset + (post_norm + norm).sum(-1)

    def run_autograd(self, wanted: set[str]) -> None:
        """One batched backward pass through the network with its decisions held."""
        sites = [s for s in _order(self.model) if s in wanted]

        scale = self.ref.weights.layout.logit_scale

        def readout(logits: Tensor) -> Tensor:
            here = logits[0, self.ref.batch.starts[0] + self.position] * scale
            return torch.stack([n.measure(here) for n in self.observables])

        grads = frozen_gradients(self.model, self.ref.batch, sites, "unembed.hook_out", readout, self.held)
        for site, grad in grads.items():
            start = self.ref.batch.starts[0]
            grad = grad[:, start : start + self.ref.length].to(self.ref.weights.dtype)
            self.values[site] = grad
            if "resid" in site or (site == "hook_embed" and not self.ref.has("hook_pos_embed")):
                score = (grad * self.ref.at(site)).flatten(1).sum(1)
                self.offsets[site] = self.measurement - score


def _order(model: Model) -> list[str]:
    assert model.bindings is not None
    return list(model.bindings.by_address)
