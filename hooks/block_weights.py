"""Weights and activation functions of a block, addressed by the sites that they connect."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interp.hooks.errors import SiteUnavailableError
from interp.hooks.layouts import child
from interp.hooks.weights import linear_bias, linear_weight

if TYPE_CHECKING:
    from interp.hooks.bindings import Binding
    from interp.hooks.model import Model


@dataclass(frozen=True)
class Projection:
    """An affine map between two sites of a block, x -> x W + b.

    Attributes:
        weight: W, the axes of the one site and then those of the other: [d_model, head, d_head] to queries,
            [head, d_head, d_model] from the heads' z.
        bias: b, with the axes of the second site, or None.
        inputs: How many axes the first site has.
    """

    weight: Float[Tensor, "..."]
    bias: Float[Tensor, "..."] | None
    inputs: int = 1

    def __call__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """x W + b."""
        out = torch.tensordot(x, self.weight, self.inputs)
        return out if self.bias is None else out + self.bias

    def pull(self, y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """W y: a covector on the second site as one on the first."""
        n = self.weight.ndim - self.inputs
        first, flat = self.weight.shape[: self.inputs], self.weight.flatten(self.inputs).flatten(0, self.inputs - 1)
        return (y.flatten(y.ndim - n) @ flat.T).unflatten(-1, first)

    def constant(self, y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """y · b: what the bias adds (0 where there is none)."""
        n = self.weight.ndim - self.inputs
        return y.new_zeros(y.shape[: y.ndim - n]) if self.bias is None else torch.tensordot(y, self.bias, n)


def projection_to(
    model: "Model", site: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Projection:
    """Return the map from a linear module's input to queries, keys, values or pre-activations; fused or not.

    On the weights' own device, unless another is given.

    Raises:
        SiteUnavailableError: If the model has no such site.
        UnknownFamilyError: If the weights are quantised.
        MetaWeightsError: If the weights are offloaded.
    """
    binding, module = _binding(model, site)
    # The view that finds the site in the module's output finds its columns in W and its entries in b as well.
    weight = binding.view.get(linear_weight(module, binding.module).detach().T, None)
    bias = linear_bias(module)
    bias = None if bias is None else binding.view.get(bias.detach(), None)
    device = device or weight.device
    return Projection(weight.to(device, dtype), None if bias is None else bias.to(device, dtype))


def projection_from(
    model: "Model", site: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Projection:
    """Return the map from the heads' z, or from the neurons, to what the linear module behind them gives.

    On the weights' own device, unless another is given.

    Raises:
        SiteUnavailableError: If the model has no such site.
        UnknownFamilyError: If the weights are quantised.
        MetaWeightsError: If the weights are offloaded.
    """
    binding, module = _binding(model, site)
    weight = binding.view.get(linear_weight(module, binding.module).detach(), None).movedim(0, -1)
    bias = linear_bias(module)
    device = device or weight.device
    return Projection(
        weight.to(device, dtype), None if bias is None else bias.detach().to(device, dtype), weight.ndim - 1
    )


def _binding(model: "Model", site: str) -> "tuple[Binding, nn.Module]":
    known = model.bindings.by_address if model.bindings else {}
    if site not in known:
        raise SiteUnavailableError(
            f"weights at {site} of {type(model.module).__name__} ({model.family})",
            "a site that is a plain linear module's input or output",
        )
    module = child(model.module, known[site].module)
    assert module is not None
    return known[site], module


def read_activation(
    model: "Model", layer: int, pre: Float[Tensor, "*n d_mlp"], activated: Float[Tensor, "*n d_mlp"]
) -> Callable[[Tensor], Tensor] | None:
    """Return the MLP's activation function, or None: a callable of the block, or a known one that its code may call.

    It is the one that maps ``pre`` to ``activated``. Which GELU a model uses cannot be told from its name; its values
    tell.
    """
    block = child(model.module, model.layout.block(layer, model.layout.mlp or ""))  # type: ignore[union-attr]
    half = activated.dtype in (torch.bfloat16, torch.float16)
    tolerance = (4e-2 if half else 1e-5) * float(activated.abs().max().clamp(min=1e-6))
    for function in (*_functions(block), *_KNOWN):  # type: ignore[arg-type]
        given = function(pre.clone())
        if isinstance(given, Tensor) and given.shape == pre.shape and (given - activated).abs().max() <= tolerance:
            return _apart(function)
    return None


def _apart(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that may work in place, as one that leaves its argument alone."""
    return lambda z: function(z.clone())


_KNOWN: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.relu, F.gelu, lambda z: F.gelu(z, approximate="tanh"), F.silu, lambda z: torch.relu(z) ** 2, torch.tanh,
    torch.sigmoid, F.softplus, F.mish, F.relu6, F.leaky_relu, F.elu, lambda z: z * torch.sigmoid(1.702 * z),
)  # fmt: skip


def _takes_one(function: Callable) -> bool:
    """Whether one argument is enough: what computes a parametrised weight takes several."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    return True


def _functions(block: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Modules without parameters, buffers and children, and plain functions, that a block's modules hold."""
    for module in block.modules():
        leaf = not any(
            next(own, None) is not None for own in (module.children(), module.parameters(), module.buffers())
        )
        if leaf and not isinstance(module, (nn.Dropout, nn.Identity)) and _takes_one(module.forward):
            yield module
        for name, value in vars(module).items():
            if callable(value) and not isinstance(value, nn.Module) and not name.startswith("_") and "act" in name:
                yield cast(Callable[[Tensor], Tensor], value)
