"""Page Observables: which heads and MLPs, from which tokens, along which paths; and what steering along one does."""

import re
from typing import Any

import streamlit as st

from interp.apps.explorer import controls, desk
from interp.apps.explorer.calls import Call, call
from interp.apps.explorer.controls import Asked
from interp.apps.explorer.state import bound, link, put

_OTHERS = 3
_DOSES = [-1.0, -0.5, 0.0, 0.5, 1.0]


def show() -> None:
    """The page."""
    asked = controls.prompt()
    at = controls.position(asked)
    pair = controls.target_and_foil(asked, at)
    if pair is None:
        return
    measured = controls.observable(asked, pair)
    _attribution(asked, pair, at, measured)
    path = _path(asked, at, measured)
    if path:
        vector = call("vector", "interp.propagate", asked.model, measured, asked.prompt, path=path)
        found = desk.result(vector, "feature vector")
        if found is not None:
            _vector(path, vector)
            _steering(asked, at, measured, vector)


def _place(at: int, asked: Asked) -> dict[str, int]:
    return {} if at == len(asked.tokens) - 1 else {"position": at}


def _attribution(asked: Asked, pair: tuple[Any, Any], at: int, measured: Call) -> None:
    st.subheader("Which heads and MLPs", anchor=False)
    found = call(
        "attribution",
        "interp.direct_attribution",
        asked.model,
        measured,
        asked.prompt,
        unit="source",
        **_place(at, asked),
    )
    if desk.figure("attribution", found, "attribution", picked=_head_of) is None:
        return
    st.caption(
        "What each part itself adds to target minus foil; all parts sum to the model's own value. What a head does by "
        "way of later layers counts as theirs. Click a head to see what it reads."
    )
    layer, head = controls.head(asked)
    left, right = st.columns([5, 4], gap="large")
    with left:
        st.subheader(f"What the heads of layer {layer} read", anchor=False)
        desk.figure(f"sources-L{layer}", found, "sources", picked=_source, figure="sources", layer=layer)
        st.caption("The parts of each head by the token that it reads. Click a cell to follow it.")
    with right:
        st.subheader(f"What L{layer}H{head} says of other tokens", anchor=False)
        _couplings(asked, pair, at, layer, head)


def _head_of(row: dict[str, Any]) -> None:
    if match := re.fullmatch(r"L(\d+)H(\d+)", row["component"]):
        put(layer=match[1], head=match[2])
    elif match := re.match(r"L(\d+) ", row["component"]):
        put(layer=match[1])


def _source(row: dict[str, Any]) -> None:
    """A head with the token that it reads: the path begins there."""
    match = re.fullmatch(r"L(\d+)H(\d+)@(\d+)", row["component"])
    if match:
        put(layer=match[1], head=match[2], path=f"{row['component']} -> logits@{_logits()}")


def _logits() -> str:
    return link()["position"] or "-1"


def _path(asked: Asked, at: int, measured: Call) -> str:
    """Follow a path back from the logits, one part at a time; return it."""
    st.subheader("Follow a path", anchor=False)
    left, back, again = st.columns([5, 1, 1], vertical_alignment="bottom")
    with left:
        st.text_input("Path, in execution order", placeholder="L23H3@9 -> logits@-1", **bound("path"))
    path = link()["path"]
    back.button("Back", on_click=_shorten, disabled=not path)
    again.button("Start again", on_click=put, kwargs={"path": ""}, disabled=not path)
    given = [path] if path else []
    longer = call(
        "longer",
        "interp.extend_path",
        asked.model,
        measured,
        asked.prompt,
        *given,
        **({} if path else _place(at, asked)),
    )
    if path.startswith("embed"):
        st.caption("The path begins at the embedding: nothing feeds it.")
    elif desk.figure("paths", longer, "paths", picked=_longer, top=14) is None:
        return ""
    else:
        st.caption(
            "Every part that can feed the path at its beginning, largest score first: what is lost when only that is "
            "taken away, and its score to first order. Click a bar to go on from there."
        )
    return path


def _longer(row: dict[str, Any]) -> None:
    put(path=row["path"])


def _shorten() -> None:
    put(path=" -> ".join(link()["path"].split(" -> ")[1:]) if link()["path"].count("->") > 1 else "")


def _vector(path: str, vector: Call) -> None:
    found = desk.workshop().get(vector)
    st.subheader("Its feature vector", anchor=False)
    st.write(
        f"Along `{path}` the model reads **{desk.escaped(str(found.site))}** with a vector of norm {found.norm:.4g}, "
        f"offset {found.offset:+.4g}."
    )
    desk.figure("feature-vector", vector, "feature vector")
    st.caption("Tokens whose embeddings score highest and lowest: meaningful where the stream still resembles them.")


def _couplings(asked: Asked, pair: tuple[Any, Any], at: int, layer: int, head: int) -> None:
    """The head's vectors of this and other observables, from the weights alone."""
    likely = desk.result(controls.next_tokens(asked, at), "next tokens")
    if likely is None:
        return
    others = [row["token"] for row in likely if row["token"] not in pair][:_OTHERS]
    wanted = [controls.observable(asked, (pair[0], word)) for word in (pair[1], *others)]
    found = call("couplings", "interp.couplings", asked.model, wanted, [f"L{layer}H{head}"])
    desk.figure("couplings", found, "couplings")
    st.caption(
        "What the head reads for other foils, from weights alone; 1: what moves the row moves the column as much."
    )


def _steering(asked: Asked, at: int, measured: Call, vector: Call) -> None:
    found = desk.workshop().get(vector)
    st.subheader("Steer along it", anchor=False)
    doses = call(
        "response", "interp.dose_response", asked.model, measured, asked.prompt, vector, _DOSES, **_place(at, asked)
    )
    left, right = st.columns([5, 6], gap="large")
    with left:
        response = desk.figure("steering", doses, "steering", passes=11, width=320)
        st.caption("Dashed: first order. Grey: random directions of the same length.")
    if response is None:
        return
    with right:
        st.slider("Dose", -1.5, 1.5, step=0.1, **bound("dose", lambda text: float(text or 0.5), lambda x: f"{x:g}"))
        dose = float(link()["dose"] or 0.5)
        direction = vector.method("unit", "normalized").attribute("direction", "vector")
        step = call(
            "step", "interp.Add", str(found.site.whole), direction, scale=round(dose * response.size, 4),
            positions=[found.position],
        )  # fmt: skip
        before, after = st.columns(2)
        with before:
            st.caption("As the model is")
            desk.figure("unsteered", controls.next_tokens(asked, at), "next tokens", width=130)
        with after:
            st.caption(f"Dose {dose:+.1f} at {desk.escaped(str(found.site))}")
            desk.figure("steered", controls.next_tokens(asked, at, plan=[step]), "steered tokens", width=130)
