"""JacobianLens: the corpus-averaged Jacobian from each block's output to the last, and what it reads.

Source: Gurnee et al., "Verbalizable Representations Form a Global Workspace in Language Models", Transformer Circuits
Thread, 2026; the artefact's format is that of anthropics/jacobian-lens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError, LensFileError, RunError
from interp.hooks.model import Model
from interp.hooks.table import Rows
from interp.lens.files import MOST_BYTES, read_artefact, write_artefact
from interp.lens.fit import ESTIMATOR, FitOptions, differences, fit_sums
from interp.lens.logit_lens import LogitLens, capture_streams, check_readout, read_streams
from interp.saving import load_result, save_result

Method = Literal["auto", "closed", "autograd"]
Precision = Literal["float32", "float64", "bf16"]
_EXPORTED = ("skip", "max_tokens", "precision", "class", "dtype", "weights_sha256", "config_sha256")


@dataclass(frozen=True, eq=False)
class JacobianLens(Rows):
    """A matrix J_l for each block l, which carries the block's output to the last block's output.

    J_l = E_prompt [ (1/|V|) Σ_{t in V} Σ_{t' in V, t' >= t} d x_last[t'] / d x_l[t] ]: for each source position the
    effects on all later positions are summed, sources and prompts are averaged. V leaves out the first tokens
    (attention sinks) and the last one. It is no average of same-position Jacobians: what attention carries to later
    tokens is in it. The readout is W_U N(J_l x_l); with J_l = 1 it is the logit lens.

    Attributes:
        matrices: By layer, [d_model, d_model] in float32, output index first.
        count: How many prompts were averaged.
        tokens: How many positions.
        prompts: SHA-256 of each prompt's tokens.
        changes: By how much each prompt moved the mean, relative to it: has the fit settled?
        fingerprint: What lenses must share to be merged: model, weights, estimator, settings. Empty for an imported
            artefact, which does not tell.
        metadata: Of an imported artefact.
    """

    matrices: dict[int, Float[Tensor, "d_model d_model"]] = field(repr=False)
    count: int
    tokens: int = 0
    prompts: list[str] = field(default_factory=list, repr=False)
    changes: list[float] = field(default_factory=list, repr=False)
    fingerprint: dict[str, Any] = field(default_factory=dict, repr=False)
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(
        cls, model: Model, texts: Iterable[Any], *, layers: Sequence[int] | None = None, skip: int = 16,
        max_tokens: int = 128, precision: Precision | None = None, method: Method = "auto",
        budget: int | str = "2GiB", checkpoint: str | Path | None = None, until: float | None = None,
        check: bool = True,
    ) -> "JacobianLens":  # fmt: skip
        """Return the lens of a corpus: for each prompt one sweep of d_model covectors from the last block back.

        Each block's MLP is put together as one matrix for each token and multiplied, where that is cheaper than
        pulling the covectors through its neurons; positions that nothing is asked of are never computed.

        Args:
            model: A decoder.
            texts: Prompts: texts, or rows of token ids. Those of ``skip`` + 1 tokens or fewer are left out with a
                warning. No token is put in front: TransformerLens puts its own there.
            layers: Blocks whose outputs get a matrix; all but the last by default.
            skip: How many first tokens of each prompt are left out.
            max_tokens: Where longer prompts are cut.
            precision: dtype of products in closed forms; by default float32, or float64 for float64 models. ``bf16``
                rounds factors to bfloat16 and adds in float32.
            method: ``auto``, or only ``closed`` forms, or only ``autograd``.
            budget: Bytes for sums and scratch; fewer covectors run at once where it is small.
            checkpoint: File that holds the sums after each prompt. A fit that was killed goes on from it; at the end
                it is removed.
            until: Stop after three prompts in a row that moved the mean by less than this, relative to it.
            check: Whether the first prompt's matrices are compared with autograd on a random covector.

        Raises:
            ArgumentError: If an option is out of range, or no prompt is long enough.
            SiteUnavailableError: If the model has no residual stream that branches add to.
            SizeError: If the budget does not hold one covector.
            TrainModeError: If dropout is live.
            RunError: If a checkpoint belongs to another fit.
            CompletenessError: If a closed form was required and disagrees with autograd.
            NonFiniteError: If a derivative is NaN or infinite.

        Example:
            >>> import interp
            >>> model = interp.load("smollm2-135m")
            >>> text = "Everyone has the right to life, liberty and security of person, and no one shall be held."
            >>> lens = interp.JacobianLens.fit(model, [text], layers=[27, 28], max_tokens=18)
            >>> lens
            JacobianLens(count=1, tokens=1)
            >>> lens.readout(model, "The capital of France is", k=1).layers
            ['27', '28', '29']
        """
        options = FitOptions.of(model, layers, skip, max_tokens, method, precision, budget, check)
        if until is not None and not until > 0:
            raise ArgumentError(f"until={until!r}", "a positive relative change, or None")
        sums = fit_sums(model, texts, options, checkpoint, until)
        n = len(sums.prompts)
        means = {layer: (total / n).float() for layer, total in sums.totals.items()}
        return cls(means, n, sums.tokens, sums.prompts, sums.changes, sums.fingerprint)

    @classmethod
    def merge(cls, lenses: Sequence["JacobianLens"]) -> "JacobianLens":
        """Return the lens of all prompts from lenses of disjoint parts, fitted anywhere.

        Raises:
            ArgumentError: If they differ in model, weights or settings, share a prompt, or do not tell.
        """
        if not lenses or any(not lens.fingerprint or lens.count < 1 for lens in lenses):
            raise ArgumentError("no lenses, or one without a fingerprint", "lenses that `fit` made")
        first = lenses[0]
        for lens in lenses[1:]:
            if differing := differences(first.fingerprint, lens.fingerprint):
                raise ArgumentError(f"lenses that differ in {differing}", "parts of one fit")
        prompts = [prompt for lens in lenses for prompt in lens.prompts]
        if len(set(prompts)) < len(prompts):
            raise ArgumentError("lenses that share a prompt, which would count twice", "disjoint parts of a corpus")
        count = sum(lens.count for lens in lenses)
        means = {
            layer: (sum(lens.matrices[layer].double() * lens.count for lens in lenses) / count).float()  # type: ignore
            for layer in first.matrices
        }
        return cls(means, count, sum(lens.tokens for lens in lenses), prompts, [], first.fingerprint)

    @property
    def layers(self) -> list[int]:
        """The blocks that have a matrix."""
        return sorted(self.matrices)

    @property
    def width(self) -> int:
        """Width of the stream."""
        return len(next(iter(self.matrices.values())))

    def save(self, stem: str | Path) -> None:
        """Write ``stem.safetensors`` (the matrices) and ``stem.json`` (all else)."""
        save_result(self, stem)

    @classmethod
    def load(cls, path: str | Path, most: int | None = None) -> "JacobianLens":
        """Read what `save` wrote, or the published ``.pt`` artefact, whose caps ``most`` bytes set.

        Args:
            path: A stem, one of its two files, or an artefact.
            most: Bytes that an artefact may have; 64 GiB by default.

        Raises:
            LensFileError: If an artefact is foreign, cut off, too large, or holds anything but plain data.
            RunError: If a saved lens cannot be read.
        """
        path = Path(path)
        if path.suffix == ".pt":
            return cls(**read_artefact(path, MOST_BYTES if most is None else most))
        found = load_result(path.with_suffix("") if path.suffix in (".json", ".safetensors") else path)
        if not isinstance(found, cls):
            raise RunError(f"{path} holds a {type(found).__name__}", "a JacobianLens")
        shapes = {tuple(matrix.shape) for matrix in found.matrices.values()}
        if len(shapes) != 1 or len(set(next(iter(shapes)))) != 1:
            raise LensFileError(f"matrices of shapes {sorted(shapes)} in {path}", "square ones of one width")
        return found

    def export(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the published ``.pt`` artefact, which TransformerLens opens.

        Raises:
            ArgumentError: If the name does not end in .pt, or the dtype cannot hold the matrices.
        """
        if Path(path).suffix != ".pt":
            raise ArgumentError(f"{path}", "a name that ends in .pt")
        told = {f"interp_{key}": self.fingerprint[key] for key in _EXPORTED if key in self.fingerprint}
        metadata = self.metadata or {"estimator": "jacobian_lens", "interp_estimator": ESTIMATOR} | told
        write_artefact(path, self.matrices, self.count, metadata, dtype)

    def transport(self, stream: Float[Tensor, "*rest d_model"], layer: int) -> Float[Tensor, "*rest d_model"]:
        """Return J_l x: a block's output as the last block's.

        Raises:
            ArgumentError: If the lens has no such layer.
        """
        if layer not in self.matrices:
            raise ArgumentError(f"layer {layer}", f"one of {self.layers}")
        matrix = self.matrices[layer].to(stream.device)
        return stream.to(matrix.dtype) @ matrix.T

    @torch.no_grad()
    def readout(
        self, model: Model, prompt: Any, follow: Sequence[str | int] = (), k: int = 5, *,
        layers: Sequence[int] | None = None, positions: Any = None, plan=(),
    ) -> LogitLens:  # fmt: skip
        """Return what each layer says by this lens, softmax(W_U N(J_l x_l) + b_U), and the model's own at the end.

        Args:
            model: The model that the lens was fitted on, or one of the same layers and width.
            prompt: One text, or token ids.
            follow: Tokens whose rank and probability are followed through the layers.
            k: How many of the most likely tokens to keep.
            layers: Some of the lens's; all by default.
            positions: Behind which tokens to read, as `capture` takes them; all by default.
            plan: Interventions under which the model runs.

        Raises:
            ArgumentError: If the lens does not fit the model, has no such layer, or there is more than one prompt.
            PositionError: If a position lies outside the prompt.
            SiteUnavailableError: If the model has no final norm and unembedding.
            TokenError: If a followed token is not exactly one.
        """
        batch, ids = check_readout(model, prompt, follow, k)
        last = model.n_layers - 1
        width = model.bindings.sizes["d_model"]  # type: ignore[union-attr]
        if width != self.width or self.layers[-1] >= last:
            raise ArgumentError(
                f"a lens of width {self.width} up to block {self.layers[-1]}",
                f"one of width {width} with blocks below {last}, as {type(model.module).__name__} has",
            )
        wanted = self.layers if layers is None else list(layers)
        if unknown := [layer for layer in wanted if layer not in self.matrices]:
            raise ArgumentError(f"layer {unknown[0]}", f"one of {self.layers}")
        names = {layer: f"blocks.{layer}.hook_resid_post" for layer in (*wanted, last)}
        places = None if positions is None else batch.positions(positions)[0].tolist()
        acts = capture_streams(model, batch, list(names.values()), plan, places)
        streams = {
            str(layer): acts[name][0] if layer == last else self.transport(acts[name][0], layer)
            for layer, name in names.items()
        }
        return read_streams(model, batch, streams, ids, k, "Jacobian lens", positions=places)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each layer: size of J_l, its distance from the identity, its trace."""
        eye = torch.eye(self.width)
        return [
            {
                "layer": layer, "norm": float(matrix.norm()), "trace": float(matrix.trace()),
                "distance from 1": float((matrix - eye).norm() / eye.norm()),
            }
            for layer, matrix in sorted(self.matrices.items())
        ]  # fmt: skip
