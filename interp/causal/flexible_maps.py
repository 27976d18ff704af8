"""Alignment maps that are not one fixed-size matrix: reversible networks, learned partitions, dictionaries."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interp.causal.maps import AlignmentMap, FixedMap, IdentityMap, InvertibleMap, LowRankMap, OrthogonalMap, PCAMap
from interp.dictionaries.dictionary import Dictionary
from interp.hooks.errors import ArgumentError, ShapeMismatchError

_HOT, _COLD = 50.0, 0.1  # temperatures of a learned partition, at the start and at the end
_LEAST_BOUNDARY = 0.001

_PARTS = ("0", "0_bias", "1", "1_bias")


class RevNetMap(AlignmentMap):
    """A reversible residual network: y1 = x1 + F(x2), y2 = x2 + G(y1) in each block; Gomez et al. 2017.

    F and G are Linear, ReLU, Linear. The inverse x2 = y2 - G(y1), x1 = y1 - F(x2) is exact up to rounding whatever
    they are, and the map preserves volume.

    Args:
        width: Of the activations; an odd one is cut into unequal halves.
        blocks: Number of blocks.
        hidden: Width of the hidden layers of F and G.
        equal_halves: Refuse an odd width.
        options: As of every map.

    Raises:
        ShapeMismatchError: If the width is 1, or odd where equal halves are asked for.

    Example:
        >>> tau, x = RevNetMap(6, blocks=4, hidden=8), torch.randn(3, 6)
        >>> tau.inverse(tau(x)).allclose(x, atol=1e-5)
        True
    """

    kind = "revnet"

    def __init__(self, width: int, blocks: int = 10, hidden: int = 16, *, equal_halves: bool = False, **options: Any):
        super().__init__(width, **options)
        if width < 2 or (equal_halves and width % 2):
            raise ShapeMismatchError(f"a RevNet of width {width}", "two halves" + (" of equal size" * equal_halves))
        if blocks < 1 or hidden < 1:
            raise ArgumentError(f"blocks={blocks!r}, hidden={hidden!r}", "at least 1")
        self.blocks, self.hidden, self.cut = blocks, hidden, width // 2
        first, second = self.cut, width - self.cut
        generator = self._generator()
        for name, into, out in (("f", second, first), ("g", first, second)):
            for layer, (fan, to) in enumerate(((into, hidden), (hidden, out))):
                bound = 1 / math.sqrt(fan)
                draw = lambda *shape, bound=bound: nn.Parameter(
                    ((torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound).to(self.dtype)
                )
                setattr(self, f"{name}{layer}", draw(blocks, fan, to))
                setattr(self, f"{name}{layer}_bias", draw(blocks, 1, to))

    def parts(self):
        """For each of F and G the weights of every block."""
        return {
            name: list(zip(*(self.get_parameter(f"{name}{p}").unbind(-3) for p in _PARTS), strict=True))
            for name in "fg"
        }

    def encode(self, x, parts=None):
        """All blocks in order."""
        parts = self.parts() if parts is None else parts
        flat = x.ndim == 1
        x1, x2 = (x[None] if flat else x).split([self.cut, self.width - self.cut], -1)
        for f, g in zip(parts["f"], parts["g"], strict=True):
            x1 = x1 + _branch(x2, *f)
            x2 = x2 + _branch(x1, *g)
        out = torch.cat([x1, x2], -1)
        return (out[0] if flat else out), None

    def decode(self, z, rest=None, parts=None):
        """All blocks backwards."""
        parts = self.parts() if parts is None else parts
        flat = z.ndim == 1
        y1, y2 = (z[None] if flat else z).split([self.cut, self.width - self.cut], -1)
        for f, g in zip(reversed(parts["f"]), reversed(parts["g"]), strict=True):
            y2 = y2 - _branch(y1, *g)
            y1 = y1 - _branch(y2, *f)
        out = torch.cat([y1, y2], -1)
        return out[0] if flat else out

    def options(self):
        """Blocks and hidden width."""
        return {"blocks": self.blocks, "hidden": self.hidden}

    def lipschitz_bound(self) -> float:
        """Product over blocks of (1 + Lip F)(1 + Lip G), with Lip the product of the two layers' norms."""
        norm = lambda w: torch.linalg.matrix_norm(w.detach().double(), 2)
        lips = [norm(self.get_parameter(f"{n}0")) * norm(self.get_parameter(f"{n}1")) for n in "fg"]
        return float(((1 + lips[0]) * (1 + lips[1])).prod())


def _branch(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    if x.ndim == 3 == w0.ndim:
        return torch.baddbmm(b1, torch.relu(torch.baddbmm(b0, x, w0)), w1)
    return torch.relu(x @ w0 + b0) @ w1 + b1


class BoundlessMap(OrthogonalMap):
    """An orthogonal W with a learned partition: boundless alignment search (Wu et al. 2023, arXiv 2305.08809).

    One variable: coordinate i is swapped with weight sigmoid((β d - i - 1/2) / T), for a trained boundary β of d.
    Several: each coordinate chooses among the variables and the remainder by a softmax at temperature T. T falls from
    50 to 0.1 over training and is no parameter. In evaluation the weights are hard.

    Args:
        width: Of the activations.
        variables: How many.
        price: λ of the term λ β (or the swapped share of coordinates) of the loss.
        options: As of every map.
    """

    kind = "boundless"
    lr_factors: ClassVar[dict[str, float]] = {"boundary": 10.0}

    def __init__(self, width: int, variables: int = 1, price: float = 1.0, **options: Any):
        super().__init__(width, **options)
        self.variables, self.price, self.temperature = variables, price, _HOT
        shape = (1, 1) if variables == 1 else (variables + 1, width)
        start = torch.full(shape, 0.5) if variables == 1 else 0.01 * torch.randn(*shape, generator=self._generator())
        self.boundary = nn.Parameter(start.to(self.dtype))

    def weights(self, mask):
        """[variables, width]: soft while training, hard in evaluation; the given blocks are not used."""
        if mask.shape[-2] != self.variables:
            raise ShapeMismatchError(f"{mask.shape[-2]} variables", f"{self.variables}, as {self} was made for")
        if self.variables == 1:
            places = torch.arange(self.width, device=self.boundary.device) + 0.5
            room = self._share() * self.width - places
            return torch.sigmoid(room / self.temperature) if self.training else room > 0
        if self.training:
            return torch.softmax(self.boundary / self.temperature, -2)[..., :-1, :]
        winner = self.boundary.argmax(-2, keepdim=True)
        return winner == torch.arange(self.variables, device=winner.device)[:, None]

    def _share(self) -> Tensor:
        return self.boundary.clamp(_LEAST_BOUNDARY, 1.0)

    def penalty(self):
        """Λ times the share of coordinates that is swapped."""
        if self.variables == 1:
            return self.price * self._share()[..., 0, 0]
        return self.price * torch.softmax(self.boundary / self.temperature, -2)[..., :-1, :].sum(-2).mean(-1)

    def progress(self, share):
        """Cool down."""
        self.temperature = _HOT + (_COLD - _HOT) * min(1.0, share)

    def options(self):
        """Number of variables and price."""
        return {"variables": self.variables, "price": self.price}

    @property
    def num_parameters(self):
        """Those of W and the boundaries."""
        return self.width * (self.width - 1) // 2 + self.boundary[..., :, :].numel()


class DictionaryMap(AlignmentMap):
    """z = the latents of a sparse dictionary; the rest is its error of reconstruction, so that the way back is exact.

    Args:
        dictionary: An autoencoder whose decoder needs no input.
        options: As of every map.

    Raises:
        ShapeMismatchError: If it does not give back what it reads, as a transcoder does not.
    """

    kind = "dictionary"

    def __init__(self, dictionary: Dictionary, **options: Any):
        super().__init__(dictionary.d_in, **options)
        if dictionary.needs_input or dictionary.is_transcoder or dictionary.d_in != dictionary.d_out:
            raise ShapeMismatchError(
                f"dictionary {dictionary.name} ({dictionary.architecture})",
                "an autoencoder that decodes latents to its own input's site, without looking at the input",
            )
        self.dictionary = dictionary

    @property
    def code_width(self):
        """Number of latents."""
        return self.dictionary.n_latents

    def encode(self, x, parts=None):
        """The latents, and what they miss of h."""
        z = self.dictionary.encode(x)
        return z.to(x.dtype), x - self.dictionary.decode(z).to(x.dtype)

    def decode(self, z, rest=None, parts=None):
        """The reconstruction and the rest."""
        out = self.dictionary.decode(z).to(z.dtype)
        return out if rest is None else out + rest

    def options(self):
        """The dictionary's name."""
        return {"dictionary": self.dictionary.name}


_KINDS = {
    m.kind: m
    for m in (IdentityMap, FixedMap, PCAMap, OrthogonalMap, LowRankMap, InvertibleMap, RevNetMap, BoundlessMap)
}


def build_map(
    spec: dict[str, Any], width: int, *, seed: int = 0, acts: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> AlignmentMap:
    """Return a map from plain data: ``{"kind": "revnet", "blocks": 10, "hidden": 16}``.

    Args:
        spec: The kind (identity, random, pca, orthogonal, low_rank, invertible, revnet, boundless) and its options.
        width: Of the activations.
        seed: Of the initial values.
        acts: Activations [rows, width], whose axes a ``pca`` takes.
        dtype: Of the map.

    Raises:
        ArgumentError: If the kind or an option is unknown, or a pca is given no activations.

    Example:
        >>> build_map({"kind": "revnet", "blocks": 2}, 8)
        RevNetMap(8, blocks=2, hidden=16)
    """
    options = {k: v for k, v in spec.items() if k != "kind"}
    if spec.get("kind") not in _KINDS:
        raise ArgumentError(f"map {spec}", f"a kind: {', '.join(_KINDS)}")
    if spec["kind"] == "pca":
        if acts is None:
            raise ArgumentError("a pca without activations", "acts=, whose principal axes it takes")
        return PCAMap.fit(acts, seed=seed, dtype=dtype)
    try:
        return _KINDS[spec["kind"]](width, seed=seed, dtype=dtype, **options)
    except TypeError as error:
        raise ArgumentError(f"map {spec}", f"options of {_KINDS[spec['kind']].__name__}", str(error)) from error
