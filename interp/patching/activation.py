"""Activation patching: values of one run put into another, at every place of a grid.

Source: Vig et al., "Investigating Gender Bias in Language Models Using Causal Mediation Analysis", NeurIPS 2020; Meng
et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022. Words and practice: Heimersheim & Nanda, "How
to use and interpret activation patching", 2024 (arXiv 2404.15255).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.model import Model
from interp.patching.cells import Cell, Row, read_axes, row_patches
from interp.patching.grid import PatchGrid
from interp.patching.prompts import Direction, Metric, Pairs, sides


@torch.no_grad()
def patch_grid(
    model: Model, clean: Any, corrupt: Any, metric: Metric, *, sites: str | Sequence[str] = "resid_pre",
    by: str | Sequence[str] = ("layer", "position"), direction: Direction = "denoise", position: int | None = -1,
    layers: Any = None, positions: Any = None, heads: Any = None, neurons: Any = None, batch_size: int | None = None,
) -> PatchGrid:  # fmt: skip
    """Return the metric with each cell of a grid patched, one run for each cell.

    ``denoise`` puts the clean run's values into the corrupt run and asks what restores the answer; ``noise`` puts the
    corrupt run's values into the clean run and asks what breaks it. Many cells run together as rows of one forward
    call. What is not an axis is patched as a whole: ``by=("layer",)`` replaces a layer's site at all positions.

    Args:
        model: A model of tokens with logits.
        clean: One prompt (text or token ids), or a list of prompts.
        corrupt: As many prompts, each of as many tokens as its clean one.
        metric: An `Observable`, or one for each pair; a function of the logits at ``position`` [row, vocab] that gives
            [row]; a `SequenceObservable`, with ``position=None``; or ``"kl"``: KL(p_clean ‖ p_run) of the next token,
            in nats.
        sites: What is patched: ``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``, ``mlp_out`` (what is added
            to the stream), ``z``, ``q``, ``k``, ``v``, ``pattern``, ``mlp_post`` (neurons), ``blocks.*.NAME``, or the
            address of one site. Several make an axis ``site``.
        by: Axes of the grid: among ``layer``, ``position``, ``head``, ``neuron``. At key and value sites heads are
            key/value heads.
        direction: ``denoise`` or ``noise``.
        position: Whose next-token logits are measured; None gives a function those of all positions [row, pos, vocab].
        layers: Ints; all by default.
        positions: Ints, ``"last"``, substrings of clean texts, lists of ints (spans), or a mapping from names to these;
            all by default.
        heads: Ints; all by default.
        neurons: Ints; all by default.
        batch_size: Rows in one forward call; by default as many as keep their logits within 256 MiB, at most 64.

    Raises:
        ArgumentError: If prompts do not match in number or length, or an argument is not legal.
        SiteError: If the model has no such site.
        PositionError: If a position lies outside a prompt.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> text = "When {} and {} went to the store, {} gave a drink to"
        >>> clean, corrupt = text.format("Mary", "John", "John"), text.format("Mary", "John", "Mary")
        >>> mary = interp.Observable.logit_diff(model, " Mary", " John")
        >>> grid = interp.patch_grid(model, clean, corrupt, mary, layers=[0, 29], positions=[9, "last"])
        >>> [[round(v) for v in row] for row in grid.normalised.tolist()]
        [[1, 0], [0, 1]]
    """
    pairs = Pairs(model, clean, corrupt, metric, position)
    sides(direction)
    axes = read_axes(model, pairs, sites, by, layers, positions, heads, neurons)
    found, ends = patch_cells(pairs, axes.cells, direction, pairs.rows(batch_size))
    return PatchGrid(
        pairs.measure.name, "patching", direction, axes.coordinates, axes.tokens,
        found.reshape(len(pairs), *axes.shape), ends["clean"], ends["corrupt"],
    )  # fmt: skip


@torch.no_grad()
def patch_cells(
    pairs: Pairs, cells: Sequence[Cell], direction: str, size: int
) -> tuple[Float[Tensor, "pair cell"], dict[str, Float[Tensor, "pair"]]]:
    """Return the metric of each pair under a patch of each cell, and of its clean and corrupt run."""
    base, source = sides(direction)
    found = torch.empty(len(pairs), len(cells), dtype=pairs.dtype)
    ends = {side: torch.empty(len(pairs), dtype=pairs.dtype) for side in ("clean", "corrupt")}
    sites = list(dict.fromkeys(site for cell in cells for site in cell.sites))
    for chunk in pairs.chunks(size):
        chunk.run(base)
        captured = chunk.run(source, sites)
        wanted = [(c, m) for c in range(len(cells)) for m in range(len(chunk.pairs))]
        for start in range(0, len(wanted), size):
            part = wanted[start : start + size]
            rows = [Row(cells[c], m, chunk.pairs[m]) for c, m in part]
            measured = chunk.patched(base, [m for _, m in part], row_patches(rows, captured, captured.axes))
            found[[r.pair for r in rows], [c for c, _ in part]] = measured.cpu()
        for side, values in chunk.measured.items():
            ends[side][chunk.pairs] = values.cpu()
    return found, ends
