"""Causal abstraction: algorithms aligned with networks by maps, beside their controls."""

from typing import TYPE_CHECKING

from interp.hooks.lazy import lazy_names

_HOME = {
    "interp.causal.alignment": ["Alignment"],
    "interp.causal.arithmetic": ["addition", "addition_splits"],
    "interp.causal.attributes": [
        "KnownEntities", "attribute_of", "attribute_splits", "entity_position", "known_entities",
    ],
    "interp.causal.complexity": ["codelength", "largest_singular_values", "nonlinearity", "off_distribution"],
    "interp.causal.data": ["InterchangeDataset", "Pool", "Splits"],
    "interp.causal.equality": ["distributive_law", "hierarchical_equality"],
    "interp.causal.files": ["SavedAlignment", "load_alignment", "save_alignment"],
    "interp.causal.flexible_maps": ["BoundlessMap", "DictionaryMap", "RevNetMap", "build_map"],
    "interp.causal.nearness": ["Injectivity", "Nearness", "injectivity"],
    "interp.causal.maps": [
        "AlignmentMap", "FixedMap", "IdentityMap", "InvertibleMap", "LowRankMap", "OrthogonalMap", "PCAMap",
    ],
    "interp.causal.models": ["CausalModel"],
    "interp.causal.names": ["indirect_object", "indirect_object_splits"],
    "interp.causal.networks": ["mlp", "train_mlps", "untrained"],
    "interp.causal.neurons": ["NeuronSearch", "greedy_neurons"],
    "interp.causal.partition": ["Partition"],
    "interp.causal.report": ["AlignmentReport", "CausalAbstractionWarning", "Control"],
    "interp.causal.sampling": ["Task"],
    "interp.causal.scoring": ["Score"],
    "interp.causal.sweep_result": ["AlignmentSweep", "Frontier"],
    "interp.causal.sweeps": ["map_name", "sweep"],
    "interp.causal.training": ["Fit", "Training"],
}  # fmt: skip

if TYPE_CHECKING:
    from interp.causal.alignment import Alignment
    from interp.causal.arithmetic import addition, addition_splits
    from interp.causal.attributes import (
        KnownEntities,
        attribute_of,
        attribute_splits,
        entity_position,
        known_entities,
    )
    from interp.causal.complexity import codelength, largest_singular_values, nonlinearity, off_distribution
    from interp.causal.data import InterchangeDataset, Pool, Splits
    from interp.causal.equality import distributive_law, hierarchical_equality
    from interp.causal.files import SavedAlignment, load_alignment, save_alignment
    from interp.causal.flexible_maps import BoundlessMap, DictionaryMap, RevNetMap, build_map
    from interp.causal.maps import (
        AlignmentMap,
        FixedMap,
        IdentityMap,
        InvertibleMap,
        LowRankMap,
        OrthogonalMap,
        PCAMap,
    )
    from interp.causal.models import CausalModel
    from interp.causal.names import indirect_object, indirect_object_splits
    from interp.causal.nearness import Injectivity, Nearness, injectivity
    from interp.causal.networks import mlp, train_mlps, untrained
    from interp.causal.neurons import NeuronSearch, greedy_neurons
    from interp.causal.partition import Partition
    from interp.causal.report import AlignmentReport, CausalAbstractionWarning, Control
    from interp.causal.sampling import Task
    from interp.causal.scoring import Score
    from interp.causal.sweep_result import AlignmentSweep, Frontier
    from interp.causal.sweeps import map_name, sweep
    from interp.causal.training import Fit, Training

__all__ = [
    "Alignment", "AlignmentMap", "AlignmentReport", "AlignmentSweep", "BoundlessMap", "CausalAbstractionWarning",
    "CausalModel", "Control", "DictionaryMap", "Fit", "FixedMap", "Frontier", "IdentityMap", "Injectivity",
    "InterchangeDataset", "InvertibleMap", "KnownEntities", "LowRankMap", "Nearness", "NeuronSearch",
    "OrthogonalMap", "PCAMap", "Partition", "Pool", "RevNetMap", "SavedAlignment", "Score", "Splits", "Task",
    "Training", "addition", "addition_splits", "attribute_of", "attribute_splits", "build_map", "codelength",
    "distributive_law", "entity_position", "greedy_neurons", "hierarchical_equality", "indirect_object",
    "indirect_object_splits", "injectivity", "known_entities", "largest_singular_values", "load_alignment",
    "map_name", "mlp", "nonlinearity", "off_distribution", "save_alignment", "sweep", "train_mlps", "untrained",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(__name__, _HOME)
