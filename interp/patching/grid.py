"""PatchGrid: what patching each cell does to a metric."""

import itertools
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.hooks.table import Rows, Table

_FLAT = 1e-6


@dataclass(frozen=True, eq=False)
class PatchGrid(Rows):
    """A metric under patches: one run, or one estimate, for each cell of a grid and each pair of prompts.

    Cells that do not exist (an edge that goes backwards) are NaN and have no row in tables.

    Attributes:
        metric: What is measured.
        method: How: ``patching``, ``attribution``, ``integrated gradients``, ``edge attribution``, ``path patching``.
        direction: ``denoise``: clean values into the corrupt run; ``noise``: corrupt values into the clean run.
        axes: Names of the axes in order, with what stands along each: layers, positions, heads, names.
        tokens: Text along the axis of positions (clean, and corrupt behind a stroke where it differs), or None.
        runs: The metric [pair, *axes].
        clean_runs: The metric of the clean runs [pair].
        corrupt_runs: The metric of the corrupt runs [pair].
        audited: Flat indices of cells that were also patched exactly, or None.
        exact: Their exact values, means over pairs.
        note: What to know when reading the numbers.
    """

    metric: str
    method: str
    direction: str
    axes: dict[str, list[Any]]
    tokens: list[str] | None = field(repr=False)
    runs: Float[Tensor, "pair *cell"] = field(repr=False)
    clean_runs: Float[Tensor, "pair"] = field(repr=False)
    corrupt_runs: Float[Tensor, "pair"] = field(repr=False)
    audited: Int[Tensor, "audited"] | None = field(default=None, repr=False)
    exact: Float[Tensor, "audited"] | None = field(default=None, repr=False)
    note: str = ""

    @property
    def values(self) -> Float[Tensor, "*cell"]:
        """The metric under each patch, mean over pairs."""
        return self.runs.mean(0)

    @property
    def clean(self) -> float:
        """The metric of the clean runs, mean over pairs."""
        return float(self.clean_runs.mean())

    @property
    def corrupt(self) -> float:
        """The metric of the corrupt runs, mean over pairs."""
        return float(self.corrupt_runs.mean())

    @property
    def baseline(self) -> float:
        """The metric without a patch: corrupt where one denoises, clean where one noises."""
        return self.corrupt if self.direction == "denoise" else self.clean

    @property
    def target(self) -> float:
        """The metric of the run that values are taken from."""
        return self.clean if self.direction == "denoise" else self.corrupt

    @property
    def effects(self) -> Float[Tensor, "*cell"]:
        """What each patch changes: values - baseline."""
        return self.values - self.baseline

    @property
    def errors(self) -> Float[Tensor, "*cell"] | None:
        """Standard error of each effect over pairs, or None for a single pair."""
        n = len(self.runs)
        base = self.corrupt_runs if self.direction == "denoise" else self.clean_runs
        changed = self.runs - base.reshape(-1, *[1] * (self.runs.ndim - 1))
        return None if n < 2 else changed.std(0) / math.sqrt(n)

    @property
    def normalised(self) -> Float[Tensor, "*cell"]:
        """Effects in units of what is between the runs: 0 as unpatched, 1 as the run that values are taken from.

        Over several pairs it is the mean effect over the mean difference. NaN, with a warning, where clean and corrupt
        runs measure the same.
        """
        if self._flat:
            warnings.warn(
                f"clean and corrupt runs both measure {self.clean:.6g} ({self.metric}): normalised effects are NaN. "
                "Choose prompts that the metric tells apart, or read effects.",
                stacklevel=2,
            )
            return torch.full_like(self.values, torch.nan)
        return self.effects / (self.target - self.baseline)

    @property
    def _flat(self) -> bool:
        return abs(self.clean - self.corrupt) <= _FLAT * max(abs(self.clean), abs(self.corrupt))

    @property
    def audit(self) -> dict[str, float] | None:
        """How well estimates agree with exact patching on the audited cells, or None.

        ``correlation`` and ``max_difference`` of effects, ``sign_agreement`` as a share (what is below 1e-6 of the
        largest effect counts as 0), ``cells`` their number.
        """
        if self.audited is None or self.exact is None:
            return None
        estimated = self.effects.flatten()[self.audited].double()
        exact = (self.exact - self.baseline).double()
        pair = torch.stack([estimated, exact])
        signs = torch.where(pair.abs() <= _FLAT * pair.abs().max(), 0.0, pair).sign()
        varied = len(exact) > 1 and bool((pair.std(1) > 0).all())
        return {
            "correlation": float(torch.corrcoef(pair)[0, 1]) if varied else float("nan"),
            "max_difference": float((estimated - exact).abs().max()),
            "sign_agreement": float((signs[0] == signs[1]).double().mean()),
            "cells": float(len(exact)),
        }

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each cell: its place, value, effect, normalised effect, and what else is known of it."""
        unit = float("nan") if self._flat else self.target - self.baseline
        errors = None if self.errors is None else self.errors.flatten().tolist()
        known = (
            {}
            if self.audited is None or self.exact is None
            else dict(zip(self.audited.tolist(), self.exact.tolist(), strict=True))
        )
        rows = []
        places = itertools.product(*(range(len(c)) for c in self.axes.values()))
        for index, (at, value) in enumerate(zip(places, self.values.flatten().tolist(), strict=True)):
            if math.isnan(value):
                continue
            row = {name: c[i] for (name, c), i in zip(self.axes.items(), at, strict=True)}
            if self.tokens is not None:
                row["token"] = self.tokens[at[list(self.axes).index("position")]]
            effect = value - self.baseline
            row |= {"value": value, "effect": effect, "normalised": effect / unit}
            if errors is not None:
                row["error"] = errors[index]
            if known:
                row["exact effect"] = known[index] - self.baseline if index in known else None
            rows.append(row)
        return rows

    def table(self) -> Table:
        """The rows as a table, in the order of the axes."""
        return Table(self.to_records(), self._title)

    def top(self, k: int = 10) -> Table:
        """Return the k cells with the largest absolute effects."""
        return Table(sorted(self.to_records(), key=lambda r: -abs(r["effect"]))[:k], self._title)

    @property
    def _title(self) -> str:
        text = f"{self.metric}: clean {self.clean:.4g}, corrupt {self.corrupt:.4g}; {self.direction}, {self.method}"
        if (found := self.audit) is not None:
            text += f"; correlation {found['correlation']:.3f} with exact patching of {found['cells']:.0f} cells"
        return text

    def _repr_html_(self) -> str:
        return self.top(12)._repr_html_()
