"""The published artefact of Jacobian lenses, a ``.pt`` file: read without running anything, sizes before bytes.

Keys: ``J`` (layer -> matrix [d, d], output index first), ``n_prompts``, ``d_model``, ``source_layers``, ``metadata``.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.hooks.errors import ArgumentError, LensFileError
from interp.jacobians.plan import readable

MOST_BYTES = 64 << 30
_LARGEST_WIDTH, _MOST_LAYERS = 1 << 16, 1 << 12
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What the file holds beside its matrices: a pickle of a few names and numbers for each layer, some metadata.
_MOST_PICKLE = 4 << 20


def read_artefact(path: str | Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """Return the artefact's layers and counts, with matrices in float32.

    Args:
        path: File.
        most: Bytes that the file, and its matrices in float32, may have.

    Raises:
        LensFileError: If the file is no such artefact, is larger than allowed, or holds anything but plain data.
    """
    path = Path(path)
    _check_archive(path, most)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise LensFileError(f"{path} cannot be read ({why})", "a whole .pt file of plain data") from error
    if not isinstance(found, dict) or not isinstance(found.get("J"), dict) or not found["J"]:
        keys = ", ".join(map(str, list(found)[:6])) if isinstance(found, dict) else type(found).__name__
        raise LensFileError(f"{path} with {keys}", "a dictionary with J, n_prompts and d_model")
    d, prompts = _number(path, found, "d_model", 1, _LARGEST_WIDTH), _number(path, found, "n_prompts", 0, 1 << 40)
    if len(found["J"]) > _MOST_LAYERS or 4 * len(found["J"]) * d * d > most:
        raise LensFileError(f"{len(found['J'])} layers of width {d} in {path}", f"at most {readable(most)} of matrices")
    for layer, matrix in found["J"].items():
        _check_matrix(path, layer, matrix, d)
    metadata = found.get("metadata") or {}
    return {
        "matrices": {int(layer): found["J"][layer].float() for layer in sorted(found["J"])},
        "count": prompts,
        "metadata": _plain(metadata) if isinstance(metadata, dict) else {},
    }


def _check_archive(path: Path, most: int) -> None:
    """What is in the file by its directory: stored, not compressed, so that no small file becomes a large one."""
    try:
        size = path.stat().st_size
        if size > most:
            raise LensFileError(f"{path} of {readable(size)}", f"at most {readable(most)}", "raise most=")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        if isinstance(error, LensFileError):
            raise
        raise LensFileError(f"{path} cannot be read ({error})", "an archive that torch.save wrote") from error
    whole = sum(entry.file_size for entry in entries)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or whole > size:
        raise LensFileError(f"{path}, whose parts take {readable(whole)} in {readable(size)}", "parts that are stored")
    if any(entry.filename.endswith("data.pkl") and entry.file_size > _MOST_PICKLE for entry in entries):
        raise LensFileError(f"{path} with a pickle over {readable(_MOST_PICKLE)}", "names and numbers only")


def _check_matrix(path: Path, layer: Any, matrix: Any, d: int) -> None:
    if not _count(layer, 0, _MOST_LAYERS):
        raise LensFileError(f"layer {layer!r:.40} in {path}", f"a whole number below {_MOST_LAYERS}")
    plain = isinstance(matrix, Tensor) and matrix.layout == torch.strided and matrix.device.type == "cpu"
    if not plain or matrix.dtype not in _DTYPES or tuple(matrix.shape) != (d, d):
        given = f"{matrix.dtype} {list(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise LensFileError(f"J[{layer}] of {given} in {path}", f"a dense float matrix [{d}, {d}]")
    if matrix.untyped_storage().nbytes() < d * d * matrix.element_size():
        raise LensFileError(f"J[{layer}] in {path}, whose rows share memory", "a whole matrix for each layer")
    if not torch.isfinite(matrix).all():
        raise LensFileError(f"J[{layer}] in {path} holds NaN or infinity", "finite matrices")


def _number(path: Path, found: dict[Any, Any], key: str, low: int, high: int) -> int:
    value = found.get(key, 0)
    if not _count(value, low, high):
        raise LensFileError(f"{key}={value!r:.40} in {path}", f"a whole number in {low}..{high}")
    return value


def _count(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _plain(value: Any) -> Any:
    """The parts of metadata that JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items() if _plain(v) is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def write_artefact(
    path: str | Path, matrices: dict[int, Tensor], count: int, metadata: dict[str, Any], dtype: torch.dtype
) -> None:
    """Write an artefact that TransformerLens and the reference implementation read.

    Raises:
        ArgumentError: If the dtype is none of float16, bfloat16, float32 and float64, or too small for a matrix.
    """
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype={dtype}", f"one of {', '.join(str(d) for d in _DTYPES)}")
    stored = {int(layer): matrix.to(dtype).contiguous().clone() for layer, matrix in matrices.items()}
    for layer, matrix in stored.items():
        if not torch.isfinite(matrix).all():
            raise ArgumentError(f"J[{layer}], which is too large for {dtype}", "another dtype", "dtype=torch.float32")
    d = len(next(iter(stored.values())))
    payload = {"J": stored, "n_prompts": count, "source_layers": sorted(stored), "d_model": d, "metadata": metadata}
    torch.save(payload, path)
