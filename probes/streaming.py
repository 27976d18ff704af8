"""Logistic regressions of stores that do not fit in memory: two kinds of pass over the blocks of a site.

The first pass gathers moments: the standardiser of each fold and the preconditioner of the solver. Each further pass is
one evaluation of objective and gradient of every fold and C at once, for L-BFGS with backtracking. The objective, the
recursion and the certificate of convergence are those of `interp.probes.logistic_solver`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.probes.erasure import LeaceFitter
from interp.probes.inner_folds import label_folds
from interp.probes.linear import C_GRID, LogisticProbe
from interp.probes.logistic_solver import ENOUGH, MEMORY, Columns, LogisticSolution, solution_of
from interp.probes.site_fits import held_out_losses
from interp.probes.site_moments import Block, Source, readers
from interp.probes.tokens import Pool

_ARMIJO = 1e-4
_SHORTEST = 1e-10
Blocks = Callable[[], Iterator[Block]]


def stream_probes(
    data: Source, y: Any, *, sites: Sequence[str] | None = None, pool: Pool = "mean",
    C: float | int | Literal["cv"] = "cv", grid: Sequence[float] = C_GRID, groups: Any = None, folds: int = 5,
    budget: int | str = "1GiB", tol: float = 1e-7, max_iter: int = 500, seed: int = 0,
) -> dict[str, LogisticProbe]:  # fmt: skip
    """Fit a `LogisticProbe` at every site without holding the activations of any in memory.

    Site by site, block by block: memory is that of one block, of one site's moments and of what L-BFGS remembers, and
    does not grow with the number of examples, but for their labels and folds. Each pass reads a site once; twenty to
    a hundred passes are usual, more for weak penalties.

    Args:
        data: An `ActivationStore`, or a mapping from site to activations [n, d].
        y: A label for each example.
        sites: Which; by default all.
        pool: Of a store: ``mean``, ``last``, ... (not ``tokens``).
        C: Inverse penalty, or ``cv`` to choose it from ``grid`` on held-out log-loss.
        grid: Values of C to choose from.
        groups: [n]: inner folds keep a group together; give equal texts one group.
        folds: Inner folds.
        budget: Most bytes of a block with what is computed from it.
        tol: Relative gap of the objective.
        max_iter: Most passes of a fit.
        seed: Of the inner folds.

    Raises:
        ArgumentError: If lengths differ, there is one class, or a choice is not legal.
        SizeError: If the budget does not hold a site's moments.

    Example:
        >>> y = [0, 1] * 20
        >>> found = stream_probes({"late": torch.randn(40, 5) + torch.tensor(y)[:, None]}, y, C=0.1)
        >>> found["late"].converged_
        True
    """
    number = not isinstance(C, (str, bool)) and C > 0
    if (not number and C != "cv") or pool == "tokens":
        raise ArgumentError(f"C={C!r}, pool={pool!r}", "a positive number or 'cv', and one vector for each example")
    names, index = np.unique(np.asarray(y.cpu() if isinstance(y, Tensor) else y), return_inverse=True)
    labels = torch.as_tensor(index.astype(np.int64))
    if len(names) < 2:
        raise ArgumentError(f"y holds 1 class: {names.tolist()}", "at least 2 classes")
    fold = None if number else label_folds(labels, groups, folds, seed)
    found = {}
    columns = (1 if number else folds * len(grid)) * (len(names) if len(names) > 2 else 1)
    for site, width, blocks in readers(data, len(labels), sites, str(pool), budget, columns):
        probe = LogisticProbe(C, pool=pool, grid=tuple(grid), folds=folds, random_state=seed, tol=tol)
        probe.classes_, probe.n_features_in_, probe.skip_first_ = names, width, False
        if fold is not None:
            losses = stream_fits(blocks, labels, fold, list(grid), tol=max(tol, 1e-7), max_iter=max_iter)[1]
            probe.inner_loss_ = losses.numpy()
        probe.C_ = float(C) if number else float(grid[int(probe.inner_loss_.mean(0).argmin())])
        (solution, _, centre, spread) = stream_fits(blocks, labels, None, [probe.C_], tol=tol, max_iter=max_iter)
        probe._set_raw(solution.weights[:, 0].T, solution.intercepts[0], centre, spread)
        probe.n_iter_, probe.converged_ = int(solution.iterations), bool(solution.converged)
        probe.objective_ = float(solution.objective)
        found[site] = probe
    return found


def stream_fits(
    blocks: Blocks,
    labels: Int64[Tensor, "n"],
    fold: Int64[Tensor, "n"] | None,
    C: Sequence[float],
    *,
    tol: float = 1e-7,
    max_iter: int = 500,
) -> tuple[LogisticSolution, Float[Tensor, "folds C"], Float[Tensor, "d"], Float[Tensor, "d"]]:
    """Fits of one site for every fold and C, their held-out losses, and the centre and spread of their features.

    Args:
        blocks: Reads the site: row numbers and activations.
        labels: Class numbers from 0.
        fold: The fold that each example is held out of, -1 for none; None for one fit on all examples.
        C: Inverse penalties.
        tol: Relative gap of the objective.
        max_iter: Most passes.
    """
    count = 1 if fold is None else int(fold.max()) + 1
    moments = LeaceFitter(range(int(labels.max()) + 1))
    folds = _FoldScales(count)
    for rows, values in blocks():
        moments.update(values, labels[rows])
        folds.update(values.double(), None if fold is None else fold[rows])
    n, centre, covariance, *_ = moments.moments()
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    spread = _floored(deviation, centre)
    scales = torch.stack([_floored(s, centre) for s in folds.deviations()], 1) / spread[:, None]
    problem = Streamed(blocks, labels, fold, centre, spread, covariance / torch.outer(spread, spread), n)
    columns = StreamedColumns(problem, 1 / torch.tensor(list(C), dtype=torch.float64).repeat(count),
                              scales.repeat_interleave(len(C), 1))  # fmt: skip
    solution = columns.solve(tol, max_iter)
    solution.weights[deviation <= 1e-12 * centre.abs()] = 0.0
    loss = problem.held_out(solution).view(count, len(C)) if fold is not None else torch.full((1, len(C)), torch.nan)
    return solution, loss, centre, spread


def _floored(std: Tensor, mean: Tensor) -> Tensor:
    """Standard deviations as `LogisticProbe` takes them: 1 for constant features, never below 1e-6 of the median."""
    constant = std <= 1e-12 * mean.abs()
    live = std[~constant]
    return torch.where(constant, 1.0, std.clamp(min=float(live.median()) * 1e-6 if len(live) else 0.0))


class _FoldScales:
    """Variances of each fold's training part, streamed as mean and centred squares (Chan's merge)."""

    def __init__(self, count: int):
        self.count, self.n = count, torch.zeros(count, 1, dtype=torch.float64)
        self.mean = self.squares = torch.zeros(count, 1, dtype=torch.float64)

    def update(self, values: Float[Tensor, "m d"], fold: Tensor | None) -> None:
        """Add a block."""
        inside = torch.ones(1, len(values)) if fold is None else fold != torch.arange(self.count)[:, None]
        inside = inside.double()
        n = inside.sum(1, keepdim=True)
        mean = inside @ values / n.clamp(min=1)
        squares = torch.stack([w @ (values - m) ** 2 for w, m in zip(inside, mean, strict=True)])
        total, gap = (self.n + n).clamp(min=1), mean - self.mean
        self.squares = self.squares + squares + gap**2 * self.n * n / total
        self.mean, self.n = self.mean + gap * n / total, self.n + n

    def deviations(self) -> Float[Tensor, "folds d"]:
        """Standard deviations."""
        return (self.squares / self.n).sqrt()


class Streamed:
    """One site as the solver sees it: standardised blocks with their labels and fold weights."""

    def __init__(self, blocks: Blocks, labels: Tensor, fold: Tensor | None, centre, spread, correlation, n: int):
        self.blocks, self.labels, self.fold, self.n = blocks, labels, fold, n
        self.centre, self.spread, self.correlation = centre, spread, correlation
        self.folds = 1 if fold is None else int(fold.max()) + 1
        self.classes = int(labels.max()) + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """z [m, d + 1] with ones behind, labels [m], weights [m, folds]."""
        for rows, values in self.blocks():
            z = (values.double() - self.centre) / self.spread
            train = torch.ones(len(rows), 1, dtype=torch.float64)
            if self.fold is not None:
                train = (self.fold[rows][:, None] != torch.arange(self.folds)).double()
            yield torch.cat([z, z.new_ones(len(z), 1)], 1), self.labels[rows], train

    def held_out(self, solution: LogisticSolution) -> Float[Tensor, "columns"]:
        """Mean log-loss of every column on what its fold leaves out."""
        theta = torch.cat([solution.weights, solution.intercepts[None]])
        total = held = 0.0
        for z, labels, train in self:
            out = (1 - train).repeat_interleave(theta.shape[1] // self.folds, 1)
            losses = held_out_losses((z @ theta.flatten(1)).view(len(z), *theta.shape[1:]), labels)
            total, held = total + (losses * out).sum(0), held + out.sum(0)
        return torch.as_tensor(total / held)


class StreamedColumns(Columns):
    """The columns of `Columns` on data that come in blocks: a step is one pass, and may be taken back."""

    def __init__(self, problem: Streamed, penalties: Tensor, scales: Tensor):
        self.problem, classes, count = problem, problem.classes, len(penalties)
        self.multi, self.logits_count = classes > 2, classes if classes > 2 else 1
        self.columns = torch.arange(count)
        self.fold = self.columns // (count // problem.folds)
        self.penalties = penalties
        self.ridge = torch.cat([penalties * scales**2, scales.new_zeros(1, count)])
        energies, self.basis = torch.linalg.eigh(problem.correlation)
        kept = energies > energies[-1].clamp(min=0) * 1e-12
        self.energies, self.basis, self.complete = energies[kept], self.basis[:, kept], bool(kept.all())
        self.theta = torch.zeros(len(scales) + 1, count, self.logits_count, dtype=torch.float64)
        self.quiet = self.stalled = torch.zeros(count, dtype=torch.int64)
        self.length = torch.ones(count, dtype=torch.float64)
        self.steps, self.changes = [], []
        self.value, self.gradient, self.curvature, self.intercept_curvature = self.evaluated(self.theta)
        self.gap = torch.full_like(self.value, torch.inf)
        self.direction = -self._inverse_hessian(self.gradient)

    def evaluated(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objective, gradient, mean curvature and that of the intercepts, by one pass."""
        value, gradient = theta.new_zeros(theta.shape[1]), self.ridge[:, :, None] * theta
        curvature = theta.new_zeros(theta.shape[1:])
        for z, labels, train in self.problem:
            self.labels, self.weights = labels, train[:, self.fold]
            p, loss = self._probabilities((z @ theta.flatten(1)).view(len(z), *theta.shape[1:]))
            value = value + (self.weights * loss).sum(0)
            weighted = self.weights[:, :, None] * self._minus_labels(p)
            gradient = gradient + (z.T @ weighted.flatten(1)).view(theta.shape)
            curvature = curvature + (self.weights[:, :, None] * p * (1 - p)).sum(0)
        value = value + (self.ridge[:, :, None] * theta**2).sum((0, 2)) / 2
        return value, gradient, curvature.sum(1) / max(self.logits_count - 1, 1), curvature

    def solve(self, tol: float, max_iter: int) -> LogisticSolution:
        """Iterate until every column is done, or the passes are used up."""
        found = self.empty_solution()
        for iteration in range(1, max_iter + 1):
            done = self.step(tol)
            done = done | (iteration == max_iter)
            if bool(done.any()):
                self.write(found, done, iteration, tol)
                self.keep(~done)
                if not self.columns.numel():
                    break
        return solution_of(found)

    def step(self, tol: float) -> Tensor:
        """Try the present step of every column; which of them are done."""
        slope = (self.gradient * self.direction).sum((0, 2))
        self.gap = torch.minimum(-slope / 2, self._certified_gap())
        self.quiet = torch.where((-slope / 2 <= tol * self.value / 1000) & (self.length == 1), self.quiet + 1, 0)
        done = (self._certified_gap() <= tol * self.value) | (self.quiet >= 3) | (slope >= 0)
        done = done | ((self.length < _SHORTEST) & (self.gap <= ENOUGH * self.value))
        if bool(done.all()):
            return done
        step = self.length[None, :, None] * self.direction
        value, gradient, curvature, intercepts = self.evaluated(self.theta + step)
        slack = 1e-13 * self.value
        taken = (value <= self.value + _ARMIJO * self.length * slope + slack) & ~done
        bend = (value - self.value - self.length * slope).clamp(min=1e-300)
        shorter = (-slope * self.length**2 / (2 * bend)).clamp(0.1 * self.length, 0.5 * self.length)
        keep = taken[None, :, None]
        self.steps = [*self.steps, torch.where(keep, step, 0.0)][-MEMORY:]
        self.changes = [*self.changes, torch.where(keep, gradient - self.gradient, 0.0)][-MEMORY:]
        self.theta = torch.where(keep, self.theta + step, self.theta)
        self.gradient = torch.where(keep, gradient, self.gradient)
        self.value = torch.where(taken, value, self.value)
        self.curvature = torch.where(taken, curvature, self.curvature)
        self.intercept_curvature = torch.where(taken[:, None], intercepts, self.intercept_curvature)
        self.direction = torch.where(keep, -self._inverse_hessian(self.gradient), self.direction)
        self.length = torch.where(taken, 1.0, shorter)
        return done

    def keep(self, mask: Tensor) -> None:
        """Go on with these columns alone."""
        for name in ("columns", "fold", "value", "penalties", "curvature", "intercept_curvature", "quiet", "gap",
                     "length"):  # fmt: skip
            setattr(self, name, getattr(self, name)[mask])
        for name in ("ridge", "theta", "gradient", "direction"):
            setattr(self, name, getattr(self, name)[:, mask])
        self.steps, self.changes = [s[:, mask] for s in self.steps], [y[:, mask] for y in self.changes]
