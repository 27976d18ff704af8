"""docs/limits.md says of each family what its tiny model does."""

from pathlib import Path

import pytest

from tests.cases import CASES
from tests.limits import OTHERS, WAYS, row

PAGE = (Path(__file__).parents[2] / "docs" / "limits.md").read_text(encoding="utf-8")
WRITTEN = {line.split(" | ")[0].strip("| "): line for line in PAGE.splitlines() if line.startswith("| ")}
QUICK = ("llama", "bert", "a convolutional network")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in (*CASES, *OTHERS)]
)
def test_the_page_says_what_happens(name):
    assert WRITTEN[name] == f"| {name} | " + " | ".join(row(name)) + " |"


def test_the_page_names_each_way():
    assert WRITTEN["family"] == "| family | " + " | ".join(WAYS) + " |"
