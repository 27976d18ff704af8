"""Weights of linear and norm modules in one convention, whatever the module stores."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.hooks.errors import LayoutError, MetaWeightsError, UnknownFamilyError

# Eight bits are quantised weights whose scales lie elsewhere, though torch calls them floating-point.
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def plain(module: nn.Module) -> nn.Module:
    """Return the module that a TransformerLens bridge component wraps (any other module passes through)."""
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner
    return module


def linear_weight(module: nn.Module, path: str) -> Float[Tensor, "out in"]:
    """Return W of y = W x (+ b), as `torch.nn.Linear` stores it, whatever the module stores.

    Raises:
        MetaWeightsError: If the weights are offloaded.
        UnknownFamilyError: If the weights are quantised or of an unknown form.
    """
    module = plain(module)
    weight = getattr(module, "weight", None)
    if getattr(module, "base_layer", None) is not None:
        raise UnknownFamilyError(
            f"{path} is a {type(module).__name__}, which adds to another layer's output",
            "one weight matrix", "merge the adapter (merge_and_unload) for closed forms",
        )  # fmt: skip
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in _PLAIN:
        raise UnknownFamilyError(
            f"{path} is a {type(module).__name__} without a plain floating-point weight matrix",
            "an unquantised linear module",
            "reload the model without quantisation for closed forms; capture and steering work as it is",
        )
    if weight.is_meta:
        raise MetaWeightsError(
            f"weights of {path} are offloaded",
            "weights in memory for a closed form",
            "load with a larger max_memory",
        )
    return weight.T if type(module).__name__.startswith("Conv1D") else weight


def linear_bias(module: nn.Module) -> Tensor | None:
    """Return b of y = W x + b, or None."""
    bias = getattr(plain(module), "bias", None)
    return bias if isinstance(bias, Tensor) else None


@dataclass(frozen=True)
class Norm:
    """N(x) = gain ⊙ P x / r(x) + bias with P = centring or identity.

    Attributes:
        path: The module's path.
        centred: LayerNorm (P x = x - mean x) rather than RMSNorm (P = I).
        offset: 1 where the module stores gain - 1 (Gemma), else 0.
        eps: r(x) = sqrt(mean((P x)²) + eps).
    """

    path: str
    module: nn.Module
    centred: bool
    offset: float
    eps: float

    @property
    def gain(self) -> Float[Tensor, "d"] | None:
        """γ in float32 or better, or None where the norm has none."""
        weight = getattr(self.module, "weight", None)
        return None if weight is None else _wide(weight.detach()) + self.offset

    @property
    def bias(self) -> Float[Tensor, "d"] | None:
        """β in float32 or better, or None."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else _wide(bias.detach())

    def centre(self, x: Tensor) -> Tensor:
        """P x, in float32 or better."""
        x = _wide(x)
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """The divisor r(x), in float32 or better."""
        return (self.centre(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def finish(self, normalized: Tensor) -> Tensor:
        """gain ⊙ n + bias."""
        out = normalized if self.gain is None else normalized * self.gain.to(normalized.device)
        return out if self.bias is None else out + self.bias.to(out.device)

    def __call__(self, x: Tensor) -> Tensor:
        """The norm by its formula (the slow twin of the module)."""
        return self.finish(self.centre(x) / self.scale(x))


def _wide(x: Tensor) -> Tensor:
    """A value in float32, or in float64 where it has that."""
    return x if x.dtype == torch.float64 else x.float()


def read_norm(module: nn.Module, path: str, width: int) -> Norm:
    """Return the norm's formula, found by comparing the module with each candidate on random input.

    Raises:
        LayoutError: If the module computes none of the known forms.
    """
    module = plain(module)
    eps = next(
        (float(e) for n in ("eps", "variance_epsilon", "epsilon") if (e := getattr(module, n, None)) is not None),
        1e-6,
    )
    tensors = [t for t in (getattr(module, "weight", None), getattr(module, "bias", None)) if t is not None]
    like = tensors[0] if tensors else torch.empty(())
    if like.is_meta:
        # Offloaded: nothing to compare with. LayerNorm has its own class; what remains of the field is RMS.
        return Norm(path, module, isinstance(module, nn.LayerNorm), 0.0, eps)
    x = torch.linspace(-1.0, 3.0, 2 * width, device=like.device).sin().reshape(2, width) * 3 + 0.5
    with torch.no_grad():
        wanted = module.forward(x.to(like.dtype)).float()
    tolerance = 2e-5 if like.dtype in (torch.float32, torch.float64) else 4e-2
    for centred in (isinstance(module, nn.LayerNorm), not isinstance(module, nn.LayerNorm)):
        for offset in (0.0, 1.0):
            norm = Norm(path, module, centred, offset, eps)
            if (norm(x) - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1):
                return norm
    raise LayoutError(f"{path} ({type(module).__name__}) is neither a LayerNorm nor an RMSNorm by its values")
