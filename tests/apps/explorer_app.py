"""The explorer without a browser, on tiny models: set fields, wait for work, read what stands on the page."""

import json
import time
from pathlib import Path

import pandas
import pytest
from streamlit.dataframe_util import convert_arrow_bytes_to_pandas_df as from_arrow
from streamlit.testing.v1 import AppTest

MAIN = Path(__file__).resolve().parents[2] / "apps" / "explorer" / "main.py"
PROMPT = "Mary gave the book to"


class App:
    """One session."""

    def __init__(self, **fields: str):
        self.at = AppTest.from_file(str(MAIN), default_timeout=60)
        for key, value in fields.items():
            self.at.query_params[key] = value

    def settle(self, seconds: float = 60) -> "App":
        """Run until no work is under way, and nothing was raised."""
        until = time.monotonic() + seconds
        self.run()
        while any(b.label == "Cancel" for b in self.at.button):
            assert time.monotonic() < until, self.at.get("progress")
            time.sleep(0.05)
            self.run()
        return self

    def run(self) -> "App":
        self.at.run()
        assert not self.at.exception, [e.message for e in self.at.exception]
        return self

    def press(self, label: str) -> "App":
        """Press the button that begins with these words."""
        next(b for b in self.at.button if b.label.startswith(label)).click()
        return self.settle()

    def set(self, field: str, value) -> "App":
        """Set the control of a field."""
        self.control(field).set_value(value)
        return self.settle()

    def control(self, field: str):
        kinds = ("text_area", "text_input", "selectbox", "slider", "pills", "button_group", "radio", "number_input")
        found = [w for kind in kinds for w in self.at.get(kind) if w.key == f"control {field}"]
        return found[0]

    @property
    def errors(self) -> list[str]:
        return [e.value for e in self.at.error]

    @property
    def labels(self) -> list[str]:
        return [b.label for b in self.at.button]

    @property
    def words(self) -> str:
        kinds = ("markdown", "caption", "subheader", "error", "info")
        return " | ".join(str(e.value) for kind in kinds for e in self.at.get(kind))

    @property
    def figures(self) -> list[dict]:
        """The figures that are shown: their specifications and the rows of their data sets."""
        return [
            {"spec": json.loads(chart.proto.spec)}
            | {d.name: rows(from_arrow(d.data.data)) for d in chart.proto.datasets}
            for chart in self.at.get("vega_lite_chart")
        ]

    @property
    def scripts(self) -> list[str]:
        """What "copy as Python" gives, one for each figure."""
        return [c.value for c in self.at.code]

    @property
    def titles(self) -> list[str]:
        return [s.value for s in self.at.subheader]


def check_scripts(app: App) -> int:
    """Run every script of a page; each gives the figure that is shown, number for number. Return how many there are."""
    assert len(app.scripts) == len(app.figures)
    for text, shown in zip(app.scripts, app.figures, strict=True):
        space: dict = {}
        exec(text, space)
        given = space["figure"].to_dict()["datasets"]
        drawn = {name: data for name, data in shown.items() if name != "spec"}
        made = {name: rows(pandas.DataFrame(data)) for name, data in given.items()}
        # The names are hashes of the data: where a last digit differs, so do they, and the order tells which is which.
        assert made == drawn or same_tables(list(made.values()), list(drawn.values())), text
    return len(app.scripts)


def same_tables(made: list[list[dict]], drawn: list[list[dict]]) -> bool:
    """Whether tables are the same but for rounding."""
    if [len(table) for table in made] != [len(table) for table in drawn]:
        return False
    pairs = [pair for tables in zip(made, drawn, strict=True) for pair in zip(*tables, strict=True)]
    return all(one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items()) for one, other in pairs)


def same(one, other) -> bool:
    return one == (pytest.approx(other, rel=1e-4, abs=1e-5) if isinstance(other, float) else other)


def rows(frame) -> list[dict]:
    """Rows of a table, without what is empty."""
    return [{k: v for k, v in row.items() if v == v and v is not None} for row in frame.to_dict("records")]
