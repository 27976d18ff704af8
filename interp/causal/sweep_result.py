"""AlignmentSweep: accuracies of many maps beside their controls, over seeds, and the frontier against complexity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows, Table
from interp.intervals import student

Measure = Literal["iia", "selectivity"]
COMPLEXITY = "effective dimension"
MEASURES = (
    COMPLEXITY, "parameters", "aligned", "aligned share", "stretch median", "stretch max", "inverse stretch median",
    "inverse stretch max", "stretch bound", "nonlinearity",
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Frontier(Rows):
    """Accuracy against complexity, with what the same maps reach on untrained networks.

    Attributes:
        rows: One for each site, map and size, in order of complexity: ``value``, its interval, ``random``; ``on
            frontier`` says that no simpler or equal map at the site reaches as much; ``best`` and ``random best`` are
            the two curves, the most that maps up to this complexity reach.
        measure: What ``value`` is.
        complexity: What orders the maps.
        areas: For each site the mean distance of the two curves over log10(1 + complexity).
    """

    rows: list[dict[str, Any]]
    measure: str
    complexity: str
    areas: dict[str, float]

    def to_records(self) -> list[dict[str, Any]]:
        """The rows."""
        return [dict(row) for row in self.rows]

    @property
    def kept(self) -> list[dict[str, Any]]:
        """The rows on the frontier."""
        return [dict(row) for row in self.rows if row["on frontier"]]

    def __repr__(self) -> str:
        shown = ("site", "map", "size", self.complexity, "value", "low", "high", "random", "best", "random best")
        rows = [{k: _cell(r[k]) for k in shown} | {"frontier": "*" if r["on frontier"] else ""} for r in self.rows]
        for row, kept in zip(rows, self.rows, strict=True):
            row["random"] += "" if kept["random trained"] else " (not trained)"
        areas = ", ".join(f"{site} {area:+.3f}" for site, area in self.areas.items())
        title = f"{self.measure} against {self.complexity}"
        return f"{Table(rows, title)}\nmean distance of the curves over log10(1 + {self.complexity}): {areas}"


@dataclass(frozen=True, eq=False, repr=False)
class AlignmentSweep(Rows):
    """Accuracies of maps at sites, for sizes of blocks and seeds, each with its controls.

    Attributes:
        rows: One for each map, site, size, seed and test split. ``iia`` is the headline accuracy (mean over pairs that
            flip and pairs that stay) with its own interval, ``plain`` that of all pairs; ``random`` is that of the
            same map on an untrained network (the best of its restarts, by validation loss), ``shuffled`` that of a map
            trained on permuted labels; None where nothing is trained. ``selectivity`` is iia - random.
        algorithm: Its name.
        variables: Those that are aligned.
        budget: How every map was trained, those of the controls too.
        controls: What was done for them.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    algorithm: str
    variables: list[str]
    budget: str
    controls: str

    def to_records(self) -> list[dict[str, Any]]:
        """The rows."""
        return [dict(row) for row in self.rows]

    @property
    def splits(self) -> list[str]:
        """Names of the test splits, the headline's first."""
        return list(dict.fromkeys(row["split"] for row in self.rows))

    @property
    def sites(self) -> list[str]:
        """The sites."""
        return list(dict.fromkeys(row["site"] for row in self.rows))

    @property
    def maps(self) -> list[str]:
        """Names of the maps."""
        return list(dict.fromkeys(row["map"] for row in self.rows))

    def summary(self, split: str | None = None) -> Table:
        """Return one row for each map, site and size: means over seeds with Student's intervals.

        All seeds count for ``iia``; ``trained`` says how many left the plateau of a constant guess. Untrained networks
        that did not leave it say nothing about the map and are left out of ``random`` where another one did.
        ``selectivity`` is paired: the mean over these seeds of the difference. With one seed, ``low`` and ``high`` are
        the bounds of its own pairs.

        Args:
            split: Which; by default the first.

        Raises:
            ArgumentError: If there is no such split.
        """
        chosen = self._split(split)
        groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        for row in self.rows:
            if row["split"] == chosen:
                groups.setdefault((row["map"], row["site"], row["size"]), []).append(row)
        found = [_summed(rows) for rows in groups.values()]
        return Table(found, f"{self.algorithm}, {chosen} pairs; {self.budget}; controls: {self.controls}")

    def best(self, map: str | None = None, site: str | None = None, split: str | None = None) -> dict[str, Any]:
        """Return the row of the summary that validation pairs choose.

        Chosen is the map, site and size whose validation loss is lowest relative to the same map's on untrained
        networks. Test pairs have no part in the choice: the accuracy is not too good for having been looked for.

        Args:
            map: Choose among this map's alone.
            site: Choose at this site alone.
            split: Whose accuracies are returned.

        Raises:
            ArgumentError: If there is no such map, site or split.
        """
        rows = self.summary(split).to_records()
        found = [r for r in rows if map in (None, r["map"]) and site in (None, r["site"])]
        if not found:
            raise ArgumentError(f"map={map!r}, site={site!r}", f"one of {self.maps}, one of {self.sites}")
        return max(found, key=lambda r: r["validation gap"])

    def frontier(
        self, site: str | None = None, *, measure: Measure = "iia", complexity: str = COMPLEXITY,
        split: str | None = None,
    ) -> Frontier:  # fmt: skip
        """Return accuracy against complexity at each site, with the curve of untrained networks beside it.

        What can be concluded about a network rests on the simple end: there a map that aligns it must have found
        something that untrained networks do not have.

        Args:
            site: One; by default each.
            measure: ``iia`` or ``selectivity`` (whose curve of untrained networks is 0).
            complexity: A measure of the summary: ``effective dimension``, ``parameters``, ``stretch max`` or others.
            split: Which pairs.

        Raises:
            ArgumentError: If there is no such site, measure or split.
        """
        rows = [r for r in self.summary(split) if site in (None, r["site"])]
        if not rows or measure not in ("iia", "selectivity"):
            raise ArgumentError(f"site={site!r}, measure={measure!r}", f"one of {self.sites}; iia or selectivity")
        if missing := [r["map"] for r in rows if r.get(complexity) is None]:
            raise ArgumentError(
                f"complexity={complexity!r}, which {', '.join(dict.fromkeys(missing))} have not",
                f"one of {', '.join(m for m in MEASURES if all(r.get(m) is not None for r in rows))}",
            )
        found, areas = [], {}
        for place in dict.fromkeys(r["site"] for r in rows):
            points = [_point(r, measure, complexity) for r in rows if r["site"] == place]
            found += _curves(sorted(points, key=lambda p: (p[complexity], -p["value"])), complexity)
            areas[place] = _area([p for p in found if p["site"] == place], complexity)
        return Frontier(found, measure, complexity, areas)

    def _split(self, split: str | None) -> str:
        if split is not None and split not in self.splits:
            raise ArgumentError(f"split={split!r}", f"one of {', '.join(self.splits)}")
        return split or self.splits[0]

    def __repr__(self) -> str:
        rows = []
        for row in self.summary():
            interval = f"{row['iia']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            label = "" if row["trained"] == row["seeds"] else f" ({row['trained']} of {row['seeds']} trained)"
            random = f"{row['random']:.3f}" + ("" if row["random trained"] else " (not trained)")
            rows.append({
                "map": row["map"], "site": row["site"], "size": row["size"], "IIA": interval + label,
                "random N": random, "shuffled": _cell(row["shuffled"]), "selectivity": f"{row['selectivity']:+.3f}",
                COMPLEXITY: f"{row[COMPLEXITY]:.4g}",
            })  # fmt: skip
        best = self.best()
        seeds = len({row["seed"] for row in self.rows})
        areas = ", ".join(f"{site} {area:+.3f}" for site, area in self.frontier().areas.items())
        return (
            f"{Table(rows, f'{self.algorithm}, {seeds} seeds; {self.budget}')}\ncontrols: {self.controls}\n"
            f"chosen by validation: {best['map']} at {best['site']}, size {best['size']}\n"
            f"distance of the frontier from that of untrained networks: {areas}"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _summed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row for the seeds of a map, site and size."""
    first, iia = rows[0], [r["iia"] for r in rows]
    interval = student(iia, bounds=(0.0, 1.0)) if len(rows) > 1 else None
    kept = [r for r in rows if r["random trained"]] or list(rows)
    paired = [r["iia"] - r["random"] for r in kept]
    spread = student(paired, bounds=(-1.0, 1.0)) if len(kept) > 1 else None
    shuffled = [r["shuffled"] for r in rows if r["shuffled"] is not None]
    found = {
        "map": first["map"], "site": first["site"], "size": first["size"], "seeds": len(rows), "iia": _mean(iia),
        "low": interval.low if interval else first["low"], "high": interval.high if interval else first["high"],
        "sd": _deviation(iia), "plain": _mean([r["plain"] for r in rows]),
        "plain sd": _deviation([r["plain"] for r in rows]), "trained": sum(r["trained"] for r in rows),
        "random": _mean([r["random"] for r in kept]), "random plain": _mean([r["random plain"] for r in kept]),
        "random trained": sum(r["random trained"] for r in rows), "shuffled": _mean(shuffled) if shuffled else None,
        "selectivity": _mean(paired), "selectivity low": spread.low if spread else None,
        "selectivity high": spread.high if spread else None,
        "best constant": _mean([r["best constant"] for r in rows]),
        "model accuracy": _mean([r["model accuracy"] for r in rows]),
        "validation gap": _mean([r["random validation loss"] - r["validation loss"] for r in rows]),
    }  # fmt: skip
    measured = {m: [r[m] for r in rows] for m in MEASURES if all(m in r for r in rows)}
    return found | {m: _mean(values) for m, values in measured.items()}


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _point(row: dict[str, Any], measure: str, complexity: str) -> dict[str, Any]:
    ends = ("low", "high") if measure == "iia" else ("selectivity low", "selectivity high")
    found = {name: row[name] for name in ("site", "map", "size", complexity)} | {"value": row[measure]}
    found |= {"low": row[ends[0]], "high": row[ends[1]], "random": row["random"] if measure == "iia" else 0.0}
    return found | {"random trained": row["random trained"], "seeds": row["seeds"]}


def _curves(points: Sequence[dict[str, Any]], complexity: str) -> list[dict[str, Any]]:
    """Points in order of complexity, with who is on the frontier and the two curves."""
    found = []
    for point in points:
        simpler = [p for p in points if p[complexity] <= point[complexity]]
        beaten = any(
            p["value"] >= point["value"] and (p["value"] > point["value"] or p[complexity] < point[complexity])
            for p in simpler
        )
        best, random = (max(p[name] for p in simpler) for name in ("value", "random"))
        found.append({**point, "on frontier": not beaten, "best": best, "random best": random})
    return found


def _area(points: Sequence[dict[str, Any]], complexity: str) -> float:
    """Mean of best - random best over log10(1 + complexity), both curves being steps."""
    at = [math.log10(1 + p[complexity]) for p in points]
    if at[-1] == at[0]:
        return points[-1]["best"] - points[-1]["random best"]
    steps = zip(pairwise(at), points, strict=False)
    return sum((end - start) * (p["best"] - p["random best"]) for (start, end), p in steps) / (at[-1] - at[0])


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
