"""FeatureVector: an observable pulled back to a site; cosines and coupling coefficients between them.

Source: Dunefsky & Cohan, "Observable Propagation: Uncovering Feature Vectors in Transformers", ICML 2024.
"""

import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.activations import Activations
from interp.hooks.errors import ArgumentError, SiteError
from interp.hooks.layouts import child
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.hooks.site import Site
from interp.hooks.table import Rows, Table

Form = Literal["reference", "ov", "data-free"]


class ZeroVectorWarning(UserWarning):
    """A cosine or coupling with a vector of norm zero."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureVector(Rows):
    """A covector: its score on an activation x at its site is vector · x (+ offset).

    Attributes:
        vector: [d], in float32 or better.
        offset: Constant that the path adds, so that at the reference score + offset is what flows along it.
        site: The site that it reads, with its position where there is one.
        observable: What was pulled back.
        path: Along which components, or "all paths".
        linearization: What was held.
        form: ``reference`` (divisors, patterns and gates of a prompt), ``ov`` (the same without patterns) or
            ``data-free`` (gains and weights alone, to the normalised input of the component).
        model: The model, for `top_tokens`; not saved.
        note: What to know when reading the numbers.
    """

    vector: Float[Tensor, "d"]
    offset: float
    site: Site
    observable: str
    path: str
    linearization: Linearization
    form: Form = "reference"
    model: Model | None = field(default=None, metadata={"saved": False})
    note: str = ""

    @property
    def position(self) -> int | None:
        """The token position that it reads, counted from 0, or None."""
        positions = self.site.positions
        return positions[0] if isinstance(positions, tuple) else None

    @property
    def norm(self) -> float:
        """‖vector‖."""
        return float(self.vector.norm())

    def score(self, x: "Activations | Float[Tensor, '*batch d']") -> Float[Tensor, "*batch"]:
        """Return vector · x.

        Args:
            x: Captured activations, of which the vector's own site is read, at its own position where it has one, else
                at all; or a tensor of that site.

        Raises:
            SiteError: If the activations do not hold the vector's site.
            ArgumentError: If a tensor has another width.
        """
        if isinstance(x, Activations):
            x = self._own(x)
        if x.shape[-1] != len(self.vector):
            raise ArgumentError(f"activations of width {x.shape[-1]}", f"{len(self.vector)}, the width at {self.site}")
        return x.to(self.vector) @ self.vector

    def _own(self, acts: Activations) -> Tensor:
        held = [key for key in acts if Site.parse(key).whole == self.site.whole]
        if not held:
            raise SiteError(f"activations at {', '.join(list(acts)[:3])}", f"{self.site.whole}, the vector's own site")
        value, where = self._own_head(acts[held[0]], held[0]), acts.where.get(held[0])
        if self.position is None:
            return value
        columns = acts.batch.positions(self.position)
        if where is None:
            return value[torch.arange(len(value))[:, None], columns.to(value.device)][:, 0]
        found = where.to(columns) == columns
        if not found.any(1).all():
            raise SiteError(f"{held[0]} at other positions", f"position {self.position}, the vector's own")
        return value[torch.arange(len(value)), found.int().argmax(1).to(value.device)]

    def _own_head(self, value: Tensor, key: str) -> Tensor:
        """Of a site with heads the vector's own: [batch, pos, head, d_head] to [batch, pos, d_head]."""
        if self.site.head is None:
            return value
        captured = Site.parse(key).head
        if captured is None:
            return value[:, :, self.site.head[0]]
        if self.site.head[0] not in captured:
            raise SiteError(f"activations at {key}", f"head {self.site.head[0]}, the vector's own")
        return value[:, :, captured.index(self.site.head[0])]

    def top_tokens(self, k: int = 10, *, model: Model | None = None) -> Table:
        """Return the k tokens whose embeddings score highest, and the k that score lowest.

        Meaningful where the vector reads the embedding, or a stream that still resembles it.

        Raises:
            ArgumentError: If no model is at hand, or its embeddings have another width.
        """
        model = model or self.model
        if model is None or model.layout is None or not k >= 1:
            raise ArgumentError("top_tokens without a model" if k >= 1 else f"k={k}", "the model, and k of at least 1")
        weight = child(model.module, model.layout.embed).weight.detach()  # type: ignore[union-attr]
        if weight.shape[-1] != len(self.vector):
            raise ArgumentError(f"embeddings of width {weight.shape[-1]}", f"width {len(self.vector)}")
        scores = weight.to(self.vector) @ self.vector
        order = scores.argsort(descending=True, stable=True).tolist()
        word = (lambda i: model.tokenizer.decode([i])) if model.tokenizer is not None else str
        rows = [{"token": word(i), "id": i, "score": float(scores[i])} for i in (*order[:k], *order[-k:])]
        return Table(rows, f"tokens along {self.observable} at {self.site}")

    def normalized(self) -> "FeatureVector":
        """This vector with norm 1 (its offset scaled with it).

        Raises:
            ArgumentError: If it is zero.
        """
        if self.norm == 0:
            raise ArgumentError(f"a zero vector at {self.site}", "a vector with a direction")
        return self._with(self.vector / self.norm, self.offset / self.norm)

    def _with(self, vector: Tensor, offset: float) -> "FeatureVector":
        return replace(self, vector=vector, offset=offset)

    def to_records(self) -> list[dict[str, Any]]:
        """One row that says what the vector is."""
        row = {"observable": self.observable, "path": self.path, "site": str(self.site), "norm": self.norm}
        row |= {"offset": self.offset, "linearization": self.linearization.name, "form": self.form}
        return [row | ({"note": self.note} if self.note else {})]

    def __repr__(self) -> str:
        held = {"data-free": self.form, "ov": f"{self.linearization.name}, ov"}.get(self.form, self.linearization.name)
        text = f"{self.observable} at {self.site} along {self.path} ({held}): width {len(self.vector)}"
        text += f", norm {self.norm:.4g}, offset {self.offset:.4g}"
        return f"FeatureVector({text}{', ' + self.note if self.note else ''})"

    def _repr_html_(self) -> str:
        return Table(self.to_records(), "feature vector")._repr_html_()


def _comparable(f: FeatureVector, g: FeatureVector) -> None:
    if (f.site.whole, f.site.head) != (g.site.whole, g.site.head) or f.vector.shape != g.vector.shape:
        raise SiteError(f"vectors at {f.site} and {g.site}", "vectors of one site")
    if f.linearization != g.linearization or f.form != g.form:
        raise ArgumentError(
            f"vectors under {f.linearization.name} ({f.form}) and {g.linearization.name} ({g.form})",
            "one linearisation",
            "their norms do not compare",
        )


def _wide(f: FeatureVector) -> Tensor:
    """A vector in float64, on the CPU: not every device has float64, and one vector is little."""
    return f.vector.cpu().double()


def _ratio(top: Tensor, bottom: Tensor, what: str) -> float:
    if float(bottom) == 0:
        warnings.warn(f"{what} with a vector of norm zero is NaN", ZeroVectorWarning, stacklevel=3)
        return float("nan")
    return float(top / bottom)


def cosine(f: FeatureVector, g: FeatureVector) -> float:
    """Return f · g / (‖f‖ ‖g‖); NaN with a warning where one is zero.

    It tells something only against the cosine of the vectors that were pulled back, and against a control observable.

    Raises:
        SiteError: If the vectors read different sites.
        ArgumentError: If they were made under different linearisations.
    """
    _comparable(f, g)
    a, b = _wide(f), _wide(g)
    return _ratio(a @ b, a.norm() * b.norm(), "a cosine")


def coupling(f: FeatureVector, g: FeatureVector, cov: Float[Tensor, "d d"] | None = None) -> float:
    """Return C(f -> g) = f · g / ‖f‖²: where an input scores k on f, its expected score on g is C k.

    That is the mean over inputs that are isotropic around f's score (paper, theorem 2). With a covariance Σ it is
    fᵀΣg / fᵀΣf, the least-squares slope of g's score on f's; with the sample's own covariance exactly that slope. It is
    directed: C(f -> g) C(g -> f) = cos².

    Raises:
        SiteError: If the vectors read different sites.
        ArgumentError: If they were made under different linearisations, or the covariance has another shape.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> she = interp.Observable.logit_diff(model, " she", " he")
        >>> her = interp.Observable.logit_diff(model, " her", " him")
        >>> f, g = (interp.propagate(model, n, path="L20H3") for n in (she, her))
        >>> 0 < interp.coupling(f, g) * interp.coupling(g, f) <= 1
        True
    """
    _comparable(f, g)
    a, b = _wide(f), _wide(g)
    if cov is not None:
        if tuple(cov.shape) != (len(a), len(a)):
            raise ArgumentError(f"a covariance of shape {list(cov.shape)}", f"[{len(a)}, {len(a)}]")
        b, a_seen = cov.to(a) @ b, cov.to(a) @ a
        return _ratio(a @ b, a @ a_seen, "a coupling")
    return _ratio(a @ b, a @ a, "a coupling")


def coupling_range(f: FeatureVector, g: FeatureVector, score: float, norm: float) -> tuple[float, float]:
    """Return the least and the largest score on g of inputs of a given norm that score k on f.

    On the sphere ‖x‖ = s cut by f · x = k, g · x runs over ‖g‖/‖f‖ (k cos θ ± |sin θ| sqrt(s² ‖f‖² - k²)), θ the angle
    between f and g; its mean is k C(f -> g).

    Args:
        f: The vector whose score is known.
        g: The vector whose score is bounded.
        score: k, without f's offset.
        norm: s, the norm of the inputs (of normalised activations: about sqrt(d)).

    Raises:
        SiteError: If the vectors read different sites.
        ArgumentError: If they were made under different linearisations, or no input of that norm scores that much.

    Source: Dunefsky & Cohan 2024, theorem 2.

    Example:
        >>> import torch, interp
        >>> make = lambda *v: interp.FeatureVector(
        ...     torch.tensor(v), 0.0, interp.Site("hook_embed"), "m", "logits", interp.Linearization.of("path"))
        >>> coupling_range(make(1.0, 0.0), make(0.0, 2.0), score=3.0, norm=5.0)
        (-8.0, 8.0)
    """
    _comparable(f, g)
    a, b = _wide(f), _wide(g)
    size = float(a.norm())
    if not abs(score) <= norm * size:
        raise ArgumentError(
            f"a score of {score:.4g} on a vector of norm {size:.4g}",
            f"at most {norm * size:.4g} for inputs of norm {norm}",
        )
    middle = score * _ratio(a @ b, a @ a, "a range")
    # |sin θ| ‖g‖ from what of g is across f: 1 - cos² would cancel.
    across = float((b - a * (a @ b) / (a @ a)).norm())
    spread = across / size * (norm**2 * size**2 - score**2) ** 0.5 if size else float("nan")
    return middle - spread, middle + spread


@dataclass(frozen=True)
class CouplingFit(Rows):
    """A coupling coefficient beside what activations show.

    Attributes:
        predicted: C(f -> g), for isotropic inputs.
        predicted_r2: cos², what r² would be for isotropic inputs.
        slope: Least-squares slope of g's score on f's, with an intercept.
        intercept: Its intercept.
        r2: Share of the variance of g's score that it explains.
        n: How many activations.
    """

    predicted: float
    predicted_r2: float
    slope: float
    intercept: float
    r2: float
    n: int

    def to_records(self) -> list[dict[str, Any]]:
        """One row."""
        return [asdict(self)]


def validate_coupling(
    f: FeatureVector, g: FeatureVector, activations: Float[Tensor, "n d"] | Activations, *,
    exclude_positions: tuple[int, ...] = (0,),
) -> CouplingFit:  # fmt: skip
    """Return the slope of g's score on f's over activations at their site, beside the coupling coefficient.

    Args:
        f: The vector that predicts.
        g: The vector that is predicted.
        activations: Captured at the vectors' site (all positions of it), or rows of it.
        exclude_positions: Positions left out of captured activations: a few tokens of huge norm, above all the first,
            would rule the fit.

    Raises:
        SiteError: If the vectors, or the activations, are of different sites.
        ArgumentError: If fewer than three rows are left, or f's score does not vary.
    """
    _comparable(f, g)
    rows = _rows(f, activations, exclude_positions) if isinstance(activations, Activations) else activations
    x, y = f.score(rows).double(), g.score(rows).double()
    if len(x) < 3 or float(x.var()) == 0:
        raise ArgumentError(f"{len(x)} activations with a variance of {float(x.var()):.3g}", "3 or more that vary")
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    r2 = float((dx @ dy) ** 2 / ((dx @ dx) * (dy @ dy)).clamp(min=1e-300))
    return CouplingFit(coupling(f, g), cosine(f, g) ** 2, slope, float(y.mean() - slope * x.mean()), r2, len(x))


def _rows(f: FeatureVector, acts: Activations, exclude: tuple[int, ...]) -> Tensor:
    """Real tokens of the vector's site, without the excluded positions, one row each."""
    held = [key for key in acts if Site.parse(key).whole == f.site.whole]
    if not held or acts.mask is None or acts.where.get(held[0]) is not None:
        raise SiteError(f"activations at {', '.join(list(acts)[:3])}", f"all positions of {f.site.whole}")
    keep = acts.mask.clone()
    for start, length, row in zip(acts.batch.starts, acts.batch.lengths, keep, strict=True):
        for p in exclude:
            if -length <= p < length:
                row[start + p % length] = False
    value = f._own_head(acts[held[0]], held[0])
    return value[keep.to(value.device)]


def pairwise(vectors: "list[FeatureVector]", what: Literal["cosine", "coupling"] = "cosine") -> Float[Tensor, "f g"]:
    """Return the cosine, or the coupling from row to column, of each pair.

    Raises:
        ArgumentError: If ``what`` is neither, or vectors were made under different linearisations.
        SiteError: If the vectors read different sites.
    """
    if what not in ("cosine", "coupling"):
        raise ArgumentError(f"what={what!r}", "'cosine' or 'coupling'")
    measure = cosine if what == "cosine" else coupling
    return torch.tensor([[measure(f, g) for g in vectors] for f in vectors], dtype=torch.float64)
