"""What a sweep keeps on disk: finished parts, each under a hash of all that it depends on."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.probes.tokens import TokenSets


class KeptRows:
    """Finished parts of a sweep on disk, one line each; a line that a kill cut off is computed again."""

    def __init__(self, folder: str | Path | None):
        self.file = None if folder is None else Path(folder) / "sweep.jsonl"
        self.rows: dict[str, list[dict[str, Any]]] = {}
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            self.rows[record["key"]] = record["rows"]
        if text and not text.endswith("\n"):
            self.file.write_text(text + "\n", encoding="utf-8")

    def add(self, key: str, rows: list[dict[str, Any]]) -> None:
        """Append a finished part."""
        if self.file is None:
            return
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "rows": rows}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def hash_of(parts: list[Any]) -> str:
    """Hash of plain data, and of the version of the code."""
    import interp

    return hashlib.sha256(json.dumps([*parts, interp.__version__]).encode()).hexdigest()


def content_hash(X: Any) -> str:
    """Hash of features: shapes, types and bytes."""
    parts = [X.values, X.offsets] if isinstance(X, TokenSets) else X if isinstance(X, (list, tuple)) else [X]
    whole = hashlib.sha256()
    for part in parts:
        array = np.ascontiguousarray(part.detach().cpu().numpy() if isinstance(part, Tensor) else part)
        whole.update(f"{array.dtype}{array.shape}".encode())
        whole.update(torch.as_tensor(array).flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
