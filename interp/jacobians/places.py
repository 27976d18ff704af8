"""Places: which part of the source and of the target each Jacobian of a batch is about."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.hooks.bindings import Binding
from interp.hooks.errors import ArgumentError, NoPathError, PositionError, SiteError
from interp.hooks.indices import flat_index
from interp.hooks.inputs import Batch
from interp.hooks.model import Model
from interp.hooks.site import Site, SiteLike


@dataclass(frozen=True)
class Place:
    """One Jacobian: an example, source positions and target positions, counted from the example's first token.

    Attributes:
        example: Index of the example.
        sources: Positions, or None where the site has none.
        targets: Likewise.
        single: Whether source, and whether target, are one position, whose axis is left out.
    """

    example: int
    sources: tuple[int, ...] | None
    targets: tuple[int, ...] | None
    single: tuple[bool, bool]


@dataclass(frozen=True)
class End:
    """One end of a Jacobian: a site, with the components of its value that are kept.

    Attributes:
        site: Without positions.
        binding: Where the site is in the model.
        indices: Flat indices into the value at one position (of the whole value, where there are no positions), or
            None for all.
    """

    site: Site
    binding: Binding
    indices: Tensor | None = None

    @property
    def has_positions(self) -> bool:
        """Whether the value has an axis of token positions behind the batch axis."""
        return self.binding.axes[:2] == ("batch", "pos")


def find_ends(model: Model, source: SiteLike, target: SiteLike, allow_zero: bool = False) -> tuple[End, End, Any, Any]:
    """Return source and target, and the positions that their sites name.

    Raises:
        SiteError: If one does not name exactly one site, or a site over pairs of positions.
        NoPathError: If the source comes after the target, and zeros are not allowed.
    """
    ends, positions = [], []
    for what, site in (("source", source), ("target", target)):
        found = model.resolve(site)
        if len(found) != 1:
            raise SiteError(f"{what}={str(site)!r} selects {len(found)} sites", "one", "row_sweep takes many sources")
        one, binding = found[0]
        if "key" in binding.axes:
            raise SiteError(f"{what} {one}, over pairs of positions", "a site with one position axis, or none")
        ends.append(End(Site(one.address, one.io, one.selector, one.head), binding))
        positions.append(one.positions)
    if not allow_zero and comes_after(*ends):
        raise NoPathError(
            f"source {ends[0].site} behind target {ends[1].site}",
            "a source that comes before the target",
            "the Jacobian is zero by structure; exchange the two, or allow_zero=True gives the zeros",
        )
    return ends[0], ends[1], positions[0], positions[1]


def comes_after(source: End, target: End) -> bool:
    """Whether a source is known to lie behind the target; of sites of free modules it is not known."""
    free = any(end.binding.where.startswith("raw") for end in (source, target))
    return not free and source.binding.order > target.binding.order


def check_indices(what: str, wanted: Any, shape: Sequence[int]) -> Tensor | None:
    """Return flat indices of components, from ints or tuples into a shape.

    Raises:
        ArgumentError: If there are none, or one is out of range.
    """
    if wanted is None:
        return None
    wanted = wanted.tolist() if isinstance(wanted, Tensor) else list(wanted)
    if not wanted:
        raise ArgumentError(f"{what} is empty", "at least one index, or None for all")
    if any(isinstance(i, bool) for i in wanted) or not all(isinstance(i, (int, tuple)) for i in wanted):
        raise ArgumentError(f"{what}={wanted!r:.60}", f"ints, or tuples of ints into {list(shape)}")
    flat = [flat_index(what, i, shape) for i in wanted]
    if len(set(flat)) < len(flat):
        warnings.warn(f"{what} names an index more than once", stacklevel=4)
    return torch.tensor(flat)


def find_places(
    model: Model, examples: list[Batch], ends: tuple[End, End], named: tuple[Any, Any], positions: Any
) -> list[Place]:
    """Return the places of all examples.

    Raises:
        PositionError: If a position lies outside an example, or a source behind a target that cannot see it.
        ArgumentError: If positions are given twice.
    """
    if positions is not None and named != (None, None):
        raise ArgumentError(
            f"positions={positions!r} beside sites with positions of their own", "one of the two",
            "leave positions= out, or write the sites without @",
        )  # fmt: skip
    tokens = ends[0].has_positions and ends[1].has_positions and examples[0].ids is not None
    if not tokens:
        if positions is not None or named != (None, None):
            raise PositionError(
                f"positions={positions if positions is not None else named!r} of {ends[0].site} and {ends[1].site}",
                "token inputs, and sites with a position axis",
            )
        return [Place(i, None, None, (False, False)) for i in range(len(examples))]
    causal = model.layout is not None and model.layout.modality == "tokens"
    places = []
    for index, batch in enumerate(examples):
        places += _of_example(index, batch, named, positions, causal, len(examples))
    return places


def _of_example(
    index: int, batch: Batch, named: tuple[Any, Any], positions: Any, causal: bool, examples: int
) -> list[Place]:
    every = tuple(range(batch.lengths[0]))
    at = lambda wanted: tuple((batch.positions(wanted)[0] - batch.starts[0]).tolist())
    if named != (None, None):
        pair = [every if p is None else at(list(p) if isinstance(p, tuple) else p) for p in named]
        if causal and min(pair[0]) > max(pair[1]):
            raise _unseen(min(pair[0]), max(pair[1]))
        single = tuple(p is not None and len(one) == 1 for p, one in zip(named, pair, strict=True))
        return [Place(index, pair[0], pair[1], (single[0], single[1]))]
    if positions is None:
        return [Place(index, every, every, (False, False))]
    if isinstance(positions, str) and positions == "same":
        return [Place(index, (t,), (t,), (True, True)) for t in every]
    pairs = _pairs(positions)
    if pairs is None:
        wanted = positions[index] if _is_nested(positions, examples) else positions
        return [Place(index, (t,), (t,), (True, True)) for t in at(wanted)]
    found = []
    for s, t in pairs:
        (s,), (t,) = at(s), at(t)
        if causal and s > t:
            raise _unseen(s, t)
        found.append(Place(index, (s,), (t,), (True, True)))
    return found


def _unseen(source: int, target: int) -> PositionError:
    return PositionError(
        f"source position {source} behind target position {target}",
        "a source that the target sees",
        "the Jacobian is zero by causality",
    )


def _pairs(positions: Any) -> list[tuple[int, int]] | None:
    """Pairs (source, target): one tuple, or a list of tuples; None for positions."""
    if isinstance(positions, tuple) and len(positions) == 2 and all(isinstance(p, int) for p in positions):
        return [positions]
    if isinstance(positions, list) and positions and all(isinstance(p, tuple) and len(p) == 2 for p in positions):
        return positions
    return None


def _is_nested(positions: Any, examples: int) -> bool:
    if not (isinstance(positions, list) and positions and all(isinstance(p, list) for p in positions)):
        return False
    if len(positions) != examples:
        raise PositionError(f"{len(positions)} lists of positions", f"one for each of {examples} examples")
    return True
