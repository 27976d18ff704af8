"""Extraction: which examples go through the model together, and what is kept of each site."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.errors import ArgumentError, InputError, NonFiniteError, SiteError
from interp.hooks.model import Model
from interp.hooks.site import Site, SiteLike

OnEmpty = Literal["raise", "drop"]
POOLS = ("mean", "max", "last", "first")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SLICE = 256


@dataclass(frozen=True)
class Options:
    """What is kept, and how it is computed.

    Attributes:
        pools: Poolings that are kept for every site: ``mean``, ``max``, ``last``, ``first``.
        dtype: dtype on disk.
        skip_first: Whether means and maxima leave out each text's first token.
        skip_special: Whether means, maxima and stored tokens leave out the tokenizer's special tokens.
        batch_size: Most examples in one forward call.
        batch_tokens: Most tokens in one forward call, padding included.
        shard: Bytes after which a chunk ends.
    """

    pools: tuple[str, ...]
    dtype: str
    skip_first: bool
    skip_special: bool
    batch_size: int
    batch_tokens: int
    shard: int

    def __post_init__(self):
        """Refuse what is not known.

        Raises:
            ArgumentError: If a pooling, the dtype or a size is not legal.
        """
        unknown = [p for p in self.pools if p not in POOLS]
        if unknown or len(set(self.pools)) != len(self.pools):
            raise ArgumentError(f"pools={list(self.pools)}", f"different ones of {', '.join(POOLS)}")
        if self.dtype not in DTYPES:
            raise ArgumentError(f"dtype={self.dtype!r}", f"one of {', '.join(DTYPES)}")
        if min(self.batch_size, self.batch_tokens) < 1:
            raise ArgumentError(f"batch_size={self.batch_size}, batch_tokens={self.batch_tokens}", "at least 1")


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs one by one: token ids, or rows of a tensor.

    Attributes:
        rows: Token ids of each example, or one tensor [n, ...].
        lengths: Tokens of each example (1 where there are none).
        kept: Of token ids, which count for means, maxima and stored tokens.
        source: Places in the inputs, where empty ones were left out.
    """

    rows: list[Tensor] | Tensor
    lengths: Int64[Tensor, "n"]
    kept: list[Tensor] | None = field(default=None, repr=False)
    source: list[int] | None = None

    @property
    def sha256(self) -> str:
        """Hash of the inputs: shapes and bytes."""
        whole = hashlib.sha256()
        for row in self.rows:
            data = row.detach().cpu().contiguous()
            whole.update(f"{data.dtype}{list(data.shape)}".encode())
            whole.update(data.flatten().view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> Any:
        """What the model is given for these examples."""
        return self.rows[list(rows)] if isinstance(self.rows, Tensor) else [self.rows[i] for i in rows]


def read_examples(model: Model, inputs: Any, options: Options, on_empty: OnEmpty = "raise") -> Examples:
    """Tokenise texts once, or take a tensor's rows.

    Raises:
        InputError: If there are no examples, or the model cannot take them.
    """
    if on_empty not in ("raise", "drop"):
        raise ArgumentError(f"on_empty={on_empty!r}", "raise or drop")
    if isinstance(inputs, str) or not hasattr(inputs, "__len__") or not len(inputs):
        raise InputError(f"inputs={inputs!r:.60}", "a list of texts or of token ids, or a tensor of examples")
    if model.reader.kind not in ("tokens", "encoder"):
        found = [inputs] if isinstance(inputs, Tensor) else list(model.batch(inputs).args)
        if len(found) != 1 or not isinstance(found[0], Tensor):
            raise InputError(f"inputs of type {type(inputs).__name__}", "one tensor of examples, or what becomes one")
        return Examples(found[0], torch.ones(len(found[0]), dtype=torch.int64))
    if on_empty == "drop":
        return _without_empty(model, inputs, options)
    rows = _token_rows(model, inputs)
    kept = _ordinary(model, rows) if options.skip_special else None
    empty = [] if kept is None else [i for i, k in enumerate(kept) if not bool(k.any())]
    if empty:
        raise InputError(
            f"{len(empty)} texts of special tokens alone: {empty[:10]}", "at least one other token in each",
            'on_empty="drop", or skip_special=False',
        )  # fmt: skip
    return Examples(rows, torch.tensor([len(r) for r in rows]), kept)


def _without_empty(model: Model, inputs: Any, options: Options) -> Examples:
    """Examples that have a token left after the special ones and, where means leave it out, the first one."""
    source = [i for i in range(len(inputs)) if len(inputs[i])]
    rows = _token_rows(model, [inputs[i] for i in source]) if source else []
    kept = _ordinary(model, rows) if options.skip_special else [torch.ones(len(r), dtype=torch.bool) for r in rows]
    first = 1 if options.skip_first and set(options.pools) & {"mean", "max"} else 0
    left = [i for i, k in enumerate(kept) if bool(k[first:].any())]
    if not left:
        raise InputError(f"{len(inputs)} examples, all of them empty", "at least one with a token that is kept")
    rows, kept = [rows[i] for i in left], [kept[i] for i in left]
    lengths = torch.tensor([len(r) for r in rows])
    return Examples(rows, lengths, kept if options.skip_special else None, [source[i] for i in left])


def _token_rows(model: Model, inputs: Any) -> list[Tensor]:
    rows: list[Tensor] = []
    for start in range(0, len(inputs), _SLICE):
        batch = model.batch(_part(inputs, start), "right")
        assert batch.ids is not None
        assert batch.mask is not None
        rows += [ids[mask].cpu() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    return rows


def _part(inputs: Any, start: int) -> Any:
    return inputs[start : start + _SLICE] if isinstance(inputs, Tensor) else list(inputs[start : start + _SLICE])


def _ordinary(model: Model, rows: list[Tensor]) -> list[Tensor]:
    special = getattr(model.tokenizer, "all_special_ids", None)
    if not special:
        raise ArgumentError("skip_special=True", "a tokenizer with special tokens", "leave skip_special out")
    return [~torch.isin(row, torch.tensor(special)) for row in rows]


def check_sites(model: Model, sites: SiteLike | Sequence[SiteLike]) -> list[Site]:
    """The sites that are meant, all with a vector for each position (or one for each example).

    Raises:
        SiteError: If a site has other axes.
    """
    found = model.resolve(sites)
    for site, binding in found:
        if len(binding.axes) > 1 and binding.axes[1] != "pos":
            raise SiteError(
                f"{site} with axes {' '.join(binding.axes)}", "a site with axes batch, pos, ...",
                "a store holds one vector for each token or example",
            )  # fmt: skip
    return [site for site, _ in found]


def plan_batches(lengths: Int64[Tensor, "n"], options: Options) -> list[list[int]]:
    """Examples of each forward call: sorted by length, so that little is padded."""
    batches: list[list[int]] = []
    for i in torch.argsort(lengths, stable=True).tolist():
        last = batches[-1] if batches else []
        full = len(last) >= options.batch_size or (len(last) + 1) * int(lengths[i]) > options.batch_tokens
        if not last or full:
            batches.append([i])
        else:
            last.append(i)
    return batches


def plan_chunks(batches: list[list[int]], sizes: Int64[Tensor, "n"], shard: int) -> list[list[list[int]]]:
    """Batches of each chunk: as many as fill ``shard`` bytes, at least one."""
    chunks: list[list[list[int]]] = []
    room = 0
    for batch in batches:
        size = int(sizes[batch].sum())
        if not chunks or size > room:
            chunks.append([])
            room = shard
        chunks[-1].append(batch)
        room -= size
    return chunks


@dataclass(frozen=True)
class Wanted:
    """Sites to pool and sites to keep every token of.

    Attributes:
        pooled: Sites of which the pools are kept.
        tokens: Sites of which every token is kept.
    """

    pooled: tuple[str, ...]
    tokens: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Every site once."""
        return list(dict.fromkeys([*self.pooled, *self.tokens]))


def read_batch(
    model: Model, examples: Examples, rows: Sequence[int], wanted: Wanted, options: Options
) -> dict[str, Tensor]:
    """What is kept of one forward call, by ``SITE|KIND``, on the CPU: pools, tokens, and counts of these.

    Raises:
        NonFiniteError: If the model gives NaN or infinity at a real token.
    """
    acts = model.capture(examples.batch(rows), wanted.all, padding_side=_side(model))
    found: dict[str, Tensor] = {}
    for site in wanted.all:
        features, valid, whole = _tokens(acts, site)
        _check_finite(site, features, valid, rows)
        kept = _kept(valid, rows, examples) if whole else valid
        if site in wanted.tokens:
            found[f"{site}|tokens"] = features[kept].cpu()
            found[f"{site}|counts"] = kept.sum(1).cpu()
        for pool in options.pools if site in wanted.pooled else ():
            over = _without_first(kept) if options.skip_first and whole else kept
            found[f"{site}|{pool}"] = _pooled(features, valid, over, pool).cpu()
    return found


def _side(model: Model) -> Literal["right"] | None:
    return "right" if model.reader.kind in ("tokens", "encoder") else None


def _tokens(acts: Activations, site: str) -> tuple[Tensor, Tensor, bool]:
    """Features [n, T, d], which of them are real, and whether T are all the positions of a text."""
    value, mask = acts[site], acts.mask
    if acts.where[site] is not None:
        features = value.flatten(2)
        return features, _all(features), False
    if mask is None:
        if value.ndim == 4 and acts.axes[site] == ("batch",):
            value = value.flatten(2).transpose(1, 2)  # a feature map [n, channel, height, width]: places are tokens
        features = value[:, None] if value.ndim == 2 else value.flatten(2) if value.ndim > 2 else value[:, None, None]
        return features, _all(features), False
    if value.ndim < 3 or value.shape[:2] != mask.shape:
        raise SiteError(
            f"{site} gives {list(value.shape)} for tokens {list(mask.shape)}", "a tensor [batch, pos, ...]",
        )  # fmt: skip
    return value.flatten(2), mask.to(value.device), True


def _all(features: Tensor) -> Tensor:
    return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)


def _kept(valid: Tensor, rows: Sequence[int], examples: Examples) -> Tensor:
    if examples.kept is None:
        return valid
    kept = torch.zeros_like(valid)
    for place, row in enumerate(rows):
        kept[place, : len(examples.kept[row])] = examples.kept[row].to(valid.device)
    return kept


def _without_first(valid: Bool[Tensor, "n T"]) -> Bool[Tensor, "n T"]:
    """The same less position 0, where another one is left."""
    rest = valid.clone()
    rest[:, 0] = False
    return torch.where(rest.any(1, keepdim=True), rest, valid)


def _pooled(
    features: Float[Tensor, "n T d"], valid: Bool[Tensor, "n T"], over: Bool[Tensor, "n T"], pool: str
) -> Float[Tensor, "n d"]:
    upper = features if features.dtype == torch.float64 else features.float()
    if pool == "mean":
        return upper.masked_fill(~over[:, :, None], 0).sum(1) / over.sum(1, keepdim=True)
    if pool == "max":
        return upper.masked_fill(~over[:, :, None], -torch.inf).amax(1)
    place = valid.sum(1) - 1 if pool == "last" else torch.zeros(len(valid), dtype=torch.int64, device=valid.device)
    return upper[torch.arange(len(upper), device=upper.device), place]


def _check_finite(site: str, features: Tensor, valid: Tensor, rows: Sequence[int]) -> None:
    bad = ~torch.isfinite(features).all(2) & valid
    if not bool(bad.any()):
        return
    row, token = bad.nonzero()[0].tolist()
    raise NonFiniteError(
        f"NaN or infinity at {site} in {int(bad.sum())} tokens, first at example {rows[row]}, token {token}",
        "finite activations", "run the model in float32",
    )  # fmt: skip
