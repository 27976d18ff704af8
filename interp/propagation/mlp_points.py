"""Where MLPs of a path are differentiated, if not at the prompt: a boundary, a mean, or along a segment.

Source: Dunefsky & Cohan 2024, section 2.4 (the boundary); averages are extensions.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.propagation.reference import Reference

if TYPE_CHECKING:
    from interp.propagation.stages import MLP

_BISECTIONS = 64


class NoBoundaryWarning(UserWarning):
    """Two prompts between which an MLP's contribution does not change sign."""


@runtime_checkable
class MLPPoint(Protocol):
    """Chooses points at which an MLP is differentiated; the vector is the mean over them."""

    def points(self, ref: Reference, mlp: "MLP", y: Tensor, position: int, behind: float) -> Float[Tensor, "k d"]:
        """Normalised inputs of the MLP."""
        ...


def _site(ref: Reference, layer: int) -> str:
    """Where an MLP's input is read: behind its norm, or in the stream where it has none."""
    name = ref.mlp_norm(layer)
    return f"{name}.hook_out" if ref.weights.norm(name) is not None else f"blocks.{layer}.hook_resid_mid"


def _input_of(ref: Reference, mlp: "MLP", prompt: Any, position: int) -> Float[Tensor, "d"]:
    """The MLP's input in another prompt, at the same distance from its end."""
    back = position - ref.length
    if isinstance(prompt, Reference):
        return prompt.mlp_input(mlp.layer)[prompt.position(back)]
    site = _site(ref, mlp.layer)
    value = ref.model.capture(prompt, site, positions=back)[site]
    if len(value) != 1:
        raise ArgumentError(f"{len(value)} prompts at one end of a segment", "one text, or one list of token ids")
    return value[0, 0].to(ref.weights.device, ref.weights.dtype)


@dataclass(frozen=True, eq=False)
class Boundary:
    """The point between two prompts at which the MLP's contribution g(v) = y · MLP(v) vanishes.

    The gradient there avoids the saturated ends. Where g has the same sign at both ends, the point is taken at which it
    has its mean value, and a warning says so.

    Attributes:
        positive: A prompt (or Reference) with a high measurement; read at the same distance from its end.
        negative: One with a low measurement.
        behind: Whether the root is that of the whole observable, offsets of later stages included.
    """

    positive: Any
    negative: Any
    behind: bool = False

    def points(self, ref: Reference, mlp: "MLP", y: Tensor, position: int, behind: float) -> Float[Tensor, "k d"]:
        """The one point, by bisection."""
        high, low = (_input_of(ref, mlp, p, position) for p in (self.positive, self.negative))
        shift = behind if self.behind else 0.0
        g = lambda part: float(mlp(low + part * (high - low)) @ y) + shift
        ends = g(0.0), g(1.0)
        target = 0.0
        if ends[0] * ends[1] > 0:
            target = 0.5 * (ends[0] + ends[1])
            warnings.warn(
                f"g(v+) = {ends[1]:.3g} and g(v-) = {ends[0]:.3g} at {mlp.name} have the same sign; using the midpoint "
                f"value {target:.3g}", NoBoundaryWarning, stacklevel=5,
            )  # fmt: skip
        a, b = 0.0, 1.0
        rising = ends[1] > ends[0]
        for _ in range(_BISECTIONS):
            middle = 0.5 * (a + b)
            a, b = (middle, b) if (g(middle) < target) == rising else (a, middle)
        return (low + 0.5 * (a + b) * (high - low))[None]


@dataclass(frozen=True, eq=False)
class MeanPoint:
    """The mean of the MLP's inputs over a dataset's real tokens.

    Attributes:
        inputs: Texts or token ids.
        exclude_first: Whether the first token of each example is left out, whose activations are often huge.
    """

    inputs: Any
    exclude_first: bool = True

    def points(self, ref: Reference, mlp: "MLP", y: Tensor, position: int, behind: float) -> Float[Tensor, "k d"]:
        """The one point."""
        site = _site(ref, mlp.layer)
        acts = ref.model.capture(self.inputs, site)
        keep = acts.mask.clone()  # type: ignore[union-attr]
        if self.exclude_first:
            keep[torch.arange(len(keep)), torch.tensor(acts.batch.starts)] = False
        if not keep.any():
            raise ArgumentError("inputs of one token each", "longer inputs, or exclude_first=False")
        value = acts[site]
        return value[keep.to(value.device)].to(ref.weights.device, ref.weights.dtype).mean(0, keepdim=True)


@dataclass(frozen=True, eq=False)
class AverageGradient:
    """Points along the segment between two prompts' inputs: the mean gradient of integrated gradients.

    Attributes:
        positive: A prompt (or Reference), read at the same distance from its end.
        negative: Another.
        steps: How many points, at the middles of equal pieces.
    """

    positive: Any
    negative: Any
    steps: int = 32

    def __post_init__(self):
        """Refuse a number of steps below one.

        Raises:
            ArgumentError: If there are no steps.
        """
        if self.steps < 1:
            raise ArgumentError(f"steps={self.steps}", "at least 1")

    def points(self, ref: Reference, mlp: "MLP", y: Tensor, position: int, behind: float) -> Float[Tensor, "k d"]:
        """The points."""
        high, low = (_input_of(ref, mlp, p, position) for p in (self.positive, self.negative))
        parts = (torch.arange(self.steps, dtype=low.dtype, device=low.device) + 0.5) / self.steps
        return low + parts[:, None] * (high - low)
