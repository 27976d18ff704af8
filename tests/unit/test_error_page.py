"""docs/errors.md: a section for each class, and an example there that raises just this class."""

import inspect
import re
import sys
from pathlib import Path

import pytest

from interp.hooks import errors

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
BEFORE, *REST = re.split(r"^### ", PAGE, flags=re.MULTILINE)
SECTIONS = {text.split("\n", 1)[0]: text for text in REST}
CLASSES = dict(inspect.getmembers(errors, inspect.isclass))
ROOTS = {"InterpError", "CausalAbstractionError"}  # raised as their subclasses only


def code(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


def test_each_class_has_its_section():
    assert set(SECTIONS) == set(CLASSES)
    assert not [name for name, text in SECTIONS.items() if "**What to do.** " not in text]


@pytest.mark.parametrize("name", CLASSES)
def test_the_example_raises_it(name, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "models"))
    monkeypatch.setitem(sys.modules, "pandas", sys.modules.get("pandas"))
    names: dict = {"__name__": "example"}
    exec(code(BEFORE), names)
    with pytest.raises(CLASSES[name]) as caught:
        exec(code(SECTIONS[name]), names)
    assert name in ROOTS or caught.type is CLASSES[name]
    assert caught.value.given
