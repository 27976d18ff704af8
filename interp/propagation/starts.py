"""Starts: the covectors from which a sweep goes backwards, and the observables' values there.

An observable of the logits starts as W_Uᵀ n at the final norm's output, a sequence at several positions of it, an
observable of a site as its own vector at that site.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.hooks.site import Site
from interp.observables.observable import Observable
from interp.observables.sequences import SequenceObservable
from interp.propagation.paths import Path, Step
from interp.propagation.reference import Reference

Measured = Observable | SequenceObservable

_STREAM = re.compile(r"blocks\.(\d+)\.(hook_resid_pre|hook_resid_mid|hook_resid_post|hook_attn_out|hook_mlp_out)")


@dataclass(frozen=True, eq=False)
class Start:
    """Where observables are read, and with what.

    Attributes:
        names: Of the observables.
        site: Canonical name of the site at which covectors begin.
        covectors: At that site.
        constant: What does not depend on it.
        measurement: Value of each observable at the reference.
        position: The last position that is read.
        output: The site that a backward pass starts from.
        readout: From its value [1, ...] to one number for each observable.
        note: What to know when reading the numbers.
    """

    names: list[str]
    site: str
    covectors: Float[Tensor, "observable pos ..."]
    constant: Float[Tensor, "observable"]
    measurement: Float[Tensor, "observable"]
    position: int
    output: str
    readout: Callable[[Tensor], Tensor]
    note: str = ""


def read_measured(observables: Any) -> list[Measured]:
    """One observable, or several, as a list: all of the logits (sequences among them), or all of one site.

    Raises:
        ArgumentError: If they are none, or of different sites.
    """
    many = [observables] if isinstance(observables, Measured) else list(observables)
    if not many or not all(isinstance(n, Measured) for n in many):
        raise ArgumentError(f"observables={observables!r:.80}", "an Observable, or a list of them")
    sites = list(dict.fromkeys(None if isinstance(n, SequenceObservable) else n.site for n in many))
    if len(sites) > 1:
        raise ArgumentError(
            f"observables of {' and '.join(str(s or 'the logits') for s in sites[:3])}",
            "all of the logits, or all of one site", "one call for each",
        )  # fmt: skip
    return many


def pre_cap_note(model: Model) -> str:
    """What a result says of a model that soft-caps its logits."""
    capped = model.layout is not None and model.layout.logit_softcap is not None
    return "measured on the logits before the soft-cap" if capped else ""


def start_of(ref: Reference, observables: Sequence[Measured], position: int) -> Start:
    """Return where a sweep for observables begins at a reference.

    Args:
        ref: The reference.
        observables: As `read_measured` gives them.
        position: Of observables that do not name their own.

    Raises:
        ArgumentError: If a sequence was made from other tokens, a site has no such vector, or ``position`` and the
            observables' own differ.
        PositionError: If a position lies outside the prompt.
    """
    first = observables[0]
    if isinstance(first, SequenceObservable) or first.site is None:
        return _at_logits(ref, [terms_of(ref, n, position) for n in observables], [n.name for n in observables])
    return _at_site(ref, [n for n in observables if isinstance(n, Observable)], position)


def terms_of(ref: Reference, observable: Measured, position: int) -> list[tuple[int, Observable]]:
    """(Position from 0, observable of the logits there): one, or a sequence's own.

    Raises:
        ArgumentError: If a sequence was made from other tokens, or another position is asked for.
        PositionError: If a position lies outside the prompt.
    """
    if isinstance(observable, Observable):
        return [(ref.position(position), observable)]
    ids = ref.batch.ids
    assert ids is not None
    own = ids[0, ref.batch.starts[0] :][: ref.length].tolist()
    observable.check_run(own, position)
    return list(observable.terms)


def _at_logits(ref: Reference, terms: list[list[tuple[int, Observable]]], names: list[str]) -> Start:
    weights, start, scale = ref.weights, ref.batch.starts[0], ref.weights.layout.logit_scale
    zeros = torch.zeros(len(terms), dtype=weights.dtype, device=weights.device)
    constant, covectors = zeros.clone(), []
    for i, one in enumerate(terms):
        covectors.append(zeros.new_zeros(ref.length, weights.sizes["d_model"]))
        for place, observable in one:
            w, offset = observable.pull_to_stream(ref.model)
            covectors[i][place] += w.to(zeros)
            constant[i] += offset

    def readout(logits: Tensor) -> Tensor:
        return torch.stack([sum(n.measure(logits[0, start + p] * scale) for p, n in one) for one in terms])  # type: ignore[misc]

    measured = [sum(n.measure(ref.logits(p) * scale) for p, n in one) for one in terms]
    last = max(place for one in terms for place, _ in one)
    return Start(
        names, "ln_final.hook_out", torch.stack(covectors), constant, torch.stack(measured).to(zeros), last,  # type: ignore[arg-type]
        "unembed.hook_out", readout, pre_cap_note(ref.model),
    )  # fmt: skip


def own_position(site: Site, position: int) -> int:
    """The position that a site names, or else the one asked for.

    Raises:
        ArgumentError: If both are given and differ, or the site names several.
    """
    if site.positions is None:
        return position
    own = -1 if site.positions == "last" else site.positions[0]
    if site.positions != "last" and len(site.positions) != 1:
        raise ArgumentError(f"an observable of {site}", "a site with one position, as blocks.6.hook_resid_pre@3")
    if position not in (-1, own):
        raise ArgumentError(
            f"position={position} for an observable of {site}", "its own position", "leave position= out"
        )
    return own


def _at_site(ref: Reference, observables: list[Observable], position: int) -> Start:
    site = observables[0].site
    assert site is not None
    ((_, binding),) = ref.model.resolve(site)
    place, name = ref.position(own_position(site, position)), str(site.whole)
    if binding.axes[:2] != ("batch", "pos"):
        raise ArgumentError(f"an observable of {site}, whose axes are {' '.join(binding.axes)}", "axes batch pos ...")
    x = ref.at(name)
    covectors = x.new_zeros(len(observables), *x.shape)
    for i, observable in enumerate(observables):
        assert observable.vector is not None
        part = covectors[i, place] if site.head is None else covectors[i, place, list(site.head)]
        if len(observable.vector) != part.numel():
            raise ArgumentError(
                f"observable vector of length {len(observable.vector)}", f"{part.numel()}, as {site} has"
            )
        filled = observable.vector.to(x).reshape(part.shape)
        covectors[(i, place, ...) if site.head is None else (i, place, list(site.head))] = filled
    constant = torch.tensor([n.offset for n in observables], dtype=x.dtype, device=x.device)
    start = ref.batch.starts[0]

    def readout(value: Tensor) -> Tensor:
        own = covectors.to(value)
        return (own * value[:, start : start + ref.length]).flatten(1).sum(1) + constant.to(value)

    measured = (covectors * x).flatten(1).sum(1) + constant
    return Start([n.name for n in observables], name, covectors, constant, measured, place, name, readout)


# Ends of paths -------------------------------------------------------------------------------------------------------


def path_to(model: Model, observable: Observable, path: Path) -> Path:
    """Return a path that ends where an observable is read, after checking that its last component writes there.

    Raises:
        ArgumentError: If the last component does not feed the observable's site, or the site is none that paths end at.
    """
    site = observable.site
    if site is None:
        return path
    model.resolve(site)
    match = _STREAM.fullmatch(site.address)
    if match is None or site.head is not None:
        raise ArgumentError(
            f"a path to an observable of {site}", "the logits, a residual stream, hook_attn_out or hook_mlp_out",
            "total vectors (site=) start from any site",
        )  # fmt: skip
    last = path.steps[-1] if path.steps else None
    if last is not None and not _writes(last, int(match[1]), match[2]):
        raise ArgumentError(f"path goes backwards: {last} cannot feed {site}", "a component that writes there")
    return Path(path.steps, own_position(site, path.position), path.embed)


def _writes(step: Step, layer: int, part: str) -> bool:
    if part in ("hook_attn_out", "hook_mlp_out"):
        return step.layer == layer and step.kind == ("head" if part == "hook_attn_out" else "mlp")
    inside = {"hook_resid_pre": (), "hook_resid_mid": ("head",), "hook_resid_post": ("head", "mlp")}[part]
    return step.layer < layer or (step.layer == layer and step.kind in inside)
