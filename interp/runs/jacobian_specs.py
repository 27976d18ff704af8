"""A run of Jacobians: spectra by layer, tokens compared at layers, and a lens averaged over texts."""

import functools

from pydantic import Field, model_validator

from interp.hooks.model import Model
from interp.jacobians.jacobian import jacobian
from interp.jacobians.layer_spectra import layer_spectra
from interp.lens.fit import FitOptions
from interp.lens.jacobian_lens import JacobianLens
from interp.lens.logit_lens import LogitLens, check_readout, logit_lens
from interp.plots import chart
from interp.runs.drawn import Drawn, save_drawn
from interp.runs.language_specs import Token, language_model
from interp.runs.run import Progress, Run
from interp.runs.specs import Fields, Spec, Work


class LensSpec(Fields):
    """A lens of averaged Jacobians, read on the prompt beside the logit lens.

    Attributes:
        texts: What it is averaged over.
        follow: Tokens whose ranks are followed.
        skip: How many first tokens of each text are left out.
        max_tokens: Where longer texts are cut.
    """

    texts: tuple[str, ...] = Field(min_length=1)
    follow: tuple[Token, ...] = ()
    skip: int = Field(default=16, ge=0)
    max_tokens: int = Field(default=48, ge=2)


class JacobianSpec(Spec):
    """What small changes become, block by block.

    Attributes:
        model: A packaged name, hub id, folder or GGUF file.
        prompt: One text.
        source: Name of a site within a block.
        target: Likewise, behind the source.
        values: How many singular values.
        positions: Tokens of the spectra, each a dense Jacobian at each layer.
        layers: Blocks of which all tokens are compared.
        lens: A lens, or null.
    """

    model: str
    prompt: str = Field(min_length=1)
    source: str = "hook_resid_pre"
    target: str = "hook_resid_post"
    values: int = Field(default=8, ge=1)
    positions: tuple[int, ...] = Field(default=(-1,), min_length=1)
    layers: tuple[int, ...] = ()
    lens: LensSpec | None = None

    @model_validator(mode="after")
    def _names_layers_once(self) -> "JacobianSpec":
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("different layers")
        return self

    def prepare(self, progress: Progress) -> Work:
        """Load the model, and check sites, positions, layers and the lens against it.

        Raises:
            InterpError: If something that a field names does not exist.
        """
        model = language_model(self.model, progress)
        batch = model.batch(self.prompt)
        batch.positions(list(self.positions))
        layers = self.layers or (0,)
        model.resolve([f"blocks.{layer}.{end}" for layer in layers for end in (self.source, self.target)])
        if self.lens is not None:
            check_readout(model, self.prompt, list(self.lens.follow), 5)
            FitOptions.of(model, None, self.lens.skip, self.lens.max_tokens, "auto", None, "2GiB", True)
        return functools.partial(_compute, self, model)


def _compute(spec: JacobianSpec, model: Model, run: Run, step: Progress) -> None:
    """Write ``spectra``, ``similarity-LAYER`` and ``values-LAYER``, ``lens``, ``readout`` and ``logit-lens``."""
    run.record_model("model", model)
    step("spectra by layer")
    spectra = run.once("spectra", lambda: layer_spectra(
        model, spec.prompt, spec.source, spec.target, spec.values, positions=spec.positions
    ))  # fmt: skip
    shown = f"{spec.target} by {spec.source}"
    save_drawn(run, "spectra", "layers", lambda: [Drawn(
        chart(spectra), "Singular values by layer", f"The {spec.values} largest of d {spec.target} / d {spec.source}.",
        "Which directions they belong to.", wide=True,
    )], shown)  # fmt: skip
    for layer in spec.layers:
        step(f"tokens at layer {layer}")
        _tokens(spec, model, run, layer)
    if spec.lens is not None:
        step(f"lens of {len(spec.lens.texts)} texts")
        _lens(spec, spec.lens, model, run)


def _tokens(spec: JacobianSpec, model: Model, run: Run, layer: int) -> None:
    ends = [f"blocks.{layer}.{end}" for end in (spec.source, spec.target)]
    made = lambda how: functools.partial(jacobian, model, spec.prompt, *ends, "same", reduce=how)
    gram = run.once(f"similarity-{layer}", made("gram"))
    run.once(f"values-{layer}", made(f"svd:{spec.values}"))
    names = [row["token"] for row in model.tokens(spec.prompt)]
    save_drawn(run, "tokens", f"layer-{layer}", lambda: [Drawn(
        chart(gram, labels=names), f"Cosine of tokens' Jacobians, layer {layer}", "1: the block does the same to both.",
        "In what they differ.",
    )], f"tokens at layer {layer}")  # fmt: skip


def _lens(spec: JacobianSpec, wanted: LensSpec, model: Model, run: Run) -> None:
    follow = list(wanted.follow)
    fitted: JacobianLens = run.once("lens", lambda: JacobianLens.fit(
        model, wanted.texts, skip=wanted.skip, max_tokens=wanted.max_tokens
    ))  # fmt: skip
    reads: list[tuple[str, LogitLens]] = [
        ("readout", run.once("readout", lambda: fitted.readout(model, spec.prompt, follow))),
        ("logit-lens", run.once("logit-lens", lambda: logit_lens(model, spec.prompt, follow))),
    ]
    titles = {"readout": "Jacobian lens", "logit-lens": "Logit lens"}
    save_drawn(run, "lens", "read", lambda: [
        Drawn(chart(read), titles[name], f"Averaged over {fitted.tokens} tokens of {fitted.count} texts."
              if name == "readout" else "Each layer read as if it were the last.",
              "Whether the model uses what is read there.", wide=True) for name, read in reads
    ], "what layers will say")  # fmt: skip
