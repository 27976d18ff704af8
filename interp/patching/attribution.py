"""Attribution patching: every cell of a grid to first order, with exact patches of a sample beside it.

Source: Nanda, "Attribution Patching", 2023; Kramár et al., "AtP*", 2024 (arXiv 2403.00745); integrated gradients after
Sundararajan et al., 2017, along the straight line between the two runs' activations at the patched site.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.patching.activation import patch_cells
from interp.patching.cells import Cell, Row, read_axes, row_patches
from interp.patching.grid import PatchGrid
from interp.patching.prompts import Chunk, Direction, Metric, Pairs, sides

# Axes of a site that cells may be cut along; products are summed over all others.
_CUT = ("pos", "head", "kv_head", "d_mlp")


def attribution_patching(
    model: Model, clean: Any, corrupt: Any, metric: Metric, *, sites: str | Sequence[str] = "resid_pre",
    by: str | Sequence[str] = ("layer", "position"), direction: Direction = "denoise", steps: int | None = None,
    audit: int = 20, seed: int = 0, position: int | None = -1, layers: Any = None, positions: Any = None,
    heads: Any = None, neurons: Any = None, batch_size: int | None = None,
) -> PatchGrid:  # fmt: skip
    """Return what `patch_grid` returns, to first order: m + gradient · (source - base), summed over each cell.

    One forward and one backward pass of the base run (corrupt where one denoises) give the gradients of all cells. With
    ``steps`` the gradient is averaged over that many points between the runs' values at the site, one site at a time:
    the estimates over a full cut of the residual stream then sum to m_source - m_base as steps grow (not where a
    mixture of experts sends a token elsewhere: a jump that no gradient sees). A sample of cells is patched exactly, and
    ``audit`` of the result says how well the estimates agree.

    Args:
        model: A model of tokens with logits.
        clean: As for `patch_grid`.
        corrupt: As for `patch_grid`.
        metric: As for `patch_grid`; a function must be differentiable.
        sites: As for `patch_grid`.
        by: As for `patch_grid`; several layers need the axis ``layer``.
        direction: As for `patch_grid`.
        steps: Points of integrated gradients (midpoint rule), or None for the base run's gradient alone.
        audit: How many cells are also patched exactly: half of them those with the largest estimates, half drawn.
        seed: Of the drawn cells.
        position: As for `patch_grid`.
        layers: As for `patch_grid`.
        positions: As for `patch_grid`.
        heads: As for `patch_grid`.
        neurons: As for `patch_grid`.
        batch_size: As for `patch_grid`.

    Raises:
        ArgumentError: As for `patch_grid`; if ``steps`` or ``audit`` is out of range, or the gradient is 0 by itself.
        SiteError: If the model has no such site.
        PositionError: If a position lies outside a prompt.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> text = "When {} and {} went to the store, {} gave a drink to"
        >>> clean, corrupt = text.format("Mary", "John", "John"), text.format("Mary", "John", "Mary")
        >>> mary = interp.Observable.logit_diff(model, " Mary", " John")
        >>> grid = interp.attribution_patching(model, clean, corrupt, mary, sites="z", by=("layer", "head"), audit=8)
        >>> grid.audit["correlation"] > 0.8
        True
    """
    pairs = Pairs(model, clean, corrupt, metric, position)
    base, source = sides(direction)
    _check_options(pairs, direction, steps, audit)
    axes = read_axes(model, pairs, sites, by, layers, positions, heads, neurons)
    if any(len(cell.sites) > 1 for cell in axes.cells):
        raise ArgumentError(
            f"by={by!r} without layers", "an axis 'layer', or one layer",
            "the first order of patching several layers at once is no sum over them",
        )  # fmt: skip
    size = pairs.rows(batch_size)
    found = torch.empty(len(pairs), len(axes.cells), dtype=pairs.dtype)
    ends = {side: torch.empty(len(pairs), dtype=pairs.dtype) for side in ("clean", "corrupt")}
    for chunk in pairs.chunks(size):
        captured = chunk.run(source, axes.sites)
        before, measured = chunk.gradients(base, axes.sites)
        slopes = _slopes(before) if steps is None else _mean_slopes(chunk, base, captured, before, steps, size)
        changes = _cell_sums(axes.cells, chunk.pairs, captured, before, slopes)
        found[chunk.pairs] = (measured[:, None] + changes).cpu()
        for side, values in chunk.measured.items():
            ends[side][chunk.pairs] = values.cpu()
    method = "attribution" if steps is None else f"integrated gradients, {steps} steps"
    grid = PatchGrid(
        pairs.measure.name, method, direction, axes.coordinates, axes.tokens,
        found.reshape(len(pairs), *axes.shape), ends["clean"], ends["corrupt"],
    )  # fmt: skip
    return audited(grid, audit, seed, lambda chosen: _exact(pairs, [axes.cells[i] for i in chosen], direction, size))


def _check_options(pairs: Pairs, direction: str, steps: Any, audit: Any) -> None:
    whole = lambda n, least: isinstance(n, int) and not isinstance(n, bool) and n >= least
    if (steps is not None and not whole(steps, 1)) or not whole(audit, 0):
        raise ArgumentError(f"steps={steps!r} and audit={audit!r}", "an int of at least 1 (or None), and of at least 0")
    if pairs.measure.is_divergence and direction == "noise" and steps is None:
        raise ArgumentError(
            "the gradient of KL(clean ‖ run) at the clean run, which is 0", "direction='denoise', or steps=",
        )  # fmt: skip


def _exact(pairs: Pairs, cells: list[Cell], direction: str, size: int) -> Float[Tensor, "cell"]:
    return patch_cells(pairs, cells, direction, size)[0].mean(0)


def _slopes(acts: Activations) -> dict[str, Tensor]:
    assert acts.gradients is not None
    return acts.gradients


def _mean_slopes(
    chunk: Chunk, base: Any, captured: Activations, before: Activations, steps: int, size: int
) -> dict[str, Tensor]:
    """The gradient at each site, averaged over the line between the runs' values at that site alone."""
    sums = {site: torch.zeros_like(before[site]) for site in before}
    wanted = [(site, m, k) for site in before for m in range(len(chunk.pairs)) for k in range(steps)]
    for start in range(0, len(wanted), size):
        part = wanted[start : start + size]
        touched = list(dict.fromkeys(site for site, _, _ in part))
        values = {}
        for site in touched:
            line = [(m, (k + 0.5) / steps) if s == site else (m, 0.0) for s, m, k in part]
            values[site] = torch.stack([before[site][m] + a * (captured[site][m] - before[site][m]) for m, a in line])
        rows = [Row(Cell((site,)), m, chunk.pairs[m], i) for i, (site, m, _) in enumerate(part)]
        plan = row_patches(rows, values, captured.axes)
        acts, _ = chunk.gradients(base, touched, [m for _, m, _ in part], plan)
        for index, (site, m, _) in enumerate(part):
            sums[site][m] += _slopes(acts)[site][index] / steps
    return sums


def _cell_sums(
    cells: Sequence[Cell], pairs: list[int], captured: Activations, before: Activations, slopes: dict[str, Tensor]
) -> Float[Tensor, "member cell"]:
    """Σ slope · (source - base) over each cell."""
    products, kept = {}, {}
    for site, slope in slopes.items():
        axes = captured.axes[site][1:]
        product = slope * (captured[site] - before[site])
        summed = [i + 1 for i, name in enumerate(axes) if name not in _CUT]
        product = product if product.dtype == torch.float64 else product.float()
        products[site] = product.sum(summed) if summed else product
        kept[site] = tuple(name for name in axes if name in _CUT)
    found = []
    for member, pair in enumerate(pairs):
        for cell in cells:
            site = cell.sites[0]
            product = products[site][member]
            keep = cell.mask(kept[site], product.shape, pair)
            found.append((product * keep.to(product.device)).sum())
    return torch.stack(found).reshape(len(pairs), len(cells))


def audited(grid: PatchGrid, count: int, seed: int, exact: Callable[[list[int]], Float[Tensor, "cell"]]) -> PatchGrid:
    """Return a grid of estimates with exact values of a sample of its cells."""
    if not count:
        return grid
    chosen = _sample(grid.effects.flatten(), count, seed)
    return replace(grid, audited=chosen, exact=exact(chosen.tolist()))


def _sample(effects: Float[Tensor, "cell"], count: int, seed: int) -> Int[Tensor, "audited"]:
    """Half of the cells by size, half drawn from the rest."""
    order = effects.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)
    order = order[: int((~effects.isnan()).sum())]
    top = order[: (min(count, len(order)) + 1) // 2]
    rest = order[len(top) :]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    return torch.cat([top, rest[drawn[: min(count, len(order)) - len(top)]]])
