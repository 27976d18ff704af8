"""Reference: one run's activations, read as what each stage of a pull-back holds."""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.block_weights import Projection, projection_from, projection_to, read_activation
from interp.hooks.errors import ArgumentError, NonFiniteError, SiteUnavailableError
from interp.hooks.model import Model
from interp.hooks.weights import Norm

_BLOCK = (
    "hook_resid_pre", "hook_resid_mid", "ln1.hook_scale", "ln1.hook_normalized", "attn.hook_pattern",
    "ln1_post.hook_scale", "ln1_post.hook_normalized", "ln2.hook_scale", "ln2.hook_normalized", "mlp.hook_pre",
    "mlp.hook_pre_linear", "mlp.hook_post", "ln2_post.hook_scale", "ln2_post.hook_normalized",
)  # fmt: skip
_KEPT = 5  # projections of one layer: to values and gates, from z and neurons
_ENDS = ("hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_out")


def no_stream(model: Model) -> SiteUnavailableError:
    """The error for a model in which nothing can be pulled back along the stream."""
    return SiteUnavailableError(
        f"pull-backs through {type(model.module).__name__} ({model.family})",
        "a layout whose branches are added to one residual stream",
        "LinearScope linearises any network",
    )


class Weights:
    """A model's weights in one convention, dtype and device; what is cast is made when used, the last few kept."""

    def __init__(self, model: Model, dtype: torch.dtype | None = None, post_ln: bool = False):
        if model.layout is None or (model.layout.post_ln and not post_ln) or model.bindings is None:
            raise no_stream(model)
        self.model, self.layout, self.bindings = model, model.layout, model.bindings
        self.dtype = dtype or (torch.float64 if model.dtype == torch.float64 else torch.float32)
        self.device = model.device
        self._kept: dict[str, Projection] = {}

    def norm(self, name: str) -> Norm | None:
        """The norm at a canonical name, or None where the model has none."""
        return self.bindings.norms.get(name)

    def values(self, layer: int) -> Projection:
        """W_V and b_V: [d_model, kv_head, d_head]."""
        return self.map_to(f"blocks.{layer}.attn.hook_v")

    def output(self, layer: int) -> Projection:
        """W_O and b_O: [head, d_head, d_model]."""
        return self.map_from(f"blocks.{layer}.attn.hook_z")

    def map_to(self, site: str) -> Projection:
        """The map from a linear module's input to a site that is its output."""
        return self._keep(site, projection_to)

    def map_from(self, site: str) -> Projection:
        """The map from a site that is a linear module's input to its output."""
        return self._keep(site, projection_from)

    def _keep(self, site: str, make: Callable[..., Projection]) -> Projection:
        found = self._kept.pop(site, None) or make(self.model, site, self.dtype, self.device)
        while len(self._kept) >= _KEPT:
            self._kept.pop(next(iter(self._kept)))
        # A loop over the heads of a layer in half precision casts its matrices once.
        self._kept[site] = found
        return found

    def group(self, head: int) -> int:
        """The key/value head that a query head reads."""
        return head // (self.layout.n_heads // self.layout.n_kv_heads)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each named axis."""
        return self.bindings.sizes


class Reference:
    """A model at one prompt: the divisors, patterns and pre-activations around which pull-backs linearise.

    Every call that takes a prompt takes a reference instead, and then runs the model no more.

    Args:
        model: A decoder.
        prompt: One text, or token ids.
        sites: Further sites to capture at once; others are captured when first read.
        only: The sites to capture at once, instead of those of every layer: for a part of the network.
        post_ln: Whether a stream that is normalised behind each sum (BERT) will do.

    Raises:
        SiteUnavailableError: If the model has no residual stream that branches add to.
        ArgumentError: If there is more than one prompt.
        NonFiniteError: If the model gives NaN or infinity.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> ref = interp.Reference(model, "When Mary and John went out")
        >>> n = interp.Observable.logit_diff(model, " Mary", " John")
        >>> [interp.propagate(model, n, ref, path=p).position for p in ("L9H1@1", "L9H1@3")]
        [1, 3]
    """

    def __init__(
        self, model: Model, prompt: Any, sites: tuple[str, ...] = (), only: Sequence[str] | None = None,
        post_ln: bool = False,
    ):  # fmt: skip
        self.model, self.weights = model, Weights(model, post_ln=post_ln)
        self.batch = model.batch(prompt)
        if self.batch.size != 1 or self.batch.ids is None:
            raise ArgumentError(f"{self.batch.size} prompts", "one text, or one list of token ids")
        known = self.weights.bindings.by_address
        names = [*_ENDS, *(f"blocks.{i}.{part}" for i in range(model.n_layers) for part in _BLOCK)]
        names.append(f"blocks.{model.n_layers - 1}.hook_resid_post")
        wanted = dict.fromkeys(self._same(name) for name in (names if only is None else only) if name in known)
        self.acts: Activations = model.capture(self.batch, [*wanted, *(s for s in sites if s not in wanted)])
        self._later: dict[str, Activations] = {}
        if only is None and not torch.isfinite(self.at(names[-1])).all():
            raise NonFiniteError(
                "the residual stream at this prompt holds NaN or infinity", "finite activations",
                "a float64 model with padding on the left does that: pass the prompt without padding",
            )  # fmt: skip

    @classmethod
    def of(cls, model: Model, prompt: Any) -> "Reference":
        """Return the reference at a prompt; a reference passes through.

        Raises:
            ArgumentError: If a reference is one of another model.
        """
        if not isinstance(prompt, Reference):
            return cls(model, prompt)
        if prompt.model.module is not model.module:
            raise ArgumentError("a Reference of another model", "one made with this model")
        return prompt

    def __repr__(self) -> str:
        return f"Reference({type(self.model.module).__name__}, {self.length} tokens, {self.weights.dtype})"

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.batch.lengths[0]

    def position(self, wanted: int) -> int:
        """A position as an index from 0.

        Raises:
            PositionError: If it lies outside the prompt.
        """
        return int(self.batch.positions(wanted)[0, 0]) - self.batch.starts[0]

    def at(self, site: str) -> Float[Tensor, "..."]:
        """A site's value without the batch axis, padding cut off, in the working dtype and on one device."""
        acts, site = self._captured(site)
        value = acts[site][0]
        start, stop = self.batch.starts[0], self.batch.starts[0] + self.length
        axes = acts.axes[site][1:]
        for axis, name in enumerate(axes):
            if name in ("pos", "key"):
                value = value.narrow(axis, start, stop - start)
        return value.to(self.weights.device, self.weights.dtype)

    def logits(self, position: int) -> Float[Tensor, "vocab"]:
        """What the unembedding gives at one position: before a final scale and soft-cap."""
        return self.acts["unembed.hook_out"][0, self.batch.starts[0] + position].to(
            self.weights.device, self.weights.dtype
        )

    def has(self, site: str) -> bool:
        """Whether the model has this site."""
        return site in self.weights.bindings.by_address

    def _captured(self, site: str) -> tuple[Activations, str]:
        """The activations that hold a site, and its name there; captured now if no run has read it."""
        same = self._same(site)
        if same in self.acts:
            return self.acts, same
        if same not in self._later:
            self._later[same] = self.model.capture(self.batch, same)
        return self._later[same], same

    def _same(self, site: str) -> str:
        """The captured name of a site: what leaves a block is what enters the next."""
        match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", site)
        if match is None or int(match[1]) == self.model.n_layers - 1:
            return site
        return f"blocks.{int(match[1]) + 1}.hook_resid_pre"

    def pattern(self, layer: int) -> Float[Tensor, "head pos key"]:
        """Attention probabilities of one layer."""
        return self.at(f"blocks.{layer}.attn.hook_pattern")

    def mlp_norm(self, layer: int) -> str:
        """Name of the norm in front of an MLP: its own, or the one that a parallel block shares with attention."""
        layout = self.weights.layout
        return f"blocks.{layer}.{'ln1' if layout.parallel and layout.ln2 is None else 'ln2'}"

    def mlp_input(self, layer: int) -> Float[Tensor, "pos d"]:
        """What an MLP reads."""
        name = self.mlp_norm(layer)
        norm = self.weights.norm(name)
        if norm is None or self.weights.layout.post_ln:
            return self.at(f"blocks.{layer}.hook_resid_mid")
        return norm.finish(self.at(f"{name}.hook_normalized")).to(self.weights.dtype)

    def activation(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        """The MLP's activation function, or None where no callable of the block gives its values."""
        if layer not in self._activations:
            self._activations[layer] = self._find_activation(layer)
        return self._activations[layer]

    @cached_property
    def _activations(self) -> dict[int, Callable[[Tensor], Tensor] | None]:
        return {}

    def _find_activation(self, layer: int) -> Callable[[Tensor], Tensor] | None:
        name = f"blocks.{layer}.mlp"
        if not self.has(f"{name}.hook_pre") or not self.has(f"{name}.hook_post"):
            return None
        # In the model's own dtype, and of real tokens: padding may hold anything, NaN too.
        own = slice(self.batch.starts[0], self.batch.starts[0] + self.length)
        pre, post = self.acts[f"{name}.hook_pre"][0, own], self.acts[f"{name}.hook_post"][0, own]
        if not self.has(f"{name}.hook_pre_linear"):
            return read_activation(self.model, layer, pre, post)
        up = self.acts[f"{name}.hook_pre_linear"][0, own]
        # a(pre) ⊙ up = post, compared where the other factor is not small.
        large = up.abs() >= up.abs().median()
        return read_activation(self.model, layer, pre[large], (post / up)[large])
