"""The origin of the input space: what counts as nothing. Votes and bias shares depend on it, F and y do not."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from interp.hooks.errors import ArgumentError, InputError

if TYPE_CHECKING:
    from interp.hooks.model import Model

_GREYS = {"black": 0, "grey": 128}


def origin_of(model: "Model", x: Tensor, origin: Tensor | str | None, tokens: bool) -> tuple[Tensor, str]:
    """Return the origin o, shaped like x [1, ...], and its name.

    Args:
        model: Whose preprocessing makes ``black`` and ``grey``.
        x: The reference.
        origin: A tensor that broadcasts to x; None or ``zero``: the zero of the network's own input; ``mean``: the mean
            colour of this picture, or the mean embedding of these tokens; ``black`` or ``grey``: a picture of that
            colour, as the model's preprocessing gives it.
        tokens: Whether x are embeddings of tokens.

    Raises:
        ArgumentError: If the name is unknown, or not defined for this input.
        InputError: If a tensor does not broadcast.
    """
    if origin is None or (isinstance(origin, str) and origin == "zero"):
        return torch.zeros_like(x), "zero"
    if isinstance(origin, str):
        return _named(model, x, origin, tokens), origin
    try:
        value = torch.as_tensor(origin, dtype=x.dtype, device=x.device).expand_as(x)
    except RuntimeError:
        needed = f"a shape that broadcasts to {list(x.shape)}"
        raise InputError(f"origin of shape {list(origin.shape)}", needed) from None
    return value, f"a tensor of norm {float(value.norm()):.3g}"


def _named(model: "Model", x: Tensor, name: str, tokens: bool) -> Tensor:
    if name == "mean":
        if not tokens and x.ndim != 4:
            needed = "a picture [1, channel, height, width] or tokens"
            raise ArgumentError(f"origin='mean' of an input {list(x.shape)}", needed, "give the origin as a tensor")
        return x.mean(1 if tokens else (2, 3), keepdim=True).expand_as(x)
    if name not in _GREYS:
        raise ArgumentError(f"origin={name!r}", "'zero', 'mean', 'black', 'grey' or a tensor")
    if model.preprocess is None or x.ndim != 4 or x.shape[1] != 3:
        raise ArgumentError(f"origin={name!r}", "a picture in colours, and a model that comes with its preprocessing")
    made = model.batch(model.preprocess(np.full((*x.shape[2:], 3), _GREYS[name], dtype=np.uint8))).args[0]
    colour = made.mean((2, 3), keepdim=True)
    if not (made - colour).abs().max() <= 1e-3 * max(1.0, float(colour.abs().max())):
        needed = "one that maps one colour to one colour"
        raise ArgumentError(f"origin={name!r} under this preprocessing", needed, "give the origin as a tensor")
    return colour.expand_as(x)
