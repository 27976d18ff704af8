"""Row sweep: some rows of the Jacobian to many sites at all positions, from one reverse pass for all sites."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks import guards
from interp.hooks.budget import bytes_of
from interp.hooks.errors import ArgumentError, InputError
from interp.hooks.examples import each_example
from interp.hooks.linearization import Linearization, LinearizationLike
from interp.hooks.model import Model
from interp.hooks.site import Site, SiteLike
from interp.hooks.table import Rows
from interp.jacobians.costs import LIVE
from interp.jacobians.graph import Recording
from interp.jacobians.places import End, check_indices
from interp.jacobians.plan import probes_within


@dataclass(frozen=True, eq=False)
class RowSweep(Rows, Mapping[str, Tensor]):
    """Rows d target_k / d site by site: [k, pos, ...], positions without padding.

    Attributes:
        rows_by_site: In execution order.
        target: Site and position that was read.
        rows: Indices of the target's components; None for all, or where directions were given.
        linearization: What was held.
    """

    rows_by_site: dict[str, Tensor] = field(repr=False)
    target: str
    rows: tuple[int, ...] | None
    linearization: str

    def __getitem__(self, site: SiteLike) -> Tensor:
        if str(site) not in self.rows_by_site:
            raise ArgumentError(f"rows at {site}", f"one of {', '.join(list(self.rows_by_site)[:4])}, ...")
        return self.rows_by_site[str(site)]

    def __iter__(self):
        return iter(self.rows_by_site)

    def __len__(self) -> int:
        return len(self.rows_by_site)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each site and target component: the norm of its rows over positions and features."""
        return [
            {"site": site, "target": self.target, "row": row, "norm": float(value.norm())}
            for site, rows in self.rows_by_site.items()
            for row, value in zip(self.rows or range(len(rows)), rows, strict=True)
        ]


def row_sweep(
    model: Model, inputs: Any, sources: SiteLike | Sequence[SiteLike], target: SiteLike, rows: Any = None, *,
    directions: Float[Tensor, "k ..."] | None = None, linearization: LinearizationLike = "exact",
    budget: int | str = "2GiB",
) -> RowSweep:  # fmt: skip
    """Return k rows of the Jacobian of a target by every source, at all positions, from one sweep.

    One forward run keeps the graph of all sources; one backward pass for each row (batched within the budget) reaches
    all of them. A sweep for each site would cost half the number of layers times more.

    Args:
        model: An attached model.
        inputs: One example.
        sources: Sites or globs, as ``blocks.*.hook_resid_pre``, in front of the target.
        target: One site; for tokens with one position, as ``logits@-1``.
        rows: Components of the target; all of them by default.
        directions: Instead of rows, covectors [k, ...] on the target: observables as W_U reads them.
        linearization: What is held.
        budget: Bytes for scratch and result.

    Raises:
        ArgumentError: If rows are out of range or given beside directions, or the target does not depend on a source.
        InputError: If there is not exactly one example, or directions do not fit the target.
        SizeError: If one row does not fit the budget.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> found = interp.row_sweep(model, "The cat sat", "blocks.*.hook_resid_pre", "logits@-1", rows=[10, 20])
        >>> len(found), found["blocks.7.hook_resid_pre"].shape
        (30, torch.Size([2, 3, 576]))
    """
    held, size = Linearization.of(linearization), bytes_of(budget)
    if rows is not None and directions is not None:
        raise ArgumentError("rows= and directions=", "one of the two")
    examples = each_example(model, inputs)
    if len(examples) != 1:
        raise InputError(f"{len(examples)} examples", "one")
    guards.refuse_cache(examples[0].kwargs)
    found = model.resolve(target)
    if len(found) != 1:
        raise ArgumentError(f"target={str(target)!r} selects {len(found)} sites", "one")
    site, binding = found[0]
    end = End(Site(site.address, site.io, site.selector, site.head), binding)
    batch = examples[0]
    ends = [End(one.whole, place) for one, place in model.resolve(sources)]
    at = _position(batch, end, site)
    recording = Recording(model, batch, ends, end, held)
    value = recording.output[0] if at is None else recording.output[0, at]
    seeds = _seeds(value, rows, directions)
    widest = max(leaf.numel() for leaf in recording.leaves)
    each = value.element_size() * (LIVE * widest + sum(leaf.numel() for leaf in recording.leaves))
    parts = [_pull(recording, some, at) for some in seeds.split(probes_within(size, each))]
    swept = {str(e.site): torch.cat([part[i] for part in parts]) for i, e in enumerate(ends)}
    chosen = check_indices("rows", rows, value.shape)
    return RowSweep(swept, str(site), None if chosen is None else tuple(chosen.tolist()), held.name)


def _position(batch, end: End, site: Site) -> int | None:
    if batch.ids is None or not end.has_positions:
        return None
    if site.positions is None or (isinstance(site.positions, tuple) and len(site.positions) != 1):
        raise ArgumentError(f"target {site}", "one position", f"for example {site.whole}@-1")
    wanted = site.positions if site.positions == "last" else list(site.positions)
    return int(batch.positions(wanted)[0, 0])


def _seeds(value: Tensor, rows: Any, directions: Tensor | None) -> Float[Tensor, "k ..."]:
    if directions is not None:
        if directions.shape[1:] != value.shape:
            raise InputError(f"directions {list(directions.shape)}", f"[k, {', '.join(map(str, value.shape))}]")
        return directions.to(value)
    chosen = check_indices("rows", rows, value.shape)
    which = torch.arange(value.numel()) if chosen is None else chosen
    seeds = value.new_zeros(len(which), value.numel())
    seeds.scatter_(1, which.to(value.device)[:, None], 1.0)
    return seeds.reshape(len(which), *value.shape).detach()


def _pull(recording: Recording, seeds: Tensor, at: int | None) -> list[Tensor]:
    full = seeds.new_zeros(len(seeds), *recording.output.shape)
    if at is None:
        full[:, 0] = seeds
    else:
        full[:, 0, at] = seeds
    return [grad[:, 0] for grad in recording.pull(full)]
