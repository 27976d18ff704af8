"""Dictionaries: sparse autoencoders and transcoders that somebody trained, as bases and as observables.

Formulas of the architectures as SAELens (3 to 6) runs them: standard and top-k; gated, Rajamanoharan et al. 2024
(arXiv 2404.16014); JumpReLU, Rajamanoharan et al. 2024 (arXiv 2407.14435); transcoders, Dunefsky et al. 2024
(arXiv 2406.11944). Nothing is trained here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.files import read_folder
from interp.hooks.activations import Activations
from interp.hooks.errors import ArgumentError
from interp.hooks.site import Site, SiteLike
from interp.hooks.table import Rows
from interp.observables.observable import Observable
from interp.observables.reading import rows_at
from interp.observables.sets import ObservableSet

Normalization = Literal["none", "constant_norm_rescale", "layer_norm"]
_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class Dictionary(Rows):
    """Latents f = encode(x) of a site's activation x, and their sum x̂ = Σ f_i direction(i) + decoder bias.

    With x' the normalised x and b the input bias, the pre-activation is p = W_encᵀ (x' - b) + b_enc, and f is relu(p);
    of a JumpReLU relu(p) where p is above the threshold; of a top-k relu(p) of the k largest; of a gated one
    relu(exp(r) ⊙ W_encᵀ (x' - b) + b_mag) where W_encᵀ (x' - b) + b_gate is positive.

    Attributes:
        name: The folder's name.
        architecture: ``standard``, ``gated``, ``jumprelu``, ``topk`` or a transcoder's.
        site: Where x is read.
        target: What x̂ stands for: the same site, or a transcoder's output.
        weights: Tensors under their published names: W_enc [d_in, latent], W_dec [latent, d_out], b_dec and so on.
        k: Number of latents that a top-k keeps.
        normalization: What is done to each x first, and undone last.
        subtracts_bias: Whether b is the decoder's bias (or a transcoder's own b_dec) rather than 0.
        rescales: Whether a top-k ranks p times the norms of the decoder's rows.
        metadata: What the folder says about its training: model, data, token at the start.
    """

    name: str
    architecture: str
    site: Site
    target: Site
    weights: dict[str, Tensor] = field(repr=False)
    k: int | None = None
    normalization: Normalization = "none"
    subtracts_bias: bool = True
    rescales: bool = False
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls, folder: str | Path, *, site: SiteLike | None = None, target: SiteLike | None = None,
        norm_scaling_factor: float | None = None, dtype: torch.dtype | None = None, device: Any = "cpu",
    ) -> "Dictionary":  # fmt: skip
        """Return the dictionary in a folder of SAELens's format: ``cfg.json`` and ``sae_weights.safetensors``.

        Sites are TransformerLens's names, which are this library's too; what they mean here is this library's. An
        autoencoder trained on a model whose weights TransformerLens had processed (centred writing weights) saw a
        stream that a plain model does not have: look at `reconstruction_error` first.

        Args:
            folder: Where the two files are.
            site: Where x is read, if not where ``hook_name`` in the folder says.
            target: What a transcoder predicts, if not what ``hook_name_out`` says.
            norm_scaling_factor: The factor on x that training used, for a folder whose ``normalize_activations`` is
                ``expected_average_only_in``; it is not in the folder.
            dtype: Of the weights; by default float32, or float64 where they are.
            device: Where the weights go.

        Raises:
            DictionaryError: If a file is missing or not of this format, the architecture is unknown, or a tensor is
                missing, unknown, of another shape, not floating-point or not finite.
        """
        options, weights = read_folder(Path(folder), site, target, norm_scaling_factor, dtype, device)
        return cls(Path(folder).name, weights=weights, **options)

    @property
    def d_in(self) -> int:
        """Width of x."""
        return self.weights["W_enc"].shape[0]

    @property
    def d_out(self) -> int:
        """Width of x̂."""
        return self.weights["W_dec"].shape[1]

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return self.weights["W_dec"].shape[0]

    def __len__(self) -> int:
        return self.n_latents

    # As a map --------------------------------------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch latent"]:
        """Return the latents of x, in the dtype of the weights.

        Raises:
            ArgumentError: If x is not as wide as the dictionary's input.
        """
        centred = self._input(x)
        if "r_mag" in self.weights:
            p = centred @ self.weights["W_enc"]
            magnitude = torch.relu(p * self.weights["r_mag"].exp() + self.weights["b_mag"])
            return magnitude * (p + self.weights["b_gate"] > 0)
        p = centred @ self.weights["W_enc"] + self.weights["b_enc"]
        if "threshold" in self.weights:
            return torch.relu(p) * (p > self.weights["threshold"])
        if self.k is None:
            return torch.relu(p)
        p = p * self._row_norms if self.rescales else p
        top = p.topk(self.k, dim=-1)
        return torch.zeros_like(p).scatter(-1, top.indices, top.values.relu())

    def decode(
        self, latents: Float[Tensor, "*batch latent"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Return x̂ = Σ f_i direction(i) + b, unnormalised.

        Args:
            latents: f.
            x: The input, which a dictionary that normalises, or that has a skip from input to output, needs again.

        Raises:
            ArgumentError: If the latents do not fit, or x is missing.
        """
        if latents.shape[-1] != self.n_latents:
            raise ArgumentError(f"{latents.shape[-1]} latents", f"{self.n_latents}, as {self.name} has")
        if x is None and self.needs_input:
            raise ArgumentError(f"decode() of {self.name} without x", "x, which it normalises or skips", "decode(f, x)")
        w = self.weights
        f = latents.to(w["W_dec"]) * w.get("finetuning_scaling_factor", 1.0)
        out = f @ (w["W_dec"] / self._row_norms[:, None] if self.rescales else w["W_dec"])
        out = out + w.get("b_dec_out", w["b_dec"])
        if x is None:
            return out
        x = self._checked(x)
        if "W_skip" in w:
            out = out + x @ w["W_skip"].T
        return self._unnormalised(out, x)

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return decode(encode(x))."""
        return self.decode(self.encode(x), x)

    def reconstruction_error(
        self, x: Float[Tensor, "*batch d_in"], target: Float[Tensor, "*batch d_out"] | None = None
    ) -> Float[Tensor, "*batch"]:
        """Return |target - x̂| / |target| for each x; the target is x itself, or what a transcoder predicts.

        Raises:
            ArgumentError: If a transcoder is given no target.
        """
        if target is None and self.is_transcoder:
            raise ArgumentError(f"transcoder {self.name} without a target", f"activations at {self.target}")
        wanted = (x if target is None else target).to(self.weights["W_dec"])
        return (wanted - self.reconstruct(x)).norm(dim=-1) / wanted.norm(dim=-1)

    def read(self, acts: Activations) -> Float[Tensor, "batch pos latent"]:
        """Return the latents at every position of a capture of the dictionary's site; heads are one behind the other.

        Raises:
            SiteError: If that site was not captured.

        Example:
            >>> import interp
            >>> acts = model.capture(text, dictionary.site)    # doctest: +SKIP
            >>> latents = dictionary.read(acts)                # doctest: +SKIP
        """
        return self.encode(rows_at(acts, self.site))

    # As observables --------------------------------------------------------------------------------------------------

    def direction(self, latent: int) -> Float[Tensor, "d_out"]:
        """Return the decoder's row of a latent: what one unit of it adds to x̂ (before a normalisation is undone).

        Raises:
            ArgumentError: If there is no such latent.
        """
        row = self.weights["W_dec"][self._index(latent)]
        scale = self.weights.get("finetuning_scaling_factor")
        row = row if scale is None else row * scale[latent]
        return row / row.norm() if self.rescales else row

    def observable(self, latent: int) -> Observable:
        """Return the decoder's row as a readout of the target site: m = direction · x.

        Raises:
            ArgumentError: If there is no such latent, or its row is zero.
        """
        return Observable.from_residual(
            self.direction(latent), site=self.target, name=f"{self.name}, decoder of latent {latent}"
        )

    def encoder_observable(self, latent: int) -> Observable:
        """Return the latent's pre-activation (of a gated one, its magnitude's) as a readout of the input site.

        Where the latent is on, its value is this measurement (times the row's norm, for a top-k that rescales).

        Raises:
            ArgumentError: If there is no such latent, or x is normalised first, which is not linear.
        """
        index, w = self._index(latent), self.weights
        if self.normalization != "none":
            raise ArgumentError(
                f"encoder of {self.name}, which normalises its input ({self.normalization})",
                "a pre-activation that is linear in x",
                "observable(...) reads the decoder's row; propagate through the encoder with LinearScope",
            )
        row = w["W_enc"][:, index] * (w["r_mag"][index].exp() if "r_mag" in w else 1.0)
        bias = w["b_mag"][index] if "r_mag" in w else w["b_enc"][index]
        bias = bias - row @ w["b_dec"] if self.subtracts_bias else bias
        return Observable.from_residual(
            row, site=self.site, offset=float(bias), name=f"{self.name}, encoder of latent {latent}"
        )

    def decoder_observables(self, latents: Sequence[int] | None = None) -> ObservableSet:
        """Return `observable` of each latent, or of all, as one set.

        Raises:
            ArgumentError: If there is no such latent.
        """
        return ObservableSet([self.observable(i) for i in (range(len(self)) if latents is None else latents)])

    @property
    def is_transcoder(self) -> bool:
        """Whether x̂ stands for another site than x."""
        return "transcoder" in self.architecture

    @property
    def needs_input(self) -> bool:
        """Whether decoding needs x again."""
        return "W_skip" in self.weights or self.normalization != "none"

    def to_records(self) -> list[dict[str, Any]]:
        """One row that says what this is."""
        shape = {"d_in": self.d_in, "latents": self.n_latents, "d_out": self.d_out}
        where = {"site": str(self.site), "target": str(self.target)}
        return [{"name": self.name, "architecture": self.architecture, **where, **shape}]

    def _index(self, latent: int) -> int:
        if isinstance(latent, bool) or not hasattr(latent, "__index__") or not 0 <= latent < self.n_latents:
            raise ArgumentError(f"latent {latent!r} of {self.name}", f"an index in 0..{self.n_latents - 1}")
        return latent.__index__()

    @property
    def _row_norms(self) -> Tensor:
        return self.weights["W_dec"].norm(dim=-1)

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise ArgumentError(
                f"activations of shape {list(x.shape)} at {self.site}",
                f"rows of width {self.d_in}, as {self.name} has",
                "read(acts) puts heads one behind the other",
            )
        return x.to(self.weights["W_enc"])

    def _input(self, x: Tensor) -> Tensor:
        """x' - b."""
        x = self._checked(x)
        shift, scale = self._statistics(x)
        x = (x - shift) / scale
        return x - self.weights["b_dec"] if self.subtracts_bias else x

    def _statistics(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale) of the normalisation x' = (x - shift) / scale."""
        if self.normalization == "constant_norm_rescale":
            return 0.0, x.norm(dim=-1, keepdim=True) / self.d_in**0.5
        if self.normalization == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + _EPS
        return 0.0, 1.0

    def _unnormalised(self, out: Tensor, x: Tensor) -> Tensor:
        shift, scale = self._statistics(x)
        # The published code adds eps on the way in only.
        return out * (scale - _EPS if self.normalization == "layer_norm" else scale) + shift
