"""Figures: one function finds the drawing by the result's type. Altair is imported when a figure is drawn.

Every figure is an `altair.Chart`: it shows itself in a notebook, saves to HTML, PNG and SVG, and answers clicks.
"""

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from interp.hooks.errors import ArgumentError
from interp.plots.style import visible

if TYPE_CHECKING:
    import altair

__all__ = ["can_draw", "chart", "visible"]

_DRAWN_BY = {
    "AlignmentSweep": ("interp.plots.alignments", "alignments_chart"),
    "Frontier": ("interp.plots.alignments", "frontier_chart"),
    "AttentionPatterns": ("interp.plots.attention", "attention_chart"),
    "LogitLens": ("interp.plots.lens", "lens_chart"),
    "Attribution": ("interp.plots.components", "attribution_chart"),
    "Couplings": ("interp.plots.couplings", "couplings_chart"),
    "PathSearch": ("interp.plots.paths", "paths_chart"),
    "HeadNorms": ("interp.plots.sources", "head_norms_chart"),
    "Votes": ("interp.plots.votes", "votes_chart"),
    "DoseResponse": ("interp.plots.features", "dose_chart"),
    "FeatureVector": ("interp.plots.features", "feature_chart"),
    "LayerSpectra": ("interp.plots.layer_spectra", "spectra_chart"),
    "LinearScope": ("interp.plots.linear", "scope_chart"),
    "BiasReport": ("interp.plots.biases", "bias_chart"),
    "JacobianSummary": ("interp.plots.jacobians", "summary_chart"),
    "JacobianLens": ("interp.plots.jacobians", "jacobian_lens_chart"),
    "RelationScore": ("interp.plots.jacobians", "relation_chart"),
    "SVD": ("interp.plots.spectra", "svd_chart"),
    "TokenBlocks": ("interp.plots.token_blocks", "blocks_chart"),
    "ProbeSweep": ("interp.plots.probes", "sweep_chart"),
    "Calibration": ("interp.plots.evaluation", "calibration_chart"),
    "LearningCurve": ("interp.plots.evaluation", "learning_chart"),
    "TransferMatrix": ("interp.plots.evaluation", "transfer_chart"),
    "PermutationTest": ("interp.plots.evaluation", "permutation_chart"),
    "PatchGrid": ("interp.plots.patching", "patch_chart"),
    "Table": ("interp.plots.bars", "table_chart"),
}


def _home(result: Any) -> tuple[str, str] | None:
    """Module and function that draw a result, by the name of its class or of one that it extends."""
    return next((_DRAWN_BY[c.__name__] for c in type(result).__mro__ if c.__name__ in _DRAWN_BY), None)


def can_draw(result: Any) -> bool:
    """Whether `chart` has a drawing for this type of result."""
    return _home(result) is not None


def chart(result: Any, **options: Any) -> "altair.TopLevelMixin":
    """Return the figure of a result.

    Args:
        result: A LogitLens, AttentionPatterns, an Attribution, HeadNorms, Votes, a LinearScope, a BiasReport, an SVD,
            TokenBlocks, a PatchGrid, a PathSearch, Couplings, a FeatureVector, a DoseResponse, LayerSpectra, a
            ProbeSweep, a Calibration, a LearningCurve, a TransferMatrix, a PermutationTest, a JacobianSummary (singular
            values, gram, norm, trace), a JacobianLens, a RelationScore, an AlignmentSweep or its Frontier, or a Table
            of tokens or classes with their probabilities, or with F x, r and their sum.
        options: Of the figure. LogitLens: ``colour`` ("probability" or "entropy"), ``figure`` ("both", "heat",
            "ranks"), ``position``. Attribution: ``figure`` ("parts", "sources"), ``top``, ``layer`` of sources.
            HeadNorms: ``observable``. Votes of an image: ``picture`` (PNG bytes or a PIL image), ``cell`` (pixels),
            ``percentile``, ``size``. LinearScope: ``figure`` ("parts", "impulse", "receptive", "strip", "pixels",
            "outputs", "votes"), ``at``, ``along``, ``radius``, ``top``, ``cell``, ``size``. BiasReport: ``figure``
            ("bars", "maps"), ``depth``, ``linear``, ``count``, ``columns``, ``size``. SVD: ``figure`` ("values",
            "pairs"), ``count``, ``expected``, ``size``. TokenBlocks: ``of`` ("norms", "contributions"), ``scale``,
            ``percentile``, ``size``. PatchGrid: ``figure`` ("cells", "audit"), ``show`` ("normalised", "effect",
            "value"). PathSearch: ``figure`` ("bars", "agreement"), ``top``. Couplings: ``figure`` ("matrix", "slopes"),
            ``of``. AttentionPatterns: ``head``, ``size``, ``columns``. FeatureVector: ``top``, ``width``. DoseResponse:
            ``width``, ``height``. LayerSpectra: ``height``. JacobianSummary: ``labels``, ``beside`` (of singular
            values: other summaries by name), ``name``. JacobianLens: ``figure`` ("layers", "changes"). RelationScore:
            ``beside`` (other scores by name), ``name``. AlignmentSweep: ``figure`` ("frontier", "grid"), ``site``,
            ``measure``, ``complexity``, ``split``. Table: ``top``. All: ``title``.

    Raises:
        ArgumentError: If there is no figure for this type, or an option is not the figure's.

    Example:
        >>> from interp.hooks.table import Table
        >>> drawn = chart(Table([{"token": " the", "probability": 0.5}]))
        >>> drawn.to_dict()["layer"][0]["mark"]["type"]
        'bar'
    """
    home = _home(result)
    if home is None:
        raise ArgumentError(f"a figure of {type(result).__name__}", f"one of {', '.join(_DRAWN_BY)}")
    draw = getattr(importlib.import_module(home[0]), home[1])
    known = list(inspect.signature(draw).parameters)[1:]
    if wrong := sorted(set(options) - set(known)):
        raise ArgumentError(
            f"option {wrong[0]!r} for a figure of {type(result).__name__}", f"one of {', '.join(known)}"
        )
    return draw(result, **options)
