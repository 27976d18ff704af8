"""One input of several examples, as inputs of one example each, without padding."""

from typing import Any

import torch
from torch import Tensor

from interp.hooks.errors import InputError
from interp.hooks.inputs import Batch
from interp.hooks.model import Model


def each_example(model: Model, inputs: Any) -> list[Batch]:
    """Return a batch of one for each example of the inputs: texts, rows of token ids, images of one tensor.

    Padding is left out, so that an example does not depend on its mates.

    Raises:
        InputError: If it is not plain which part of the inputs belongs to which example.
    """
    batch = model.batch(inputs)
    if batch.size == 1 and (batch.mask is None or batch.mask.all()):
        return [batch]
    if batch.texts is not None:
        return [model.batch(text) for text in batch.texts]
    if batch.ids is not None:
        return [model.batch(_tokens(batch, i)) for i in range(batch.size)]
    given = [*batch.args, *batch.kwargs.values()]
    if sum(isinstance(v, Tensor) for v in given) != 1:
        raise InputError(
            f"{batch.size} examples in {len(given)} arguments", "one tensor [batch, ...]", "make one scope for each"
        )
    cut = lambda v, i: v[i : i + 1] if isinstance(v, Tensor) else v
    return [
        Batch(tuple(cut(a, i) for a in batch.args), {k: cut(v, i) for k, v in batch.kwargs.items()}, 1)
        for i in range(batch.size)
    ]


def _tokens(batch: Batch, i: int) -> Any:
    """Example i of a batch of tokens: its ids, or an encoding where the forward call takes keywords."""
    assert batch.ids is not None
    assert batch.mask is not None
    real = batch.mask[i]
    ids = batch.ids[i][real][None]
    if batch.args:
        return ids
    found = {"input_ids": ids}
    for name, value in batch.kwargs.items():
        if name in found or name == "attention_mask":
            continue
        if isinstance(value, Tensor):
            if value.shape != batch.ids.shape:
                raise InputError(f"{name} {list(value.shape)}", f"{list(batch.ids.shape)}, one value for each token")
            value = value[i][real][None]
            if name == "position_ids" and torch.equal(value[0].cpu(), torch.arange(ids.shape[1])):
                continue  # what padding on the left made necessary
        found[name] = value
    return found
