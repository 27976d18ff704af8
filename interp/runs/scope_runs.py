"""A run of LinearScope: results, figures with their words, and checks, each written when it is finished."""

import functools
from collections.abc import Sequence
from typing import Any

from interp.attribution.output_parts import output_parts
from interp.hooks.errors import CompletenessError
from interp.hooks.linear_scope import LinearScope
from interp.hooks.model import Model
from interp.hooks.table import Table
from interp.hooks.token_blocks import TokenBlocks
from interp.hooks.votes import BiasReport, Votes
from interp.runs.drawn import Drawn, save_drawn
from interp.runs.run import Progress, Run
from interp.runs.scope_figures import draw_blocks, draw_figure, draw_svd, draw_targets
from interp.runs.scope_specs import FigureSpec, LinearScopeSpec, TargetSpec, box


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
        run.once(f"{name}-outputs", lambda: output_parts(scope))
    found = []
    for n, target in enumerate(_targets(spec, scope, tokens), start=1):
        step(f"{name}: votes {n}")
        names = [f"{name}-votes-{n}", f"{name}-bias-{n}"]
        found.append(tuple(run.once_each(names, functools.partial(_votes, spec, scope, target))))
        rows += _rows(name, *found[-1])
    for n, figure in enumerate(figures, start=1):
        step(f"{name}: figure {figure.figure}")
        save_drawn(
            run, name, f"{n}-{figure.figure}", functools.partial(_drawn, figure, scope, found, run, name, tokens)
        )
    _spectrum(spec, scope, run, name, step)
    _blocks(spec, scope, model, x, run, name, step)
    return rows


def _drawn(
    figure: FigureSpec, scope: LinearScope, found: list[Any], run: Run, name: str, tokens: bool
) -> Sequence[Drawn]:
    if figure.figure in ("votes", "bias", "bias_maps"):
        return draw_targets(figure, found, run.picture(name) if not tokens else None)
    return [draw_figure(figure, scope)]


def _checked(scope: LinearScope, run: Run, name: str, step: Progress) -> dict[str, Any]:
    step(f"{name}: checks")
    checks = run.once(f"{name}-checks", scope.check)
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
    wanted = spec.svd
    found = run.once(f"{name}-svd", lambda: scope.svd(wanted.k, centred=wanted.centred, **windows))
    save_drawn(run, name, "svd", lambda: draw_svd(wanted, found))


def _blocks(
    spec: LinearScopeSpec, scope: LinearScope, model: Model, x: Any, run: Run, name: str, step: Progress
) -> None:
    wanted = spec.token_blocks
    if wanted is None:
        return
    step(f"{name}: token blocks")

    def compute() -> TokenBlocks:
        at = scope
        if wanted.site is not None:
            at = LinearScope(model, x, spec.linearization.made(), output=wanted.site)
        return at.token_blocks(wanted.positions, probes=wanted.probes, seed=wanted.seed)

    found = run.once(f"{name}-blocks", compute)
    save_drawn(run, name, "blocks", lambda: draw_blocks(found, wanted.site or "the logits"))
