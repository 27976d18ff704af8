"""l2 logistic regression of two classes along a path of penalties, all folds at once: L-BFGS around Newton's matrix.

The steps are those of `interp.probes.logistic_solver`, in float64. Their preconditioner is the Hessian of each column,
Z^T W Z + lambda T^2 with W = s p (1 - p), inverted on the side of the examples (Woodbury):

    lambda H^-1  =  T^-2 - T^-2 Z^T R S^-1 R Z T^-2,      S = I + R K R,      R = (W / lambda)^(1/2),  K = Z T^-2 Z^T

K is computed once, so new weights cost one Cholesky factor of S. S is at least I, which lets float32 serve: an error
there costs iterations, not accuracy. A factor is made anew where W / lambda has moved. Each penalty starts at the
minimum of the stronger one before it, and its first step, with that one's factor, follows the tangent of the path.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from interp.probes.logistic_solver import (
    ENOUGH,
    Columns,
    LogisticSolution,
    check_columns,
    solution_of,
    solve_logistic,
    times,
)

MOVED = 0.15
NEGLIGIBLE = 0.4
OWN_SCALE = 0.1
LARGEST = 1e7
APPROACH = 1e-2
WORTH = 2.5
MOST = 2048


@dataclass(frozen=True, eq=False)
class Factor:
    """lambda H^-1 of one column, from W / lambda alone.

    Attributes:
        strength: [n], W / lambda.
        rows: Examples that matter.
        root: R of these rows.
        triangle: Cholesky factor of S.
        coupling: [d], T^-2 Z^T R S^-1 R 1, by which an intercept moves the weights.
        schur: 1^T R S^-1 R 1, the curvature along the intercept that is left, by lambda.
    """

    strength: Tensor
    rows: Tensor
    root: Tensor
    triangle: Tensor
    coupling: Tensor
    schur: Tensor


class PathColumns(Columns):
    """All folds at one penalty after another, with a factor each."""

    def prepare(self, features: Tensor) -> None:
        """Inner products of the examples of each fold, in float32."""
        self.whole, self.scales2 = self.weights, self.ridge[:-1] / self.penalties
        far = (1 / self.scales2 - 1).abs() > OWN_SCALE
        self.near = torch.where(far, self.scales2, 1.0).float()
        self.small = features.float()
        gram = self.small @ self.small.T
        self.parts = [self._own_gram(gram, w, t2) for w, t2 in zip(self.whole.T, self.near.T, strict=True)]
        self.factors: list[Factor] = []
        self.failed = False
        self.last: dict[int, Factor] = {}

    def _own_gram(self, gram: Tensor, weights: Tensor, scales2: Tensor) -> tuple[Tensor, Tensor]:
        """A fold's rows, and their inner products; features of nearly the common scale are taken to have it."""
        rows = weights.nonzero()[:, 0]
        other = (scales2 != 1).nonzero()[:, 0]
        own = gram.index_select(0, rows).index_select(1, rows)
        if len(other):
            z = self.small.index_select(0, rows).index_select(1, other)
            own.addmm_(z * (1 / scales2[other] - 1), z.T)
        return rows, own

    def descent(self) -> Tensor:
        """Where to go from theta, with new factors where the curvatures have moved."""
        strength = self.bend[:, :, 0] / self.penalties
        stale = torch.ones_like(self.columns, dtype=torch.bool)
        if self.factors:
            held = torch.stack([f.strength for f in self.factors], 1)
            stale = (strength - held).abs().sum(0) > MOVED * held.sum(0)
        tangent = self.first and bool(self.factors)
        if bool(stale.any()) and not tangent:
            self._refactor(strength, stale)
        self.fresh = ~stale if tangent else torch.ones_like(stale)
        return super().descent()

    def _refactor(self, strength: Tensor, stale: Tensor) -> None:
        """New factors; what L-BFGS remembers of these columns is void."""
        renewed, columns = stale.tolist(), self.columns.tolist()
        self.factors = [
            self._factor(strength[:, k], column) if renewed[k] else self.factors[k] for k, column in enumerate(columns)
        ]
        self.steps = [torch.where(stale[None, :, None], 0.0, s) for s in self.steps]
        self.changes = [torch.where(stale[None, :, None], 0.0, y) for y in self.changes]

    def certain(self, tol: float, slope: Tensor) -> Tensor:
        """Half the slope is nearly the gap where the factor is of the present curvature."""
        spoilt = ~(slope < 0) & (self._certified_gap() > ENOUGH * self.value)
        self.failed = self.failed or bool(spoilt.any())
        return super().certain(tol, slope) | (self.fresh & (-slope / 2 <= tol * self.value / 3)) | self.failed

    def _factor(self, strength: Tensor, column: int) -> Factor:
        rows, gram = self.parts[column]
        weight = strength[rows] * (gram.diagonal() + 1)
        kept = (weight > NEGLIGIBLE * weight.median().clamp(max=1)).nonzero()[:, 0]
        if len(kept) < len(rows):
            rows, gram = rows[kept], gram.index_select(0, kept).index_select(1, kept)
        root = strength[rows].sqrt().to(gram.dtype)
        inside = (gram * root[:, None]).mul_(root)
        inside.diagonal().add_(1)
        self.failed = self.failed or not float(inside.diagonal().sum()) < LARGEST
        triangle, _ = torch.linalg.cholesky_ex(inside)
        unit = root * torch.cholesky_solve(root[:, None], triangle)[:, 0]
        pulled = self.small.T @ unit.new_zeros(len(strength)).index_copy(0, rows, unit)
        return Factor(strength, rows, root, triangle, pulled / self.near[:, column], unit.sum())

    def _precondition(self, g: Tensor) -> Tensor:
        flat = g[:, :, 0] / self.penalties
        size = flat.abs().amax(0).clamp(min=1e-300)
        scaled, scales2 = (flat / size).to(self.small.dtype), self.near[:, self.columns]
        weights = scaled[:-1] / scales2
        shadow = times(self.small, weights)
        pulled = torch.zeros_like(shadow)
        for k, f in enumerate(self.factors):
            inner = torch.cholesky_solve((f.root * shadow[f.rows, k])[:, None], f.triangle)[:, 0]
            pulled[f.rows, k] = f.root * inner
        weights = weights - times(self.small.T, pulled) / scales2
        coupling = torch.stack([f.coupling for f in self.factors], 1)
        schur = torch.stack([f.schur for f in self.factors])
        intercept = (scaled[-1] - (coupling * scaled[:-1]).sum(0)) / schur
        found = torch.cat([weights - coupling * intercept, intercept[None]])
        return (found.to(g.dtype) * size)[:, :, None]

    def write(self, found: dict[str, Tensor], done: Tensor, iteration: int, tol: float) -> None:
        """Write finished columns to their places, and keep their factors for the next penalty."""
        super().write(found, done, iteration, tol)
        for k in done.nonzero()[:, 0].tolist():
            self.last[int(self.columns[k])] = self.factors[k]

    def keep(self, mask: Tensor) -> None:
        """Go on with these columns alone."""
        super().keep(mask)
        self.factors = [f for f, kept in zip(self.factors, mask.tolist(), strict=True) if kept]

    def minimise(self, penalty: float, theta: Tensor, tol: float, max_iter: int) -> dict[str, Tensor]:
        """The minima of all folds at one penalty, from these weights."""
        count = theta.shape[1]
        self.columns = torch.arange(count, device=theta.device)
        self.weights, self.theta, self.penalties = self.whole, theta, theta.new_full((count,), penalty)
        self.ridge = torch.cat([penalty * self.scales2, theta.new_zeros(1, count)])
        self.z_theta = theta.new_zeros(len(self.z), count, 1)
        self.forget()
        self.factors, self.last = [self.last[k] for k in sorted(self.last)], {}
        self.refresh()
        return self.run(tol, max_iter)


def worth_a_path(n: int, d: int) -> bool:
    """Whether a factor of n examples costs less than the iterations that it saves, as measured on a CPU."""
    return n <= min(WORTH * d, MOST)


def solve_path(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    weights: Float[Tensor, "n folds"],
    penalties: Float[Tensor, "penalties"],
    scales: Float[Tensor, "d folds"],
    *,
    tol: float = 1e-7,
    max_iter: int = 1000,
) -> LogisticSolution:
    """Minimise for every fold and penalty; columns are fold-major.

    From the penalty on where float32 cannot hold a factor (the sum of S's eigenvalues is too large, or a step does not
    descend) `solve_logistic` does the rest.

    Args:
        features: One site, with columns of mean 0 and variance about 1.
        labels: 0 or 1.
        weights: Weight of each example in each fold.
        penalties: lambda = 1/C.
        scales: T, the standard deviations of each fold in the features' units.
        tol: Relative gap of the objective.
        max_iter: Most iterations for each penalty.

    Raises:
        ArgumentError: If a penalty is not positive, or a fold has no weight.
    """
    check_columns(weights, penalties)
    work = PathColumns(features, labels, 2, weights, torch.ones_like(weights[0]), scales)
    theta, made = work.theta, {}
    for penalty in _approach(float(penalties.max()), float(weights.max()) * features.numel()):
        theta = work.minimise(penalty, theta, APPROACH, max_iter)["theta"]
    order = penalties.argsort(descending=True).tolist()
    for place in order:
        found = {} if work.failed else work.minimise(float(penalties[place]), theta, tol, max_iter)
        if work.failed:
            break
        made[place], theta = solution_of(found), found["theta"]
    rest = [place for place in order if place not in made]
    if rest:
        folds, count = weights.shape[1], len(rest)
        columns = weights.repeat_interleave(count, 1), penalties[rest].repeat(folds)
        own = scales.repeat_interleave(count, 1)
        whole = solve_logistic(features, labels, 2, *columns, scales=own, tol=tol, max_iter=max_iter)
        made.update({place: _columns(whole, slice(k, None, count)) for k, place in enumerate(rest)})
    return _fold_major([made[place] for place in range(len(penalties))])


def _columns(solution: LogisticSolution, at: slice) -> LogisticSolution:
    parts = (value[:, at] if name == "weights" else value[at] for name, value in vars(solution).items())
    return LogisticSolution(*parts)


def _fold_major(parts: list[LogisticSolution]) -> LogisticSolution:
    """Column fold * penalties + i, of solutions with a column for each fold."""

    def joined(name: str, axis: int) -> Tensor:
        return torch.stack([getattr(part, name) for part in parts], axis + 1).flatten(axis, axis + 1)

    return LogisticSolution(*(joined(name, int(name == "weights")) for name in vars(parts[0])))


def _approach(penalty: float, size: float) -> list[float]:
    """Stronger penalties to come from: where theta = 0 and W = 1/4 would make S too large."""
    steps = math.ceil(math.log10(max(size / (penalty * LARGEST), 1.0)))
    return [penalty * 10.0**k for k in range(steps, 0, -1)]
