"""Steps of building a store: what is wanted, how large it is, whether it fits, and its chunks one by one."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from interp.hooks.budget import bytes_of
from interp.hooks.errors import ArgumentError, SizeError
from interp.hooks.model import Model
from interp.hooks.site import Site
from interp.store.extraction import DTYPES, Examples, Options, Wanted, check_sites, read_batch
from interp.store.files import SCHEMA, StoreFiles, model_record, tokenizer_sha256, versions

Progress = Callable[[str], None]
Chunk = list[list[int]]


class StoreWarning(UserWarning):
    """What a store did otherwise than it was asked to."""


class StorePlan(NamedTuple):
    """What a store will hold.

    Attributes:
        examples: Number of examples.
        tokens: Number of their tokens.
        sites: Number of sites.
        bytes: Size on disk, without the small index.
    """

    examples: int
    tokens: int
    sites: int
    bytes: int

    def __str__(self) -> str:
        size = f"{self.bytes / 1e9:.3g} GB" if self.bytes >= 1e8 else f"{self.bytes / 1e6:.3g} MB"
        return f"{self.examples:,} examples, {self.tokens:,} tokens, {self.sites} sites: {size}"


def skips_first(model: Model, skip_first: Any) -> bool:
    """Whether means leave out first tokens: in decoders, if nothing else is said."""
    if skip_first not in (True, False, "auto"):
        raise ArgumentError(f"skip_first={skip_first!r}", "True, False or 'auto'")
    return model.reader.kind == "tokens" if skip_first == "auto" else bool(skip_first)


def wanted_sites(model: Model, sites: Any, tokens: Any, options: Options) -> Wanted:
    """The sites that are meant."""
    listed = [tokens] if isinstance(tokens, (str, Site)) else list(tokens)
    if not options.pools and not listed:
        raise ArgumentError("pools=() and tokens=()", "at least one pooling, or a site whose tokens are kept")
    pooled = check_sites(model, sites)
    kept = check_sites(model, listed) if listed else []
    return Wanted(tuple(map(str, pooled)) if options.pools else (), tuple(map(str, kept)))


def check_columns(n: int, **columns: Any) -> None:
    """Refuse columns of another length than the examples, or that JSON cannot hold."""
    for name, column in columns.items():
        if column is not None and len(column) != n:
            raise ArgumentError(f"{name} of length {len(column)} for {n} examples", "one for each example")
        try:
            json.dumps(None if column is None else list(column))
        except TypeError as error:
            raise ArgumentError(
                f"{name} ({error})", "texts, numbers and lists", "labels.tolist() of an array"
            ) from None


def shapes_of(
    model: Model, examples: Examples, wanted: Wanted, options: Options
) -> tuple[dict[str, int], dict[str, int]]:
    """Width of each site, and the tokens of one example of it, by the shortest example."""
    shortest = int(examples.lengths.argmin())
    every = Wanted((), tuple(wanted.all))
    found = read_batch(model, examples, [shortest], every, options)
    values = {site: found[f"{site}|tokens"] for site in wanted.all}
    return {s: v.shape[1] for s, v in values.items()}, {s: v.shape[0] for s, v in values.items()}


def sizes_of(
    examples: Examples, wanted: Wanted, options: Options, shapes: dict[str, int], places: dict[str, int]
) -> Int64[Tensor, "n"]:
    """Bytes of each example."""
    item = DTYPES[options.dtype].itemsize
    pooled = sum(shapes[s] for s in wanted.pooled) * len(options.pools) * item
    total = torch.full((len(examples),), pooled, dtype=torch.int64)
    for site in wanted.tokens:
        moves = isinstance(examples.rows, Tensor) or Site.parse(site).positions is not None
        total += (torch.full_like(total, places[site]) if moves else examples.lengths) * shapes[site] * item
    return total


def manifest_of(model, examples, wanted, options, shapes, plan, chunks, columns) -> dict[str, Any]:
    """What a store says of itself."""
    return {
        "schema": SCHEMA,
        "model": model_record(model),
        "tokenizer_sha256": tokenizer_sha256(model.tokenizer),
        "inputs_sha256": examples.sha256,
        "columns_sha256": hashlib.sha256(json.dumps(columns).encode()).hexdigest(),
        "examples": plan.examples,
        "input_tokens": plan.tokens,
        "pooled_sites": list(wanted.pooled),
        "token_sites": list(wanted.tokens),
        "widths": shapes,
        "pools": list(options.pools),
        "dtype": options.dtype,
        "skip_first": options.skip_first,
        "skip_special": options.skip_special,
        "batch_size": options.batch_size,
        "batch_tokens": options.batch_tokens,
        "shard": options.shard,
        "chunks": chunks,
        "versions": versions(),
    }


def check_room(plan: StorePlan, path: Path, budget: int | str | None) -> None:
    """Refuse what would not fit."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    written = sum(file.stat().st_size for file in path.glob("chunks/*.safetensors"))
    most = shutil.disk_usage(there).free + written if budget is None else bytes_of(budget)
    if plan.bytes > most:
        raise SizeError(f"{plan}", f"at most {most:,} bytes", "fewer sites, tokens= of fewer sites, or dtype='float16'")


def warn_short(examples: Examples, options: Options) -> None:
    """Say how many texts of one token keep it."""
    alone = int((examples.lengths == 1).sum()) if not isinstance(examples.rows, Tensor) else 0
    if options.skip_first and alone and set(options.pools) & {"mean", "max"}:
        text = f"{alone} of {len(examples)} texts have one token: it is kept although first tokens are skipped"
        warnings.warn(text, StoreWarning, stacklevel=3)


def warn_dropped(examples: Examples, n: int) -> None:
    """Say how many examples are left out, and which."""
    if len(examples) < n:
        gone = sorted(set(range(n)) - set(examples.source or ()))
        text = f"{len(gone)} of {n} examples have no token left and are left out: {', '.join(map(str, gone[:10]))}"
        warnings.warn(text, StoreWarning, stacklevel=3)


def write_index(files: StoreFiles, examples: Examples, chunks: list, columns: dict[str, Any]) -> None:
    """Write lengths, token ids, places and columns."""
    order = torch.tensor([i for chunk in chunks for batch in chunk for i in batch])
    index = {"lengths": examples.lengths, "place": torch.argsort(order)}
    if examples.source is not None:
        index["source"] = torch.tensor(examples.source)
    if not isinstance(examples.rows, Tensor):
        index["ids"] = torch.cat(examples.rows)
    files.write_tensors("index.safetensors", index)
    files.write_json("examples.json", columns)


def write_chunks(files, model, examples, wanted, options, chunks, progress: Progress) -> None:
    """Write the chunks that are not there yet, or not as they should be."""
    done = files.good_chunks(len(chunks))
    files.write_table(done)
    for number, batches in enumerate(chunks):
        if number in done:
            continue
        tensors = _chunk(model, examples, wanted, options, batches)
        done[number] = {"chunk": number, **files.write_tensors(files.chunk_name(number), tensors)}
        files.append(done[number])
        progress(f"chunk {number + 1} of {len(chunks)}")
    files.write_table(done)


def _chunk(model, examples, wanted, options, batches) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for rows in batches:
        found = read_batch(model, examples, rows, wanted, options)
        for key, value in found.items():
            parts.setdefault(key, []).append(value)
    return {key: _stored(key, torch.cat(values), options.dtype) for key, values in parts.items()}


def _stored(key: str, value: Tensor, dtype: str) -> Tensor:
    if not value.is_floating_point():
        return value
    found = value.to(DTYPES[dtype])
    if bool(torch.isfinite(found).all()):
        return found
    site, largest = key.split("|")[0], float(value.abs().max())
    text = f"{site} reaches {largest:.3g}, beyond {dtype}: these chunks are kept in float32"
    warnings.warn(text, StoreWarning, stacklevel=2)
    return value.float()
