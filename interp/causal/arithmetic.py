"""Addition with a carry: of numbers whose digits are tokens, or of digits as vectors."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Generator, Tensor, nn

from interp.causal.data import Splits
from interp.causal.models import CausalModel
from interp.causal.sampling import Inputs, Task
from interp.hooks.errors import ArgumentError, InputError, TokenError
from interp.hooks.model import Model

FRAME = "{a}+{b}="
AdditionAlgorithm = Literal["carry", "carries", "carry_and_column"]
_PARTS = 5  # problems are dealt out by a hash into fifths
_SPREAD = 2**31 - 1
_CHECKED = 100  # numbers of three digits and more whose tokens are looked at


def addition(
    model: Model | None = None, *, digits: int = 2, base: int = 10, algorithm: AdditionAlgorithm = "carry",
    frame: str = FRAME, parts: Sequence[int] = range(_PARTS),
) -> Task:  # fmt: skip
    """Return the task "the first digit of a + b", for which what is carried out of the digits below must be known.

    With digits numbered from the last, c_1 = [a_0 + b_0 ≥ base], c_{i+1} = [a_i + b_i + c_i ≥ base]. The label is
    (a_top + b_top + c_top) mod base. The carry c_top is a fair coin. Without a model the network gets the digits, each
    as ``base`` zeros and a one, and the first digits are any; with one it gets a text, and the first digits are such
    that the sum has as many digits as the numbers, so that the label is the next token.

    Args:
        model: A model with a tokenizer that makes each digit a token; None for vectors.
        digits: Of each number, at least two.
        base: Number of different digits; of texts ten.
        algorithm: ``carry``: variable ``carry``, what comes into the first digit. ``carries``: one variable for each
            digit that is carried into, ``carry1`` from the right on; half of the columns between pass a carry on.
            ``carry_and_column``: the carry, and ``column``, the sum of the first digits without it.
        frame: Text with ``{a}`` and ``{b}``; a small model needs solved problems before them.
        parts: Which fifths of all problems (pairs of numbers) are drawn from.

    Raises:
        ArgumentError: If digits, base, algorithm, frame or parts are none.
        InputError: If the model has no tokenizer.
        TokenError: If the tokenizer joins digits, or a digit with what stands beside it.

    Example:
        >>> task = addition(digits=2, base=10)
        >>> data = task.sample(200, seed=0)
        >>> data.pool.inputs.shape[1], 0.4 < float(data.flips.float().mean()) < 0.6
        (40, True)
    """
    _refuse(model, digits, base, frame, parts)
    names = [f"{number}{place}" for number in "ab" for place in range(digits)]  # a0 is the last digit of a
    drawn = partial(_digits, digits=digits, base=base, text=model is not None, passing=algorithm == "carries")
    task = Task(
        f"addition of {digits} digits in base {base}", _algorithm(digits, base, algorithm),
        partial(_draw, drawn, digits=digits, base=base, parts=frozenset(parts)),
        partial(_one_hot, names=names, base=base), flip=0.5,
        groups=lambda x: {"problems": _problem(x, digits, base)[:, None]}, width=2 * digits * base,
    )  # fmt: skip
    if model is None:
        return task
    tokens = _digit_tokens(model, frame, digits)
    return Task(
        task.name, task.causal_model, task.draw, partial(_write, frame=frame, digits=digits), flip=0.5,
        groups=task.groups, candidates=lambda x: tokens.expand(len(x["a0"]), -1),
    )  # fmt: skip


def addition_splits(
    model: Model | None = None, train: int = 10_000, validation: int = 2000, test: int = 2000, *, seed: int = 0,
    inputs: int | None = None, **options,
) -> Splits:  # fmt: skip
    """Return pairs of three fifths of the problems to train on, of one to validate, and of one to test.

    No problem (pair of numbers) is in two splits.

    Args:
        model: As of `addition`.
        train: Number of pairs.
        validation: Number of pairs.
        test: Number of pairs.
        seed: Of the draws.
        inputs: Different inputs in a split, which pairs join by number; by default each pair has its own.
        options: As of `addition`.

    Raises:
        DegenerateDataError: If a split shares a problem with another.

    Example:
        >>> addition_splits(None, 200, 100, 100, digits=3).disjoint
        ('problems',)
    """
    made = []
    for i, (name, n, parts) in enumerate(
        (("train", train, (0, 1, 2)), ("validation", validation, (3,)), ("test", test, (4,)))
    ):
        task = addition(model, parts=parts, **options)
        made.append(task.sample(n, seed=3 * seed + i, split=name, inputs=inputs))
    return Splits(made[0], made[1], {"test": made[2]}, ("problems",))


def _refuse(model: Model | None, digits: int, base: int, frame: str, parts: Sequence[int]) -> None:
    if digits < 2 or base < 2 or not parts or set(parts) - set(range(_PARTS)):
        raise ArgumentError(
            f"digits={digits}, base={base}, parts={list(parts)}",
            f"at least two digits, a base of at least two, parts of 0..{_PARTS - 1}",
        )
    if model is None:
        return
    if base != 10 or frame.count("{a}") != 1 or frame.count("{b}") != 1:
        raise ArgumentError(f"base={base}, frame={frame!r}", "base ten, and the slots {a} and {b} once each")
    if model.tokenizer is None:
        raise InputError("a model without tokenizer", "one with a tokenizer", "interp.attach(..., tokenizer=)")


def _algorithm(digits: int, base: int, algorithm: AdditionAlgorithm) -> CausalModel:
    top = digits - 1
    inputs = [f"{number}{place}" for number in "ab" for place in range(digits)]
    below = [f"{number}{place}" for place in range(top) for number in "ab"]
    name = f"{algorithm.replace('_', ' ')}, {digits} digits, base {base}"
    whole = lambda *values: _carry(values, base)
    total = lambda a, b, carry: (a + b + carry.long()) % base
    first = [f"a{top}", f"b{top}"]
    if algorithm == "carry":
        return CausalModel(inputs, {"carry": (below, whole)}, ([*first, "carry"], total), labels=base, name=name)
    if algorithm == "carry_and_column":
        both = {"carry": (below, whole), "column": (first, torch.add)}
        output = (["column", "carry"], lambda column, carry: (column + carry.long()) % base)
        return CausalModel(inputs, both, output, labels=base, name=name)
    if algorithm != "carries":
        raise ArgumentError(f"algorithm={algorithm!r}", "'carry', 'carries' or 'carry_and_column'")
    nodes: dict[str, Any] = {"carry1": (["a0", "b0"], whole)}
    for place in range(1, top):
        step = lambda a, b, carry: a + b + carry.long() >= base
        nodes[f"carry{place + 1}"] = ([f"a{place}", f"b{place}", f"carry{place}"], step)
    return CausalModel(inputs, nodes, ([*first, f"carry{top}"], total), labels=base, name=name)


def _carry(values: Sequence[Tensor], base: int) -> Tensor:
    """What is carried out of the digits a_0, b_0, a_1, b_1, ..."""
    carry = torch.zeros_like(values[0], dtype=torch.bool)
    for a, b in zip(values[::2], values[1::2], strict=True):
        carry = a + b + carry.long() >= base
    return carry


def _draw(
    drawn: Callable[[int, Generator], Inputs], n: int, generator: Generator, *, digits: int, base: int,
    parts: frozenset[int],
) -> Inputs:  # fmt: skip
    """Digits with a fair carry into the first, of the problems that are dealt to these parts."""
    wanted = torch.rand(n, generator=generator) < 0.5
    found = drawn(n, generator)
    allowed = torch.tensor(sorted(parts))
    while True:
        below = [found[f"{number}{place}"] for place in range(digits - 1) for number in "ab"]
        wrong = (_carry(below, base) != wanted) | ~torch.isin(_part(_problem(found, digits, base)), allowed)
        if not bool(wrong.any()):
            return found
        rows = wrong.nonzero().flatten()
        for name, value in drawn(len(rows), generator).items():
            found[name][rows] = value


def _digits(n: int, generator: Generator, *, digits: int, base: int, text: bool, passing: bool) -> Inputs:
    found = {
        f"{number}{place}": torch.randint(base, (n,), generator=generator) for number in "ab" for place in range(digits)
    }
    for place in range(1, digits - 1) if passing else ():  # without these a carry from the right hardly ever matters
        on = torch.rand(n, generator=generator) < 0.5
        found[f"b{place}"] = torch.where(on, base - 1 - found[f"a{place}"], found[f"b{place}"])
    if text:  # first digits from 1 on, whose sum leaves room for a carry
        total = torch.randint(2, base - 1, (n,), generator=generator)
        first = 1 + (torch.rand(n, generator=generator) * (total - 1)).long()
        found |= {f"a{digits - 1}": first, f"b{digits - 1}": total - first}
    return found


def _problem(inputs: Inputs, digits: int, base: int) -> Int64[Tensor, "n"]:
    """A number for each pair of numbers."""
    number = torch.zeros_like(inputs["a0"])
    for name in (f"{which}{place}" for which in "ab" for place in range(digits - 1, -1, -1)):
        number = number * base + inputs[name]
    return number


def _part(problem: Int64[Tensor, "n"]) -> Int64[Tensor, "n"]:
    """The fifth that a problem is dealt to: a hash, so that no digit is missing from a part."""
    mixed = (problem % _SPREAD) * 48_271 % _SPREAD
    return (mixed ^ (mixed >> 15)) * 69_621 % _SPREAD % _PARTS


def _one_hot(inputs: Inputs, *, names: Sequence[str], base: int) -> Tensor:
    return torch.cat([nn.functional.one_hot(inputs[name], base).float() for name in names], 1)


def _write(inputs: Inputs, *, frame: str, digits: int) -> list[str]:
    numbers = []
    for which in "ab":
        columns = [inputs[f"{which}{place}"].tolist() for place in range(digits - 1, -1, -1)]
        numbers.append(["".join(map(str, row)) for row in zip(*columns, strict=True)])
    return [frame.format(a=a, b=b) for a, b in zip(*numbers, strict=True)]


def _digit_tokens(model: Model, frame: str, digits: int) -> Int64[Tensor, "ten"]:
    """The token of each digit after the frame; refuses a tokenizer that joins digits with anything."""
    read = lambda text: list(model.tokenizer.encode(text, add_special_tokens=False))
    do = "a model that splits numbers into digits, or addition() without a model, on vectors"
    refuse = lambda what: TokenError(
        f"tokenizer {type(model.tokenizer).__name__}, which joins {what}", "one token for each digit", do
    )
    places: dict[tuple[str, int], int] = {}
    for number in _some_numbers(digits):
        known = read(frame.format(a=number, b=number))
        for slot, digit in ((slot, digit) for slot in "ab" for digit in range(digits)):
            other = number[:digit] + str((int(number[digit]) + 1) % 10) + number[digit + 1 :]
            tokens = read(frame.format(**{"a": number, "b": number, slot: other}))
            changed = [i for i, (x, y) in enumerate(zip(known, tokens, strict=False)) if x != y]
            same_length = len(tokens) == len(known)
            if not same_length or len(changed) != 1 or places.setdefault((slot, digit), changed[0]) != changed[0]:
                raise refuse(f"digits of {number!r} or {other!r}")
        if len(set(places.values())) < len(places):
            raise refuse(f"digits of {number!r}")
    text = frame.format(a="1" * digits, b="1" * digits)
    before, answers = read(text), [read(f"{text}{digit}") for digit in range(10)]
    for digit, tokens in enumerate(answers):
        if tokens[:-1] != before:
            raise refuse(f"{frame[-1:]!r} with {digit}")
    return torch.tensor([tokens[-1] for tokens in answers])


def _some_numbers(digits: int) -> list[str]:
    """All numbers of two digits, and some of more."""
    if digits == 2:
        return [f"{i:02d}" for i in range(100)]
    drawn = torch.randint(10, (_CHECKED, digits), generator=torch.Generator().manual_seed(0))
    return ["".join(map(str, row)) for row in drawn.tolist()]
