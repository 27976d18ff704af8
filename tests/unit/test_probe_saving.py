"""Probe files: bit for bit, and foreign or damaged ones refused."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from interp import probes
from interp.hooks.errors import ArgumentError, ProbeFileError
from interp.probes import saving
from interp.probes.saving import load_probe, save_probe


def vectors(n=60, d=8, classes=3):
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, n)
    return rng.normal(size=(n, d)) + 2 * rng.normal(size=(classes, d))[y], np.array(["one", "two", "three"])[y]


def tokens():
    x, y = vectors()
    return np.stack([x, -x, x**2], 1) + np.random.default_rng(1).normal(size=(60, 3, 8)), y


FITTED = {
    "LogisticProbe": lambda: (probes.LogisticProbe(grid=np.logspace(-2, 1, 3)), vectors()),
    "RidgeProbe": lambda: (probes.RidgeProbe(), vectors()),
    "MassMeanProbe": lambda: (probes.MassMeanProbe(standardize=True), vectors()),
    "LDAProbe": lambda: (probes.LDAProbe(), vectors()),
    "KNNProbe": lambda: (probes.KNNProbe(k=5), vectors()),
    "BilinearProbe": lambda: (probes.BilinearProbe(rank=3), vectors()),
    "MLPProbe": lambda: (probes.MLPProbe(epochs=2, class_weight={"one": 2.0}), vectors()),
    "AttentionProbe": lambda: (probes.AttentionProbe(2, epochs=2), tokens()),
    "MomentProbe": lambda: (probes.MomentProbe(epochs=2, hidden=28, random_state=(1, 2, 3)), tokens()),
    "MomentFeatures": lambda: (probes.MomentFeatures(rank=3), tokens()),
    "CCSProbe": lambda: (probes.CCSProbe(2, steps=20), (tokens()[0][:, :2], None)),
}


def test_every_class_that_can_be_loaded_is_tried():
    assert set(FITTED) == set(saving.CLASSES)


@pytest.mark.parametrize("name", FITTED)
def test_the_round_trip_is_bit_for_bit(name, tmp_path):
    probe, (x, y) = FITTED[name]()
    probe.fit(x, y)
    probe.save(tmp_path / "probe.safetensors")
    again = load_probe(tmp_path / "probe.safetensors")
    assert type(again) is type(probe)
    answer = "transform" if name == "MomentFeatures" else "predict_proba"
    np.testing.assert_array_equal(getattr(again, answer)(x), getattr(probe, answer)(x))
    if name not in ("MomentFeatures", "CCSProbe"):
        assert again.predict(x).tolist() == probe.predict(x).tolist()
        assert again.classes_.dtype == probe.classes_.dtype
    assert set(vars(again)) == set(vars(probe))
    assert str(again.get_params()) == str(probe.get_params()) or name == "LogisticProbe"
    raw = (tmp_path / "probe.safetensors").read_bytes()
    assert b"\x80\x04" not in raw[:2]
    assert b"numpy" not in raw


def rewritten(path, change, digest=True):
    """A file with a changed header (and arrays), with the right checksum unless told otherwise."""
    with safe_open(path, "pt") as file:
        metadata, arrays = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["probe"])
    change(header, arrays)
    text = json.dumps(header)
    save_file(arrays, path, {"probe": text, "sha256": saving._digest(text, arrays) if digest else metadata["sha256"]})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "probe.safetensors"
    probes.LogisticProbe(C=1.0).fit(*vectors()).save(path)
    return path


@pytest.mark.parametrize(("change", "match"), [
    (lambda h, a: h.update({"class": "os.system"}), "class 'os.system'"),
    (lambda h, a: h["params"].update(command="rm"), "unknown parameters"),
    (lambda h, a: h["fitted"].update({"fit": {"kind": "plain", "value": 1}}), "attribute 'fit'"),
    (lambda h, a: h["fitted"].update({"__class__": {"kind": "plain", "value": 1}}), "attribute '__class__'"),
    (lambda h, a: h["fitted"].update(n_features_in_={"kind": "plain", "value": 7}), r"coef_ of shape \[3, 8\]"),
    (lambda h, a: h["fitted"].update(coef_={"kind": "array"}) or a.pop("coef_"), "does not fit together"),
    (lambda h, a: a.update(coef_=a["coef_"] * float("nan")), "NaN or infinity in coef_"),
    (lambda h, a: a.update(coef_=a["coef_"][:2].contiguous()), r"\[2, 8\]"),
    (lambda h, a: h.update(format=99), "format 1"),
])  # fmt: skip
def test_a_foreign_file_is_refused(file, change, match):
    rewritten(file, change)
    with pytest.raises(ProbeFileError, match=match):
        load_probe(file)


def test_a_damaged_file_is_refused(file, tmp_path):
    whole = file.read_bytes()
    rewritten(file, lambda h, a: h["params"].update(C=2.0), digest=False)
    with pytest.raises(ProbeFileError, match="SHA-256"):
        load_probe(file)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ProbeFileError, match="cannot be read"):
        load_probe(file)
    with pytest.raises(ProbeFileError, match="cannot be read"):
        load_probe(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ProbeFileError, match="SHA-256"):
        load_probe(file)


def test_a_network_of_another_size_is_refused(tmp_path):
    probe, (x, y) = FITTED["MomentProbe"]()
    probe.fit(x, y).save(tmp_path / "p")
    rewritten(tmp_path / "p", lambda h, a: h["fitted"].update(hidden_={"kind": "plain", "value": 56}))
    with pytest.raises(ProbeFileError, match="size mismatch"):
        load_probe(tmp_path / "p")


def test_another_class_than_asked_for_is_refused(file):
    assert isinstance(probes.LogisticProbe.load(file), probes.LogisticProbe)
    with pytest.raises(ArgumentError, match="holds a LogisticProbe"):
        probes.RidgeProbe.load(file)


def test_a_probe_that_is_not_fitted_is_not_written(tmp_path):
    with pytest.raises(ProbeFileError, match="0 fitted attributes"):
        save_probe(probes.LogisticProbe(), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_a_file_is_a_header_and_numbers_and_nothing_is_unpickled(file, monkeypatch):
    import pickle

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    assert load_probe(file).classes_ is not None
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    arrays = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0] for k, entry in header.items() if k != "__metadata__"
    )
    assert len(content) == 8 + size + arrays
    assert {entry["dtype"] for k, entry in header.items() if k != "__metadata__"} <= {"F64", "F32", "I64", "BOOL"}
