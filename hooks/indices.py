"""Components of a tensor by number: an int into its flattened values, or a tuple into its shape."""

import math
from collections.abc import Sequence
from typing import Any

from interp.hooks.errors import ArgumentError


def flat_index(what: str, index: Any, shape: Sequence[int]) -> int:
    """Return an index into the flattened values; negative ones count from the end.

    Args:
        what: For messages, what the index is of: ``row``, ``column``.
        index: An int, or a tuple with one int for each axis.
        shape: Of the values.

    Raises:
        ArgumentError: If it is out of range, of another length, or no int.

    Example:
        >>> flat_index("row", (1, -1), [2, 3]), flat_index("row", -1, [2, 3])
        (5, 5)
    """
    many, size = isinstance(index, (tuple, list)), math.prod(shape)
    parts, axes = (tuple(index), tuple(shape)) if many else ((index,), (size,))
    whole = all(hasattr(i, "__index__") and not isinstance(i, bool) for i in parts)
    if not whole or len(parts) != len(axes) or any(not -n <= i < n for i, n in zip(parts, axes, strict=True)):
        needed = f"an index into {list(shape)}" if many else f"an index below {size}, or a tuple into {list(shape)}"
        raise ArgumentError(f"{what} {index}", needed)
    flat = 0
    for i, n in zip(parts, axes, strict=True):
        flat = flat * n + int(i) % n
    return flat
