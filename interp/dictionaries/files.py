"""Folders of SAELens's format, read with care: JSON and safetensors, nothing that could run, shapes before bytes."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from interp.hooks.errors import DictionaryError, SiteError
from interp.hooks.site import Site, SiteLike

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_MOST_CONFIG_BYTES, _LARGEST_AXIS = 1 << 20, 1 << 24
_RENAMED = {
    "hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn",
}  # fmt: skip
Shapes = dict[str, tuple[str, ...]]
_PLAIN: Shapes = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_out"), "b_enc": ("d_sae",), "b_dec": ("d_out",)}
_GATED: Shapes = {k: v for k, v in _PLAIN.items() if k != "b_enc"} | {
    "b_gate": ("d_sae",),
    "b_mag": ("d_sae",),
    "r_mag": ("d_sae",),
}
_JUMP: Shapes = {"threshold": ("d_sae",)}
_SKIP: Shapes = {"W_skip": ("d_out", "d_in")}
SHAPES: dict[str, Shapes] = {
    "standard": _PLAIN,
    "topk": _PLAIN,
    "gated": _GATED,
    "jumprelu": _PLAIN | _JUMP,
    "transcoder": _PLAIN,
    "skip_transcoder": _PLAIN | _SKIP,
    "jumprelu_transcoder": _PLAIN | _JUMP,
    "jumprelu_skip_transcoder": _PLAIN | _JUMP | _SKIP,
}
_FLOATS = ("F16", "BF16", "F32", "F64")


def read_folder(
    folder: Path, site: SiteLike | None, target: SiteLike | None, factor: float | None, dtype: torch.dtype | None,
    device: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """Return (fields of a Dictionary, its weights); see `interp.dictionaries.dictionary.Dictionary.load`."""
    config = _config(folder / _CONFIG)
    architecture = config.get("architecture", "standard")
    if architecture not in SHAPES:
        raise DictionaryError(f"architecture {architecture!r} in {folder / _CONFIG}", f"one of {', '.join(SHAPES)}")
    transcoder = "transcoder" in architecture
    if transcoder and config.get("normalize_activations", "none") != "none":
        raise DictionaryError("a transcoder that normalises its input", "one that does not: its output has other units")
    normalization = _normalization(config, factor)
    options: dict[str, Any] = {
        "architecture": architecture,
        "site": _site(config, site, "", folder),
        "k": _k(config, architecture),
        "normalization": normalization,
        "rescales": bool(config.get("rescale_acts_by_decoder_norm", False)) and architecture == "topk",
        "metadata": config,
    }
    options["target"] = _site(config, target, "_out", folder) if transcoder else options["site"]
    if target is not None and not transcoder:
        raise DictionaryError(f"target={target!r} for a {architecture} dictionary", "none: it reconstructs its site")
    sizes = _sizes(config, transcoder)
    weights = _weights(folder / _WEIGHTS, SHAPES[architecture], sizes, config, transcoder, dtype, device)
    options["subtracts_bias"] = _subtracts(config, transcoder, weights)
    if options["k"] is not None and not 1 <= options["k"] <= sizes["d_sae"]:
        raise DictionaryError(f"k={options['k']} with {sizes['d_sae']} latents", "a number of latents to keep")
    if factor is not None:
        weights["W_enc"] = weights["W_enc"] * factor
        weights["W_dec"], weights["b_dec"] = weights["W_dec"] / factor, weights["b_dec"] / factor
    return options, weights


def _config(path: Path) -> dict[str, Any]:
    """The configuration, its metadata lifted to the same level, older names brought to newer ones."""
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise DictionaryError(f"{path} of {path.stat().st_size} bytes", f"at most {_MOST_CONFIG_BYTES}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, DictionaryError):
            raise
        raise DictionaryError(f"{path} cannot be read ({error})", "a folder of SAELens's format") from error
    if not isinstance(found, dict) or not isinstance(found.get("metadata") or {}, dict):
        raise DictionaryError(f"{path}", "a JSON object, its metadata one too")
    metadata = found.pop("metadata", None) or {}
    merged = {_RENAMED.get(str(key), str(key)): value for key, value in (metadata | found).items()}
    if merged.get("normalize_decoder"):
        raise DictionaryError(f"normalize_decoder in {path}", "a decoder that is used as it is stored")
    return merged


def _sizes(config: dict[str, Any], transcoder: bool) -> dict[str, int]:
    sizes = {key: config.get(key) for key in ("d_in", "d_sae")}
    sizes["d_out"] = config.get("d_out") if transcoder else config.get("d_in")
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_AXIS:
            raise DictionaryError(f"{key}={value!r} in {_CONFIG}", f"a whole number in 1..{_LARGEST_AXIS}")
    return sizes  # type: ignore[return-value]


def _k(config: dict[str, Any], architecture: str) -> int | None:
    """How many latents are kept: of a top-k, or of a standard one whose activation function is top-k."""
    activation = config.get("activation_fn", "relu")
    if architecture == "topk":
        k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    elif architecture == "standard" and activation == "topk":
        k = (config.get("activation_fn_kwargs") or {}).get("k")
    elif activation != "relu":
        raise DictionaryError(f"activation function {activation!r} in a {architecture} dictionary", "'relu' or 'topk'")
    else:
        return None
    if isinstance(k, bool) or not isinstance(k, int):
        raise DictionaryError(f"k={k!r} in a top-k dictionary", "a number of latents to keep")
    return k


def _normalization(config: dict[str, Any], factor: float | None) -> str:
    given = config.get("normalize_activations", "none")
    given = {False: "none", True: "expected_average_only_in", None: "none"}.get(given, given)
    if given == "expected_average_only_in":
        if factor is None or not 0 < factor < float("inf"):
            raise DictionaryError(
                f"normalize_activations='expected_average_only_in' and norm_scaling_factor={factor}",
                "the factor that training used, which is not in the folder",
                "pass norm_scaling_factor=",
            )
        return "none"
    if factor is not None:
        raise DictionaryError(f"norm_scaling_factor={factor} with normalize_activations={given!r}", "no factor")
    if given not in ("none", "constant_norm_rescale", "layer_norm"):
        raise DictionaryError(
            f"normalize_activations={given!r}",
            "'none', 'expected_average_only_in', 'constant_norm_rescale' or 'layer_norm'",
        )
    return given


def _subtracts(config: dict[str, Any], transcoder: bool, weights: dict[str, Tensor]) -> bool:
    """Whether b_dec is taken off the input: a transcoder only has one to take off where it has two."""
    asked = config.get("apply_b_dec_to_input", not transcoder or "b_dec_out" in weights)
    if asked and transcoder and "b_dec_out" not in weights:
        raise DictionaryError("apply_b_dec_to_input in a transcoder whose only b_dec is its output's", "false")
    return bool(asked)


def _site(config: dict[str, Any], given: SiteLike | None, suffix: str, folder: Path) -> Site:
    key = f"hook_name{suffix}"
    if given is None and not isinstance(config.get(key), str):
        way = "target=" if suffix else "site="
        raise DictionaryError(f"{key}={config.get(key)!r} in {folder / _CONFIG}", "the name of a site", f"pass {way}")
    head = config.get(f"hook_head_index{suffix}")
    if given is not None:
        return Site.parse(given)
    try:
        site = Site.parse(config[key])
        return site if head is None else site.at(head=(int(head),))
    except (SiteError, TypeError, ValueError) as error:
        raise DictionaryError(f"{key}={config[key]!r}, head {head!r}", "the name of a site", str(error)) from error


def _weights(
    path: Path, shapes: dict[str, tuple[str, ...]], sizes: dict[str, int], config: dict[str, Any], transcoder: bool,
    dtype: torch.dtype | None, device: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors, after names, shapes and dtypes in the file's header have been compared with the configuration."""
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            names = set(file.keys())
            wanted = _wanted(names, shapes, config, transcoder)
            _compare(path, file, names, wanted, sizes)
            found = {name: file.get_tensor(name) for name in sorted(wanted)}
    except (OSError, SafetensorError) as error:
        raise DictionaryError(f"{path} cannot be read ({error})", "a safetensors file") from error
    found = {name: _floating(path, name, tensor, dtype) for name, tensor in found.items()}
    if "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").exp()
    if "scaling_factor" in found:
        scale = found.pop("scaling_factor")
        if not config.get("finetuning_scaling_factor") and not torch.allclose(scale, torch.ones_like(scale)):
            raise DictionaryError(f"a scaling_factor in {path}", "finetuning_scaling_factor: true, or ones")
        found["finetuning_scaling_factor"] = scale
    return found


def _wanted(
    names: set[str], shapes: dict[str, tuple[str, ...]], config: dict[str, Any], transcoder: bool
) -> dict[str, tuple[str, ...]]:
    """Shape of each tensor that the folder should hold, under the names that it uses."""
    wanted = dict(shapes)
    if "threshold" in wanted and "log_threshold" in names and "threshold" not in names:
        wanted["log_threshold"] = wanted.pop("threshold")
    if transcoder and "b_dec_out" in names:
        wanted |= {"b_dec": ("d_in",), "b_dec_out": ("d_out",)}
    for name in ("finetuning_scaling_factor", "scaling_factor"):
        if name in names or (name.startswith("fine") and config.get(name) and "scaling_factor" not in names):
            wanted[name] = ("d_sae",)
    return wanted


def _compare(path: Path, file: Any, names: set[str], wanted: dict[str, tuple[str, ...]], sizes: dict[str, int]) -> None:
    missing, unknown = sorted(set(wanted) - names), sorted(names - set(wanted))
    if missing or unknown:
        raise DictionaryError(
            f"{path} with the tensors {', '.join(sorted(names))}",
            f"exactly {', '.join(sorted(wanted))}",
            "; ".join(f"{what}: {', '.join(n)}" for what, n in (("missing", missing), ("unknown", unknown)) if n),
        )
    for name, axes in wanted.items():
        entry, shape = file.get_slice(name), [sizes[axis] for axis in axes]
        if entry.get_shape() != shape:
            raise DictionaryError(f"{name} of shape {entry.get_shape()} in {path}", f"{shape}, that is {list(axes)}")
        if entry.get_dtype() not in _FLOATS:
            raise DictionaryError(f"{name} of dtype {entry.get_dtype()} in {path}", f"one of {', '.join(_FLOATS)}")


def _floating(path: Path, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise DictionaryError(f"{name} in {path} holds NaN or infinity", "finite weights")
    return tensor.to(dtype or (torch.float64 if tensor.dtype == torch.float64 else torch.float32))
