"""Indirect objects: texts, answers and groups come from the slots."""

import pytest
import torch

import interp
from interp.causal import indirect_object, indirect_object_splits
from interp.causal.names import FRAMES, NAMES
from interp.hooks.errors import ArgumentError, DegenerateDataError, InputError
from tests.cases import build


class Words:
    """A tokenizer that makes each word a token by its first letter, so that some names collide."""

    def encode(self, text, add_special_tokens=False):
        return [ord(word[0]) for word in text.split()]


@pytest.fixture(scope="module")
def model():
    found = interp.attach(build("gpt2"))
    found.tokenizer = Words()
    return found


def test_texts_and_answers_by_hand(model):
    task = indirect_object(model, names=["Mary", "John"], frames=FRAMES[:1], items=["ring"])
    inputs = {k: torch.tensor(v) for k, v in {"a": [0, 0], "b": [1, 1], "frame": [0, 0], "item": [0, 0]}.items()}
    pool = task.pool(inputs | {"order": torch.tensor([True, False])})
    assert pool.inputs == [
        "When Mary and John went to the store, Mary gave a ring to",
        "When Mary and John went to the store, John gave a ring to",
    ]
    assert pool.settings["output"].tolist() == [1, 0]
    assert pool.candidates.tolist() == [[ord("M"), ord("J")]] * 2


def test_two_names_of_a_prompt_never_begin_alike(model):
    data = indirect_object(model).sample(300, seed=2)
    assert bool((data.candidates[:, 0] != data.candidates[:, 1]).all())
    assert 0.4 < float(data.flips.float().mean()) < 0.6
    answered = data.candidates.gather(1, data.base_labels[:, None])[:, 0].tolist()
    for row, answer in zip(data.base.tolist(), answered, strict=True):
        names = [word.strip(",") for word in data.pool.inputs[row].split() if word.strip(",") in NAMES]
        subject = max(set(names), key=names.count)
        (other,) = set(names) - {subject}
        assert ord(other[0]) == answer


def test_tests_have_names_and_frames_of_their_own(model):
    splits = indirect_object_splits(model, 200, 50, 50, prompts=60)
    said = lambda data: {w.strip(",") for text in data.pool.inputs for w in text.split()} & set(NAMES)
    assert not said(splits.train) & said(splits.tests["names"])
    assert not said(splits.train) & said(splits.validation)
    kinds = {name: set(data.pool.groups["frames"].flatten().tolist()) for name, data in splits.tests.items()}
    assert not kinds["frames"] & set(splits.train.pool.groups["frames"].flatten().tolist())
    assert kinds["test"] <= set(splits.train.pool.groups["frames"].flatten().tolist())


def test_prompts_of_the_test_are_new(model):
    for seed in (0, 2):
        splits = indirect_object_splits(model, 600, 120, 120, prompts=200, seed=seed)
        assert not set(splits.train.pool.inputs) & set(splits.test.pool.inputs)
    with pytest.raises(ArgumentError, match="prompts=9000"):
        indirect_object_splits(model, 600, 120, 120, prompts=9000, names=NAMES[:12])


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"frames": ["{a} and {b} gave it to"]}, ArgumentError, r"without \{s\}, \{item\}"),
    ({"names": ["Mary", "Mary"]}, ArgumentError, "names"),
    ({"names": ["Mary", "Mark"]}, DegenerateDataError, "one token"),
    ({"items": []}, ArgumentError, "items"),
])  # fmt: skip
def test_lists_that_make_no_pairs_are_refused(model, options, error, text):
    with pytest.raises(error, match=text):
        indirect_object(model, **options)


def test_a_model_without_tokenizer_is_refused():
    with pytest.raises(InputError, match="tokenizer"):
        indirect_object(interp.attach(build("gpt2")))
