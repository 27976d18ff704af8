"""ActivationStore: activations of many examples on disk, written by one pass and read without the model."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from interp.hooks.budget import bytes_of
from interp.hooks.errors import StoreError
from interp.hooks.model import Model
from interp.hooks.site import SiteLike
from interp.store.build import (
    Progress,
    StorePlan,
    check_columns,
    check_room,
    manifest_of,
    shapes_of,
    sizes_of,
    skips_first,
    wanted_sites,
    warn_dropped,
    warn_short,
    write_chunks,
    write_index,
)
from interp.store.extraction import OnEmpty, Options, plan_batches, plan_chunks, read_examples
from interp.store.files import StoreFiles


class Tokens(NamedTuple):
    """Tokens of n examples one after the other: example i owns rows offsets[i] to offsets[i + 1]."""

    values: Float[Tensor, "tokens d"]
    offsets: Int64[Tensor, "n_plus_one"]


class ActivationStore:
    """Activations on disk: pooled vectors for every site, and every token for the sites that are named.

    A folder with ``manifest.json`` (model, weights, tokenizer, inputs, sites, versions), ``index.safetensors``
    (lengths, token ids, place of each example), ``chunks/*.safetensors`` and ``chunks.jsonl``, their table with
    SHA-256. Each chunk is written whole or not at all. It opens without model, tokenizer or data set.

    Attributes:
        path: The folder.
        manifest: What the manifest says.

    Example:
        >>> import interp, torch
        >>> model = interp.attach(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
        >>> store = ActivationStore.build(model, torch.randn(10, 2), ["0", "1"], "acts", pools=["last"])
        >>> ActivationStore.open("acts").pooled("1", "last").shape
        torch.Size([10, 3])
    """

    def __init__(self, path: str | Path, manifest: dict[str, Any]):
        self.path, self.manifest = Path(path), manifest
        self._files = StoreFiles(path)
        self._chunks = self._files.rows()

    # Writing ---------------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls, model: Model, inputs: Any, sites: SiteLike | Sequence[SiteLike], path: str | Path, *,
        pools: Sequence[str] = ("mean", "last"), tokens: SiteLike | Sequence[SiteLike] = (), dtype: str = "float32",
        labels: Sequence[Any] | None = None, groups: Sequence[Any] | None = None,
        skip_first: bool | Literal["auto"] = "auto", skip_special: bool = False,
        on_empty: OnEmpty = "raise", untrained: int | None = None, batch_size: int = 32,
        batch_tokens: int = 4096, shard: int | str = "64MiB", budget: int | str | None = None,
        progress: Progress = lambda _: None,
    ) -> "ActivationStore":  # fmt: skip
        """Extract activations; go on where an earlier call with the same arguments was stopped.

        One forward call gives all sites, and ends behind the last one: the unembedding is not computed. A store that is
        complete is opened, and the model runs on one example alone. A killed build that is called again ends in the
        same bytes.

        Args:
            model: The model.
            inputs: Texts, lists of token ids, or a tensor of examples (images).
            sites: Sites of which the pools are kept; globs select many.
            path: The folder, new or of the same store.
            pools: Any of ``mean``, ``max``, ``last``, ``first``: over the real tokens of a text, or the places of a
                feature map.
            tokens: Sites of which every token is kept.
            dtype: ``float32``, ``float16`` or ``bfloat16``. Values beyond float16's range are kept in float32, with a
                warning.
            labels: Anything that JSON can hold, one for each example, to be read with the store.
            groups: The same: which examples belong together.
            skip_first: Whether means and maxima leave out the first token, an attention sink in decoders: by default
                there and nowhere else. Stored tokens keep it.
            skip_special: Whether means, maxima and stored tokens leave out special tokens.
            on_empty: What happens to texts without a token, or with none but special ones that are left out:
                ``raise``, or ``drop`` them with their labels and groups, and with them those of one token of which
                means leave out the first. `source` says which are left.
            untrained: A seed: the same is extracted of an untrained copy of the model too, into the folder
                ``untrained``. Sweeps then show what each probe reaches there.
            batch_size: Most examples in one forward call.
            batch_tokens: Most tokens in one forward call, padding included.
            shard: Bytes after which a chunk ends; what a kill can cost.
            budget: Most bytes on disk; by default what is free.
            progress: Called with a line after each chunk.

        Raises:
            StoreError: If the folder holds something else; the text names the field that differs.
            SizeError: If it would not fit.
            ArgumentError: If an option is not legal.
        """
        options = Options(
            tuple(pools), dtype, skips_first(model, skip_first), skip_special, batch_size, batch_tokens,
            bytes_of(shard),
        )  # fmt: skip
        wanted = wanted_sites(model, sites, tokens, options)
        examples = read_examples(model, inputs, options, on_empty)
        check_columns(len(inputs) if examples.source else len(examples), labels=labels, groups=groups)
        shapes, places = shapes_of(model, examples, wanted, options)
        sizes = sizes_of(examples, wanted, options, shapes, places)
        plan = StorePlan(len(examples), int(examples.lengths.sum()), len(wanted.all), int(sizes.sum()))
        chunks = plan_chunks(plan_batches(examples.lengths, options), sizes, options.shard)
        chosen = range(len(examples)) if examples.source is None else examples.source
        columns = {
            name: None if column is None else [column[i] for i in chosen]
            for name, column in (("labels", labels), ("groups", groups))
        }
        manifest = manifest_of(model, examples, wanted, options, shapes, plan, len(chunks), columns)
        files = StoreFiles(path)
        check_room(plan, files.path, budget)
        files.prepare(manifest)
        warn_short(examples, options)
        warn_dropped(examples, len(examples) if examples.source is None else len(inputs))
        write_index(files, examples, chunks, columns)
        write_chunks(files, model, examples, wanted, options, chunks, progress)
        if untrained is not None:
            from interp.causal.networks import untrained as copy_of

            cls.build(
                copy_of(model, untrained), inputs, sites, files.path / "untrained", pools=pools, tokens=tokens,
                dtype=dtype, labels=labels, groups=groups, skip_first=skip_first, skip_special=skip_special,
                on_empty=on_empty, batch_size=batch_size, batch_tokens=batch_tokens, shard=shard, budget=budget,
                progress=progress,
            )  # fmt: skip
        return cls.open(path)

    @staticmethod
    def estimate(
        model: Model, inputs: Any, sites: SiteLike | Sequence[SiteLike], *, pools: Sequence[str] = ("mean", "last"),
        tokens: SiteLike | Sequence[SiteLike] = (), dtype: str = "float32",
    ) -> StorePlan:  # fmt: skip
        """What `build` would write, without writing it: print it before you build."""
        options = Options(tuple(pools), dtype, False, False, 1, 1, 1)
        wanted, examples = wanted_sites(model, sites, tokens, options), read_examples(model, inputs, options)
        shapes, places = shapes_of(model, examples, wanted, options)
        total = int(sizes_of(examples, wanted, options, shapes, places).sum())
        return StorePlan(len(examples), int(examples.lengths.sum()), len(wanted.all), total)

    # Reading ---------------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path) -> "ActivationStore":
        """Open a complete store, without the model.

        Raises:
            StoreError: If it is none, or is not complete.
        """
        files = StoreFiles(path)
        manifest = files.manifest()
        rows = files.rows()
        missing = [
            n for n in range(manifest["chunks"]) if n not in rows or not (files.path / rows[n]["file"]).is_file()
        ]
        if missing:
            raise StoreError(
                f"{path} has {manifest['chunks'] - len(missing)} of {manifest['chunks']} chunks", "a complete store",
                "call build again with the same arguments: it goes on",
            )  # fmt: skip
        return cls(path, manifest)

    def verify(self) -> None:
        """Compare every chunk with its recorded SHA-256.

        Raises:
            StoreError: If one differs.
        """
        bad = [row["file"] for row in self._chunks.values() if not self._files.is_good(row)]
        if bad:
            raise StoreError(f"{', '.join(bad[:5])} of {self.path}: not the recorded SHA-256", "undamaged chunks",
                             "call build again with the same arguments: it writes them anew")  # fmt: skip

    @property
    def sites(self) -> list[str]:
        """Sites with pooled vectors."""
        return list(self.manifest["pooled_sites"])

    @property
    def token_sites(self) -> list[str]:
        """Sites of which every token is kept."""
        return list(self.manifest["token_sites"])

    @property
    def pools(self) -> list[str]:
        """Poolings that are kept."""
        return list(self.manifest["pools"])

    @property
    def labels(self) -> list[Any] | None:
        """Labels that were stored with the examples."""
        return self._columns()["labels"]

    @property
    def groups(self) -> list[Any] | None:
        """Groups that were stored with the examples."""
        return self._columns()["groups"]

    @property
    def untrained(self) -> "ActivationStore | None":
        """The store of an untrained copy of the model, if one was built with this one."""
        folder = self.path / "untrained"
        return ActivationStore.open(folder) if folder.is_dir() else None

    @property
    def source(self) -> Int64[Tensor, "n"]:
        """Places of the examples in the inputs that `build` was given: all of them, less those it dropped."""
        index = self._index()
        return index.get("source", torch.arange(len(self)))

    @property
    def token_ids(self) -> list[Tensor] | None:
        """Token ids of each example as the model was given them; None for other inputs."""
        index = self._index()
        return list(index["ids"].split(index["lengths"].tolist())) if "ids" in index else None

    @property
    def sha256(self) -> str:
        """Identity of the contents: hash of the table of chunks."""
        text = json.dumps([self._chunks[n]["sha256"] for n in sorted(self._chunks)])
        return hashlib.sha256(text.encode()).hexdigest()

    def pooled(self, site: SiteLike, pool: str = "mean") -> Float[Tensor, "n d"]:
        """Vectors of a site, in the order of the inputs, in float32.

        Raises:
            StoreError: If the site or the pooling is not in the store.
        """
        if str(site) not in self.sites or pool not in self.pools:
            raise StoreError(f"{pool} of {site}", f"one of {self.pools} of a site in {self.sites[:5]}, ...")
        stored = torch.cat(self._read(f"{site}|{pool}"))
        return stored[self._index()["place"]]

    def tokens(self, site: SiteLike) -> Tokens:
        """Every token of a site, examples in the order of the inputs, in float32: ``TokenSets(*store.tokens(site))``.

        Raises:
            StoreError: If the tokens of the site were not kept.
        """
        if str(site) not in self.token_sites:
            raise StoreError(f"tokens of {site}", f"one of the sites {self.token_sites}", "build with tokens=")
        values, counts = self._read(f"{site}|tokens"), torch.cat(self._read(f"{site}|counts")).long()
        parts = torch.cat(values).split(counts.tolist())
        place = self._index()["place"].tolist()
        ordered = [parts[i] for i in place]
        offsets = torch.tensor([0, *(len(p) for p in ordered)]).cumsum(0)
        return Tokens(torch.cat(ordered), offsets)

    def blocks(
        self, site: SiteLike, pool: str = "mean", rows: int = 4096
    ) -> Iterator[tuple[Int64[Tensor, "m"], Float[Tensor, "m d"]]]:
        """Vectors of a site a few rows at a time, in the order on disk, each with the number of its example.

        Nothing else is held in memory: what does not fit as a whole can be read as often as is needed.

        Args:
            site: Which site.
            pool: A pooling, or ``tokens``.
            rows: Most rows at a time.

        Raises:
            StoreError: If the site or the pooling is not in the store.
        """
        if rows < 1 or str(site) not in (self.token_sites if pool == "tokens" else self.sites) or (
            pool != "tokens" and pool not in self.pools
        ):  # fmt: skip
            raise StoreError(f"{pool} of {site}, {rows} rows at a time", f"at least one, of {self.pools} or tokens of "
                             f"sites in {self.sites[:5]}, {self.token_sites[:5]}")  # fmt: skip
        order = torch.argsort(self._index()["place"])
        start = 0
        for number in sorted(self._chunks):
            with self._opened(number) as chunk:
                values = chunk.get_slice(f"{site}|{pool}")
                count = len(chunk.get_tensor(f"{site}|counts")) if pool == "tokens" else values.get_shape()[0]
                owner = order[start : start + count]
                if pool == "tokens":
                    owner = owner.repeat_interleave(chunk.get_tensor(f"{site}|counts").long())
                for at in range(0, len(owner), rows):
                    yield owner[at : at + rows], values[at : at + rows].float()
                start += count

    def _opened(self, number: int) -> Any:
        from safetensors import SafetensorError, safe_open

        file = self.path / self._chunks[number]["file"]
        try:
            return safe_open(str(file), "pt")
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{file} cannot be read ({error})", "an undamaged chunk", "build again") from error

    def _read(self, key: str) -> list[Tensor]:
        found = []
        for number in sorted(self._chunks):
            with self._opened(number) as chunk:
                value = chunk.get_tensor(key)
            found.append(value.float() if value.is_floating_point() else value)
        return found

    def _index(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path / "index.safetensors")

    def _columns(self) -> dict[str, Any]:
        return json.loads((self.path / "examples.json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return self.manifest["examples"]

    def __repr__(self) -> str:
        tokens = f", tokens of {len(self.token_sites)}" if self.token_sites else ""
        what = f"{len(self):,} examples, {'/'.join(self.pools)} of {len(self.sites)} sites{tokens}"
        return f"ActivationStore({self.path.name}: {what}, {self.manifest['model']['class']})"
