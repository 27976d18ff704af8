"""Probing real models on real texts: store, evaluation, sweep, erasure, and what the honest splits show."""

import numpy as np
import pytest
import torch

import interp
from interp.hooks.errors import MissingExtraError, NotCachedError
from interp.probes import (
    LeaceEraser,
    LogisticProbe,
    MassMeanProbe,
    evaluate,
    outer_folds,
    selectivity,
    sweep,
)
from interp.probes.controls import held_out_score
from interp.store.store import ActivationStore
from tests.conftest import missing
from tests.real.test_datasets import fetched

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def movies():
    found = fetched("movies")
    short = np.array([i for i, text in enumerate(found.texts) if len(text) < 120])
    return found.take(np.random.default_rng(0).choice(short, 300, replace=False).tolist())


def test_an_encoder_on_movie_sentences(movies, tmp_path):
    try:
        model = interp.load("minilm-l6")
    except (NotCachedError, MissingExtraError) as error:
        missing(f"minilm-l6 cannot be loaded: {error}")
    store = ActivationStore.build(
        model, movies.texts, "blocks.*.hook_resid_post", tmp_path / "s", labels=movies.labels, skip_special=True
    )
    alone = model.capture(movies.texts[7], "blocks.5.hook_resid_post")["blocks.5.hook_resid_post"][0]
    torch.testing.assert_close(store.pooled("blocks.5.hook_resid_post")[7], alone[1:-1].mean(0), rtol=1e-4, atol=1e-4)
    found = sweep(store, store.labels, {"lp": LogisticProbe(C=0.01)}, sites=store.sites[-2:], texts=movies.texts)
    assert found.best()["value"] > found.best()["control"] + 0.1
    x = store.pooled(store.sites[-1])
    report = evaluate(LogisticProbe(C=0.01), x, store.labels, texts=movies.texts, controls=1)
    assert report.intervals["accuracy"].low > report.majority - 0.05
    y = np.array(store.labels)
    erased = LeaceEraser.fit(x, y)(x)
    trained = LogisticProbe(C=1.0).fit(erased, y)
    assert trained.score(erased, y) == pytest.approx(max(y.mean(), 1 - y.mean()), abs=0.02)


def test_the_first_token_of_a_decoder_swamps_the_mean(smollm2, movies, tmp_path):
    scores = {}
    for skip in (True, False):
        store = ActivationStore.build(
            smollm2, movies.texts, "blocks.15.hook_resid_post", tmp_path / str(skip), pools=["mean"], skip_first=skip
        )
        x = store.pooled("blocks.15.hook_resid_post")
        y = np.array(movies.labels).astype(int)
        scores[skip] = held_out_score(MassMeanProbe(), x, y, outer_folds(y), None, 0)
    assert scores[True] > scores[False] + 0.1


def test_words_that_are_held_out_show_what_was_memorised(smollm2, tmp_path):
    nouns = fetched("noun classes")
    kinds = ("animal", "food", "plant", "body", "person", "artifact", "communication", "state")
    made = np.random.default_rng(0)
    words = {k: [w for w, label in zip(nouns.texts, nouns.labels, strict=True) if label == k] for k in kinds}
    chosen = [(w, k) for k in kinds for w in made.choice(words[k], 20, replace=False).tolist()]
    templates = ("I saw the", "a", "this is a", "they spoke of the", "look at that", "there was one")
    texts = [f"{t} {w}" for t in templates for w, _ in chosen]
    word, template = np.tile(np.arange(160), 6), np.repeat(np.arange(6), 160)
    y = np.array([k for _, k in chosen] * 6)
    site = "blocks.9.hook_resid_post"
    store = ActivationStore.build(smollm2, texts, site, tmp_path / "s", pools=["last"])
    x, probe = store.pooled(site, "last"), LogisticProbe(C=0.01)
    shared = selectivity(probe, x, y, word, groups=template, folds=3, draws=1)
    held = selectivity(probe, x, y, word, groups=word, folds=3, draws=1)
    assert shared.task > 0.9
    assert shared.control > 0.85
    assert held.task < 0.7
    assert held.control < 0.3
    assert held.selectivity > shared.selectivity + 0.1
