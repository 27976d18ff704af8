"""Published weight files into safetensors folders, once each, kept in the cache.

A converted folder is named by the SHA-256 of what it was made from, the format number below and the versions
of the libraries that made it; a change in any of them makes a new one beside it.
"""

import importlib.metadata
import json
import re
import struct
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from interp.hooks.cache import build_folder, cache_dir
from interp.hooks.errors import ChecksumError, InputError, UnknownFamilyError

FORMAT = 1
"""Raised when a conversion below changes what it writes."""

WEIGHTS = "model.safetensors"


def converted(kind: str, sha256: str, libraries: tuple[str, ...], build: Callable[[Path], None]) -> Path:
    """The cached folder made from the file with this hash, built by `build` on first use.

    Args:
        kind: First part of the folder's name.
        sha256: Hash of what is converted.
        libraries: Distributions whose versions go into the folder's name.
        build: Fills an empty folder.

    Returns:
        The folder.
    """
    versions = "".join(f"-{name}{importlib.metadata.version(name)}" for name in libraries)
    return build_folder(cache_dir() / "converted" / f"{kind}-{sha256[:24]}-f{FORMAT}{versions}", build)


def convert_gguf(path: Path, sha256: str) -> Path:
    """A GGUF file as a Hugging Face folder (model and tokenizer) in float32.

    Quantised values are widened as the gguf library does it and stored as float32: loading the folder in
    float32 gives the widened values bit for bit. The first call takes about ten seconds per 100 MB and four
    to eight times the file's size on disk; later calls only return the path.

    Args:
        path: The file.
        sha256: Its hash.

    Returns:
        The folder.

    Raises:
        InputError: The file is no GGUF file, or is damaged.
        UnknownFamilyError: transformers has no reader for the architecture in it.
    """
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path}, which begins with {magic!r}", "a GGUF file", "check the file, or download it again")

    def build(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with quiet_transformers():
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
                )
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            except (ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
                raise UnknownFamilyError(
                    f"{path.name}: {type(error).__name__}: {error}",
                    "a GGUF file whole and of an architecture that transformers reads",
                    "check the file; else load the model from a Hugging Face folder",
                ) from error
            _forget_quantization(model)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return converted("gguf", sha256, ("transformers", "torch"), build)


def convert_efficientnet_lite(path: Path, sha256: str) -> Path:
    """The published EfficientNet-Lite0 checkpoint as a safetensors file under this package's names."""

    def build(folder: Path) -> None:
        published = torch.load(path, map_location="cpu", weights_only=True)
        _save({efficientnet_key(key): value for key, value in published.items()}, folder)

    return converted("efficientnet-lite", sha256, ("torch",), build)


_LITE_TOP = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
_LITE_BLOCK = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


def efficientnet_key(published: str) -> str:
    """Our name for a tensor of the published EfficientNet-Lite checkpoint.

    Example:
        >>> efficientnet_key("_blocks.3._bn1.running_var")
        'features.3.depthwise.norm.running_var'
    """
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", published)
    if block:
        return f"features.{block[1]}.{_LITE_BLOCK[block[2]]}.{block[3]}"
    module, _, tensor = published.rpartition(".")
    return f"{(_LITE_TOP | {'_fc': 'classifier'})[module]}.{tensor}"


_ESRGAN = {
    "F_m1": "shallow",
    "F_0": "entry",
    "F_1_1": "dense.0.conv",
    "LFF_1": "dense.0.fuse",
    "F_2_1": "dense.1.conv",
    "LFF_2": "dense.1.fuse",
    "GFF_1": "global_fuse",
    "GFF_2": "global_conv",
    "UPN1": "up_conv1",
    "UPN2": "up_conv2",
    "UPN3": "up_conv3",
    "SR": "restore",
}


def convert_esrgan(weights: Path, sha256: str) -> Path:
    """One magnification of ESRGAN-slim (Keras layers format) as safetensors under this package's names.

    Args:
        weights: The `.bin` file; `model.json`, which lists the tensors in it, lies beside it.
        sha256: Hash of the `.bin` file.
    """

    def build(folder: Path) -> None:
        manifest = json.loads((weights.parent / "model.json").read_text(encoding="utf-8"))["weightsManifest"]
        _save(read_keras_weights(manifest[0]["weights"], weights.read_bytes()), folder)

    return converted("esrgan-slim", sha256, ("torch",), build)


def read_keras_weights(rows: list[dict], data: bytes) -> dict[str, torch.Tensor]:
    """ESRGAN's tensors from the bytes of its `.bin` file: little-endian float32 in the manifest's order.

    Kernels turn from H x W x in x out to out x in x H x W.

    Raises:
        ChecksumError: The bytes are not those that the rows describe.
    """
    tensors, start = {}, 0
    for row in rows:
        count = int(np.prod(row["shape"]))
        if row["dtype"] != "float32" or start + 4 * count > len(data):
            raise ChecksumError(f"{row['name']} at byte {start} of {len(data)}", f"{count} float32", "fetch it again")
        values = torch.from_numpy(np.frombuffer(data, "<f4", count, start).reshape(row["shape"]).astype(np.float32))
        layer, _, part = row["name"].partition("/")
        if part == "kernel":
            tensors[f"{_ESRGAN[layer]}.weight"] = values.permute(3, 2, 0, 1).contiguous()
        else:
            tensors[f"{_ESRGAN[layer]}.bias"] = values
        start += 4 * count
    if start != len(data):
        raise ChecksumError(f"{len(data)} bytes of weights", f"{start}, as model.json says", "fetch it again")
    return tensors


@contextmanager
def quiet_transformers():
    """Inside: no progress bars from transformers. Afterwards as before."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _forget_quantization(model) -> None:
    """Drop the marks that keep a widened model from being saved; its values stay."""
    model.hf_quantizer = None
    for owner in (model, model.config):
        for mark in ("is_quantized", "quantization_method", "quantization_config"):
            if hasattr(owner, mark):
                delattr(owner, mark)


def _save(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
