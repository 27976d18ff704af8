"""Two observables compared: do components read the same direction for both, more than their tokens' rows explain?

Source: Dunefsky & Cohan, "Observable Propagation", ICML 2024, section 3; the control is an extension.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from interp.hooks.linearization import LinearizationLike
from interp.hooks.model import Model
from interp.hooks.site import SiteLike
from interp.hooks.table import Rows, Table
from interp.observables.observable import Observable
from interp.observables.sequences import refuse_sequence
from interp.propagation.feature_vectors import cosine, coupling
from interp.propagation.paths import PathLike
from interp.propagation.propagate import propagate
from interp.propagation.reference import Reference


@dataclass(frozen=True)
class ObservableComparison(Rows):
    """The cosine of two observables' feature vectors, beside what it has to be judged against.

    Attributes:
        first: Name of the one observable.
        second: Name of the other.
        control: Name of an unrelated observable.
        site: What the vectors read.
        path: Along which components.
        cosine: Of the two feature vectors.
        starting_cosine: Of W_Uᵀ n of the two, at the final norm's output: what the tokens' own rows share (of an
            observable of a site, its own vector).
        control_cosine: Of the first and the control, along the same path.
        control_starting_cosine: Of W_Uᵀ n of the first and the control.
        coupling: C(first -> second).
        coupling_back: C(second -> first).
    """

    first: str
    second: str
    control: str
    site: str
    path: str
    cosine: float
    starting_cosine: float
    control_cosine: float
    control_starting_cosine: float
    coupling: float
    coupling_back: float

    def to_records(self) -> list[dict[str, Any]]:
        """One row for the pair, one for the control."""
        return [
            {"pair": f"{self.first}, {self.second}", "cosine": self.cosine, "starting cosine": self.starting_cosine},
            {
                "pair": f"{self.first}, {self.control} (control)", "cosine": self.control_cosine,
                "starting cosine": self.control_starting_cosine,
            },
        ]  # fmt: skip

    def to_json(self) -> str:
        """All numbers as JSON text."""
        return json.dumps(asdict(self), indent=1)

    def __repr__(self) -> str:
        return repr(Table(self.to_records(), f"{self.path} at {self.site}"))

    def _repr_html_(self) -> str:
        return Table(self.to_records(), f"{self.path} at {self.site}")._repr_html_()


def compare_observables(
    model: Model, first: Observable, second: Observable, control: Observable, prompt: Any = None, *,
    path: PathLike | None = None, site: SiteLike | None = None, linearization: LinearizationLike | None = None,
) -> ObservableComparison:  # fmt: skip
    """Return the cosine of two observables' feature vectors, beside that of their starting vectors and of a control.

    A high cosine says that a component treats two observables alike only if their rows of the unembedding were not
    alike already, and if an unrelated observable does not reach it.

    Args:
        model: A decoder.
        first: An observable.
        second: Another.
        control: One that has nothing to do with them.
        prompt: As for `propagate`; None for the data-free form.
        path: As for `propagate`.
        site: As for `propagate`.
        linearization: As for `propagate`.

    Raises:
        ArgumentError: As for `propagate`.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> pairs = (" she", " he"), (" her", " him"), (" red", " blue")
        >>> observables = [interp.Observable.logit_diff(model, a, b) for a, b in pairs]
        >>> found = interp.compare_observables(model, *observables, path="L20H3")
        >>> found.cosine > found.control_cosine
        True
    """
    for observable in (first, second, control):
        refuse_sequence(observable)
    ref = None if prompt is None else Reference.of(model, prompt)
    options: dict[str, Any] = {"path": path, "site": site, "linearization": linearization}
    f, g, h = (propagate(model, n, ref, **options) for n in (first, second, control))
    u, v, w = (n.pull_to_stream(model)[0] if n.site is None else n.vector for n in (first, second, control))
    assert u is not None
    assert v is not None
    assert w is not None
    return ObservableComparison(
        first.name, second.name, control.name, str(f.site), f.path, cosine(f, g), _cosine(u, v), cosine(f, h),
        _cosine(u, w), coupling(f, g), coupling(g, f),
    )  # fmt: skip


def _cosine(u: Tensor, v: Tensor) -> float:
    u, v = u.cpu().double(), v.cpu().double()
    return float(u @ v / (u.norm() * v.norm()))
