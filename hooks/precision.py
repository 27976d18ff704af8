"""In which dtype a scope computes, and how well its sums may hold there."""

import torch

from interp.hooks.errors import ArgumentError, MetaWeightsError
from interp.hooks.model import Model

HALF = (torch.float16, torch.bfloat16)
_HALF_TOLERANCE = 2e-2


def tolerance_of(dtype: torch.dtype, model: Model) -> float:
    """Return the relative error that a dtype allows in what a model computes."""
    if dtype == torch.float64 and model.config is not None:
        return 1e-6  # Hugging Face computes norms and softmax in float32 even in a float64 model.
    return min(100 * torch.finfo(dtype).eps, _HALF_TOLERANCE)


def compute_dtype_of(model: Model, own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """Return the dtype of F and r for a model whose output has a dtype: float32 for a half one, if none is asked for.

    Raises:
        ArgumentError: If it is narrower than the model's own, or no dtype for computing.
        MetaWeightsError: If another dtype needs weights that are not here.
    """
    away = any(p.is_meta for p in model.module.parameters())
    if asked is None:
        return torch.float32 if own in HALF and not away else own
    if asked not in (torch.float32, torch.float64) or torch.finfo(asked).bits < torch.finfo(own).bits:
        raise ArgumentError(f"compute_dtype={asked} for a model in {own}", "torch.float32 or float64, not narrower")
    if away and asked != own:
        raise MetaWeightsError(f"compute_dtype={asked} for a model with offloaded weights", "weights in memory")
    return asked
