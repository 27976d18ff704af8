"""Probes on disk: one safetensors file whose metadata holds a JSON header. No pickle, and no code from a file.

A file names its class, which must be on the list below; its parameters must be those of the class; its arrays must be
finite and fit together; and header and arrays must have the recorded SHA-256, which shows damage, not who wrote it.
"""

import hashlib
import importlib
import json
import math
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp.hooks.errors import ProbeFileError
from interp.saving import write_atomically

FORMAT = 1
CLASSES = {
    "AttentionProbe": "interp.probes.attention",
    "BilinearProbe": "interp.probes.bilinear",
    "CCSProbe": "interp.probes.contrast",
    "KNNProbe": "interp.probes.neighbours",
    "LDAProbe": "interp.probes.linear",
    "LogisticProbe": "interp.probes.linear",
    "MLPProbe": "interp.probes.mlp",
    "MassMeanProbe": "interp.probes.linear",
    "MomentFeatures": "interp.probes.moments",
    "MomentProbe": "interp.probes.moment_probe",
    "RidgeProbe": "interp.probes.linear",
}
_FITTED = re.compile(r"[a-zA-Z][a-zA-Z0-9_]*_")


def save_probe(probe: Any, path: str | Path) -> None:
    """Write a fitted probe to a file, whole or not at all.

    Raises:
        ProbeFileError: If the probe is not fitted, or of a class that cannot be read back.

    Example:
        >>> from interp.probes import MassMeanProbe
        >>> probe = MassMeanProbe().fit([[0.0], [1.0], [3.0]], ["a", "a", "b"])
        >>> save_probe(probe, "means.safetensors")
        >>> load_probe("means.safetensors").predict([[2.9]]).tolist()
        ['b']
    """
    from safetensors.torch import save

    import interp

    tensors: dict[str, Tensor] = {}
    header = _header(probe, "", tensors) | {"format": FORMAT, "interp": interp.__version__}
    text = json.dumps(header, ensure_ascii=False, allow_nan=False)
    tensors = tensors or {"nothing": torch.zeros(0)}
    write_atomically(Path(path), save(tensors, {"probe": text, "sha256": _digest(text, tensors)}))


def load_probe(path: str | Path) -> Any:
    """Read a probe that `save_probe` wrote, bit for bit.

    Raises:
        ProbeFileError: If the file is not a probe's, is damaged or tampered with, or does not fit together.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ProbeFileError(f"{path} cannot be read ({error})", "a file that save_probe wrote") from error
    text = metadata.get("probe", "")
    if metadata.get("sha256") != _digest(text, tensors):
        raise ProbeFileError(f"{path}: header and arrays do not have the recorded SHA-256", "an undamaged probe file")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ProbeFileError(f"{path} has no probe header", "a file that save_probe wrote") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ProbeFileError(f"{path}: not format {FORMAT}", "a file of this version", "update interp")
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise ProbeFileError(f"{path}: NaN or infinity in {', '.join(bad[:5])}", "finite arrays")
    try:
        return _probe(header, tensors)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ProbeFileError(f"{path} does not fit together ({error})", "a file that save_probe wrote") from error


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    whole = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        whole.update(f"{key}|{value.dtype}|{list(value.shape)}|".encode())
        whole.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return whole.hexdigest()


def _header(probe: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = type(probe).__name__
    fitted = {key: value for key, value in vars(probe).items() if _FITTED.fullmatch(key)}
    if kind not in CLASSES or not fitted:
        raise ProbeFileError(f"a {kind} with {len(fitted)} fitted attributes", f"a fitted {' or '.join(CLASSES)}")
    params = {key: _plain(value) for key, value in probe.get_params(deep=False).items()}
    parts = {key: _take_out(value, f"{prefix}{key}", tensors) for key, value in fitted.items()}
    return {"class": kind, "params": params, "fitted": parts}


def _take_out(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(value, nn.Module):
        for key, tensor in value.state_dict().items():
            tensors[f"{name}/{key}"] = tensor.detach().cpu().contiguous().clone()
        return {"kind": "module"}
    if isinstance(value, np.ndarray) and value.dtype.kind in "USO":
        return {"kind": "words", "dtype": value.dtype.str, "values": _plain(value.tolist())}
    if isinstance(value, (np.ndarray, Tensor)):
        found = torch.as_tensor(value).detach().cpu().contiguous().clone()
        tensors[name] = found
        return {"kind": "array" if isinstance(value, np.ndarray) else "tensor"}
    if type(value).__name__ in CLASSES:
        return {"kind": "probe", "header": _header(value, f"{name}/", tensors)}
    return {"kind": "plain", "value": _plain(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {"items": [[_plain(k), _plain(v)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_plain(v) for v in value]}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ProbeFileError(f"a value of type {type(value).__name__} ({value!r:.80})", "numbers, texts, lists and dicts")


def _from_plain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "items" in value:
        return {_from_plain(k): _from_plain(v) for k, v in value["items"]}
    found = [_from_plain(v) for v in value["tuple" if "tuple" in value else "list"]]
    return tuple(found) if "tuple" in value else found


def _probe(header: dict[str, Any], tensors: dict[str, Tensor], prefix: str = "") -> Any:
    kind = header["class"]
    if kind not in CLASSES:
        raise ProbeFileError(f"a probe of class {kind!r}", f"one of {', '.join(CLASSES)}")
    made = getattr(importlib.import_module(CLASSES[kind]), kind)()
    params = {key: _from_plain(value) for key, value in header["params"].items()}
    if set(params) - set(made.get_params(deep=False)):
        raise ProbeFileError(f"unknown parameters of {kind} in {sorted(params)}", "the parameters of the class")
    made.set_params(**params)
    modules = []
    for key, part in header["fitted"].items():
        if not _FITTED.fullmatch(key):
            raise ProbeFileError(f"an attribute {key!r}", "fitted attributes, whose names end in _")
        if part["kind"] == "module":
            modules.append(key)
        else:
            setattr(made, key, _put_back(part, f"{prefix}{key}", tensors))
    for key in modules:
        module = made._module()
        start = f"{prefix}{key}/"
        state = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
        dtypes = {value.dtype for value in state.values()}
        module.to(dtypes.pop() if len(dtypes) == 1 else None).load_state_dict(state)
        setattr(made, key, module.eval())
    _check_shapes(made, kind)
    return made


def _put_back(part: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Any:
    if part["kind"] == "plain":
        return _from_plain(part["value"])
    if part["kind"] == "probe":
        return _probe(part["header"], tensors, f"{name}/")
    if part["kind"] == "words":
        if np.dtype(part["dtype"]).kind not in "USO":
            raise ProbeFileError(f"words of dtype {part['dtype']!r}", "texts")
        return np.array(_from_plain(part["values"]), dtype=np.dtype(part["dtype"]))
    return tensors[name].numpy() if part["kind"] == "array" else tensors[name]


def _check_shapes(probe: Any, kind: str) -> None:
    for key, shape in probe._shapes().items():
        found = tuple(attrgetter(key)(probe).shape)
        if found != shape:
            raise ProbeFileError(f"{key} of shape {list(found)} in a {kind}", f"{list(shape)}")
