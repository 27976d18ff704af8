"""Every public result shows itself in a notebook, and gives rows and a data frame."""

import importlib
import inspect

import pytest

import interp
import interp.probes
from interp.hooks.table import Rows, Table
from interp.saving import _TYPES

# Public classes that are no results: what one asks with, what holds a model, an estimator, a linear operator, errors.
TOOLS = {
    "Activations", "ActivationStore", "AverageGradient", "Boundary", "Dictionary", "Intervention", "JacobianLens",
    "JacobianMap", "LabelledImages", "LabelledTexts", "Layout", "LeaceEraser", "LinearMap", "LinearRelation",
    "LinearScope", "Linearization", "MeanPoint", "Model", "Observable", "Path", "Reference", "Run",
    "Site", "Step", "Unit",
}  # fmt: skip
PROBING_TOOLS = {
    "BranchPoint", "ClosedForms", "Grouping", "LeaceFitter", "MomentFeatures", "MomentHead",
    "PSRPAdapter", "TokenSets",
}  # fmt: skip


def public() -> dict[str, type]:
    """Public classes of both faces, and all that can be saved."""
    found = {name: getattr(interp, name) for name in interp.__all__}
    found |= {name: getattr(interp.probes, name) for name in interp.probes.__all__}
    found |= {name: getattr(importlib.import_module(home), name) for name, home in _TYPES.items()}
    return {name: value for name, value in found.items() if inspect.isclass(value)}


def is_tool(name: str, cls: type) -> bool:
    estimator = hasattr(cls, "fit") or name.endswith("Probe")
    return (
        name in TOOLS | PROBING_TOOLS or estimator or issubclass(cls, (interp.Intervention, Warning, Exception))
    )  # fmt: skip


RESULTS = {name: cls for name, cls in public().items() if not is_tool(name, cls)}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_has_rows_a_frame_and_a_table_in_notebooks(name):
    cls = RESULTS[name]
    assert issubclass(cls, Rows), f"{name}: add Rows and to_records, or name it a tool here"
    assert cls is Rows or cls.to_records is not Rows.to_records


def test_what_can_be_saved_is_a_result():
    assert set(_TYPES) <= set(RESULTS) | TOOLS


class Long(Rows):
    """A result of many rows."""

    def to_records(self):
        return [{"token": "<b>", "value": float(i)} for i in range(100)]


def test_a_table_in_a_notebook_is_short_and_escaped():
    text = Long()._repr_html_()
    assert "<caption>Long, the first 40 of 100 rows</caption>" in text
    assert text.count("<tr>") == 41
    assert "<b>" not in text
    assert "&lt;b&gt;" in text


def test_a_frame_has_every_row():
    pytest.importorskip("pandas")
    assert Long().to_frame().shape == (100, 2)
    assert Table([{"a": 1}]).to_frame().shape == (1, 1)
