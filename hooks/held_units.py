"""The table of held decisions: what each call holds, how much of it is on, where a coefficient is out of proportion."""

from typing import Any

import torch
from torch import Tensor

from interp.hooks.table import Table
from interp.hooks.tape import Entry
from interp.hooks.units import UNITS

LARGEST_GAIN = 100.0


def unit_table(entries: list[Entry]) -> Table:
    """Return one row for each held decision; for element-wise units also on, saturated, largest and a note.

    on: share of entries whose coefficient is not zero. saturated: share with coefficient 0 but another output than 0
    (a cap). largest: the largest absolute coefficient; above `LARGEST_GAIN` the note says ill-conditioned: a quotient
    by a small z, which multiplies rounding and says little about the unit.
    """
    rows = []
    for index, entry in enumerate(entries):
        row = {"call": index, "module": entry.path, "op": entry.op, "mode": entry.mode, "shape": str([*entry.shape])}
        rows.append(row | _of_unit(entry))
    return Table(rows, f"{len(rows)} held decisions")


def _of_unit(entry: Entry) -> dict[str, Any]:
    found = _coefficient(entry)
    if found is None:
        return {}
    coefficient, offset = found
    zero, largest = coefficient == 0, float(coefficient.abs().max())
    row: dict[str, Any] = {"on": float((~zero).double().mean())}
    if entry.mode == "tangent" and UNITS[entry.op].piecewise_linear and offset is not None:
        row["saturated"] = float((zero & (offset != 0)).double().mean())
    return row | {"largest": largest, "note": "ill-conditioned" if largest > LARGEST_GAIN else ""}


def _coefficient(entry: Entry) -> tuple[Tensor, Tensor | None] | None:
    """The slope or gain of an element-wise unit, and its offset; None for other calls."""
    if entry.op not in UNITS:
        return None
    held = entry.held if isinstance(entry.held, tuple) else (entry.held,)
    if entry.mode not in ("tangent", "gain", "chord") or not all(isinstance(h, Tensor) for h in held) or not held:
        return None
    if not held[0].numel() or held[0].dtype == torch.bool:
        return None
    return held[0], held[1] if len(held) == 2 else None
