"""LinearMap: y = F x + r around a reference, applied without being formed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.budget import Chunk, Chunked, bytes_of
from interp.hooks.errors import ArgumentError, InputError, LinearizationError, SizeError
from interp.hooks.indices import flat_index
from interp.hooks.linearization import Linearization
from interp.hooks.spectra import SVD, Eigen, eig, svd


class LinearMap:
    """A linear operator F from inputs of shape ``in_shape`` to outputs of shape ``out_shape``.

    Shapes carry no batch axis; probes carry one leading axis.

    Args:
        push: V [n, *in_shape] -> F V [n, *out_shape].
        pull: W [n, *out_shape] -> Fᵀ W [n, *in_shape].
        in_shape: Shape of one input.
        out_shape: Shape of one output.
        like: A tensor whose dtype and device the operator has.
        linearization: What is held.
        chunk: How many probes are pushed or pulled at once; ``auto`` times one by one against a few at once, the first
            time that there are enough, and keeps the faster. It changes a result by rounding only.
        budget: Memory that a chunk may take, in bytes or as a text such as ``"2GiB"``.
        push_bytes: Memory that one pushed probe takes; by default its input and its output.
        pull_bytes: Memory that one pulled direction takes.

    Raises:
        SizeError: If the budget is too small for one probe.

    Example:
        >>> A = torch.arange(6.0).reshape(2, 3)
        >>> F = LinearMap(lambda v: v @ A.T, lambda w: w @ A, (3,), (2,), A)
        >>> torch.equal(F.dense(), A)
        True
    """

    def __init__(
        self,
        push: Callable[[Tensor], Tensor],
        pull: Callable[[Tensor], Tensor],
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        like: Tensor,
        linearization: Linearization | None = None,
        *,
        chunk: Chunk = "auto",
        budget: int | str = "2GiB",
        push_bytes: int | None = None,
        pull_bytes: int | None = None,
    ):
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)
        self.dtype, self.device = like.dtype, like.device
        self.linearization, self.budget = linearization, bytes_of(budget)
        self._item = torch.empty((), dtype=self.dtype).element_size()
        least = (math.prod(self.in_shape) + math.prod(self.out_shape)) * self._item
        self._push = Chunked(push, push_bytes or least, self.budget, chunk, "matvec")
        self._pull = Chunked(pull, pull_bytes or least, self.budget, chunk, "rmatvec")

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes of the matrix: numel of output, numel of input."""
        return math.prod(self.out_shape), math.prod(self.in_shape)

    def matvec(self, v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return F v for one input v (shape ``in_shape``), or for each of n probes [n, *in_shape].

        Raises:
            InputError: If the probes have another shape.
        """
        probes, single = self._probes(v, self.in_shape, "matvec")
        out = self._push(probes)
        return out[0] if single else out

    def rmatvec(self, w: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return Fᵀ w for one output direction w (shape ``out_shape``), or for each of n [n, *out_shape].

        Raises:
            InputError: If the directions have another shape.
        """
        probes, single = self._probes(w, self.out_shape, "rmatvec")
        out = self._pull(probes)
        return out[0] if single else out

    def matmat(self, v: Float[Tensor, "in n"]) -> Float[Tensor, "out n"]:
        """Return F V of flat inputs side by side.

        Raises:
            InputError: If V has another number of rows.
        """
        return self._side_by_side(v, self.in_shape, self._push, "matmat")

    def rmatmat(self, w: Float[Tensor, "out n"]) -> Float[Tensor, "in n"]:
        """Return Fᵀ W of flat output directions side by side.

        Raises:
            InputError: If W has another number of rows.
        """
        return self._side_by_side(w, self.out_shape, self._pull, "rmatmat")

    def _side_by_side(self, columns: Tensor, shape: tuple[int, ...], call: Chunked, what: str) -> Tensor:
        columns = torch.as_tensor(columns, dtype=self.dtype, device=self.device)
        if columns.ndim != 2 or len(columns) != math.prod(shape):
            raise InputError(f"{what} of a tensor {list(columns.shape)}", f"[{math.prod(shape)}, n]")
        return call(columns.T.reshape(-1, *shape)).flatten(1).T

    def rows(self, indices: Any, chunk: Chunk | None = None) -> Float[Tensor, "n ..."]:
        """Return rows F[k, :] (receptive filters), [n, *in_shape]; an index is a tuple into ``out_shape``, or flat."""
        return self._basis(indices, self.out_shape, self._pull, chunk)

    def columns(self, indices: Any, chunk: Chunk | None = None) -> Float[Tensor, "n ..."]:
        """Return columns F[:, j] (impulse responses), [n, *out_shape]; an index is a tuple or flat, as for `rows`."""
        return self._basis(indices, self.in_shape, self._push, chunk)

    def dense(self, max_bytes: int | str | None = None) -> Float[Tensor, "out in"]:
        """Return F as a matrix [numel of output, numel of input].

        Args:
            max_bytes: The largest matrix that is made; by default the budget.

        Raises:
            SizeError: If it would be larger.
        """
        rows, columns = math.prod(self.out_shape), math.prod(self.in_shape)
        size, most = rows * columns * self._item, self.budget if max_bytes is None else bytes_of(max_bytes)
        if size > most:
            raise SizeError(
                f"a {rows} x {columns} matrix of {size:,} bytes",
                f"at most {most:,}",
                "use rows, columns, matvec, or raise max_bytes",
            )
        if columns < rows:
            return self.columns(range(columns)).reshape(columns, rows).T.contiguous()
        return self.rows(range(rows)).reshape(rows, columns)

    def to_scipy(self):
        """Return the operator as a SciPy LinearOperator: float64 outside, the map's dtype inside.

        Vectors are flat, [size], and several stand side by side, [size, n]. The adjoint is checked once, here.

        Raises:
            LinearizationError: If <F v, w> and <v, Fᵀ w> differ by more than the dtype's rounding.
        """
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        self._check_adjoint()

        def of(call):
            side_by_side = lambda v: call(torch.from_numpy(np.ascontiguousarray(v))).double().cpu().numpy()
            return side_by_side, lambda v: side_by_side(np.asarray(v).reshape(-1, 1))[:, 0]

        (matmat, matvec), (rmatmat, rmatvec) = of(self.matmat), of(self.rmatmat)
        # Called with functions, LinearOperator makes an operator of another class; its stub knows only the first form.
        calls = {"matvec": matvec, "rmatvec": rmatvec, "matmat": matmat, "rmatmat": rmatmat}
        return LinearOperator(self.shape, dtype=np.float64, **calls)  # pyright: ignore

    def _check_adjoint(self) -> None:
        made = torch.Generator().manual_seed(0)
        shapes = self.in_shape, self.out_shape
        v, w = (torch.randn(1, *shape, generator=made).to(self.device, self.dtype) for shape in shapes)
        pushed, pulled = self._push(v).double(), self._pull(w).double()
        gap = float(((pushed * w.double()).sum() - (v.double() * pulled).sum()).abs())
        # Not finer in float64: networks that compute norms in float32 have no finer adjoint.
        allowed = min(max(100 * torch.finfo(self.dtype).eps, 1e-6), 2e-2) * float(pushed.norm() * w.double().norm())
        if not gap <= allowed:
            raise LinearizationError(
                f"<F v, w> and <v, Fᵀ w> differ by {gap:.1e}", f"at most {allowed:.1e} in {self.dtype}",
                "matvec and rmatvec are not of one matrix: scope.check() says more; compute in float64",
            )  # fmt: skip

    def svd(self, k: int = 6, **options) -> SVD:
        """Return the k largest singular triplets with their residuals; options as for `interp.hooks.spectra.svd`.

        Raises:
            ArgumentError: If k or an option is out of range.
        """
        return svd(self, k, **options)

    def eig(self, k: int = 6, **options) -> Eigen:
        """Return the k eigenpairs of largest magnitude of a square map; options as for `interp.hooks.spectra.eig`.

        Raises:
            ArgumentError: If the map is not square, or k is out of range.
        """
        return eig(self, k, **options)

    def _probes(self, v: Tensor, shape: tuple[int, ...], what: str) -> tuple[Tensor, bool]:
        v = torch.as_tensor(v, dtype=self.dtype, device=self.device)
        if tuple(v.shape) == shape:
            return v[None], True
        if tuple(v.shape[1:]) == shape:
            return v, False
        raise InputError(f"{what} of a tensor {list(v.shape)}", f"{list(shape)}, or [n, {', '.join(map(str, shape))}]")

    def _basis(self, indices: Any, shape: tuple[int, ...], call: Chunked, chunk: Chunk | None) -> Tensor:
        flat = torch.tensor([flat_index("index", i, shape) for i in indices], device=self.device)
        if len(flat) == 0:
            raise ArgumentError("no indices", "at least one")

        def probes(some: slice) -> Tensor:
            at = flat[some]
            made = torch.zeros(len(at), math.prod(shape), dtype=self.dtype, device=self.device)
            return made.scatter_(1, at[:, None], 1.0).reshape(len(at), *shape)

        return call.over(len(flat), probes, chunk)
