"""A run of activation patching: grids of exact patches, first-order grids with their audit, edges."""

import functools
from typing import Any, Literal

from pydantic import Field, model_validator

from interp.hooks.model import Model
from interp.hooks.table import Table
from interp.patching.activation import patch_grid
from interp.patching.attribution import attribution_patching
from interp.patching.cells import read_axes
from interp.patching.edges import edge_attribution
from interp.patching.grid import PatchGrid
from interp.patching.prompts import Pairs
from interp.plots import chart
from interp.plots.style import legible, signed
from interp.runs.drawn import Drawn, save_drawn
from interp.runs.language_specs import ObservableSpec, language_model
from interp.runs.run import Progress, Run
from interp.runs.specs import Fields, Spec, Work


class PairSpec(Fields):
    """Two prompts of as many tokens that differ in what matters."""

    clean: str = Field(min_length=1)
    corrupt: str = Field(min_length=1)


class GridSpec(Fields):
    """One grid.

    Attributes:
        method: ``patching`` (a run for each cell), ``attribution`` (first order) or ``edges`` (first order, between
            components).
        sites: What is patched, as for `patch_grid`.
        by: Axes of the grid.
        direction: ``denoise`` or ``noise``.
        layers: All by default.
        positions: All by default; ints, ``last`` or words of the clean prompt.
        heads: All by default.
        steps: Of integrated gradients, for ``attribution``; plain gradients without.
        audit: How many cells of a first-order grid are also patched exactly.
        seed: Of that sample.
        show: ``normalised``, ``effect`` or ``value``, in the figure.
    """

    method: Literal["patching", "attribution", "edges"] = "patching"
    sites: str | tuple[str, ...] = "resid_pre"
    by: tuple[str, ...] = ("layer", "position")
    direction: Literal["denoise", "noise"] = "denoise"
    layers: tuple[int, ...] | None = None
    positions: tuple[int | str, ...] | None = None
    heads: tuple[int, ...] | None = None
    steps: int | None = Field(default=None, ge=1)
    audit: int = Field(default=20, ge=0)
    seed: int = 0
    show: Literal["", "normalised", "effect", "value"] = ""

    @model_validator(mode="after")
    def _fits_its_method(self) -> "GridSpec":
        given = {name for name in self.model_fields_set if getattr(self, name) != type(self).model_fields[name].default}
        if self.method != "attribution" and "steps" in given:
            raise ValueError("steps belong to method attribution")
        if self.method == "patching" and given & {"audit", "seed"}:
            raise ValueError("audit and seed belong to methods attribution and edges: patching is exact")
        if self.method == "edges" and (wrong := given & {"sites", "by", "layers", "positions", "heads"}):
            raise ValueError(f"edges are between all components: without {', '.join(sorted(wrong))}")
        return self

    @property
    def cells(self) -> dict[str, Any]:
        """Sites and axes as `patch_grid` takes them."""
        listed = {key: getattr(self, key) for key in ("layers", "positions", "heads")}
        sites = self.sites if isinstance(self.sites, str) else list(self.sites)
        return {"sites": sites, "by": self.by} | {k: None if v is None else list(v) for k, v in listed.items()}

    def made(self, model: Model, clean: list[str], corrupt: list[str], metric: Any, position: int) -> PatchGrid:
        """The grid."""
        options: dict[str, Any] = {"direction": self.direction, "position": position}
        audit = {"audit": self.audit, "seed": self.seed}
        if self.method == "edges":
            return edge_attribution(model, clean, corrupt, metric, **audit, **options)
        if self.method == "attribution":
            options |= {**audit, "steps": self.steps}
            return attribution_patching(model, clean, corrupt, metric, **self.cells, **options)
        return patch_grid(model, clean, corrupt, metric, **self.cells, **options)


class PatchingSpec(Spec):
    """What values of one run do in another, place by place.

    Attributes:
        model: A packaged name, hub id, folder or GGUF file.
        pairs: Clean and corrupt prompts; effects are means over them.
        metric: An observable, or ``kl``: divergence of the next token from the clean run.
        position: Whose next-token logits.
        grids: What is patched.
    """

    model: str
    pairs: tuple[PairSpec, ...] = Field(min_length=1)
    metric: ObservableSpec | Literal["kl"]
    position: int = -1
    grids: tuple[GridSpec, ...] = Field(default=(GridSpec(),), min_length=1)

    def prepare(self, progress: Progress) -> Work:
        """Load the model, and check prompts, tokens, sites and axes against it.

        Raises:
            InterpError: If something that a field names does not exist.
        """
        model = language_model(self.model, progress)
        metric = self.metric if isinstance(self.metric, str) else self.metric.made(model)
        clean, corrupt = ([getattr(pair, side) for pair in self.pairs] for side in ("clean", "corrupt"))
        pairs = Pairs(model, clean, corrupt, metric, self.position)
        for grid in self.grids:
            if grid.method != "edges":
                cells = grid.cells
                read_axes(
                    model, pairs, cells["sites"], cells["by"], cells["layers"], cells["positions"], cells["heads"], None
                )
        return functools.partial(_compute, self, model, clean, corrupt, metric)


def _compute(
    spec: PatchingSpec, model: Model, clean: list[str], corrupt: list[str], metric: Any, run: Run, step: Progress
) -> None:
    """Write ``grid-1``, ``grid-2``, ... with a heat map of each, and ``audits``."""
    run.record_model("model", model)
    audits = []
    for number, wanted in enumerate(spec.grids, start=1):
        step(f"grid {number}: {wanted.method}")
        name = f"grid-{number}"
        made = functools.partial(wanted.made, model, clean, corrupt, metric, spec.position)
        found: PatchGrid = run.once(name, made)
        save_drawn(run, name, "cells", _drawn(found, wanted), _heading(wanted))
        if found.audit is not None:
            audits.append({"grid": name, "method": found.method, **found.audit})
            run.save("audits", Table(audits, "first-order effects against exact patches of a sample of cells"))


def _heading(wanted: GridSpec) -> str:
    if wanted.method == "edges":
        return "edges between components"
    sites = wanted.sites if isinstance(wanted.sites, str) else ", ".join(wanted.sites)
    return f"{sites} by {', '.join(wanted.by)}"


def _drawn(found: PatchGrid, wanted: GridSpec) -> list[Drawn]:
    top, put = found.top(1)[0], "clean values put into the corrupt run"
    if found.direction == "noise":
        put = "corrupt values put into the clean run"
    place = ", ".join(f"{axis} {top[axis]}" for axis in found.axes)
    drawn = []
    if wanted.method != "edges":
        drawn.append(
            Drawn(
                chart(found, show=wanted.show), f"Effect on {legible(found.metric)}, {found.method}",
                f"Each cell: {put} there. Unpatched {signed(found.baseline)}, target {signed(found.target)}. The "
                f"largest is {place}: {signed(top['effect'])}.",
                "What several cells do together: effects of single patches need not add up.", wide=True,
            )
        )  # fmt: skip
    if found.audited is not None and len(found.audited):
        drawn.append(
            Drawn(
                chart(found, figure="audit"), "Estimates against exact patches",
                "Each point is a cell that was patched exactly as well.",
                "How well cells outside of the sample are estimated.",
            )
        )  # fmt: skip
    return drawn
