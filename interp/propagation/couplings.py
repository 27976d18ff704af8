"""Couplings: of several observables along several paths, coupling coefficients beside the slopes of real activations.

Source: Dunefsky & Cohan, "Observable Propagation", ICML 2024, section 4: coefficients predict slopes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.direct import read_observables
from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.hooks.table import Rows
from interp.propagation.feature_vectors import FeatureVector, pairwise, validate_coupling
from interp.propagation.paths import PathLike
from interp.propagation.propagate import propagate


@dataclass(frozen=True, eq=False)
class Couplings(Rows):
    """C(f -> g) = f · g / ‖f‖² of the data-free vectors of each pair of observables, along each path.

    Attributes:
        observables: Names.
        paths: Texts of the paths.
        sites: What the vectors of each path read.
        predicted: [path, from, to]: coupling coefficients.
        cosines: [path, from, to].
        start_cosines: [from, to]: cosines of W_Uᵀ n, what the tokens' own rows share. A cosine tells something only
            against these, and against a control observable.
        slopes: [path, from, to]: least-squares slopes of g's score on f's over activations; or None.
        r2: [path, from, to]: share of the variance of g's score that f's explains; or None.
        n: How many activations.
    """

    observables: list[str]
    paths: list[str]
    sites: list[str]
    predicted: Float[Tensor, "path f g"] = field(repr=False)
    cosines: Float[Tensor, "path f g"] = field(repr=False)
    start_cosines: Float[Tensor, "f g"] = field(repr=False)
    slopes: Float[Tensor, "path f g"] | None = field(default=None, repr=False)
    r2: Float[Tensor, "path f g"] | None = field(default=None, repr=False)
    n: int = 0

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each path and ordered pair of two observables."""
        return [self._row(p, i, j) for p in range(len(self.paths)) for i, j in self._pairs()]

    def _pairs(self) -> list[tuple[int, int]]:
        count = range(len(self.observables))
        return [(i, j) for i in count for j in count if i != j]

    def _row(self, p: int, i: int, j: int) -> dict[str, Any]:
        row = {"path": self.paths[p], "from": self.observables[i], "to": self.observables[j]}
        row |= {"coupling": float(self.predicted[p, i, j]), "cosine": float(self.cosines[p, i, j])}
        row["starting cosine"] = float(self.start_cosines[i, j])
        if self.slopes is not None and self.r2 is not None:
            row |= {"slope": float(self.slopes[p, i, j]), "r2": float(self.r2[p, i, j])}
        return row


@torch.no_grad()
def couplings(
    model: Model, observables: Any, paths: Sequence[PathLike], texts: Any = None, *,
    exclude_positions: tuple[int, ...] = (0,),
) -> Couplings:  # fmt: skip
    """Return coupling coefficients of every pair of observables along paths and, with texts, the slopes beside them.

    Args:
        model: A decoder.
        observables: Two or more (a set, a list, or a mapping of names).
        paths: Of the data-free form: heads, ``L9H1``, or chains of heads.
        texts: Whose activations the slopes are fitted on, at the vectors' site and all positions.
        exclude_positions: Positions that are left out: a few tokens of huge norm, above all the first, rule a fit.

    Raises:
        ArgumentError: If there are no paths, fewer than two observables, or a path has no data-free form.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> she = interp.Observable.logit_diff(model, " she", " he")
        >>> her = interp.Observable.logit_diff(model, " her", " him")
        >>> found = interp.couplings(model, [she, her], ["L26H2", "L27H5"], ["Emma said that she was late."])
        >>> found.predicted.shape, found.n
        (torch.Size([2, 2, 2]), 7)
    """
    wanted = read_observables(observables)
    if len(wanted) < 2 or not len(paths) or isinstance(paths, str):
        raise ArgumentError(f"{len(wanted)} observables and paths {paths!r:.60}", "two or more, and a list of paths")
    vectors = [[propagate(model, n, path=path) for n in wanted] for path in paths]
    names = [str(path) for path in paths]
    start = torch.nn.functional.normalize(wanted.pull_to_stream(model)[0].double(), dim=-1)
    found = torch.stack([pairwise(of_path, "coupling") for of_path in vectors])
    cosines = torch.stack([pairwise(of_path, "cosine") for of_path in vectors])
    sites = [str(of_path[0].site) for of_path in vectors]
    measured = (None, None, 0) if texts is None else _measured(model, vectors, texts, exclude_positions)
    return Couplings(list(wanted.names), names, sites, found, cosines, (start @ start.T).cpu(), *measured)


def _measured(
    model: Model, vectors: list[list[FeatureVector]], texts: Any, exclude: tuple[int, ...]
) -> tuple[Float[Tensor, "path f g"], Float[Tensor, "path f g"], int]:
    """Slopes, shares of explained variance, and the number of activations."""
    acts = model.capture(texts, sorted({str(of_path[0].site.whole) for of_path in vectors}))
    fits = [
        [[validate_coupling(f, g, acts, exclude_positions=exclude) for g in of_path] for f in of_path]
        for of_path in vectors
    ]
    read = lambda name: torch.tensor([[[getattr(fit, name) for fit in row] for row in table] for table in fits])
    return read("slope").double(), read("r2").double(), fits[0][0][0].n
