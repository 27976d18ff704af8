"""The desk: how a page asks for results and shows figures, with progress, a way to cancel, and clear refusals."""

import functools
from collections.abc import Callable
from typing import Any

import streamlit as st

from interp.apps.explorer.calls import Call, call, script
from interp.apps.explorer.state import session
from interp.apps.explorer.workshop import Cancelled, Job, Workshop
from interp.hooks.errors import InterpError
from interp.plots.style import visible

_PATIENCE = 0.4  # Seconds to wait before saying that one waits.
_EVERY = 0.7


@functools.cache
def workshop() -> Workshop:
    """The one workshop of this process."""
    return Workshop()


def begin() -> None:
    """At the start of a page: forget what the last run of it asked for, until it asks again."""
    st.session_state["waiting_before"] = st.session_state.get("waiting", {})
    st.session_state["waiting"] = {}
    st.session_state["said"] = set()


def end() -> None:
    """At the end of a page: leave the work that this run did not ask for again."""
    for key, job in st.session_state["waiting_before"].items():
        if key not in st.session_state["waiting"]:
            job.leave(session())


def result(wanted: Call, what: str, *, passes: int = 0, ask: str = "") -> Any:
    """A call's result, or None while there is none: then the page says why in its place.

    Args:
        wanted: The call.
        what: In words, for progress.
        passes: How many forward calls it takes, where that is known.
        ask: Label of a button that must be pressed first.
    """
    shop, state = workshop(), st.session_state
    if shop.has(wanted):
        return shop.get(wanted)
    stopped, failed, asked = (state.setdefault(n, {}) for n in ("stopped", "failed", "asked"))
    if wanted.key in state["said"]:  # Another place of the page has said why.
        return None
    state["said"].add(wanted.key)
    if (error := failed.get(wanted.key)) is not None:
        return _refused(wanted, error)
    if wanted.key in stopped or (ask and wanted.key not in asked):
        label = "Run again" if wanted.key in stopped else ask
        if wanted.key in stopped:
            st.caption(f"{what}: cancelled.")
        st.button(label, key=f"start {wanted.key}", on_click=_start, args=(wanted.key,))
        return None
    job = shop.ask(wanted, session())
    if job.wait(_PATIENCE):
        return _outcome(job)
    state["waiting"][wanted.key] = job
    _progress(job, what, passes)
    return None


def _start(key: str) -> None:
    st.session_state["stopped"].pop(key, None)
    st.session_state["asked"][key] = True


def _outcome(job: Job) -> Any:
    error = job.future.exception()
    if error is None:
        return job.future.result()
    if isinstance(error, Cancelled):
        st.session_state["stopped"][job.call.key] = True
        st.rerun()
    if not isinstance(error, InterpError):
        raise error
    st.session_state["failed"][job.call.key] = error
    return _refused(job.call, error)


def _refused(wanted: Call, error: InterpError) -> None:
    complain(error)
    again = st.session_state["failed"].pop
    st.button("Try again", key=f"again {wanted.key}", on_click=again, args=(wanted.key, None))


@st.fragment(run_every=_EVERY)
def _progress(job: Job, what: str, passes: int) -> None:
    """How far the work is, and a button that ends it."""
    if job.done:
        st.rerun()
    words = f"{what}: {job.seconds:.0f} s" if job.running else f"{what}: waiting for other work on this model"
    share = min(job.passes / passes, 0.99) if passes else 0.0
    if passes and job.passes:
        words += f", {job.passes} of {passes} passes"
    elif job.passes:
        words += f", {job.passes} passes"
    left, right = st.columns([5, 1], vertical_alignment="bottom")
    left.progress(share, words)
    right.button("Cancel", key=f"cancel {job.call.key}", on_click=_cancel, args=(job,))


def _cancel(job: Job) -> None:
    st.session_state["stopped"][job.call.key] = True
    job.leave(session())


def complain(error: InterpError) -> None:
    """A refusal: what was given, what was needed, what to do."""
    lines = [f"**{escaped(error.given or str(error))}**"]
    lines += [f"{label}: {escaped(text)}" for label, text in (("Needed", error.needed), ("To do", error.do)) if text]
    st.error("  \n".join(lines))


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    shown = "".join(c if c == " " else visible(c) for c in text)
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-.!|$~:^=\"'&" else c for c in shown)


def token(text: str) -> str:
    """A token as a label of a control."""
    return escaped(visible(text, 24))


# Figures --------------------------------------------------------------------------------------------------------------


def figure(
    name: str, shown: Call, what: str, *, picked: Callable[[dict[str, Any]], None] | None = None, passes: int = 0,
    ask: str = "", param: str = "pick", **options: Any,
) -> Any:  # fmt: skip
    """The figure of a call's result, with its downloads; return the result, or None while there is none.

    Args:
        name: Of the figure: of its files, and of its place on the page.
        shown: Gives the result that is drawn.
        what: In words, for progress.
        picked: Called with the row that is clicked.
        passes: As for `result`.
        ask: As for `result`.
        param: The figure's selection.
        options: Of `interp.chart`.
    """
    drawn = call("figure", "interp.chart", shown, **options)
    spec = result(drawn.method("spec", "to_dict"), what, passes=passes, ask=ask)
    if spec is None:
        return None
    found = result(shown, what)
    drawing(name, drawn, spec, found, picked=picked, param=param)
    return found


def drawing(
    name: str, drawn: Call, spec: dict[str, Any], found: Any = None, *,
    picked: Callable[[dict[str, Any]], None] | None = None, param: str = "pick",
) -> None:  # fmt: skip
    """A figure by its specification, with its downloads; see `figure`."""
    key = f"figure {name} {drawn.key}"
    listens: dict[str, Any] = {}
    if picked is not None:

        def clicked() -> None:
            rows = st.session_state[key]["selection"].get(param)
            if rows:
                picked(dict(rows[0]))

        listens = {"on_select": clicked, "selection_mode": param}
    sized = spec | {"autosize": {"type": "pad", "contains": "padding"}}
    st.vega_lite_chart(spec=sized, theme=None, width="content", key=key, **listens)
    _keep(name, drawn, spec, found)


def _keep(name: str, drawn: Call, spec: dict[str, Any], found: Any) -> None:
    """Downloads of a figure, and the Python that makes it."""
    with st.popover("Save or copy", type="tertiary"):
        files = st.columns(4)
        kinds = {"PNG": ("image/png", _png), "SVG": ("image/svg+xml", _svg), "CSV": ("text/csv", _csv)}
        kinds["JSON"] = ("application/json", _json)
        for column, (kind, (mime, make)) in zip(files, kinds.items(), strict=True):
            column.download_button(
                kind, data=lambda make=make: make(spec, found), file_name=f"{name}.{kind.lower()}", mime=mime,
                key=f"save {kind} {name} {drawn.key}", on_click="ignore",
            )  # fmt: skip
        st.caption("Picture, the numbers as a table, or the figure as Vega-Lite. The same as Python:")
        st.code(script(drawn), language="python")


def _png(spec: dict[str, Any], _: Any) -> bytes:
    import vl_convert

    return vl_convert.vegalite_to_png(spec, scale=2)


def _svg(spec: dict[str, Any], _: Any) -> bytes:
    import vl_convert

    return vl_convert.vegalite_to_svg(spec).encode()


def _csv(spec: dict[str, Any], found: Any) -> bytes:
    import csv
    import io

    rows = found.to_records() if hasattr(found, "to_records") else drawn_rows(spec)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for r in rows for k in r)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _json(spec: dict[str, Any], _: Any) -> bytes:
    import json

    return json.dumps(spec, ensure_ascii=False, allow_nan=False).encode()


def drawn_rows(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a figure's data sets, without pictures."""
    sets = spec.get("datasets", {})
    return [{"set": name, **row} for name, rows in sets.items() for row in rows if "url" not in row]
