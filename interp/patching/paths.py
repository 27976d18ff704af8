"""Path patching: a component's output changed for some of its readers only, everything else held.

Source: Wang et al., "Interpretability in the Wild", ICLR 2023 (arXiv 2211.00593), appendix B; Goldowsky-Dill et al.,
"Localizing Model Behavior with Path Patching", 2023 (arXiv 2304.05969).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.errors import ArgumentError
from interp.hooks.interventions import Intervention, Set
from interp.hooks.model import Model
from interp.patching.cells import Cell, Row, row_patches, spans_of
from interp.patching.grid import PatchGrid
from interp.patching.prompts import Chunk, Direction, Metric, Pairs, Side, sides

Freeze = Literal["all", "heads"]
_SENDER = re.compile(r"L(\d+)(?:H(\d+)|MLP)|embed")
_RECEIVER = re.compile(r"L(\d+)(?:(H|KV)(\d+)(?:\.(q|k|v))?|MLP)")
_FORM = "'logits', or 'L10H7.q', 'L10H7.k', 'L10H7.v', 'L10H7' (all three), 'L10KV2.k', 'L10MLP'"


@dataclass(frozen=True)
class Sender:
    """A component whose output is changed: a head, an MLP, or the embedding (layer -1)."""

    name: str
    layer: int
    head: int | None

    @property
    def site(self) -> str:
        """Where its output lies: heads at z, so that a norm behind the branch is computed afresh."""
        if self.layer < 0:
            return "hook_embed"
        return f"blocks.{self.layer}.{'hook_mlp_out' if self.head is None else 'attn.hook_z'}"

    def feeds(self, layer: int, mlp: bool, parallel: bool) -> bool:
        """Whether a component of a layer reads it."""
        return self.layer < layer or (self.layer == layer and self.head is not None and mlp and not parallel)


@dataclass(frozen=True)
class Receiver:
    """What reads the change: queries, keys or values of a head, or an MLP's input.

    An MLP's input is carried by what the MLP makes of it.
    """

    name: str
    layer: int
    part: str
    head: int | None

    @property
    def site(self) -> str:
        """The site that is read while only the sender has changed, and patched afterwards."""
        return f"blocks.{self.layer}.{'mlp.hook_out' if self.part == 'mlp' else f'attn.hook_{self.part}'}"


@dataclass(frozen=True)
class Held:
    """What is held beside the path.

    Attributes:
        freeze: ``all``: heads and MLPs between sender and receivers; ``heads``: MLPs are computed afresh.
        qk: Attention patterns behind the receivers.
        norms: Divisors of all norms.
    """

    freeze: Freeze
    qk: bool
    norms: bool


@torch.no_grad()
def path_patch(
    model: Model, metric: Metric, clean: Any, corrupt: Any, senders: str | Sequence[str] = "heads",
    receivers: str | Sequence[str] = "logits", *, freeze: Freeze = "all", freeze_qk: bool = False,
    freeze_norms: bool = False, direction: Direction = "noise", position: int | None = -1, positions: Any = None,
    receiver_positions: Any = None, batch_size: int | None = None,
) -> PatchGrid:  # fmt: skip
    """Return the metric when a sender's output is changed for its receivers only, exactly, for each sender.

    In a run of the base prompt the sender's output is replaced by that of the other prompt, every other head (and with
    ``freeze="all"`` every MLP) is held at its value, and what the receivers read is kept. In a second run of the base
    prompt the receivers alone are given that, and all behind them is computed afresh. With ``receivers="logits"`` and
    ``freeze="all"`` the first run is the whole: x_final - sender_base + sender_source through the final norm, computed
    afresh.

    Args:
        model: A decoder.
        metric: As for `patch_grid`.
        clean: As for `patch_grid`.
        corrupt: As for `patch_grid`.
        senders: ``heads``: every head that can reach a receiver, a grid of layer and head; or names of single ones,
            each a cell: ``L9H6``, ``L6MLP``, ``embed``.
        receivers: ``logits``, or inputs of heads and MLPs, all changed together: ``L10H7.q``, ``L10H7.k``, ``L10H7.v``,
            ``L10H7`` (all three), ``L10MLP``. Where query heads share keys and values, these are named by their
            key/value head: ``L10KV2.k``.
        freeze: What is held between sender and receivers: ``all``, or ``heads`` (as in the paper).
        freeze_qk: Hold all attention patterns behind the receivers.
        freeze_norms: Hold all norms' divisors; the effect on the logits is then linear in the sender.
        direction: ``noise``: corrupt values into the clean run; ``denoise``: clean values into the corrupt run.
        position: As for `patch_grid`.
        positions: Where the sender is changed, as for `patch_grid`, all together; everywhere by default.
        receiver_positions: Where the receivers are changed; everywhere by default.
        batch_size: As for `patch_grid`.

    Raises:
        ArgumentError: If prompts do not match, a name is not legal, or a sender cannot reach a receiver.
        SiteError: If the model has no such site.
        PositionError: If a position lies outside a prompt.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> text = "When {} and {} went to the store, {} gave a drink to"
        >>> clean, corrupt = text.format("Mary", "John", "John"), text.format("Mary", "John", "Mary")
        >>> mary = interp.Observable.logit_diff(model, " Mary", " John")
        >>> interp.path_patch(model, mary, clean, corrupt, ["L17H0", "L20MLP"]).values.shape
        torch.Size([2])
    """
    pairs = Pairs(model, clean, corrupt, metric, position)
    sides(direction)
    if freeze not in ("all", "heads"):
        raise ArgumentError(f"freeze={freeze!r}", "'all' or 'heads'")
    readers = read_receivers(model, receivers)
    found = _senders(model, senders, readers)
    if freeze_qk and (looked := next((r.name for r in readers or () if r.part in "qk"), None)):
        raise ArgumentError(f"freeze_qk=True with receiver {looked}", "receivers other than queries and keys")
    held, size = Held(freeze, freeze_qk, freeze_norms), pairs.rows(batch_size)
    patcher = _Patcher(pairs, direction, held, readers, spans_of(pairs, positions), spans_of(pairs, receiver_positions))
    runs, ends = patcher.measure(found, size)
    axes: dict[str, list[Any]] = {"sender": [s.name for s in found]}
    if senders == "heads":
        assert model.layout is not None
        axes = {"layer": list(dict.fromkeys(s.layer for s in found)), "head": list(range(model.layout.n_heads))}
    named = [r.name for r in readers] if readers else ["logits"]
    return PatchGrid(
        pairs.measure.name, "path patching", direction, axes, None,
        runs.reshape(len(pairs), *map(len, axes.values())), ends["clean"], ends["corrupt"],
        note=f"to {', '.join(named)}; {freeze} held between",
    )  # fmt: skip


def edge_values(
    pairs: Pairs, edges: Sequence[tuple[str, str]], direction: Direction, size: int
) -> Float[Tensor, "edge"]:
    """Return the metric with one edge patched exactly, for each (sender, receiver), mean over pairs."""
    held, found = Held("all", False, False), []
    for sender, receiver in edges:
        readers = read_receivers(pairs.model, receiver)
        patcher = _Patcher(pairs, direction, held, readers, None, None)
        found.append(patcher.measure(_senders(pairs.model, [sender], readers), size)[0].mean())
    return torch.stack(found)


# Names ---------------------------------------------------------------------------------------------------------------


def _senders(model: Model, names: str | Sequence[str], readers: list[Receiver] | None) -> list[Sender]:
    """The senders, each of which must reach a receiver."""
    assert model.layout is not None
    parallel, heads = model.layout.parallel, model.layout.n_heads
    reaches = lambda s: readers is None or any(s.feeds(r.layer, r.part == "mlp", parallel) for r in readers)
    if names == "heads":
        every = [Sender(f"L{i}H{h}", i, h) for i in range(model.n_layers) for h in range(heads)]
        if not (found := [s for s in every if reaches(s)]):
            raise ArgumentError("receivers of the first layer", "receivers that heads can reach")
        return found
    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise ArgumentError("no senders", "at least one")
    found = [_sender(model, name) for name in wanted]
    for sender in found:
        if not reaches(sender):
            to = ", ".join(r.name for r in readers or ())
            raise ArgumentError(
                f"path goes backwards: {sender.name} cannot feed {to}", "a sender in front of a receiver"
            )
    return found


def _sender(model: Model, name: str) -> Sender:
    match = _SENDER.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ArgumentError(f"sender {name!r}", "'heads', or 'L9H6', 'L6MLP', 'embed'")
    if match[1] is None:
        return Sender(name, -1, None)
    _check_layer(model, name, int(match[1]))
    if match[2] is not None:
        _check_head(model, name, int(match[2]), "query")
    return Sender(name, int(match[1]), None if match[2] is None else int(match[2]))


def read_receivers(model: Model, names: str | Sequence[str]) -> list[Receiver] | None:
    """Return the receivers, or None for the logits.

    Raises:
        ArgumentError: If a name is not legal, or names one of several query heads that share what is asked for.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    if wanted == ["logits"]:
        return None
    if not wanted or len(set(wanted)) != len(wanted) or "logits" in wanted:
        raise ArgumentError(f"receivers {wanted}", "distinct ones, at least one; the logits by themselves")
    found = [r for name in wanted for r in _receiver(model, name)]
    for one in found:
        model.resolve(one.site)
    return found


def _receiver(model: Model, name: str) -> list[Receiver]:
    match = _RECEIVER.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ArgumentError(f"receiver {name!r}", _FORM)
    layer, kind, part = int(match[1]), match[2], match[4]
    _check_layer(model, name, layer)
    if kind is None:
        return [Receiver(name, layer, "mlp", None)]
    head, layout = int(match[3]), model.layout
    assert layout is not None
    _check_head(model, name, head, "key/value" if kind == "KV" else "query")
    if kind == "KV" and part not in ("k", "v"):
        raise ArgumentError(f"receiver {name!r}", f"'L{layer}KV{head}.k' or 'L{layer}KV{head}.v'")
    if kind == "H" and part != "q" and layout.n_heads != layout.n_kv_heads:
        ratio = layout.n_heads // layout.n_kv_heads
        group = head // ratio
        raise ArgumentError(
            f"receiver {name!r}: query heads {group * ratio}-{group * ratio + ratio - 1} read key/value head {group}",
            f"'L{layer}H{head}.q', 'L{layer}KV{group}.k' or 'L{layer}KV{group}.v'",
        )
    return [Receiver(name, layer, p, head) for p in ((part,) if part else ("q", "k", "v"))]


def _check_layer(model: Model, name: str, layer: int) -> None:
    if layer >= model.n_layers:
        raise ArgumentError(f"layer {layer} of {name}", f"layers 0-{model.n_layers - 1}")


def _check_head(model: Model, name: str, head: int, kind: str) -> None:
    layout = model.layout
    assert layout is not None
    if head >= (layout.n_heads if kind == "query" else layout.n_kv_heads):
        raise ArgumentError(
            f"head {head} of {name} out of range",
            f"{layout.n_heads} query heads (0-{layout.n_heads - 1}), {layout.n_kv_heads} key/value heads",
        )


# Runs ----------------------------------------------------------------------------------------------------------------


class _Patcher:
    """Runs senders as rows: once with everything between held, once more with the receivers changed."""

    def __init__(self, pairs: Pairs, direction: Direction, held: Held, readers: Any, sent: Any, received: Any):
        self.pairs, self.model, self.held, self.readers = pairs, pairs.model, held, readers
        self.base: Side
        self.source: Side
        self.base, self.source = sides(direction)
        self.sent, self.received = sent, received

    def measure(
        self, senders: list[Sender], size: int
    ) -> tuple[Float[Tensor, "pair sender"], dict[Side, Float[Tensor, "pair"]]]:
        """The metric of each pair for each sender, and of the runs as they are."""
        pairs = self.pairs
        runs = torch.empty(len(pairs), len(senders), dtype=pairs.dtype)
        ends: dict[Side, Tensor] = {s: torch.empty(len(pairs), dtype=pairs.dtype) for s in ("clean", "corrupt")}
        cells = [Cell((s.site,), self.sent, None if s.head is None else (s.head,)) for s in senders]
        for chunk in pairs.chunks(size):
            kept = chunk.run(self.base, self._held_sites(senders))
            captured = chunk.run(self.source, list(dict.fromkeys(s.site for s in senders)))
            wanted = [(c, m) for c in range(len(senders)) for m in range(len(chunk.pairs))]
            for start in range(0, len(wanted), size):
                part = wanted[start : start + size]
                rows = [Row(cells[c], m, chunk.pairs[m]) for c, m in part]
                first = min(senders[c].layer for c, _ in part)
                measured = self._rows(chunk, rows, first, kept, captured)
                runs[[r.pair for r in rows], [c for c, _ in part]] = measured.cpu()
            for side, values in chunk.measured.items():
                ends[side][chunk.pairs] = values.cpu()
        return runs, ends

    def _rows(
        self, chunk: Chunk, rows: list[Row], first: int, kept: Activations, captured: Activations
    ) -> Float[Tensor, "row"]:
        members = [r.member for r in rows]
        plan = [*self._hold(self._between(first), kept, members), *row_patches(rows, captured, captured.axes)]
        if self.readers is None:
            return chunk.patched(self.base, members, plan)
        sites = list(dict.fromkeys(r.site for r in self.readers))
        seen = self.model.capture(chunk.ids(self.base, members), sites, plan=plan)
        plan = self._hold(self._behind(), kept, members)
        for reader in self.readers:
            cell = Cell((reader.site,), self.received, None if reader.head is None else (reader.head,))
            plan += row_patches([Row(cell, r.member, r.pair, i) for i, r in enumerate(rows)], seen, seen.axes)
        return chunk.patched(self.base, members, plan)

    def _held_sites(self, senders: list[Sender]) -> list[str]:
        return list(dict.fromkeys([*self._between(min(s.layer for s in senders)), *self._behind()]))

    def _between(self, first: int) -> list[str]:
        """What is held while receivers read: branches from the sender's layer to the last receiver's, and divisors."""
        last = self.model.n_layers - 1 if self.readers is None else max(r.layer for r in self.readers)
        parts = ("attn.hook_z", "hook_mlp_out") if self.held.freeze == "all" else ("attn.hook_z",)
        found = [f"blocks.{i}.{part}" for i in range(max(first, 0), last + 1) for part in parts]
        return [*found, *self._norms(None if self.readers is None else last)]

    def _behind(self) -> list[str]:
        """What is held while the rest of the network answers to the receivers."""
        if self.readers is None:
            return []
        patterns = [f"blocks.{i}.attn.hook_pattern" for i in range(self.model.n_layers)] if self.held.qk else []
        return [*patterns, *self._norms(None)]

    def _norms(self, last: int | None) -> list[str]:
        """Divisors of all norms, or of those in blocks up to the last."""
        if not self.held.norms:
            return []
        names = list(self.model.bindings.norms)  # type: ignore[union-attr]
        block = lambda name: int(found[1]) if (found := re.match(r"blocks\.(\d+)\.", name)) else 0
        inside = lambda name: last is None or (name != "ln_final" and block(name) <= last)
        return [f"{name}.hook_scale" for name in names if inside(name)]

    def _hold(self, sites: list[str], kept: Activations, members: list[int]) -> list[Intervention]:
        return [Set(site, value=kept[site][members]) for site in sites]
