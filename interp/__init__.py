"""interp opens neural networks up: hooks on live models, linear maps, observables, probes, alignment maps.

Names are resolved when first used: importing this package costs little more than importing torch.
"""

from typing import TYPE_CHECKING

from interp.hooks.lazy import lazy_names

__version__ = "0.1.0"

_HOME = {
    "interp.hooks.activations": ["Activations"],
    "interp.hooks.attach": ["attach", "load"],
    "interp.hooks.errors": ["InterpError"],
    "interp.hooks.interventions": [
        "Add", "Erase", "Function", "Intervention", "Mean", "Patch", "ProjectOut", "Scale", "Set", "Zero",
        "load_plan", "save_plan",
    ],
    "interp.hooks.layouts": ["Layout"],
    "interp.hooks.linear_map": ["LinearMap"],
    "interp.hooks.linear_scope": ["LinearScope"],
    "interp.hooks.linearization": ["Linearization"],
    "interp.hooks.model": ["Model"],
    "interp.hooks.rules": ["register_unit"],
    "interp.hooks.site": ["Site"],
    "interp.hooks.table": ["Table"],
    "interp.hooks.units": ["Unit"],
    "interp.hooks.votes": ["Votes"],
    "interp.attention": ["AttentionPatterns", "attention_patterns"],
    "interp.attribution.direct": ["Attribution", "direct_attribution"],
    "interp.attribution.contrast": ["contrast_attribution"],
    "interp.attribution.data": ["AttributionSummary", "attribute_dataset"],
    "interp.attribution.head_norms": ["HeadNorms", "head_norms"],
    "interp.datasets": [
        "EntityTable", "LabelledImages", "LabelledTexts", "cities", "labelled_images", "labelled_texts",
    ],
    "interp.dictionaries.dictionary": ["Dictionary"],
    "interp.lens.jacobian_lens": ["JacobianLens"],
    "interp.jacobians.attention_parts": ["AttentionParts", "attention_parts"],
    "interp.jacobians.checks": ["FallbackWarning"],
    "interp.jacobians.features": ["FeatureJacobian", "FeatureJacobians", "feature_jacobians"],
    "interp.jacobians.jacobian": ["jacobian"],
    "interp.jacobians.layer_spectra": ["LayerSpectra", "layer_spectra"],
    "interp.jacobians.means": ["JacobianMean", "mean_jacobian"],
    "interp.jacobians.plan": ["Plan"],
    "interp.jacobians.reductions": ["JacobianSummary"],
    "interp.jacobians.results": ["JacobianMap", "Jacobians"],
    "interp.jacobians.stored": ["StoredJacobians"],
    "interp.jacobians.sweep": ["RowSweep", "row_sweep"],
    "interp.lens.logit_lens": ["LogitLens", "logit_lens"],
    "interp.linear_relation": ["LinearRelation", "RelationScore"],
    "interp.low_data": ["LowDataComparison", "low_data_comparison"],
    "interp.observables.sets": ["ObservableSet"],
    "interp.observables.observable": ["Observable"],
    "interp.patching.activation": ["patch_grid"],
    "interp.patching.attribution": ["attribution_patching"],
    "interp.patching.edges": ["edge_attribution"],
    "interp.patching.grid": ["PatchGrid"],
    "interp.patching.paths": ["path_patch"],
    "interp.propagation.path_search": ["PathSearch", "extend_path", "find_paths"],
    "interp.plots": ["chart"],
    "interp.predictions": ["next_tokens"],
    "interp.propagation.comparison": ["ObservableComparison", "compare_observables"],
    "interp.propagation.couplings": ["Couplings", "couplings"],
    "interp.propagation.feature_vectors": [
        "CouplingFit", "FeatureVector", "cosine", "coupling", "coupling_range", "pairwise", "validate_coupling",
    ],
    "interp.propagation.mlp_points": ["AverageGradient", "Boundary", "MeanPoint"],
    "interp.propagation.paths": ["Path", "Step"],
    "interp.propagation.propagate": ["propagate"],
    "interp.propagation.reference": ["Reference"],
    "interp.propagation.totals": ["Totals", "propagate_all"],
    "interp.query_key": ["AttentionScore", "attention_score", "pattern_effects"],
    "interp.runs.comparison": ["RunComparison", "compare_runs"],
    "interp.runs.run": ["Run"],
    "interp.observables.sequences": ["SequenceObservable"],
    "interp.steering": ["Cost", "DoseResponse", "cost", "dose_response", "orthogonalize"],
    "interp.store.store": ["ActivationStore"],
}  # fmt: skip

if TYPE_CHECKING:
    from interp.attention import AttentionPatterns, attention_patterns
    from interp.attribution.contrast import contrast_attribution
    from interp.attribution.data import AttributionSummary, attribute_dataset
    from interp.attribution.direct import Attribution, direct_attribution
    from interp.attribution.head_norms import HeadNorms, head_norms
    from interp.datasets import EntityTable, LabelledImages, LabelledTexts, cities, labelled_images, labelled_texts
    from interp.dictionaries.dictionary import Dictionary
    from interp.hooks.activations import Activations
    from interp.hooks.attach import attach, load
    from interp.hooks.errors import InterpError
    from interp.hooks.interventions import (
        Add,
        Erase,
        Function,
        Intervention,
        Mean,
        Patch,
        ProjectOut,
        Scale,
        Set,
        Zero,
        load_plan,
        save_plan,
    )
    from interp.hooks.layouts import Layout
    from interp.hooks.linear_map import LinearMap
    from interp.hooks.linear_scope import LinearScope
    from interp.hooks.linearization import Linearization
    from interp.hooks.model import Model
    from interp.hooks.rules import register_unit
    from interp.hooks.site import Site
    from interp.hooks.table import Table
    from interp.hooks.units import Unit
    from interp.hooks.votes import Votes
    from interp.jacobians.attention_parts import AttentionParts, attention_parts
    from interp.jacobians.checks import FallbackWarning
    from interp.jacobians.features import FeatureJacobian, FeatureJacobians, feature_jacobians
    from interp.jacobians.jacobian import jacobian
    from interp.jacobians.layer_spectra import LayerSpectra, layer_spectra
    from interp.jacobians.means import JacobianMean, mean_jacobian
    from interp.jacobians.plan import Plan
    from interp.jacobians.reductions import JacobianSummary
    from interp.jacobians.results import JacobianMap, Jacobians
    from interp.jacobians.stored import StoredJacobians
    from interp.jacobians.sweep import RowSweep, row_sweep
    from interp.lens.jacobian_lens import JacobianLens
    from interp.lens.logit_lens import LogitLens, logit_lens
    from interp.linear_relation import LinearRelation, RelationScore
    from interp.low_data import LowDataComparison, low_data_comparison
    from interp.observables.observable import Observable
    from interp.observables.sequences import SequenceObservable
    from interp.observables.sets import ObservableSet
    from interp.patching.activation import patch_grid
    from interp.patching.attribution import attribution_patching
    from interp.patching.edges import edge_attribution
    from interp.patching.grid import PatchGrid
    from interp.patching.paths import path_patch
    from interp.plots import chart
    from interp.predictions import next_tokens
    from interp.propagation.comparison import ObservableComparison, compare_observables
    from interp.propagation.couplings import Couplings, couplings
    from interp.propagation.feature_vectors import (
        CouplingFit,
        FeatureVector,
        cosine,
        coupling,
        coupling_range,
        pairwise,
        validate_coupling,
    )
    from interp.propagation.mlp_points import AverageGradient, Boundary, MeanPoint
    from interp.propagation.path_search import PathSearch, extend_path, find_paths
    from interp.propagation.paths import Path, Step
    from interp.propagation.propagate import propagate
    from interp.propagation.reference import Reference
    from interp.propagation.totals import Totals, propagate_all
    from interp.query_key import AttentionScore, attention_score, pattern_effects
    from interp.runs.comparison import RunComparison, compare_runs
    from interp.runs.run import Run
    from interp.steering import Cost, DoseResponse, cost, dose_response, orthogonalize
    from interp.store.store import ActivationStore

__all__ = [
    "ActivationStore", "Activations", "Add", "AttentionParts", "AttentionPatterns", "AttentionScore", "Attribution",
    "AttributionSummary", "AverageGradient", "Boundary", "Cost", "CouplingFit", "Couplings", "Dictionary",
    "DoseResponse", "EntityTable", "Erase", "FallbackWarning", "FeatureJacobian", "FeatureJacobians", "FeatureVector",
    "Function", "HeadNorms", "InterpError", "Intervention", "JacobianLens", "JacobianMap", "JacobianMean",
    "JacobianSummary", "Jacobians", "LabelledImages", "LabelledTexts", "LayerSpectra", "Layout", "LinearMap",
    "LinearRelation", "LinearScope", "Linearization", "LogitLens", "LowDataComparison", "Mean", "MeanPoint", "Model",
    "Observable", "ObservableComparison", "ObservableSet", "Patch", "PatchGrid", "Path", "PathSearch", "Plan",
    "ProjectOut", "Reference", "RelationScore", "RowSweep", "Run", "RunComparison", "Scale", "SequenceObservable",
    "Set", "Site", "Step", "StoredJacobians", "Table", "Totals", "Unit", "Votes", "Zero", "attach", "attention_parts",
    "attention_patterns", "attention_score", "attribute_dataset", "attribution_patching", "chart", "cities",
    "compare_observables", "compare_runs", "contrast_attribution", "cosine", "cost", "coupling", "coupling_range",
    "couplings", "direct_attribution", "dose_response", "edge_attribution", "extend_path", "feature_jacobians",
    "find_paths", "head_norms", "jacobian", "labelled_images", "labelled_texts", "layer_spectra", "load", "load_plan",
    "logit_lens", "low_data_comparison", "mean_jacobian", "next_tokens", "orthogonalize", "pairwise", "patch_grid",
    "path_patch", "pattern_effects", "propagate", "propagate_all", "register_unit", "row_sweep", "save_plan",
    "validate_coupling",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(__name__, _HOME)
