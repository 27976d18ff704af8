"""Page Jacobians: spectra by layer, what tokens have in common at one, and a lens of averaged Jacobians."""

from typing import Any

import streamlit as st

from interp.apps.explorer import controls, desk
from interp.apps.explorer.calls import call
from interp.apps.explorer.controls import Asked
from interp.apps.explorer.state import bound, link, put
from interp.hooks.errors import InputError

_BETWEEN = {
    "whole block": ("hook_resid_pre", "hook_resid_post"),
    "MLP": ("hook_resid_mid", "hook_mlp_out"),
    "attention": ("hook_resid_pre", "hook_attn_out"),
}
_VALUES, _TOKENS = 8, 24
_LENS_TOKENS = 48  # where a text that a lens is averaged over is cut


def show() -> None:
    """The page."""
    asked = controls.prompt()
    at = controls.position(asked)
    link()["between"] = link()["between"] if link()["between"] in _BETWEEN else "whole block"
    between = st.segmented_control("Jacobian of", list(_BETWEEN), required=True, **bound("between"))
    ends = _BETWEEN[between]
    _by_layer(asked, at, ends)
    _by_token(asked, ends)
    _lens(asked, at)


def _by_layer(asked: Asked, at: int, ends: tuple[str, str]) -> None:
    st.subheader("Spectra by layer", anchor=False)
    spectra = call("spectra", "interp.layer_spectra", asked.model, asked.prompt, *ends, _VALUES, positions=[at])
    ask = f"Compute {_VALUES} singular values of {asked.live.n_layers} layers"
    if desk.figure("spectra", spectra, "spectra", picked=_layer, ask=ask, height=240) is not None:
        st.caption(
            f"Largest singular values of the exact Jacobian at {desk.token(asked.tokens[at])} (position {at}): how "
            "much a small change of what the block reads is stretched. Click a point to choose its layer."
        )


def _layer(row: dict[str, Any]) -> None:
    put(layer=str(row["layer"]))


def _by_token(asked: Asked, ends: tuple[str, str]) -> None:
    st.subheader("Token by token at one layer", anchor=False)
    layer = controls.layer(asked)
    n = len(asked.tokens)
    places = list(range(max(0, n - _TOKENS), n))
    names = [asked.tokens[p] for p in places]
    sites = [f"blocks.{layer}.{end}" for end in ends]
    left, right = st.columns(2, gap="large")
    reduce = lambda how: call(
        "summary", "interp.jacobian", asked.model, asked.prompt, *sites, positions=places, reduce=how
    )
    ask = f"Compute the Jacobians of {len(places)} tokens"
    with left:
        found = desk.figure("similarity", reduce("gram"), "similarity of tokens", ask=ask, labels=names)
        if found is None:
            return
        st.caption("Cosine of two tokens' Jacobians: 1 where the layer does the same to both.")
    with right:
        desk.figure("singular-values", reduce(f"svd:{_VALUES}"), "singular values")
        st.caption("Singular values of these Jacobians: the median over tokens.")


def _lens(asked: Asked, at: int) -> None:
    st.subheader("A lens of averaged Jacobians", anchor=False)
    st.text_area("Averaged over these texts, one a line, of more than 17 tokens", height=80, **bound("texts"))
    texts = [line for line in link()["texts"].splitlines() if line.strip()]
    if not texts:
        desk.complain(InputError("no text to average over", "at least one line"))
        return
    where, column, said = controls.lens_window(asked, at)
    fitted = call("lens", "interp.JacobianLens.fit", asked.model, texts, max_tokens=_LENS_TOKENS)
    lens = desk.result(fitted, "fitting a lens", ask=f"Fit a lens on {len(texts)} texts")
    if lens is None:
        return
    pair = controls.pair()
    read = fitted.method("read", "readout", asked.model, asked.prompt, pair, **where)
    desk.figure("jacobian-lens", read, "Jacobian lens", **column)
    st.caption(
        f"{said}Each cell is what the layer will say: its stream is carried to the last layer by the Jacobian averaged "
        f"over {lens.tokens} tokens of {lens.count} texts. Below, for comparison, the logit lens."
    )
    plain = call("plain", "interp.logit_lens", asked.model, asked.prompt, pair, **where)
    desk.figure("logit-lens", plain, "logit lens", **column)
