"""Gate sandwich: MLP Jacobians of many tokens at once, or sums, norms and products of them, from weights and factors.

J_t = W_out (diag(p_t) W_pre + diag(q_t) W_up) - c_t n_tᵀ (+ I). With a norm in front, 1/r_t is in p and q already, n is
the normalised input and c_t = K_t n_t / d. The kernel computes the transpose and writes through strides; the form in
torch scales the weights of a group of tokens and multiplies.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.jacobians.kernels import device
from interp.jacobians.kernels.choice import Choice, choose
from interp.jacobians.kernels.device import Way, float32_products, runs_fused

if TYPE_CHECKING:
    from interp.jacobians.kernels.triton_sandwich import Tile

Precision = Literal["float32", "tf32"]

# Scaled weights of a group of tokens take at most this much, so that they stay in a GPU's cache; of one token, what
# that takes.
_GROUP_BYTES = 32 * 2**20
# Fewer tokens than these leave most of a GPU idle in one way or the other, and are tried by themselves.
_FEW = 8


@dataclass(frozen=True, eq=False)
class Sandwich:
    """What MLP Jacobians of some tokens are made of.

    Attributes:
        out: W_out [o, f].
        pre: W_pre [f, i], with a norm's gain and centring.
        p: Factor of each token and neuron [t, f], over the norm's divisor.
        up: W_up [f, i], of gated MLPs.
        q: Its factor [t, f].
        n: Normalised inputs [t, i], where a norm's divisor is differentiated.
        c: K_t n_t / d [t, o], with n.
        skip: Whether the identity is added.
    """

    out: Float[Tensor, "o f"]
    pre: Float[Tensor, "f i"]
    p: Float[Tensor, "t f"]
    up: Float[Tensor, "f i"] | None = None
    q: Float[Tensor, "t f"] | None = None
    n: Float[Tensor, "t i"] | None = None
    c: Float[Tensor, "t o"] | None = None
    skip: bool = False

    def __post_init__(self):
        given = {name for name in ("up", "q", "n", "c") if getattr(self, name) is not None}
        for one, other in (("up", "q"), ("n", "c")):
            if (one in given) != (other in given):
                raise ArgumentError(f"{one if one in given else other} alone", f"{one} and {other}, or neither")
        if self.skip and self.out.shape[0] != self.pre.shape[1]:
            raise ArgumentError(
                f"the identity on {self.pre.shape[1]} inputs and {self.out.shape[0]} outputs", "as many of each"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """[tokens, outputs, inputs]."""
        return len(self.p), self.out.shape[0], self.pre.shape[1]

    def of(self, tokens: slice) -> "Sandwich":
        """Some of the tokens."""
        cut = lambda x: None if x is None else x[tokens]
        return replace(self, p=self.p[tokens], q=cut(self.q), n=cut(self.n), c=cut(self.c))

    def aligned(self) -> "Sandwich":
        """The same with unit stride along the neurons, as the kernel needs it. A copy where it is not so already."""
        along = lambda x, axis: x if x is None or x.stride(axis) == 1 else x.movedim(axis, -1).contiguous()
        pre, up = along(self.pre, 0), along(self.up, 0)
        # A copy comes back with neurons last.
        back = lambda made, given: made if made is given or made is None else made.movedim(-1, 0)
        rest = {name: along(getattr(self, name), -1) for name in ("out", "p", "q", "n", "c")}
        return replace(self, pre=back(pre, self.pre), up=back(up, self.up), **rest)


def sandwich(
    x: Sandwich, out: Float[Tensor, "t o i"] | None = None, precision: Precision = "float32", way: Way = "auto"
) -> Float[Tensor, "t o i"]:
    """Return J_t of each token, into ``out`` where there is one, whatever its strides.

    Args:
        x: Weights, factors and the norm's term.
        out: Where to; its dtype is the result's. By default a new tensor of the factors' dtype.
        precision: Whether float32 factors of products on a GPU may be rounded to ``tf32``.
        way: ``fused`` (kernel), ``torch``, or ``auto``: on a GPU whichever was faster in a short trial of this size.

    Raises:
        ArgumentError: If ``out`` has another shape, or a kernel was asked for where none runs.
        MissingExtraError: If a kernel was asked for without Triton.

    Example:
        >>> import torch
        >>> from interp.jacobians.kernels.sandwich import Sandwich, sandwich
        >>> x = Sandwich(torch.ones(2, 3), torch.ones(3, 4), torch.tensor([[1.0, 2.0, 3.0]]))
        >>> sandwich(x)
        tensor([[[6., 6., 6., 6.],
                 [6., 6., 6., 6.]]])
    """
    out = x.p.new_empty(x.shape) if out is None else out
    if tuple(out.shape) != x.shape:
        raise ArgumentError(f"out {list(out.shape)}", f"{list(x.shape)}: tokens, outputs, inputs")
    tile = tile_for(x, precision, way)
    if tile is None:
        return _in_torch(x, out, precision)
    from interp.jacobians.kernels import triton_sandwich

    triton_sandwich.store(x.aligned(), out, tile, precision == "tf32")
    return out


def sandwich_sum(x: Sandwich, precision: Precision = "float32", way: Way = "auto") -> Float[Tensor, "o i"]:
    """Return Σ_t J_t: factors are summed first, so that it costs one token's product however many there are."""
    total = lambda f: None if f is None else f.sum(0, keepdim=True, dtype=torch.float64).to(f.dtype)
    one = replace(x, p=total(x.p), q=total(x.q), n=None, c=None, skip=False)
    found = sandwich(one, precision=precision, way=way)[0]
    if x.n is not None and x.c is not None:
        found = found - (x.c.T.double() @ x.n.double()).to(found.dtype)
    if x.skip:
        found.diagonal().add_(len(x.p))
    return found


def sandwich_norms(x: Sandwich, precision: Precision = "float32", way: Way = "auto") -> Float[Tensor, "t"]:
    """Return the squared Frobenius norm of each J_t; the kernel writes no J, torch some at a time."""
    tile = tile_for(x, precision, way)
    if tile is None:
        return _by_groups(x, precision, lambda made: made.flatten(1).square().sum(1))
    from interp.jacobians.kernels import triton_sandwich

    return triton_sandwich.norms(x.aligned(), tile, precision == "tf32").to(x.p.dtype)


def sandwich_left(
    x: Sandwich, w: Float[Tensor, "k o"], precision: Precision = "float32", way: Way = "auto"
) -> Float[Tensor, "t k i"]:
    """Return J_tᵀ w of each token and vector without writing J. Worth it where J is made anyway: a pull costs less."""
    tile = tile_for(x, precision, way)
    if tile is None:
        return _by_groups(x, precision, lambda made: w.to(made.dtype) @ made)
    from interp.jacobians.kernels import triton_sandwich

    return triton_sandwich.products(x.aligned(), w.contiguous(), True, tile, precision == "tf32").to(x.p.dtype)


def sandwich_right(
    x: Sandwich, v: Float[Tensor, "k i"], precision: Precision = "float32", way: Way = "auto"
) -> Float[Tensor, "t k o"]:
    """Return J_t v of each token and vector without writing J. Worth it where J is made anyway: a push costs less."""
    tile = tile_for(x, precision, way)
    if tile is None:
        return _by_groups(x, precision, lambda made: v.to(made.dtype) @ made.mT)
    from interp.jacobians.kernels import triton_sandwich

    return triton_sandwich.products(x.aligned(), v.contiguous(), False, tile, precision == "tf32").to(x.p.dtype)


def tile_for(x: Sandwich, precision: Precision, way: Way) -> "Tile | None":
    """The kernel's tile for a sandwich, or None where the form in torch runs.

    Raises:
        ArgumentError: If a kernel was asked for where none runs.
        MissingExtraError: If a kernel was asked for without Triton.
    """
    if precision not in ("float32", "tf32"):
        raise ArgumentError(f"precision={precision!r}", "'float32' or 'tf32'")
    if not runs_fused(way, x.out):
        return None
    from interp.jacobians.kernels.triton_sandwich import tiles_for

    tiles = tiles_for(x.out.dtype, precision == "tf32")
    return tiles[0] if way == "fused" else trial(x, precision).tile


def trial(x: Sandwich, precision: Precision) -> Choice:
    """Which way is faster for sandwiches of this size, dtype and device: measured once, on a GPU."""
    tf32 = precision == "tf32"
    if not device.fits_kernels(x.out):
        return Choice(None, {})
    size = (*x.shape[1:], x.out.shape[1], x.up is not None, len(x.p) < _FEW)
    return choose((size, x.out.dtype, tf32, x.out.device), lambda: _candidates(x.of(slice(_FEW)), precision))


def _candidates(x: Sandwich, precision: Precision) -> dict:
    """Both ways as calls: by tile, and in torch by None."""
    from interp.jacobians.kernels import triton_sandwich

    tf32, out, ready = precision == "tf32", x.p.new_empty(x.shape), x.aligned()
    calls: dict = {None: lambda: _in_torch(x, out, precision)}
    for tile in triton_sandwich.tiles_for(x.out.dtype, tf32):
        calls[tile] = lambda tile=tile: triton_sandwich.store(ready, out, tile, tf32)
    return calls


def group_size(x: Sandwich) -> int:
    """How many tokens' scaled weights are held at a time."""
    return max(1, min(len(x.p), _GROUP_BYTES // max(1, x.pre.numel() * x.pre.element_size())))


def _by_groups(x: Sandwich, precision: Precision, of: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function makes of the matrices, some tokens at a time."""
    size = group_size(x)
    parts = [sandwich(x.of(slice(i, i + size)), None, precision, "torch") for i in range(0, len(x.p), size)]
    return torch.cat([of(part) for part in parts])


def _in_torch(x: Sandwich, out: Tensor, precision: Precision) -> Tensor:
    """Scaled weights of a group of tokens, and one batched product."""
    size = group_size(x)
    with float32_products(x.out, precision == "tf32"):
        for start in range(0, len(x.p), size):
            span = slice(start, start + size)
            _group_in_torch(x.of(span), out[span])
    return out


def _group_in_torch(x: Sandwich, out: Tensor) -> None:
    scaled = x.p[:, :, None] * x.pre
    if x.up is not None and x.q is not None:
        scaled.addcmul_(x.q[:, :, None], x.up.to(scaled.dtype))
    left, scaled = x.out.expand(len(x.p), -1, -1), scaled.to(x.out.dtype)
    if out.dtype == left.dtype:
        made = torch.bmm(left, scaled, out=out)
    elif left.is_cuda and out.dtype == torch.float32:
        made = torch.bmm(left, scaled, out_dtype=torch.float32)
    else:
        # No product here has results of another dtype than its factors: widen those that were rounded already.
        made = torch.bmm(left.to(out.dtype), scaled.to(out.dtype))
    if x.n is not None and x.c is not None:
        made.baddbmm_(x.c[:, :, None].to(made.dtype), x.n[:, None].to(made.dtype), alpha=-1.0)
    if x.skip:
        made.diagonal(dim1=1, dim2=2).add_(1.0)
    if made is not out:
        out.copy_(made)
