"""Results of probing on disk, bit for bit, and the figure of a sweep."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from interp.plots import chart
from interp.probes import (
    LeaceEraser,
    LogisticProbe,
    MassMeanProbe,
    ProbeUse,
    bootstrap_ci,
    calibration,
    evaluate,
    learning_curve,
    online_codelength,
    permutation_test,
    selectivity,
    sweep,
    transfer_matrix,
)
from interp.saving import load_result, save_result

MADE = np.random.default_rng(0)
Y = np.arange(60) % 2
X = MADE.normal(size=(60, 3)) + Y[:, None]
PROBE = MassMeanProbe()
RESULTS = {
    "calibration": lambda: calibration(Y, np.full((60, 2), 0.5)),
    "codelength": lambda: online_codelength(PROBE, X, Y),
    "evaluation": lambda: evaluate(PROBE, X, np.array(["a", "b"])[Y], groups=np.arange(60) // 2, controls=1),
    "interval": lambda: bootstrap_ci(Y, n=20),
    "curve": lambda: learning_curve(PROBE, X, Y, sizes=[10], seeds=(0,)),
    "eraser": lambda: LeaceEraser.fit(X, Y),
    "permutation": lambda: permutation_test(PROBE, X, Y, draws=2),
    "selectivity": lambda: selectivity(PROBE, X, Y, draws=2),
    "sweep": lambda: sweep({"a": X}, Y, [PROBE], control=False),
    "transfer": lambda: transfer_matrix(PROBE, {"a": (X, Y), "b": (X, Y)}),
    "use": lambda: ProbeUse("a", 1, X[:, 0], X[:, 1], X[:, :2].T, X[:, :2].T, 0.1, 0.1, bootstrap_ci(Y, n=20)),
}


def same(a, b) -> bool:
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, (np.ndarray, torch.Tensor)):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_a_result_is_the_same_after_it_has_been_to_disk(make, tmp_path):
    result = make()
    save_result(result, tmp_path / "result")
    back = load_result(tmp_path / "result")
    assert same(result, back)
    assert str(result) == str(back)
    assert not [f for f in tmp_path.iterdir() if f.suffix not in (".json", ".safetensors")]
    if hasattr(result, "to_records"):
        json.dumps(result.to_records())


def test_the_figure_of_a_sweep():
    import vl_convert

    data = {f"site {i}": X + i for i in range(3)}
    for metric in ("accuracy", "balanced_accuracy"):
        found = sweep(data, Y, {"lp": LogisticProbe(C=1.0), "mean": PROBE}, folds=3, metric=metric)
        drawn = chart(found, title="Probes")
        spec = json.loads(json.dumps(drawn.to_dict(), allow_nan=False))
        assert vl_convert.vegalite_to_vega(spec)["marks"]
        values = {(r["at"][5:], r["probe"]): r["value"] for r in spec["datasets"]["probes"]}
        assert values == {(r["site"], r["probe"]): pytest.approx(r[metric]) for r in found.curve()}
        assert len(spec["datasets"]["controls"]) == 6


@pytest.mark.parametrize(("name", "data", "rows"), [
    ("calibration", "bins", 15), ("curve", "curve", 1), ("permutation", "sites", 1), ("transfer", "pairs", 4),
])  # fmt: skip
def test_figures_of_an_evaluation(name, data, rows):
    import vl_convert

    result = RESULTS[name]()
    spec = json.loads(json.dumps(chart(result, title="Probes").to_dict(), allow_nan=False))
    assert vl_convert.vegalite_to_vega(spec)["marks"]
    drawn = spec["datasets"][data]
    assert len(drawn) == rows
    values = [row.get("balanced_accuracy", row.get("accuracy")) for row in result.to_records()]
    assert [row.get("value", row.get("accuracy")) for row in drawn] == pytest.approx(values)
