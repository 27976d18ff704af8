"""Kept: the finished parts of a long computation, as lines of a file in a folder that one process holds."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from interp.hooks.errors import RunError
from interp.runs.lock import locked


class Kept:
    """Finished parts on disk, one line each; a line that a kill cut off is computed again, and no other.

    Between ``with`` and its end the folder is locked. The lock ends with its process, however that ends.

    Args:
        folder: Where, made if it is not there; None for nowhere.
        name: Of the file.

    Attributes:
        rows: Of each finished part, by its key.

    Raises:
        RunError: If the folder cannot be made; on entering, if another process holds it.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with Kept(folder, "parts.jsonl") as kept:
        ...     kept.add({"a": [{"iia": 0.5}]})
        >>> with Kept(folder, "parts.jsonl") as kept:
        ...     kept.rows["a"]
        [{'iia': 0.5}]
    """

    def __init__(self, folder: str | Path | None, name: str):
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.file = None if folder is None else Path(folder) / name
        self._held = ExitStack()

    def __enter__(self) -> "Kept":
        if self.file is None:
            return self
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"folder {self.file.parent} ({error})", "a folder that can be written") from error
        self._held.enter_context(locked(self.file.parent, wait=0.0))
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            self.rows[record["key"]] = record["rows"]
        if text and not text.endswith("\n"):
            with open(self.file, "a", encoding="utf-8") as file:
                file.write("\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def add(self, parts: dict[str, list[dict[str, Any]]]) -> None:
        """Keep parts that are finished."""
        self.rows |= parts
        if self.file is None:
            return
        with open(self.file, "a", encoding="utf-8") as file:
            for key, rows in parts.items():
                file.write(json.dumps({"key": key, "rows": rows}) + "\n")
            file.flush()
            os.fsync(file.fileno())
