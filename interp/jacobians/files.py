"""Jacobians on disk: a safetensors file that is allocated first and filled chunk by chunk, by a process that may die.

``<name>.progress.json`` beside it says what makes the Jacobians and which of them are there; without it the file is
whole. Anything that reads safetensors reads the tensor ``jacobians`` [n, out, in].
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from interp.hooks.errors import SizeError, StoreError
from interp.hooks.inputs import Batch
from interp.hooks.model import Model
from interp.jacobians.plan import readable
from interp.saving import write_atomically
from interp.store.files import versions, weights_sha256

if TYPE_CHECKING:
    from interp.jacobians.results import Jacobians

FORMAT = 1
SHARD_BYTES = 4 << 30
STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_ALIGNED = 64


class Shard(NamedTuple):
    """One file with some of the Jacobians."""

    path: Path
    span: slice


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors file's header and the byte at which its tensors begin.

    Raises:
        StoreError: If it is no safetensors file with Jacobians of a format that is known.
    """
    needed = "a file that jacobian(..., out=path) wrote"
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < os.path.getsize(path) else {}
        header["record"] = json.loads(header["__metadata__"]["interp"])
        version = header["record"]["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read as Jacobians ({type(error).__name__}: {error})", needed) from error
    if version > FORMAT:
        raise StoreError(f"{path} has format {version}", f"format {FORMAT} or older", "update interp")
    return header, 8 + size


def open_shard(path: Path, write: bool = False) -> tuple[dict[str, Tensor], np.memmap]:
    """Return the tensors of a file as views of its memory map, and the map.

    Raises:
        StoreError: If the file is cut off, or no file of Jacobians.
    """
    header, start = read_header(path)
    entries = {name: entry for name, entry in header.items() if name not in ("__metadata__", "record")}
    end = start + max(entry["data_offsets"][1] for entry in entries.values())
    if os.path.getsize(path) != end:
        raise StoreError(f"{path} of {os.path.getsize(path):,} bytes", f"{end:,} bytes, as its header says")
    # "c": what a reader writes into a tensor stays in memory.
    mapped = np.memmap(path, np.uint8, "r+" if write else "c")
    data = torch.from_numpy(mapped)
    found = {}
    for name, entry in entries.items():
        low, high = entry["data_offsets"]
        found[name] = data[start + low : start + high].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found, mapped


def inputs_sha256(examples: Iterable[Batch]) -> str:
    """SHA-256 of all tensors of some inputs: dtypes, shapes, bytes."""
    whole = hashlib.sha256()
    for batch in examples:
        for value in tree_leaves((batch.args, batch.kwargs)):
            if isinstance(value, Tensor):
                data = value.detach().contiguous().cpu()
                whole.update(f"{data.dtype}|{list(data.shape)}|".encode())
                whole.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return whole.hexdigest()


def record_of(model: Model, examples: list[Batch], jacobians: "Jacobians", dtype: torch.dtype) -> dict[str, Any]:
    """Return what makes Jacobians what they are, as plain data; the file carries it, and resuming compares it."""
    source, target = jacobians.ends
    shapes = jacobians.shapes_of(jacobians.places[0])
    name = lambda dtype: str(dtype).removeprefix("torch.")
    listed = lambda indices: None if indices is None else indices.tolist()
    return {
        "format": FORMAT, "versions": versions(), "model": {"family": model.family, "weights": weights_sha256(model)},
        "inputs": inputs_sha256(examples), "source": str(source.site), "target": str(target.site),
        "rows": listed(target.indices), "columns": listed(source.indices), "in_shape": list(shapes[0]),
        "out_shape": list(shapes[1]), "linearization": jacobians.linearization.to_dict(),
        "method": jacobians.plan.method, "precision": jacobians.plan.precision, "dtype": name(dtype),
        "places": [[p.example, p.sources, p.targets, p.single] for p in jacobians.places],
    }  # fmt: skip


def write_jacobians(jacobians: "Jacobians", path: Path, record: dict[str, Any], dtype: torch.dtype) -> None:
    """Write all Jacobians to a file, or those that it does not hold yet.

    Above `SHARD_BYTES` the path is a folder of files. float16 values are divided by each Jacobian's largest entry,
    which stands in ``scales`` [n].

    Raises:
        StoreError: If something else is at the path, or it cannot be written.
        SizeError: If the disk has no room.
    """
    shape = jacobians.shape
    record = json.loads(json.dumps(record))
    shards = plan_shards(path, shape, dtype)
    progress = _beside(path)
    done = _begin(path, record, shards, shape, dtype)
    if done is None:
        return
    for shard in shards:
        tensors, mapped = open_shard(shard.path, write=True)
        for span in _left(jacobians._chunks(), shard.span, done):
            _fill(jacobians, span, shard.span.start, tensors)
            mapped.flush()
            done.append((span.start, span.stop))
            _note(progress, record, done)
    progress.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.progress.json")


def _begin(
    path: Path, record: dict[str, Any], shards: list[Shard], shape: tuple[int, int, int], dtype: torch.dtype
) -> list[tuple[int, int]] | None:
    """What is there already, after files were made where there are none; None where all is there.

    Raises:
        StoreError: If the path holds something else.
        SizeError: If the disk has no room.
    """
    progress = _beside(path)
    if progress.is_file():
        state = _read_progress(progress)
        _compare(record, state["record"], progress)
        if all(shard.path.is_file() for shard in shards):
            return [(start, stop) for start, stop in state["done"]]
    elif path.exists():
        _compare(record, read_header(shards[0].path)[0]["record"], path)
        return None
    needed, free = math.prod(shape) * dtype.itemsize, _free(path)
    if needed > free:
        raise SizeError(
            f"{readable(needed)} of Jacobians for {path}, where {readable(free)} are free", f"{needed:,} bytes",
            "another disk, out_dtype=torch.float16, fewer positions or rows=, or reduce=",
        )  # fmt: skip
    _note(progress, record, [])
    for shard in shards:
        _allocate(shard, record, shape, dtype)
    return []


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError as error:
        raise StoreError(f"out={path} ({error})", "a path in a folder that exists") from error


def _read_progress(progress: Path) -> dict[str, Any]:
    try:
        state = json.loads(progress.read_text(encoding="utf-8"))
        return {"record": state["record"], "done": state["done"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{progress} cannot be read ({error})", "what jacobian(..., out=path) left there") from error


def _compare(ours: dict[str, Any], theirs: dict[str, Any], where: Path) -> None:
    found = first_difference(ours, theirs)
    if found is not None:
        name, here, there = found
        raise StoreError(
            f"{name} is {here!r:.100} here and {there!r:.100} in {where}",
            "the same model, inputs, sites and choices", "another path, or remove what is there",
        )  # fmt: skip


def _note(progress: Path, record: dict[str, Any], done: list[tuple[int, int]]) -> None:
    write_atomically(progress, json.dumps({"record": record, "done": done}).encode())


def _allocate(shard: Shard, record: dict[str, Any], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """A file with its header, and as many zero bytes behind it as its tensors have; most systems keep no zeros."""
    span = shard.span
    sizes = {"jacobians": (dtype, [span.stop - span.start, *shape[1:]])}
    if dtype == torch.float16:
        sizes["scales"] = (torch.float32, [span.stop - span.start])
    about = json.dumps(record | {"span": [span.start, span.stop]})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "interp": about}}
    at = 0
    for name, (kind, axes) in sizes.items():
        end = at + math.prod(axes) * kind.itemsize
        header[name] = {"dtype": _CODES[kind], "shape": axes, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    try:
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        with open(shard.path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
    except OSError as error:
        raise StoreError(f"out={shard.path} ({error})", "a path that can be written") from error


def _left(chunks: Iterable[slice], within: slice, done: list[tuple[int, int]]) -> list[slice]:
    """The chunks, cut to a file, of which something is missing."""
    cut = [slice(max(c.start, within.start), min(c.stop, within.stop)) for c in chunks]
    there = {i for start, stop in done for i in range(start, stop)}
    return [c for c in cut if c.start < c.stop and not there.issuperset(range(c.start, c.stop))]


def _fill(jacobians: "Jacobians", span: slice, first: int, tensors: dict[str, Tensor]) -> None:
    """Compute a chunk into the file."""
    room = tensors["jacobians"][span.start - first : span.stop - first]
    like = jacobians.like
    if room.dtype == like.dtype and like.device.type == "cpu":
        jacobians._matrices(span, room)
        return
    made = jacobians._matrices(span)
    if "scales" in tensors:
        scales = made.abs().amax((1, 2)).float()
        scales = torch.where(scales == 0, 1.0, scales)
        tensors["scales"][span.start - first : span.stop - first] = scales.cpu()
        made = made / scales[:, None, None]
    room.copy_(made)


def plan_shards(path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Shard]:
    """The files that hold Jacobians: the path itself, or files in a folder where one would be too large."""
    n, rows, columns = shape
    each = rows * columns * dtype.itemsize
    if n * each <= SHARD_BYTES:
        return [Shard(path, slice(0, n))]
    per = max(1, SHARD_BYTES // each)
    starts = range(0, n, per)
    return [
        Shard(path / f"jacobians-{i + 1:05d}-of-{len(starts):05d}.safetensors", slice(start, min(start + per, n)))
        for i, start in enumerate(starts)
    ]


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field in which two records differ, with both values; None where they are the same."""
    names = [*ours, *(name for name in theirs if name not in ours and name != "span")]
    return next(((n, ours.get(n), theirs.get(n)) for n in names if ours.get(n) != theirs.get(n)), None)
