"""Rows of a site out of a capture, in the form that a functional of the site reads."""

import torch
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.errors import SiteError
from interp.hooks.site import Site


def rows_at(acts: Activations, site: Site) -> Tensor:
    """Return a site's activations [batch, pos, feature]; heads and their widths become one axis, head by head.

    Raises:
        SiteError: If the site was not captured: scores at another site would be meaningless.
    """
    value = acts[site]
    same = [key for key in acts if key == str(site)] or [k for k in acts if Site.parse(k).whole == site.whole]
    axes = acts.axes[same[0]]
    if Site.parse(same[0]).head != site.head:
        raise SiteError(f"a functional of {site}", f"a capture of these heads, not of {same[0]}")
    return value.flatten(-2) if axes[-2] in ("head", "kv_head") else value


def working(value: Tensor) -> Tensor:
    """The value in float32 or better."""
    return value if value.dtype == torch.float64 else value.float()
