"""Contrasts: what each component adds in one prompt more than in another."""

from typing import Any

import torch

from interp.attribution.direct import Attribution, attributions, one_prompt, read_observables
from interp.attribution.streams import readers_of
from interp.attribution.units import Detail, check_complete, subtract
from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.observables.observable import Observable


@torch.no_grad()
def contrast_attribution(
    model: Model, observables: Any, clean: Any, corrupt: Any, unit: str = "head", *,
    readers: str = "clean", position: int = -1,
) -> Attribution | list[Attribution]:  # fmt: skip
    """Return what each component adds in a clean prompt more than in a corrupt one.

    With ``readers="clean"`` both runs are read by the clean run's u, and differences sum to u · (x_clean - x_corrupt):
    the change of the stream, without that of the final norm's divisor. With ``"own"`` each run has its own u, and
    differences sum to the difference of the two measurements. Post-norms of branches hold each run's own divisor.

    Args:
        model: A decoder with a final norm and an unembedding.
        observables: As for `direct_attribution`.
        clean: One prompt.
        corrupt: Another; of as many tokens where sources are compared.
        unit: As for `direct_attribution`.
        readers: ``clean`` or ``own``.
        position: Whose next-token logits, in either prompt.

    Raises:
        ArgumentError: If ``readers`` or the unit does not exist, or sources are asked for and lengths differ.
        CompletenessError: If the differences do not sum.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> obs = interp.Observable.logit_diff(model, " Mary", " John")
        >>> clean = "When Mary and John went out, John gave a drink to"
        >>> corrupt = "When Mary and John went out, Mary gave a drink to"
        >>> found = interp.contrast_attribution(model, obs, clean, corrupt, readers="own")
        >>> found.top(1).columns
        ['component', 'value']
    """
    if readers not in ("clean", "own"):
        raise ArgumentError(f"readers={readers!r}", "'clean' (one for both) or 'own'")
    wanted = read_observables(observables)
    made = readers_of(model, wanted, Detail.of(unit))
    detail, batches = made.detail, [one_prompt(model, clean), one_prompt(model, corrupt)]
    lengths = [batch.lengths[0] for batch in batches]
    if detail.attention == "source" and lengths[0] != lengths[1]:
        raise ArgumentError(
            f"clean has {lengths[0]} tokens, corrupt {lengths[1]}",
            "prompts of one length for sources",
            "unit='head' compares prompts of any length",
        )
    place = made.place(position)
    seen = [made.capture(batch, place) for batch in batches]
    r = made.divisor(seen[0]) if readers == "clean" else None
    parts = subtract(made.parts(seen[0]), made.parts(seen[1], r), readers)
    check_complete(model, wanted.names, parts)
    what = "the clean run's reader for both" if readers == "clean" else "each run with its own reader"
    found = attributions(made, parts, batches[0], place, unit, f"clean minus corrupt, {what}")
    return found[0] if isinstance(observables, Observable) else found
