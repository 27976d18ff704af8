"""Table: rows of plain data that print well in a terminal and a notebook."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from interp.hooks.errors import MissingExtraError

_SHOWN = 40


class Rows:
    """What a result whose class has `to_records` gets from it: a table in a notebook, and a data frame."""

    def to_records(self) -> list[dict[str, Any]]:
        """The result as rows of plain data."""
        raise NotImplementedError

    def to_frame(self):
        """The rows as a pandas DataFrame.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError(
                "to_frame() without pandas", "pandas", "pip install pandas, or use to_records()"
            ) from error
        return pandas.DataFrame(self.to_records())

    def _repr_html_(self) -> str:
        rows = self.to_records()
        more = f", the first {_SHOWN} of {len(rows)} rows" if len(rows) > _SHOWN else ""
        return Table(rows[:_SHOWN], f"{type(self).__name__}{more}")._repr_html_()


class Table(Rows, Sequence[dict[str, Any]]):
    """Rows of plain data with named columns.

    Example:
        >>> Table([{"site": "hook_embed", "width": 576}])[0]["width"]
        576
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], title: str = ""):
        self._rows = [dict(row) for row in rows]
        self.title = title

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> "Table": ...

    def __getitem__(self, index):
        return Table(self._rows[index], self.title) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    @property
    def columns(self) -> list[str]:
        """Column names in order of first use."""
        return list(dict.fromkeys(key for row in self._rows for key in row))

    def to_records(self) -> list[dict[str, Any]]:
        """The rows, as plain dictionaries."""
        return [dict(row) for row in self._rows]

    def to_json(self) -> str:
        """The rows as JSON text."""
        return json.dumps(self._rows, indent=1)

    def __repr__(self) -> str:
        columns = self.columns
        cells = [[_text(row.get(c, "")) for c in columns] for row in self._rows[:_SHOWN]]
        widths = [max(len(c), *(len(r[i]) for r in cells)) if cells else len(c) for i, c in enumerate(columns)]
        lines = [
            "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip()
            for row in [columns, ["-" * w for w in widths], *cells]
        ]
        if len(self) > _SHOWN:
            lines.append(f"... {len(self) - _SHOWN} more rows")
        return "\n".join(([self.title] if self.title else []) + lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_text(row.get(c, '')))}</td>" for c in self.columns) + "</tr>"
            for row in self._rows
        )
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
