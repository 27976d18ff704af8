"""Sweeps, learning curves, transfer: each against the loop that it stands for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import interp
from interp.hooks.errors import ArgumentError, RunError
from interp.probes import (
    AttentionProbe,
    LogisticProbe,
    MassMeanProbe,
    evaluate,
    learning_curve,
    outer_folds,
    sweep,
    transfer_matrix,
)
from interp.probes.scores import balanced_accuracy
from interp.runs.kept import Kept
from interp.store.store import ActivationStore


def task(n=80, sites=3, seed=0):
    made = np.random.default_rng(seed)
    y = np.arange(n) % 2
    return {f"site {i}": made.normal(size=(n, 5)) + 0.8 * i * y[:, None] for i in range(sites)}, y


def test_a_row_is_a_fit_on_a_fold():
    data, y = task()
    found = sweep(data, y, {"mean": MassMeanProbe()}, folds=4, seeds=(0, 3))
    assert len(found.rows) == 3 * 2 * 4
    for row in found.rows:
        train, test = outer_folds(y, None, 4, row["seed"])[row["fold"]]
        x = data[row["site"]]
        made = MassMeanProbe().fit(x[train], y[train])
        assert row["value"] == pytest.approx(balanced_accuracy(y[test], made.predict(x[test])))
        assert (row["n"], row["converged"], row["metric"]) == (20, True, "balanced_accuracy")


def test_the_choice_sees_training_parts_only():
    data, y = task()
    found = sweep(data, y, [MassMeanProbe(), LogisticProbe()])
    best = found.best()
    assert best["site"] == "site 2"
    assert sum(best["chosen"].values()) == 5
    assert best["value"] > 0.85 > 0.7 > best["control"]
    picked = []
    for fold in range(5):
        rows = [r for r in found.rows if r["fold"] == fold]
        picked.append(max(rows, key=lambda r: r["inner"])["value"])
    assert best["value"] == pytest.approx(np.mean(picked))
    assert found.best("MassMeanProbe")["probe"] == "MassMeanProbe"
    with pytest.raises(ArgumentError, match="nothing"):
        found.best("nothing")


def test_among_sites_of_noise_the_nested_score_is_at_chance_and_the_maximum_is_not():
    made = np.random.default_rng(0)
    y = np.arange(60) % 2
    data = {f"noise {i}": made.normal(size=(60, 3)) for i in range(25)}
    found = sweep(data, y, [MassMeanProbe()], control=False)
    top = max(r["balanced_accuracy"] for r in found.curve())
    assert top > 0.6
    assert found.best()["value"] < top - 0.05
    assert "Exploratory" in str(found)


def test_inner_scores_are_held_out_log_losses():
    data, y = task(sites=1)
    own = sweep(data, y, [LogisticProbe()]).rows[0]["inner"]
    train, _ = outer_folds(y, None, 5, 0)[0]
    made = LogisticProbe().fit(data["site 0"][train], y[train])
    assert own == pytest.approx(-made.inner_loss_.mean(0).min())
    fixed = sweep(data, y, [LogisticProbe(C=made.C_)]).rows[0]["inner"]
    assert fixed == pytest.approx(own, abs=0.1)


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    data, y = task()
    said: list[str] = []
    whole = sweep(data, y, [MassMeanProbe()], path=tmp_path, progress=said.append)
    assert len(said) == 3
    file = tmp_path / "sweep.jsonl"
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n" + lines[1][:50])
    said.clear()
    again = sweep(data, y, [MassMeanProbe()], path=tmp_path, progress=said.append)
    assert len(said) == 2
    strip = lambda rows: [{k: v for k, v in r.items() if k != "fit_seconds"} for r in rows]
    assert strip(again.rows) == strip(whole.rows)
    for change in ({"probes": [MassMeanProbe(standardize=True)]}, {"y": 1 - y}, {"seeds": (1,)}, {"folds": 4},
                   {"data": task(seed=1)[0]}, {"metric": "accuracy"}, {"groups": np.arange(80) // 2}):  # fmt: skip
        said.clear()
        given = {"data": data, "y": y, "probes": [MassMeanProbe()]} | change
        sweep(**given, path=tmp_path, progress=said.append)
        assert len(said) == 3, change
    assert all(json.loads(line)["rows"] for line in file.read_text().splitlines()[2:] if line.endswith("}"))


def test_a_folder_belongs_to_one_sweep_and_what_stands_there_is_only_added_to(tmp_path, monkeypatch):
    data, y = task()
    with Kept(tmp_path, "sweep.jsonl"), pytest.raises(RunError, match="one process at a time"):
        sweep(data, y, [MassMeanProbe()], path=tmp_path)
    sweep(data, y, [MassMeanProbe()], path=tmp_path)
    file = tmp_path / "sweep.jsonl"
    file.write_text(file.read_text()[:-20])  # as a kill leaves it
    before = file.read_text()
    monkeypatch.setattr(Path, "write_text", None)  # a kill while the whole file is rewritten would lose it
    sweep(data, y, [MassMeanProbe()], path=tmp_path)
    assert file.read_text().startswith(before)


def test_stores_pools_and_tokens(tmp_path):
    model = interp.attach(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 3, 1)))
    images = torch.randn(40, 1, 5, 5)
    y = (images.mean((1, 2, 3)) > 0).long()
    store = ActivationStore.build(
        model, images, ["0", "1"], tmp_path / "s", pools=["mean", "max"], tokens="1", labels=y.tolist(),
        groups=[i // 2 for i in range(40)],
    )  # fmt: skip
    found = sweep(store, None, [LogisticProbe(C=1.0)], pools=["mean", "max"], folds=3)
    assert {(r["site"], r["pool"]) for r in found.rows} == {(s, p) for s in "01" for p in ("mean", "max")}
    expected = sweep(store, y, [LogisticProbe(C=1.0)], groups=np.arange(40) // 2, pools=["mean", "max"], folds=3)
    assert [r["value"] for r in found.rows] == [r["value"] for r in expected.rows]
    tokens = sweep(store, y, {"attention": AttentionProbe(epochs=3)}, pools=["tokens"], folds=3, path=tmp_path / "w")
    assert {r["site"] for r in tokens.rows} == {"1"}


@pytest.mark.slow
def test_an_untrained_copy_is_one_more_control():
    data, y = task(sites=2)
    noise = {site: np.random.default_rng(5).normal(size=x.shape) for site, x in data.items()}
    found = sweep(data, y, [MassMeanProbe()], untrained=noise)
    for row in found.rows:
        train, test = outer_folds(y, None, 5, 0)[row["fold"]]
        x = noise[row["site"]]
        made = MassMeanProbe().fit(x[train], y[train])
        assert row["untrained"] == pytest.approx(balanced_accuracy(y[test], made.predict(x[test])))
    best = found.best()
    assert best["value"] > 0.6 > best["untrained"]
    assert "untrained copy" in str(found)
    assert "untrained" not in sweep(data, y, [MassMeanProbe()]).rows[0]
    report = evaluate(MassMeanProbe(), data["site 1"], y, untrained=noise["site 1"])
    rows = [r for r in found.rows if r["site"] == "site 1"]
    assert report.untrained == pytest.approx(np.mean([r["untrained"] for r in rows]))
    assert report.to_records()[-1]["what"] == "balanced_accuracy on an untrained copy"
    for call in (lambda x: sweep(data, y, [MassMeanProbe()], untrained={"site 1": x, "site 0": x}),
                 lambda x: evaluate(MassMeanProbe(), data["site 1"], y, untrained=x)):  # fmt: skip
        with pytest.raises(ArgumentError, match="79 examples"):
            call(noise["site 1"][1:])
    with pytest.raises(ArgumentError, match="no site 0 in the mapping"):
        sweep(data, y, [MassMeanProbe()], untrained={"site 1": noise["site 1"]})


def test_processes_change_nothing():
    data, y = task()
    one, two = (sweep(data, y, [LogisticProbe(C=1.0)], jobs=jobs) for jobs in (1, 2))
    assert [r["value"] for r in one.rows] == [r["value"] for r in two.rows]


@pytest.mark.parametrize(("more", "match"), [
    ({"probes": [MassMeanProbe]}, "MassMeanProbe|type"), ({"probes": []}, "no probes"),
    ({"y": None}, "no labels"), ({"metric": "f1"}, "metric='f1'"),
    ({"probes": [MassMeanProbe(), MassMeanProbe()]}, "two probes of one class"), ({"sites": ["x"]}, r"sites \['x'\]"),
    ({"y": np.arange(79) % 2}, "length 79 for 80"), ({"jobs": 0}, "jobs=0"), ({"seeds": ()}, "seeds"),
    ({"probes": {"adapter": object()}}, "an adapter changes the model"), ({"groups": [1]}, "groups of length 1"),
])  # fmt: skip
def test_malformed_sweeps_are_refused(more, match, unchecked):
    data, y = task()
    with pytest.raises(ArgumentError, match=match):
        sweep(**({"data": data, "y": y, "probes": [MassMeanProbe()]} | more))


# learning curves


def test_more_labels_are_better_and_all_of_them_are_the_whole_training_part():
    data, y = task(200)
    found = learning_curve(LogisticProbe(C=1.0), data["site 1"], y, seeds=(0,))
    assert found.sizes == [10, 30, 100, 160]
    means = [r["balanced_accuracy"] for r in found.to_records()]
    assert means[0] < means[-1]
    for run, (train, test) in enumerate(outer_folds(y, None, 5, 0)):
        made = LogisticProbe(C=1.0).fit(data["site 1"][train], y[train])
        assert found.values[-1, run] == pytest.approx(balanced_accuracy(y[test], made.predict(data["site 1"][test])))


def test_small_subsets_hold_every_class():
    made = np.random.default_rng(0)
    y = np.array([0] * 150 + [1] * 10)
    found = learning_curve(LogisticRegression(), made.normal(size=(160, 3)), y, sizes=[4, 20])
    assert np.isfinite(found.values).all()
    for sizes in ([2], [500], []):
        with pytest.raises(ArgumentError, match="sizes="):
            learning_curve(LogisticRegression(), made.normal(size=(160, 3)), y, sizes=sizes)


# transfer


def test_what_is_shared_transfers_and_what_is_not_does_not():
    made = np.random.default_rng(0)
    y = np.arange(200) % 2

    def source(channel):
        x = made.normal(size=(200, 4))
        x[:, 0] += 2 * y
        x[:, channel] += 3 * y
        return x, y

    shared = transfer_matrix(MassMeanProbe(), {"a": source(0), "b": source(0)})
    assert shared.values.min() > 0.9

    def topic(channel):
        x = made.normal(size=(200, 4))
        x[:, channel] += 3 * y
        return x, y

    apart = transfer_matrix(MassMeanProbe(), {"a": topic(1), "b": topic(2)})
    assert apart.values.diagonal().min() > 0.85
    assert apart.values[0, 1] < 0.65
    assert len(apart.to_records()) == 4
    assert "diagonal: held out" in repr(apart.table())
    with pytest.raises(ArgumentError, match="same classes"):
        transfer_matrix(MassMeanProbe(), {"a": topic(1), "b": (topic(1)[0], y + 1)})
