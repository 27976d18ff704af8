"""Page Linear map: a network around one input as F x + r, for tokens, classes and pictures."""

from typing import Any

import streamlit as st

from interp.apps.explorer import controls, desk, pictures
from interp.apps.explorer.calls import Call, call, value
from interp.apps.explorer.controls import Asked
from interp.apps.explorer.state import bound, link, put
from interp.hooks.model import Model
from interp.hooks.packaged import IMAGE_CLASSIFIER, IMAGE_TO_IMAGE

_BLOCKS = 48  # tokens of a heat map of blocks
_PROBES = 16
_CLASSES = 8


def show() -> None:
    """The page."""
    kind = st.sidebar.segmented_control("Input", ["text", "picture"], required=True, **bound("input"))
    if kind == "picture":
        _picture()
    else:
        _text()


# Text -----------------------------------------------------------------------------------------------------------------


def _text() -> None:
    asked = controls.prompt()
    at = controls.position(asked)
    pair = controls.target_and_foil(asked, at)
    if pair is None:
        return
    scope = call("scope", "interp.LinearScope", asked.model, asked.prompt)
    where = {} if at == len(asked.tokens) - 1 else {"position": at}
    margin = {"margin_to": pair[1], **where}
    left, right = st.columns(2, gap="large")
    with left:
        _votes(scope, pair[0], margin)
    with right:
        _biases(scope, pair[0], margin)
    _blocks(asked, scope)


def _votes(scope: Call, target: Any, margin: dict[str, Any], **options: Any) -> None:
    st.subheader("Votes" if options else "Which tokens vote", anchor=False)
    noisy = st.toggle("Test against small noise", key="stability")
    votes = scope.method("votes", "votes", target, **margin, **({"stability": True} if noisy else {}))
    if desk.figure("votes", votes, "the linear map and its votes", **options) is not None:
        st.caption(
            "Votes and r sum to the network's own value. Patterns, norms and gates are held as they are for this "
            "input: a vote is not what would happen if the input were another."
        )


def _biases(scope: Call, target: Any, margin: dict[str, Any]) -> None:
    st.subheader("What r is made of", anchor=False)
    report = scope.method("report", "bias_report", target, **margin)
    found = desk.result(report, "constants")
    if found is None:
        return
    if not found.values.any():
        st.caption("Nothing: this network adds no constants on the way to the output (r = 0).")
        return
    desk.figure("biases", report, "constants")
    st.caption("What the constants of each module put into the output, in the order in which they run; they sum to r.")


def _blocks(asked: Asked, scope: Call) -> None:
    st.subheader("From each token to each position", anchor=False)
    n = len(asked.tokens)
    where = {} if n <= _BLOCKS else {"positions": list(range(n - _BLOCKS, n))}
    passes = min(n, _BLOCKS) * _PROBES
    blocks = scope.method("blocks", "token_blocks", **where, probes=_PROBES)
    if desk.figure("token-blocks", blocks, "norms of blocks", ask=f"Estimate norms of blocks ({passes} rows)"):
        st.caption("Norm of the block of F from each input token to the logits at each position, from random probes.")


# Pictures -------------------------------------------------------------------------------------------------------------


def _picture() -> None:
    model = controls.model_choice("image_model", (IMAGE_CLASSIFIER, IMAGE_TO_IMAGE))
    live = desk.result(model, f"loading {link()['image_model']}")
    if live is None:
        return
    classes = live.labels is not None
    path = pictures.choose(crop=not classes)
    if path is None:
        return
    pixels = model.method("pixels", "preprocess", value("picture", path))
    if classes:
        _classes(live, model, pixels)
    else:
        _to_picture(call("scope", "interp.LinearScope", model, pixels))


def _classes(live: Model, model: Call, pixels: Call) -> None:
    scope = call("scope", "interp.LinearScope", model, pixels)
    st.subheader("What the network sees: F x, r and their sum", anchor=False)
    found = desk.result(scope, "the linear map")
    if found is None:
        return
    desk.figure("outputs", scope, "outputs in parts", top=_CLASSES)
    labels = live.labels or []
    likely = found.y[0].topk(_CLASSES).indices.tolist()
    names = [labels[i] for i in likely]
    left, right = st.columns(2)
    link()["class"] = link()["class"] if link()["class"] in labels else names[0]
    shown = lambda name: desk.escaped(name.split(",")[0] or "none")
    with left:
        st.selectbox("Class", [*dict.fromkeys([*names, link()["class"]])], format_func=shown, **bound("class"))
    with right:
        others = ["", *(n for n in names if n != link()["class"])]
        given = link()["against"] if link()["against"] in others else ""
        link()["against"] = given
        st.selectbox("Margin to", others, format_func=shown, **bound("against"))
    margin = {"margin_to": link()["against"]} if link()["against"] else {}
    left, right = st.columns([6, 5], gap="large")
    with left:
        _votes(scope, link()["class"], margin, picture=_seen(model, pixels), size=400)
    with right:
        _biases(scope, link()["class"], margin)
    _receptive(scope, link()["class"])


def _seen(model: Call, pixels: Call) -> Call:
    """The picture as the network sees it, for the ground of a map."""
    return model.attribute("preprocess", "preprocess").method("seen", "undo", pixels)


def _receptive(scope: Call, name: str) -> None:
    st.subheader("The row of F", anchor=False)
    desk.figure("row", scope, "a row of F", at=name, size=300)
    st.caption("What the class reads at each pixel, summed over colours: votes are this times the picture.")


def _to_picture(scope: Call) -> None:
    st.subheader("The picture, its output, F x and r", anchor=False)
    if desk.figure("parts", scope, "the linear map", figure="parts", size=220) is None:
        return
    st.subheader("One pixel", anchor=False)
    row, column = _pixel()
    left, right = st.columns([2, 3], gap="large")
    with left:
        desk.figure("pixels", scope, "the picture", picked=_clicked, figure="pixels", at=(row, column))
        st.caption("Click a pixel.")
    found = desk.result(scope, "the linear map")
    with right:
        desk.figure("impulse", scope, "impulse response", figure="impulse", at=(row, column))
        scale = found.out_shape[-1] // found.in_shape[-1] if found is not None else 1
        desk.figure("receptive", scope, "receptive filter", figure="receptive", at=(row * scale, column * scale))
        st.caption("Above: what the pixel projects into the output. Below: what the output pixel there reads.")
    if found is not None:
        _pairs(scope, found.in_shape[-2:], scale)


def _pixel() -> tuple[int, int]:
    parts = link()["pixel"].split(",")
    good = len(parts) == 2 and all(p.isdigit() for p in parts)
    link()["pixel"] = link()["pixel"] if good else "24,24"
    st.text_input("Pixel: row,column", **bound("pixel"))
    parts = link()["pixel"].split(",")
    good = len(parts) == 2 and all(p.strip().isdigit() for p in parts)
    return (int(parts[0]), int(parts[1])) if good else (0, 0)


def _clicked(row: dict[str, Any]) -> None:
    put(pixel=row["pixel"])


def _pairs(scope: Call, size: tuple[int, ...], scale: int) -> None:
    """Of the inside of the picture: at its edge, padding rules."""
    st.subheader("Singular pairs", anchor=False)
    inside = [(n // 6, n - n // 6) for n in size]
    window = lambda factor: (..., *(slice(factor * low, factor * high) for low, high in inside))
    svd = scope.method("inside", "restrict", window(scale), window(1)).method("svd", "svd", 6)
    if desk.figure("singular-pairs", svd, "singular pairs", ask="Compute six singular pairs", figure="pairs") is None:
        return
    desk.figure("singular-values", svd, "singular values")
    st.caption("Each v is what the network passes on most, above the u that it becomes; colours about grey.")
