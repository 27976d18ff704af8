"""A final soft-cap, logits = c tanh(z/c), as observables read it: before it, or by its tangent."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.observables.readout import Readout

if TYPE_CHECKING:
    from interp.observables.observable import Observable

Softcap = Literal["pre", "linearize"]
_NOTE = "soft-cap linearised at the reference: reads the logits before it"


def read_softcap(
    observable: "Observable", model: Model, softcap: Softcap, logits: Float[Tensor, "vocab"] | None
) -> "Observable":
    """Return the observable of the logits before the cap that ``softcap`` asks for: itself, or its tangent.

    Raises:
        ArgumentError: If ``softcap`` is neither word, or the reference is missing or not needed.
    """
    if softcap not in ("pre", "linearize"):
        raise ArgumentError(f"softcap={softcap!r}", "'pre' or 'linearize'")
    if (softcap == "linearize") != (logits is not None):
        raise ArgumentError(
            f"softcap={softcap!r} {'without' if logits is None else 'with'} logits",
            "the reference's logits for 'linearize', none for 'pre'",
        )
    return observable if logits is None else tangent(observable, model, logits)


def tangent(observable: "Observable", model: Model, logits: Float[Tensor, "vocab"]) -> "Observable":
    """Return the tangent of n · logits at a reference, as an observable of z; see `Observable.linearize_softcap`."""
    cap = Readout.of(model).softcap
    if cap is None:
        return observable
    observable.check_logits(len(logits))
    y = logits.detach().to("cpu", torch.float64)
    if not bool((y.abs() <= cap * (1 + 1e-3)).all()):
        raise ArgumentError(
            f"reference logits up to {float(y.abs().max()):.4g}", f"logits behind the model's soft-cap of {cap:g}"
        )
    y = (y if observable.vector is not None else y[list(observable.ids)]).clamp(-cap, cap)
    n = observable.weights_or_vector.to("cpu", torch.float64)
    slope = n * (1 - (y / cap) ** 2)
    if not slope.any():
        raise ArgumentError(f"observable {observable.name!r} at saturated logits", "logits below the soft-cap")
    z = torch.where(slope == 0, 0.0, cap * torch.atanh(y / cap))
    offset = observable.offset + float(n @ y - slope @ z)
    note = "; ".join(filter(None, (observable.note, _NOTE)))
    if observable.vector is not None:
        return replace(observable, vector=slope.to(observable.vector), offset=offset, note=note)
    return replace(observable, weights=tuple(slope.tolist()), offset=offset, note=note)
