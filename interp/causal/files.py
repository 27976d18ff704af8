"""Alignments on disk: the map's raw values with what they belong to, so that training can go on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.causal.flexible_maps import build_map
from interp.causal.models import CausalModel
from interp.causal.partition import Partition
from interp.causal.training import Fit, Training
from interp.hooks.errors import ArgumentError, UnmatchedVariableError
from interp.hooks.model import Model
from interp.hooks.table import Rows
from interp.saving import load_result, save_result

if TYPE_CHECKING:
    from interp.causal.alignment import Alignment


@dataclass(frozen=True, eq=False)
class SavedAlignment(Rows):
    """What of an alignment is kept.

    Attributes:
        spec: The kind of map and its options, as `build_map` takes them.
        width: Of the activations.
        seed: Of the map's first values.
        dtype: Of the map.
        values: Its raw parameters and buffers.
        partition: Coordinates by variable.
        sites: Where it was trained.
        algorithm: Name of the algorithm.
        variables: Those of the algorithm that have a block.
        training: The budget, or None where nothing was trained.
        fit: What training came to, or None.
        interp: Version that wrote it.
    """

    spec: dict[str, Any]
    width: int
    seed: int
    dtype: str
    values: dict[str, Tensor] = field(repr=False)
    partition: dict[str, Any]
    sites: list[str]
    algorithm: str
    variables: list[str]
    training: dict[str, Any] | None
    fit: dict[str, Any] | None
    interp: str

    def to_records(self) -> list[dict[str, Any]]:
        """One row."""
        map_ = ", ".join(f"{k}={v}" for k, v in self.spec.items())
        return [{"map": map_, "width": self.width, "sites": " ".join(self.sites), "algorithm": self.algorithm}]


def save_alignment(alignment: "Alignment", stem: str | Path) -> None:
    """Write an alignment to ``stem.json`` and ``stem.safetensors``; the network and the algorithm are not kept.

    Raises:
        ArgumentError: If the map is a dictionary, which has files of its own.
    """
    save_result(kept_part(alignment), stem)


def kept_part(alignment: "Alignment") -> SavedAlignment:
    """What of an alignment `save_alignment` writes.

    Raises:
        ArgumentError: If the map is a dictionary, which has files of its own.
    """
    import interp

    tau = alignment.tau
    if tau.kind == "dictionary":
        raise ArgumentError(f"saving {tau}", "a map that is made from its own values", "keep the dictionary's folder")
    sites = [alignment.sites] if not isinstance(alignment.sites, (list, tuple)) else alignment.sites
    return SavedAlignment(
        dict(tau.spec()), tau.width, tau.seed, str(tau.dtype).removeprefix("torch."), dict(tau.state_dict()),
        alignment.partition.to_dict(), [str(s) for s in sites], alignment.causal_model.name, list(alignment.variables),
        None if alignment.training is None else asdict(alignment.training),
        None if alignment.result is None else asdict(alignment.result), interp.__version__,
    )  # fmt: skip


def load_alignment(stem: str | Path, model: Model, causal_model: CausalModel) -> "Alignment":
    """Read an alignment that `save_alignment` wrote; training can go on from there.

    Raises:
        RunError: If the file is missing, damaged, or something else.
        UnmatchedVariableError: If the algorithm is not the one it was trained for.
        ShapeMismatchError: If the map does not fit the site, when it is first used.
    """
    from interp.causal.alignment import Alignment

    kept = load_result(stem)
    if not isinstance(kept, SavedAlignment):
        raise ArgumentError(f"{stem}, a {type(kept).__name__}", "a saved alignment")
    if causal_model.name != kept.algorithm or not set(kept.variables) <= set(causal_model.variables):
        raise UnmatchedVariableError(
            f"algorithm {causal_model.name!r} ({', '.join(causal_model.variables)})",
            f"{kept.algorithm!r} ({', '.join(kept.variables)}), for which {stem} was trained",
        )
    dtype = getattr(torch, kept.dtype)
    acts = torch.eye(kept.width) if kept.spec["kind"] == "pca" else None  # its axes are among the values
    tau = build_map(kept.spec, kept.width, seed=kept.seed, acts=acts, dtype=dtype)
    tau.load_state_dict(kept.values)
    sites = kept.sites[0] if len(kept.sites) == 1 else kept.sites
    found = Alignment(model, causal_model, sites, tau, Partition(_blocks(kept.partition)))
    found.training = None if kept.training is None else Training(**kept.training)
    found.result = None if kept.fit is None else Fit(**kept.fit)
    return found


def _blocks(partition: Mapping[str, Any]) -> dict[str, Any]:
    return {variable: block if isinstance(block, int) else list(block) for variable, block in partition.items()}
