"""Edge attribution: what flows from each component into each reader, to first order, from one backward pass.

Source: Syed, Rager & Conmy, "Attribution Patching Outperforms Automated Circuit Discovery", 2023 (arXiv 2310.10348);
Hanna et al., "Have Faith in Faithfulness", 2024 (arXiv 2403.17806).
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.block_weights import projection_from, projection_to
from interp.hooks.errors import ArgumentError, SiteUnavailableError
from interp.hooks.model import Model
from interp.hooks.weights import Norm
from interp.patching.attribution import audited
from interp.patching.grid import PatchGrid
from interp.patching.paths import edge_values
from interp.patching.prompts import Direction, Metric, Pairs, sides
from interp.propagation.stages import pull_norm

Named = tuple[list[str], Tensor]


def edge_attribution(
    model: Model, clean: Any, corrupt: Any, metric: Metric, *, direction: Direction = "denoise", audit: int = 20,
    seed: int = 0, position: int | None = -1, batch_size: int | None = None,
) -> PatchGrid:  # fmt: skip
    """Return the first-order effect of each edge: (source - base output) · gradient at the reader's input.

    Sources are the embedding, heads and MLPs; readers are queries, keys and values of heads, inputs of MLPs, and the
    logits, each behind its own norm, which is differentiated. All positions are summed. One backward pass of the base
    run (corrupt where one denoises) gives all edges; a sample is patched exactly, as `path_patch` does. Over all
    readers of a source the effects sum to its own first-order effect, that of `attribution_patching`. Edges that do not
    exist are NaN.

    Args:
        model: A decoder whose branches are added to one residual stream.
        clean: As for `patch_grid`.
        corrupt: As for `patch_grid`.
        metric: As for `patch_grid`; a function must be differentiable.
        direction: As for `patch_grid`.
        audit: How many edges are also patched exactly: half of them the largest, half drawn.
        seed: Of the drawn edges.
        position: As for `patch_grid`.
        batch_size: As for `patch_grid`.

    Raises:
        ArgumentError: As for `patch_grid`.
        SiteUnavailableError: If the model has no residual stream that branches add to, or queries, keys and values
            cannot be seen apart.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> text = "When {} and {} went to the store, {} gave a drink to"
        >>> clean, corrupt = text.format("Mary", "John", "John"), text.format("Mary", "John", "Mary")
        >>> mary = interp.Observable.logit_diff(model, " Mary", " John")
        >>> edges = interp.edge_attribution(model, clean, corrupt, mary, audit=0)
        >>> edges.top(1)[0]["destination"]
        'logits'
    """
    pairs = Pairs(model, clean, corrupt, metric, position)
    base, source = sides(direction)
    if isinstance(audit, bool) or not isinstance(audit, int) or audit < 0:
        raise ArgumentError(f"audit={audit!r}", "an int of at least 0")
    if pairs.measure.is_divergence and direction == "noise":
        raise ArgumentError("the gradient of KL(clean ‖ run) at the clean run, which is 0", "direction='denoise'")
    sites, size = _Sites(model), pairs.rows(batch_size)
    runs: list[Tensor] = []
    order: list[int] = []
    ends = {side: torch.empty(len(pairs), dtype=pairs.dtype) for side in ("clean", "corrupt")}
    for chunk in pairs.chunks(size):
        captured = chunk.run(source, sites.written)
        before, measured = chunk.gradients(base, sites.all)
        scores = _Edges(sites, captured, before, pairs.dtype).scores()
        runs.append((measured[:, None, None] + scores).cpu())
        order += chunk.pairs
        for side, values in chunk.measured.items():
            ends[side][chunk.pairs] = values.cpu()
    found = torch.cat(runs)[torch.tensor(order).argsort()]
    axes = {"source": sites.sources, "destination": sites.destinations}
    grid = PatchGrid(
        pairs.measure.name, "edge attribution", direction, axes, None, found, ends["clean"], ends["corrupt"]
    )
    named = lambda i: (sites.sources[i // len(sites.destinations)], sites.destinations[i % len(sites.destinations)])
    return audited(grid, audit, seed, lambda chosen: edge_values(pairs, [named(i) for i in chosen], direction, size))


class _Sites:
    """What is read, and what sources and destinations are called."""

    def __init__(self, model: Model):
        layout = model.layout
        if layout is None or layout.post_ln or layout.unembed is None or model.bindings is None:
            raise SiteUnavailableError(
                f"edges of {type(model.module).__name__} ({model.family})",
                "a layout whose branches are added to one residual stream",
            )
        self.model, self.known, self.layout, n = model, model.bindings.by_address, layout, model.n_layers
        self.last = f"blocks.{n - 1}.hook_resid_post"
        blocks = [f"blocks.{i}" for i in range(n)]
        self.written = ["hook_embed", *(f"{b}.{part}" for b in blocks for part in ("attn.hook_z", "hook_mlp_out"))]
        inner = [f"{b}.attn.hook_{part}" for b in blocks for part in "qkv"]
        model.resolve(inner)
        norms = [f"{name}.{part}" for name in model.bindings.norms for part in ("hook_scale", "hook_normalized")]
        mlps = [s for i in range(n) for s in self.mlp_inputs(i)]
        self.all = list(dict.fromkeys([*self.written, *inner, *mlps, *(s for s in norms if "blocks" in s), self.last]))
        heads, kv = layout.n_heads, layout.n_kv_heads
        self.sources = ["embed"] + [
            name for i in range(n) for name in (*(f"L{i}H{h}" for h in range(heads)), f"L{i}MLP")
        ]
        key = "H" if heads == kv else "KV"
        self.destinations = []
        for i in range(n):
            self.destinations += [f"L{i}H{h}.q" for h in range(heads)]
            self.destinations += [f"L{i}{key}{h}.{part}" for part in "kv" for h in range(kv)]
            self.destinations.append(f"L{i}MLP")
        self.destinations.append("logits")

    def mlp_inputs(self, layer: int) -> list[str]:
        """Sites whose gradients say what the MLP alone reads: its pre-activations, or its own norm's output."""
        parts = [f"blocks.{layer}.mlp.{part}" for part in ("hook_pre", "hook_pre_linear")]
        found = [s for s in parts if s in self.known]
        if found:
            return found
        own = f"blocks.{layer}.ln2.hook_out"
        if own not in self.known:
            raise SiteUnavailableError(f"the input of L{layer}MLP", "pre-activations, or a norm of the MLP's own")
        return [own]


class _Edges:
    """Covectors of readers on the stream, and changes of it that sources make, of the pairs of a chunk."""

    def __init__(self, sites: _Sites, captured: Activations, before: Activations, dtype: torch.dtype):
        self.sites, self.model, self.dtype = sites, sites.model, dtype
        self.captured, self.before = captured, before
        assert sites.model.bindings is not None
        self.norms = sites.model.bindings.norms

    def scores(self) -> Float[Tensor, "pair source destination"]:
        """change · covector for each edge that exists, NaN elsewhere."""
        changes, columns = [self._change("hook_embed")[:, :, None]], []
        for layer in range(self.model.n_layers):
            into = self._readers(layer)
            early = torch.cat(changes, 2)
            attention = [self._dot(early, y) for y in into[:-1]]
            heads = self._heads(layer)
            if not self.sites.layout.parallel:
                early = torch.cat([early, heads], 2)
            columns += [*attention, self._dot(early, into[-1])]
            changes += [heads, self._change(f"blocks.{layer}.hook_mlp_out")[:, :, None]]
        every = torch.cat(changes, 2)
        columns.append(self._dot(every, self._gradient(self.sites.last)[:, :, None]))
        n = every.shape[2]
        pad = lambda t: torch.nn.functional.pad(t, (0, 0, 0, n - t.shape[1]), value=torch.nan)
        return torch.cat([pad(c) for c in columns], 2)

    @staticmethod
    def _dot(changes: Float[Tensor, "pair pos source d"], readers: Float[Tensor, "pair pos reader d"]) -> Tensor:
        return torch.einsum("kpsd,kprd->ksr", changes, readers)

    def _gradient(self, site: str) -> Tensor:
        assert self.before.gradients is not None
        return self.before.gradients[site].to(self.dtype)

    def _change(self, site: str) -> Tensor:
        return self.captured[site].to(self.dtype) - self.before[site].to(self.dtype)

    def _readers(self, layer: int) -> list[Float[Tensor, "pair pos reader d"]]:
        """Covectors on the stream of a layer's queries, keys, values and MLP."""
        found = []
        for part in "qkv":
            site = f"blocks.{layer}.attn.hook_{part}"
            weight = projection_to(self.model, site, self.dtype).weight
            read = torch.einsum("dhk,nphk->nphd", weight, self._gradient(site))
            found.append(self._through(f"blocks.{layer}.ln1", read))
        layout, parts = self.sites.layout, self.sites.mlp_inputs(layer)
        own = parts[0].endswith("ln2.hook_out")
        pull = lambda site: self._gradient(site) if own else projection_to(self.model, site, self.dtype).pull(
            self._gradient(site)
        )  # fmt: skip
        total = torch.stack([pull(site) for site in parts]).sum(0)
        norm = "ln1" if layout.parallel and layout.ln2 is None else "ln2"
        found.append(self._through(f"blocks.{layer}.{norm}", total[:, :, None]))
        return found

    def _through(self, name: str, y: Float[Tensor, "pair pos reader d"]) -> Float[Tensor, "pair pos reader d"]:
        """From a norm's output to the stream in front of it."""
        if (norm := self.norms.get(name)) is None:
            return y
        return pull_norm(y, norm, "tangent", *self._norm_values(name))[0]

    def _norm_values(self, name: str) -> Iterator[Tensor]:
        """Divisor and normalised input of the base run, with an axis for readers or sources."""
        return (self.before[f"{name}.{part}"].to(self.dtype)[:, :, None] for part in ("hook_scale", "hook_normalized"))

    def _heads(self, layer: int) -> Float[Tensor, "pair pos head d"]:
        """What each head's change adds to the stream, a norm behind the branch differentiated."""
        site = f"blocks.{layer}.attn.hook_z"
        weight = projection_from(self.model, site, self.dtype).weight
        raw = torch.einsum("nphk,hkd->nphd", self._change(site), weight)
        name = f"blocks.{layer}.ln1_post"
        if (norm := self.norms.get(name)) is not None:
            raw = _push_norm(raw, norm, *self._norm_values(name))
        return raw * self.sites.layout.branch_scale


def _push_norm(x: Float[Tensor, "... d"], norm: Norm, scale: Tensor, normalized: Tensor) -> Float[Tensor, "... d"]:
    """J x of a norm at its base: γ ⊙ (P x - n (n · P x) / d) / r."""
    x = norm.centre(x)
    x = (x - normalized * (normalized * x).mean(-1, keepdim=True)) / scale
    return x if norm.gain is None else x * norm.gain.to(x)
