"""Fixed moments: means and covariances of token sets as features for a convex probe."""

import warnings
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.probes.covariance_norms import column_l2, eig_power, log_euclid, newton_schulz, signed_sqrt
from interp.probes.estimator import (
    BaseEstimator,
    SkipFirst,
    TokenInputs,
    TransformerMixin,
    as_answer,
    as_array,
    check_is_fitted,
)
from interp.probes.site_fits import moments_of
from interp.probes.tokens import TokenSets

Centre = Literal["tokens", "scalar", "none"]
Norm = Literal["column_l2", "signed_sqrt", "isqrt", "eig_power", "log_euclid", "none"]
CHUNK = 256


def second_moments(sets: TokenSets, centre: Centre = "tokens") -> Float[Tensor, "n d d"]:
    """(1/n) sum of x x^T over the tokens of each example, in float64, after centring.

    ``tokens``: less the example's mean token, so that it is the (biased) covariance; ``scalar``: less one number, the
    mean over tokens and channels; ``none``: as they are.

    Raises:
        ArgumentError: If the centring is not one of these.

    Example:
        >>> second_moments(TokenSets.from_list([torch.tensor([[1.0, 0.0], [3.0, 0.0]])])).tolist()
        [[[1.0, 0.0], [0.0, 0.0]]]
    """
    if centre not in ("tokens", "scalar", "none"):
        raise ArgumentError(f"centre={centre!r}", "tokens, scalar or none")
    values = sets.values.double()
    if centre != "none":
        means = sets.pooled("mean")
        means = means if centre == "tokens" else means.mean(1, keepdim=True)
        values = values - means[sets.owner]
    centred, found = sets.replace_values(values), []
    for rows in torch.arange(len(sets)).split(CHUNK):
        padded, mask = centred.take(rows).padded()
        found.append(padded.transpose(1, 2) @ padded / mask.sum(1)[:, None, None])
    return torch.cat(found)


def check_lone_tokens(sets: TokenSets, centre: str) -> None:
    """Refuse, or warn about, covariances of single tokens, which are zero.

    Raises:
        ArgumentError: If every example has one token and the centring is by tokens.
    """
    alone = int((sets.lengths == 1).sum())
    if centre != "tokens" or not alone:
        return
    if alone == len(sets):
        raise ArgumentError(
            "one token in every example: the covariance over tokens is zero", "at least two tokens",
            'centre="none" for products of features of one vector, or order=1',
        )  # fmt: skip
    text = f"{alone} of {len(sets)} examples have one token: their covariance is zero"
    warnings.warn(text, UserWarning, stacklevel=4)


class MomentFeatures(TokenInputs, TransformerMixin, BaseEstimator):
    """Mean token and second moments in a fixed subspace: features for a convex probe. No training by gradient.

    Tokens are standardised per channel with all training tokens. Their projection on the top ``rank`` principal
    directions (whitened), or on a seeded Gaussian sketch, gives second moments; of a symmetric one the upper triangle,
    off-diagonals times sqrt 2, so that the euclidean norm is the Frobenius norm. The mean of the standardised tokens,
    of all d channels, stands before them, so that a probe on these features can do what a linear probe can.

    Principal directions are the loudest ones: an attention sink left in takes them all.

    Args:
        rank: Dimensions of the subspace; d where it is larger.
        order: 1 for means alone, 2 with second moments.
        centre: ``tokens``, ``scalar`` or ``none``; see `second_moments`.
        norm: ``signed_sqrt``, ``column_l2``, ``isqrt``, ``eig_power``, ``log_euclid`` or ``none``. After signed roots
            a probe is no longer invariant to rotations of the features.
        projection: ``pca`` or ``sketch``.
        skip_first: As in `LogisticProbe`.
        random_state: Seed of the sketch.

    Attributes:
        projection_: [d, rank], from standardised tokens to the subspace.
        median_tokens_: Median number of tokens of a training example; a covariance's rank is at most that less 1.

    Example:
        >>> sets = TokenSets.from_list([torch.randn(6, 4) for _ in range(10)])
        >>> MomentFeatures(rank=2).fit_transform(sets).shape
        torch.Size([10, 7])
    """

    centre: Centre

    def __init__(
        self, rank: int = 32, order: Literal[1, 2] = 2, *, centre: Centre = "tokens", norm: Norm = "signed_sqrt",
        projection: Literal["pca", "sketch"] = "pca", skip_first: SkipFirst = "auto", random_state: int = 0,
    ):  # fmt: skip
        self.rank, self.order, self.centre, self.norm = rank, order, centre, norm
        self.projection, self.skip_first, self.random_state = projection, skip_first, random_state

    def fit(self, X: Any, y: Any = None, mask: Any = None) -> "MomentFeatures":
        """Learn the standardiser and the subspace from training tokens.

        Raises:
            ArgumentError: If a choice is not known, or every example has one token and ``centre`` is ``tokens``.
        """
        self._check_choices()
        sets = self._inputs(X, mask, fitting=True)
        if self.order == 2:
            check_lone_tokens(sets, self.centre)
        self.median_tokens_ = float(sets.lengths.double().median())
        values = sets.values.double()
        mean, std = moments_of(values, torch.ones(len(values), dtype=torch.float64, device=values.device))
        self.mean_, self.std_ = as_array(mean), as_array(std)
        self.projection_ = as_array(self._subspace((values - mean) / std))
        return self

    def _check_choices(self) -> None:
        for name, legal in (
            ("order", (1, 2)), ("centre", ("tokens", "scalar", "none")), ("projection", ("pca", "sketch")),
            ("norm", ("signed_sqrt", "column_l2", "isqrt", "eig_power", "log_euclid", "none")),
        ):  # fmt: skip
            if getattr(self, name) not in legal:
                raise ArgumentError(f"{name}={getattr(self, name)!r}", f"one of {', '.join(map(str, legal))}")
        if isinstance(self.rank, bool) or not isinstance(self.rank, (int, np.integer)) or self.rank < 1:
            raise ArgumentError(f"rank={self.rank!r}", "a positive whole number")

    def _subspace(self, z: Float[Tensor, "tokens d"]) -> Float[Tensor, "d rank"]:
        width = z.shape[1]
        rank = min(self.rank, width)
        if self.projection == "sketch":
            generator = torch.Generator().manual_seed(self.random_state)
            sketch = torch.randn(width, rank, generator=generator, dtype=torch.float64) / width**0.5
            return sketch.to(z.device)
        values, vectors = torch.linalg.eigh(z.T @ z / len(z))
        values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0)[None]).sign()
        live = values > 1e-12 * values[0].clamp(min=1e-300)
        return vectors * torch.where(live, values.clamp(min=1e-300).rsqrt(), 0.0)

    def transform(self, X: Any, mask: Any = None) -> Any:
        """Features [n, d + rank (rank + 1) / 2] (with column_l2, which is not symmetric: d + rank^2)."""
        check_is_fitted(self)
        sets = self._inputs(X, mask)
        device = sets.values.device
        mean, std, projection = (
            torch.as_tensor(value, device=device) for value in (self.mean_, self.std_, self.projection_)
        )
        z = sets.replace_values((sets.values.double() - mean) / std)
        first = z.pooled("mean")
        if self.order == 1:
            return as_answer(X, first)
        moments = second_moments(z.replace_values(z.values @ projection), self.centre)
        return as_answer(X, torch.cat([first, self._flat(moments)], 1))

    def _flat(self, moments: Float[Tensor, "n r r"]) -> Float[Tensor, "n k"]:
        if self.norm == "column_l2":
            return column_l2(moments).flatten(1)
        function = {"isqrt": newton_schulz, "eig_power": eig_power, "log_euclid": log_euclid}.get(self.norm)
        flat = upper_triangle(moments if function is None else function(moments))
        return signed_sqrt(flat) if self.norm == "signed_sqrt" else flat

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names: mean[i] for channels, moment[i,j] for the subspace."""
        check_is_fitted(self)
        rank, width = self.projection_.shape[1], self.n_features_in_
        names = [f"mean[{i}]" for i in range(width)]
        if self.order == 2:
            square = self.norm == "column_l2"
            names += [f"moment[{i},{j}]" for i in range(rank) for j in range(0 if square else i, rank)]
        return np.array(names, dtype=object)

    def save(self, path: Any) -> None:
        """Write to a file; see `interp.probes.saving.save_probe`."""
        from interp.probes.saving import save_probe

        save_probe(self, path)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        d = self.n_features_in_
        return {"mean_": (d,), "std_": (d,), "projection_": (d, min(self.rank, d))}


def upper_triangle(matrices: Float[Tensor, "n r r"]) -> Float[Tensor, "n k"]:
    """Upper triangle row by row, off-diagonals times sqrt 2: the euclidean norm is the matrix's Frobenius norm."""
    rows, columns = torch.triu_indices(matrices.shape[1], matrices.shape[1], device=matrices.device)
    return matrices[:, rows, columns] * torch.where(rows == columns, 1.0, 2.0**0.5)
