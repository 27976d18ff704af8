"""Logistic regressions of many sites, folds and penalties: standardisation, the solver, held-out losses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from interp.probes.logistic_path import solve_path, worth_a_path
from interp.probes.logistic_solver import LogisticSolution, solve_logistic


@dataclass(frozen=True, eq=False)
class SiteFits:
    """Fits of one site for every fold and C. Columns are fold-major: column fold * len(C) + i.

    Attributes:
        weights: [folds, C, logits, d], in raw activation units.
        intercepts: [folds, C, logits].
        loss: [folds, C], mean log-loss on the examples that a fold leaves out; NaN where it leaves out none.
        solution: What the solver says, in columns.
    """

    weights: Float[Tensor, "folds C logits d"] = field(repr=False)
    intercepts: Float[Tensor, "folds C logits"] = field(repr=False)
    loss: Float[Tensor, "folds C"]
    solution: LogisticSolution = field(repr=False)


def fit_sites(
    sites: Sequence[Float[Tensor, "n _"]] | Float[Tensor, "sites n d"],
    labels: Int64[Tensor, "n"],
    train: Float[Tensor, "folds n"],
    C: Sequence[float],
    *,
    standardize: bool = True,
    tol: float = 1e-7,
    max_iter: int = 1000,
    test_weights: Float[Tensor, "n"] | None = None,
) -> list[SiteFits]:
    """Logistic regressions for sites x folds x C: a loop over sites, all folds and C of a site at once.

    Each fold is standardised with its own training part.

    Args:
        sites: Features of each site; widths may differ.
        labels: Class numbers from 0, all present.
        train: Weight of each example in each fold's training part, 0 where it is held out.
        C: Inverse penalties.
        standardize: Whether features are standardised.
        tol: Relative gap of the objective.
        max_iter: Most iterations.
        test_weights: Weight of each example in the held-out loss; 1 by default.

    Example:
        >>> sites = [torch.randn(40, 3), torch.randn(40, 5)]
        >>> y, folds = torch.arange(40) % 2, torch.ones(1, 40).double()
        >>> [tuple(fit.weights.shape) for fit in fit_sites(sites, y, folds, [0.1, 1.0])]
        [(1, 2, 1, 3), (1, 2, 1, 5)]
    """
    test = train.new_ones(train.shape[1]) if test_weights is None else test_weights
    return [_fit_site(site.double(), labels, train, C, standardize, tol, max_iter, test) for site in sites]


def moments_of(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation; 1 for constant features, never below 1e-6 of the median one."""
    total = weights.sum()
    mean = (weights @ features) / total
    std = ((weights @ (features - mean) ** 2) / total).sqrt()
    constant = std <= 1e-12 * (features.abs().amax(0) if len(features) else 1.0)
    mean = torch.where(constant, features[weights.argmax()], mean)  # exactly, so that its weight is exactly 0
    live = std[~constant]
    if len(live):
        std = std.clamp(min=float(live.median()) * 1e-6)
    return mean, torch.where(constant, 1.0, std)


def _fit_site(features, labels, train, C, standardize, tol, max_iter, test) -> SiteFits:
    folds, count = len(train), len(C)
    classes = int(labels.max()) + 1
    train = train.double()
    centre, spread = moments_of(features, train.sum(0))
    if not standardize:
        spread = torch.ones_like(spread)
    z = (features - centre) / spread
    scales = torch.stack([moments_of(z, w)[1] if standardize else torch.ones_like(spread) for w in train], 1)
    penalties = 1 / torch.tensor(list(C), dtype=torch.float64, device=z.device)
    options = {"tol": tol, "max_iter": max_iter}
    if classes == 2 and worth_a_path(*z.shape):
        solution = solve_path(z, labels, train.T, penalties, scales, **options)
    else:
        columns = train.T.repeat_interleave(count, 1), penalties.repeat(folds)
        solution = solve_logistic(z, labels, classes, *columns, scales=scales.repeat_interleave(count, 1), **options)
    loss = _held_out_loss(solution.logits(z), labels, train, test).view(folds, count)
    live = (z != 0).any(0)[:, None, None]
    raw = torch.where(live, solution.weights / spread[:, None, None], 0.0).permute(1, 2, 0)
    intercepts = solution.intercepts - raw @ centre
    shape = (folds, count, -1)
    return SiteFits(raw.reshape(*shape, z.shape[1]), intercepts.reshape(shape), loss, solution)


def _held_out_loss(logits: Tensor, labels: Tensor, train: Tensor, test: Tensor) -> Tensor:
    losses = held_out_losses(logits, labels)
    held = ((train == 0).double() * test).T.repeat_interleave(logits.shape[1] // len(train), 1)
    return (losses * held).sum(0) / held.sum(0)


def held_out_losses(logits: Float[Tensor, "n columns k"], labels: Int64[Tensor, "n"]) -> Float[Tensor, "n columns"]:
    """Log-loss of every example in every column; one logit stands for two classes."""
    if logits.shape[2] == 1:
        logits = torch.cat([-logits / 2, logits / 2], 2)
    index = labels[:, None, None].expand(-1, logits.shape[1], 1)
    return -torch.log_softmax(logits, 2).gather(2, index)[:, :, 0]
