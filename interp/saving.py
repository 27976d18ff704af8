"""Results on disk: a JSON file with the plain fields, a safetensors file with the tensors. No pickle."""

import dataclasses
import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp.hooks.errors import RunError
from interp.hooks.linearization import Linearization
from interp.hooks.site import Site
from interp.hooks.table import Table

FORMAT = 1
_TYPES = {
    "AlignmentReport": "interp.causal.report",
    "AlignmentSweep": "interp.causal.sweep_result",
    "AttentionParts": "interp.jacobians.attention_parts",
    "AttentionPatterns": "interp.attention",
    "Attribution": "interp.attribution.direct",
    "AttributionSummary": "interp.attribution.data",
    "BiasReport": "interp.hooks.votes",
    "Calibration": "interp.probes.scores",
    "Codelength": "interp.probes.codelength",
    "Control": "interp.causal.report",
    "Cost": "interp.steering",
    "CouplingFit": "interp.propagation.feature_vectors",
    "Couplings": "interp.propagation.couplings",
    "DoseResponse": "interp.steering",
    "Eigen": "interp.hooks.spectra",
    "EntityTable": "interp.datasets",
    "Evaluation": "interp.probes.evaluation",
    "FeatureJacobian": "interp.jacobians.features",
    "FeatureJacobians": "interp.jacobians.features",
    "FeatureVector": "interp.propagation.feature_vectors",
    "Fit": "interp.causal.training",
    "Frontier": "interp.causal.sweep_result",
    "HeadNorms": "interp.attribution.head_norms",
    "Injectivity": "interp.causal.nearness",
    "Interval": "interp.intervals",
    "JacobianLens": "interp.lens.jacobian_lens",
    "JacobianMean": "interp.jacobians.means",
    "JacobianSummary": "interp.jacobians.reductions",
    "KnownEntities": "interp.causal.attributes",
    "LayerSpectra": "interp.jacobians.layer_spectra",
    "LeaceEraser": "interp.probes.erasure",
    "LearningCurve": "interp.probes.curves",
    "LinearRelation": "interp.linear_relation",
    "LogitLens": "interp.lens.logit_lens",
    "LowDataComparison": "interp.low_data",
    "Nearness": "interp.causal.nearness",
    "NeuronSearch": "interp.causal.neurons",
    "ObservableComparison": "interp.propagation.comparison",
    "PatchGrid": "interp.patching.grid",
    "PathSearch": "interp.propagation.path_search",
    "PermutationTest": "interp.probes.controls",
    "ProbeSweep": "interp.probes.sweeps",
    "ProbeUse": "interp.probes.use",
    "RelationScore": "interp.linear_relation",
    "SVD": "interp.hooks.spectra",
    "SavedAlignment": "interp.causal.files",
    "Score": "interp.causal.scoring",
    "Selectivity": "interp.probes.controls",
    "Stability": "interp.hooks.stability",
    "Table": "interp.hooks.table",
    "TokenBlocks": "interp.hooks.token_blocks",
    "TransferMatrix": "interp.probes.curves",
    "Votes": "interp.hooks.votes",
}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_result(result: Any, stem: str | Path) -> None:
    """Write a result to ``stem.json`` (and ``stem.safetensors``, if it holds tensors), tensors first.

    Raises:
        RunError: If the result is of a type that cannot be read back.

    Example:
        >>> import tempfile, pathlib
        >>> stem = pathlib.Path(tempfile.mkdtemp()) / "rows"
        >>> save_result(Table([{"a": 1}]), stem)
        >>> load_result(stem)[0]
        {'a': 1}
    """
    stem, kind = Path(stem), type(result).__name__
    if kind not in _TYPES:
        raise RunError(f"a result of type {kind}", f"one of {', '.join(_TYPES)}")
    tensors: dict[str, Tensor] = {}
    plain = {name: _take_out(value, name, tensors) for name, value in _fields(result).items()}
    record: dict[str, Any] = {"format": FORMAT, "type": kind, "fields": plain}
    if tensors:
        temporary = stem.with_name(f".{stem.name}.{os.getpid()}.tmp")
        save_file(tensors, str(temporary))
        record["tensors_sha256"] = _digest(temporary)
        os.replace(temporary, stem.with_suffix(".safetensors"))
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_atomically(stem.with_suffix(".json"), text.encode())


def load_result(stem: str | Path) -> Any:
    """Read a result that `save_result` wrote, bit for bit.

    Raises:
        RunError: If the file is missing, corrupt, of a newer format or of an unknown type.
    """
    stem = Path(stem)
    name, file = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    do = "compute the result again"
    try:
        record = json.loads(name.read_text(encoding="utf-8"))
        kind, version = record["type"], record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{name} cannot be read ({error})", "a result file as it was written", do) from error
    if version > FORMAT or kind not in _TYPES:
        raise RunError(f"{name}: type {kind!r}, format {version}", f"format {FORMAT} or older", "update interp")
    if (written := record.get("tensors_sha256")) is not None:
        if not file.is_file():
            raise RunError(f"{file} is missing", f"the tensors of {name.name}", do)
        if _digest(file) != written:
            raise RunError(f"{file} cannot be read (it was changed or cut off)", "the file as it was written", do)
    try:
        tensors = load_file(file) if file.is_file() else {}
        fields = {key: _put_back(value, tensors) for key, value in record["fields"].items()}
        return _made(kind, fields)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{name} cannot be read ({error})", "the file as it was written", do) from error


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fields(result: Any) -> dict[str, Any]:
    if isinstance(result, Table):
        return {"rows": result.to_records(), "title": result.title}
    return {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.metadata.get("saved", True)}


def _made(kind: str, fields: dict[str, Any]) -> Any:
    return getattr(importlib.import_module(_TYPES[kind]), kind)(**fields)


def _take_out(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor) and value.is_complex():
        return {"complex": _take_out(torch.view_as_real(value.resolve_conj()), name, tensors)["tensor"]}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        return {"array": _take_out(torch.from_numpy(np.ascontiguousarray(value)), name, tensors)["tensor"]}
    if isinstance(value, Site):
        return {"site": str(value)}
    if isinstance(value, Linearization):
        return {"linearization": value.to_dict()}
    if isinstance(value, dict):
        return {"items": [[key, _take_out(v, f"{name}.{key}", tensors)] for key, v in value.items()]}
    if type(value).__name__ in _TYPES:
        parts = {key: _take_out(v, f"{name}.{key}", tensors) for key, v in _fields(value).items()}
        return {"type": type(value).__name__, "fields": parts}
    if isinstance(value, (list, tuple)):
        return [_take_out(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    return value


def _put_back(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_back(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if name := value.get("tensor") or value.get("complex") or value.get("array"):
        if name not in tensors:
            raise RunError(f"tensor {name!r} is missing", "the result's safetensors file")
        if "array" in value:
            return tensors[name].numpy()
        return tensors[name] if "tensor" in value else torch.view_as_complex(tensors[name])
    if "type" in value:
        if value["type"] not in _TYPES:
            raise RunError(f"a part of type {value['type']!r}", f"one of {', '.join(_TYPES)}", "update interp")
        return _made(value["type"], {key: _put_back(v, tensors) for key, v in value["fields"].items()})
    if "site" in value:
        return Site.parse(value["site"])
    if "linearization" in value:
        return Linearization(**value["linearization"])
    return {key: _put_back(v, tensors) for key, v in value["items"]}
