"""LinearMap: y = F x + r around a reference, applied without being formed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError, InputError, SizeError
from interp.hooks.linearization import Linearization
from interp.hooks.spectra import SVD, Eigen, eig, svd

_DENSE_BYTES = 2 << 30


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
    ):
        self._push, self._pull = push, pull
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)
        self.dtype, self.device = like.dtype, like.device
        self.linearization = linearization

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

    def rows(self, indices: Any, chunk: int = 32) -> Float[Tensor, "n ..."]:
        """Return rows F[k, :] (receptive filters), [n, *in_shape]; an index is a tuple into ``out_shape``, or flat."""
        return self._basis(indices, self.out_shape, self._pull, chunk)

    def columns(self, indices: Any, chunk: int = 32) -> Float[Tensor, "n ..."]:
        """Return columns F[:, j] (impulse responses), [n, *out_shape]; an index is a tuple or flat, as for `rows`."""
        return self._basis(indices, self.in_shape, self._push, chunk)

    def dense(self, max_bytes: int = _DENSE_BYTES) -> Float[Tensor, "out in"]:
        """Return F as a matrix [numel of output, numel of input].

        Raises:
            SizeError: If it would be larger than ``max_bytes``.
        """
        rows, columns = math.prod(self.out_shape), math.prod(self.in_shape)
        size = rows * columns * torch.empty((), dtype=self.dtype).element_size()
        if size > max_bytes:
            raise SizeError(
                f"a {rows} x {columns} matrix of {size:,} bytes",
                f"at most {max_bytes:,}",
                "use rows, columns, matvec, or raise max_bytes",
            )
        if columns < rows:
            return self.columns(range(columns)).reshape(columns, rows).T.contiguous()
        return self.rows(range(rows)).reshape(rows, columns)

    def to_scipy(self):
        """Return the operator as a SciPy LinearOperator on flat vectors (float64 outside, the map's dtype inside)."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def apply(call, shape):
            def flat(v):
                probe = torch.as_tensor(np.asarray(v).reshape(1, *shape), dtype=self.dtype, device=self.device)
                return call(probe).reshape(-1).double().cpu().numpy()

            return flat

        rows, columns = math.prod(self.out_shape), math.prod(self.in_shape)
        push, pull = apply(self._push, self.in_shape), apply(self._pull, self.out_shape)
        # Called with functions, LinearOperator makes an operator of another class; its stub knows only the first form.
        return LinearOperator((rows, columns), matvec=push, rmatvec=pull, dtype=np.float64)  # pyright: ignore

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

    def _basis(self, indices: Any, shape: tuple[int, ...], call: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
        flat = torch.tensor([_flat_index(i, shape) for i in indices], device=self.device)
        if len(flat) == 0:
            raise ArgumentError("no indices", "at least one")
        parts = []
        for some in flat.split(chunk):
            probes = torch.zeros(len(some), math.prod(shape), dtype=self.dtype, device=self.device)
            probes.scatter_(1, some[:, None], 1.0)
            parts.append(call(probes.reshape(len(some), *shape)))
        return torch.cat(parts)


def _flat_index(index: Any, shape: tuple[int, ...]) -> int:
    index = (index,) if isinstance(index, int) and len(shape) == 1 else index
    if isinstance(index, int):
        size = math.prod(shape)
        if not -size <= index < size:
            raise ArgumentError(f"index {index}", f"a flat index below {size}, or a tuple into {list(shape)}")
        return index % size
    if len(index) != len(shape) or any(not -n <= i < n for i, n in zip(index, shape, strict=True)):
        raise ArgumentError(f"index {tuple(index)}", f"an index into {list(shape)}")
    flat = 0
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i % n
    return flat
