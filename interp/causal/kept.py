"""Kept: the finished cells of a sweep in a folder that one process holds."""

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from interp.hooks.errors import RunError


class Kept:
    """Finished cells on disk, one line each; a line that a kill cut off is computed again.

    The folder is locked for as long as the object is open. The system lets go of the lock when a process ends, also
    when it is killed.

    Args:
        folder: Where, made if it is not there; None for nowhere.

    Raises:
        RunError: If another process holds the folder, or it cannot be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with Kept(folder) as kept:
        ...     kept.add({"a": [{"iia": 0.5}]})
        >>> with Kept(folder) as kept:
        ...     kept.cells["a"]
        [{'iia': 0.5}]
    """

    def __init__(self, folder: str | Path | None):
        self.cells: dict[str, list[dict[str, Any]]] = {}
        self.file = None if folder is None else Path(folder) / "cells.jsonl"
        self._lock: IO[str] | None = None
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.file.with_name("lock"), "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise RunError(f"folder {folder} ({error})", "a folder that can be written") from error
        if not _lock(self._lock):
            self._lock.close()
            raise RunError(
                f"folder {folder}, in which another process is at work", "a folder of its own for each process",
                "wait for the other one, or give another path=",
            )  # fmt: skip
        self._read()

    def _read(self) -> None:
        assert self.file is not None
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            self.cells[record["key"]] = record["rows"]
        if text and not text.endswith("\n"):
            with open(self.file, "a", encoding="utf-8") as file:
                file.write("\n")

    def add(self, cells: dict[str, list[dict[str, Any]]]) -> None:
        """Keep cells that are finished."""
        self.cells |= cells
        if self.file is None:
            return
        with open(self.file, "a", encoding="utf-8") as file:
            for key, rows in cells.items():
                file.write(json.dumps({"key": key, "rows": rows}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: IO[str]) -> bool:
    """Take the lock of a file; False where another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
