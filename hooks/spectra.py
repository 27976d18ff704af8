"""Singular and eigen analysis of a LinearMap that is never formed."""

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.table import Rows, Table
from interp.hooks.windows import Window, WindowLike, restricted

if TYPE_CHECKING:
    from interp.hooks.linear_map import LinearMap

_POWER_STEPS = 6
_OVERSAMPLING = 8


class NotConvergedWarning(UserWarning):
    """Singular or eigen pairs whose residual is above the tolerance."""


@dataclass(frozen=True)
class SVD(Rows):
    """F ≈ Σ σ_i u_i v_iᵀ, largest first; the largest entry of each u is positive.

    Vectors that belong to nearly equal values span a subspace; their own directions are arbitrary.

    Attributes:
        u: Left singular vectors [k, *out_shape].
        s: Singular values [k].
        v: Right singular vectors [k, *in_shape].
        residuals: max(‖F v - σ u‖, ‖Fᵀ u - σ v‖) / σ_1 of each pair [k], F restricted to the windows.
        linearization: What was held.
    """

    u: Float[Tensor, "k ..."] = field(repr=False)
    s: Float[Tensor, "k"]
    v: Float[Tensor, "k ..."] = field(repr=False)
    residuals: Float[Tensor, "k"]
    linearization: str = ""

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each value."""
        pairs = zip(self.s.tolist(), self.residuals.tolist(), strict=True)
        return [{"index": i, "value": s, "residual": r} for i, (s, r) in enumerate(pairs)]

    def table(self) -> Table:
        """The values with their residuals."""
        return Table(self.to_records(), f"{len(self.s)} singular values")


@dataclass(frozen=True)
class Eigen(Rows):
    """F v_i = λ_i v_i for a square map, largest magnitude first. F is not normal: eigenvectors may be ill-conditioned.

    Attributes:
        values: Eigenvalues [k].
        vectors: Eigenvectors of unit norm [k, *in_shape].
        residuals: ‖F v - λ v‖ / |λ_1| of each pair [k], F restricted to the window.
        linearization: What was held.
    """

    values: Complex[Tensor, "k"]
    vectors: Complex[Tensor, "k ..."] = field(repr=False)
    residuals: Float[Tensor, "k"]
    linearization: str = ""

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each value: real part, imaginary part, residual."""
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        return [{"index": i, "real": z.real, "imaginary": z.imag, "residual": r} for i, (z, r) in enumerate(pairs)]


def svd(
    operator: "LinearMap",
    k: int = 6,
    *,
    method: Literal["lanczos", "randomised"] = "lanczos",
    window: WindowLike | None = None,
    input_window: WindowLike | None = None,
    centred: bool = False,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> SVD:
    """Return the k largest singular triplets of F, or of F between windows of inputs and outputs.

    ``lanczos`` works on FᵀF or FFᵀ, the smaller side. ``randomised`` subspace iteration is fast where the spectrum
    decays and underestimates a flat one; both report residuals. Vectors are zero outside the windows.

    Args:
        operator: The map.
        k: How many.
        method: ``lanczos`` or ``randomised``.
        window: Outputs: a mask [*out_shape] or a box of slices; the operator is restricted to them.
        input_window: Inputs: likewise, of [*in_shape].
        centred: Remove the common shift of all classes (the mean over the last output axis) first.
        tolerance: Residual above which a `NotConvergedWarning` is given.
        seed: Of the start vector.

    Raises:
        ArgumentError: If k or the method is out of range, a window does not fit, or outputs to centre are no logits.
    """
    part = restricted(operator, window, input_window, centred)
    rows, columns = math.prod(part.out_shape), math.prod(part.in_shape)
    if not 1 <= k < min(rows, columns):
        raise ArgumentError(f"k={k} of a {rows} x {columns} map", f"1..{min(rows, columns) - 1}")
    pair = _Flat(part)
    if method == "lanczos":
        u, s, v = _lanczos(pair, k, seed)
    elif method == "randomised":
        u, s, v = _randomised(pair, k, seed)
    else:
        raise ArgumentError(f"method={method!r}", "'lanczos' or 'randomised'")
    sign = torch.sign(u.gather(1, u.abs().argmax(1, keepdim=True)))
    u, v = u * sign, v * sign
    residuals = _residuals(pair, u, s, v)
    _warn(residuals, tolerance, "singular")
    out, into = Window(window, operator.out_shape), Window(input_window, operator.in_shape)
    return SVD(out.embed(u), s, into.embed(v), residuals, _held(operator))


def eig(
    operator: "LinearMap", k: int = 6, *, window: WindowLike | None = None, tolerance: float = 1e-4, seed: int = 0
) -> Eigen:
    """Return the k eigenpairs of largest magnitude of a square map, or of its part within a window.

    Args:
        operator: The map.
        k: How many.
        window: Entries of input and output alike: a mask or a box of slices; vectors are zero outside.
        tolerance: Residual above which a `NotConvergedWarning` is given.
        seed: Of the start vector.

    Raises:
        ArgumentError: If the map is not square, k is out of range, or the window does not fit.
    """
    from scipy.sparse.linalg import eigs

    if operator.in_shape != operator.out_shape:
        raise ArgumentError(f"a map {list(operator.in_shape)} -> {list(operator.out_shape)}", "equal shapes", "use svd")
    part = restricted(operator, window, window)
    size = math.prod(part.in_shape)
    if not 1 <= k < size - 1:
        raise ArgumentError(f"k={k} of a {size} x {size} map", f"1..{size - 2}")
    start = np.random.default_rng(seed).standard_normal(size)
    values, vectors = eigs(part.to_scipy(), k=k, v0=start)  # pyright: ignore[reportAssignmentType]
    order = np.argsort(-np.abs(values))
    values, vectors = torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order].T.copy())
    parts = [_Flat(part).push(p.contiguous()).double().cpu() for p in (vectors.real, vectors.imag)]
    gap = torch.complex(*parts) - values[:, None] * vectors
    residuals = gap.norm(dim=1) / values.abs().max().clamp(min=1e-30)
    _warn(residuals, tolerance, "eigen")
    return Eigen(values, Window(window, operator.in_shape).embed(vectors), residuals, _held(operator))


def _held(operator: "LinearMap") -> str:
    return operator.linearization.name if operator.linearization else ""


class _Flat:
    """F and Fᵀ on flat probes [n, size]."""

    def __init__(self, operator: "LinearMap"):
        self.operator = operator

    def push(self, v: Tensor) -> Tensor:
        return self.operator.matvec(v.reshape(-1, *self.operator.in_shape)).reshape(len(v), -1)

    def pull(self, w: Tensor) -> Tensor:
        return self.operator.rmatvec(w.reshape(-1, *self.operator.out_shape)).reshape(len(w), -1)


def _lanczos(pair: _Flat, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = pair.operator
    rows, columns = math.prod(operator.out_shape), math.prod(operator.in_shape)
    wide = rows < columns
    forth, back = (pair.pull, pair.push) if wide else (pair.push, pair.pull)
    size = min(rows, columns)

    def gram(x):
        probe = torch.as_tensor(np.asarray(x).reshape(1, -1), dtype=operator.dtype, device=operator.device)
        return back(forth(probe))[0].double().cpu().numpy()

    start = np.random.default_rng(seed).standard_normal(size)
    symmetric = LinearOperator((size, size), matvec=gram, dtype=np.float64)  # pyright: ignore
    values, vectors = eigsh(symmetric, k=k, v0=start)
    order = np.argsort(-values)
    s = torch.from_numpy(np.sqrt(np.clip(values[order], 0, None))).to(operator.device, operator.dtype)
    near = torch.from_numpy(vectors[:, order].T.copy()).to(operator.device, operator.dtype)
    far = forth(near) / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]
    return (near, s, far) if wide else (far, s, near)


def _randomised(pair: _Flat, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    operator = pair.operator
    size = min(math.prod(operator.out_shape), math.prod(operator.in_shape))
    made = torch.Generator().manual_seed(seed)
    width = min(k + _OVERSAMPLING, size)
    probe = torch.randn(width, math.prod(operator.in_shape), generator=made).to(operator.device, operator.dtype)
    for _ in range(_POWER_STEPS):
        left = torch.linalg.qr(pair.push(probe).T)[0].T
        probe = torch.linalg.qr(pair.pull(left).T)[0].T
    small = pair.push(probe)
    u, s, vh = torch.linalg.svd(small.T.double(), full_matrices=False)
    v = (vh @ probe.double())[:k]
    return u.T[:k].to(probe), s[:k].to(probe), v.to(probe)


def _residuals(pair: _Flat, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    forth = (pair.push(v) - s[:, None] * u).norm(dim=1)
    back = (pair.pull(u) - s[:, None] * v).norm(dim=1)
    return torch.maximum(forth, back) / s.max().clamp(min=torch.finfo(s.dtype).tiny)


def _warn(residuals: Tensor, tolerance: float, kind: str) -> None:
    bad = int((~(residuals <= tolerance)).sum())
    if bad:
        worst = f"(worst {residuals.max():.1e})"
        text = f"{bad} of {len(residuals)} {kind} pairs have a residual above {tolerance:.0e} {worst}"
        warnings.warn(text, NotConvergedWarning, stacklevel=3)
