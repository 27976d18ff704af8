"""attach and load: from a module, a wrapper or a name to a Model."""

from typing import Any, Literal

from torch import nn

from interp.hooks import guards, verify
from interp.hooks.errors import ArgumentError, InputError
from interp.hooks.layouts import Layout, check_explicit, recognise, unknown_family
from interp.hooks.model import Model

_NESTED = 8


def attach(
    module: Any, tokenizer: Any = None, *, layout: Layout | Literal["modules"] | None = None, check: bool = True,
    preprocess: Any = None, labels: list[str] | None = None, identity: dict | None = None,
) -> Model:  # fmt: skip
    """Return a Model for a live network, which stays as it is.

    Args:
        module: An `nn.Module`, a Hugging Face model, a TransformerLens TransformerBridge, an nnsight model, or one of
            these compiled by `torch.compile` or wrapped for data parallelism (the module inside is attached).
        tokenizer: Tokenizer for text inputs; a wrapper's own by default.
        layout: Explicit paths for an architecture that is not recognised; ``modules`` for module paths only.
        check: Scan the weights for NaN, and verify on a few tokens that each site means what it should (once for
            each configuration; hooks of your own on the model fire in that run).
        preprocess: Turns a user's image into the model's input.
        labels: Class names.
        identity: Plain data that says which model this is.

    Raises:
        UnknownFamilyError: If a language model's architecture is not recognised and no layout is given.
        LayoutError: If the sites do not mean what they should.
        CompiledModelError, MetaWeightsError, NonFiniteError: If the model cannot be read faithfully.

    Example:
        >>> import interp, torch
        >>> interp.attach(torch.nn.Sequential(torch.nn.Linear(2, 3))).family
        'modules'
    """
    if isinstance(module, Model):
        return module
    inner, own_tokenizer = unwrap(module)
    guards.refuse_compiled(inner)
    guards.refuse_meta(inner)
    if check:
        guards.refuse_nonfinite(inner)
    found = _layout(inner, layout)
    model = Model(inner, tokenizer or own_tokenizer, found, preprocess=preprocess, labels=labels, identity=identity)
    if check and found is not None:
        verify.once(model)
    return model


def load(name: str, *, dtype: Any = None, device: Any = None, device_map: Any = None, check: bool = True) -> Model:
    """Return an attached model by packaged name, hub id, local folder or GGUF file.

    Args:
        name: A packaged name (``interp models`` lists them), a folder, a ``.gguf`` file, or a hub id (read from the
            local hub cache where the hub is out of reach).
        dtype: A torch dtype or its name; by default float32 for packaged models, else the checkpoint's own.
        device: Device for the whole model; or
        device_map: accelerate's placement.
        check: As for `attach`.

    Raises:
        ArgumentError: If the name is unknown, or device and device_map are both given.
        NotCachedError: If the model is not here and cannot be fetched; the text says which command to run.
    """
    from interp.hooks.loading import load_parts

    parts = load_parts(name, dtype=dtype, device=device, device_map=device_map)
    return attach(
        parts.module, parts.tokenizer, check=check, preprocess=parts.preprocess, labels=parts.labels,
        identity=parts.identity,
    )  # fmt: skip


def _layout(module: nn.Module, layout: Layout | str | None) -> Layout | None:
    if isinstance(layout, Layout):
        return check_explicit(module, layout)
    if layout == "modules":
        return None
    if layout is not None:
        raise ArgumentError(f"layout={layout!r}", "a Layout, 'modules' or None")
    found = recognise(module)
    if found is None and getattr(module, "main_input_name", None) == "input_ids":
        raise unknown_family(module)
    return found


def unwrap(wrapped: Any) -> tuple[nn.Module, Any]:
    """Return the module inside known wrappers, and the wrapper's tokenizer if it has one.

    Raises:
        InputError: If there is no module inside.
    """
    tokenizer = getattr(wrapped, "tokenizer", None)
    for _ in range(_NESTED):
        inner = _inside(wrapped)
        if inner is None:
            break
        wrapped = inner
    if not isinstance(wrapped, nn.Module):
        raise InputError(f"a {type(wrapped).__name__}", "an nn.Module, or a wrapper of one")
    return wrapped, tokenizer


_INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "nnsight": "_module",
    "transformer_lens": "original_model",
}


def _inside(wrapped: Any) -> nn.Module | None:
    """The module inside a wrapper, known by its class name or by the package that one of its bases comes from."""
    names = {type(wrapped).__name__, *(base.__module__.split(".")[0] for base in type(wrapped).__mro__)}
    inner = next((getattr(wrapped, _INSIDE[name], None) for name in names if name in _INSIDE), None)
    return inner if isinstance(inner, nn.Module) else None
