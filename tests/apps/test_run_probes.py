"""Runs of probing: computed, drawn and shown; gone on with after an interruption; refused before there is a folder."""

import pytest
from typer.testing import CliRunner

from interp.apps import cli
from interp.datasets import LabelledTexts
from interp.probes import LogisticProbe, sweep_specs
from interp.runs.again import resume
from interp.runs.run import Run
from interp.runs.specs import execute, read_spec
from interp.store.store import ActivationStore
from tests.apps.explorer_app import App
from tests.apps.samples import tiny_load

SPEC = """
kind: probe_sweep
model: tiny-words
texts: {name: movies, count: 24}
sites: [blocks.*.hook_resid_post]
probes: [logistic, mass_mean]
folds: 2
"""
WORDS = ("Mary", "John", "the", "cat", "sat", "on", "a", "book", "gave", "to")
TEXTS = [f"{one} {two} {three}" for one in WORDS for two in WORDS for three in ("the cat", "Mary")]


@pytest.fixture
def data(monkeypatch, tmp_path, tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_specs, "load", tiny_load(tokenizer))
    made = LabelledTexts("movies", TEXTS, [int(t.endswith("cat")) for t in TEXTS], None, None, "", "")
    monkeypatch.setattr(sweep_specs, "labelled_texts", lambda name: made)
    (tmp_path / "spec.yaml").write_text(SPEC)
    return made


def test_probes_are_swept_drawn_and_shown(data, tmp_path, monkeypatch):
    result = CliRunner().invoke(cli.app, ["run", "spec.yaml"])
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "runs").iterdir()
    run = Run.open(path)
    assert (run.state, run.names) == ("finished", ["sweep", "best", "curve"])
    found = run.load("sweep")
    assert {r["probe"] for r in found.rows} == {"logistic", "mass_mean"}
    assert all("untrained" in r for r in found.rows)
    store = ActivationStore.open(path / "cells" / "store")
    assert sorted(store.labels) == [0] * 12 + [1] * 12
    site = run.load("best")[0]["site"]
    probe = LogisticProbe().fit(store.pooled(site, "mean").numpy(), store.labels)
    assert probe.score(store.pooled(site, "mean").numpy(), store.labels) > 0.9
    monkeypatch.setenv("INTERP_EXPLORE_RUN", str(path))
    app = App(page="Probes", run=path.name).settle()
    assert app.errors == []
    assert len(app.figures) == 2


def test_a_run_that_was_interrupted_goes_on_with_its_activations(data, tmp_path, monkeypatch):
    spec = read_spec(tmp_path / "spec.yaml")
    whole = execute(spec, tmp_path / "whole")

    def interrupt(line):
        if line.startswith("logistic"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(spec, tmp_path / "runs", interrupt)
    (path,) = (tmp_path / "runs").iterdir()
    again = resume(Run.open(path))
    timeless = lambda rows: [{k: v for k, v in r.items() if k != "fit_seconds"} for r in rows]
    assert timeless(again.load("sweep").rows) == timeless(whole.load("sweep").rows)


def test_as_many_texts_of_each_class(data):
    drawn = sweep_specs.TextsSpec(count=31, seed=4).drawn()
    assert sorted([drawn.labels.count(0), drawn.labels.count(1)]) == [15, 16]
    assert len(set(drawn.texts)) == 31
    known = dict(zip(data.texts, data.labels, strict=True))
    assert all(known[text] == label for text, label in zip(drawn.texts, drawn.labels, strict=True))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("count: 24", "count: 2000", "too few of 0, 1"), ("count: 24", "counts: 24", "did you mean count"),
        ("resid_post]", "resid_posts]", "hook_resid_posts"), ("mass_mean]", "mass]", "mass_mean"),
        ("folds: 2", "folds: 1", "greater than or equal to 2"), ("logistic, mass_mean", "", "at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_specification_makes_no_folder(data, tmp_path, old, new, words):
    assert old in SPEC
    (tmp_path / "spec.yaml").write_text(SPEC.replace(old, new))
    result = CliRunner().invoke(cli.app, ["run", "spec.yaml"])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "runs").exists()
