"""Refusals that need no forward call: states in which a model cannot be read faithfully."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from interp.hooks.errors import (
    CompiledModelError,
    InputError,
    MetaWeightsError,
    ModelStateError,
    NonFiniteError,
    TrainModeError,
)

_QUOTE = 3
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")


def refuse_compiled(module: nn.Module) -> None:
    """Refuse modules whose inner calls hooks would not see.

    Raises:
        CompiledModelError: If the module or a part of it is scripted, compiled in place or sharded.
    """
    for name, sub in module.named_modules():
        kind = type(sub).__name__
        if isinstance(sub, torch.jit.ScriptModule):
            raise CompiledModelError(
                f"{name or 'the model'} is a {kind}",
                "a plain module",
                "attach the module it was scripted from",
            )
        if getattr(sub, "_compiled_call_impl", None) is not None:
            raise CompiledModelError(
                f"{name or 'the model'} was compiled in place",
                "an uncompiled module",
                "attach before calling .compile()",
            )
        if kind in (
            "OptimizedModule",
            "FullyShardedDataParallel",
            "FSDPModule",
            "DistributedDataParallel",
            "DataParallel",
        ):
            raise CompiledModelError(f"{name} is a {kind}", "a plain module inside", "attach the module it wraps")


def refuse_meta(module: nn.Module) -> None:
    """Refuse weights without data, unless accelerate's hooks will bring them.

    Raises:
        MetaWeightsError: Naming the first such parameter.
    """
    for name, sub in module.named_modules():
        for key, parameter in sub.named_parameters(recurse=False):
            if parameter.is_meta and not hasattr(sub, "_hf_hook"):
                raise MetaWeightsError(
                    f"{name}.{key} is on the meta device",
                    "weights with data, or accelerate's offloading hooks",
                    "load the checkpoint",
                )


def refuse_nonfinite(module: nn.Module) -> None:
    """Refuse NaN and infinity in weights.

    Raises:
        NonFiniteError: Naming the first such parameter.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        low, high = torch.aminmax(parameter.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = int((~torch.isfinite(parameter.detach())).sum())
            raise NonFiniteError(
                f"{name} holds {bad} values that are NaN or infinite",
                "finite weights",
                "check the checkpoint and its dtype",
            )


def refuse_training(module: nn.Module) -> None:
    """Refuse live dropout and batch statistics.

    Raises:
        TrainModeError: Naming the first modules in which training mode changes the result.
    """
    live = live_in_training(module)
    if live:
        more = f" and {len(live) - _QUOTE} more" if len(live) > _QUOTE else ""
        raise TrainModeError(
            f"training mode is live in {', '.join(live[:_QUOTE])}{more}",
            "evaluation mode",
            "call model.eval()",
        )


def refuse_checkpointing(module: nn.Module) -> None:
    """Refuse blocks that Hugging Face models would run again in the backward pass, where hooks are gone.

    Raises:
        ModelStateError: Naming the first.
    """
    for name, sub in module.named_modules():
        if sub.training and getattr(sub, "gradient_checkpointing", False) is True:
            raise ModelStateError(
                f"{name or 'the model'} checkpoints activations", "a forward that keeps them",
                "call model.eval(), or turn checkpointing off",
            )  # fmt: skip


def refuse_inference_mode() -> None:
    """Refuse a block in which no graph can be recorded, whatever else is asked for.

    Raises:
        ModelStateError: If `torch.inference_mode` is on.
    """
    if torch.is_inference_mode_enabled():
        raise ModelStateError(
            "torch.inference_mode() is on", "a graph, for derivatives", "leave it out, or use torch.no_grad()"
        )


def refuse_cache(keywords: Mapping[str, Any]) -> None:
    """Refuse keys and values of earlier tokens among a forward call's keywords, for derivatives.

    Raises:
        InputError: Naming the keyword.
    """
    for name in _CACHES:
        if keywords.get(name) is not None:
            raise InputError(
                f"{name}, a {type(keywords[name]).__name__} of keys and values",
                "whole texts: what a cache holds is a constant, so that derivatives by its tokens would be zero, and "
                "each run would add to it",
                f"leave {name} out, and give the cached tokens with the others",
            )


class WeightsHeld:
    """Notices weights that were written since a derivative was prepared: activations and weights would not fit."""

    def __init__(self, module: nn.Module):
        self._seen = [(name, p, p._version) for name, p in module.named_parameters() if not p.is_inference()]

    def check(self) -> None:
        """Refuse weights that were written.

        Raises:
            ModelStateError: Naming the first.
        """
        for name, parameter, version in self._seen:
            if parameter._version != version:
                raise ModelStateError(
                    f"{name}, written since these derivatives were prepared", "the weights of that time",
                    "prepare them again, or compute what is wanted before the weights change",
                )  # fmt: skip


def devices_named(module: nn.Module) -> str:
    """Return the devices that parameters are on, each with the first of them; '' where there are not several."""
    first: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        first.setdefault(str(parameter.device), name)
    return ", ".join(f"{device} ({name})" for device, name in first.items()) if len(first) > 1 else ""


def live_in_training(module: nn.Module) -> list[str]:
    """Return the paths of modules that are in training mode and compute something else there."""
    return [name for name, sub in module.named_modules() if sub.training and _differs_in_training(sub)]


def _differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)):
        return getattr(module, "p", 1.0) > 0
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats
    rates = (getattr(module, name, 0) for name in ("attention_dropout", "dropout", "drop_prob", "attn_dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
