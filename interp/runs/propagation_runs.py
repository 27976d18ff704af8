"""A run of observable propagation: results and figures with their words, each written when it is finished."""

import functools
from typing import Any

from interp.attribution.data import attribute_dataset
from interp.attribution.direct import Attribution, direct_attribution
from interp.attribution.head_norms import head_norms
from interp.hooks.model import Model
from interp.hooks.table import Table
from interp.observables.observable import Observable
from interp.plots import chart
from interp.plots.style import legible, signed
from interp.propagation.couplings import Couplings, couplings
from interp.propagation.path_search import find_paths
from interp.runs.drawn import Drawn, save_drawn
from interp.runs.propagation_specs import PropagationSpec, VectorSpec, vector
from interp.runs.run import Progress, Run

_HELD = "Attention patterns and divisors are those of this prompt: why a head looks where it looks stays unseen."


def compute(spec: PropagationSpec, model: Model, observables: list[Observable], run: Run, step: Progress) -> None:
    """Write ``prompt-1-attribution-1``, ``norms``, ``dataset``, ``couplings``, ``vector-1-1``, ``paths``.

    Raises:
        InterpError: If contributions do not sum to what is measured, or the model lacks what is asked for.
    """
    run.record_model("model", model)
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate(spec.prompts, start=1):
        step(f"prompt {number}: attribution")
        rows += _prompt(spec, model, observables, f"prompt-{number}", prompt, run)
    if spec.norms:
        step("data-free norms of all heads")
        _norms(model, observables, run)
    if spec.dataset is not None:
        step("attribution over prompts")
        rows += _dataset(spec, model, observables, run)
    if spec.couplings is not None:
        step("couplings")
        _couplings(spec, model, observables, run)
    for number, one in enumerate(spec.vectors, start=1):
        step(f"feature vectors {number}")
        _vectors(model, observables, one, f"vector-{number}", run)
    if spec.search is not None:
        step("search for paths")
        _search(spec, model, observables[0], run)
    if rows:
        run.save("completeness", Table(rows, "every decomposition against the network's own output"))


def _prompt(
    spec: PropagationSpec, model: Model, observables: list[Observable], name: str, prompt: str, run: Run
) -> list[dict[str, Any]]:
    names = [f"{name}-attribution-{number}" for number in range(1, len(observables) + 1)]
    attribute = functools.partial(direct_attribution, model, observables, prompt, spec.unit, position=spec.position)
    rows = []
    for number, one in enumerate(run.once_each(names, attribute), start=1):
        save_drawn(run, name, f"attribution-{number}", [_parts(one)], prompt)
        if one.sources is not None:
            save_drawn(run, name, f"sources-{number}", [_sources(one)], prompt)
        rows.append(_complete(name, one))
    return rows


def _complete(where: str, found: Attribution) -> dict[str, Any]:
    row = {"where": where, "parts": f"parts by {found.unit}", "of": found.observable, "value": found.measurement}
    return row | {"completeness error": found.completeness_error} | ({"note": found.note} if found.note else {})


def _parts(found: Attribution) -> Drawn:
    top = found.top(1)[0]
    return Drawn(
        chart(found), f"What each part adds to {legible(found.observable)}",
        f"All parts sum to the measurement, {signed(found.measurement)}. The largest is {top['component']}, "
        f"{signed(top['value'])}.", f"What a part adds by way of later parts: see the paths. {_HELD}", wide=True,
    )  # fmt: skip


def _sources(found: Attribution) -> Drawn:
    return Drawn(
        chart(found, figure="sources"), f"Which tokens heads read for {legible(found.observable)}",
        "A head's contribution, split by the token that it reads; the heads with the largest single tokens.",
        f"What the tokens' streams hold of other tokens. {_HELD}", wide=True,
    )  # fmt: skip


def _norms(model: Model, observables: list[Observable], run: Run) -> None:
    found = run.once("norms", lambda: head_norms(model, observables))
    drawn = [
        Drawn(
            chart(found, observable=i), f"Heads by their weights alone: {legible(name)}",
            "Norm of the vector by which each head reads its normalised input for this observable: the standard "
            "deviation of its score on random inputs.", "Whether a head ever attends to what carries the feature.",
        )
        for i, name in enumerate(found.observables)
    ]  # fmt: skip
    save_drawn(run, "norms", "heads", drawn, "Heads without data")


def _dataset(spec: PropagationSpec, model: Model, observables: list[Observable], run: Run) -> list[dict[str, Any]]:
    wanted = spec.dataset
    assert wanted is not None
    prompts = wanted.prompts.made()
    options: dict[str, Any] = {"unit": wanted.unit, "batch_size": wanted.batch_size}
    found = run.once("dataset", lambda: attribute_dataset(model, observables, prompts, **options))
    means = [found.attribution(i) for i in range(len(observables))]
    drawn = [
        Drawn(
            chart(one), f"Mean of each part over {found.n:,} prompts: {legible(one.observable)}",
            f"Means sum to the mean measurement, {signed(one.measurement)}. Standard errors are in the result.",
            "Prompts in which a part does the opposite of its mean.", wide=True,
        )
        for one in means
    ]  # fmt: skip
    save_drawn(run, "dataset", "means", drawn, f"{len(prompts):,} prompts")
    return [_complete("dataset", one) for one in means]


def _couplings(spec: PropagationSpec, model: Model, observables: list[Observable], run: Run) -> None:
    wanted = spec.couplings
    assert wanted is not None
    texts = None if wanted.texts is None else wanted.texts.made()

    def compute() -> Couplings:
        paths = wanted.paths or [row["component"] for row in head_norms(model, observables[0]).top(wanted.heads)]
        return couplings(model, observables, paths, texts, exclude_positions=wanted.exclude_positions)

    found = run.once("couplings", compute)
    save_drawn(run, "couplings", "figure", _drawn_couplings(found), "Couplings between observables")


def _drawn_couplings(found: Couplings) -> list[Drawn]:
    silent = "Cosines of the readouts themselves, which the pairs may share already: they are in the table."
    drawn = [
        Drawn(
            chart(found), "Coupling coefficients",
            "C(row → column): an input that scores 1 on the row's vector is expected to score this on the column's.",
            silent, wide=True,
        ),
        Drawn(
            chart(found, of="cosine"), "Cosines of feature vectors",
            "How alike the two observables' vectors are along each path.", silent, wide=True,
        ),
    ]  # fmt: skip
    if found.slopes is None:
        return drawn
    predicted = Drawn(
        chart(found, figure="slopes"), "Predicted and measured slopes",
        f"Coefficients come from weights alone, slopes from {found.n:,} activations.",
        "Pairs of low cosine are not expected to lie on the line.",
    )  # fmt: skip
    return [*drawn, predicted]


def _vectors(model: Model, observables: list[Observable], wanted: VectorSpec, name: str, run: Run) -> None:
    rows: list[dict[str, Any]] = []
    for number, observable in enumerate(observables, start=1):
        found = run.once(f"{name}-{number}", functools.partial(vector, model, observable, wanted))
        rows += found.to_records()
        if model.bindings is not None and model.bindings.sizes["d_model"] == len(found.vector):
            run.save(f"{name}-{number}-tokens", found.top_tokens(wanted.top))
    run.save(f"{name}-table", Table(rows, wanted.path or wanted.site or ""))


def _search(spec: PropagationSpec, model: Model, observable: Observable, run: Run) -> None:
    wanted = spec.search
    assert wanted is not None
    options: dict[str, Any] = {"beam": wanted.beam, "max_length": wanted.max_length, "score": wanted.score}
    options |= {"sign": wanted.sign, "position": spec.position}
    found = run.once("paths", lambda: find_paths(model, observable, wanted.clean, wanted.corrupt, **options))
    drawn = Drawn(
        chart(found, top=wanted.top), f"Paths that carry {legible(found.observable)}",
        "How much the measurement drops when only what flows along a path is replaced, exactly and to first order.",
        f"Paths that the beam of {wanted.beam} did not keep. {_HELD}", wide=True,
    )  # fmt: skip
    save_drawn(run, "paths", "found", [drawn], wanted.clean)
