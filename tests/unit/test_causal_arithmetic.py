"""Addition: labels, carries and counterfactual labels against whole numbers added by Python."""

import pytest
import torch

import interp
from interp.causal import addition, addition_splits, mlp
from interp.causal.data import refuse_shared_groups
from interp.hooks.errors import ArgumentError, DegenerateDataError, InputError, TokenError
from tests.cases import build


class Characters:
    """A tokenizer whose tokens are characters, but for the pairs that it is told to join."""

    def __init__(self, joined=()):
        self.joined = joined

    def encode(self, text, add_special_tokens=False):
        found, at = [], 0
        while at < len(text):
            piece = text[at : at + 2] if text[at : at + 2] in self.joined else text[at]
            found.append(sum(ord(c) * 1000**i for i, c in enumerate(piece)))
            at += len(piece)
        return found


def model_with(tokenizer):
    found = interp.attach(build("gpt2"))
    found.tokenizer = tokenizer
    return found


def whole(settings, row, which, digits, base):
    return sum(int(settings[f"{which}{place}"][row]) * base**place for place in range(digits))


@pytest.mark.parametrize(("digits", "base", "algorithm"), [
    (2, 10, "carry"), (3, 10, "carries"), (3, 7, "carry_and_column"), (2, 2, "carry"),
])  # fmt: skip
def test_labels_are_those_of_whole_numbers(digits, base, algorithm):
    data = addition(digits=digits, base=base, algorithm=algorithm).sample(300, seed=1)
    settings, unit = data.pool.settings, base ** (digits - 1)
    for row in range(len(data.pool)):
        a, b = (whole(settings, row, which, digits, base) for which in "ab")
        carry = int(a % unit + b % unit >= unit)
        assert int(settings["output"][row]) == (a + b) // unit % base
        assert int(settings["carry2" if algorithm == "carries" else "carry"][row]) == carry
        if algorithm == "carries":
            assert int(settings["carry1"][row]) == int(a % base + b % base >= base)
        assert torch.equal(data.pool.inputs[row].view(2 * digits, base).argmax(1), torch.tensor(
            [int(settings[f"{which}{place}"][row]) for which in "ab" for place in range(digits)]
        ))  # fmt: skip
    for i in range(len(data)):
        row = int(data.base[i])
        if algorithm == "carry":
            carried = int(settings["carry"][int(data.sources[i, 0])])
            first = sum(int(settings[f"{which}{digits - 1}"][row]) for which in "ab")
            assert int(data.labels[i]) == (first + carried) % base
        assert bool(data.flips[i]) == (int(data.labels[i]) != int(settings["output"][row]))


def test_carries_and_flips_are_fair_coins_and_all_labels_come():
    data = addition(digits=3).sample(4000, seed=3)
    assert float(data.flips.float().mean()) == pytest.approx(0.5, abs=0.03)
    drawn = addition(digits=3)
    carry = drawn.causal_model.run(drawn.draw(4000, torch.Generator().manual_seed(0)))["carry"]
    assert float(carry.float().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.bincount(data.labels, minlength=10).min() > 250


@pytest.mark.parametrize("model", [None, model_with(Characters())], ids=["vectors", "texts"])
def test_no_problem_is_in_two_splits(model):
    splits = addition_splits(model, 400, 200, 200, inputs=None if model is None else 150)
    for one, other in ((splits.train, splits.validation), (splits.validation, splits.test)):
        refuse_shared_groups(one, other, "problems")
    with pytest.raises(DegenerateDataError, match="problems"):
        refuse_shared_groups(splits.train, splits.train, "problems")


def test_texts_are_solved_by_the_answer_token():
    task = addition(model_with(Characters()), frame="1+1=2\n{a} + {b} = ")
    pool = task.sample(200, seed=0).pool
    for row, text in enumerate(pool.inputs):
        a, b = map(int, text.removeprefix("1+1=2\n").removesuffix(" = ").split(" + "))
        assert len(str(a)) == len(str(b)) == len(str(a + b)) == 2
        assert int(pool.candidates[row, pool.settings["output"][row]]) == ord(str(a + b)[0])
    assert task.width is None


def test_an_mlp_takes_the_vectors():
    x, y = addition(digits=2, base=5).labelled(10, 0)
    assert mlp(addition(digits=2, base=5))(x).shape == (10, 5)
    assert y.max() < 5


@pytest.mark.parametrize("joined", [["47"], [f"{i:02d}" for i in range(100)], ["+3"], ["=8"]])
def test_a_tokenizer_that_joins_digits_is_refused_by_name(joined):
    with pytest.raises(TokenError, match=r"tokenizer Characters, which joins"):
        addition(model_with(Characters(joined)))


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"digits": 1}, ArgumentError, "digits=1"),
    ({"parts": [7]}, ArgumentError, r"parts=\[7\]"),
    ({"frame": "{a} and"}, None, ""),
    ({"model": "bare"}, InputError, "tokenizer"),
    ({"model": "characters", "frame": "{a}+"}, ArgumentError, r"slots \{a\} and \{b\}"),
    ({"model": "characters", "base": 7}, ArgumentError, "base ten"),
])  # fmt: skip
def test_what_is_no_addition_is_refused(options, error, text):
    models = {"bare": interp.attach(build("gpt2")), "characters": model_with(Characters())}
    options = {k: models[v] if k == "model" else v for k, v in options.items()}
    if error is None:
        assert addition(**options).width == 40  # vectors have no frame
        return
    with pytest.raises(error, match=text):
        addition(**options)
