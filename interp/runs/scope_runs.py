"""A run of LinearScope: results, figures with their words, and checks, each written when it is finished."""

from typing import Any

from interp.attribution.output_parts import output_parts
from interp.hooks.errors import CompletenessError
from interp.hooks.linear_scope import LinearScope
from interp.hooks.model import Model
from interp.hooks.table import Table
from interp.hooks.votes import BiasReport, Votes
from interp.runs.drawn import save_drawn
from interp.runs.run import Progress, Run
from interp.runs.scope_figures import draw_blocks, draw_figure, draw_svd, draw_targets
from interp.runs.scope_specs import LinearScopeSpec, TargetSpec, box


def compute(spec: LinearScopeSpec, model: Model, inputs: list[Any], run: Run, step: Progress) -> None:
    """Write, for each input, ``input-1-checks``, ``-outputs``, ``-votes-1``, ``-bias-1``, ``-svd``, ``-blocks``.

    Raises:
        InterpError: If the network cannot be linearised around an input, or a check does not hold.
    """
    run.record_model("scoped", model)
    rows: list[dict[str, Any]] = []
    for number, x in enumerate(inputs):
        rows += _one(spec, model, number, x, run, step)
        run.save("completeness", Table(rows, "every decomposition against the network's own output"))


def _one(spec: LinearScopeSpec, model: Model, number: int, x: Any, run: Run, step: Progress) -> list[dict[str, Any]]:
    name, tokens = f"input-{number + 1}", spec.inputs[number].text is not None
    step(f"{name}: F and r")
    scope = LinearScope(
        model, x, spec.linearization.made(), output=spec.output, origin=spec.origin_for(model)
    )  # fmt: skip
    if not tokens:
        run.save_picture(name, model.preprocess.undo(x))
    rows = [_checked(scope, run, name, step)]
    figures = spec.figures_of(number, scope.y, tokens)
    if scope.y.ndim in (2, 3):
        run.save(f"{name}-outputs", output_parts(scope))
    found = []
    for n, target in enumerate(_targets(spec, scope, tokens), start=1):
        step(f"{name}: votes {n}")
        found.append(_votes(spec, scope, target))
        run.save(f"{name}-votes-{n}", found[-1][0])
        run.save(f"{name}-bias-{n}", found[-1][1])
        rows += _rows(name, *found[-1])
    for n, figure in enumerate(figures, start=1):
        step(f"{name}: figure {figure.figure}")
        if figure.figure in ("votes", "bias", "bias_maps"):
            drawn = draw_targets(figure, found, run.picture(name) if not tokens else None)
        else:
            drawn = [draw_figure(figure, scope)]
        save_drawn(run, name, f"{n}-{figure.figure}", drawn)
    _spectrum(spec, scope, run, name, step)
    _blocks(spec, scope, model, x, run, name, step)
    return rows


def _checked(scope: LinearScope, run: Run, name: str, step: Progress) -> dict[str, Any]:
    step(f"{name}: checks")
    checks = scope.check()
    run.save(f"{name}-checks", checks)
    broken = [row for row in checks if not row["holds"]]
    if broken:
        raise CompletenessError(
            f"{broken[0]['check']}: {broken[0]['error']:.1e}", f"at most {broken[0]['tolerance']:.0e}",
            "the linearisation missed something in this network",
        )  # fmt: skip
    error = max(row["error"] for row in checks if row["check"].startswith("completeness"))
    return {"where": name, "parts": "F x + r", "of": "every output", "completeness error": error}


def _targets(spec: LinearScopeSpec, scope: LinearScope, tokens: bool) -> tuple[TargetSpec, ...]:
    """Those of the specification; else the largest output and its margin to the next; none for pictures."""
    if spec.targets or scope.y.ndim not in (2, 3) or (scope.y.ndim == 3) != tokens:
        return spec.targets
    scores = scope.y[0, -1] if tokens else scope.y[0]
    first, second = scores.topk(2).indices.tolist()
    return TargetSpec(target=first), TargetSpec(target=first, margin_to=second)


def _votes(spec: LinearScopeSpec, scope: LinearScope, target: TargetSpec) -> tuple[Votes, BiasReport]:
    pair, options = (target.target, target.margin_to), {"position": target.position, "centred": target.centred}
    return scope.votes(*pair, **options, stability=spec.stability), scope.bias_report(*pair, **options)


def _rows(name: str, votes: Votes, report: BiasReport) -> list[dict[str, Any]]:
    return [
        {
            "where": name, "parts": "votes + r", "of": votes.target, "value": votes.value,
            "completeness error": votes.completeness_error, "of value": votes.value_error,
            "share of r": votes.bias_share,
        },
        {
            "where": name, "parts": "r by call", "of": report.target, "value": report.residual,
            "completeness error": report.completeness_error,
        },
    ]  # fmt: skip


def _spectrum(spec: LinearScopeSpec, scope: LinearScope, run: Run, name: str, step: Progress) -> None:
    if spec.svd is None:
        return
    step(f"{name}: singular vectors")
    windows = {"window": box(spec.svd.window), "input_window": box(spec.svd.input_window)}
    found = scope.svd(spec.svd.k, centred=spec.svd.centred, **windows)
    run.save(f"{name}-svd", found)
    save_drawn(run, name, "svd", draw_svd(spec.svd, found))


def _blocks(
    spec: LinearScopeSpec, scope: LinearScope, model: Model, x: Any, run: Run, name: str, step: Progress
) -> None:
    wanted = spec.token_blocks
    if wanted is None:
        return
    step(f"{name}: token blocks")
    if wanted.site is not None:
        scope = LinearScope(model, x, spec.linearization.made(), output=wanted.site)
    found = scope.token_blocks(wanted.positions, probes=wanted.probes, seed=wanted.seed)
    run.save(f"{name}-blocks", found)
    save_drawn(run, name, "blocks", draw_blocks(found, wanted.site or "the logits"))
