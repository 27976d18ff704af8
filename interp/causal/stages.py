"""Stages: a network cut at sites, into what is run once for each input and what is run again after a swap."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from interp.causal.data import Pool
from interp.hooks import guards
from interp.hooks.errors import PositionError, ShapeMismatchError, SiteError, SiteNotFoundError
from interp.hooks.interventions import Context, Intervention
from interp.hooks.model import Model, main_tensor
from interp.hooks.plans import resolve_plan
from interp.hooks.session import Session
from interp.hooks.site import Site, SiteLike

_CHUNK = 4096  # inputs of a vector network in one run
_TEXTS = 64  # texts in one run


class Stage:
    """A network cut at one or more sites: h is what the sites hold, side by side.

    Attributes:
        model: The network.
        sites: Where it is cut.
        acts: h of every input of the pool [m, width], in float32 or better.
    """

    path = "hooks: the whole network is run again after each swap"

    def __init__(self, model: Model, sites: Sequence[Site], pool: Pool):
        self.model, self.sites, self.pool = model, tuple(sites), pool
        self.acts = read(model, self.sites, pool)

    @property
    def width(self) -> int:
        """Number of coordinates of h."""
        return self.acts.shape[1]

    def logits(
        self, h: Float[Tensor, "rows width"], rows: Int64[Tensor, "rows"],
        candidates: Int64[Tensor, "rows labels"] | None = None,
    ) -> Float[Tensor, "rows labels"]:  # fmt: skip
        """Return the output with h put in the place of the sites' values in the runs of these inputs.

        Args:
            h: New values.
            rows: Numbers of the inputs.
            candidates: Tokens whose logits are wanted; by default all.
        """
        raise NotImplementedError

    def plain(self, rows: Int64[Tensor, "rows"], candidates: Tensor | None = None) -> Float[Tensor, "rows labels"]:
        """Return the network's own output on these inputs, by a whole forward call."""
        batch = self.model.batch(self.pool.take(rows))
        with torch.no_grad():
            return picked(last_logits(batch, self.model.forward(batch)), candidates)


class HookStage(Stage):
    """The general way: the whole network is run, and hooks put the new values in."""

    def logits(self, h, rows, candidates=None):
        """One run with an edit at each site."""
        batch, start, plan = self.model.batch(self.pool.take(rows)), 0, []
        for site, width in zip(self.sites, self.widths, strict=True):
            plan.append(_Put(site, h[:, start : start + width]))
            start += width
        edits = resolve_plan(self.model, batch, plan)
        output: Any = None
        with frozen(self.model.module), Session(self.model.module, [], edits, size=batch.size, extent=batch.extent):
            output = self.model.forward(batch)
        return picked(last_logits(batch, output), candidates)

    @cached_property
    def widths(self) -> list[int]:
        """Number of coordinates of each site."""
        first = self.pool.take(torch.arange(1))
        values = self.model.capture(first, [str(s) for s in self.sites])
        return [values[str(s)][0].numel() for s in self.sites]


class _Put(Intervention):
    """Sets a site to values of the same number of coordinates, through which gradients flow."""

    kind = "put"
    value: Tensor

    def __init__(self, site: Site, value: Tensor):
        super().__init__(site)
        object.__setattr__(self, "value", value)

    def apply(self, value: Tensor, context: Context) -> Tensor:
        """The values, in the site's shape."""
        return self.value.reshape(value.shape).to(value.dtype)


class SequentialStage(Stage):
    """A network that is a chain of modules: only the modules behind the site are run again."""

    path = "chain: only the modules behind the site are run again"

    def __init__(self, model: Model, sites: Sequence[Site], pool: Pool):
        super().__init__(model, sites, pool)
        found = rest_of_chain(model.module, sites[0])
        assert found is not None
        self.rest = found

    def logits(self, h, rows, candidates=None):
        """The modules behind the site, on h."""
        with frozen(self.model.module):
            return picked(main_tensor(self.rest(h.to(self.model.dtype))), candidates)


def rest_of_chain(module: nn.Module, site: Site) -> nn.Sequential | None:
    """Return the modules that run behind a site, or None where the network is not a chain there."""
    if site.io != "out" or site.selector or site.head is not None or site.positions is not None:
        return None
    behind: list[nn.Module] = []
    for name in site.address.split("."):
        if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
            return None
        names = list(module._modules)
        if name not in names:
            return None
        behind = [*list(module)[names.index(name) + 1 :], *behind]
        module = module._modules[name]  # type: ignore[assignment]
    return nn.Sequential(*behind)


def cut(model: Model, sites: SiteLike | Sequence[SiteLike], pool: Pool, cache: bool = True) -> Stage:
    """Return the network cut at sites, by the fastest way that is exact.

    Args:
        model: The network.
        sites: One site, or several whose values are put side by side.
        pool: The inputs.
        cache: Whether what lies before the sites may be run once only; False for the whole network every time.

    Raises:
        SiteNotFoundError: If a site does not exist, or a position lies outside an input.
    """
    named = [sites] if isinstance(sites, (str, Site)) else list(sites)
    places = [Site.parse(s) for s in named]
    try:
        model.resolve(places)
    except SiteError as error:
        raise SiteNotFoundError(error.given, error.needed, error.do) from error
    if len({str(place) for place in places}) < len(places) or not places:
        raise ShapeMismatchError(f"sites {', '.join(map(str, places))}", "different sites, at least one")
    guards.refuse_training(model.module)
    if cache and len(places) == 1:
        if rest_of_chain(model.module, places[0]) is not None:
            return SequentialStage(model, places, pool)
        from interp.causal.decoder_stage import DecoderStage, fits

        if fits(model, places[0]):
            stage = DecoderStage(model, places, pool)
            if stage.exact:
                return stage
    return HookStage(model, places, pool)


def read(model: Model, sites: Sequence[Site], pool: Pool) -> Float[Tensor, "m width"]:
    """Return what the sites hold on every input, side by side; the lower network is run once for each input.

    Raises:
        SiteNotFoundError: If a site never ran, or a position lies outside an input.
        ShapeMismatchError: If a site of a language model has no position.
    """
    found = []
    for rows in torch.arange(len(pool)).split(_TEXTS if model.reader.kind == "tokens" else _CHUNK):
        inputs = pool.take(rows)
        try:
            values = model.capture(inputs, list(map(str, sites)))
        except (SiteError, PositionError) as error:
            raise SiteNotFoundError(error.given, error.needed, error.do) from error
        for site in sites:
            if model.reader.kind == "tokens" and site.positions is None:
                raise ShapeMismatchError(f"site {site} of a language model", "a position", f"for example {site}@last")
        found.append(torch.cat([values[str(s)].flatten(1) for s in sites], 1))
    acts = torch.cat(found)
    return acts if acts.dtype == torch.float64 else acts.float()


def last_logits(batch: Any, output: Any) -> Tensor:
    """Return the output [rows, labels]: of a language model that at the last token of each input."""
    value = main_tensor(output)
    if value.ndim == 3 and batch.mask is not None:
        ends = torch.tensor(batch.starts) + torch.tensor(batch.lengths) - 1
        return value[torch.arange(len(value)), ends.to(value.device)]
    if value.ndim != 2:
        raise ShapeMismatchError(f"an output of shape {list(value.shape)}", "[inputs, labels], or tokens' logits")
    return value


def picked(logits: Tensor, candidates: Tensor | None) -> Tensor:
    """Return the candidates' logits."""
    return logits if candidates is None else logits.gather(1, candidates.to(logits.device))


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Build no graph on the network's parameters for a while; their flags are put back."""
    live = [p for p in module.parameters() if p.requires_grad]
    for parameter in live:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in live:
            parameter.requires_grad_(True)
