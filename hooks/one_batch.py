"""The reference and its probes in one batch: item 0 decides, all other items follow it.

Source: Navarrete Michelini, Liu, Lu, Jiang, "A Tour of Convolutional Networks Guided by Linear Interpreters", ICCV
2019. One pass of the network gives y and F v + r of every probe v, with nothing recorded beforehand. The last item is
an affine combination of all others: what it gives must be the same combination of what they give, or items were mixed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from interp.hooks import calls
from interp.hooks.errors import InterpError, MixedBatchError
from interp.hooks.linearization import Linearization
from interp.hooks.tape import PENDING, Call, Tags, Tape

_REMEDY = "replay() gives the same with each probe on its own; or scope a part that keeps the batch axis, with output="


# Of items that are mixed, the gap is of the order of the output itself; this leaves room for rounding.
_MIXED = 10


class _DecidesError(Exception):
    """Signal: the rule of a call on the whole batch is about to decide something."""


class Together(NamedTuple):
    """What one batch of the reference and its probes gives.

    Attributes:
        y: The network's output at the reference [1, ...].
        probes: F v + r of each probe [n, ...].
    """

    y: Float[Tensor, "1 ..."]
    probes: Float[Tensor, "n ..."]


class OneBatch(Tape):
    """Applies the decisions of a batch's first item to all of its items, call by call, and keeps none of them.

    A call whose rule decides nothing runs whole. Every other runs on the first item, which decides, then on the rest.

    Args:
        module: The network.
        linearization: What is held.
        weights: Of the affine combination that the last item is [size - 1].
        tolerance: Where given, every call's result is compared with the combination; the first that differs is noted.

    Attributes:
        suspect: The first call that was seen to mix items, or to lose the batch axis.
    """

    def __init__(
        self, module: nn.Module, linearization: Linearization, weights: Float[Tensor, "items"],
        tolerance: float | None = None,
    ):  # fmt: skip
        super().__init__(module, linearization)
        self.graphless = True
        self.weights, self.size, self.tolerance = weights, len(weights) + 1, tolerance
        self.suspect: str | None = None
        self._whole = False

    def _apply(self, rule: Callable[[Tape, Call], Any], call: Call) -> Any:
        # Asked first: a call in place may change its argument's shape or marks.
        in_front = all(self._in_front(t) for t in call.live)
        try:
            out = super()._apply(self._whole_or_halves(rule), call)
        except InterpError:
            raise
        except RuntimeError as error:  # torch's own, where the network expects a batch of one
            raise MixedBatchError(f"{call} fails on a batch of {self.size} ({error})", "any batch", _REMEDY) from error
        if self.suspect is None and in_front and not call.is_constant:
            live = [t for t in calls.tensors(call.args[0] if out is None else out) if calls.is_live(t)]
            if not all(map(self._in_front, live)) or any(map(self._mixes, live)):
                self.suspect = str(call)
        return out

    def _in_front(self, value: Tensor) -> bool:
        return value.shape[:1] == (self.size,)

    def _mixes(self, value: Tensor) -> bool:
        if self.tolerance is None or PENDING in Tags.of([value]) or not value.is_floating_point():
            return False
        gap = (combined(self.weights, value[:-1]) - value[-1]).abs().max()
        return bool(gap > self.tolerance * value.abs().max())

    def decide(self, call: Call, mode: str, compute: Callable[[], Any]) -> Any:
        """As for any tape where the call is on one half; on the whole batch nothing can be decided."""
        if self._whole:
            raise _DecidesError
        return super().decide(call, mode, compute)

    def _own_value(self, call: Call) -> None:
        return None  # the probes' results are not the network's

    def _whole_or_halves(self, rule: Callable[[Tape, Call], Any]) -> Callable[[Tape, Call], Any]:
        def apply(tape: Tape, call: Call) -> Any:
            self._whole = True
            try:
                return rule(self, call)
            except _DecidesError:
                call.held, call.is_constant = [], False
            finally:
                self._whole = False
            return self._by_halves(rule, call)

        return apply

    def _by_halves(self, rule: Callable[[Tape, Call], Any], call: Call) -> Any:
        """The rule, recorded on the first item and replayed with those very decisions on the rest."""
        first, rest, parts = self._halves(call)
        self.entries, self._next = [], 0
        one = rule(self, first)
        self.replaying = True
        try:
            many = rule(self, rest)
        finally:
            self.replaying = False
        call.is_constant = rest.is_constant
        call.held = [t for t in call.live if any(parts[id(t)] is h for h in rest.held)]
        if calls.in_place(call.func, call.kwargs):  # both halves are views of the tensor that was written to
            return Tags.put(_target(call), Tags.of(calls.tensors(many)))
        return self._joined(one, many, call)

    def _halves(self, call: Call) -> tuple[Call, Call, dict[int, Tensor]]:
        """The call on the first item, the call on the rest, and the rest's tensors by the whole one's id."""
        lost = [t for t in call.live if not self._in_front(t)]
        if lost:
            raise MixedBatchError(
                f"{call} on a batch of {self.size} gets a live value {list(lost[0].shape)}",
                f"[{self.size}, ...], one entry for each item", _REMEDY,
            )  # fmt: skip
        rank = max(t.ndim for t in call.live)

        def on(where: slice) -> tuple[Call, dict[int, Tensor]]:
            made: dict[int, Tensor] = {}

            def take(v):
                # A constant with the live value's axes has a batch axis too: a mask, a position's table.
                if not isinstance(v, Tensor) or not (calls.is_live(v) or (v.ndim == rank and self._in_front(v))):
                    return v
                if id(v) not in made:
                    part = Tags.put(v[where], Tags.of([v]))
                    made[id(v)] = calls.mark_live(part) if calls.is_live(v) else part
                return made[id(v)]

            args, kwargs = tree_map(take, call.args), tree_map(take, call.kwargs)
            return replace(call, args=args, kwargs=kwargs, held=[]), made

        (first, _), (rest, parts) = on(slice(0, 1)), on(slice(1, None))
        if calls.in_place(call.func, call.kwargs) and _target(first) is _target(call):
            raise MixedBatchError(f"{call} writes into a constant without a batch axis", "a live value", _REMEDY)
        return first, rest, parts

    def _joined(self, one: Any, many: Any, call: Call) -> Any:
        """The results of both halves as one batch; a constant is repeated for every item."""
        heads, (tails, spec) = tree_flatten(one)[0], tree_flatten(many)
        return tree_unflatten([self._join(a, b, call) for a, b in zip(heads, tails, strict=True)], spec)

    def _join(self, a: Any, b: Any, call: Call) -> Any:
        if not isinstance(a, Tensor) or a.ndim == 0:
            return b
        rest = self.size - 1
        if a.shape[0] != 1 or b.shape[0] not in (1, rest) or a.shape[1:] != b.shape[1:]:
            raise MixedBatchError(f"{call} gives {list(a.shape)} for one item", "an entry for each item", _REMEDY)
        return Tags.put(torch.cat([a, b.expand(rest, *b.shape[1:])]), Tags.of([b]))


def _target(call: Call) -> Any:
    return call.args[0] if call.args else call.kwargs["input"]


def combined(weights: Float[Tensor, "items"], values: Float[Tensor, "items ..."]) -> Float[Tensor, "..."]:
    """Return the combination Σ_i w_i v_i over the first axis."""
    return torch.tensordot(weights.to(values), values, dims=1)


def run_together(
    run: Callable[[Tape, dict[str, Tensor]], Tensor], module: nn.Module, linearization: Linearization,
    reference: dict[str, Tensor], blocks: dict[str, Tensor], y: Tensor, tolerance: float,
) -> Together:  # fmt: skip
    """Return y and F v + r from one pass over [reference; probes; a combination of them].

    Args:
        run: The network's output for values of its input blocks, under a tape.
        module: The network.
        linearization: What is held.
        reference: Value of each block [1, ...].
        blocks: Probes of each block [n, ...].
        y: The network's own output [1, ...], with which the first item must agree.
        tolerance: Relative difference above which items count as mixed.

    Raises:
        MixedBatchError: If the network mixes the items of a batch; the first call that does is named.
    """
    n = len(next(iter(blocks.values())))
    weights = torch.rand(n + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    weights = weights / weights.sum()
    batch = {name: torch.cat([value, blocks[name]]) for name, value in reference.items()}
    batch = {name: torch.cat([value, combined(weights, value)[None]]) for name, value in batch.items()}
    once = lambda tape: run(tape, calls.mark_live({name: value.clone() for name, value in batch.items()}))
    tape = OneBatch(module, linearization, weights)
    out = once(tape)
    if not tape._in_front(out):
        raise MixedBatchError(f"an output {list(out.shape)} for a batch of {tape.size}", "one for each item", _REMEDY)
    size = out.abs().max()
    moved, mixed = (out[:1] - y).abs().max(), (combined(weights, out[:-1]) - out[-1]).abs().max()
    if bool(moved <= tolerance * y.abs().max()) and bool(mixed <= tolerance * size):
        return Together(out[:1], out[1:-1])
    watched = OneBatch(module, linearization, weights, tolerance)
    once(watched)
    raise MixedBatchError(
        f"{watched.suspect or 'a call that could not be told'} mixes the items of a batch",
        "a network that treats each item on its own", _REMEDY,
    )  # fmt: skip


def in_chunks(
    run: Callable[[dict[str, Tensor], Tensor, float], Together], probes: dict[str, Tensor], y: Tensor,
    tolerance: float, most: int,
) -> Together:  # fmt: skip
    """Return what `run` gives for all probes, in batches of which none has more than so many items (but three)."""
    size, n = max(1, most - 2), len(next(iter(probes.values())))
    starts = range(0, max(n, 1), size)
    parts = [run({k: v[i : i + size] for k, v in probes.items()}, y, _MIXED * tolerance) for i in starts]
    return Together(parts[0].y, torch.cat([part.probes for part in parts]))
