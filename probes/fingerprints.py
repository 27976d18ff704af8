"""Hashes under which a sweep keeps its finished parts: of all that a part depends on."""

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.probes.tokens import TokenSets


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
