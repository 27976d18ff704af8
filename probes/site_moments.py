"""Closed-form probes of many sites from one pass over their activations: mass-mean, LDA, ridge, and LEACE.

All of them are functions of the same first and second moments, which a pass gathers block by block (Chan's merge, in
float64). Memory is that of one site's moments and one block, whatever the number of examples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from interp.hooks.budget import bytes_of
from interp.hooks.errors import ArgumentError, SizeError
from interp.probes.erasure import LabelledMoments, LeaceEraser, LeaceFitter, oas
from interp.probes.estimator import as_array, check_lengths
from interp.probes.linear import LDAProbe, MassMeanProbe, RidgeProbe, two_rows_to_one
from interp.store.store import ActivationStore

Source = ActivationStore | Mapping[str, Any]
Block = tuple[Int64[Tensor, "m"], Float[Tensor, "m d"]]
ALPHAS = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
_COPIES = 8  # float64 matrices of a block, or of a site's moments, that live at once
_REMEMBERED = 32  # vectors that L-BFGS holds for each logit


@dataclass(frozen=True, eq=False)
class ClosedForms:
    """Fitted probes of one site.

    Attributes:
        mass_mean: As `MassMeanProbe` fits it.
        lda: As `LDAProbe` fits it with a number as shrinkage; its covariance is shrunk as a whole.
        ridge: As `RidgeProbe` fits it with its ``alpha_``.
        eraser: The LEACE eraser, if it was asked for.
    """

    mass_mean: MassMeanProbe
    lda: LDAProbe
    ridge: RidgeProbe
    eraser: LeaceEraser | None = None


def closed_forms(
    data: Source, y: Any, *, sites: Sequence[str] | None = None, pool: str = "mean",
    shrinkage: float | int | Literal["oas"] = "oas", alpha: float | int | Literal["gcv"] = "gcv", erasers: bool = False,
    budget: int | str = "1GiB",
) -> dict[str, ClosedForms]:  # fmt: skip
    """Fit closed-form probes at every site, reading each activation once.

    With m the mean, S the covariance, W the covariance within classes, and mu_k, p_k mean and share of class k:

        mass-mean   mu_1 - mu_0                                        LDA     ((1 - s) W + s T)^-1 (mu_1 - mu_0)
        ridge       (n R + alpha)^-1 n Cov(z, t)                       LEACE   see `LeaceEraser`

    R is the correlation, z the standardised activation, t the targets of ±1. A number s shrinks W towards a multiple of
    the identity, as scikit-learn does; ``oas`` shrinks its correlations by Chen et al.'s amount. ``gcv`` takes the
    alpha of least generalised cross-validation error (Golub, Heath, Wahba 1979): RSS / (1 - tr H / n)^2. It looks at
    examples one by one: with groups give a number, or fit `RidgeProbe`.

    These are fits on all the examples given: for held-out scores fit on training parts, or use `sweep`.

    Args:
        data: An `ActivationStore`, or a mapping from site to activations [n, d].
        y: A label for each example; for ``tokens`` each token has its example's.
        sites: Which; by default all.
        pool: Of a store: ``mean``, ``last``, ... or ``tokens``.
        shrinkage: Of LDA.
        alpha: Of ridge.
        erasers: Whether LEACE erasers are made as well (an eigendecomposition in float64 each).
        budget: Most bytes beside the labels and the index of the store.

    Raises:
        ArgumentError: If lengths differ, there is one class, or a choice is not legal.
        SizeError: If the budget does not hold a site's moments; the text says how many bytes they take.

    Example:
        >>> y = [0, 1] * 20
        >>> sites = {"early": torch.randn(40, 3), "late": torch.randn(40, 5) + torch.tensor(y)[:, None]}
        >>> found = closed_forms(sites, y)
        >>> found["late"].lda.score(sites["late"], y) > 0.7
        True
    """
    if shrinkage != "oas" and not 0 <= shrinkage <= 1:  # type: ignore[operator]
        raise ArgumentError(f"shrinkage={shrinkage!r}", "a number in [0, 1], or 'oas'")
    if alpha != "gcv" and not alpha > 0:  # type: ignore[operator]
        raise ArgumentError(f"alpha={alpha!r}", "a positive number, or 'gcv'")
    labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    found = {}
    for site, width, blocks in readers(data, len(labels), sites, pool, budget):
        fitter = LeaceFitter(labels)
        for rows, values in blocks():
            fitter.update(values, labels[rows.numpy()])
        moments, classes = fitter.moments(), np.array(fitter.classes)
        forms = (_mass_mean(moments), _lda(moments, shrinkage), _ridge(moments, alpha))
        for probe in forms:
            probe.classes_, probe.n_features_in_, probe.skip_first_ = classes, width, False
        found[site] = ClosedForms(*forms, fitter.eraser() if erasers else None)
    return found


def readers(
    data: Source, n: int, sites: Sequence[str] | None, pool: str, budget: int | str, columns: int = 0
) -> Iterator[tuple[str, int, Callable[[], Iterator[Block]]]]:
    """Sites, their widths, and functions that read their blocks, of as many rows as a budget allows.

    ``columns`` is the number of logits that a solver works on at once.

    Raises:
        ArgumentError: If a site is not known, or there is not one label for each example.
        SizeError: If not even one site's moments fit.
    """
    store = data if isinstance(data, ActivationStore) else None
    by_name = {str(site): value for site, value in data.items()} if not isinstance(data, ActivationStore) else {}
    known = list(by_name) if store is None else store.token_sites if pool == "tokens" else store.sites
    wanted = known if sites is None else list(map(str, sites))
    if not wanted or set(wanted) - set(known):
        raise ArgumentError(f"sites {sorted(set(wanted) - set(known))[:5]}", f"some of {known[:5]}, ...")
    for site in wanted:
        check_lengths(len(by_name[site]) if store is None else len(store), y=range(n))
        width = by_name[site].shape[1] if store is None else store.manifest["widths"][site]
        rows = _rows_within(width, columns, bytes_of(budget))
        if store is None:
            yield site, width, partial(_parts, by_name[site], rows)
        else:
            yield site, width, partial(store.blocks, site, pool, rows)


def _rows_within(width: int, columns: int, budget: int) -> int:
    fixed = 8 * (_COPIES * width * width + _REMEMBERED * (width + 1) * columns)
    each = 8 * _COPIES * (width + columns)
    if budget < fixed + each:
        raise SizeError(f"a budget of {budget:,} bytes", f"{fixed + each:,} for {width} features", "raise it")
    return min((budget - fixed) // each, 1 << 16)


def _parts(values: Any, rows: int) -> Iterator[Block]:
    whole = torch.as_tensor(values)
    for start in range(0, len(whole), rows):
        part = whole[start : start + rows]
        yield torch.arange(start, start + len(part)), part.cpu()


def _class_means(moments: LabelledMoments) -> Float[Tensor, "classes d"]:
    return (moments.mean[:, None] + moments.cross / moments.share).T


def _within(moments: LabelledMoments) -> Float[Tensor, "d d"]:
    """Covariance within classes: Cov(x) - sum_k Cov(x, z_k) Cov(x, z_k)^T / p_k."""
    return moments.covariance - (moments.cross / moments.share) @ moments.cross.T


def _mass_mean(moments: LabelledMoments) -> MassMeanProbe:
    probe, means = MassMeanProbe(), _class_means(moments)
    basis, sizes, _ = torch.linalg.svd((means - means.mean(0)).T, full_matrices=False)
    basis = basis[:, sizes > 1e-12 * sizes[0].clamp(min=1e-300)]
    spread = (basis * (_within(moments) @ basis)).sum() / max(basis.shape[1], 1)
    spread = spread if bool(spread > 0) else torch.ones_like(spread)
    centred = means - moments.mean
    coef, intercept = two_rows_to_one(centred / spread, -(centred**2).sum(1) / (2 * spread))
    probe.means_ = as_array(means)
    probe._set_raw(coef, intercept, moments.mean, torch.ones_like(moments.mean))
    return probe


def _lda(moments: LabelledMoments, shrinkage: Any) -> LDAProbe:
    within, means = _within(moments), _class_means(moments) - moments.mean
    d = len(within)
    if shrinkage == "oas":
        std = within.diagonal().clamp(min=0).sqrt()
        std = torch.where(std > 1e-12 * moments.mean.abs(), std, 1.0)
        amount = oas(within / torch.outer(std, std), moments.n)
        target = std**2
    else:
        amount, target = float(shrinkage), (within.trace() / d).expand(d)
    probe = LDAProbe("auto" if shrinkage == "oas" else amount)
    coef = _solved((1 - amount) * within, amount * target, means.T).T
    intercept = -(means * coef).sum(1) / 2 + moments.share.log()
    coef, intercept = two_rows_to_one(coef, intercept)
    probe._set_raw(coef, intercept, moments.mean, torch.ones_like(moments.mean))
    return probe


def _solved(matrix: Tensor, diagonal: Tensor, right: Tensor) -> Tensor:
    """(matrix + diag) ^-1 right, by least squares where that is singular."""
    whole = matrix + torch.diag(diagonal)
    factor, failed = torch.linalg.cholesky_ex(whole)
    return torch.linalg.pinv(whole, hermitian=True) @ right if int(failed) else torch.cholesky_solve(right, factor)


def _ridge(moments: LabelledMoments, alpha: Any) -> RidgeProbe:
    n, two = moments.n, len(moments.share) == 2
    std = moments.covariance.diagonal().clamp(min=0).sqrt()
    constant = std <= 1e-12 * moments.mean.abs()
    live = std[~constant]
    std = torch.where(constant, 1.0, std.clamp(min=float(live.median()) * 1e-6 if len(live) else 0.0))
    correlation = moments.covariance / torch.outer(std, std)
    cross = 2 * (moments.cross / std[:, None])[:, 1 if two else 0 :]
    share = moments.share[1 if two else 0 :]
    found = _gcv(correlation, cross, 4 * (share * (1 - share)).sum(), n) if alpha == "gcv" else float(alpha)
    probe = RidgeProbe(found)
    probe.alpha_ = found
    coef = _solved(n * correlation, torch.full_like(std, found), n * cross)
    probe._set_raw(coef.T, 2 * share - 1, moments.mean, std)
    return probe


def _gcv(correlation: Tensor, cross: Tensor, variance: Tensor, n: int) -> float:
    """The alpha of least RSS / (1 - tr H / n)^2; float32 is enough to choose it."""
    values, vectors = torch.linalg.eigh(correlation.float())
    along = ((vectors.T @ cross.float()) ** 2).sum(1).double()
    values = values.double().clamp(min=0)
    errors = []
    for alpha in ALPHAS:
        shrunk = values + alpha / n
        explained = (along * (2 / shrunk - values / shrunk**2)).sum()
        left = 1 - (1 + float((values / shrunk).sum())) / n
        errors.append(float(variance - explained) / left**2 if left > 0 else float("inf"))
    return ALPHAS[int(np.argmin(errors))]
