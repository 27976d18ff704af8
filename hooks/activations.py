"""Activations: what a capture gives back."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from interp.hooks.errors import SiteError
from interp.hooks.inputs import Batch
from interp.hooks.site import Site, SiteLike
from interp.hooks.table import Rows


class Activations(Rows, Mapping[str, Tensor]):
    """Tensors by site (text or Site), each with the site's axes, batch first.

    Without ``positions`` the position axis is the padded one; ``mask`` says which entries are real tokens. With
    ``positions`` the axis lists the positions that were asked for.

    Attributes:
        batch: The inputs, with ids, mask and lengths.
        where: Padded indices [batch, n] of the positions that were asked for, or None.
        gradients: Gradients by site, if they were asked for.
        axes: Axis names by site.
    """

    def __init__(
        self,
        values: Mapping[Site, Tensor],
        batch: Batch,
        axes: Mapping[Site, tuple[str, ...]],
        where: Mapping[Site, Tensor | None],
        gradients: Mapping[Site, Tensor] | None = None,
    ):
        self._values = {str(site): value for site, value in values.items()}
        self.batch = batch
        self.axes = {str(site): a for site, a in axes.items()}
        self.where = {str(site): w for site, w in where.items()}
        self.gradients = None if gradients is None else {str(site): g for site, g in gradients.items()}

    def __getitem__(self, site: SiteLike) -> Tensor:
        key = str(site)
        if key in self._values:
            return self._values[key]
        same = [k for k in self._values if Site.parse(k).whole == Site.parse(key).whole]
        if Site.parse(key).whole == Site.parse(key) and len(same) == 1:
            return self._values[same[0]]
        raise SiteError(
            f"site {key!r} was not captured",
            "one of " + ", ".join(list(self._values)[:5]) + (", ..." if len(self) > 5 else ""),
        )

    def get(self, site: SiteLike, default=None):  # type: ignore[override]
        """Return the site's tensor, or the default where it was not captured."""
        try:
            return self[site]
        except SiteError:
            return default

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, site: object) -> bool:
        return isinstance(site, (str, Site)) and str(site) in self._values

    @property
    def mask(self) -> Tensor | None:
        """True at real tokens [batch, pos]."""
        return self.batch.mask

    @property
    def tokens(self) -> Tensor | None:
        """Token ids [batch, pos]."""
        return self.batch.ids

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order asked for."""
        return [Site.parse(key) for key in self._values]

    def real(self, site: SiteLike) -> Tensor:
        """Return the site's rows of real tokens only, [token, ...], examples one behind the other.

        Raises:
            SiteError: If the site was captured at chosen positions, or has no position axis right behind the batch.
        """
        value = self[site]
        if self.mask is None or self.where.get(str(site)) is not None or self.axes[str(site)][1] != "pos":
            raise SiteError(
                f"{site} has axes {self.axes[str(site)]}",
                "all positions of a site with axes (batch, pos, ...)",
            )
        return value[self.mask.to(value.device)]

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each site: its axes, shape and dtype; the values are read by the site's name."""
        return [
            {"site": key, "axes": " ".join(self.axes[key]), "shape": list(value.shape), "dtype": str(value.dtype)[6:]}
            for key, value in self._values.items()
        ]

    def __repr__(self) -> str:
        rows = [
            f"  {key}: {list(value.shape)} {value.dtype}".replace("torch.", "") for key, value in self._values.items()
        ]
        return "Activations(\n" + "\n".join(rows) + "\n)"
