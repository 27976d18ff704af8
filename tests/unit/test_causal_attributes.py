"""Attributes of entities: labels and texts from the table, what a pair may change, who may be where."""

import pytest
import torch

import interp
from interp.causal import attribute_of, attribute_splits, entity_position, known_entities
from interp.causal.data import refuse_shared_groups
from interp.hooks.errors import ArgumentError, DegenerateDataError, InputError, TokenError
from interp.saving import load_result, save_result
from tests.cases import VOCAB, build

PLACES = [f"E{i:02d}" for i in range(30)]
LAND = [f"C{i % 6}" for i in range(30)]
PART = ["PQR"[i % 3] for i in range(30)]
TABLE = interp.EntityTable("places", PLACES, {"land": LAND, "part": PART})
FRAMES = {"land": ["{entity} is in", "by {entity} it is"], "part": ["{entity} is on", "by {entity} on"]}


class Words:
    """A tokenizer that gives each word a number, the same in every text; names of more than three letters get two."""

    def __init__(self):
        self.known = {}

    def encode(self, text, add_special_tokens=False):
        pieces = [p for word in text.split() for p in ([word] if len(word) <= 3 else [word[:3], word[3:]])]
        return [self.known.setdefault(p, len(self.known)) for p in pieces]

    def __call__(self, texts, **options):
        rows = [[3 + i % (VOCAB - 3) for i in self.encode(text)] for text in texts]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}


@pytest.fixture(scope="module")
def model():
    found = interp.attach(build("gpt2"))
    found.tokenizer = Words()
    return found


def test_labels_are_the_table_and_pairs_cause_or_isolate(model):
    task = attribute_of(model, TABLE, "land", FRAMES)
    data = task.sample(300, seed=1)
    settings, values = data.pool.settings, [*sorted(set(LAND)), *sorted(set(PART))]
    for i in range(len(data)):
        base, source = int(data.base[i]), int(data.sources[i, 0])
        b, s = int(settings["entity"][base]), int(settings["entity"][source])
        asks_land = int(settings["query"][base]) == 0
        assert values[int(data.labels[i])] == (LAND[s] if asks_land else PART[b])
        assert LAND[b] != LAND[s]
        assert asks_land or PART[b] != PART[s]
        assert bool(data.flips[i]) == asks_land
        text = FRAMES["land" if asks_land else "part"][int(settings["frame"][base])].format(entity=PLACES[b])
        assert data.pool.inputs[base] == text
    assert float(data.flips.float().mean()) == pytest.approx(0.5, abs=0.1)
    assert len(set(data.pool.inputs)) == len(data.pool)
    assert data.pool.candidates[0].tolist() == [model.tokenizer.encode(f"of {v}")[1] for v in values]


def test_tests_have_entities_and_frames_of_their_own(model):
    splits = attribute_splits(model, TABLE, "part", FRAMES, 100, 40, 40)
    refuse_shared_groups(splits.train, splits.tests["entities"], "entities")
    refuse_shared_groups(splits.train, splits.validation, "entities")
    refuse_shared_groups(splits.train, splits.tests["frames"], "frames")
    assert splits.train.causal_model.labels == splits.tests["frames"].causal_model.labels == 9
    assert all(text.startswith("by") for text in splits.tests["frames"].pool.inputs)


def test_values_are_drawn_alike_however_many_entities_have_them(model):
    table = interp.EntityTable("places", PLACES, {"land": ["C1"] * 20 + ["C2"] * 5 + ["C3"] * 5, "part": PART})
    drawn = attribute_of(model, table, "land", FRAMES).draw(3000, torch.Generator().manual_seed(0))
    counts = torch.tensor([table.attributes["land"][e] == "C1" for e in drawn["entity"].tolist()])
    assert float(counts.float().mean()) == pytest.approx(1 / 3, abs=0.04)


def test_entities_end_at_one_position_or_two_texts_are_named(model):
    frames = {"land": ["by {entity} it is"], "part": ["in {entity} on"]}
    site = entity_position(model, TABLE, frames)
    assert site == 1
    with pytest.raises(TokenError, match=r"'E00' that ends at position 0 and 'by E00' at 1"):
        entity_position(model, TABLE, FRAMES)


def test_what_the_model_gives_is_kept(model, monkeypatch, tmp_path):
    """Logits by hand: the model knows the land of even entities, and every part."""
    known = model.tokenizer.encode

    def answer(_, texts):
        logits = torch.zeros(len(texts), 2000)
        for row, text in enumerate(texts):
            i = next(i for i, e in enumerate(PLACES) if e in text)
            right = LAND[i] if text.endswith(("in", "is")) else PART[i]
            wrong = LAND[(i + 1) % 30] if i % 2 and text.endswith("is") else right
            logits[row, known(f"of {wrong}")[1]] = 1
        return logits

    monkeypatch.setattr("interp.causal.attributes._last_logits", answer)
    found = known_entities(model, TABLE, FRAMES, tokens=1)
    assert found.table.entities == PLACES[::2]
    assert found.accuracy == {"{entity} is in": 1.0, "by {entity} it is": 0.5, "{entity} is on": 1.0,
                              "by {entity} on": 1.0}  # fmt: skip
    assert found.asked == 30
    save_result(found, tmp_path / "known")
    assert load_result(tmp_path / "known") == found
    with pytest.raises(DegenerateDataError, match="with 2 tokens"):
        known_entities(model, TABLE, FRAMES, tokens=2)


def test_values_that_begin_alike_are_left_out_or_refused(model):
    table = interp.EntityTable("places", PLACES, {"land": ["Abcd" if x == "C1" else x for x in LAND], "part": [
        "Abcx" if x == "Q" else x for x in PART]})  # fmt: skip
    with pytest.raises(DegenerateDataError, match=r"Abcd, Abcx.*known_entities"):
        attribute_of(model, table, "land", FRAMES)


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"attribute": "river"}, ArgumentError, "'river'"),
    ({"frames": {"part": ["{entity} is on"]}}, ArgumentError, "the variable among them"),
    ({"frames": {**FRAMES, "land": ["it is in"]}}, ArgumentError, r"slot \{entity\}"),
    ({"rows": [0, 3, 6]}, DegenerateDataError, "'E00', from which no entity differs in land and part"),
])  # fmt: skip
def test_what_makes_no_pairs_is_refused(model, change, error, text):
    options = {"table": TABLE, "attribute": "land", "frames": FRAMES} | change
    with pytest.raises(error, match=text):
        attribute_of(model, **options)


def test_a_model_without_tokenizer_is_refused():
    with pytest.raises(InputError, match="tokenizer"):
        attribute_of(interp.attach(build("gpt2")), TABLE, "land", FRAMES)
