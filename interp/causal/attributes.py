"""Attributes of entities: one is set while the others stay, as in RAVEL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Generator, Tensor

from interp.causal.data import InterchangeDataset, Splits
from interp.causal.models import CausalModel
from interp.causal.names import first_token, number_of
from interp.causal.sampling import Inputs, Task
from interp.datasets import EntityTable
from interp.hooks.errors import ArgumentError, DegenerateDataError, InputError, TokenError
from interp.hooks.model import Model
from interp.hooks.table import Rows

Frames = Mapping[str, Sequence[str]]
CITY_FRAMES: dict[str, list[str]] = {
    "country": [
        "The city of {entity} is in the country of", "The town of {entity} lies in the country of",
        "The mayor of {entity} was born in the country of",
    ],
    "continent": [
        "The city of {entity} is on the continent of", "The town of {entity} lies on the continent of",
        "The mayor of {entity} was born on the continent of",
    ],
}  # fmt: skip
_TEXTS = 64


@dataclass(frozen=True)
class KnownEntities(Rows):
    """What a network knows of a table.

    Attributes:
        table: The entities whose every attribute it gives, with every frame.
        asked: Number of entities that it was asked for.
        left_out: Entities whose name is not of the wanted number of tokens.
        accuracy: For each frame, the share of entities for which the right value is the best of all tokens.
        among_values: The same among the first tokens of all values of the table.
    """

    table: EntityTable = field(repr=False)
    asked: int
    left_out: int
    accuracy: dict[str, float]
    among_values: dict[str, float]

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each frame."""
        return [
            {"frame": frame, "accuracy": share, "among values": self.among_values[frame]}
            for frame, share in self.accuracy.items()
        ]


def attribute_of(
    model: Model, table: EntityTable, attribute: str, frames: Frames, *, rows: Sequence[int] | None = None
) -> Task:
    """Return the task "the value of an attribute of an entity", with one attribute as the variable.

    The algorithm has a variable for each attribute, and gives the one that is asked for. Pairs set one: where the base
    asks for it the label changes to the source's value (cause), where the base asks for another the label stays
    (isolate). A source differs from its base in the variable and in what the base asks for. So of a `Score`, ``flip``
    is the cause score, ``stay`` the isolation score, and the headline their mean, RAVEL's disentanglement: Huang et al.
    2024 (arXiv 2402.17700). The labels are the values of all attributes, by their first token.

    Args:
        model: A model with a tokenizer.
        table: Entities, of which `known_entities` keeps those that the model knows.
        attribute: The variable.
        frames: For each attribute texts with ``{entity}`` whose next word is the value.
        rows: Entities of the table that are drawn; by default all.

    Raises:
        InputError: If the model has no tokenizer.
        ArgumentError: If the table has no such attribute, frames are missing, or a frame has no slot.
        DegenerateDataError: If two values begin with one token, or an entity has no source.

    Example:
        >>> import interp
        >>> from interp.causal.attributes import CITY_FRAMES
        >>> values = {"country": ["France", "Japan", "Egypt"], "continent": ["Europe", "Asia", "Africa"]}
        >>> table = interp.EntityTable("cities", ["Paris", "Tokyo", "Cairo"], values)
        >>> task = attribute_of(interp.load("smollm2-135m"), table, "country", CITY_FRAMES)
        >>> task.variables, task.causal_model.labels, len(task.sample(20, seed=0))
        (('country',), 6, 20)
    """
    asked = _refuse(model, table, frames, attribute)
    values = _values(table)
    tokens = torch.tensor([first_token(model, value, "of") for value in values])
    if len(set(tokens.tolist())) < len(values):
        same = [v for v, t in zip(values, tokens, strict=True) if int((tokens == t).sum()) > 1]
        raise DegenerateDataError(
            f"values {', '.join(same[:6])}, some of which begin with one token", "values that differ in their first",
            "leave these entities out, as known_entities does",
        )  # fmt: skip
    names = list(table.attributes)
    number = {value: i for i, value in enumerate(values)}
    codes = torch.tensor([[number[v] for v in table.attributes[name]] for name in names])  # [attributes, entities]
    some = torch.arange(len(table)) if rows is None else torch.tensor(list(rows), dtype=torch.int64)
    _refuse_without_source(table, codes[:, some], some, names.index(attribute), asked)
    count = torch.tensor([len(frames[name]) if name in asked else 0 for name in names])
    nodes = {name: (["entity"], partial(_look_up, codes[i])) for i, name in enumerate(names)}
    output = (["query", *names], lambda query, *found: torch.stack(found, 1).gather(1, query[:, None])[:, 0])
    algorithm = CausalModel(
        ["entity", "query", "frame"], nodes, output, labels=len(values), name=f"{attribute} of {table.name}"
    )
    draw = partial(_draw, codes=codes, rows=some, asked=[names.index(a) for a in asked], target=names.index(attribute),
                   frames=count)  # fmt: skip
    entity_codes = torch.tensor([number_of(entity) for entity in table.entities])
    frame_codes = {name: torch.tensor([number_of(f) for f in frames[name]]) for name in asked}
    return Task(
        f"{attribute} of {table.name}", algorithm, draw, partial(_write, table=table, frames=frames, names=names),
        variables=(attribute,), source=partial(_source, draw=draw, codes=codes, target=names.index(attribute)),
        groups=lambda x: {
            "entities": entity_codes[x["entity"]][:, None],
            "frames": torch.tensor([
                [int(frame_codes[names[q]][f])] for q, f in zip(x["query"].tolist(), x["frame"].tolist(), strict=True)
            ]),
        },
        candidates=lambda x: tokens.expand(len(x["entity"]), -1),
    )  # fmt: skip


def attribute_splits(
    model: Model, table: EntityTable, attribute: str, frames: Frames, train: int = 2000, validation: int = 400,
    test: int = 400, *, seed: int = 0,
) -> Splits:  # fmt: skip
    """Return pairs of three fifths of the entities to train on, of one to validate, and two tests.

    ``entities`` has the last fifth of the entities with the same frames, ``frames`` the last frame of each attribute
    with the first entities.

    Args:
        model: A model with a tokenizer.
        table: Entities.
        attribute: The variable.
        frames: At least two for each attribute.
        train: Number of pairs.
        validation: Number of pairs.
        test: Number of pairs in each test.
        seed: Of the draws and of who goes where.

    Raises:
        ArgumentError: If there are fewer than two frames for an attribute.
        DegenerateDataError: If a split has an entity without a source, or shares what it must not.
    """
    if few := [name for name, texts in frames.items() if len(texts) < 2]:
        raise ArgumentError(f"one frame for {', '.join(few)}", "at least two, the last of which is for the test")
    order = torch.randperm(len(table), generator=Generator().manual_seed(seed)).tolist()
    one, two = 3 * len(table) // 5, 4 * len(table) // 5
    first, last = ({k: list(texts)[cut] for k, texts in frames.items()} for cut in (slice(None, -1), slice(-1, None)))

    def part(index: int, n: int, split: str, rows: list[int], known: Frames) -> InterchangeDataset:
        return attribute_of(model, table, attribute, known, rows=rows).sample(n, seed=10 * seed + index, split=split)

    tests = {
        "entities": part(2, test, "entities", order[two:], first), "frames": part(3, test, "frames", order[:one], last)
    }  # fmt: skip
    return Splits(
        part(0, train, "train", order[:one], first), part(1, validation, "validation", order[one:two], first),
        tests, ("entities", "frames"),
    )  # fmt: skip


def known_entities(
    model: Model, table: EntityTable, frames: Frames, *, tokens: int | None = None, least: int = 1
) -> KnownEntities:
    """Ask the network for every attribute of every entity, and keep what it knows.

    Values whose first token is that of a value before them are left out first.

    Args:
        model: A language model with a tokenizer.
        table: Entities.
        frames: For each attribute texts with ``{entity}``.
        tokens: Number of tokens that an entity's name must have after a word, so that all names end at one position
            (`entity_position`); by default any.
        least: Entities that a value must have to be kept.

    Raises:
        InputError: If the model has no tokenizer.
        ArgumentError: If frames are missing or have no slot.
        DegenerateDataError: If nothing is left.
    """
    asked = _refuse(model, table, frames)
    length = lambda entity: len(_tokens(model, f"of {entity}")) - len(_tokens(model, "of"))
    fits = [i for i in range(len(table)) if tokens is None or length(table.entities[i]) == tokens]
    small = _distinct(model, table.take(fits))
    if not len(small):
        raise DegenerateDataError(f"no entity of {table.name} with {tokens} tokens", "at least one", "tokens=None")
    values = _values(small)
    columns = torch.tensor([first_token(model, value, "of") for value in values])
    known, accuracy, among = torch.ones(len(small), dtype=torch.bool), {}, {}
    for name in asked:
        right = columns[torch.tensor([values.index(v) for v in small.attributes[name]])]
        for frame in frames[name]:
            logits = _last_logits(model, [frame.format(entity=e) for e in small.entities])
            best, narrow = logits.argmax(1) == right, columns[logits[:, columns].argmax(1)] == right
            accuracy[frame], among[frame] = float(best.float().mean()), float(narrow.float().mean())
            known &= narrow
    kept = small.take(known.nonzero().flatten().tolist())
    kept = kept.take([
        i for i in range(len(kept)) if all(column.count(column[i]) >= least for column in kept.attributes.values())
    ])  # fmt: skip
    if not len(kept):
        raise DegenerateDataError(f"no entity of {table.name} that the model knows", "at least one", "other frames")
    return KnownEntities(kept, len(small), len(table) - len(fits), accuracy, among)


def entity_position(model: Model, table: EntityTable, frames: Frames) -> int:
    """Return the position of the last token of every entity's name, where it is the same in all texts.

    Raises:
        TokenError: If it is not, naming two texts.
        ArgumentError: If frames are missing or have no slot.
    """
    asked = _refuse(model, table, frames)
    found: dict[int, str] = {}
    for frame in (frame for name in asked for frame in frames[name]):
        for entity in table.entities:
            text = frame[: frame.index("{entity}")] + entity
            found.setdefault(len(model.tokenizer.encode(text)) - 1, text)
    if len(found) > 1:
        (one, a), (two, b) = list(found.items())[:2]
        raise TokenError(
            f"{a!r} that ends at position {one} and {b!r} at {two}", "entities that end at one position",
            "known_entities(..., tokens=1), and frames that begin alike",
        )  # fmt: skip
    return next(iter(found))


def _refuse(model: Model, table: EntityTable, frames: Frames, attribute: str | None = None) -> list[str]:
    """Check what was given; return the attributes that have frames."""
    if model.tokenizer is None:
        raise InputError("a model without tokenizer", "one with a tokenizer", "interp.attach(..., tokenizer=)")
    if attribute is not None and attribute not in table.attributes:
        raise ArgumentError(f"attribute={attribute!r}", f"one of {', '.join(table.attributes)}")
    unknown = [name for name in frames if name not in table.attributes]
    if unknown or not frames or not len(table) or (attribute is not None and attribute not in frames):
        raise ArgumentError(
            f"frames for {', '.join(frames) or 'nothing'}, {len(table)} entities",
            f"frames for attributes of {', '.join(table.attributes)}, the variable among them, and entities",
        )
    for frame in (frame for texts in frames.values() for frame in texts):
        if frame.count("{entity}") != 1:
            raise ArgumentError(f"frame {frame!r}", "the slot {entity}, once")
    return [name for name in table.attributes if name in frames]


def _refuse_without_source(table: EntityTable, codes: Tensor, rows: Tensor, target: int, asked: Sequence[str]) -> None:
    """Every entity needs another that differs in the variable and in each attribute that is asked for."""
    names = list(table.attributes)
    for name in asked:
        other = (codes[target][:, None] != codes[target]) & (
            codes[names.index(name)][:, None] != codes[names.index(name)]
        )
        if not bool(other.any(1).all()):
            alone = table.entities[int(rows[int((~other.any(1)).nonzero()[0])])]
            raise DegenerateDataError(
                f"{alone!r}, from which no entity differs in {names[target]} and {name}", "a source for each entity",
                "more entities",
            )  # fmt: skip


def _values(table: EntityTable) -> list[str]:
    """All values of all attributes, each once."""
    return list(dict.fromkeys(value for values in table.attributes.values() for value in sorted(set(values))))


def _distinct(model: Model, table: EntityTable) -> EntityTable:
    """The entities whose values begin with a token of their own; of several values the most frequent is kept."""
    counts: dict[str, int] = {}
    for value in (value for values in table.attributes.values() for value in values):
        counts[value] = counts.get(value, 0) + 1
    kept: dict[int, str] = {}
    for value in sorted(counts, key=lambda v: -counts[v]):
        kept.setdefault(first_token(model, value, "of"), value)
    good = set(kept.values())
    return table.take([
        i for i in range(len(table)) if all(values[i] in good for values in table.attributes.values())
    ])  # fmt: skip


def _tokens(model: Model, text: str) -> list[int]:
    return list(model.tokenizer.encode(text, add_special_tokens=False))


@torch.no_grad()
def _last_logits(model: Model, texts: Sequence[str]) -> Tensor:
    from interp.causal.stages import last_logits

    found = []
    for start in range(0, len(texts), _TEXTS):
        batch = model.batch(list(texts[start : start + _TEXTS]))
        found.append(last_logits(batch, model.forward(batch)))
    return torch.cat(found)


def _look_up(codes: Tensor, entity: Tensor) -> Tensor:
    return codes[entity]


def _draw(
    n: int, generator: Generator, *, codes: Tensor, rows: Int64[Tensor, "rows"], asked: Sequence[int], target: int,
    frames: Tensor,
) -> Inputs:  # fmt: skip
    """Entities whose value of the variable is drawn first, uniformly; the variable is asked for half of the time."""
    own = codes[target, rows]
    wanted = own.unique()[torch.randint(len(own.unique()), (n,), generator=generator)]
    chances = (own == wanted[:, None]).double()
    entity = rows[torch.multinomial(chances, 1, generator=generator)[:, 0]]
    others = torch.tensor([a for a in asked if a != target] or [target])
    other = others[torch.randint(len(others), (n,), generator=generator)]
    query = torch.where(torch.rand(n, generator=generator) < 0.5, target, other)
    frame = (torch.rand(n, generator=generator) * frames[query]).long()
    return {"entity": entity, "query": query, "frame": frame}


def _source(variable: str, base: Inputs, generator: Generator, *, draw: Any, codes: Tensor, target: int) -> Inputs:
    """Sources that differ from their base in the variable and in what the base asks for."""
    found = draw(len(base["entity"]), generator)
    while bool((wrong := _alike(found, base, codes, target)).any()):
        rows = wrong.nonzero().flatten()
        for name, value in draw(len(rows), generator).items():
            found[name][rows] = value
    return found


def _alike(source: Inputs, base: Inputs, codes: Tensor, target: int) -> Bool[Tensor, "n"]:
    same = lambda attribute: codes[attribute, source["entity"]] == codes[attribute, base["entity"]]
    return same(torch.full_like(base["query"], target)) | same(base["query"])


def _write(inputs: Inputs, *, table: EntityTable, frames: Frames, names: Sequence[str]) -> list[str]:
    rows = zip(*(inputs[k].tolist() for k in ("entity", "query", "frame")), strict=True)
    texts = [(frames[names[int(query)]][int(frame)], table.entities[int(entity)]) for entity, query, frame in rows]
    return [text.format(entity=entity) for text, entity in texts]
