"""Ridge regression of many targets at once: all penalties from one decomposition, the best by exact leave-one-out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp.probes.site_fits import moments_of


class RidgeFit(NamedTuple):
    """Coefficients in standardised units, and what they were chosen by.

    Attributes:
        coef: [targets, d].
        centre: [targets], weighted means of the targets.
        mean: [d].
        std: [d].
        alpha: The chosen penalty.
        errors: Mean squared leave-one-out error of each penalty.
    """

    coef: Float[Tensor, "targets d"]
    centre: Float[Tensor, "targets"]
    mean: Float[Tensor, "d"]
    std: Float[Tensor, "d"]
    alpha: float
    errors: list[float]


def fit_ridge(
    vectors: Float[Tensor, "n d"], targets: Float[Tensor, "n targets"], weights: Float[Tensor, "n"],
    alphas: Sequence[float], standardize: bool, members: list[Tensor] | None,
) -> RidgeFit:  # fmt: skip
    """Least squares with an l2 penalty, the intercept free; alpha by leave-one-out, or by leaving ``members`` out."""
    mean, std = moments_of(vectors, weights)
    std = std if standardize else torch.ones_like(std)
    z = (vectors - mean) / std
    centre = (weights @ targets) / weights.sum()
    root = weights.sqrt()[:, None]
    left, sizes, right = torch.linalg.svd(root * z, full_matrices=False)
    along = left.T @ (root * (targets - centre))
    errors = [_left_out(a, left, sizes, along, targets - centre, root, members) for a in alphas]
    alpha = alphas[min(range(len(errors)), key=errors.__getitem__)]
    coef = right.T @ ((sizes / (sizes**2 + alpha))[:, None] * along)
    return RidgeFit(coef.T, centre, mean, std, alpha, errors)


def _left_out(
    alpha: float, left: Tensor, sizes: Tensor, along: Tensor, targets: Tensor, root: Tensor,
    members: list[Tensor] | None,
) -> float:  # fmt: skip
    shrink = sizes**2 / (sizes**2 + alpha)
    fitted = (left @ (shrink[:, None] * along)) / root
    if members is None:
        leverage = (left**2 @ shrink) / root[:, 0] ** 2 + 1 / (root**2).sum()
        error = (targets - fitted) / (1 - leverage).clamp(min=1e-12)[:, None]
    else:
        error = torch.empty_like(targets)
        for rows in members:
            part, weight = left[rows], root[rows]
            hat = (part * shrink) @ part.T + weight @ weight.T / (root**2).sum()
            rest = torch.eye(len(rows), dtype=hat.dtype, device=hat.device) - hat
            error[rows] = torch.linalg.solve(rest, weight * (targets - fitted)[rows]) / weight
    return float((root**2 * error**2).mean(1).sum() / (root**2).sum())
