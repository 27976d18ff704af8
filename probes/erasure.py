"""LEACE: the least change of activations after which no linear probe finds a concept.

Source: Belrose et al., "LEACE: Perfect Linear Concept Erasure in Closed Form", NeurIPS 2023, theorems 4.2 and 4.3.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError, ErasureError
from interp.hooks.interventions import Erase
from interp.hooks.site import SiteLike
from interp.probes.estimator import check_lengths
from interp.probes.tokens import TokenSets, as_token_sets, is_token_input

RESIDUAL = 1e-6
_CONSTANT = 1e-12  # of its mean: a deviation below it is rounding
_SMALLEST = 1e-8  # of a singular value, in units of its sampling noise 1/sqrt(n): what remains below it is checked
Method = Literal["leace", "orth"]


class LabelledMoments(NamedTuple):
    """First and second moments of activations and of their labels, one-hot.

    Attributes:
        n: Number of activations.
        mean: [d].
        covariance: [d, d], divided by n.
        cross: [d, classes], covariance with the one-hot labels.
        share: [classes], share of each class.
    """

    n: int
    mean: Float[Tensor, "d"]
    covariance: Float[Tensor, "d d"]
    cross: Float[Tensor, "d classes"]
    share: Float[Tensor, "classes"]


class LeaceFitter:
    """Streams means and covariances of activations and labels in float64, for `LeaceEraser`.

    Args:
        classes: All labels that will come.

    Example:
        >>> fitter = LeaceFitter(["no", "yes"])
        >>> for _ in range(3):
        ...     _ = fitter.update(torch.randn(20, 4), ["no", "yes"] * 10)
        >>> fitter.n, fitter.eraser().rank
        (60, 1)
    """

    def __init__(self, classes: Any):
        self.classes = sorted(set(np.asarray(classes).tolist()))
        if len(self.classes) < 2:
            raise ArgumentError(f"1 class: {self.classes}", "at least 2 classes")
        self.n = 0
        self._joint: Tensor | None = None  # centred second moments of (x, one-hot z)
        self._mean: Tensor | None = None

    def update(self, X: Any, y: Any) -> "LeaceFitter":
        """Add a batch [n, d] with its labels (Chan's merge of means and centred moments).

        Raises:
            ArgumentError: If a label is not known, or lengths or widths differ.
        """
        x = as_token_sets(X).values.double()
        labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y).tolist()
        check_lengths(len(x), y=labels)
        unknown = sorted(set(labels) - set(self.classes), key=str)
        if unknown:
            raise ArgumentError(f"labels {unknown[:5]}", f"labels among {self.classes[:20]}")
        z = torch.tensor([self.classes.index(label) for label in labels], device=x.device)
        both = torch.cat([x, torch.nn.functional.one_hot(z, len(self.classes)).double()], 1)
        if self._mean is None or self._joint is None:
            self._mean, self._joint = both.new_zeros(both.shape[1]), both.new_zeros(both.shape[1], both.shape[1])
        if both.shape[1] != len(self._mean):
            raise ArgumentError(f"{x.shape[1]} features", f"{len(self._mean) - len(self.classes)}, as before")
        mean, total = both.mean(0), self.n + len(both)
        gap = mean - self._mean
        centred = both - mean
        self._joint += centred.T @ centred + torch.outer(gap, gap) * self.n * len(both) / total
        self._mean = self._mean + gap * len(both) / total
        self.n = total
        return self

    def moments(self) -> LabelledMoments:
        """What has been seen so far.

        Raises:
            ArgumentError: If nothing has been seen, or a class has not.
        """
        if self._joint is None or self._mean is None:
            raise ArgumentError("moments of no activations", "update with at least one batch")
        d = len(self._mean) - len(self.classes)
        share = self._mean[d:]
        if bool((share <= 0).any()):
            raise ArgumentError(f"no example of {self.classes[int(share.argmin())]!r}", "examples of every class")
        joint = self._joint[:d] / self.n
        return LabelledMoments(self.n, self._mean[:d], joint[:, :d], joint[:, d:], share)

    def eraser(self, method: Method = "leace", shrinkage: float | int | Literal["oas"] = "oas") -> "LeaceEraser":
        """The eraser of what has been seen; see `LeaceEraser.fit`.

        Raises:
            ArgumentError: If nothing has been seen, a class has not, or a choice is not legal.
            ErasureError: If class means still differ.
        """
        n, mean, inner, cross, share = self.moments()
        deviation = inner.diagonal().clamp(min=0).sqrt()
        live = deviation > _CONSTANT * mean.abs()
        scale = torch.where(live, deviation, 1.0)
        left, right = _factors(inner * torch.outer(live, live), cross[:, 1:], scale, n, method, shrinkage)
        removed = float(((left.T @ left) * (right @ inner @ right.T)).sum())
        gap = _check_gap(cross / share, left, right, scale)
        return LeaceEraser(left, right, mean.clone(), self.classes, n, gap, removed, float(inner.trace()))


@dataclass(frozen=True, eq=False)
class LeaceEraser:
    """x - left · right · (x - mean): class means are equal afterwards, so no linear probe beats the majority.

    That holds for linear probes on the activations it was fitted on. On others it holds up to sampling error; a probe
    of second moments may still find the concept.

    Attributes:
        left: [d, rank].
        right: [rank, d].
        mean: [d].
        classes: The labels.
        n: Examples (or tokens) that it was fitted on.
        residual: Largest remaining distance of a class mean from the mean, by what it was, in standardised features.
        removed: Mean squared distance that the activations move.
        variance: Total variance of the activations.
    """

    left: Float[Tensor, "d rank"] = field(repr=False)
    right: Float[Tensor, "rank d"] = field(repr=False)
    mean: Float[Tensor, "d"] = field(repr=False)
    classes: list[Any]
    n: int
    residual: float
    removed: float
    variance: float

    @classmethod
    def fit(
        cls, X: Any, y: Any, *, method: Method = "leace", shrinkage: float | int | Literal["oas"] = "oas"
    ) -> "LeaceEraser":
        """Fit on activations [n, d], or on all tokens of token sets with the label of their example.

            r(x) = x - W^+ U U^T W (x - mu),   W = Cov(x)^(-1/2),   U an orthonormal basis of the columns of W Cov(x, z)

        z is one-hot. Of all maps after which Cov(r(x), z) = 0 this one moves x least, in every norm; so features are
        standardised first, which only helps the arithmetic. A weak concept is erased like a strong one, and the class
        means after erasure are checked.

        Args:
            X: Activations.
            y: A label for each example.
            method: ``leace``, or ``orth``: the orthogonal projection off Cov(x, z), which moves x more.
            shrinkage: Of the correlations towards the identity: a number in [0, 1], or ``oas`` (Chen et al. 2010).
                The class means are equal for any; with few examples for many features less is moved on new ones.

        Raises:
            ArgumentError: If there is one class, or lengths differ.
            ErasureError: If a class mean is left farther than 1e-6 of what it was.

        Example:
            >>> x = torch.randn(50, 3, dtype=torch.float64); y = torch.arange(50) % 2
            >>> x[:, 0] += y
            >>> erased = LeaceEraser.fit(x, y)(x)
            >>> bool((erased[y == 0].mean(0) - erased[y == 1].mean(0)).norm() < 1e-12)
            True
        """
        labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
        if is_token_input(X):
            sets = as_token_sets(X)
            check_lengths(len(sets), y=labels)
            X, labels = sets.values, labels[sets.owner.cpu().numpy()]
        return LeaceFitter(labels).update(X, labels).eraser(method, shrinkage)

    @property
    def rank(self) -> int:
        """Dimensions that are erased."""
        return self.left.shape[1]

    def __call__(self, X: Any) -> Any:
        """Erased activations, of the same kind, shape and dtype: [..., d], or `TokenSets`."""
        if isinstance(X, TokenSets):
            return X.replace_values(self(X.values))
        x = torch.as_tensor(X)
        left, right, mean = (part.to(x.device) for part in (self.left, self.right, self.mean))
        if x.shape[-1] != len(mean):
            raise ArgumentError(f"activations of width {x.shape[-1]}", f"{len(mean)}")
        moved = x.double() - ((x.double() - mean) @ right.T) @ left.T
        moved = moved.to(x.dtype)
        return moved if isinstance(X, Tensor) else moved.numpy()

    def hook(self, site: SiteLike, positions: Any = None) -> Erase:
        """The erasure as an intervention at a site."""
        return Erase(site, self.left, self.right, self.mean, positions=positions)


def ablate_direction(site: SiteLike, direction: Any, mean: Any, positions: Any = None) -> Erase:
    """The ablation of a direction to its mean, as an intervention: x - <x - mean, v> v with v of norm 1.

    Args:
        site: Where.
        direction: [d], of any norm.
        mean: [d], mean activation: ablating to zero would move everything.
        positions: As in `Model.run`.

    Raises:
        ArgumentError: If the direction is zero or not finite.
    """
    v = torch.as_tensor(direction).detach().double().flatten()
    norm = float(v.norm())
    if not 0 < norm < float("inf"):
        raise ArgumentError(f"a direction of norm {norm}", "a finite direction that is not zero")
    unit = (v / norm)[:, None]
    return Erase(site, unit, unit.T.clone(), torch.as_tensor(mean).detach().double(), positions=positions)


def _factors(inner: Tensor, cross: Tensor, scale: Tensor, n: int, method: Any, shrinkage: Any) -> tuple[Tensor, Tensor]:
    """left [d, rank] and right [rank, d] of Cov(x) and Cov(x, z), z one-hot less one class."""
    if method not in ("leace", "orth"):
        raise ArgumentError(f"method={method!r}", "leace or orth")
    if shrinkage != "oas" and not (isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1):
        raise ArgumentError(f"shrinkage={shrinkage!r}", "a number in [0, 1], or 'oas'")
    if method == "orth":
        basis, sizes, _ = torch.linalg.svd(cross, full_matrices=False)
        basis = basis[:, sizes > torch.finfo(cross.dtype).eps * sizes.max()]
        return basis, basis.T.clone()
    correlations = inner / torch.outer(scale, scale)
    amount = oas(correlations, n) if shrinkage == "oas" else float(shrinkage)
    target = torch.eye(len(inner), dtype=inner.dtype, device=inner.device) * correlations.trace() / len(inner)
    values, vectors = torch.linalg.eigh((1 - amount) * correlations + amount * target)
    kept = values > torch.finfo(values.dtype).eps * len(values) * values[-1].clamp(min=1e-300)
    values, vectors = values[kept], vectors[:, kept]
    whitened = (vectors / values.sqrt()) @ (vectors.T @ (cross / scale[:, None]))
    basis, sizes, _ = torch.linalg.svd(whitened, full_matrices=False)
    basis = basis[:, sizes > _SMALLEST / n**0.5]
    left = scale[:, None] * ((vectors * values.sqrt()) @ (vectors.T @ basis))
    right = (basis.T @ vectors / values.sqrt()) @ vectors.T / scale
    return left, right


def oas(s: Float[Tensor, "d d"], n: int) -> float:
    """Oracle approximating shrinkage: Chen, Wiesel, Eldar, Hero, IEEE Trans. Signal Processing 58 (2010), eq. 23."""
    d, trace, square = len(s), float(s.trace()), float((s**2).sum())
    below = (n + 1 - 2 / d) * (square - trace**2 / d)
    return 1.0 if below <= 0 else min(1.0, ((1 - 2 / d) * square + trace**2) / below)


def _check_gap(gaps: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> float:
    """What is left of each class mean's distance, by what it was; columns of gaps are class means less the mean."""
    before, after = ((g / scale[:, None]).norm(dim=0) for g in (gaps, gaps - left @ (right @ gaps)))
    there = before > 1e3 * torch.finfo(gaps.dtype).eps * (1 + before.max())
    residual = float((after[there] / before[there]).max()) if bool(there.any()) else 0.0
    if residual > RESIDUAL:
        raise ErasureError(
            f"a class mean is still at {residual:.2g} of its distance", f"at most {RESIDUAL:g}",
            "raise shrinkage, or leave out features that hardly vary",
        )  # fmt: skip
    return residual
