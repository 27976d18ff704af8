"""Fit of a Jacobian lens: one prompt after another, in running float64 sums that survive a kill."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.hooks import guards
from interp.hooks.budget import bytes_of
from interp.hooks.errors import (
    ArgumentError,
    CompletenessError,
    InputError,
    MetaWeightsError,
    NonFiniteError,
    RunError,
    SiteUnavailableError,
    SizeError,
    UnknownFamilyError,
)
from interp.hooks.examples import each_example
from interp.hooks.inputs import Batch
from interp.hooks.model import Model
from interp.jacobians.chain import find_steps
from interp.jacobians.checks import FallbackWarning, tolerance
from interp.jacobians.costs import LIVE
from interp.jacobians.graph import Recording
from interp.jacobians.places import End, find_ends
from interp.jacobians.plan import probes_within, readable
from interp.jacobians.stream_sweep import StreamSweep
from interp.store.files import model_record

NO_CLOSED_FORM = (SiteUnavailableError, UnknownFamilyError, MetaWeightsError)
METHODS, PRECISIONS = ("auto", "closed", "autograd"), (None, "float32", "float64", "bf16")


@dataclass(frozen=True)
class FitOptions:
    """How prompts become matrices.

    Attributes:
        layers: Blocks whose outputs are the sources.
        skip: How many first tokens of each prompt are left out.
        max_tokens: Where prompts are cut.
        method: ``auto``, ``closed`` or ``autograd``.
        precision: None, ``float32``, ``float64`` or ``bf16``.
        budget: Bytes.
        check: Whether the first prompt's closed form is compared with autograd.
    """

    layers: tuple[int, ...]
    skip: int
    max_tokens: int
    method: str
    precision: str | None
    budget: int
    check: bool

    @classmethod
    def of(
        cls, model: Model, layers: Sequence[int] | None, skip: int, max_tokens: int, method: str, precision: str | None,
        budget: int | str, check: bool,
    ) -> "FitOptions":  # fmt: skip
        """Check what was asked for.

        Raises:
            ArgumentError: If an option is out of range.
            SiteUnavailableError: If the model is no decoder with one residual stream.
            TrainModeError: If dropout is live.
        """
        if model.layout is None or model.layout.post_ln or model.layout.modality != "tokens" or model.n_layers < 2:
            raise SiteUnavailableError(
                f"a Jacobian lens of {type(model.module).__name__} ({model.family})",
                "a decoder whose branches are added to one residual stream, with two blocks or more",
            )
        guards.refuse_training(model.module)
        guards.refuse_inference_mode()
        last = model.n_layers - 1
        found = tuple(range(last)) if layers is None else tuple(layers)
        if not found or len(set(found)) < len(found) or not all(_whole(i) and 0 <= i < last for i in found):
            raise ArgumentError(f"layers={layers!r}", f"different blocks in 0..{last - 1}: block {last} needs no lens")
        if not _whole(skip) or not _whole(max_tokens) or skip < 0 or max_tokens < skip + 2:
            raise ArgumentError(f"skip={skip!r}, max_tokens={max_tokens!r}", "skip of 0 or more, max_tokens > skip + 1")
        if method not in METHODS or precision not in PRECISIONS:
            raise ArgumentError(
                f"method={method!r}, precision={precision!r}",
                f"one of {', '.join(METHODS)}; one of {', '.join(str(p) for p in PRECISIONS)}",
            )
        if method == "autograd" and precision is not None:
            raise ArgumentError(f"precision={precision!r} with method='autograd'", "None: autograd runs in the model's")
        return cls(tuple(sorted(found)), skip, max_tokens, method, precision, bytes_of(budget), check)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class LensSums:
    """Running sums over prompts.

    Attributes:
        totals: By layer, the sum of prompts' matrices in float64 [d, d].
        prompts: SHA-256 of each prompt's tokens, in order.
        tokens: How many positions were averaged over.
        changes: By how much each prompt moved the mean, relative to it, over all layers.
        fingerprint: What two fits must share to be one.
    """

    totals: dict[int, Float[Tensor, "d d"]]
    prompts: list[str] = field(default_factory=list)
    tokens: int = 0
    changes: list[float] = field(default_factory=list)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def add(self, matrices: dict[int, Tensor], prompt: str, tokens: int) -> None:
        """Add one prompt's matrices; the mean moves by (J_n - mean_{n-1})/n."""
        before, moved, size = len(self.prompts), 0.0, 0.0
        for layer, total in self.totals.items():
            new = matrices[layer].double()
            step = (new - total / before if before else new) / (before + 1)
            total += new
            moved += float(step.square().sum())
            size += float(total.square().sum()) / (before + 1) ** 2
        self.prompts.append(prompt)
        self.tokens += tokens
        self.changes.append((moved / max(size, 1e-300)) ** 0.5)

    def write(self, path: Path) -> None:
        """Write all of it as one file, in place of the last one."""
        record = {"prompts": self.prompts, "tokens": self.tokens, "changes": self.changes}
        text = json.dumps(record | {"fingerprint": self.fingerprint})
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file({str(k): v for k, v in self.totals.items()}, str(temporary), {"lens": text})
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path, fingerprint: dict[str, Any]) -> "LensSums":
        """Read what `write` wrote.

        Raises:
            RunError: If it is no such file, or of a fit with another fingerprint.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                record = json.loads((file.metadata() or {})["lens"])
                totals = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error})", "a checkpoint of a lens", "remove the file") from error
        if differing := differences(record["fingerprint"], fingerprint):
            raise RunError(
                f"{path} of a fit that differs in {differing}", "a checkpoint of the same fit",
                "give checkpoint= another name",
            )  # fmt: skip
        return cls(dict(sorted(totals.items())), record["prompts"], record["tokens"], record["changes"], fingerprint)


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Names of the entries in which two fingerprints differ, with their values."""
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return ", ".join(f"{n} ({str(one.get(n))[:24]}, {str(other.get(n))[:24]})" for n in names)


def fingerprint(model: Model, options: FitOptions) -> dict[str, Any]:
    """What two fits must share: model, weights, estimator and settings."""
    record = model_record(model)
    same = {key: record[key] for key in ("class", "config_sha256", "weights_sha256", "dtype")}
    how = {"skip": options.skip, "max_tokens": options.max_tokens, "precision": options.precision or "default"}
    return same | how | {"layers": list(options.layers), "estimator": ESTIMATOR, "d_model": _width(model)}


# Keywords of a forward call that say no more than the tokens do, padding left out.
_OF_TOKENS = {"input_ids", "attention_mask", "use_cache"}

ESTIMATOR = "summed over targets, averaged over sources"


def _width(model: Model) -> int:
    return model.bindings.sizes["d_model"]  # type: ignore[union-attr]


def read_prompts(model: Model, texts: Iterable[Any], options: FitOptions) -> tuple[list[Batch], int]:
    """Return prompts that are long enough, cut behind their last source, and how many were too short.

    Raises:
        ArgumentError: If one text stands in place of a list, or none is long enough.
        InputError: If an entry is not one prompt.
    """
    if isinstance(texts, (str, Tensor)) and getattr(texts, "ndim", 1) < 2:
        raise ArgumentError(f"one prompt {texts!r:.40}", "a list of texts, or of rows of token ids")
    found, short = [], 0
    for text in texts:
        batch = model.batch(text)
        if batch.size != 1 or batch.ids is None:
            raise InputError(f"{batch.size} prompts in one entry", "one text, or one row of token ids, in each")
        guards.refuse_cache(batch.kwargs)
        (batch,) = each_example(model, batch)
        if own := sorted(batch.kwargs.keys() - _OF_TOKENS):
            raise InputError(f"{own[0]} beside a prompt", "tokens, and a mask of padding", f"leave {own[0]} out")
        # The last token predicts nothing that is known, and no position before it depends on it.
        assert batch.ids is not None
        ids = batch.ids[:, : options.max_tokens][:, :-1]
        if ids.shape[1] <= options.skip:
            short += 1
        else:
            found.append(model.batch(ids))
    if not found:
        raise ArgumentError(
            f"{short} prompts of at most {options.skip + 1} tokens", f"prompts of more than {options.skip + 1} tokens",
            "give longer texts, or a smaller skip=",
        )  # fmt: skip
    return found, short


def fit_sums(
    model: Model, texts: Iterable[Any], options: FitOptions, checkpoint: str | Path | None, until: float | None
) -> LensSums:
    """Return the sums over all prompts, or over as many as it takes to settle.

    Raises:
        RunError: If a checkpoint is of another fit, or of other prompts.
    """
    prompts, short = read_prompts(model, texts, options)
    if short:
        warnings.warn(f"{short} prompts of at most {options.skip + 1} tokens were left out", stacklevel=4)
    same = fingerprint(model, options)
    path = None if checkpoint is None else Path(checkpoint)
    d = _width(model)
    sums = LensSums({i: torch.zeros(d, d, dtype=torch.float64) for i in options.layers}, fingerprint=same)
    if path is not None and path.is_file():
        sums = LensSums.read(path, same)
    hashes = [hashlib.sha256(str(batch.ids.tolist()).encode()).hexdigest() for batch in prompts]  # type: ignore
    if sums.prompts != hashes[: len(sums.prompts)]:
        raise RunError(f"{path} of {len(sums.prompts)} other prompts", "the prompts it began with, in the same order")
    prompt_matrices = PromptJacobians(model, options)
    for batch, digest in list(zip(prompts, hashes, strict=True))[len(sums.prompts) :]:
        if until is not None and len(sums.changes) > 3 and max(sums.changes[-3:]) < until:
            break
        sums.add(prompt_matrices(batch), digest, batch.lengths[0] - options.skip)
        if path is not None:
            sums.write(path)
    if path is not None and path.is_file():
        path.unlink()
    return sums


class PromptJacobians:
    """Matrices of one prompt: (1/|V|) Σ_{t, t' in V} d x_last[t'] / d x_l[t], V the positions from ``skip`` on.

    Args:
        model: A decoder.
        options: How.
    """

    def __init__(self, model: Model, options: FitOptions):
        self.model, self.options = model, options
        names = [f"blocks.{i}.hook_resid_post" for i in (*options.layers, model.n_layers - 1)]
        known = model.bindings.by_address  # type: ignore[union-attr]
        *self.sources, self.target = (End(model.resolve(name)[0][0], known[name]) for name in names)
        first, last, _, _ = find_ends(model, names[0], names[-1])
        devices = guards.devices_named(model.module)
        self.steps = None if options.method == "autograd" or devices else find_steps(model, first, last)
        self.unchecked = options.check
        if self.steps is None and options.method == "closed":
            where = f" with parameters on several devices, {devices}" if devices else ""
            raise ArgumentError(
                f"method='closed' for {model.family}{where}", "a decoder of known blocks, on one device",
                "method='auto' runs autograd",
            )  # fmt: skip

    def __call__(self, batch: Batch) -> dict[int, Float[Tensor, "d d"]]:
        """By layer, output index first."""
        found = self._closed(batch) if self.steps is not None else None
        if found is not None and self.unchecked:
            error = self._error(batch, found)
            # Products in bfloat16 are checked against what they can do.
            allowed = 5e-2 if self.options.precision == "bf16" else tolerance(self.model)
            self.unchecked = False
            if not error <= allowed:
                found = self._refused(f"the closed form of this lens is off by {error:.1e} from autograd")
        found = self._by_autograd(batch) if found is None else found
        for layer, matrix in found.items():
            if not torch.isfinite(matrix).all():
                raise NonFiniteError(f"the Jacobian of block {layer} holds NaN or infinity", "finite derivatives")
        return found

    def _refused(self, message: str, error: Exception | None = None) -> None:
        if self.options.method == "closed" or self.options.precision is not None:
            raise CompletenessError(message, "a closed form that fits", "method='autograd'") from error
        warnings.warn(f"{message}; autograd is used instead", FallbackWarning, stacklevel=6)
        self.steps = None

    def _closed(self, batch: Batch) -> dict[int, Tensor] | None:
        options, span = self.options, slice(self.options.skip, batch.lengths[0])
        assert self.steps is not None
        try:
            sweep = StreamSweep(self.model, batch, self.steps, span, options.precision == "bf16")
            if options.precision in ("float32", "float64"):
                sweep.use(getattr(torch, options.precision))
            rows = self._rows(sweep)
            d, n = _width(self.model), span.stop - span.start
            found = {i: torch.empty(d, d, dtype=sweep.dtype) for i in options.layers}
            eye = torch.eye(d, dtype=sweep.dtype, device=self.model.device)
            for start in range(0, d, rows):
                some = eye[start : start + rows]
                for below, state in sweep.run(some.expand(n, -1, -1)):
                    if below - 1 in found:
                        found[below - 1][start : start + rows] = state.mean(0)
        except NO_CLOSED_FORM as error:
            self._refused(f"no closed form: {error}", error)
            return None
        return found

    def _rows(self, sweep: StreamSweep) -> int:
        """How many covectors fit the budget at once, beside the sums and one layer's tables."""
        d, each = _width(self.model), sweep.bytes_each()
        fixed = sweep.bytes_fixed() + 12 * len(self.options.layers) * d * d
        if fixed + each > self.options.budget:
            least, length = fixed + each, sweep.ref.length
            raise SizeError(
                f"a lens over {length} tokens needs {readable(least)}, the budget is {readable(self.options.budget)}",
                f"budget={least} or more", f"or max_tokens below {length}; or fewer layers=",
            )  # fmt: skip
        return min(d, (self.options.budget - fixed) // each)

    def _by_autograd(self, batch: Batch) -> dict[int, Tensor]:
        recording = Recording(self.model, batch, self.sources, self.target)
        output, d = recording.output, _width(self.model)
        chunk = min(32, probes_within(self.options.budget, LIVE * output.nbytes * len(self.sources)))
        found = {i: output.new_empty(d, d, device="cpu") for i in self.options.layers}
        for start in range(0, d, chunk):
            seeds = output.new_zeros(min(chunk, d - start), *output.shape)
            for row in range(len(seeds)):
                seeds[row, :, self.options.skip :, start + row] = 1.0
            for layer, grads in zip(self.options.layers, recording.pull(seeds), strict=True):
                found[layer][start : start + len(seeds)] = grads[:, 0, self.options.skip :].mean(1)
        return found

    def _error(self, batch: Batch, found: dict[int, Tensor]) -> float:
        """Largest relative difference, over layers, of one random covector's pull from autograd's."""
        recording = Recording(self.model, batch, self.sources, self.target)
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(_width(self.model), generator=generator, dtype=torch.float64)
        seeds = torch.zeros_like(recording.output)[None]
        seeds[:, :, self.options.skip :] = w.to(seeds)
        error = 0.0
        for layer, grads in zip(self.options.layers, recording.pull(seeds), strict=True):
            wanted = grads[0, 0, self.options.skip :].double().mean(0).cpu()
            made = w @ found[layer].double().cpu()
            gap = float((made - wanted).norm() / wanted.norm().clamp(min=1e-30))
            error = max(error, gap if gap == gap else float("inf"))
        return error
