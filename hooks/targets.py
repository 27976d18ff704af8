"""What a target of votes names: a direction over a network's outputs, and what it is called.

A target is a token, class, index or direction; a list of them means their mean; a tuple with slices or an ellipsis is a
box of outputs and means their mean.
"""

import operator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.inputs import Batch
from interp.hooks.model import Model
from interp.hooks.text import token_id
from interp.hooks.windows import Window, centre


class Targets:
    """Tokens, classes, indices and directions over the output of one run.

    Args:
        model: An attached model.
        batch: One example.
        output: The network's output, with its batch axis.
    """

    def __init__(self, model: Model, batch: Batch, output: Tensor):
        self.model, self.batch = model, batch
        self.shape, self.dtype, self.device = output.shape[1:], output.dtype, output.device

    def pair(
        self, target: Any, margin_to: Any, position: int, centred: bool = False
    ) -> tuple[Float[Tensor, "..."], str]:
        """Return the direction of a target, or of a target minus another, with its name.

        Raises:
            ArgumentError: If a target does not exist, or a margin is to be centred.
        """
        w, name = self.direction(target, position), self.name(target)
        if centred:
            if margin_to is not None or len(self.shape) > 2:
                given = "centred=True with margin_to" if len(self.shape) <= 2 else f"centred outputs {list(self.shape)}"
                needed = "one target among classes [class] or tokens [pos, token]"
                raise ArgumentError(given, needed, "a margin is free of the common shift already")
            return centre(w), f"{name} - mean"
        if margin_to is None:
            return w, name
        return w - self.direction(margin_to, position), f"{name} - {self.name(margin_to)}"

    def direction(self, target: Any, position: int = -1) -> Float[Tensor, "..."]:
        """Return the vector over outputs (without batch axis) that a target names: one, or shares that sum to one.

        Raises:
            ArgumentError: If the target does not exist.
        """
        if isinstance(target, Tensor) and target.ndim:
            if target.shape != self.shape:
                raise ArgumentError(f"a direction {list(target.shape)}", f"{list(self.shape)}")
            return target.to(self.device, self.dtype)
        if isinstance(target, list):
            if not target:
                raise ArgumentError("an empty list of targets", "at least one")
            return torch.stack([self.direction(t, position) for t in target]).mean(0)
        if _is_box(target):
            mask = Window(target, tuple(self.shape)).mask.to(self.device, self.dtype)
            return mask / mask.sum()
        index = target if isinstance(target, tuple) else self._index(target, position)
        w = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        if len(index) != len(self.shape) or any(not -n <= i < n for i, n in zip(index, self.shape, strict=True)):
            raise ArgumentError(f"target {target!r}", f"an index into outputs {list(self.shape)}")
        w[index] = 1.0
        return w

    def name(self, target: Any) -> str:
        """Return what a target is called: a token's or class's text where it has one."""
        if isinstance(target, Tensor) and target.ndim:
            return "a direction"
        if isinstance(target, list):
            return f"mean({', '.join(self.name(t) for t in target)})" if len(target) > 1 else self.name(target[0])
        if _is_box(target):
            return f"mean[{', '.join(map(_slice_text, target))}]"
        if not isinstance(target, (str, tuple)) and self._over_tokens and self.model.tokenizer is not None:
            return repr(self.model.tokenizer.decode([operator.index(target)]))
        if isinstance(target, int) and self.model.labels and self.batch.ids is None:
            return self.model.labels[target]
        return str(target) if self.batch.ids is None else repr(target)

    def _index(self, target: Any, position: int) -> tuple[int, ...]:
        ids = self.batch.ids
        if ids is not None and len(self.shape) == 2:
            where = int(self.batch.positions(position)[0, 0]) if self.shape[0] == ids.shape[1] else position
            return (where, token_id(self.model, target) if self._over_tokens else operator.index(target))
        if isinstance(target, str):
            labels = self.model.labels or []
            if labels.count(target) != 1:
                raise ArgumentError(
                    f"class {target!r}",
                    "a label of this model",
                    f"labels are {', '.join(labels[:5])}, ..." if labels else "it has no labels: give an index",
                )
            return (labels.index(target),)
        return (int(target),)

    @property
    def _over_tokens(self) -> bool:
        """Whether the output's last axis is the vocabulary."""
        return self.batch.ids is not None and self.shape[-1] == self.model.reader.vocab


def _is_box(target: Any) -> bool:
    return isinstance(target, tuple) and any(isinstance(part, slice) or part is Ellipsis for part in target)


def _slice_text(part: Any) -> str:
    if part is Ellipsis:
        return "..."
    if not isinstance(part, slice):
        return str(part)
    ends = ("" if end is None else str(end) for end in (part.start, part.stop))
    return ":".join(ends) + ("" if part.step is None else f":{part.step}")
