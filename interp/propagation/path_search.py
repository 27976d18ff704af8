"""Path search: which chains of heads and MLPs carry an observable, by beam search with every score audited exactly.

Source: Dunefsky & Cohan, "Observable Propagation", ICML 2024 (greedy search in the authors' notebooks), with all legal
edges, signs of either kind and exact effects beside first-order scores.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.linearization import Linearization, LinearizationLike
from interp.hooks.model import Model
from interp.hooks.table import Rows, Table
from interp.observables.observable import Observable
from interp.propagation.exact_paths import ExactPaths
from interp.propagation.paths import Path, PathLike, Step, feeds
from interp.propagation.propagate import propagate

Score = Literal["linear", "attribution", "patch"]
Sign = Literal["abs", "positive", "negative"]


@dataclass(frozen=True)
class PathSearch(Rows):
    """Paths by score, with the exact effect of each beside it.

    Attributes:
        observable: What is measured.
        measurement: n · logits on the clean prompt.
        corrupt_measurement: On the corrupt one, or None.
        score: ``linear``, ``attribution`` or ``patch``.
        paths: Paths in execution order, best first.
        scores: Their scores.
        effects: Drop of the measurement when only what flows along the path is replaced by the corrupt prompt's (by
            zero, without one), queries and keys held.
        correlation: Between scores and effects over all candidates that were tried.
        tried: How many candidates were tried.
        tokens: The clean prompt's tokens.
    """

    observable: str
    measurement: float
    corrupt_measurement: float | None
    score: Score
    paths: list[str]
    scores: Float[Tensor, "path"] = field(repr=False)
    effects: Float[Tensor, "path"] = field(repr=False)
    correlation: float
    tried: int
    tokens: list[str] | None = field(repr=False)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each path."""
        rows = zip(self.paths, self.scores.tolist(), self.effects.tolist(), strict=True)
        return [{"path": p, "score": s, "exact effect": e} for p, s, e in rows]

    def top(self, k: int = 10) -> Table:
        """Return the k best paths."""
        title = f"{self.observable} = {self.measurement:.4f}; {self.score} score, correlation {self.correlation:.3f}"
        return Table(self.to_records()[:k], f"{title} with exact effects over {self.tried:,} candidates")


@torch.no_grad()
def find_paths(
    model: Model, observable: Observable, clean: Any, corrupt: Any = None, *, beam: int = 10, max_length: int = 4,
    score: Score = "linear", sign: Sign = "abs", position: int = -1, linearization: LinearizationLike = "path",
) -> PathSearch:  # fmt: skip
    """Return the paths along which an observable is carried, found from the logits backwards.

    Each kept path is extended at its input end by every component that can feed it: each earlier head with each source
    position, each earlier MLP at the current position, the embedding, which ends it. One pull-back of a path scores all
    its extensions at once.

    Args:
        model: A decoder.
        observable: What is measured.
        clean: One prompt.
        corrupt: A prompt of the same number of tokens; what a path carries is the difference. Without one, all of it.
        beam: How many paths are kept in each round.
        max_length: Largest number of components.
        score: ``linear``: y_path · (c_clean - c_corrupt) for a component's output c, patterns from the clean run.
            ``attribution``: y_path · c, without a corrupt prompt. ``patch``: the exact effect.
        sign: Keep the largest absolute, positive or negative scores.
        position: Whose next-token logits are measured.
        linearization: What is held in pull-backs.

    Raises:
        ArgumentError: If an option is not legal, or the prompts have different lengths.
        SiteUnavailableError: If the model has no residual stream, or MLPs without a closed form.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> n = interp.Observable.logit_diff(model, " Mary", " John")
        >>> text = "When {} and {} went to the store, {} gave a drink to"
        >>> clean, corrupt = text.format("Mary", "John", "John"), text.format("John", "Mary", "Mary")
        >>> found = interp.find_paths(model, n, clean, corrupt, beam=3, max_length=2)
        >>> found.correlation > 0.9
        True
    """
    _check_options(beam, max_length, score, sign, corrupt)
    held = Linearization.of(linearization)
    exact = ExactPaths(model, observable, clean, corrupt, position)
    search = _Beam(exact, held, score, sign)
    kept: dict[str, _Found] = {}
    front = [Path((), exact.position)]
    for _ in range(max_length):
        found = sorted((f for path in front for f in search.extend(path)), key=search.order)[:beam]
        kept |= {str(f.path): f for f in found}
        front = [f.path for f in found if not f.path.embed]
        if not front:
            break
    best = sorted(kept.values(), key=search.order)
    return _result(exact, search, score, best)


@torch.no_grad()
def extend_path(
    model: Model, observable: Observable, clean: Any, path: PathLike = "", corrupt: Any = None, *,
    score: Score | None = None, position: int = -1, linearization: LinearizationLike = "path",
) -> PathSearch:  # fmt: skip
    """Return every component that can feed a path at its input end, as a longer path with its score, largest first.

    One step of `find_paths`: from the empty path the parts that write to the final stream, then what feeds the chosen
    one, and so on.

    Args:
        model: A decoder.
        observable: What is measured.
        clean: One prompt.
        path: The path so far, as `propagate` takes it; empty for the logits.
        corrupt: A prompt of the same number of tokens; then only the difference counts.
        score: As for `find_paths`; ``attribution`` by default, ``linear`` with a corrupt prompt.
        position: Whose next-token logits are measured, where the path does not say.
        linearization: What is held in pull-backs.

    Raises:
        ArgumentError: If the path begins at the embedding, a component does not exist, or an option is not legal.
        PositionError: If a position lies outside the prompt.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> n = interp.Observable.logit_diff(model, " Mary", " John")
        >>> found = interp.extend_path(model, n, "When Mary and John went out, John gave a drink to")
        >>> len(found.paths) == found.tried
        True
    """
    wanted: Score = score or ("attribution" if corrupt is None else "linear")
    _check_options(1, 1, wanted, "abs", corrupt)
    given = Path.parse(path)
    given = given if given.steps or path else Path((), position)
    if given.embed:
        raise ArgumentError(f"path {given}", "a path that does not begin at the embedding", "nothing feeds it")
    exact = ExactPaths(model, observable, clean, corrupt, given.position)
    placed = given.check(model, exact.ref.length)
    search = _Beam(exact, Linearization.of(linearization), wanted, "abs")
    best = sorted(search.extend(placed), key=search.order)
    return _result(exact, search, wanted, best)


def _result(exact: ExactPaths, search: "_Beam", score: Score, best: "list[_Found]") -> PathSearch:
    return PathSearch(
        exact.observable.name, exact.measurement, exact.corrupt_measurement, score, [str(f.path) for f in best],
        torch.tensor([f.score for f in best]), torch.tensor([f.effect for f in best]), search.correlation, search.tried,
        exact.labels,
    )  # fmt: skip


def _check_options(beam: int, max_length: int, score: str, sign: str, corrupt: Any) -> None:
    if beam < 1 or max_length < 1:
        raise ArgumentError(f"beam={beam} and max_length={max_length}", "both at least 1")
    if score not in ("linear", "attribution", "patch") or sign not in ("abs", "positive", "negative"):
        raise ArgumentError(
            f"score={score!r} and sign={sign!r}",
            "score 'linear', 'attribution' or 'patch', and sign 'abs', 'positive' or 'negative'",
        )
    if (score == "attribution") != (corrupt is None):
        raise ArgumentError(
            f"score={score!r} {'with' if corrupt is not None else 'without'} a corrupt prompt",
            "a corrupt prompt for 'linear' and 'patch', none for 'attribution'",
        )


@dataclass(frozen=True)
class _Found:
    path: Path
    score: float
    effect: float


class _Beam:
    """Extends paths, and keeps what is needed to say how well scores predict effects."""

    def __init__(self, exact: ExactPaths, held: Linearization, score: Score, sign: Sign):
        self.exact, self.held, self.score, self.sign = exact, held, score, sign
        self.pairs: list[Tensor] = []

    def order(self, found: _Found) -> tuple[float, str]:
        """Best first; ties by the path's text."""
        value = {"abs": abs(found.score), "positive": found.score, "negative": -found.score}[self.sign]
        return -value, str(found.path)

    @property
    def tried(self) -> int:
        """How many candidates were scored."""
        return sum(pair.shape[1] for pair in self.pairs)

    @property
    def correlation(self) -> float:
        """Of scores and exact effects over all candidates; NaN of a single one."""
        scores, effects = torch.cat(self.pairs, 1).double()
        if len(scores) < 2:
            return float("nan")
        return float(torch.corrcoef(torch.stack([scores, effects]))[0, 1])

    def extend(self, path: Path) -> Iterator[_Found]:
        """A path with each component that can feed it, scored."""
        exact = self.exact
        vector = propagate(exact.model, exact.observable, exact.clean, path=path, linearization=self.held)
        here = vector.position
        assert here is not None
        steps, deltas = self._candidates(path, here)
        scores = deltas @ vector.vector
        effects = exact.effects(path, deltas)
        self.pairs.append(torch.stack([scores, effects]))
        shown = effects if self.score == "patch" else scores
        for step, score, effect in zip(steps, shown.tolist(), effects.tolist(), strict=True):
            longer = Path(path.steps, path.position, True) if step is None else path.extended(step)
            yield _Found(longer, score, effect)

    def _candidates(self, path: Path, here: int) -> tuple[list[Step | None], Float[Tensor, "candidate d"]]:
        exact, first = self.exact, path.steps[0] if path.steps else None
        parallel = exact.ref.weights.layout.parallel
        steps: list[Step | None] = [None]
        deltas = [exact.embedding(here)[None]]
        for layer in range(exact.model.n_layers):
            if first is None or feeds(Step(layer, 0), first, parallel):
                parts = exact.heads(layer, here)
                steps += [Step(layer, h, s) for h in range(parts.shape[0]) for s in range(parts.shape[1])]
                deltas.append(parts.flatten(0, 1))
            if first is None or feeds(Step(layer), first, parallel):
                steps.append(Step(layer))
                deltas.append(exact.mlp(layer, here)[None])
        return steps, torch.cat(deltas)
