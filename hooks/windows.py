"""Windows: a part of a map's outputs or inputs, as a mask or as a box of slices; and the map restricted to them."""

import math
from collections.abc import Callable
from types import EllipsisType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from interp.hooks.errors import ArgumentError

if TYPE_CHECKING:
    from interp.hooks.linear_map import LinearMap

Box = tuple[int | slice | EllipsisType, ...]
WindowLike = Tensor | Box | slice


class Window:
    """Some entries of tensors of one shape.

    Args:
        window: A mask of the shape (of booleans, or zeros and ones), a box as one would index a tensor of that shape
            (slices, integers, an ellipsis), or None for all.
        shape: Shape of the tensors, without leading probe axes.
        what: What the shape is of, for messages.

    Attributes:
        index: Flat indices of the entries [m].
        shape: Shape of what `take` gives, without leading axes: the box's, or [m] for a mask.

    Raises:
        ArgumentError: If the mask has another shape or other values, or the window is empty or does not fit.

    Example:
        >>> box = Window((slice(None), slice(1, 3)), (2, 4), "outputs")
        >>> box.shape, box.index.tolist()
        ((2, 2), [1, 2, 5, 6])
    """

    def __init__(self, window: WindowLike | None, shape: tuple[int, ...], what: str = "outputs"):
        self.full = tuple(shape)
        places = torch.arange(math.prod(shape)).reshape(self.full)
        if window is None:
            picked = places
        elif isinstance(window, Tensor):
            picked = places[self._mask(window, what)]
        else:
            picked = self._box(window, places, what)
        if not picked.numel():
            raise ArgumentError(f"a window without {what}", f"at least one entry of {list(self.full)}")
        self.index, self.shape = picked.flatten(), tuple(picked.shape)

    def _mask(self, window: Tensor, what: str) -> Tensor:
        if tuple(window.shape) != self.full:
            raise ArgumentError(
                f"a window of shape {list(window.shape)}", f"{list(self.full)}, the shape of the {what}"
            )
        mask = window.detach().cpu()
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ArgumentError("a window with values other than 0 and 1", "a mask", "weights are a direction: rmatvec")
        return mask.bool()

    def _box(self, window: Box | slice, places: Tensor, what: str) -> Tensor:
        box = window if isinstance(window, tuple) else (window,)
        try:
            return places[box]
        except (IndexError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"a window {box!r} ({error})", f"slices, integers or an ellipsis into {what} {list(self.full)}"
            ) from error

    @property
    def mask(self) -> Tensor:
        """The window as booleans of the full shape."""
        flat = torch.zeros(math.prod(self.full), dtype=torch.bool)
        flat[self.index] = True
        return flat.reshape(self.full)

    def take(self, values: Inexact[Tensor, "n ..."]) -> Inexact[Tensor, "n ..."]:
        """The entries in the window, [n, *self.shape]."""
        return values.reshape(len(values), -1)[:, self.index.to(values.device)].reshape(len(values), *self.shape)

    def embed(self, values: Inexact[Tensor, "n ..."]) -> Inexact[Tensor, "n ..."]:
        """Tensors of the full shape [n, *full] with these entries, zero elsewhere."""
        full = values.new_zeros(len(values), math.prod(self.full))
        full[:, self.index.to(values.device)] = values.reshape(len(values), -1)
        return full.reshape(len(values), *self.full)


def centre(values: Float[Tensor, "... classes"]) -> Float[Tensor, "... classes"]:
    """Subtract the mean over the last axis: the common shift of logits, which a softmax does not see."""
    return values - values.mean(-1, keepdim=True)


def restricted(
    operator: "LinearMap",
    window: WindowLike | None = None,
    input_window: WindowLike | None = None,
    centred: bool = False,
) -> "LinearMap":
    """Return W C F Vᵀ: F from the inputs in one window to the outputs in another, never formed.

    V and W pick the entries of the windows; C subtracts the mean over the last output axis, if ``centred``.

    Args:
        operator: F.
        window: Of outputs: a mask [*out_shape], or a box of slices; all by default.
        input_window: Of inputs: likewise.
        centred: Whether to remove the common shift of all classes (before the window is cut).

    Raises:
        ArgumentError: If a window does not fit, or outputs are no logits ([class] or [pos, token]).

    Example:
        >>> from interp.hooks.linear_map import LinearMap
        >>> A = torch.arange(6.0).reshape(2, 3)
        >>> F = LinearMap(lambda v: v @ A.T, lambda w: w @ A, (3,), (2,), A)
        >>> restricted(F, input_window=slice(1, 3)).dense().tolist()
        [[1.0, 2.0], [4.0, 5.0]]
    """
    from interp.hooks.linear_map import LinearMap

    if centred and len(operator.out_shape) > 2:
        raise ArgumentError(
            f"centred outputs {list(operator.out_shape)}", "classes [class] or tokens [pos, token] on the last axis"
        )
    out, into = Window(window, operator.out_shape), Window(input_window, operator.in_shape, "inputs")
    shift: Callable[[Tensor], Tensor] = centre if centred else lambda values: values
    return LinearMap(
        push=lambda v: out.take(shift(operator.matvec(into.embed(v)))),
        pull=lambda w: into.take(operator.rmatvec(shift(out.embed(w)))),
        in_shape=into.shape, out_shape=out.shape,
        like=torch.empty((), dtype=operator.dtype, device=operator.device), linearization=operator.linearization,
        chunk=operator._push.chunk, budget=operator.budget, push_bytes=operator._push.bytes_each,
        pull_bytes=operator._pull.bytes_each,
    )  # fmt: skip


def pool(values: Float[Tensor, "height width"], cell: int = 8) -> Float[Tensor, "rows columns"]:
    """Sum a map over square cells, in float64; cells at the right and lower edge may be smaller. The sum is kept.

    Raises:
        ArgumentError: If the cell is not positive.

    Example:
        >>> pool(torch.ones(3, 5), 2).tolist()
        [[4.0, 4.0, 2.0], [2.0, 2.0, 1.0]]
    """
    if cell < 1:
        raise ArgumentError(f"cell={cell}", "at least 1 pixel")
    height, width = values.shape
    padded = torch.nn.functional.pad(values.detach().double().cpu(), (0, -width % cell, 0, -height % cell))
    return padded.unflatten(1, (-1, cell)).unflatten(0, (-1, cell)).sum((1, 3))
