"""Figures of a run of LinearScope, each with its words: what is drawn, what one sees, what it does not show."""

from typing import TYPE_CHECKING

from interp.hooks.linear_scope import LinearScope
from interp.hooks.spectra import SVD
from interp.hooks.token_blocks import TokenBlocks
from interp.hooks.votes import BiasReport, Votes
from interp.plots import chart
from interp.plots.style import legible, signed
from interp.runs.drawn import Drawn

if TYPE_CHECKING:
    from interp.runs.scope_specs import FigureSpec, SVDSpec

_LOCAL = "F and r belong to this input: they are no statement about another one."


def draw_figure(spec: "FigureSpec", scope: LinearScope) -> Drawn:
    """Return a figure of the scope itself."""
    name = spec.figure
    if name == "outputs":
        return Drawn(
            chart(scope, figure="outputs", top=spec.top), "What F x and what r say",
            "Each score without its mean over all outputs, as the linear part of the input, the constants, and their "
            "sum; the largest of each is full in colour.",
            f"Which constants, and which part of the input. {_LOCAL}", wide=True,
        )  # fmt: skip
    if name == "classes":
        return Drawn(
            chart(scope, figure="votes", top=spec.top), "Votes and rows of the largest classes",
            "Above, what each cell of the picture votes for a class and for the margin of the first two; below, the "
            "rows of F, summed over colours. Each line has one scale.",
            f"r, which votes do not hold. {_LOCAL}", wide=True,
        )  # fmt: skip
    if name == "parts":
        share = float(scope.r.norm() / scope.y.norm())
        return Drawn(
            chart(scope, size=220), "The output, and its two parts",
            f"The reference, the network's output y, F x and r on one scale. ‖r‖ is {share:.2g} of ‖y‖.",
            f"Where r comes from. {_LOCAL}", wide=True,
        )  # fmt: skip
    return _local(spec, scope)


def _local(spec: "FigureSpec", scope: LinearScope) -> Drawn:
    """Figures around a pixel."""
    if spec.figure == "strip":
        drawn = chart(scope, figure="strip", along=spec.along, radius=spec.radius, size=130)
        return Drawn(
            drawn, "Columns along a moving pixel",
            "What each framed input pixel projects into the output, on one scale: how the kernel follows what lies "
            "around the pixel.", f"Single colours: pixels are white. {_LOCAL}", wide=True,
        )  # fmt: skip
    column = spec.figure == "impulse"
    title = f"{'Column' if column else 'Row'} of F at {tuple(spec.at or ())}"
    sees = "what the framed input pixel projects into the output" if column else "what the framed output pixel reads"
    drawn = chart(scope, figure=spec.figure, at=spec.at, radius=spec.radius, size=180)
    return Drawn(drawn, title, f"On the right, {sees}.", f"Other pixels. {_LOCAL}", wide=True)


def draw_targets(spec: "FigureSpec", found: list[tuple[Votes, BiasReport]], picture: bytes | None) -> list[Drawn]:
    """Return a figure for each target: its votes, or what its r is made of."""
    draw = {"votes": _votes, "bias": _bias, "bias_maps": _maps}[spec.figure]
    return [drawn for pair in found if (drawn := draw(spec, *pair, picture)) is not None]


def _votes(spec: "FigureSpec", votes: Votes, report: BiasReport, picture: bytes | None) -> Drawn:
    options = {"picture": picture, "size": 410} if votes.map.ndim == 2 else {}
    parts = f"Votes sum to {signed(votes.total)} (in absolute values {votes.abs_total:,.1f})"
    return Drawn(
        chart(votes, **options), f"Votes for {legible(votes.target)}",
        f"{parts}, constants give r = {signed(votes.residual)}, together {signed(votes.value)}. Origin of the input "
        f"space: {votes.origin}.",
        "What would happen if the input were another: all decisions are held as they are.",
    )  # fmt: skip


def _bias(spec: "FigureSpec", votes: Votes, report: BiasReport, picture: bytes | None) -> Drawn | None:
    if not len(report.values):
        return None
    sizes = float(report.values.abs().sum())
    return Drawn(
        chart(report, linear=votes.total), f"Constants in {legible(report.target)}",
        f"What each module's constants put into the output, and F x. Constants sum to {signed(report.residual)}, in "
        f"absolute values to {sizes:,.1f}.", "Where in the picture the constants act.",
    )  # fmt: skip


def _maps(spec: "FigureSpec", votes: Votes, report: BiasReport, picture: bytes | None) -> Drawn | None:
    if not any(each.ndim == 2 and each.numel() > 1 for each in report.maps):
        return None
    return Drawn(
        chart(report, figure="maps", count=spec.count), f"Where constants speak for {legible(report.target)}",
        "The modules whose constants' maps are largest in absolute values, in the order in which they run, on one "
        "scale, with each module's sum.", "Modules with smaller maps, and constants behind the last pooling.",
        wide=True,
    )  # fmt: skip


def draw_svd(spec: "SVDSpec", svd: SVD) -> list[Drawn]:
    """Return the curve of singular values and, of pictures, the first pairs of vectors."""
    worst = float(svd.residuals.max())
    drawn = [
        Drawn(
            chart(svd, expected=spec.expected), "Singular values",
            f"The {len(svd.s)} largest, from {float(svd.s[0]):.3g} to {float(svd.s[-1]):.3g}; residuals are at most "
            f"{worst:.0e}.", "The rest of the spectrum.",
        )
    ]  # fmt: skip
    if svd.u.ndim == svd.v.ndim == 4:
        drawn.append(
            Drawn(
                chart(svd, figure="pairs", count=spec.pairs, size=130), "Singular vectors",
                "Above, what is read from the input; below, what is written to the output, σ times as large.",
                "Vectors of nearly equal values mix: their kind counts, not each by itself.", wide=True,
            )
        )  # fmt: skip
    return drawn


def draw_blocks(blocks: TokenBlocks, site: str) -> list[Drawn]:
    """Return heat maps of norms and of contributions."""
    silent = "Which direction a block acts in: see the votes for what reaches one answer."
    return [
        Drawn(
            chart(blocks), f"Blocks of F up to {site}",
            "How much each token's embedding could move the stream at each position. Blocks ahead of a position are "
            "exactly zero in a causal model.", silent,
        ),
        Drawn(
            chart(blocks, of="contributions"), f"What each token contributes up to {site}",
            "The size of what a token's own embedding puts in at each position.", silent,
        ),
    ]  # fmt: skip
