"""Page Prompt: what the model says next, layer by layer; what heads look at; which places carry the answer."""

from typing import Any

import streamlit as st

from interp.apps.explorer import controls, desk
from interp.apps.explorer.calls import call
from interp.apps.explorer.controls import Asked
from interp.apps.explorer.state import bound, link, put

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")
_ROWS = 32  # patched runs in one forward call


def show() -> None:
    """The page."""
    asked = controls.prompt()
    at = controls.position(asked)
    left, right = st.columns([2, 3], gap="large")
    with left:
        st.subheader("What comes next", anchor=False)
        desk.figure("next-tokens", controls.next_tokens(asked, at), "next tokens")
    with right:
        st.subheader("What is followed", anchor=False)
        pair = controls.target_and_foil(asked, at)
    if pair is None:
        return
    _lens(asked, at, pair)
    _attention(asked)
    _patching(asked, at, pair)


def _lens(asked: Asked, at: int, pair: tuple[Any, Any]) -> None:
    st.subheader("The answer, layer by layer", anchor=False)
    where, column, said = controls.lens_window(asked, at)
    lens = call("lens", "interp.logit_lens", asked.model, asked.prompt, [*pair], **where)
    desk.figure("logit-lens", lens, "logit lens", picked=_place, param="column", **column)
    st.caption(
        f"{said}Each cell is the token that the layer would give if it were the last; lines are the ranks of target "
        "and foil. Click a column to read there."
    )


def _place(row: dict[str, Any]) -> None:
    put(position=str(row["position"]))


def _attention(asked: Asked) -> None:
    st.subheader("What heads look at", anchor=False)
    layer, head = controls.head(asked)
    patterns = call("patterns", "interp.attention_patterns", asked.model, asked.prompt, layer)
    left, right = st.columns([5, 6], gap="large")
    with left:
        desk.figure(f"attention-layer-{layer}", patterns, "attention patterns", columns=4, size=96)
        st.caption("All heads of the layer. Rows look, columns are looked at; darker is more.")
    with right:
        desk.figure(f"attention-L{layer}H{head}", patterns, "attention patterns", head=head, size=480)
        st.caption("One head: each row sums to 1. Colours follow the square root, so that small weights are seen.")


def _patching(asked: Asked, at: int, pair: tuple[Any, Any]) -> None:
    st.subheader("Which places carry the answer", anchor=False)
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    with left:
        st.text_input("Corrupt prompt: of as many tokens, with another answer", **bound("corrupt"))
    with right:
        st.selectbox("Patched", SITES, **bound("sites"))
    if not link()["corrupt"]:
        st.caption("Values of the prompt above are put into the run of a corrupt prompt, a place at a time.")
        return
    sites = link()["sites"]
    by = ["layer", "head"] if sites in ("z", "q", "k", "v", "pattern") else ["layer", "position"]
    cells = asked.live.n_layers * (_heads(asked, sites) if "head" in by else len(asked.tokens))
    where = {} if at == len(asked.tokens) - 1 else {"position": at}
    grid = call(
        "grid", "interp.patch_grid", asked.model, asked.prompt, link()["corrupt"], controls.observable(asked, pair),
        sites=sites, by=by, **where, batch_size=_ROWS,
    )  # fmt: skip
    passes = -(-cells // _ROWS) + 2
    found = desk.figure(
        "patching", grid, "patching", picked=_cell, passes=passes, ask=f"Patch {cells} places ({passes} passes)"
    )
    if found is not None:
        st.caption(
            "0: as the corrupt run, 1: the answer of the prompt above is restored. Click a cell for its numbers."
        )
        place = st.session_state.get("cell")
        rows = [r for r in found.to_records() if _name(r, found.axes) == place]
        for row in rows:
            st.write(
                f"**{desk.escaped(str(place))}**: effect {row['effect']:+.4f}, normalised {row['normalised']:+.4f}"
            )


def _heads(asked: Asked, sites: str) -> int:
    layout = asked.live.layout
    assert layout is not None
    return (layout.n_kv_heads if sites in ("k", "v") else layout.n_heads) or 1


def _cell(row: dict[str, Any]) -> None:
    st.session_state["cell"] = row["place"]


def _name(row: dict[str, Any], axes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]}" for name in axes)
