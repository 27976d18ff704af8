"""Page Runs: what is in the folder of runs; one run with its figures and where it came from; two compared."""

import json
from pathlib import Path
from typing import Any

import streamlit as st

from interp.apps.captions import caption, has_words
from interp.apps.explorer import desk
from interp.apps.explorer.calls import Call, call, script
from interp.apps.explorer.state import bound, link, put, runs_folder
from interp.hooks.errors import InterpError, RunError
from interp.plots import can_draw
from interp.runs.run import Run

_MOST = 500
PROBING = ("ProbeSweep", "LearningCurve", "TransferMatrix")
# What stands beside them: what a direction does, and what is known of a probe's numbers.
BESIDE_PROBES = ("ProbeUse", "DoseResponse", "PermutationTest", "Calibration", "Codelength")
ALIGNMENTS = ("AlignmentSweep",)


def show() -> None:
    """The page."""
    names = listed()
    if not names:
        desk.complain(RunError(f"no runs in {runs_folder()}", "a folder of runs", "make one: interp demo"))
        return
    st.subheader("Runs", anchor=False)
    st.dataframe([_row(name) for name in names], hide_index=True, key="runs")
    left, right = st.columns(2)
    given = link()["run"]
    with left:
        st.selectbox("Open", ["", *names, *([given] if given not in ["", *names] else [])], **bound("run"))
    with right:
        others = ["", *(n for n in names if n != link()["run"])]
        put(other=link()["other"] if link()["other"] in others else "")
        st.selectbox("Compare with", others, **bound("other"))
    if not link()["run"]:
        return
    found = opened(link()["run"])
    if found is None:
        return
    if link()["other"]:
        _compared(found)
    else:
        _one(*found)


def listed() -> list[str]:
    """Names of the folders that look like runs, newest first."""
    folder = runs_folder()
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if (p / "spec.json").is_file()]
    return [p.name for p in sorted(found, key=lambda p: -p.stat().st_mtime)[:_MOST]]


def opened(name: str) -> tuple[Call, Run] | None:
    """A run of the folder, as a call and opened; None after a word on why not."""
    if Path(name).name != name:
        desk.complain(RunError(f"run {name!r}", f"the name of a run in {runs_folder()}"))
        return None
    path = runs_folder() / name
    try:
        run = Run.open(path)
        return call("run", "interp.Run.open", str(path)).stamped(_state(path)), run
    except InterpError as error:
        desk.complain(error)
        return None


def results_of(run: Run, kinds: tuple[str, ...]) -> list[str]:
    """Names of the run's results of these types."""
    found = []
    for name in run.names:
        try:
            found += [name] * (type(run.load(name)).__name__ in kinds)
        except InterpError:
            continue  # Page Runs says why it cannot be read.
    return found


def headed() -> tuple[Call, Run] | None:
    """The run that the address names, under its name as a heading; None after a word on why not."""
    found = opened(link()["run"])
    if found is not None:
        st.subheader(desk.escaped(found[1].path.name), anchor=False)
    return found


def _state(path: Path) -> str:
    """What changes when something in the run does."""
    files = [path, path / "results", path / "figures", *(path / "results").glob("*")]
    return ",".join(str(f.stat().st_mtime_ns) for f in files if f.exists())


def _row(name: str) -> dict[str, Any]:
    try:
        run = Run.open(runs_folder() / name)
        made = f"{run.provenance.get('kind', '')}"
        return {"run": name, "kind": made, "state": run.state, "results": len(run.names), "note": _note(run)}
    except InterpError as error:
        return {"run": name, "kind": "", "state": "cannot be opened", "results": 0, "note": str(error)}


def _note(run: Run) -> str:
    return ", ".join(f"{k}: {v}" for k, v in run.failure.items())


def _one(made: Call, run: Run) -> None:
    st.subheader(desk.escaped(run.path.name), anchor=False)
    if run.failure:
        st.warning(desk.escaped(_note(run)))
    results, provenance = st.tabs(["Results", "Specification and provenance"])
    with provenance:
        st.code(json.dumps(run.spec, indent=2, ensure_ascii=False), language="json")
        st.code(json.dumps(run.provenance, indent=2, ensure_ascii=False), language="json")
        log = run.path / "log.txt"
        if log.is_file():
            st.code(log.read_text(encoding="utf-8")[-4000:], language=None)
    with results:
        for name in run.names:
            result(made, run, name)
        for name in run.figures:
            _saved(made, name)


def result(made: Call, run: Run, name: str) -> None:
    """One result of a run: its figure, or its rows."""
    loaded = made.method("result", "load", name)
    found = desk.result(loaded, name)
    if found is None:
        return
    st.markdown(f"**{desk.escaped(name)}**")
    table = type(found).__name__ == "Table"
    drawn = can_draw(found) and (not table or "probability" in found.columns or "F x" in found.columns)
    if not drawn:
        st.dataframe(found.to_records() if hasattr(found, "to_records") else [], hide_index=True, key=f"rows {name}")
        with st.popover("Copy as Python", type="tertiary"):
            st.code(script(loaded), language="python")
        return
    options: dict[str, Any] = {}
    if type(found).__name__ == "Votes" and found.map.ndim == 2:
        group = name.partition("-")[0]
        if (run.path / "results" / f"{group}.png").is_file():
            options["picture"] = made.method("picture", "picture", group)
    desk.figure(name, loaded, name, **options)
    if has_words(found):
        words = caption(found)
        st.caption(f"{desk.escaped(words.sees)} {desk.escaped(words.silent)}")


def _saved(made: Call, name: str) -> None:
    """A figure that the run drew of its live model."""
    figure = made.method("saved", "figure", name)
    found = desk.result(figure, name)
    if found is None:
        return
    st.markdown(f"**{desk.escaped(found['title'])}**")
    desk.drawing(name, figure.item("figure", "spec"), found["spec"])
    st.caption(f"{desk.escaped(found['sees'])} {desk.escaped(found['silent'])}")


def _compared(found: tuple[Call, Run]) -> None:
    other = opened(link()["other"])
    if other is None:
        return
    st.subheader("Two runs", anchor=False)
    both = call("comparison", "interp.compare_runs", found[0], other[0])
    comparison = desk.result(both, "comparison")
    if comparison is None:
        return
    st.caption("What was asked, or where, differently")
    st.dataframe(comparison.fields or [{"what": "nothing"}], hide_index=True, key="fields")
    st.caption(f"Results: the largest deviation relative to the largest number is {comparison.deviation:.2g}")
    st.dataframe(comparison.to_records(), hide_index=True, key="deviations")
    with st.popover("Copy as Python", type="tertiary"):
        st.code(script(both), language="python")
