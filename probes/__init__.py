"""Probes: estimators on activations. Names are resolved when first used; scikit-learn is imported with the first."""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "interp.probes.adapters": ["BranchPoint", "PSRPAdapter", "train_adapter"],
    "interp.probes.attention": ["AttentionProbe"],
    "interp.probes.bilinear": ["BilinearProbe"],
    "interp.probes.contrast": ["CCSProbe"],
    "interp.probes.linear": ["LDAProbe", "LogisticProbe", "MassMeanProbe", "RidgeProbe"],
    "interp.probes.logistic_solver": ["fit_sites"],
    "interp.probes.mlp": ["MLPProbe"],
    "interp.probes.moment_head": ["MomentHead"],
    "interp.probes.moment_probe": ["MomentProbe"],
    "interp.probes.moments": ["MomentFeatures"],
    "interp.probes.neighbours": ["KNNProbe"],
    "interp.probes.saving": ["load_probe", "save_probe"],
    "interp.probes.tokens": ["FirstTokenWarning", "TokenSets"],
}
_NAMES = {name: home for home, names in _HOME.items() for name in names}

if TYPE_CHECKING:
    from interp.probes.adapters import BranchPoint, PSRPAdapter, train_adapter
    from interp.probes.attention import AttentionProbe
    from interp.probes.bilinear import BilinearProbe
    from interp.probes.contrast import CCSProbe
    from interp.probes.linear import LDAProbe, LogisticProbe, MassMeanProbe, RidgeProbe
    from interp.probes.logistic_solver import fit_sites
    from interp.probes.mlp import MLPProbe
    from interp.probes.moment_head import MomentHead
    from interp.probes.moment_probe import MomentProbe
    from interp.probes.moments import MomentFeatures
    from interp.probes.neighbours import KNNProbe
    from interp.probes.saving import load_probe, save_probe
    from interp.probes.tokens import FirstTokenWarning, TokenSets

__all__ = [
    "AttentionProbe", "BilinearProbe", "BranchPoint", "CCSProbe", "FirstTokenWarning", "KNNProbe", "LDAProbe",
    "LogisticProbe", "MLPProbe", "MassMeanProbe", "MomentFeatures", "MomentHead", "MomentProbe", "PSRPAdapter",
    "RidgeProbe", "TokenSets", "fit_sites", "load_probe", "save_probe", "train_adapter",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'interp.probes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
