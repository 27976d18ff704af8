"""Controls that pages share: the model, the prompt with its tokens, target and foil."""

import os
from dataclasses import dataclass
from typing import Any

import streamlit as st

from interp.apps.explorer import desk
from interp.apps.explorer.calls import Call, call, value
from interp.apps.explorer.state import bound, link
from interp.hooks.errors import ArgumentError, InputError
from interp.hooks.model import Model
from interp.hooks.packaged import LANGUAGE_MODEL, PACKAGED

MOST_TOKENS = 1024
_MOST_CHARACTERS = 100_000
_PILLS = 64
_COLUMNS = 24  # tokens of a lens: more are cut off on the left


@dataclass(frozen=True)
class Asked:
    """A prompt on a model.

    Attributes:
        model: Loads the model.
        live: The model.
        prompt: The text.
        tokens: Its tokens.
    """

    model: Call
    live: Model
    prompt: Call
    tokens: list[str]


def offered(kinds: tuple[str, ...] = (LANGUAGE_MODEL,)) -> list[str]:
    """Names of models to choose from: what the command line named, then packaged ones."""
    names = [name for name, model in PACKAGED.items() if model.kind in kinds]
    given = os.environ.get("INTERP_EXPLORE_MODEL", "")
    return [given, *(n for n in names if n != given)] if given and LANGUAGE_MODEL in kinds else names


def model_choice(field: str, kinds: tuple[str, ...], where=st.sidebar) -> Call:
    """Choose among packaged models of some kinds and the one that the command line named."""
    names = offered(kinds)
    wanted = link()[field] or names[0]
    if wanted not in names:
        desk.complain(
            ArgumentError(
                f"model {wanted!r} in the address", f"one of {', '.join(names)}",
                f"start the explorer with interp explore --model {wanted}",
            )
        )  # fmt: skip
        st.stop()
    link()[field] = wanted
    name = where.selectbox("Model", names, **bound(field, also=("target", "foil")))
    return call("model", "interp.load", name)


def prompt() -> Asked:
    """The model, the prompt and its tokens; the page ends with a word where there is none of them."""
    model = model_choice("model", (LANGUAGE_MODEL,))
    st.text_area("Prompt", height=80, **bound("prompt", also=("position", "target", "foil", "path")))
    text = link()["prompt"]
    if not text:
        desk.complain(InputError("an empty prompt", "at least one character", "write something into the box"))
        st.stop()
    if len(text) > _MOST_CHARACTERS:
        desk.complain(
            InputError(f"a prompt of {len(text):,} characters", f"at most {_MOST_CHARACTERS:,}", "shorten it")
        )
        st.stop()
    live = desk.result(model, f"loading {link()['model']}")
    if live is None:
        st.stop()
    given = value("prompt", text)
    table = desk.result(model.method("tokens", "tokens", given), "reading the prompt")
    if table is None:
        st.stop()
    if len(table) > MOST_TOKENS:
        do = "shorten it; the library itself takes more"
        desk.complain(InputError(f"a prompt of {len(table):,} tokens", f"at most {MOST_TOKENS:,} here", do))
        st.stop()
    return Asked(model, live, given, [row["token"] for row in table])


def position(asked: Asked) -> int:
    """Choose a token of the prompt; the last one at first."""
    n = len(asked.tokens)
    at = link()["position"]
    chosen = int(at) if at.lstrip("-").isdigit() and -n <= int(at) < n else n - 1
    link()["position"] = str(chosen % n)
    if n <= _PILLS:
        st.pills(
            "Read behind", range(n), format_func=lambda i: desk.token(asked.tokens[i]), required=True,
            wrap=True, **bound("position", int),
        )  # fmt: skip
    else:
        st.slider(f"Read behind the token at (of {n})", 0, n - 1, **bound("position", int))
        st.caption(
            desk.escaped("".join(asked.tokens[max(0, int(link()["position"]) - 12) : int(link()["position"]) + 1]))
        )
    return int(link()["position"] or n - 1)


def target_and_foil(asked: Asked, at: int) -> tuple[str | int, str | int] | None:
    """Choose target and foil among the likely tokens, or write them."""
    likely = desk.result(next_tokens(asked, at), "next tokens")
    if likely is None:
        return None
    words = [_spelled(asked.live, row["id"], row["token"]) for row in likely]
    found = []
    for field, label, usual in (("target", "Target", words[0]), ("foil", "Foil", words[1])):
        link()[field] = link()[field] or (usual if usual not in found else words[0])
        options = [*words, *([] if link()[field] in words else [link()[field]])]
        left, right = st.columns([6, 1.3], vertical_alignment="bottom")
        with left:
            st.pills(label, options, format_func=_shown, required=True, wrap=True, **bound(field))
        with right:
            key = f"write {field}"
            st.text_input(f"other {label.lower()}", key=key, placeholder="␣Mary", on_change=_write, args=(field, key))
        found.append(link()[field])
    return _term(found[0]), _term(found[1])


def pair() -> list[str | int]:
    """Target and foil, where they were chosen."""
    return [_term(link()[field]) for field in ("target", "foil") if link()[field]]


def lens_window(asked: Asked, at: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Positions that a lens reads, the column of its figure that is open, and a word on what is left out."""
    n = len(asked.tokens)
    if n <= _COLUMNS:
        return {}, {} if at == n - 1 else {"position": at}, ""
    shown = range(max(0, at + 1 - _COLUMNS), max(at + 1, _COLUMNS))
    column = {} if at == shown[-1] else {"position": at - shown[0]}
    return {"positions": list(shown)}, column, f"Shown are the {len(shown)} tokens up to the chosen one. "


def next_tokens(asked: Asked, at: int, k: int = 10, **options) -> Call:
    """The likely tokens behind a position."""
    where = {} if at == len(asked.tokens) - 1 else {"position": at}
    return call("likely", "interp.next_tokens", asked.model, asked.prompt, k, **where, **options)


def observable(asked: Asked, pair: tuple[str | int, str | int]) -> Call:
    """Target's logit minus the foil's."""
    return call("observable", "interp.Observable.logit_diff", asked.model, *pair)


def _write(field: str, key: str) -> None:
    """A token that was typed: ␣ stands for a space."""
    typed = st.session_state[key].replace("␣", " ")
    if typed:
        link()[field] = typed
        st.session_state[key] = ""


def _spelled(model: Model, index: int, text: str) -> str:
    """A token's text, or #id where the text encodes to something else."""
    ids = model.tokenizer.encode(text, add_special_tokens=False) if text else []
    return text if ids == [index] and not text.startswith("#") else f"#{index}"


def _term(text: str) -> str | int:
    return int(text[1:]) if text.startswith("#") and text[1:].isdigit() else text


def _shown(text: str) -> str:
    return desk.escaped(text) if text.startswith("#") else desk.token(text)


def layer(asked: Asked) -> int:
    """Choose a layer."""
    return _index("layer", "Layer", asked.live.n_layers)


def head(asked: Asked) -> tuple[int, int]:
    """Choose a layer and a head."""
    left, right = st.columns(2)
    with left:
        chosen = layer(asked)
    with right:
        return chosen, _index("head", "Head", asked.live.layout.n_heads or 1)  # type: ignore[union-attr]


def _index(field: str, label: str, most: int) -> int:
    given = link()[field]
    link()[field] = given if given.isdigit() and int(given) < most else "0"
    return int(st.selectbox(label, range(most), **bound(field, int)))
