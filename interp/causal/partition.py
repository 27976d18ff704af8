"""Partition: which coordinates of an alignment map carry which variable."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.hooks.errors import ShapeMismatchError, UnmatchedVariableError


class Partition:
    """Disjoint blocks of coordinates, one for each variable; coordinates in no block are the remainder.

    Args:
        blocks: For each variable a size, or a list of coordinates. Sizes take the first coordinates that no list
            names, in the order of the variables.

    Raises:
        ShapeMismatchError: If a block is empty, or a coordinate is named twice.

    Example:
        >>> Partition({"v1": 2, "v2": [7]}).indices(8)
        {'v1': [0, 1], 'v2': [7]}
    """

    def __init__(self, blocks: Mapping[str, int | Sequence[int]]):
        self.blocks: dict[str, int | tuple[int, ...]] = {}
        for variable, block in blocks.items():
            self.blocks[variable] = block if isinstance(block, int) else tuple(int(i) for i in block)
        listed = [i for b in self.blocks.values() if not isinstance(b, int) for i in b]
        if any(isinstance(b, bool) or (b if isinstance(b, int) else len(b)) < 1 for b in self.blocks.values()):
            raise ShapeMismatchError(f"blocks {self.blocks}", "at least one coordinate for each variable")
        if len(set(listed)) < len(listed) or min(listed, default=0) < 0:
            raise ShapeMismatchError(f"blocks {self.blocks}", "disjoint blocks of coordinates from 0 on")

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables that have a block."""
        return tuple(self.blocks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each variable."""
        return tuple(b if isinstance(b, int) else len(b) for b in self.blocks.values())

    def indices(self, width: int) -> dict[str, list[int]]:
        """Return the coordinates of each variable among ``width``.

        Raises:
            ShapeMismatchError: If they do not fit.
        """
        listed = {i for b in self.blocks.values() if not isinstance(b, int) for i in b}
        free = [i for i in range(width) if i not in listed]
        if sum(self.sizes) > width or max(listed, default=0) >= width:
            raise ShapeMismatchError(f"blocks {self.blocks}", f"at most {width} coordinates, 0..{width - 1}")
        found = {}
        for variable, block in self.blocks.items():
            found[variable] = free[:block] if isinstance(block, int) else list(block)
            free = free[block:] if isinstance(block, int) else free
        return found

    def mask(self, variables: Sequence[str], width: int) -> Bool[Tensor, "variable width"]:
        """Return which coordinates belong to which of the variables.

        Raises:
            UnmatchedVariableError: If a variable has no block.
        """
        if missing := [v for v in variables if v not in self.blocks]:
            raise UnmatchedVariableError(
                f"{', '.join(missing)} without a block", "a block for each variable", f"{self}"
            )
        found, mask = self.indices(width), torch.zeros(len(variables), width, dtype=torch.bool)
        for row, variable in enumerate(variables):
            mask[row, found[variable]] = True
        return mask

    def permuted(self, width: int) -> "Partition":
        """Each variable with the block of the next one: a control that only symmetric tasks pass."""
        names, blocks = list(self.blocks), list(self.indices(width).values())
        return Partition(dict(zip(names, blocks[1:] + blocks[:1], strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which the partition can be made again."""
        return {v: b if isinstance(b, int) else list(b) for v, b in self.blocks.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and self.blocks == other.blocks

    def __hash__(self) -> int:
        return hash(tuple(self.blocks.items()))

    def __repr__(self) -> str:
        return f"Partition({self.to_dict()})"
