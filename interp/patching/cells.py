"""Cells of a grid: which places are patched together; and rows of one forward call, each patched elsewhere."""

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.interventions import Intervention
from interp.hooks.model import Model
from interp.patching.prompts import Pairs

SITES = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "z": "attn.hook_z", "q": "attn.hook_q", "k": "attn.hook_k",
    "v": "attn.hook_v", "pattern": "attn.hook_pattern", "mlp_post": "mlp.hook_post",
}  # fmt: skip
# Each axis of a grid, and the axes of a site that it runs along.
_ALONG = {"position": ("pos",), "head": ("head", "kv_head"), "neuron": ("d_mlp",)}
BY = ("layer", *_ALONG)


@dataclass(frozen=True)
class Cell:
    """Places that are patched together.

    Attributes:
        sites: Addresses.
        positions: Token indices of each pair, from 0; None for all.
        heads: Heads (key/value heads at key and value sites); None for all.
        neurons: Columns of an MLP's hidden layer; None for all.
    """

    sites: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...] | None = None
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None

    def mask(self, axes: Sequence[str], shape: Sequence[int], pair: int) -> Bool[Tensor, "..."]:
        """True at the cell's places of one example, broadcastable to the site's shape without its batch axis."""
        at = None if self.positions is None else self.positions[pair]
        chosen = {"pos": at, "head": self.heads, "kv_head": self.heads, "d_mlp": self.neurons}
        keep = torch.ones([1] * len(shape), dtype=torch.bool)
        for axis, name in enumerate(axes):
            if (index := chosen.get(name)) is not None:
                one = torch.zeros(shape[axis], dtype=torch.bool)
                one[list(index)] = True
                keep = keep & one.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        return keep


@dataclass(frozen=True, eq=False)
class RowPatch(Intervention):
    """Replace, in some rows of a batch, the places that each of them names.

    Attributes:
        rows: Rows of the batch.
        keep: Of each row, where; broadcastable to the site.
        values: Of each row, what is put there.
    """

    rows: Tensor
    keep: Tensor
    values: Tensor
    kind = "rows"

    def apply(self, value, context):
        """The value with those places replaced."""
        rows = self.rows.to(value.device)
        new = torch.where(self.keep.to(value.device), self.values.to(value), value[rows])
        return value.index_copy(0, rows, new)


@dataclass(frozen=True)
class Row:
    """One row of a forward call.

    Attributes:
        cell: What is patched.
        member: Its pair's place in the chunk, which is also its row in what was captured.
        pair: Its pair.
        source: Row of the captured values to take, where it is not the member's.
    """

    cell: Cell
    member: int
    pair: int
    source: int | None = None


def row_patches(
    rows: Sequence[Row], captured: Mapping[str, Tensor], axes: Mapping[str, tuple[str, ...]]
) -> list[Intervention]:
    """Return the plan that patches each row at its own cell with captured values: one step for each site."""
    by_site: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        for site in row.cell.sites:
            by_site.setdefault(site, []).append(index)
    plan: list[Intervention] = []
    for site, found in by_site.items():
        values = captured[site]
        keep = [rows[i].cell.mask(axes[site][1:], values.shape[1:], rows[i].pair) for i in found]
        taken = [rows[i].member if rows[i].source is None else rows[i].source for i in found]
        plan.append(RowPatch(site, torch.tensor(found), torch.stack(keep), values[taken]))
    return plan


# Axes of a grid ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """The axes of a grid in order, what stands along each, and the cells in the order of the flattened grid."""

    coordinates: dict[str, list[Any]]
    cells: list[Cell]
    tokens: list[str] | None = field(default=None)

    @property
    def shape(self) -> list[int]:
        """Length of each axis."""
        return [len(c) for c in self.coordinates.values()]

    @property
    def sites(self) -> list[str]:
        """All addresses, in order of first use."""
        return list(dict.fromkeys(site for cell in self.cells for site in cell.sites))


def read_axes(
    model: Model, pairs: Pairs, sites: Any, by: Sequence[str], layers: Any, positions: Any, heads: Any, neurons: Any
) -> Axes:
    """Return the cells that a user's choice of sites and axes stands for.

    Raises:
        ArgumentError: If an axis is unknown, named twice, or not an axis of a site.
        SiteError: If a site does not exist in this model.
        PositionError: If a position lies outside a prompt.
    """
    by = [by] if isinstance(by, str) else list(by)
    if len(set(by)) != len(by) or not set(by) <= set(BY):
        raise ArgumentError(f"by={by}", f"distinct names among {', '.join(BY)}")
    kinds = [sites] if isinstance(sites, str) else list(sites)
    if not kinds:
        raise ArgumentError("no sites", f"one or more of {', '.join(SITES)}")
    found = [_addresses(model, kind, layers) for kind in kinds]
    numbers = _same([[layer for layer, _ in one] for one in found], "layers", kinds)
    if numbers == [None] and ("layer" in by or layers is not None):
        raise ArgumentError(f"an axis or choice of layers at {kinds[0]}", "a site of a block")
    _check_along(model, [[address for _, address in one] for one in found], by, heads, neurons)
    spans, places, tokens = _places(pairs, positions, "position" in by)
    axis = {
        "layer": numbers,
        "position": places,
        "head": _choice(model, found, "head", heads, "head" in by),
        "neuron": _choice(model, found, "neuron", neurons, "neuron" in by),
    }
    coordinates = ({} if isinstance(sites, str) else {"site": kinds}) | {name: axis[name] for name in by}
    cells = []
    for key in itertools.product(*map(range, map(len, coordinates.values()))):
        at = dict(zip(coordinates, key, strict=True))
        rows = found[at.get("site", 0)]
        chosen = [rows[at["layer"]]] if "layer" in at else rows
        one = lambda name, at=at: (axis[name][at[name]],) if name in at else axis[name] and tuple(axis[name])
        where = spans[at["position"]] if "position" in at else (spans[0] if spans else None)
        cells.append(Cell(tuple(a for _, a in chosen), where, one("head"), one("neuron")))
    return Axes(coordinates, cells, tokens if "position" in by else None)


def _addresses(model: Model, kind: str, layers: Any) -> list[tuple[int | None, str]]:
    """(layer, address) of a site's name in each block; a site outside the blocks has layer None."""
    if not isinstance(kind, str):
        raise ArgumentError(f"a site {kind!r}", f"one of {', '.join(SITES)}, or an address")
    numbers = range(model.n_layers) if layers is None else ([layers] if isinstance(layers, int) else list(layers))
    for layer in numbers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < model.n_layers:
            raise ArgumentError(f"layer {layer!r}", f"layers 0-{model.n_layers - 1}")
    if kind in SITES or kind.startswith("blocks.*."):
        name = SITES.get(kind, kind.removeprefix("blocks.*."))
        named: list[tuple[int | None, str]] = [(layer, f"blocks.{layer}.{name}") for layer in numbers]
    elif kind in model.bindings.by_address:  # type: ignore[union-attr]
        named = [(None, kind)]
    else:
        near = difflib.get_close_matches(kind, SITES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ArgumentError(
            f"site {kind!r}", f"one of {', '.join(SITES)}, 'blocks.*.NAME', or an address", f"{hint}model.sites()"
        )
    if not named:
        raise ArgumentError(f"layers={layers!r}", "at least one layer")
    for _, address in named:
        model.resolve(address)
    return named


def _axis_of(model: Model, address: str, along: str) -> str | None:
    """The site's axis that an axis of the grid runs along."""
    return next((a for a in model.resolve(address)[0][1].axes if a in _ALONG[along]), None)


def _check_along(model: Model, found: list[list[str]], by: list[str], heads: Any, neurons: Any) -> None:
    wanted = [name for name in by if name != "layer"]
    wanted += [name for name, given in (("head", heads), ("neuron", neurons)) if given is not None]
    for address, name in itertools.product((one[0] for one in found), wanted):
        if _axis_of(model, address, name) is None:
            axes = " ".join(model.resolve(address)[0][1].axes)
            raise ArgumentError(f"a choice by {name} at {address}, whose axes are {axes}", f"a site with a {name} axis")


def _choice(model: Model, found: list, along: str, given: Any, listed: bool) -> list[Any] | None:
    """Heads or neurons that were chosen; all of them where they make an axis; None for all, patched together."""
    if given is None and not listed:
        return None
    sizes = []
    for address in (one[0][1] for one in found):
        axis = _axis_of(model, address, along)
        sizes.append(model.bindings.sizes[axis])  # type: ignore[union-attr, index]
    count = _same(sizes, f"{along}s", [one[0][1] for one in found])
    chosen = list(range(count)) if given is None else [given] if isinstance(given, int) else list(given)
    for index in chosen:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise ArgumentError(f"{along} {index!r} at {found[0][0][1]}", f"0-{count - 1}")
    if not chosen or len(set(chosen)) != len(chosen):
        raise ArgumentError(f"{along}s {chosen}", "at least one, none twice")
    return chosen


def _same(values: list, what: str, kinds: list[str]) -> Any:
    if any(v != values[0] for v in values[1:]):
        raise ArgumentError(
            f"sites {', '.join(kinds)} with different {what}", "sites of one shape", "one grid for each"
        )
    return values[0]


def _places(pairs: Pairs, given: Any, listed: bool) -> tuple[list[tuple[tuple[int, ...], ...]], list[Any], list[str]]:
    """Of each chosen position: the token indices of each pair, how it is called, and its token's text."""
    if given is None and not listed:
        return [], [], []
    if given is None:
        if len(set(pairs.lengths)) > 1:
            raise ArgumentError(
                f"a grid by position over prompts of {sorted(set(pairs.lengths))} tokens", "one length",
                "name positions=, for example ['last'] or {'subject': ...}",
            )  # fmt: skip
        given = list(range(pairs.lengths[0]))
    if isinstance(given, Mapping):
        names, wanted = list(given), list(given.values())
    else:
        wanted = [given] if isinstance(given, (int, str)) else list(given)
        names = [w if isinstance(w, (int, str)) else ",".join(map(str, w)) for w in wanted]
    if not wanted:
        raise ArgumentError("no positions", "at least one")
    spans = [_indices(pairs, one) for one in wanted]
    if not listed:
        together = tuple(tuple(i for span in spans for i in span[p]) for p in range(len(pairs)))
        return [together], ["together"], [""]
    named = [_name(name, span) for name, span in zip(names, spans, strict=True)]
    return spans, named, [_text(pairs, span) for span in spans]


def spans_of(pairs: Pairs, given: Any) -> tuple[tuple[int, ...], ...] | None:
    """Return the token indices of each pair for positions that are taken together, or None for all."""
    spans, _, _ = _places(pairs, given, listed=False)
    return spans[0] if spans else None


def _indices(pairs: Pairs, wanted: Any) -> tuple[tuple[int, ...], ...]:
    found = pairs.batch.positions(wanted)
    return tuple(tuple(i - start for i in row) for row, start in zip(found.tolist(), pairs.batch.starts, strict=True))


def _name(name: Any, span: tuple[tuple[int, ...], ...]) -> Any:
    """An int as the index from 0 that it has in every pair, where that is one."""
    return span[0][0] if isinstance(name, int) and len(set(span)) == 1 else name


def _text(pairs: Pairs, span: tuple[tuple[int, ...], ...]) -> str:
    """The clean token's text, with the corrupt one's where it differs; empty where pairs disagree."""
    tokenizer = pairs.model.tokenizer
    decode = (lambda ids: ",".join(map(str, ids))) if tokenizer is None else tokenizer.decode
    found = set()
    for index, at in enumerate(span):
        clean, corrupt = (decode([int(pairs.prompts[side][index][i]) for i in at]) for side in ("clean", "corrupt"))
        found.add(clean if clean == corrupt else f"{clean}/{corrupt}")
    return found.pop() if len(found) == 1 else ""
