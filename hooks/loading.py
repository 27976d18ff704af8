"""Loading a model by name: packaged, from a folder, from a GGUF file, or from the model hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from interp.hooks.cache import remembered_sha256
from interp.hooks.convert import WEIGHTS, convert_efficientnet_lite, convert_esrgan, convert_gguf
from interp.hooks.errors import ArgumentError
from interp.hooks.huggingface import (
    HuggingFaceParts,
    Placement,
    in_hub_cache,
    load_folder,
    load_hub,
    load_pretrained,
    weight_hashes,
)
from interp.hooks.packaged import (
    ENCODER,
    IMAGE_CLASSIFIER,
    LANGUAGE_MODEL,
    PACKAGED,
    PackagedModel,
    checked_weights,
    imagenet_names,
    is_cached,
    licence_notice,
    near_names,
    sources,
)

__all__ = ["LoadedParts", "available", "licence_notice", "load_parts"]

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class LoadedParts:
    """What loading a name gives.

    Attributes:
        module: The network, in eval mode.
        tokenizer: For text models, else None.
        preprocess: For image models a callable from a picture (path, PIL image, uint8 array) to a float32
            tensor [1, 3, H, W] on the CPU, else None.
        labels: Class names in the order of the outputs, or None.
        identity: Plain data for provenance: `source` ("packaged", "folder", "gguf" or "hub"), `name` or
            `path`, `sha256` of the weights, `licence` where known, and what belongs to that source:
            `registry`, `package`, `version`; `revision`; `architecture`; `files`.
    """

    module: nn.Module
    tokenizer: Any
    preprocess: Any
    labels: list[str] | None
    identity: dict[str, Any]


def load_parts(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    device_map: Any = None,
) -> LoadedParts:
    """Load a model in eval mode, with its tokenizer or preprocessing and where it came from.

    `name` is read in this order: a packaged model (see `available`); a folder as transformers saves it, whose
    config names its class; a `.gguf` file, converted to float32 once; a model hub id. Packaged models come
    from the cache, which the first call fills; a hub model comes from the hub's local cache where the hub is
    off or out of reach.

    Args:
        name: What to load.
        dtype: A floating-point dtype or its name. None: float32 for packaged models and GGUF files, the
            model's own for others.
        device: One device for all weights.
        device_map: Passed to accelerate, to spread the weights; not together with `device`.

    Returns:
        The parts.

    Raises:
        ArgumentError: A name that looks like none of these, both `device` and `device_map`, or no such dtype.
        NotCachedError: A model that is not on this machine and cannot be fetched; the text holds the command.
        ChecksumError: A fetched file is not the recorded one.
        InputError, UnknownFamilyError: A file or a config that cannot be read as a model.

    Example:
        >>> parts = load_parts("minilm-l6")  # doctest: +SKIP
        >>> parts.identity["licence"]  # doctest: +SKIP
        'MIT (package), Apache-2.0 (model)'
    """
    placement = Placement.of(dtype, device, device_map)
    text = str(name)
    if text in PACKAGED:
        return _load_packaged(PACKAGED[text], placement)
    path = Path(text).expanduser()
    if text and path.is_dir():
        found = load_folder(path, placement)
        return _parts(found, {"source": "folder", "path": str(path.absolute()), "licence": None})
    if path.suffix.lower() == ".gguf" and path.is_file():
        digest = remembered_sha256(path)
        found = load_pretrained(convert_gguf(path, digest), placement)
        identity = {"source": "gguf", "path": str(path.absolute()), "licence": None}
        return _parts(found, identity | {"sha256": digest, "files": {path.name: digest}})
    if not _may_be_hub_id(text, path):
        raise _unknown(text)
    found = load_hub(text, placement)
    return _parts(found, {"source": "hub", "name": text, "revision": found.revision, "licence": None})


def available() -> list[dict[str, Any]]:
    """The packaged models, as rows of plain data.

    Returns:
        One dict for each: `name`, `kind`, `licence`, `size` (bytes of the files in the cache before
        conversion), `cached`, `description`.

    Example:
        >>> [row["name"] for row in available()][:2]
        ['smollm2-135m', 'minilm-l6']
    """
    return [
        {
            "name": model.name,
            "kind": model.kind,
            "licence": model.licence,
            "size": sum(source.size for source in sources(model)),
            "cached": is_cached(model),
            "description": model.description,
        }
        for model in PACKAGED.values()
    ]


def _load_packaged(model: PackagedModel, placement: Placement) -> LoadedParts:
    path = checked_weights(model)
    placement = Placement(placement.dtype or torch.float32, placement.device, placement.device_map)
    source, weights = model.source, model.weights_file
    identity = {
        "source": "packaged",
        "name": model.name,
        "registry": source.registry,
        "package": source.package,
        "version": source.version,
        "licence": model.licence,
        "sha256": weights.sha256,
        "files": {weights.path: weights.sha256},
    }
    if model.kind == LANGUAGE_MODEL:
        return _parts(load_pretrained(convert_gguf(path, weights.sha256), placement), identity)
    if model.kind == ENCODER:
        return _parts(load_pretrained(path.parent, placement), identity)
    module, preprocess, labels = _own_network(model, path)
    identity["architecture"] = type(module).__name__
    return LoadedParts(_place(module, placement), None, preprocess, labels, identity)


def _own_network(model: PackagedModel, path: Path) -> tuple[nn.Module, Any, list[str] | None]:
    """A network of `hooks.networks` with its weights, its preprocessing and its class names."""
    from safetensors.torch import load_file

    from interp.hooks.networks.efficientnet_lite import EfficientNetLite
    from interp.hooks.networks.esrgan_slim import EsrganSlim
    from interp.hooks.networks.images import CropResizeScale, RawPixels

    digest = model.weights_file.sha256
    if model.kind == IMAGE_CLASSIFIER:
        folder, module = convert_efficientnet_lite(path, digest), EfficientNetLite()
        preprocess, labels = CropResizeScale(), imagenet_names()
    else:
        folder, module = convert_esrgan(path, digest), EsrganSlim(int(model.name.rpartition("x")[2]))
        preprocess, labels = RawPixels(), None
    module.load_state_dict(load_file(folder / WEIGHTS))
    return module.eval(), preprocess, labels


def _place(module: nn.Module, placement: Placement) -> nn.Module:
    module = module.to(device=placement.device, dtype=placement.dtype)
    if placement.device_map is None:
        return module
    from accelerate import dispatch_model, infer_auto_device_map

    spread = placement.device_map
    if isinstance(spread, str) and spread in ("auto", "balanced", "balanced_low_0", "sequential"):
        spread = infer_auto_device_map(module)
    elif not isinstance(spread, dict):
        spread = {"": spread}
    return dispatch_model(module, spread)


def _parts(found: HuggingFaceParts, identity: dict[str, Any]) -> LoadedParts:
    """Parts from what transformers loaded; weights are hashed unless `identity` has their hash."""
    hashes = {} if "sha256" in identity else weight_hashes(found.weight_files)
    identity = {**identity, "architecture": found.architecture, **hashes}
    return LoadedParts(found.module, found.tokenizer, found.preprocess, found.labels, identity)


def _may_be_hub_id(text: str, path: Path) -> bool:
    """Whether to ask the hub: formed like an id, no file here, no slip of the pen for a packaged name."""
    if not _HUB_ID.fullmatch(text) or path.exists() or path.suffix.lower() == ".gguf":
        return False
    return "/" in text or not near_names(text, cutoff=0.75) or in_hub_cache(text)


def _unknown(text: str) -> ArgumentError:
    if Path(text).suffix.lower() == ".gguf":
        return ArgumentError(f"the file {text}, which does not exist", "a GGUF file", "check the path")
    near = near_names(text)
    hint = f"did you mean {' or '.join(near)}?" if near else f"packaged models: {', '.join(PACKAGED)}"
    return ArgumentError(f"the name {text!r}", "a packaged model, a folder, a .gguf file or a hub id", hint)
