"""Model: a live network with sites that can be read and changed. It never changes the module it was given."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.hooks import guards
from interp.hooks.activations import Activations
from interp.hooks.bindings import Binding, Bindings
from interp.hooks.errors import InputError, SiteError, SiteUnavailableError
from interp.hooks.inputs import Batch, Reader
from interp.hooks.interventions import PlanLike
from interp.hooks.layouts import Layout, child
from interp.hooks.plans import Probe, resolve_plan
from interp.hooks.session import Read, Session
from interp.hooks.site import Site, SiteLike
from interp.hooks.table import Table
from interp.hooks.views import Argument, Selected


class Model:
    """An attached network.

    Attributes:
        module: What was attached, untouched (the module inside, for a compiled, parallel, bridge or nnsight wrapper).
        tokenizer: Its tokenizer, or None.
        family: Name of the recognised layout, or ``modules``.
        layout: Where the parts are, or None.
        identity: Plain data that says which model this is.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        layout: Layout | None = None,
        *,
        preprocess: Any = None,
        labels=None,
        identity=None,
    ):
        self.module, self.tokenizer, self.layout = module, tokenizer, layout
        self.preprocess, self.labels = preprocess, labels
        self.identity = dict(identity or {"source": "attached", "class": type(module).__name__})
        self.bindings = Bindings(module, layout) if layout else None
        self.reader = self._reader()
        self._once: set[str] = set()  # modules that were seen to run once in a whole forward call

    @property
    def family(self) -> str:
        """Name of the layout, or ``modules`` where there is none."""
        return self.layout.name if self.layout else "modules"

    @property
    def n_layers(self) -> int:
        """Number of blocks (0 without a layout)."""
        return self.bindings.n_layers if self.bindings else 0

    @property
    def config(self) -> Any:
        """The Hugging Face configuration, or None."""
        return getattr(self.module, "config", None)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first parameter that has data."""
        first = next((p for p in self.module.parameters() if not p.is_meta), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the first floating-point parameter."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def _reader(self) -> Reader:
        parameters = inspect.signature(self.module.forward).parameters
        accepts = frozenset(n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        kind = self.layout.modality if self.layout else "any"
        if kind == "any" and getattr(self.module, "main_input_name", None) == "input_ids":
            kind = "tokens"
        embed = child(self.module, self.layout.embed) if self.layout else None
        vocab = getattr(embed, "num_embeddings", None)
        pos = child(self.module, self.layout.pos_embed) if self.layout and self.layout.pos_embed else None
        context, padding = getattr(pos, "num_embeddings", None), getattr(pos, "padding_idx", None)
        if context is not None and padding is not None:
            context -= padding + 1  # RoBERTa's positions begin behind the padding's own
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        has_weights = any(p.is_floating_point() for p in self.module.parameters())
        return Reader(
            kind, self.tokenizer, self.preprocess, accepts, self.device, self.dtype, vocab, context, open_ended,
            has_weights,
        )  # fmt: skip

    # Sites -----------------------------------------------------------------------------------------------------------

    def sites(self, pattern: str = "*") -> Table:
        """Return the table of sites whose name matches a glob: name, axes, shape, meaning.

        A model without a layout, or a pattern that no canonical name matches, lists module paths.

        Raises:
            SiteError: If nothing matches.
        """
        rows = [
            self._site_row(b)
            for b in (self.bindings.by_address.values() if self.bindings else ())
            if fnmatch.fnmatch(b.address, pattern)
        ]
        if not rows:
            rows = [
                {"site": name, "axes": "", "shape": "", "meaning": f"output of {type(sub).__name__}"}
                for name, sub in self.module.named_modules()
                if name and fnmatch.fnmatch(name, pattern)
            ]
        if not rows:
            raise self._unknown(pattern)
        return Table(rows, f"{len(rows)} sites of {type(self.module).__name__} ({self.family})")

    def _site_row(self, binding: Binding) -> dict[str, str]:
        named = self.bindings.sizes  # type: ignore[union-attr]
        shape = ", ".join(str(named.get(a, 1 if a == "one" else a)) for a in binding.axes)
        return {
            "site": binding.address,
            "axes": " ".join(binding.axes),
            "shape": f"[{shape}]",
            "meaning": binding.meaning,
        }

    def resolve(self, sites: SiteLike | Iterable[SiteLike]) -> list[tuple[Site, Binding]]:
        """Return (site, binding) for each site, globs expanded in execution order.

        Raises:
            SiteError: If a site does not exist (with near names) or a head is out of range.
            SiteUnavailableError: If the site exists elsewhere but not in this layout.
        """
        wanted = [sites] if isinstance(sites, (str, Site)) else list(sites)
        if not wanted:
            raise SiteError("no sites", "at least one")
        found: dict[Site, Binding] = {}
        for site in map(Site.parse, wanted):
            for one, binding in self._expand(site):
                self._check_head(one, binding)
                found[one] = binding
        return list(found.items())

    def _expand(self, site: Site) -> list[tuple[Site, Binding]]:
        known = self.bindings.by_address if self.bindings else {}
        if not site.is_glob:
            if site.address in known and site.io == "out" and not site.selector:
                return [(site, known[site.address])]
            return [(site, self._module_binding(site))]
        names = [a for a in known if fnmatch.fnmatch(a, site.address)]
        if not names:
            names = [n for n, _ in self.module.named_modules() if n and fnmatch.fnmatch(n, site.address)]
        if not names:
            raise self._unknown(site.address)
        return [pair for name in names for pair in self._expand(_renamed(site, name))]

    def _module_binding(self, site: Site) -> Binding:
        if child(self.module, site.address) is None:
            raise self._unknown(site.address)
        axes = ("batch", "pos", "width") if self.reader.kind in ("tokens", "encoder") else ("batch",)
        view = Argument(site.selector) if site.io == "in" else Selected(site.selector)
        where = "raw_in" if site.io == "in" else "raw_out"
        return Binding(str(site.whole), site.address, where, view, axes, f"{site.io}put of the module")

    def _unknown(self, address: str) -> SiteError:
        names = list(self.bindings.by_address) if self.bindings else []
        reason = self._unavailable(address)
        if reason:
            return SiteUnavailableError(f"site {address!r} does not exist in this model", reason)
        near = difflib.get_close_matches(
            address, names + [n for n, _ in self.module.named_modules() if n], n=3, cutoff=0.5
        )
        hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
        if self.layout is None and address.startswith(("blocks.", "hook_", "ln_final", "unembed")):
            hint = "canonical names need a layout: pass layout= to attach. "
        return SiteError(f"unknown site {address!r}", "", f"{hint}model.sites() lists all of them")

    def _unavailable(self, address: str) -> str:
        if self.layout is None:
            return ""
        if self.layout.parallel and address.endswith("hook_resid_mid"):
            return "a sequential block; here attention and MLP both read the block's input"
        if self.layout.experts and ".mlp.hook_" in address:
            return (
                "a dense MLP; here each token is sent to experts, and only mlp.hook_out and hook_mlp_out are one tensor"
            )
        return ""

    def _check_head(self, site: Site, binding: Binding) -> None:
        if site.head is None:
            return
        if binding.head_axis is None:
            raise SiteError(
                f"head {site.head} at {site.address}",
                "a site with heads",
                f"its axes are {' '.join(binding.axes)}",
            )
        assert self.layout is not None
        heads, kv_heads, kind = self.layout.n_heads, self.layout.n_kv_heads, binding.axes[binding.head_axis]
        count = kv_heads if kind == "kv_head" else heads
        for head in site.head:
            if not 0 <= head < count:
                raise SiteError(
                    f"head {head} out of range at {site.address}: {heads} query heads (0-{heads - 1}), "
                    f"{kv_heads} key/value heads",
                    f"a {'key/value' if kind == 'kv_head' else 'query'} head in 0..{count - 1}",
                )

    # Running ---------------------------------------------------------------------------------------------------------

    def batch(self, inputs, padding_side: str | None = None) -> Batch:
        """Return inputs in the form that the model's forward takes, padded, with their mask."""
        reader = replace(self.reader, device=self.device, dtype=self.dtype)  # the module may have moved since
        return reader.read(inputs, padding_side)

    def forward(self, batch: Batch) -> Any:
        """Call the module on a batch and return what it returns."""
        guards.refuse_compiled(self.module)
        guards.refuse_training(self.module)
        return self.module(*batch.args, **batch.kwargs)

    @torch.no_grad()
    def run(self, inputs, *, plan: PlanLike = (), padding_side: str | None = None) -> Float[Tensor, "batch ..."]:
        """Return the model's main output (logits, where it has them) under a plan of interventions.

        At padded positions the values are whatever the model computes there.

        Args:
            inputs: Text, texts, token ids, an encoding, an image batch, or arguments of the module.
            plan: Interventions, applied in order at each site.
            padding_side: ``left`` or ``right``; by default the tokenizer's.

        Raises:
            InputError: If the inputs do not fit the model.
            InterventionNotAppliedError: If a step's site never ran.

        Example:
            >>> import interp, torch
            >>> model = interp.attach(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
            >>> model.run(torch.ones(1, 2), plan=[interp.Zero("1")]).abs().sum().item()
            0.0
        """
        batch = self.batch(inputs, padding_side)
        edits, output = resolve_plan(self, batch, plan), None
        with Session(self.module, [], edits, size=batch.size, extent=batch.extent):
            output = self.forward(batch)
        return main_tensor(output)

    def capture(
        self, inputs, sites: SiteLike | Iterable[SiteLike], positions=None, *, plan: PlanLike = (),
        gradient_of: Callable[[Tensor], Tensor] | None = None, padding_side: str | None = None,
    ) -> Activations:  # fmt: skip
        """Return activations at sites during one run: a mapping from site to Tensor[batch, pos, ...].

        The forward call stops as soon as everything has been read (module paths: from their second capture on, the
        first having shown that the module runs once).

        Args:
            inputs: As for `run`.
            sites: Sites, names or globs.
            positions: Ints (negative from each example's end), one list for each example, ``"last"``, or a substring
                of the text. The position axis then lists these; by default all positions, padded.
            plan: Interventions; reads see the changed values.
            gradient_of: Function of the model's main output; its sum is differentiated, and ``gradients`` of the
                result holds the gradient at each site.
            padding_side: ``left`` or ``right``; by default the tokenizer's.

        Raises:
            SiteError: If a site does not exist or gives no tensor.
            PositionError: If a position lies outside an example.

        Example:
            >>> import interp, torch
            >>> model = interp.attach(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
            >>> model.capture(torch.ones(4, 2), "0")["0"].shape
            torch.Size([4, 3])
        """
        batch = self.batch(inputs, padding_side)
        reads = [self._read(batch, site, binding, positions) for site, binding in self.resolve(sites)]
        edits = resolve_plan(self, batch, plan)
        probes = [Probe(r.site) for r in reads] if gradient_of else []
        edits += [probe.edit(read) for probe, read in zip(probes, reads, strict=bool(gradient_of))] if probes else []
        with torch.set_grad_enabled(gradient_of is not None):
            free = {r.binding.module for r in reads if r.binding.where.startswith("raw")}
            stop = gradient_of is None and not self._offloaded and free <= self._once
            session = Session(self.module, reads, edits, stop=stop, size=batch.size, extent=batch.extent)
            output = None
            with session:
                output = self.forward(batch)
            gradients = _gradients(gradient_of, output, reads, probes) if gradient_of else None
        self._once |= free
        ordered = {r.site: session.values[r.site] for r in reads}
        axes = {r.site: r.binding.axes for r in reads}
        return Activations(ordered, batch, axes, {r.site: r.where for r in reads}, gradients)

    @property
    def _offloaded(self) -> bool:
        return any(hasattr(m, "_hf_hook") for m in self.module.modules())

    def _read(self, batch: Batch, site: Site, binding: Binding, positions) -> Read:
        wanted = positions if site.positions is None else site.positions
        return Read(site, binding, self.where(batch, binding, wanted))

    def where(self, batch: Batch, binding: Binding, positions) -> Tensor | None:
        """Return padded indices [batch, n] of positions at a site, or None for all."""
        if positions is None:
            return None
        if binding.pos_axis is None:
            raise SiteError(f"positions={positions!r} at {binding.address}", "a site with token positions")
        return batch.positions(positions)

    # Text ------------------------------------------------------------------------------------------------------------

    def tokens(self, text, chat: bool = False) -> Table:
        """Return the token table of a text, or of a chat (a string, or a list of role/content messages).

        Raises:
            InputError: If the model has no tokenizer, or no chat template.
        """
        from interp.hooks.text import token_table

        return token_table(self, text, chat)

    def generate(self, inputs, *, max_new_tokens: int = 20, plan: PlanLike = (), capture=(), **options):
        """Return text that the model writes under a plan, with activations of every token it read.

        See `interp.hooks.generation.generate` for the options.
        """
        from interp.hooks.generation import generate

        return generate(self, inputs, max_new_tokens=max_new_tokens, plan=plan, capture=capture, **options)

    def __repr__(self) -> str:
        what = f"{self.n_layers} blocks" if self.layout else "module paths"
        name, dtype = type(self.module).__name__, str(self.dtype).removeprefix("torch.")
        return f"Model({name}, family={self.family!r}, {what}, {dtype} on {self.device})"


def _renamed(site: Site, address: str) -> Site:
    return Site(address, site.io, site.selector, site.head, site.positions)


def main_tensor(output: Any) -> Tensor:
    """Return the tensor that a model is run for: logits, else the last hidden state, else the (first) tensor.

    Raises:
        InputError: If the model returns no tensor.
    """
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise InputError(
            f"a model that returns {type(output).__name__}",
            "a tensor, a tuple that starts with one, or an output with logits",
        )
    return output


def _gradients(target, output, reads, probes) -> dict[Site, Tensor]:
    value = target(main_tensor(output))
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise InputError(
            "gradient_of gave a value without a gradient", "a differentiable function of the model's output"
        )
    grads = torch.autograd.grad(value.sum(), [p.leaf for p in probes], allow_unused=True)
    for read, grad in zip(reads, grads, strict=True):
        if grad is None:
            raise SiteError(f"gradient at {read.site}", "a site that the differentiated value depends on")
    return {read.site: grad for read, grad in zip(reads, grads, strict=True)}
