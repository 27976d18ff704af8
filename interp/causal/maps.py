"""Alignment maps: what all share, and those that are one matrix.

A map takes activations h [*, rows, width] to a code z, in which blocks of coordinates stand for variables, and back.
Where the code does not hold all of h, what is missing is carried beside it as a rest, so that the way back is exact.
Parameters may have one more axis in front: maps of one kind are then trained together (`stack`).
"""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.hooks.errors import ArgumentError, NonInvertibleMapError, ShapeMismatchError

Code = tuple[Tensor, Tensor | None]
_PRECISE = (torch.float32, torch.float64)
_MOST_CONDITION = 1e7


class AlignmentMap(nn.Module):
    """A map of activations with its inverse.

    Args:
        width: Of the activations.
        seed: Of the initial values.
        dtype: float32 or float64: a bfloat16 RevNet loses 0.2 to 0.4 on the way back.
        force: Take a lower precision all the same.

    Raises:
        ShapeMismatchError: If the width is not positive.
        NonInvertibleMapError: If the dtype is below float32 and not forced.
    """

    kind: ClassVar[str] = ""
    lr_factors: ClassVar[dict[str, float]] = {}  # learning rates of parameters, relative to the others'

    def __init__(self, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, force: bool = False):
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ShapeMismatchError(f"width={width!r}", "the number of an activation's coordinates")
        if dtype not in _PRECISE and not force:
            raise NonInvertibleMapError(
                f"a map in {dtype}", "float32 or float64, whatever the model's dtype", "or force=True"
            )
        self.width, self.seed, self.dtype = width, seed, dtype

    @property
    def code_width(self) -> int:
        """Number of coordinates of z."""
        return self.width

    def parts(self) -> Any:
        """What is computed from the parameters once, for both ways."""
        return None

    def encode(self, x: Tensor, parts: Any = None) -> Code:
        """Return z and the rest."""
        raise NotImplementedError

    def decode(self, z: Tensor, rest: Tensor | None = None, parts: Any = None) -> Tensor:
        """Return the activations of a code."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows code"]:
        """Return z, in the map's dtype."""
        self._fits(x)
        return self.encode(x.to(self.dtype))[0]

    def inverse(
        self, z: Float[Tensor, "*rows code"], rest: Float[Tensor, "*rows width"] | None = None
    ) -> Float[Tensor, "*rows width"]:
        """Return the activations of a code, with the rest that `encode` gave where there is one."""
        return self.decode(z.to(self.dtype), rest)

    def weights(self, mask: Bool[Tensor, "*stack variables code"]) -> Tensor:
        """Return how much of each coordinate is swapped for each variable: the blocks themselves, unless learned."""
        return mask

    def swap_matrices(self, weights: Float[Tensor, "*stack variables code"]) -> Tensor | None:
        """Return W diag(weights_k) W⁻¹ for each variable, where z = h W; None where the map is no such matrix.

        A swap is then h* = h_b + Σ_k (h_k - h_b) W diag(weights_k) W⁻¹, without a code.
        """
        return None

    def penalty(self) -> Tensor | None:
        """What is added to the loss, or None."""
        return None

    def progress(self, share: float) -> None:
        """Note which share of the training is done."""

    def options(self) -> dict[str, Any]:
        """Arguments beside width, seed and dtype."""
        return {}

    def spec(self) -> dict[str, Any]:
        """Plain data from which `build_map` makes a map of this kind."""
        return {"kind": self.kind, **self.options()}

    @property
    def num_parameters(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def effective_dimension(self, sizes: Sequence[int]) -> float:
        """Number of values that an intervention on blocks of these sizes can depend on; by default all parameters."""
        return float(self.num_parameters)

    def condition(self) -> float:
        """Condition number of the map's matrix; 1 where it has none, or an orthogonal one."""
        return 1.0

    def _fits(self, x: Tensor) -> None:
        if x.shape[-1] != self.width:
            raise ShapeMismatchError(f"activations of shape {list(x.shape)}", f"rows of width {self.width}")

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def __repr__(self) -> str:
        more = "".join(f", {k}={v}" for k, v in self.options().items() if isinstance(v, (int, float, str)))
        return f"{type(self).__name__}({self.width}{more})"


def random_orthogonal(width: int, generator: torch.Generator) -> Float[Tensor, "width width"]:
    """A rotation drawn uniformly (Haar), in float64."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


class IdentityMap(AlignmentMap):
    """z = h: blocks are neurons."""

    kind = "identity"

    def encode(self, x, parts=None):
        """H itself."""
        return x, None

    def decode(self, z, rest=None, parts=None):
        """Z itself."""
        return z


class FixedMap(AlignmentMap):
    """z = h V for an orthogonal V that is not trained: the rows' principal axes, or a random rotation.

    Args:
        width: Of the activations.
        matrix: V; by default a random one.
        options: As of every map.

    Example:
        >>> x = torch.randn(5, 4)
        >>> FixedMap(4, seed=1).inverse(FixedMap(4, seed=1)(x)).allclose(x, atol=1e-5)
        True
    """

    kind = "random"
    matrix: Tensor

    def __init__(self, width: int, matrix: Tensor | None = None, **options: Any):
        super().__init__(width, **options)
        found = random_orthogonal(width, self._generator()) if matrix is None else matrix.detach()
        if found.shape != (width, width):
            raise ShapeMismatchError(f"a matrix {list(found.shape)}", f"[{width}, {width}]")
        self.register_buffer("matrix", found.to(self.dtype))

    def encode(self, x, parts=None):
        """H V."""
        return x @ self.matrix, None

    def decode(self, z, rest=None, parts=None):
        """Z Vᵀ."""
        return z @ self.matrix.mT

    def effective_dimension(self, sizes):
        """Nothing is trained."""
        return 0.0


class PCAMap(FixedMap):
    """z = h V with the principal axes of activations, the one of the largest variance first."""

    kind = "pca"

    @classmethod
    def fit(cls, acts: Float[Tensor, "rows width"], **options: Any) -> "PCAMap":
        """Return the map whose axes are those of these activations.

        Example:
            >>> acts = torch.randn(100, 3) * torch.tensor([1.0, 5.0, 2.0])
            >>> PCAMap.fit(acts).matrix[:, 0].abs().argmax().item()
            1
        """
        rows = acts.double()
        values, axes = torch.linalg.eigh(torch.cov(rows.T).reshape(rows.shape[1], -1))
        return cls(acts.shape[-1], axes[:, values.argsort(descending=True)], **options)


class OrthogonalMap(AlignmentMap):
    """z = h W with a trained orthogonal W: distributed alignment search (Geiger et al. 2023, arXiv 2303.02536).

    W = B (I + A)⁻¹ (I - A), with a random orthogonal B that stays and A = L - Lᵀ for a trained L below the diagonal
    (Cayley): orthogonal whatever L is, also when training goes on after loading.

    Example:
        >>> tau, x = OrthogonalMap(6, seed=0), torch.randn(3, 6)
        >>> tau.inverse(tau(x)).allclose(x, atol=1e-5)
        True
    """

    kind = "orthogonal"
    base: Tensor

    def __init__(self, width: int, **options: Any):
        super().__init__(width, **options)
        self.register_buffer("base", random_orthogonal(width, self._generator()).to(self.dtype))
        self.raw = nn.Parameter(torch.zeros(width, width, dtype=self.dtype))

    def parts(self):
        """W."""
        lower = self.raw.tril(-1)
        skew, one = lower - lower.mT, torch.eye(self.width, dtype=self.raw.dtype, device=self.raw.device)
        return self.base @ torch.linalg.solve(one + skew, one - skew)

    def encode(self, x, parts=None):
        """H W."""
        return x @ (self.parts() if parts is None else parts), None

    def decode(self, z, rest=None, parts=None):
        """Z Wᵀ."""
        return z @ (self.parts() if parts is None else parts).mT

    def swap_matrices(self, weights):
        """W diag(weights_k) Wᵀ."""
        w = self.parts()[..., None, :, :]
        return (w * weights[..., None, :]) @ w.mT

    @property
    def num_parameters(self):
        """Values below the diagonal of L."""
        return self.width * (self.width - 1) // 2

    def effective_dimension(self, sizes):
        """(d² - Σ k_i²) / 2, the remainder being one of the blocks: turns within a block change nothing."""
        return (self.width**2 - _squares(self.width, sizes)) / 2


class LowRankMap(AlignmentMap):
    """z = h U with orthonormal columns U [width, rank]; the rest is h - z Uᵀ. No matrix [width, width] is made.

    U is the factor Q of a trained matrix. Columns of that matrix can have any length, and steps lengthen them, which
    turns U less and less: it is trained at ten times the rate of other maps, and then gets as far as `OrthogonalMap`.

    Args:
        width: Of the activations.
        rank: Number of coordinates of z, at least as many as the blocks take.
        options: As of every map.

    Raises:
        ShapeMismatchError: If the rank is not in 1..width.
    """

    kind = "low_rank"
    lr_factors: ClassVar[dict[str, float]] = {"raw": 10.0}

    def __init__(self, width: int, rank: int, **options: Any):
        super().__init__(width, **options)
        if not 1 <= rank <= width:
            raise ShapeMismatchError(f"rank={rank!r}", f"1..{width}, the width")
        self.rank = rank
        start = torch.linalg.qr(torch.randn(width, rank, generator=self._generator(), dtype=torch.float64)).Q
        self.raw = nn.Parameter(start.to(self.dtype))

    @property
    def code_width(self):
        """The rank."""
        return self.rank

    def parts(self):
        """U."""
        return torch.linalg.qr(self.raw).Q

    def encode(self, x, parts=None):
        """H U, and what it leaves of h."""
        u = self.parts() if parts is None else parts
        z = x @ u
        return z, x - z @ u.mT

    def decode(self, z, rest=None, parts=None):
        """Z Uᵀ and the rest."""
        u = self.parts() if parts is None else parts
        return z @ u.mT if rest is None else rest + z @ u.mT

    def options(self):
        """The rank."""
        return {"rank": self.rank}

    def effective_dimension(self, sizes):
        """As of the orthogonal map of which it is a part."""
        return (self.width**2 - _squares(self.width, sizes)) / 2


class InvertibleMap(AlignmentMap):
    """z = h W with any invertible W; back by an LU solve. Blocks need not be orthogonal to each other.

    Example:
        >>> tau, x = InvertibleMap(6), torch.randn(3, 6)
        >>> tau.inverse(tau(x)).allclose(x, atol=1e-5)
        True
    """

    kind = "invertible"

    def __init__(self, width: int, **options: Any):
        super().__init__(width, **options)
        self.weight = nn.Parameter(random_orthogonal(width, self._generator()).to(self.dtype))

    def encode(self, x, parts=None):
        """H W."""
        return x @ self.weight, None

    def decode(self, z, rest=None, parts=None):
        """Z W⁻¹."""
        return torch.linalg.solve(self.weight, z, left=False)

    def swap_matrices(self, weights):
        """W diag(weights_k) W⁻¹, all by one solve."""
        chosen = self.weight[..., None, :, :] * weights[..., None, :]
        return torch.linalg.solve(self.weight, chosen.flatten(-3, -2), left=False).view_as(chosen)

    def condition(self):
        """The largest singular value of W over the smallest."""
        return float(torch.linalg.cond(self.weight.detach().double()).max())

    def effective_dimension(self, sizes):
        """d² - Σ k_i²: what mixes a block within itself changes nothing."""
        return float(self.width**2 - _squares(self.width, sizes))


def _squares(width: int, sizes: Sequence[int]) -> int:
    return sum(k * k for k in sizes) + (width - sum(sizes)) ** 2


def stack(maps: Sequence[AlignmentMap]) -> AlignmentMap:
    """Return one map whose parameters are those of maps of one kind, behind each other along a first axis.

    Raises:
        ArgumentError: If the maps differ in kind, width or options.
    """
    if len({str((m.spec(), m.width, m.dtype)) for m in maps}) != 1:
        raise ArgumentError(f"maps {', '.join(map(repr, maps))}", "maps of one kind, width and options")
    found = copy.deepcopy(maps[0])
    for name, parameter in maps[0].named_parameters():
        rows = torch.stack([m.get_parameter(name).detach() for m in maps])
        setattr(found, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    for name, _ in maps[0].named_buffers():
        setattr(found, name, torch.stack([m.get_buffer(name) for m in maps]))
    return found


@torch.no_grad()
def unstack(stacked: AlignmentMap, maps: Sequence[AlignmentMap]) -> None:
    """Write the parameters of a stack back into its maps."""
    for name, rows in stacked.named_parameters():
        for one, row in zip(maps, rows, strict=True):
            one.get_parameter(name).copy_(row)
    for one in maps:
        one.eval()


@torch.no_grad()
def round_trip(tau: AlignmentMap, acts: Float[Tensor, "rows width"]) -> float:
    """Return max |τ⁻¹(τ(h)) - h| / max(1, max |h|) over activations."""
    x = acts.to(tau.dtype)
    back = tau.decode(*tau.encode(x))
    return float((back - x).abs().max()) / max(1.0, float(x.abs().max()))


def refuse_not_invertible(tau: AlignmentMap, acts: Float[Tensor, "rows width"], when: str) -> float:
    """Refuse a map that does not undo itself on real activations; return the error of the round trip.

    Raises:
        NonInvertibleMapError: If the error is above 1e-4 (1e-10 in float64), or the condition number above 1e7.
    """
    condition, most = tau.condition(), {torch.float32: 1e-4, torch.float64: 1e-10}.get(tau.dtype, float("inf"))
    well = condition <= _MOST_CONDITION * (1 if tau.dtype != torch.float64 else 1e6)
    error = round_trip(tau, acts) if well else float("inf")
    if not error <= most:
        raise NonInvertibleMapError(
            f"{tau} {when}: the way back misses by {error:.1e}, condition number {condition:.1e}",
            f"at most {most:.0e}, and a condition number below {_MOST_CONDITION:.0e}",
            "lower the learning rate, or use dtype=torch.float64",
        )
    return error
