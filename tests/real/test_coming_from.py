"""docs/coming_from.md: every call on the right side of its tables runs, in order."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text(encoding="utf-8")


def calls() -> list[str]:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    return [right.strip(" |`") for _, right in rows if right.strip(" |") != "here"]


@pytest.mark.slow
def test_every_call_runs(smollm2, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    import interp

    monkeypatch.setattr(interp, "load", lambda name: smollm2)
    names: dict = {}
    (before,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(before, names)
    assert len(calls()) > 40
    for call in calls():
        try:
            exec(call, names)
        except Exception as error:
            error.add_note(f"in docs/coming_from.md: {call}")
            raise
