"""Loading what transformers can load: folders, hub models, and folders converted from GGUF files."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from interp.hooks.cache import remembered_sha256
from interp.hooks.convert import quiet_transformers
from interp.hooks.errors import (
    ArgumentError,
    InputError,
    MissingExtraError,
    NotCachedError,
    UnknownFamilyError,
)
from interp.hooks.networks.images import ProcessorPixels

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
_HUB_SECONDS = 10


@dataclass(frozen=True)
class Placement:
    """Where the weights go and in which dtype; `None` leaves it to the model."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None
    device_map: Any = None

    def __post_init__(self):
        if self.device is not None and self.device_map is not None:
            raise ArgumentError(
                f"device={str(self.device)!r} and device_map={self.device_map!r}",
                "one of them",
                "give device for one device, or device_map to spread the model",
            )

    @classmethod
    def of(cls, dtype: Any, device: Any, device_map: Any) -> "Placement":
        """Read what a user wrote, dtypes and devices as text included.

        Raises:
            ArgumentError: No floating-point dtype, no device, or both device and device_map.
        """
        return cls(_read_dtype(dtype), _read_device(device), device_map)


def _read_dtype(dtype: Any) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ArgumentError(
        f"dtype={dtype!r}",
        "a floating-point dtype",
        "for example torch.float32, 'bfloat16', or None for the model's own",
    )


def _read_device(device: Any) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device={device!r}", "a torch device", "for example 'cpu' or 'cuda:0'") from error


@dataclass(frozen=True)
class HuggingFaceParts:
    """What transformers loaded: the model in eval mode, its companions, and the files with its weights."""

    module: torch.nn.Module
    tokenizer: Any
    preprocess: ProcessorPixels | None
    labels: list[str] | None
    architecture: str
    revision: str | None
    weight_files: tuple[Path, ...]


def load_pretrained(source: str | Path, placement: Placement, local_files_only: bool = True) -> HuggingFaceParts:
    """Load a model of the class that its config names, with tokenizer or image processor where it has one.

    Args:
        source: A folder, or a hub id.
        placement: dtype and device.
        local_files_only: For a hub id: ask only the hub's local cache.

    Raises:
        UnknownFamilyError: The config names no architecture, or one that this transformers lacks.
        OSError: A file is neither there nor to be had (as transformers raises it).
    """
    options = {"local_files_only": local_files_only}
    config = _config(source, options)
    model_class = _model_class(config, source)
    with quiet_transformers():
        model = model_class.from_pretrained(
            source,
            dtype="auto" if placement.dtype is None else placement.dtype,
            **({} if placement.device_map is None else {"device_map": placement.device_map}),
            **options,
        )
    if placement.device is not None:
        model = model.to(placement.device)
    folder = _folder(source)
    return HuggingFaceParts(
        module=model.eval(),
        tokenizer=_tokenizer(source, options),
        preprocess=_preprocess(source, options),
        labels=_labels(config) if "ImageClassification" in model_class.__name__ else None,
        architecture=model_class.__name__,
        revision=None if Path(source).is_dir() else folder.name,
        weight_files=_weight_files(folder),
    )


def load_folder(folder: Path, placement: Placement) -> HuggingFaceParts:
    """Load a folder as transformers saves it.

    Raises:
        InputError: The folder lacks a config or weights.
        UnknownFamilyError: See `load_pretrained`.
    """
    needed = "a folder as transformers' save_pretrained writes it"
    if not (folder / "config.json").is_file():
        gguf = sorted(path.name for path in folder.glob("*.gguf"))
        do = f"give the file itself: {folder / gguf[0]}" if gguf else "check the path"
        raise InputError(f"the folder {folder}, which has no config.json", needed, do)
    if not _weight_files(folder):
        raise InputError(
            f"the folder {folder}, which has no {' or '.join(_WEIGHT_PATTERNS)}",
            needed,
            "copy the weights there, or give the model itself to interp.attach",
        )
    return load_pretrained(folder, placement)


def load_hub(name: str, placement: Placement) -> HuggingFaceParts:
    """Load a hub model: from the hub, or from its local cache if the hub is off, out of reach or refuses.

    Raises:
        NotCachedError: Neither the hub nor its local cache has it.
    """
    refusal = _why_not_the_hub(name)
    try:
        return load_pretrained(name, placement, local_files_only=refusal is not None)
    except OSError as error:
        raise NotCachedError(
            f"the name {name!r}: not whole in the model hub's local cache, and "
            + (refusal or "the hub did not give all its files"),
            "a packaged model, a folder, a .gguf file, or a hub id that can be had",
            f"run `hf download {name}` where the hub can be reached, or give a local folder; "
            "`interp models` lists models that need no hub",
        ) from error


def in_hub_cache(name: str) -> bool:
    """Whether the hub's local cache has a config of that name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    return False


def _why_not_the_hub(name: str) -> str | None:
    """None if the hub answers for this model, else why not. One short question, without retries."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  (the HTTP library's, whichever the hub uses)
    )

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off"
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        return f"the hub answers {status} (no such model, or not for you)"
    except HFValidationError:
        return "the hub knows no names of this form"
    except (HTTPError, OSError):
        return "the hub cannot be reached"
    return None


def _config(source: str | Path, options: dict) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **options)
    except ValueError as error:
        raise UnknownFamilyError(
            f"{source}: {str(error).strip().splitlines()[0][:200]}",
            "a config.json whose model_type this transformers knows",
            "correct it, or load the model yourself and give it to interp.attach",
        ) from error


def _model_class(config: Any, source: str | Path) -> Any:
    import transformers

    names = list(getattr(config, "architectures", None) or [])
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UnknownFamilyError(
            f"{source}: its config names " + (f"the architecture {names[0]}" if names else "no architecture"),
            f"a model class of transformers {transformers.__version__} under 'architectures'",
            "correct config.json, or load the model yourself and give it to interp.attach",
        )
    return found


def _has(source: str | Path, names: Iterable[str], options: dict) -> bool:
    """Whether the folder or hub model has one of these files."""
    from transformers.utils.hub import cached_file

    return any(
        cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **options,
        )
        for name in names
    )


def _tokenizer(source: str | Path, options: dict) -> Any:
    if not _has(source, _TOKENIZER_FILES, options):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, **options)


def _preprocess(source: str | Path, options: dict) -> ProcessorPixels | None:
    if not _has(source, _PROCESSOR_FILES, options):
        return None
    from transformers import AutoImageProcessor

    try:
        return ProcessorPixels(AutoImageProcessor.from_pretrained(source, **options))
    except ImportError as error:
        raise MissingExtraError(
            f"{source}: its image processor needs a package that is not installed",
            str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            "install that package",
        ) from error


def _labels(config: Any) -> list[str]:
    names = config.id2label
    return [str(names[index]) for index in range(len(names))]


def _folder(source: str | Path) -> Path:
    """The folder itself, or the snapshot of a hub model in the hub's local cache, which its revision names."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(source), "config.json", local_files_only=True)).parent


def _weight_files(folder: Path) -> tuple[Path, ...]:
    return next((tuple(files) for p in _WEIGHT_PATTERNS if (files := sorted(folder.glob(p)))), ())


def weight_hashes(files: Iterable[Path]) -> dict[str, Any]:
    """Hashes of a model's weights, as plain data.

    Returns:
        `files`: name to SHA-256. `sha256`: the only file's own, or for several that of their listing as
        sha256sum prints it; None without files.
    """
    hashes = {path.name: _file_hash(path) for path in files}
    if len(hashes) <= 1:
        return {"files": hashes, "sha256": next(iter(hashes.values()), None)}
    listing = "".join(f"{value}  {name}\n" for name, value in sorted(hashes.items()))
    return {"files": hashes, "sha256": sha256(listing.encode()).hexdigest()}


def _file_hash(path: Path) -> str:
    """The hub's cache names large files by their SHA-256; others are read once and remembered."""
    real = Path(os.path.realpath(path))
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    return remembered_sha256(path)
