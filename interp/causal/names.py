"""Indirect objects: two names, one of which is said again, and the other of which is to come."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int64
from torch import Generator, Tensor

from interp.causal.data import InterchangeDataset, Splits
from interp.causal.models import CausalModel
from interp.causal.sampling import Inputs, Task
from interp.hooks.errors import ArgumentError, DegenerateDataError, InputError
from interp.hooks.model import Model

NAMES = (
    "Mary John Tom James Anna Paul Laura Mark Emma Peter Sarah David Alice Robert Susan Michael Linda Daniel "
    "Karen Kevin Lucy George Helen Brian Julia Frank Nancy Simon Grace Henry Rachel Steven Maria Andrew Kate Jack "
    "Rose Adam Jane Sam"
).split()
ITEMS = ("drink", "book", "ring", "letter", "key", "basket", "ticket", "coat")
FRAMES = (
    "When {a} and {b} went to the store, {s} gave a {item} to",
    "Then, {a} and {b} had a long talk, and {s} handed a {item} to",
    "After {a} and {b} came home from school, {s} offered a {item} to",
    "While {a} and {b} were working at the office, {s} passed a {item} to",
    "Last night {a} and {b} met at the station, where {s} brought a {item} to",
    "Since {a} and {b} were old friends, {s} decided to give a {item} to",
    "At the party, {a} and {b} sat down, and {s} showed a {item} to",
    "Once {a} and {b} had found the garden, {s} threw a {item} to",
    "{a} and {b} had an argument in the kitchen, and afterwards {s} said sorry and gave a {item} to",
    "Before {a} and {b} left the museum, {s} sold a {item} to",
)


def indirect_object(
    model: Model, names: Sequence[str] = NAMES, frames: Sequence[str] = FRAMES, items: Sequence[str] = ITEMS
) -> Task:
    """Return the task "whom is it given to": of two names one is said again, and the other is the answer.

    The algorithm has one variable, ``second``: the indirect object is the second name. It says a place and no name. The
    labels are 0, the base's first name, and 1, its second; the network answers with the first token of one or the
    other. Values come from the slots of the frames, never from a search in the text. Wang et al. 2022 (arXiv
    2211.00593); the variable is that of Sutter et al. 2025 (arXiv 2507.08802).

    Args:
        model: A model with a tokenizer.
        names: First names; two of one prompt never begin with the same token.
        frames: Sentences with ``{a}``, ``{b}`` (the names in their order), ``{s}`` (the one said again), ``{item}``.
        items: What is given.

    Raises:
        InputError: If the model has no tokenizer.
        ArgumentError: If a frame lacks a slot, or a list has an entry twice.
        DegenerateDataError: If fewer than two names begin with different tokens.

    Example:
        >>> import interp
        >>> task = indirect_object(interp.load("smollm2-135m"))
        >>> data = task.sample(4, seed=0)
        >>> data.pool.inputs[int(data.base[0])], data.pool.candidates.shape[1]
        ('At the party, Daniel and Rose sat down, and Daniel showed a ticket to', 2)
    """
    if model.tokenizer is None:
        raise InputError("a model without tokenizer", "one with a tokenizer", "interp.attach(..., tokenizer=)")
    for what, entries in (("names", names), ("frames", frames), ("items", items)):
        if len(set(entries)) < len(entries) or not entries:
            raise ArgumentError(f"{what} {list(entries)[:4]}...", "different entries, at least one")
    for frame in frames:
        if missing := [slot for slot in ("{a}", "{b}", "{s}", "{item}") if slot not in frame]:
            raise ArgumentError(f"frame {frame!r} without {', '.join(missing)}", "the slots {a}, {b}, {s} and {item}")
    first = torch.tensor([first_token(model, name) for name in names])
    if len(first.unique()) < 2:
        raise DegenerateDataError("names that all begin with one token", "two that begin with different tokens")
    algorithm = CausalModel(
        ["a", "b", "frame", "item", "order"], {"second": (["order"], torch.clone)}, (["second"], torch.clone),
        name="the second name is the indirect object",
    )  # fmt: skip
    known = {name: number_of(name) for name in (*names, *frames)}
    return Task(
        "indirect object", algorithm, partial(_draw, first=first, frames=len(frames), items=len(items)),
        partial(_write, names=names, frames=frames, items=items), flip=0.5,
        groups=lambda x: {
            "names": torch.tensor([known[n] for n in names])[torch.stack([x["a"], x["b"]], 1)],
            "frames": torch.tensor([known[f] for f in frames])[x["frame"][:, None]],
        },
        candidates=lambda x: torch.stack([first[x["a"]], first[x["b"]]], 1),
    )  # fmt: skip


def indirect_object_splits(
    model: Model, train: int = 5000, validation: int = 500, test: int = 500, *, prompts: int = 200, seed: int = 0,
    names: Sequence[str] = NAMES, frames: Sequence[str] = FRAMES,
) -> Splits:  # fmt: skip
    """Return pairs of the first three fifths of the names and four fifths of the frames, and three tests.

    ``test`` has new prompts of the same names and frames, ``names`` the last fifth of the names, ``frames`` the last
    fifth of the frames. Validation takes the fifth of the names between.

    Args:
        model: A model with a tokenizer.
        train: Number of pairs.
        validation: Number of pairs.
        test: Number of pairs in each test.
        prompts: Different prompts in a split; pairs join them by number.
        seed: Of the draws.
        names: First names, at least ten.
        frames: Sentences, at least five.

    Raises:
        ArgumentError: If there are too few names or frames, or so many prompts that few are new.
        DegenerateDataError: If the splits share a pair, names or frames.

    Example:
        >>> import interp
        >>> list(indirect_object_splits(interp.load("smollm2-135m"), 50, 20, 20, prompts=20).tests)
        ['test', 'names', 'frames']
    """
    if len(names) < 10 or len(frames) < 5:
        raise ArgumentError(f"{len(names)} names, {len(frames)} frames", "at least 10 names and 5 frames")
    one, two, frame = 3 * len(names) // 5, 4 * len(names) // 5, 4 * len(frames) // 5

    def part(
        index: int, n: int, split: str, known: Sequence[str], sentences: Sequence[str], seen: Tensor | None = None
    ) -> InterchangeDataset:  # fmt: skip
        task = indirect_object(model, known, sentences)
        if seen is not None:
            if 2 * len(seen.unique()) > len(known) * (len(known) - 1) * len(sentences) * len(ITEMS):
                raise ArgumentError(f"prompts={prompts}", "fewer: the test needs prompts that training has not seen")
            task = replace(task, draw=partial(_unseen, draw=task.draw, seen=seen))
        return task.sample(n, seed=10 * seed + index, split=split, inputs=prompts)

    fitted = part(0, train, "train", names[:one], frames[:frame])
    return Splits(
        fitted,
        part(1, validation, "validation", names[one:two], frames[:frame]),
        {
            "test": part(2, test, "test", names[:one], frames[:frame], _prompts(fitted.pool.settings)),
            "names": part(3, test, "names", names[two:], frames[:frame]),
            "frames": part(4, test, "frames", names[:one], frames[frame:]),
        },
        ("names", "frames"),
    )


def _draw(n: int, generator: Generator, *, first: Tensor, frames: int, items: int) -> Inputs:
    a = torch.randint(len(first), (n,), generator=generator)
    b = torch.randint(len(first), (n,), generator=generator)
    while len(rows := (first[a] == first[b]).nonzero().flatten()):
        b[rows] = torch.randint(len(first), (len(rows),), generator=generator)
    return {
        "a": a, "b": b, "frame": torch.randint(frames, (n,), generator=generator),
        "item": torch.randint(items, (n,), generator=generator), "order": torch.rand(n, generator=generator) < 0.5,
    }  # fmt: skip


def _prompts(inputs: Mapping[str, Tensor]) -> Int64[Tensor, "n"]:
    """A number for each prompt."""
    found = torch.zeros_like(inputs["a"])
    for name in ("a", "b", "frame", "item", "order"):
        found = found * 1000 + inputs[name].long()
    return found


def _unseen(n: int, generator: Generator, *, draw: Callable[[int, Generator], Inputs], seen: Tensor) -> Inputs:
    """Prompts drawn again until they are none of those seen."""
    found = draw(n, generator)
    while len(rows := torch.isin(_prompts(found), seen).nonzero().flatten()):
        for name, value in draw(len(rows), generator).items():
            found[name][rows] = value
    return found


def _write(inputs: Inputs, *, names: Sequence[str], frames: Sequence[str], items: Sequence[str]) -> list[str]:
    """The texts: the name that is not the indirect object is said again."""
    rows = zip(*(inputs[k].tolist() for k in ("a", "b", "frame", "item", "order")), strict=True)
    return [
        frames[int(frame)].format(a=names[a], b=names[b], s=names[a if second else b], item=items[item])
        for a, b, frame, item, second in rows
    ]


def first_token(model: Model, name: str, after: str = "to") -> int:
    """The token with which a name goes on after a word, whatever the tokenizer does with spaces."""
    read = lambda text: model.tokenizer.encode(text, add_special_tokens=False)
    before, whole = read(after), read(f"{after} {name}")
    if whole[: len(before)] != before or len(whole) == len(before):
        raise DegenerateDataError(f"name {name!r}, which the tokenizer joins to the word before", "another name")
    return int(whole[len(before)])


def number_of(text: str) -> int:
    """A number for an entry that is the same in every list."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
