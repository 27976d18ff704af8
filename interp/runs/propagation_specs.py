"""What a run of observable propagation computes: observables, attributions, couplings, feature vectors, paths."""

import functools
from typing import Literal

from pydantic import Field, model_validator

from interp.attribution.units import Detail
from interp.hooks.model import Model
from interp.observables.observable import Observable
from interp.propagation.propagate import propagate
from interp.runs.language_specs import ObservableSpec, TextsSpec, language_model
from interp.runs.run import Progress
from interp.runs.scope_specs import LinearizationSpec
from interp.runs.specs import Fields, Spec, Work


class DatasetSpec(Fields):
    """Means of attributions over many prompts, with standard errors.

    Attributes:
        prompts: The prompts.
        unit: ``component``, ``head``, ``kv_head`` or ``neuron``, or two as in ``head+neuron``.
        batch_size: How many run together.
    """

    prompts: TextsSpec
    unit: str = "head"
    batch_size: int = Field(default=16, ge=1)


class CouplingsSpec(Fields):
    """Couplings of every pair of observables along some paths.

    Attributes:
        paths: Data-free paths; without any, single heads.
        heads: How many: those with the largest data-free norms of the first observable.
        texts: Whose activations slopes are measured on.
        exclude_positions: Positions that are left out of them.
    """

    paths: tuple[str, ...] = ()
    heads: int = Field(default=4, ge=1)
    texts: TextsSpec | None = None
    exclude_positions: tuple[int, ...] = (0,)


class VectorSpec(Fields):
    """A feature vector of each observable, along a path or at a site.

    Attributes:
        path: As in ``L9H1@3 -> L13H11@5``.
        site: A site with a position, for the total vector.
        prompt: Where one linearises; without one, the data-free form.
        linearization: What is held; the method's own by default.
        top: How many tokens score highest and lowest.
    """

    path: str | None = None
    site: str | None = None
    prompt: str | None = Field(default=None, min_length=1)
    linearization: LinearizationSpec | None = None
    top: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _has_one_place(self) -> "VectorSpec":
        if (self.path is None) == (self.site is None):
            raise ValueError("either path or site")
        return self


class SearchSpec(Fields):
    """A beam search for paths, with the exact effect of each."""

    clean: str = Field(min_length=1)
    corrupt: str | None = Field(default=None, min_length=1)
    beam: int = Field(default=10, ge=1)
    max_length: int = Field(default=3, ge=1)
    score: Literal["linear", "attribution", "patch"] = "linear"
    sign: Literal["abs", "positive", "negative"] = "abs"
    top: int = Field(default=15, ge=1)

    @model_validator(mode="after")
    def _fits_its_score(self) -> "SearchSpec":
        if (self.score == "attribution") != (self.corrupt is None):
            raise ValueError("a corrupt prompt for the scores linear and patch, none for attribution")
        return self


class PropagationSpec(Spec):
    """Where observables come from, and what reads them.

    Attributes:
        model: A packaged name, hub id, folder or GGUF file.
        observables: What is measured.
        prompts: Each observable is attributed to the parts of the model on each.
        unit: How finely: as for `direct_attribution`; ``source`` shows which token each head reads.
        position: Whose next-token logits.
        norms: Whether data-free norms of all heads are computed.
        dataset: Attribution over many prompts.
        couplings: Between observables.
        vectors: Feature vectors.
        search: Paths that carry the first observable.
    """

    model: str
    observables: tuple[ObservableSpec, ...] = Field(min_length=1)
    prompts: tuple[str, ...] = ()
    unit: str = "source"
    position: int = -1
    norms: bool = False
    dataset: DatasetSpec | None = None
    couplings: CouplingsSpec | None = None
    vectors: tuple[VectorSpec, ...] = ()
    search: SearchSpec | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> "PropagationSpec":
        if not (self.prompts or self.norms or self.dataset or self.couplings or self.vectors or self.search):
            raise ValueError("at least one of prompts, norms, dataset, couplings, vectors, search")
        if self.couplings and len(self.observables) < 2:
            raise ValueError("two observables or more for couplings")
        if not all(self.prompts):
            raise ValueError("prompts that are not empty")
        return self

    def prepare(self, progress: Progress) -> Work:
        """Load the model, and check every token, prompt, path and site against it.

        Raises:
            InterpError: If something that a field names does not exist.
        """
        from interp.runs.propagation_runs import compute

        model = language_model(self.model, progress)
        observables = [one.made(model) for one in self.observables]
        progress("checking prompts and paths")
        self._check(model, observables)
        return functools.partial(compute, self, model, observables)

    def _check(self, model: Model, observables: list[Observable]) -> None:
        Detail.of(self.unit)
        for prompt in self.prompts:
            model.batch(prompt).positions(self.position)
        if self.dataset is not None:
            Detail.of(self.dataset.unit)
        for path in self.couplings.paths if self.couplings else ():
            propagate(model, observables[0], path=path)
        for one in self.vectors:
            vector(model, observables[0], one)
        for prompt in filter(None, (self.search.clean, self.search.corrupt) if self.search else ()):
            model.batch(prompt)


def vector(model: Model, observable: Observable, spec: VectorSpec):
    """The feature vector that a specification asks for.

    Raises:
        InterpError: If the path or site does not exist.
    """
    held = None if spec.linearization is None else spec.linearization.made()
    return propagate(model, observable, spec.prompt, path=spec.path, site=spec.site, linearization=held)
