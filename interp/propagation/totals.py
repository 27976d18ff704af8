"""Totals: an observable's covector at every site, over all paths; one sweep through the linearised network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError, CompletenessError, SiteError
from interp.hooks.frozen_gradients import frozen_gradients
from interp.hooks.linearization import Linearization, LinearizationLike
from interp.hooks.model import Model
from interp.hooks.site import Site, SiteLike
from interp.hooks.table import Rows, Table
from interp.propagation.feature_vectors import FeatureVector
from interp.propagation.reference import Reference, no_stream
from interp.propagation.stages import MLP, pull_branch, pull_heads, pull_norm_at
from interp.propagation.starts import Measured, Start, read_measured, start_of

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


@dataclass(frozen=True, eq=False, repr=False)
class Totals(Rows, Mapping[str, Tensor]):
    """Covectors of observables by site, [observable, pos, ...]: the rows of the linearised network.

    At every residual site Σ_pos G · x + offset is the measurement. Positions behind the measured one are zero. Where
    the sweep was a backward pass, the offset at the embeddings is that of the linearised network run on zeros, and the
    others are what is missing to the measurement.

    Attributes:
        covectors: By site, in the order of the backward sweep.
        offsets: Constant terms [observable] at residual sites.
        observables: Names.
        position: Whose logits (or site) are measured; the last position of sequences.
        measurement: Value of each observable: n · logits (before a final soft-cap), or vector · x at its site.
        linearization: What was held.
        reference: The run around which the network was linearised.
        note: What to know when reading the numbers.
    """

    covectors: dict[str, Tensor]
    offsets: dict[str, Tensor]
    observables: list[str]
    position: int
    measurement: Float[Tensor, "observable"]
    linearization: Linearization
    reference: Reference
    note: str = ""

    def __getitem__(self, site: SiteLike) -> Tensor:
        if str(site) not in self.covectors:
            near = get_close_matches(str(site), list(self.covectors), 3)
            some = ", ".join(near or list(self.covectors)[:4])
            hint = f"did you mean {some}? " if near else ""
            raise SiteError(f"totals at {site}", f"one of {some}, ...", f"{hint}Or name it in sites=")
        return self.covectors[str(site)]

    def __contains__(self, site: object) -> bool:
        return isinstance(site, (str, Site)) and str(site) in self.covectors

    def get(self, site: SiteLike, default=None):  # type: ignore[override]
        """Return the covectors at a site, or the default where it was not swept."""
        return self.covectors.get(str(site), default)

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
        where = (-1,) if site.positions == "last" else site.positions
        if not isinstance(where, tuple) or len(where) != 1:
            raise SiteError(f"{site}", "one position, as in blocks.6.hook_resid_pre@3")
        index, position = self._index(observable), self.reference.position(where[0])
        value = self._own_head(site, self[site.whole][index, position])
        # What other positions and heads carry is constant here: score + offset is the measurement at the reference.
        score = float(value @ self._own_head(site, self.reference.at(str(site.whole))[position]))
        offset = float(self.measurement[index]) - score
        return FeatureVector(
            value, offset, site.at(positions=position), self.observables[index], "all paths", self.linearization,
            "reference", self.reference.model, self.note,
        )  # fmt: skip

    @staticmethod
    def _own_head(site: Site, value: Tensor) -> Tensor:
        if value.ndim == 1 and site.head is None:
            return value
        if value.ndim == 1 or site.head is None or len(site.head) != 1:
            shape = f"{site}, whose covector at one position is {list(value.shape)}"
            raise SiteError(shape, "one head, as in ...hook_z#3@5" if value.ndim > 1 else "no head")
        if not site.head[0] < len(value):
            raise SiteError(f"head {site.head[0]} of {site} out of range", f"heads 0-{len(value) - 1}")
        return value[site.head[0]]

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

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each site and observable: the covector's norm, over all positions and at the measured one."""
        return [
            {
                "site": site, "observable": name, "norm": float(value[i].norm()),
                "norm_here": float(value[i, self.position].norm()),
            }
            for site, value in self.covectors.items()
            for i, name in enumerate(self.observables)
        ]  # fmt: skip

    def __repr__(self) -> str:
        named = ", ".join(f"{n} = {m:.4g}" for n, m in zip(self.observables, self.measurement.tolist(), strict=True))
        text = f"{named} at position {self.position} ({self.linearization.name}): {len(self)} sites"
        return f"Totals({text}{', ' + self.note if self.note else ''})"

    def _repr_html_(self) -> str:
        return Table(self.to_records(), repr(self)[len("Totals(") : -1])._repr_html_()


def _tolerance(model: Model) -> float:
    return _TOLERANCE.get(model.dtype, 5e-2)


def propagate_all(
    model: Model, observables: "Measured | Sequence[Measured]", prompt: Any, *, position: int = -1,
    linearization: LinearizationLike = "path", sites: Sequence[SiteLike] | None = None,
) -> Totals:  # fmt: skip
    """Return the covectors of observables at every site, over all paths, from one backward sweep.

    With the pattern held the sweep is in closed form, all observables as one batch axis. Where the linearisation
    differentiates the pattern, or an MLP has no closed form, it is one batched backward pass through the network with
    the rest held. Both give the same (tested).

    Args:
        model: A decoder.
        observables: One, or several: all of the logits, among them sequences (`Observable.sequence`), or all of one
            site (`Observable.from_residual`), from which the sweep then begins.
        prompt: One text or token ids, or a `Reference`.
        position: Whose next-token logits are measured, or where the observables' site is read, where they do not name
            positions of their own.
        linearization: ``path``, ``frozen``, ``exact`` or another.
        sites: Sites to keep: residual streams, ``hook_attn_out``, ``hook_mlp_out``, ``attn.hook_z``, ``attn.hook_v``,
            ``mlp.hook_post``, ``ln1.hook_out``, ``ln2.hook_out``, ``ln_final.hook_out``, ``hook_embed``,
            ``hook_pos_embed``; all of them by default. Globs select.

    Raises:
        SiteUnavailableError: If the model has no residual stream.
        SiteError: If a site is not one of these.
        ArgumentError: If observables are of different sites, a vector does not fit its site, or a sequence was made
            from other tokens.
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
    many, wanted = read_measured(observables), _wanted(model, sites)
    ref = Reference.of(model, prompt)
    start = start_of(ref, many, position)
    plain = held.attention == "frozen" and not held.overrides and start.site.endswith(_STARTS)
    closed = plain and all(ref.activation(i) is not None for i in range(model.n_layers))
    sweep = _Sweep(ref, start, held)
    if closed:
        sweep.run(wanted)
    else:
        sweep.run_autograd(wanted)
    if not wanted & set(sweep.values):
        raise SiteError(f"totals at {', '.join(sorted(wanted)[:3])}", f"sites in front of {start.site}, which is read")
    found = Totals(
        {s: v for s, v in sweep.values.items() if s in wanted}, {s: c for s, c in sweep.offsets.items() if s in wanted},
        start.names, start.position, sweep.measurement, held, ref, start.note,
    )  # fmt: skip
    wrong = [row for row in found.check() if not row["holds"]]
    if wrong:
        raise _incomplete(model, wrong[0]["site"], wrong[0]["error"])
    return found


def _incomplete(model: Model, where: str, error: float) -> CompletenessError:
    return CompletenessError(
        f"Σ G x + offset at {where} misses the measurement by {error:.1e} (relative)",
        f"at most {_tolerance(model):.0e}",
    )


# Where the closed form begins; from other sites it is a backward pass.
_STARTS = ("ln_final.hook_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
_SWEPT = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
_INNER = ("attn.hook_z", "attn.hook_v", "mlp.hook_post", "ln1.hook_out", "ln2.hook_out")
_ENDS = ("hook_embed", "hook_pos_embed", "ln_final.hook_out")


def _wanted(model: Model, sites: Sequence[SiteLike] | None) -> set[str]:
    if model.bindings is None:
        raise no_stream(model)
    known = set(model.bindings.by_address)
    names = list(_ENDS)
    names += [f"blocks.{i}.{part}" for i in range(model.n_layers) for part in (*_SWEPT, *_INNER)]
    legal = [name for name in names if name in known]
    if sites is None:
        return set(legal)
    chosen = {str(site.whole) for site, _ in model.resolve([Site.parse(s).whole for s in sites])}
    odd = sorted(chosen - set(legal))
    if odd:
        raise SiteError(
            f"totals at {', '.join(odd[:3])}", f"{', '.join(_ENDS)}, or sites ending in {', '.join((*_SWEPT, *_INNER))}"
        )
    return chosen


class _Sweep:
    """Covectors [observable, pos, d] moved from where observables are read to the embedding."""

    def __init__(self, ref: Reference, start: Start, held: Linearization):
        self.ref, self.model, self.held, self.start = ref, ref.model, held, start
        self.measurement, self.offset = start.measurement, start.constant
        self.values: dict[str, Tensor] = {}
        self.offsets: dict[str, Tensor] = {}
        self._begun = False

    def run(self, wanted: set[str]) -> None:
        """The closed form."""
        start, layers = self.start, self.model.n_layers
        total = torch.zeros_like(start.covectors)
        if start.site == "ln_final.hook_out":
            y = self._reach(start.site, total)
            total, offset = pull_norm_at(self.ref, y, "ln_final", self.held.norm)
            self.offset = self.offset + offset.sum(-1)
        else:
            layers = int(start.site.split(".")[1]) + 1
        for layer in reversed(range(layers)):
            total = self._block(layer, total, wanted)
        for name in ("hook_embed", "hook_pos_embed"):
            self.values[name] = total
        if not self.ref.has("hook_pos_embed"):
            self.offsets["hook_embed"] = self.offset

    def _reach(self, site: str, y: Tensor) -> Tensor:
        """What arrives at a site: from behind it, or because the sweep begins there."""
        if site == self.start.site:
            self._begun, y = True, y + self.start.covectors
        if self._begun:
            self.values[site] = y
        return y

    def _put(self, site: str, y: Tensor) -> None:
        """At a site inside a branch; two branches may read it, as the norm of a parallel block."""
        if self._begun:
            self.values[site] = self.values[site] + y if site in self.values else y

    def _keep(self, site: str, total: Tensor, offset: Tensor) -> Tensor:
        """At a residual stream, with the offset that belongs to it."""
        total, self.offset = self._reach(site, total), offset
        if self._begun:
            self.offsets[site] = offset
        return total

    def _block(self, layer: int, total: Tensor, wanted: set[str]) -> Tensor:
        parallel, name = self.ref.weights.layout.parallel, f"blocks.{layer}"
        total = self._keep(f"{name}.hook_resid_post", total, self.offset)
        through_mlp, mlp_offset = self._mlp(layer, self._reach(f"{name}.hook_mlp_out", total), wanted)
        if not parallel:
            total = self._keep(f"{name}.hook_resid_mid", total + through_mlp, self.offset + mlp_offset)
        through_heads, offset = self._attention(layer, self._reach(f"{name}.hook_attn_out", total))
        if parallel:
            total, offset = total + through_mlp, offset + mlp_offset
        return self._keep(f"{name}.hook_resid_pre", total + through_heads, self.offset + offset)

    def _mlp(self, layer: int, total: Tensor, wanted: set[str]) -> tuple[Tensor, Tensor]:
        y, post_norm = pull_branch(self.ref, total, layer, "ln2_post", self.held.norm)
        pulled, post, offset = MLP(self.ref, layer).pull(y, self.held, self.ref.mlp_input(layer))
        if f"blocks.{layer}.mlp.hook_post" in wanted:
            self._put(f"blocks.{layer}.mlp.hook_post", post)
        self._put(f"{self.ref.mlp_norm(layer)}.hook_out", pulled)
        x, norm = pull_norm_at(self.ref, pulled, self.ref.mlp_norm(layer), self.held.norm)
        return x, (post_norm + offset + norm).sum(-1)

    def _attention(self, layer: int, total: Tensor) -> tuple[Tensor, Tensor]:
        name = f"blocks.{layer}"
        y, post_norm = pull_branch(self.ref, total, layer, "ln1_post", self.held.norm)
        pulled, z, v, offset = pull_heads(self.ref.weights, y, layer, self.ref.pattern(layer))
        self._put(f"{name}.attn.hook_z", z)
        self._put(f"{name}.attn.hook_v", v)
        self._put(f"{name}.ln1.hook_out", pulled)
        x, norm = pull_norm_at(self.ref, pulled, f"{name}.ln1", self.held.norm)
        return x, offset + (post_norm + norm).sum(-1)

    def run_autograd(self, wanted: set[str]) -> None:
        """One batched backward pass through the network with its decisions held."""
        ends = [s for s in ("hook_embed", "hook_pos_embed") if self.ref.has(s)]
        order, start = _order(self.model), self.ref.batch.starts[0]
        before = order[: order.index(self.start.output) + 1]
        sites = [s for s in before if s in wanted or s in ends]
        grads, constant = frozen_gradients(
            self.model, self.ref.batch, sites, self.start.output, self.start.readout, self.held
        )
        for site, grad in grads.items():
            grad = grad[:, start : start + self.ref.length].to(self.start.covectors)
            self.values[site] = grad
            if "resid" in site:
                self.offsets[site] = self.measurement - (grad * self.ref.at(site)).flatten(1).sum(1)
        constant = constant.to(self.measurement)
        if len(ends) == 1:
            self.offsets[ends[0]] = constant
        self._check_at(ends, constant)

    def _check_at(self, sites: list[str], constant: Tensor) -> None:
        """Refuse a backward pass whose covectors at the embeddings miss the measurement."""
        terms = torch.cat([(self.values[s] * self.ref.at(s)).flatten(1) for s in sites], 1)
        gap = (terms.sum(1) + constant - self.measurement).abs()
        error = float((gap / (terms.abs().sum(1) + constant.abs()).clamp(min=1e-30)).max())
        if not error <= _tolerance(self.model):
            raise _incomplete(self.model, " + ".join(sites), error)


def _order(model: Model) -> list[str]:
    assert model.bindings is not None
    return list(model.bindings.by_address)
