"""Contributions of components, heads, source tokens and neurons: what readers of the final stream see of each.

With c = P (γ ⊙ W_Uᵀ n) and the final norm's divisor r, whatever was added to the final stream counts (c / r) · it. c is
pulled back once through W_O and W_out, a = W_O c per head, and then meets activations of a head's own width only:
a · z / r. Behind a branch's post-norm the same holds with its divisor beside r. No tensor has both a batch and all
heads at the stream's width.

Source: Dunefsky & Cohan, "Observable Propagation", ICML 2024, section 3; divisors held at each branch are an extension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.block_weights import Projection, projection_from
from interp.hooks.errors import ArgumentError, CompletenessError, SiteUnavailableError
from interp.hooks.inputs import Batch
from interp.hooks.model import Model
from interp.hooks.site import Site
from interp.observables.sets import ObservableSet
from interp.propagation.reference import Weights
from interp.propagation.stages import pull_gain

EMBEDDINGS = {"embedding": "hook_embed", "positions": "hook_pos_embed", "token types": "hook_type_embed"}
_ATTENTION = {
    "component": ("attention",), "kv_head": ("kv_heads", "attention_bias"), "head": ("heads", "attention_bias"),
    "source": ("sources", "attention_bias"),
}  # fmt: skip
_MLP = {"component": ("mlps",), "neuron": ("neurons", "mlp_bias")}
# Hugging Face computes norms in float32 even in a float64 model.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}

Parts = Mapping[str, Float[Tensor, "obs example ..."]]


def tolerance(model: Model) -> float:
    """The largest completeness error that passes."""
    return _TOLERANCE.get(model.dtype, 2e-2)


@dataclass(frozen=True)
class Detail:
    """How far attention and MLPs are split.

    Attributes:
        attention: ``component``, ``kv_head``, ``head`` or ``source``.
        mlp: ``component`` or ``neuron``.
    """

    attention: str
    mlp: str

    @classmethod
    def of(cls, unit: str) -> "Detail":
        """Return what a unit asks for: one word, or one for attention and one for MLPs as in ``source+neuron``.

        Raises:
            ArgumentError: If there is no such unit.
        """
        words = unit.split("+") if isinstance(unit, str) else []
        attention, mlp = ([w for w in words if w in known] for known in (_ATTENTION, {"neuron"}))
        if not words or len(attention) > 1 or len(mlp) > 1 or len(words) != len(attention) + len(mlp):
            raise ArgumentError(
                f"unit={unit!r}",
                "'component', 'head', 'kv_head', 'source' or 'neuron'",
                "one of the first four and 'neuron' go together as in 'source+neuron'",
            )
        return cls(attention[0] if attention else "head", "neuron" if mlp else "component")

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the parts that sum, beside embeddings, constant and rounding."""
        return (*_ATTENTION[self.attention], *_MLP[self.mlp])


@dataclass(frozen=True)
class Seen:
    """One capture, read as rows [example, ...] at the one position of each example, in a working dtype.

    Attributes:
        acts: The capture.
        keys: What each site is called in it.
        like: A tensor with the dtype and device that are worked in.
        rows: Where several positions of an example count, each as a row of its own: which, of all examples' positions
            one behind the other.
    """

    acts: Activations
    keys: dict[str, str]
    like: Tensor
    rows: Tensor | None = None

    def has(self, site: str) -> bool:
        """Whether the model has this site."""
        return site in self.keys

    def at(self, site: str) -> Float[Tensor, "example ..."]:
        """A site's value at the position."""
        value, axes = self.acts[self.keys[site]], self.acts.axes[self.keys[site]]
        if self.rows is None:
            return value.select(axes.index("pos"), 0).to(self.like)
        return value.movedim(axes.index("pos"), 1).flatten(0, 1)[self.rows.to(value.device)].to(self.like)

    def divisor(self, norm: str) -> Float[Tensor, "example"] | float:
        """A norm's divisor at the position; 1 where the model has no such norm."""
        return self.at(f"{norm}.hook_scale")[:, 0] if self.has(f"{norm}.hook_scale") else 1.0

    def all(self, site: str) -> Float[Tensor, "pos ..."]:
        """A site's value at all tokens of the one example, padding cut off."""
        start, length = self.acts.batch.starts[0], self.acts.batch.lengths[0]
        return self.acts[self.keys[site]][0, start : start + length].to(self.like)


@dataclass(frozen=True)
class _Branch:
    """c behind a branch: at the input of its last linear module, and what that module's and a post-norm's biases add.

    Attributes:
        norm: The post-norm, whether or not the model has it.
        reader: [obs, head, d_head], or [obs, d_mlp].
        inside: c · bias of the linear module [obs], to be divided by both divisors.
        outside: c · bias of the post-norm [obs], to be divided by the final one.
    """

    norm: str
    reader: Float[Tensor, "obs ..."]
    inside: Float[Tensor, "obs"]
    outside: Float[Tensor, "obs"]

    def bias(self, r: Tensor, inner: Tensor) -> Float[Tensor, "obs example"]:
        """What the biases add."""
        return self.inside[:, None] / inner + self.outside[:, None] / r


class Readers:
    """Readers of observables at every component of a model; no data yet.

    Args:
        model: A decoder with a final norm and an unembedding.
        observables: What is measured.
        detail: How far attention and MLPs are split.

    Raises:
        SiteUnavailableError: If the logits are not a norm and an unembedding of a residual sum, or neurons are not one
            linear module's input.
    """

    def __init__(self, model: Model, observables: ObservableSet, detail: Detail):
        self.model, self.observables, self.detail = model, observables, detail
        self._begin()
        attention, mlps = detail.attention != "component", detail.mlp == "neuron"
        z, post = self._attention_output, self._neuron_output
        self.heads = [self._branch(i, "ln1_post", z(i)) for i in range(self.depth[0])] if attention else None
        self.neurons = [self._branch(i, "ln2_post", post(i)) for i in range(self.depth[1])] if mlps else None

    def _begin(self) -> None:
        """What reads the stream, which stream, and how many blocks' attention and MLPs have written to it."""
        check_readout(self.model)
        self.weights = Weights(self.model)
        w, offsets = self.observables.pull_to_stream(self.model)
        self.w, self.offsets = w.to(self.weights.dtype), offsets.to(self.weights.dtype)
        self.c, beta = pull_gain(self.w, self.weights.norm("ln_final"))
        self.constant = beta + self.offsets
        self.depth = (self.model.n_layers, self.model.n_layers)
        self.stream = f"blocks.{self.model.n_layers - 1}.hook_resid_post"

    def place(self, position: Any) -> Any:
        """The position that is read: what is asked for, or what the observables themselves name."""
        return position

    def _attention_output(self, layer: int) -> Projection:
        return self.weights.output(layer)

    def _neuron_output(self, layer: int) -> Projection:
        return projection_from(self.model, f"blocks.{layer}.mlp.hook_post", self.weights.dtype)

    def _branch(self, layer: int, norm: str, output: Projection) -> _Branch:
        name = f"blocks.{layer}.{norm}"
        y, outside = pull_gain(self.c * self.weights.layout.branch_scale, self.weights.norm(name))
        y = y.to(output.weight.device)
        back = lambda value: value.to(self.c)
        return _Branch(name, back(output.pull(y)), back(output.constant(y)), outside)

    # Capture ---------------------------------------------------------------------------------------------------------

    def capture(self, batch: Batch, position: Any, plan=(), *, logits: bool = True) -> Seen:
        """Run the model once and keep what the parts need, at one position of each example.

        Args:
            batch: The inputs.
            position: As for `Model.capture`, one for each example; an int for sources. ``all``: each real token is a
                row, with all positions in one run. A tuple of ints: each is a row, of the one
                example.
            plan: Interventions.
            logits: Measure on the logits; otherwise on the final norm's output, before the unembedding runs.
        """
        known, wanted = self.weights.bindings.by_address, self._sites(logits)
        rows = torch.arange(len(position)) if isinstance(position, tuple) else None
        if position == "all":
            assert batch.mask is not None
            position, rows = None, batch.mask.flatten().nonzero()[:, 0]
        if self.detail.attention != "source":
            names = [site for site in wanted if site in known]
            acts = self.model.capture(batch, names, positions=position, plan=plan)
            return Seen(acts, {site: site for site in names}, self.c, rows)
        needed = [f"blocks.{i}.attn.hook_v" for i in range(self.model.n_layers)]
        missing = [site for site in needed if site not in known]
        if missing:
            raise SiteUnavailableError(
                f"{missing[0]} of {type(self.model.module).__name__}", "values of each head", "unit='head' needs none"
            )
        keys = {site: str(Site.parse(site).at(positions=position)) for site in wanted if site in known}
        keys |= {site: site for site in self._whole_sites() if site in known}
        return Seen(self.model.capture(batch, list(keys.values()), plan=plan), keys, self.c, rows)

    def _sites(self, logits: bool) -> list[str]:
        return [*EMBEDDINGS.values(), *self._end_sites(logits), self.stream, *self._branch_sites()]

    def _end_sites(self, logits: bool) -> list[str]:
        return ["ln_final.hook_scale", *(["unembed.hook_out", "logits"] if logits else ["ln_final.hook_out"])]

    def _branch_sites(self) -> list[str]:
        attention = ["hook_attn_out", *(["attn.hook_z", "ln1_post.hook_scale"] if self.heads is not None else [])]
        attention += ["attn.hook_pattern"] if self.detail.attention == "source" else []
        mlp = ["hook_mlp_out", *(["mlp.hook_post", "ln2_post.hook_scale"] if self.neurons is not None else [])]
        names = [f"blocks.{layer}.{part}" for layer in range(self.depth[0]) for part in attention]
        return names + [f"blocks.{layer}.{part}" for layer in range(self.depth[1]) for part in mlp]

    def _whole_sites(self) -> list[str]:
        parts = ("attn.hook_v", "hook_resid_pre", "ln1.hook_scale")
        return [f"blocks.{layer}.{part}" for layer in range(self.depth[0]) for part in parts]

    # Contributions ---------------------------------------------------------------------------------------------------

    def parts(self, seen: Seen, r: Tensor | None = None, *, logits: bool = True) -> dict[str, Tensor]:
        """Return contributions [obs, example, ...] by name, with measurement, rounding and the identities' error.

        Args:
            seen: A capture.
            r: Divisor of the final norm [example], if not the capture's own.
            logits: As for `capture`.
        """
        divisor = self.divisor(seen) if r is None else r
        read = lambda x: torch.einsum("od,b...d->ob...", self.c, x) / divisor.view(1, -1, *[1] * (x.ndim - 2))
        parts = {name: read(seen.at(site)) for name, site in EMBEDDINGS.items() if seen.has(site)}
        for (name, site), depth in zip(
            (("attention", "hook_attn_out"), ("mlps", "hook_mlp_out")), self.depth, strict=True
        ):
            parts[name] = self._by_layer([read(seen.at(f"blocks.{i}.{site}")) for i in range(depth)], divisor)
        parts["constant"] = self.constant[:, None].expand(-1, len(divisor))
        parts["measurement"] = self._measurement(seen, logits)
        checks = []
        if self.heads is not None:
            parts |= self._split_attention(seen, divisor)
            checks.append(parts["heads"].sum(-1) + parts["attention_bias"] - parts["attention"])
        if self.detail.attention == "source":
            sources, by_vector = self._split_sources(seen, divisor)
            parts["sources"] = sources
            checks += [sources.sum(-1) - parts["heads"], by_vector - parts["heads"]]
        if self.neurons is not None:
            parts |= self._split_mlps(seen, divisor)
            checks.append(parts["neurons"].sum(-1) + parts["mlp_bias"] - parts["mlps"])
        stream = read(seen.at(self.stream))
        return parts | self._closing(parts, stream, checks)

    def _by_layer(self, values: list[Tensor], divisor: Tensor, *shape: int) -> Float[Tensor, "obs example layer ..."]:
        """Parts of each layer; zero for layers behind the stream that is read."""
        zero = self.c.new_zeros(len(self.c), len(divisor), *shape)
        return torch.stack([*values, *[zero] * (self.model.n_layers - len(values))], 2)

    def divisor(self, seen: Seen) -> Float[Tensor, "example"]:
        """The final norm's divisor of each example."""
        r = seen.divisor("ln_final")
        assert isinstance(r, Tensor)
        return r

    def _measurement(self, seen: Seen, logits: bool) -> Float[Tensor, "obs example"]:
        if logits:
            return self.observables.measure(seen.at("unembed.hook_out") * self.weights.layout.logit_scale).T.to(self.c)
        return self.w @ seen.at("ln_final.hook_out").T + self.offsets[:, None]

    def _split_attention(self, seen: Seen, r: Tensor) -> dict[str, Tensor]:
        heads, biases = [], []
        for layer, branch in enumerate(self.heads or []):
            inner = r * seen.divisor(branch.norm)
            z = seen.at(f"blocks.{layer}.attn.hook_z")
            heads.append(torch.einsum("ohk,bhk->obh", branch.reader, z) / inner[:, None])
            biases.append(branch.bias(r, inner))
        found = self._by_layer(heads, r, self.weights.sizes["head"])
        groups = found.unflatten(-1, (self.weights.layout.n_kv_heads, -1)).sum(-1)
        return {"heads": found, "kv_heads": groups, "attention_bias": self._by_layer(biases, r)}

    def _split_mlps(self, seen: Seen, r: Tensor) -> dict[str, Tensor]:
        neurons, biases = [], []
        for layer, branch in enumerate(self.neurons or []):
            inner = r * seen.divisor(branch.norm)
            post = seen.at(f"blocks.{layer}.mlp.hook_post") / inner[:, None]
            neurons.append(branch.reader[:, None] * post)
            biases.append(branch.bias(r, inner))
        found = self._by_layer(neurons, r, self.weights.sizes["d_mlp"])
        return {"neurons": found, "mlp_bias": self._by_layer(biases, r)}

    def _split_sources(self, seen: Seen, r: Tensor) -> tuple[Tensor, Tensor]:
        """Heads by source token, A[t, s] a · (W_V n_s + b_V); and heads again, by feature vectors of the stream."""
        sources, by_vector = [], []
        start, length = seen.acts.batch.starts[0], seen.acts.batch.lengths[0]
        for layer, branch in enumerate(self.heads or []):
            inner = (r * seen.divisor(branch.norm))[:, None, None]
            pattern = seen.at(f"blocks.{layer}.attn.hook_pattern")[..., start : start + length] / inner
            values = seen.all(f"blocks.{layer}.attn.hook_v").repeat_interleave(self._group, 1)
            sources.append(torch.einsum("ohk,nhk->ohn", branch.reader, values)[:, None] * pattern)
            by_vector.append((self._along_vectors(seen, layer, branch)[:, None] * pattern).sum(-1))
        heads = self.weights.sizes["head"]
        return self._by_layer(sources, r, heads, length), self._by_layer(by_vector, r, heads)

    @property
    def _group(self) -> int:
        """Query heads that share one key/value head."""
        return self.weights.layout.n_heads // self.weights.layout.n_kv_heads

    def _along_vectors(self, seen: Seen, layer: int, branch: _Branch) -> Float[Tensor, "obs head pos"]:
        """y · x_s / r_s + constant, with y = P (γ ⊙ W_Vᵀ a) per head and the stream x_s in front of the block."""
        name, values = f"blocks.{layer}", self.weights.values(layer)
        a, weight = branch.reader, values.weight.repeat_interleave(self._group, 1).to(branch.reader)
        y, constant = pull_gain(torch.einsum("ohk,dhk->ohd", a, weight), self.weights.norm(f"{name}.ln1"))
        if values.bias is not None:
            constant = constant + torch.einsum("ohk,hk->oh", a, values.bias.repeat_interleave(self._group, 0).to(a))
        x = seen.all(f"{name}.hook_resid_pre")
        x = x / seen.all(f"{name}.ln1.hook_scale") if seen.has(f"{name}.ln1.hook_scale") else x
        return torch.einsum("ohd,nd->ohn", y, x) + constant[..., None]

    def _closing(self, parts: Parts, stream: Tensor, checks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Rounding, the sum of absolute contributions, and the finer identities' largest error, relative to it."""
        summed = [key for key in (*EMBEDDINGS, *self.detail.keys) if key in parts]
        terms = torch.cat([parts[key].reshape(*stream.shape, -1) for key in summed], -1)
        rounding = stream - terms.sum(-1)
        scale = (terms.abs().sum(-1) + parts["constant"].abs() + rounding.abs()).clamp(min=1e-30)
        worst = [check.flatten(2).abs().amax(2) / scale for check in checks]
        identity = torch.stack(worst).amax(0) if worst else torch.zeros_like(scale)
        return {"rounding": rounding, "stream": stream, "scale": scale, "identity_error": identity}


def completeness_error(parts: Parts) -> Float[Tensor, "obs example"]:
    """The largest of |sum - measurement|, |rounding| and the finer identities' errors, over the sum of sizes."""
    missed = (parts["stream"] + parts["constant"] - parts["measurement"]).abs()
    return torch.maximum(torch.maximum(missed, parts["rounding"].abs()) / parts["scale"], parts["identity_error"])


def check_complete(model: Model, names: Sequence[str], parts: Parts) -> None:
    """Refuse contributions that do not sum to the measurement.

    Raises:
        CompletenessError: With the observable, both numbers and the largest parts.
    """
    errors, limit = completeness_error(parts), tolerance(model)
    bad = ~(errors <= limit)
    if not bad.any():
        return
    o, e = (int(i) for i in bad.nonzero()[0])
    total = float(parts["stream"][o, e] - parts["rounding"][o, e] + parts["constant"][o, e])
    keys = [k for k in ("heads", "attention", "mlps") if k in parts]
    sizes = {k: float(parts[k][o, e].abs().max()) for k in keys}
    raise CompletenessError(
        f"contributions without rounding sum to {total:.6g}, measurement of {names[o]!r} is "
        f"{float(parts['measurement'][o, e]):.6g}; finer parts miss theirs by "
        f"{float(parts['identity_error'][o, e]):.1e} (relative {float(errors[o, e]):.1e}, example {e})",
        f"at most {limit:.0e}",
        f"largest: {', '.join(f'{k} {v:.3g}' for k, v in sizes.items())}",
    )


def check_readout(model: Model) -> None:
    """Refuse models whose logits are not a norm and an unembedding of a residual sum.

    Raises:
        SiteUnavailableError: For such a model.
    """
    layout = model.layout
    if layout is None or layout.post_ln or layout.final_norm is None or layout.unembed is None:
        raise SiteUnavailableError(
            f"direct attribution on {type(model.module).__name__} ({model.family})",
            "logits that are norm and unembedding of a residual sum",
            "use LinearScope for other networks",
        )


def subtract(clean: Parts, corrupt: Parts, shared: str) -> dict[str, Tensor]:
    """Clean minus corrupt, part by part; with a shared reader the measurement is the reader's, u · (x - x')."""
    found = {key: clean[key] - corrupt[key] for key in clean}
    found["scale"] = clean["scale"] + corrupt["scale"]
    found["identity_error"] = torch.maximum(clean["identity_error"], corrupt["identity_error"])
    if shared == "clean":
        found["measurement"] = found["stream"]
    return found
