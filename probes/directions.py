"""A probe's direction as an observable."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp.hooks.site import Site
from interp.observables import Observable


@dataclass(frozen=True, eq=False)
class ProbeDirection:
    """A linear functional of the activation at a site: vector · x + offset.

    Attributes:
        name: What it is called in tables.
        vector: [d], raw activation units.
        site: Where x is read.
        offset: The probe's intercept.
    """

    name: str
    vector: Float[Tensor, "d"] = field(repr=False)
    site: Site
    offset: float = 0.0


def as_observable(name: str, vector: Float[Tensor, "d"], site: Any, offset: float) -> Any:
    """An `Observable` at the site, or a `ProbeDirection` where observables cannot read sites."""
    make = getattr(Observable, "from_residual", None)
    if make is None:
        return ProbeDirection(name, vector, Site.parse(site), offset)
    return make(vector, site=site, offset=offset, name=name)
