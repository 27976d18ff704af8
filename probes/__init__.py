"""Probes: estimators on activations. Names are resolved when first used; scikit-learn is imported with the first."""

from typing import TYPE_CHECKING

from interp.hooks.lazy import lazy_names

_HOME = {
    "interp.probes.adapters": ["BranchPoint", "PSRPAdapter", "train_adapter"],
    "interp.probes.attention": ["AttentionProbe"],
    "interp.probes.bilinear": ["BilinearProbe"],
    "interp.probes.codelength": ["Codelength", "online_codelength"],
    "interp.probes.contrast": ["CCSProbe"],
    "interp.probes.controls": ["PermutationTest", "Selectivity", "control_task", "permutation_test", "selectivity"],
    "interp.probes.curves": ["LearningCurve", "TransferMatrix", "learning_curve", "transfer_matrix"],
    "interp.probes.erasure": ["LeaceEraser", "LeaceFitter", "ablate_direction"],
    "interp.probes.evaluation": ["Evaluation", "evaluate"],
    "interp.probes.intervals": ["Interval", "bootstrap_ci", "mcnemar", "wilson"],
    "interp.probes.linear": ["LDAProbe", "LogisticProbe", "MassMeanProbe", "RidgeProbe"],
    "interp.probes.site_fits": ["fit_sites"],
    "interp.probes.mlp": ["MLPProbe"],
    "interp.probes.moment_head": ["MomentHead"],
    "interp.probes.moment_probe": ["MomentProbe"],
    "interp.probes.moments": ["MomentFeatures"],
    "interp.probes.neighbours": ["KNNProbe"],
    "interp.probes.regression": ["RegressionEvaluation", "RidgeRegression"],
    "interp.probes.saving": ["load_probe", "save_probe"],
    "interp.probes.scores": ["Calibration", "apply_temperature", "calibration", "fit_temperature", "score_table"],
    "interp.probes.site_moments": ["ClosedForms", "closed_forms"],
    "interp.probes.splits": ["Grouping", "duplicate_groups", "outer_folds"],
    "interp.probes.streaming": ["stream_probes"],
    "interp.probes.sweeps": ["ProbeSweep", "sweep"],
    "interp.probes.tokens": ["FirstTokenWarning", "TokenSets"],
    "interp.probes.use": ["ProbeUse", "erase_layers", "probe_use"],
}  # fmt: skip

if TYPE_CHECKING:
    from interp.probes.adapters import BranchPoint, PSRPAdapter, train_adapter
    from interp.probes.attention import AttentionProbe
    from interp.probes.bilinear import BilinearProbe
    from interp.probes.codelength import Codelength, online_codelength
    from interp.probes.contrast import CCSProbe
    from interp.probes.controls import PermutationTest, Selectivity, control_task, permutation_test, selectivity
    from interp.probes.curves import LearningCurve, TransferMatrix, learning_curve, transfer_matrix
    from interp.probes.erasure import LeaceEraser, LeaceFitter, ablate_direction
    from interp.probes.evaluation import Evaluation, evaluate
    from interp.probes.intervals import Interval, bootstrap_ci, mcnemar, wilson
    from interp.probes.linear import LDAProbe, LogisticProbe, MassMeanProbe, RidgeProbe
    from interp.probes.mlp import MLPProbe
    from interp.probes.moment_head import MomentHead
    from interp.probes.moment_probe import MomentProbe
    from interp.probes.moments import MomentFeatures
    from interp.probes.neighbours import KNNProbe
    from interp.probes.regression import RegressionEvaluation, RidgeRegression
    from interp.probes.saving import load_probe, save_probe
    from interp.probes.scores import Calibration, apply_temperature, calibration, fit_temperature, score_table
    from interp.probes.site_fits import fit_sites
    from interp.probes.site_moments import ClosedForms, closed_forms
    from interp.probes.splits import Grouping, duplicate_groups, outer_folds
    from interp.probes.streaming import stream_probes
    from interp.probes.sweeps import ProbeSweep, sweep
    from interp.probes.tokens import FirstTokenWarning, TokenSets
    from interp.probes.use import ProbeUse, erase_layers, probe_use

__all__ = [
    "AttentionProbe", "BilinearProbe", "BranchPoint", "CCSProbe", "Calibration", "ClosedForms", "Codelength",
    "Evaluation", "FirstTokenWarning", "Grouping", "Interval", "KNNProbe", "LDAProbe", "LeaceEraser", "LeaceFitter",
    "LearningCurve", "LogisticProbe", "MLPProbe", "MassMeanProbe", "MomentFeatures", "MomentHead", "MomentProbe",
    "PSRPAdapter", "PermutationTest", "ProbeSweep", "ProbeUse", "RegressionEvaluation", "RidgeProbe",
    "RidgeRegression", "Selectivity", "TokenSets", "TransferMatrix", "ablate_direction", "apply_temperature",
    "bootstrap_ci", "calibration", "closed_forms", "control_task", "duplicate_groups", "erase_layers", "evaluate",
    "fit_sites", "fit_temperature", "learning_curve", "load_probe", "mcnemar", "online_codelength", "outer_folds",
    "permutation_test", "probe_use", "save_probe", "score_table", "selectivity", "stream_probes", "sweep",
    "train_adapter", "transfer_matrix", "wilson",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(__name__, _HOME)
