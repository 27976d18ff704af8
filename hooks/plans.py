"""Plans: interventions resolved against one model and one batch, before any work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.bindings import Binding
from interp.hooks.calls import mark_live
from interp.hooks.errors import InterventionError, ModelStateError
from interp.hooks.inputs import Batch
from interp.hooks.interventions import Intervention, Mean, Patch, PlanLike
from interp.hooks.session import Edit, Read, Selection
from interp.hooks.site import Site

if TYPE_CHECKING:
    from interp.hooks.model import Model


class Probe(Intervention):
    """Adds a zero that requires a gradient: the gradient of anything later with respect to a site.

    Or, in a replay, adds what it was given.
    """

    kind = "probe"
    leaf: Tensor
    given: Tensor | None

    def __init__(self, site: Site):
        super().__init__(site)
        object.__setattr__(self, "leaf", None)
        object.__setattr__(self, "given", None)

    @contextmanager
    def giving(self, value: Tensor) -> Iterator[None]:
        """A run that adds a value instead of a leaf."""
        object.__setattr__(self, "given", value)
        try:
            yield
        finally:
            object.__setattr__(self, "given", None)

    def apply(self, value, context):
        """value + 0, or the value and what was given."""
        if self.given is not None:
            return value + self.given
        if not value.is_floating_point():
            raise InterventionError(f"a gradient at {self.site}, of dtype {value.dtype}", "a floating-point site")
        if not torch.is_grad_enabled():
            raise ModelStateError(
                f"{self.site}, which the network computes with gradients off",
                "a forward that keeps its graph",
                "switch gradient checkpointing (use_reentrant=True) off, or torch.no_grad in the forward",
            )
        leaf = mark_live(torch.zeros_like(value, requires_grad=True))
        object.__setattr__(self, "leaf", leaf)
        return value + leaf

    def edit(self, read: Read) -> Edit:
        """The edit that probes a read."""
        return Edit(self, read.site, read.binding, read.where)


def resolve_plan(model: "Model", batch: Batch, plan: PlanLike) -> list[Edit]:
    """Return edits: sites found, heads and positions checked, sources of patches and means read.

    Raises:
        InterventionError: If a step is not an intervention, a patch needs a later site, or a source does not fit.
        SiteError: If a site does not exist.
        PositionError: If a position lies outside an example.
    """
    if isinstance(plan, Intervention):
        plan = [plan]
    edits = []
    for step in plan:
        if not isinstance(step, Intervention):
            raise InterventionError(f"a plan step of type {type(step).__name__}", "an Intervention")
        for site, binding in model.resolve(step.where.at()):
            site = Site(site.address, site.io, site.selector, site.head)
            where = model.where(batch, binding, step.at)
            edits.append(_edit(model, batch, step, site, binding, where))
    return edits


def _edit(model: "Model", batch: Batch, step: Intervention, site: Site, binding: Binding, where: Tensor | None) -> Edit:
    source, from_read = None, None
    if isinstance(step, Patch):
        from_site, from_binding = _patch_site(model, step, site)
        wanted = step.from_positions if step.from_positions is not None else (step.at if where is not None else None)
        if step.source is None:
            _check_order(site, binding, from_site, from_binding)
            from_read = Read(from_site, from_binding, model.where(batch, from_binding, wanted))
        else:
            source = _patch_source(model, batch, step, site, from_site, from_binding, wanted)
    elif isinstance(step, Mean):
        if "key" in binding.axes:
            raise InterventionError(
                f"Mean at {site}, whose rows are over the keys of one text",
                "a site without a key axis",
                "Set a pattern",
            )
        source = None if step.over is None else _mean(model, step, site)
    return Edit(step, site, binding, where, source, _real(batch, binding, where), from_read)


def _real(batch: Batch, binding: Binding, where: Tensor | None) -> Tensor | None:
    if batch.mask is None or binding.pos_axis != 1:
        return None
    return batch.mask if where is None else batch.mask.gather(1, where.to(batch.mask.device))


def _patch_site(model: "Model", step: Patch, site: Site) -> tuple[Site, Binding]:
    if step.from_site is None:
        return model.resolve(site)[0]
    found = model.resolve(step.from_site)
    if len(found) != 1:
        raise InterventionError(f"from_site={step.from_site!r} selects {len(found)} sites", "one site")
    one, binding = found[0]
    head = one.head
    if head is None and site.head is not None and binding.head_axis is not None:
        head = _same_head(model, site, binding)
    narrowed = Site(one.address, one.io, one.selector, head)
    return model.resolve(narrowed)[0] if head is not None else (narrowed, binding)


def _same_head(model: "Model", site: Site, binding: Binding) -> tuple[int, ...]:
    """The site's heads at another site: a query head's values are those of its key/value group."""
    layout, own = model.layout, model.resolve(site.whole)[0][1]
    assert layout is not None
    assert own.head_axis is not None
    assert binding.head_axis is not None
    kinds = own.axes[own.head_axis], binding.axes[binding.head_axis]
    if kinds[0] == kinds[1] or layout.n_heads == layout.n_kv_heads:
        return site.head or ()
    if kinds == ("head", "kv_head"):
        return tuple(h // (layout.n_heads // layout.n_kv_heads) for h in site.head or ())
    raise InterventionError(
        f"{site} patched from {binding.address}", "the query head to read", "name it, as in '#3', in from_site"
    )


def _check_order(site: Site, binding: Binding, from_site: Site, from_binding: Binding) -> None:
    if from_binding.where.startswith("raw") or binding.where.startswith("raw"):
        return  # Order of free modules is known only when they run; the session checks it there.
    if from_binding.order >= binding.order:
        raise InterventionError(
            f"{site} patched from {from_site} of the same run",
            "a source that lies before the site",
            "give source=inputs to read it from another run",
        )


def _patch_source(
    model, batch: Batch, step: Patch, site: Site, from_site: Site, from_binding: Binding, wanted
) -> Tensor:
    source = step.source
    if isinstance(source, Tensor) and source.is_floating_point() and not _is_model_input(model, source):
        return source
    if isinstance(source, Activations):
        value = _from_captured(model, source, from_site, from_binding, wanted)
    else:
        source = model.capture(source, from_site, positions=wanted, padding_side=batch.padding_side)
        value = source[from_site]
    _check_lengths(batch, source, site, from_binding, wanted)
    return value


def _is_model_input(model, source: Tensor) -> bool:
    return model.reader.kind == "image" and source.ndim == 4


def _from_captured(model, source: Activations, site: Site, binding: Binding, wanted: Any) -> Tensor:
    """A user's capture, narrowed to the step's heads and positions, which it may hold among others."""
    same = [key for key in source if (one := Site.parse(key)).whole == site.whole and _covers(one.head, site.head)]
    if not same:
        raise InterventionError(f"{site} was not captured", f"one of {', '.join(list(source)[:5])}")
    key = same[0]
    held, where = Site.parse(key).head, source.where[key]
    heads = site.head if held is None or site.head is None else tuple(map(held.index, site.head))
    columns = None if wanted is None else model.where(source.batch, binding, wanted)
    if where is not None:
        if columns is None:
            raise InterventionError(f"{key} was captured at some positions only", "positions= (and from_positions=)")
        found = where[:, None, :] == columns[:, :, None]
        if not found.any(-1).all():
            raise InterventionError(f"{key} was not captured at positions {wanted}", "positions that were captured")
        columns = found.int().argmax(-1)
    return Selection(binding, heads, columns).get(source[key])


def _covers(held: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> bool:
    return held is None or (wanted is not None and set(wanted) <= set(held))


def _check_lengths(batch: Batch, source: Activations, site: Site, binding: Binding, wanted: Any) -> None:
    if source.batch.size not in (1, batch.size):
        raise InterventionError(
            f"a patch source of {source.batch.size} examples for a run of {batch.size}",
            "one example, or as many",
        )
    if wanted is not None or binding.pos_axis is None or batch.mask is None or source.batch.mask is None:
        return
    theirs = source.batch.lengths * (batch.size if source.batch.size == 1 else 1)
    starts = source.batch.starts * (batch.size if source.batch.size == 1 else 1)
    if batch.lengths == theirs and batch.starts != starts:
        raise InterventionError(
            f"patch at {site}: the source is padded on another side than the run",
            "one side",
            f"capture it with padding_side={batch.padding_side!r}",
        )
    if batch.lengths != theirs or batch.mask.shape[1] != source.batch.mask.shape[1]:
        raise InterventionError(
            f"patch at {site}: the source has {theirs} tokens, the run has {batch.lengths}", "equal lengths",
            "name positions= (and from_positions=)",
        )  # fmt: skip


def _mean(model: "Model", step: Mean, site: Site) -> Tensor:
    acts = model.capture(step.over, site)
    value = acts[site]
    if acts.mask is not None and acts.axes[str(site)][1:2] == ("pos",):
        return acts.real(site).mean(0)
    return value.mean(0)
