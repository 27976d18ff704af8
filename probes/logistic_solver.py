"""l2 logistic regression for many columns (folds, penalties) of one site at once: preconditioned L-BFGS in torch.

Objective of a column b, with features z, weights s and the scales t of its own fold's standardiser:

    sum_i s_ib CE(y_i, z_i A_b + a_b)  +  1/2 lambda_b sum_j t_jb^2 |A_jb|^2        (the intercept a is not penalised)

Preconditioner: c Z^T Z + lambda I in the eigenbasis of Z^T Z, which all columns share, with c the mean of s p (1 - p)
at the present point. (Böhning's bound, c = 1/4, is far too stiff once the classes are separated.) The line search keeps
Z A and Z D and costs no product with Z. Converged columns leave.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from interp.hooks.errors import ArgumentError

MEMORY = 10
REFRESH = 50
ENOUGH = 1e-9
STALLED = 30


@dataclass(frozen=True, eq=False)
class LogisticSolution:
    """Minimisers, column by column; one logit for two classes, else one for each class.

    Attributes:
        weights: [d, columns, logits], in the units of the features that were given.
        intercepts: [columns, logits].
        objective: [columns].
        gap: [columns], estimated distance of the objective from its minimum.
        iterations: [columns].
        converged: [columns], whether the gap is within the tolerance, or within 1e-9 where that is larger.
    """

    weights: Float[Tensor, "d columns logits"] = field(repr=False)
    intercepts: Float[Tensor, "columns logits"] = field(repr=False)
    objective: Float[Tensor, "columns"]
    gap: Float[Tensor, "columns"]
    iterations: Int64[Tensor, "columns"]
    converged: Bool[Tensor, "columns"]

    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n columns logits"]:
        """Logits of every column."""
        return torch.einsum("nd,dbm->nbm", features, self.weights) + self.intercepts


def solve_logistic(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, "n"],
    classes: int,
    weights: Float[Tensor, "n columns"],
    penalties: Float[Tensor, "columns"],
    *,
    scales: Float[Tensor, "d columns"] | None = None,
    tol: float = 1e-7,
    max_iter: int = 1000,
) -> LogisticSolution:
    """Minimise the objective of every column.

    Args:
        features: One site, best with columns of mean 0 and variance about 1. Computed in their own dtype: float64.
        labels: Class numbers from 0.
        classes: How many there are.
        weights: Weight of each example in each column; 0 where it is not in the column's fold.
        penalties: lambda = 1/C of each column.
        scales: t, the standard deviations of each column's fold in the features' units; 1 by default.
        tol: Relative gap of the objective at which a column is done.
        max_iter: Most iterations; a column that needs more is not converged.

    Raises:
        ArgumentError: If a penalty is not positive, or a column has no weight.

    Example:
        >>> z = torch.tensor([[-1.0], [0.5], [1.0], [-0.5]], dtype=torch.float64)
        >>> y = torch.tensor([0, 1, 1, 0])
        >>> found = solve_logistic(z, y, 2, torch.ones(4, 1).double(), torch.tensor([1.0]).double())
        >>> bool(found.converged.all()), round(float(found.weights), 2)
        (True, 0.94)
    """
    check_columns(weights, penalties)
    work = Columns(features, labels, classes, weights, penalties, scales)
    return solution_of(work.run(tol, max_iter))


def solution_of(found: dict[str, Tensor]) -> LogisticSolution:
    """What `Columns.run` wrote."""
    theta = found["theta"]
    rest = (found[name] for name in ("value", "gap", "iterations", "converged"))
    return LogisticSolution(theta[:-1], theta[-1], *rest)


def check_columns(weights: Float[Tensor, "n columns"], penalties: Float[Tensor, "penalties"]) -> None:
    """Refuse what has no minimum.

    Raises:
        ArgumentError: If a penalty is not positive, or a column has no weight.
    """
    if not bool((penalties > 0).all()) or not bool((weights.sum(0) > 0).all()):
        raise ArgumentError("a penalty or a column's weight that is not positive", "penalties and weights above 0")


class Columns:
    """The columns that are still at work, and what L-BFGS remembers of them. theta: [d + 1, columns, logits]."""

    def __init__(self, features, labels, classes, weights, penalties, scales):
        self.z = torch.cat([features, features.new_ones(len(features), 1)], 1)
        self.labels, self.multi = labels, classes > 2
        self.logits_count = classes if self.multi else 1
        n, count = weights.shape
        self.weights, self.columns = weights, torch.arange(count, device=features.device)
        ones = torch.ones(features.shape[1], count).to(features)
        self.ridge = torch.cat([penalties * (ones if scales is None else scales**2), ones.new_zeros(1, count)])
        self.penalties = penalties
        self.prepare(features)
        self.theta = features.new_zeros(len(self.z.T), count, self.logits_count)
        self.z_theta = features.new_zeros(n, count, self.logits_count)
        self.forget()
        self.evaluate()

    def forget(self) -> None:
        """Start anew from theta."""
        self.steps: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.quiet, self.stalled = torch.zeros_like(self.columns), torch.zeros_like(self.columns)
        self.lowest = torch.full_like(self.penalties, torch.inf)

    def run(self, tol: float, max_iter: int) -> dict[str, Tensor]:
        """Iterate until every column is done."""
        found = self.empty_solution()
        for iteration in range(1, max_iter + 1):
            self.first = iteration == 1
            if iteration % REFRESH == 0:
                self.refresh()
            done = self.step(tol)
            if iteration == max_iter:
                done = torch.ones_like(done)
            if bool(done.any()):
                self.write(found, done, iteration, tol)
                self.keep(~done)
                if not self.columns.numel():
                    break
        return found

    def prepare(self, features: Tensor) -> None:
        """What the preconditioner needs of the features: their eigenbasis."""
        energies, self.basis = torch.linalg.eigh(features.T @ features)
        kept = energies > energies[-1].clamp(min=0) * 1e-12
        self.basis = self.basis[:, kept]
        self.complete = bool(kept.all())
        self.energies = energies[kept] / len(features)

    def evaluate(self) -> None:
        """Objective, gradient, and the curvature along the intercept, at theta."""
        p, loss = self._probabilities(self.z_theta)
        penalty = (self.ridge[:, :, None] * self.theta**2).sum((0, 2)) / 2
        self.value = (self.weights * loss).sum(0) + penalty
        self.gradient = self._pull(self._minus_labels(p)) + self.ridge[:, :, None] * self.theta
        self.bend = self.weights[:, :, None] * p * (1 - p)
        self.intercept_curvature = self.bend.sum(0)
        self.curvature = self.intercept_curvature.sum(1) / max(self.logits_count - 1, 1)

    def refresh(self) -> None:
        """Compute Z theta anew: what the line search adds to it gathers rounding errors."""
        self.z_theta = times(self.z, self.theta)
        self.evaluate()

    def _probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.multi:
            log_p = torch.log_softmax(logits, 2)
            index = self.labels[:, None, None].expand(-1, logits.shape[1], 1)
            return log_p.exp(), -log_p.gather(2, index)[:, :, 0]
        against = (self.labels * -2 + 1)[:, None, None] * logits  # not softplus(logits) - y logits: that drops e^-20
        loss = torch.nn.functional.softplus(against)
        return torch.sigmoid(logits), loss[:, :, 0]

    def _minus_labels(self, p: Tensor) -> Tensor:
        if not self.multi:
            return p - self.labels[:, None, None]
        return p - torch.nn.functional.one_hot(self.labels, self.logits_count)[:, None, :]

    def _pull(self, residual: Tensor) -> Tensor:
        return times(self.z.T, self.weights[:, :, None] * residual)

    def step(self, tol: float) -> Tensor:
        """One iteration for all columns; which of them are done before it, at their present theta."""
        direction = self.descent()
        slope = (self.gradient * direction).sum((0, 2))
        self.gap = torch.minimum(-slope / 2, self._certified_gap())
        self.quiet = torch.where(-slope / 2 <= tol * self.value / 1000, self.quiet + 1, 0)
        self.stalled = torch.where(self.value < self.lowest, 0, self.stalled + 1)
        self.lowest = torch.minimum(self.value, self.lowest)
        done = (self._certified_gap() <= tol * self.value) | self.certain(tol, slope) | (slope >= 0)
        done = done | ((self.stalled >= STALLED) & (self.gap <= ENOUGH * self.value))  # at the floor of rounding
        if bool(done.all()):
            return done
        z_direction = times(self.z, direction)
        length = self._line_search(z_direction, direction, slope)
        length = torch.where(done, 0.0, length)
        step, before = length[None, :, None] * direction, self.gradient
        self.theta, self.z_theta = self.theta + step, self.z_theta + length[None, :, None] * z_direction
        self.evaluate()
        self.steps, self.changes = [*self.steps, step][-MEMORY:], [*self.changes, self.gradient - before][-MEMORY:]
        return done

    def descent(self) -> Tensor:
        """Where to go from theta."""
        return -self._inverse_hessian(self.gradient)

    def certain(self, tol: float, slope: Tensor) -> Tensor:
        """Columns whose own estimate of the gap, half the slope, can be believed to be small enough."""
        return self.quiet >= 3

    def _certified_gap(self) -> Tensor:
        """|g|^2 / (2 x strong convexity): the penalty's for weights, the present curvature for intercepts."""
        ridge = self.ridge[:-1, :, None].clamp(min=1e-300)
        inner = (self.gradient[:-1] ** 2 / ridge).sum((0, 2))
        return (inner + (self.gradient[-1] ** 2 / self.intercept_curvature.clamp(min=1e-300)).sum(1)) / 2

    def _inverse_hessian(self, gradient: Tensor) -> Tensor:
        """The two-loop recursion of L-BFGS around the preconditioner."""
        q, kept = gradient, []
        for s, y in zip(reversed(self.steps), reversed(self.changes), strict=True):
            curvature = (s * y).sum((0, 2))
            rho = torch.where(curvature > 0, 1 / curvature.clamp(min=1e-300), 0.0)
            alpha = rho * (s * q).sum((0, 2))
            q = q - alpha[None, :, None] * y
            kept.append((rho, alpha))
        q = self._precondition(q)
        for (s, y), (rho, alpha) in zip(zip(self.steps, self.changes, strict=True), reversed(kept), strict=True):
            beta = rho * (y * q).sum((0, 2))
            q = q + (alpha - beta)[None, :, None] * s
        return q

    def _precondition(self, g: Tensor) -> Tensor:
        flat = g[:-1].flatten(1)
        coefficients = self.basis.T @ flat
        inside = 1 / (self.energies[:, None] * self.curvature + self.penalties)
        scaled = self.basis @ (coefficients.view(-1, *g.shape[1:]) * inside[:, :, None]).flatten(1)
        if not self.complete:
            scaled = scaled + (
                (flat - self.basis @ coefficients).view(g[:-1].shape) * self.penalties.reciprocal()[:, None]
            ).flatten(1)
        return torch.cat([scaled.view(g[:-1].shape), g[-1:] / self.curvature.clamp(min=1e-300)[:, None]])

    def _line_search(self, z_direction: Tensor, direction: Tensor, slope: Tensor) -> Tensor:
        """Safeguarded Newton steps on the length of the step; a convex function of one number for each column."""
        ridge = self.ridge[:, :, None]
        linear, quadratic = (ridge * self.theta * direction).sum((0, 2)), (ridge * direction**2).sum((0, 2))
        low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
        length = torch.ones_like(slope)
        for _ in range(12):
            p, _ = self._probabilities(self.z_theta + length[None, :, None] * z_direction)
            rise = (self.weights[:, :, None] * self._minus_labels(p) * z_direction).sum((0, 2))
            rise = rise + linear + length * quadratic
            if bool((rise.abs() <= 0.1 * slope.abs()).all()):
                break
            low, high = torch.where(rise < 0, length, low), torch.where(rise > 0, length, high)
            mean = (p * z_direction).sum(2)  # the variance of the direction's logits under p; for two classes p (1 - p)
            bend = (p * z_direction**2).sum(2) - mean**2
            newton = length - rise / ((self.weights * bend).sum(0) + quadratic).clamp(min=1e-300)
            middle = torch.where(torch.isfinite(high), (low + high) / 2, 2 * low.clamp(min=0.5))
            outside = (newton <= low) | (newton >= high) | (newton > 10 * length)
            moved = torch.where(outside, middle, newton)
            length = torch.where(rise.abs() <= 0.1 * slope.abs(), length, moved)
        return length

    def empty_solution(self) -> dict[str, Tensor]:
        """Where finished columns are written."""
        whole = torch.zeros_like(self.value)
        flags = torch.zeros_like(self.columns)
        return {"theta": torch.zeros_like(self.theta), "value": whole, "gap": whole.clone(),
                "iterations": flags, "converged": flags.bool()}  # fmt: skip

    def write(self, found: dict[str, Tensor], done: Tensor, iteration: int, tol: float) -> None:
        """Write finished columns to their places."""
        at = self.columns[done]
        found["theta"][:, at], found["value"][at] = self.theta[:, done], self.value[done]
        found["gap"][at], found["iterations"][at] = self.gap[done], iteration
        found["converged"][at] = self.gap[done] <= max(tol, ENOUGH) * self.value[done]

    def keep(self, mask: Tensor) -> None:
        """Go on with these columns alone."""
        for name in (
            "columns",
            "value",
            "penalties",
            "curvature",
            "intercept_curvature",
            "quiet",
            "gap",
            "stalled",
            "lowest",
        ):
            setattr(self, name, getattr(self, name)[mask])
        for name in ("weights", "ridge", "theta", "z_theta", "gradient", "bend"):
            setattr(self, name, getattr(self, name)[:, mask])
        self.steps, self.changes = [s[:, mask] for s in self.steps], [y[:, mask] for y in self.changes]


def times(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix @ columns over the first axis; few columns go through BLAS several times faster as rows."""
    flat = columns.flatten(1)
    return (flat.T @ matrix.T).T.reshape(len(matrix), *columns.shape[1:])
