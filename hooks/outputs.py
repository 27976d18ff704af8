"""What a scope's output is: a site, or what a function picks from the module's result."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interp.hooks import guards
from interp.hooks.errors import ArgumentError
from interp.hooks.frozen import Select, untouched
from interp.hooks.inputs import Batch
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model, main_tensor
from interp.hooks.session import Read
from interp.hooks.site import Site, SiteLike


@torch.no_grad()
def output_of(
    model: Model, batch: Batch, output: SiteLike | Callable[[Any], Tensor] | None, held: Linearization
) -> tuple[Select, Tensor]:
    """Return how the output is picked, and its value in a plain run, which draws what the recording will draw.

    Raises:
        ArgumentError: If a pattern selects not exactly one site.
    """
    if not isinstance(output, (str, Site)):
        select = output or main_tensor
        if held.keeps_training:
            guards.refuse_compiled(model.module)
            with untouched(model.module):
                return select, select(model.module(*batch.args, **batch.kwargs))
        return select, select(model.forward(batch))
    found = model.resolve(output)
    if len(found) != 1:
        raise ArgumentError(f"output={str(output)!r} selects {len(found)} sites", "one")
    site, binding = found[0]
    return Read(site, binding, model.where(batch, binding, site.positions)), model.capture(batch, site)[site]
