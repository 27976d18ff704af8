"""The main job: what a language model and an image classifier say, and where it comes from.

On a prompt: next tokens, logit lens, attribution to heads and MLPs, token votes. On a photograph: classes, pixel votes.
Every decomposition is checked to sum to the network's own output.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from interp.attribution.direct import Attribution, direct_attribution
from interp.hooks.attach import load
from interp.hooks.errors import ArgumentError
from interp.hooks.linear_scope import LinearScope
from interp.hooks.model import Model
from interp.hooks.table import Table
from interp.hooks.text import token_id
from interp.hooks.votes import Votes
from interp.lens.logit_lens import logit_lens
from interp.observables.observable import Observable
from interp.predictions import next_tokens
from interp.runs.run import Progress, Run
from interp.runs.scope_specs import open_picture
from interp.runs.specs import Fields, Spec, Work, execute

_TOP = 10


class PromptSpec(Fields):
    """One prompt with the tokens that are compared. An empty foil is the runner-up of the target."""

    prompt: str = Field(min_length=1)
    target: str = ""
    foil: str = ""


class DemoSpec(Spec):
    """What the demo computes."""

    model: str = "smollm2-135m"
    prompts: tuple[PromptSpec, ...] = (
        PromptSpec(prompt="When Mary and John went to the store, John gave a drink to", target=" Mary", foil=" John"),
        PromptSpec(prompt="The Eiffel Tower is in the city of", target=" Paris", foil=" London"),
    )
    image_model: str = "efficientnet-lite0"
    image: str = "sample:china.jpg"

    def prepare(self, progress: Progress) -> Work:
        """Load both models, and check prompts, tokens and the picture.

        Raises:
            InterpError: If a model, token or image is not what it should be.
        """
        progress(f"loading {self.model}")
        language = load(self.model)
        _check_tokens(language, self)
        progress(f"loading {self.image_model}")
        vision = load(self.image_model)
        return functools.partial(_compute, self, language, vision, _pixels(vision, self.image))


def run_demo(spec: DemoSpec, root: str | Path, progress: Progress = lambda _: None) -> Run:
    """Compute the demo and return its finished Run. Inputs are checked before any run folder is made.

    Results: ``prompt-1-next-tokens``, ``-lens``, ``-attribution``, ``-votes`` for each prompt; ``image-classes``,
    ``image-votes``, ``image-margin``; ``completeness``.

    Raises:
        InterpError: If a model, token or image is not what it should be.
    """
    return execute(spec, root, progress)


def _compute(
    spec: DemoSpec, language: Model, vision: Model, pixels: torch.Tensor, run: Run, progress: Progress
) -> None:
    run.record_model("language", language)
    run.record_model("vision", vision)
    rows = []
    for number, prompt in enumerate(spec.prompts, start=1):
        rows += _prompt(run, language, prompt, f"prompt-{number}", progress)
    rows += _image(run, vision, pixels, progress)
    run.save("completeness", Table(rows, "every decomposition against the network's own output"))


def _check_tokens(model: Model, spec: DemoSpec) -> None:
    if model.layout is None or model.layout.unembed is None or model.tokenizer is None:
        raise ArgumentError(f"model {spec.model!r} ({model.family})", "a language model with a tokenizer")
    for prompt in spec.prompts:
        model.batch(prompt.prompt)
        for token in filter(None, (prompt.target, prompt.foil)):
            token_id(model, token)
        if prompt.target and prompt.target == prompt.foil:
            raise ArgumentError(f"target and foil are both {prompt.target!r}", "two different tokens")


def _pixels(model: Model, image: str) -> torch.Tensor:
    if model.preprocess is None or model.labels is None:
        raise ArgumentError(f"image model {model.identity.get('name', '')!r}", "an image classifier with class names")
    return model.preprocess(open_picture(image))


def _prompt(run: Run, model: Model, spec: PromptSpec, name: str, progress: Progress) -> list[dict[str, Any]]:
    progress(f"{name}: next tokens")
    likely = run.once(f"{name}-next-tokens", lambda: next_tokens(model, spec.prompt, _TOP))
    target, foil = _pair(model, spec, [row["id"] for row in likely])
    progress(f"{name}: logit lens")
    run.once(f"{name}-lens", lambda: logit_lens(model, spec.prompt, [target, foil]))
    progress(f"{name}: attribution to heads and MLPs")
    label = f"{model.tokenizer.decode([target])!r} - {model.tokenizer.decode([foil])!r}"
    observable = Observable.logit_diff(model, target, foil, name=label)
    attribution = run.once(f"{name}-attribution", lambda: direct_attribution(model, observable, spec.prompt))
    progress(f"{name}: token votes")
    votes = run.once(f"{name}-votes", lambda: LinearScope(model, spec.prompt, "frozen").votes(target, margin_to=foil))
    return [
        _row(name, "heads + MLPs + embedding + constant", label, attribution),
        _row(name, "token votes + r", label, votes),
    ]


def _pair(model: Model, spec: PromptSpec, likely: list[int]) -> tuple[int, int]:
    """Ids of target and foil; by default the most likely token, and the most likely other one."""
    target = token_id(model, spec.target) if spec.target else likely[0]
    foil = token_id(model, spec.foil) if spec.foil else next(i for i in likely if i != target)
    return target, foil


def _image(run: Run, model: Model, pixels: torch.Tensor, progress: Progress) -> list[dict[str, Any]]:
    progress("image: classes")
    labels = model.labels or []
    scope = LinearScope(model, pixels, "frozen")
    probabilities, ids = torch.softmax(scope.y[0], -1).topk(_TOP)
    rows = [
        {"class": labels[i], "index": i, "logit": float(scope.y[0, i]), "probability": float(p)}
        for i, p in zip(ids.tolist(), probabilities, strict=True)
    ]
    run.save("image-classes", Table(rows))
    run.save_picture("image", model.preprocess.undo(pixels))
    progress("image: pixel votes")
    first, second = ids.tolist()[:2]
    votes = run.once("image-votes", lambda: scope.votes(first))
    margin = run.once("image-margin", lambda: scope.votes(first, margin_to=second))
    rows = [
        _row("image", "pixel votes + r", labels[first], votes),
        _row("image", "pixel votes + r", f"{labels[first]} - {labels[second]}", margin),
    ]
    return [row | {"share of r": found.bias_share} for row, found in zip(rows, (votes, margin), strict=True)]


def _row(where: str, parts: str, of: str, found: Attribution | Votes) -> dict[str, Any]:
    """One check: the network's value, and what is missing of it, relative to all terms and to the value."""
    row: dict[str, Any] = {"where": where, "parts": parts, "of": of}
    if isinstance(found, Votes):
        return row | {
            "value": found.value,
            "completeness error": found.completeness_error,
            "of value": found.value_error,
        }
    missing = abs(found.total - found.measurement) / max(abs(found.measurement), 1e-30)
    row |= {"value": found.measurement, "completeness error": found.completeness_error, "of value": missing}
    return row | ({"note": found.note} if found.note else {})
