"""Two runs side by side: what was asked differently, what differed where they were computed, and in what came out."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.hooks.table import Rows, Table
from interp.runs.run import Run

_SHOWN = 80
# What no two runs have in common, and says nothing on why their results differ.
_EACH_ITS_OWN = ("times", "resumed", "command", "results", "figures")
# Columns and fields that are errors relative to something else: near zero, where the last digits are all there is.
_ERRORS = ("error", "of value")
# Measured, not computed.
_CLOCKS = ("seconds", "duration")


@dataclass(frozen=True)
class RunComparison(Rows):
    """Differences between two runs.

    Attributes:
        first: Name of the one.
        second: Name of the other.
        fields: Rows (what, field, first, second) of specification and provenance, where they differ.
        results: Rows (result, deviation, relative, note), one for each result of either: the largest absolute
            difference of any number in it, and the largest relative one. Relative is to the largest number of the same
            column in a table or of the same array, and for a single number to the largest of the result's single
            numbers, which may cancel; errors, which are relative already, stay as they are.
    """

    first: str
    second: str
    fields: list[dict[str, Any]] = field(repr=False)
    results: list[dict[str, Any]] = field(repr=False)

    @property
    def deviation(self) -> float:
        """The largest relative deviation of any result that both runs have; 0 where there is none."""
        return max((r["relative"] for r in self.results if r["relative"] is not None), default=0.0)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each result."""
        return [dict(row) for row in self.results]

    def table(self) -> Table:
        """The results as a table."""
        return Table(self.results, f"{self.first} and {self.second}")

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def compare_runs(first: Run, second: Run) -> RunComparison:
    """Return how two runs differ: specification, provenance, and the largest deviation of each result.

    Args:
        first: The one.
        second: The other.

    Raises:
        RunError: If a result cannot be read.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> runs = [Run.create(folder, "demo", {"k": k}) for k in (1, 2)]
        >>> for run, value in zip(runs, (2.0, 2.5)):
        ...     run.save("rows", Table([{"value": value}]))
        >>> found = compare_runs(*runs)
        >>> found.fields[0]["field"], found.deviation
        ('k', 0.2)
    """
    where = [{k: v for k, v in run.provenance.items() if k not in _EACH_ITS_OWN} for run in (first, second)]
    rows = [
        {"what": what, "field": name, "first": _short(a.get(name)), "second": _short(b.get(name))}
        for what, a, b in (
            ("specification", dict(_leaves(first.spec)), dict(_leaves(second.spec))),
            ("provenance", *(dict(_leaves(one)) for one in where)),
        )
        for name in sorted({*a, *b})
        if a.get(name) != b.get(name)
    ]
    names = [*first.names, *(n for n in second.names if n not in first.names)]
    return RunComparison(first.path.name, second.path.name, rows, [_compared(first, second, n) for n in names])


def _compared(first: Run, second: Run, name: str) -> dict[str, Any]:
    missing = [run.path.name for run in (first, second) if name not in run.names]
    row: dict[str, Any] = {"result": name, "deviation": None, "relative": None, "note": ""}
    if missing:
        return row | {"note": f"not in {missing[0]}"}
    loaded = [run.load(name) for run in (first, second)]
    a, b = (dict(_leaves(_parts(one))) for one in loaded)
    shared = [key for key in a if key in b and not any(clock in key for clock in _CLOCKS)]
    notes = [] if set(a) == set(b) else [f"{len(set(a) ^ set(b))} entries in one alone"]
    worst, sizes, words = defaultdict(float), defaultdict(float), 0
    for key in shared:
        left, right = _numbers(a[key]), _numbers(b[key])
        if left is None or right is None:
            words += a[key] != b[key]
        elif left.shape != right.shape:
            notes.append(f"{key}: shapes {list(left.shape)} and {list(right.shape)}")
        elif left.numel():
            group = _group(key, a[key], isinstance(loaded[0], Table))
            worst[group] = max(worst[group], _apart(left, right))
            sizes[group] = max(sizes[group], *(_largest(p) for p in (left, right)))
    notes += [f"{words} words differ"] if words else []
    relative = [d / (sizes[g] or 1.0) if not g.endswith(_ERRORS) else d for g, d in worst.items()]
    return row | {
        "deviation": max(worst.values(), default=0.0),
        "relative": max(relative, default=0.0),
        "note": "; ".join(notes),
    }


def _group(key: str, value: Any, table: bool) -> str:
    """Whose largest number a number is set against: its column's, its field's, or all others' where it stands alone."""
    column = re.sub(r"\[\d+\]\.?", "", key)
    alone = isinstance(value, float) and not hasattr(value, "dtype")
    return "" if alone and not table and not column.endswith(_ERRORS) else column


def _apart(left: Tensor, right: Tensor) -> float:
    """The largest difference; infinite where one alone is infinite or no number."""
    same = (left == right) | (left.isnan() & right.isnan())
    return float((left - right).abs().masked_fill(same, 0.0).nan_to_num(torch.inf).max())


def _largest(numbers: Tensor) -> float:
    return float(numbers.abs().nan_to_num(0.0, posinf=0.0).max())


def _parts(result: Any) -> Any:
    """A result's fields, or its rows."""
    if isinstance(result, Table):
        return result.to_records()
    return {name: getattr(result, name) for name in getattr(result, "__dataclass_fields__", {})}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, words and tensors by their place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{i}]")
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        yield from _leaves(_parts(value), name)
    else:
        yield name, value


def _numbers(value: Any) -> Tensor | None:
    """A number, an array or a tensor in float64; None for what is no number."""
    if isinstance(value, Tensor):
        return torch.view_as_real(value).double() if value.is_complex() else value.double()
    if hasattr(value, "__array__"):
        return torch.as_tensor(value, dtype=torch.float64)
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, (int, float)) else None


def _short(value: Any) -> str:
    text = "not there" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
