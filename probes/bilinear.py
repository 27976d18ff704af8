"""A second-order probe of one vector, convex."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.probes.estimator import SkipFirst, VectorProbe
from interp.probes.linear import LogisticProbe
from interp.probes.moments import MomentFeatures
from interp.probes.tokens import Pool


class BilinearProbe(VectorProbe):
    """Quadratic logits of one vector: logit = v^T A v + w v + c, with A of rank at most ``rank``; a convex fit.

    The products are those of the standardised vector's top principal coordinates (`MomentFeatures` with one token and
    ``centre="none"``), the fit is `LogisticProbe` on them and on the vector. `MomentProbe(centre="none")` is the
    trained alternative, which learns its subspace.

    Args:
        rank: Principal coordinates whose products are used.
        C: As in `LogisticProbe`.
        pool: How a set of tokens becomes one vector.
        skip_first: As in `LogisticProbe`.

    Example:
        >>> X = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> BilinearProbe(rank=2, C=100.0).fit(X, [0, 0, 1, 1]).predict(X).tolist()
        [0, 0, 1, 1]
    """

    features_: MomentFeatures
    probe_: LogisticProbe

    def __init__(
        self,
        rank: int = 16,
        *,
        C: float | int | Literal["cv"] = "cv",
        pool: Pool = "mean",
        skip_first: SkipFirst = "auto",
    ):
        self.rank, self.C, self.pool, self.skip_first = rank, C, pool, skip_first

    def fit(self, X: Any, y: Any, mask: Any = None, groups: Any = None) -> "BilinearProbe":
        """Fit as `LogisticProbe.fit` does, without weights."""
        vectors, labels, _ = self._fit_inputs(X, y, mask, None)
        self.features_ = MomentFeatures(self.rank, centre="none", norm="none", skip_first=False)
        self.probe_ = LogisticProbe(self.C)
        self.probe_.fit(self.features_.fit_transform(vectors), labels, groups=groups)
        return self

    def _logits(self, inputs: Float[Tensor, "n d"]) -> Tensor:
        return self.probe_._logits(self.features_.transform(inputs))

    def quadratic_form(self, label: Any = None) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d"], float]:
        """(A, w, c) in raw activation units, A symmetric, so that v^T A v + w v + c is the logit of ``label``.

        Of two classes the second is the default. Of more, it is the logit less the mean over classes.

        Raises:
            ArgumentError: If the label is not a class, or is needed and not given.
        """
        names = self.classes_.tolist()
        if label is not None and label not in names:
            raise ArgumentError(f"label={label!r}", f"one of {names[:20]}")
        row, offset = self.probe_._row(None if label is None else names.index(label))
        d, mean, std = self.n_features_in_, torch.as_tensor(self.features_.mean_), torch.as_tensor(self.features_.std_)
        lift = torch.as_tensor(self.features_.projection_) / std[:, None]
        rank = lift.shape[1]
        i, j = torch.triu_indices(rank, rank)
        square = torch.zeros(rank, rank, dtype=torch.float64)
        square[i, j] = row[d:] * torch.where(i == j, 1.0, 0.5**0.5)
        square = (square + square.triu(1).T) if rank > 1 else square
        form = lift @ square @ lift.T
        linear = row[:d] / std
        return form, linear - 2 * form @ mean, float(offset - linear @ mean + mean @ form @ mean)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        rows = 1 if len(self.classes_) == 2 else len(self.classes_)
        width = len(self.features_.get_feature_names_out())
        return {"probe_.coef_": (rows, width), "features_.mean_": (self.n_features_in_,)}
