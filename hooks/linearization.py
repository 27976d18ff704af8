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
_OVERRIDES = (
    "tangent", "gain", "chord", "constant", "frozen", "frozen_stats", "batch_stats", "gate", "split", "one_mask",
)  # fmt: skip


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
        overrides: Modes of single calls, by glob of module paths, type name of a module, or name of a call (``softmax``
            names all of an attention). An override applies to the calls that have its mode, and must apply to one:

            | call | modes |
            |---|---|
            | element-wise unit, power | ``tangent``, ``gain`` if f(0) = 0, ``chord``, ``constant`` |
            | norm, divisor, quotient | ``tangent``, ``frozen``, ``frozen_stats`` (the mean is held too) |
            | softmax and products of matrices | ``tangent``, ``frozen``, ``split`` (half through the pattern) |
            | product | ``tangent``, ``gate``, ``split``, ``split:w`` (w: share in which the gate is held) |
            | weighted layer | ``constant`` (its output is held) |
            | batch norm with batch statistics | ``batch_stats`` (those of the reference are held) |
            | live dropout | ``one_mask`` (that of the reference is held) |

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
            if mode not in _OVERRIDES and not _is_weighted(mode):
                legal = f"one of {', '.join(_OVERRIDES)}, or split:w with w from 0 to 1"
                raise ArgumentError(f"override {pattern!r}: {mode!r}", legal)

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
    def keeps_training(self) -> bool:
        """Whether an override says what to do with calls that are random or use batch statistics."""
        return bool({"batch_stats", "one_mask"} & set(self.overrides.values()))

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


def _is_weighted(mode: str) -> bool:
    name, _, weight = mode.partition(":")
    return name == "split" and weight.replace(".", "", 1).isdecimal() and 0 <= float(weight) <= 1


PRESETS = {
    "exact": Linearization(),
    "frozen": Linearization("gain", "frozen", "frozen", "gate"),
    "path": Linearization("tangent", "tangent", "frozen", "tangent"),
}
