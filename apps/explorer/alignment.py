"""Page Alignment: accuracies of maps by site with their controls, the frontier, and interventions to step through."""

from typing import Any

import streamlit as st

from interp.apps.explorer import desk
from interp.apps.explorer.calls import Call
from interp.apps.explorer.runs import ALIGNMENTS, headed, results_of
from interp.apps.explorer.state import bound, link
from interp.runs.run import Run

_COMPLEXITIES = ("effective dimension", "parameters")
_MEASURES = ("iia", "selectivity")


def show() -> None:
    """The page."""
    found = headed()
    if found is None:
        return
    made, run = found
    for name in results_of(run, ALIGNMENTS):
        _sweep(made.method("sweep", "load", name), name)
    if "examples" in run.names:
        _examples(made, run)


def _sweep(loaded: Call, name: str) -> None:
    sweep = desk.result(loaded, name)
    if sweep is None:
        return
    split = _choice("split", "Pairs", sweep.splits)
    pairs: dict[str, Any] = {} if split == sweep.splits[0] else {"split": split}
    desk.figure(f"{name}-grid", loaded, name, figure="grid", **pairs)
    best = sweep.best(split=split)
    st.caption(
        f"{desk.escaped(sweep.algorithm)}. Budget of every map and control: {desk.escaped(sweep.budget)}. "
        f"Validation pairs choose {desk.escaped(best['map'])} at {desk.escaped(best['site'])}: IIA {best['iia']:.3f} "
        f"({best['low']:.3f} to {best['high']:.3f}), untrained networks {best['random']:.3f}, selectivity "
        f"{best['selectivity']:+.3f}."
    )
    st.subheader("Accuracy against complexity", anchor=False)
    left, right = st.columns(2)
    with left:
        measure = _choice("measure", "Accuracy", _MEASURES)
    with right:
        complexity = _choice("complexity", "Complexity", _COMPLEXITIES)
    options: dict[str, Any] = {"measure": measure, "complexity": complexity, **pairs}
    desk.figure(f"{name}-frontier", loaded, name, **options)
    st.caption(
        "What says something about the network is the distance between the curves, at the simple end: a map that is "
        "flexible enough aligns anything."
    )


def _examples(made: Call, run: Run) -> None:
    st.subheader("One intervention at a time", anchor=False)
    rows = desk.result(made.method("examples", "load", "examples"), "examples")
    if rows is None:
        return
    st.caption(desk.escaped(rows.title))
    given = link()["example"]
    link()["example"] = given if given.isdigit() and 1 <= int(given) <= len(rows) else "1"
    number = st.slider("Intervention", 1, len(rows), **bound("example", int))
    row = rows[number - 1]
    variables = [name.removeprefix("source of ") for name in row if name.startswith("source of ")]
    st.dataframe(_steps(row, variables), hide_index=True, key="steps")
    words = "as the algorithm does" if row["right"] else "not as the algorithm does"
    st.write(
        f"Set: **{desk.escaped(row['set'])}**. The algorithm answers {desk.escaped(row['algorithm before'])}, then "
        f"**{desk.escaped(row['algorithm'])}**; the network {desk.escaped(row['network before'])}, then "
        f"**{desk.escaped(row['network'])}**: {words}."
    )
    wrong = [i for i, r in enumerate(rows, 1) if not r["right"]]
    st.caption(
        f"{len(rows) - len(wrong)} of {len(rows)} are right; the others: {', '.join(map(str, wrong)) or 'none'}."
    )


def _steps(row: dict[str, Any], variables: list[str]) -> list[dict[str, str]]:
    """Inputs of one intervention, with the variables that each gives."""
    kept = {v: row[v].split(" → ") for v in variables}
    steps = [{"input": "base", **{v: values[0] for v, values in kept.items()}, "given": row["base"]}]
    for v in variables:
        if row[f"source of {v}"]:
            steps.append({"input": f"source of {v}", v: kept[v][1], "given": row[f"source of {v}"]})
    return [{"input": s["input"], **{v: s.get(v, "") for v in variables}, "given": s["given"]} for s in steps]


def _choice(field: str, label: str, options: Any) -> str:
    """A choice that stands in the address."""
    link()[field] = link()[field] if link()[field] in options else options[0]
    return st.selectbox(label, list(options), **bound(field))
