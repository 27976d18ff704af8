"""Linearization: what is held fixed when a network is made affine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Union

from interp.hooks.errors import ArgumentError

LinearizationLike = Union[str, "Linearization"]

_CHOICES = {
    "activation": ("tangent", "gain"),
    "norm": ("tangent", "frozen"),
    "attention": ("tangent", "frozen"),
    "product": ("tangent", "gate", "split"),
}
_OVERRIDES = ("tangent", "gain", "chord", "constant")


@dataclass(frozen=True)
class Linearization:
    """What is held fixed around a reference input, so that the network is y = F x + r.

    Attributes:
        activation: Smooth element-wise units f at pre-activation z: ``tangent`` v -> f'(z)(v - z) + f(z);
            ``gain`` v -> (f(z)/z) v. Piecewise-linear units always take the tangent.
        norm: ``tangent`` differentiates the divisor; ``frozen`` holds it at its value.
        attention: ``tangent`` differentiates the pattern; ``frozen`` holds it.
        product: Two live factors a·b: ``tangent``; ``gate`` holds the factor that is an activation's output
            (of two, a sigmoid before a tanh before any other);
            ``split`` averages holding the one and the other.
        overrides: Mode of element-wise units by module path glob or type name
            (``tangent``, ``gain``, ``chord``, ``constant``).

    Presets: ``exact`` (all tangent: the Jacobian), ``frozen`` (complete attribution), ``path`` (feature
    vectors: norm and MLP tangent, pattern held).

    Example:
        >>> Linearization.of("frozen").norm
        'frozen'
    """

    activation: Literal["tangent", "gain"] = "tangent"
    norm: Literal["tangent", "frozen"] = "tangent"
    attention: Literal["tangent", "frozen"] = "tangent"
    product: Literal["tangent", "gate", "split"] = "tangent"
    overrides: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        """Validate each field.

        Raises:
            ArgumentError: If a field or an override has a mode that does not exist.
        """
        for name, legal in _CHOICES.items():
            if getattr(self, name) not in legal:
                raise ArgumentError(f"Linearization {name}={getattr(self, name)!r}", f"one of {', '.join(legal)}")
        for pattern, mode in self.overrides.items():
            if mode not in _OVERRIDES:
                raise ArgumentError(f"override {pattern!r}: {mode!r}", f"one of {', '.join(_OVERRIDES)}")

    def __hash__(self) -> int:
        return hash((self.activation, self.norm, self.attention, self.product, tuple(sorted(self.overrides.items()))))

    @classmethod
    def of(cls, value: LinearizationLike) -> "Linearization":
        """Return the preset that a name stands for (a Linearization passes through).

        Raises:
            ArgumentError: If the name is not a preset.
        """
        if isinstance(value, Linearization):
            return value
        if value not in PRESETS:
            raise ArgumentError(f"linearization {value!r}", f"one of {', '.join(PRESETS)}, or a Linearization")
        return PRESETS[value]

    @property
    def name(self) -> str:
        """The preset's name, or the four fields."""
        for name, preset in PRESETS.items():
            if preset == self:
                return name
        text = f"activation={self.activation} norm={self.norm} attention={self.attention} product={self.product}"
        return text + (f" overrides={dict(self.overrides)}" if self.overrides else "")

    def to_dict(self) -> dict:
        """Plain data: the four fields and the overrides."""
        return {k: getattr(self, k) for k in _CHOICES} | {"overrides": dict(self.overrides)}


PRESETS = {
    "exact": Linearization(),
    "frozen": Linearization("gain", "frozen", "frozen", "gate"),
    "path": Linearization("tangent", "tangent", "frozen", "tangent"),
}
