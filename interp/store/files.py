"""The files of a store: its manifest, its index, its chunks with their table, and who wrote them."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.hooks.cache import sha256_file
from interp.hooks.errors import StoreError
from interp.hooks.model import Model
from interp.saving import write_atomically

SCHEMA = 1
_VERSIONS = ("interp", "torch", "transformers", "safetensors")
_TOLD = ("model.identity", "schema")  # told, not compared


def weights_sha256(model: Model) -> str:
    """SHA-256 of every parameter and buffer as they are now: names, dtypes, shapes, bytes."""
    whole = hashlib.sha256()
    for name, value in sorted(model.module.state_dict(keep_vars=True).items()):
        if not isinstance(value, Tensor):
            continue
        whole.update(f"{name}|{value.dtype}|{list(value.shape)}|".encode())
        if value.is_meta:
            continue  # offloaded: its file's hash is in the identity
        data = value.detach().contiguous().cpu().reshape(-1)
        whole.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    whole.update(json.dumps(model.identity.get("files", {}), sort_keys=True).encode() if _offloaded(model) else b"")
    return whole.hexdigest()


def _offloaded(model: Model) -> bool:
    return any(p.is_meta for p in model.module.parameters())


def tokenizer_sha256(tokenizer: Any) -> str | None:
    """SHA-256 of a tokenizer's whole definition (of its vocabulary, where that is all it gives); None without one."""
    if tokenizer is None:
        return None
    inner = getattr(tokenizer, "backend_tokenizer", None)
    text = inner.to_str() if inner is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def model_record(model: Model) -> dict[str, Any]:
    """Which model it is: class, family, configuration, weights, dtype, kind of device."""
    config = model.config
    text = config.to_json_string() if hasattr(config, "to_json_string") else repr(model.module)
    return {
        "identity": {key: value for key, value in model.identity.items() if key != "path"},
        "class": type(model.module).__name__,
        "family": model.family,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "weights_sha256": weights_sha256(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def versions() -> dict[str, str]:
    """Versions of what computed the activations."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _VERSIONS}


class StoreFiles:
    """A store's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def manifest_path(self) -> Path:
        """The manifest."""
        return self.path / "manifest.json"

    def chunk_name(self, number: int) -> str:
        """File of a chunk, below the folder."""
        return f"chunks/{number:06d}.safetensors"

    def prepare(self, manifest: Mapping[str, Any]) -> None:
        """Make the folder with its manifest, or compare with the one that is there.

        Raises:
            StoreError: If the folder holds something else, or a store of another model, tokenizer, input or choice.
        """
        try:
            (self.path / "chunks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the folder {self.path} ({error})", "a folder that can be written") from error
        self._sweep()
        if self.manifest_path.is_file():
            self.compare(manifest)
        elif any(p for p in self.path.rglob("*") if p.is_file()):
            raise StoreError(f"{self.path} holds files but no manifest", "an empty folder, or a store")
        else:
            self.write_json("manifest.json", manifest)

    def _sweep(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (self.path, self.path / "chunks"):
            for file in folder.glob(".*.tmp"):
                file.unlink()

    def compare(self, manifest: Mapping[str, Any]) -> None:
        """Refuse a manifest that says something else than the one on disk.

        Raises:
            StoreError: With the first field that differs, and both values.
        """
        found = self.manifest()
        ours, theirs = _flat(manifest), _flat(found)
        for field in sorted(ours.keys() | theirs.keys(), key=_order):
            if ours.get(field) == theirs.get(field) or not self._matters(field, found["chunks"]):
                continue
            raise StoreError(
                f"{field} is {ours.get(field)!r:.100} here and {theirs.get(field)!r:.100} in {self.path}",
                "the store's own model, tokenizer, inputs and choices", "build it under another path",
            )  # fmt: skip

    def _matters(self, field: str, chunks: int) -> bool:
        """Whether a field that differs is a reason to refuse: versions only while something is still to be computed."""
        if field.startswith("versions"):
            return len(self.good_chunks(chunks)) < chunks
        return not field.startswith(_TOLD)

    def manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            StoreError: If there is none, or it is of a newer schema.
        """
        try:
            found = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path} is not a store ({error})", "a folder with manifest.json") from error
        if found.get("schema", 0) > SCHEMA:
            raise StoreError(f"{self.path} has schema {found['schema']}", f"schema {SCHEMA} or older", "update interp")
        return found

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file whole or not at all."""
        write_atomically(self.path / name, json.dumps(data, indent=1, ensure_ascii=False).encode())

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write a safetensors file whole or not at all; give its name, size and hash."""
        from safetensors.torch import save

        data = save({key: value.contiguous() for key, value in tensors.items()})
        write_atomically(self.path / name, data)
        return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a finished chunk to the table."""
        with open(self.path / "chunks.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> dict[int, dict[str, Any]]:
        """The table of chunks by number; a line that was cut off by a kill is not one."""
        table = self.path / "chunks.jsonl"
        found: dict[int, dict[str, Any]] = {}
        for line in table.read_text(encoding="utf-8").splitlines() if table.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found[row["chunk"]] = row
        return found

    def good_chunks(self, count: int) -> dict[int, dict[str, Any]]:
        """Rows of the chunks that are there with the size and the hash that the table says."""
        return {n: row for n, row in self.rows().items() if n < count and self.is_good(row)}

    def is_good(self, row: Mapping[str, Any]) -> bool:
        """Whether a file has its recorded size and hash."""
        path = self.path / row["file"]
        return path.is_file() and path.stat().st_size == row["bytes"] and sha256_file(path) == row["sha256"]

    def write_table(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Write the table anew, in the order of the chunks."""
        text = "".join(json.dumps(rows[n]) + "\n" for n in sorted(rows))
        write_atomically(self.path / "chunks.jsonl", text.encode())


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _order(field: str) -> tuple[int, str]:
    """Causes before their effects: another model also means other sites, another tokenizer other inputs."""
    first = ("model.class", "model.family", "model.config", "model.weights", "model", "tokenizer", "inputs")
    return next((i for i, name in enumerate(first) if field.startswith(name)), len(first)), field
