"""What a session is looking at: fields that stand in the address, so that a link opens the same page."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

# What a lens is averaged over, one text a line: from the Universal Declaration of Human Rights.
TEXTS = (
    "Everyone has the right to life, liberty and security of person. No one shall be held in slavery or servitude.\n"
    "Everyone has the right to education. Education shall be free, at least in the elementary and fundamental stages."
)
DEFAULTS = {
    "page": "", "model": "", "prompt": "When Mary and John went to the store, John gave a drink to", "target": "",
    "foil": "", "corrupt": "", "position": "", "layer": "", "head": "", "path": "", "sites": "resid_pre",
    "image_model": "", "image": "sample:china.jpg", "class": "", "against": "", "pixel": "", "out": "", "run": "",
    "other": "", "dose": "", "input": "text", "between": "", "texts": TEXTS,
    "split": "", "measure": "", "complexity": "", "example": "",
}  # fmt: skip
# What the built-in prompt is compared with, on the model that it was chosen for.
_EXAMPLE = {
    "target": " Mary", "foil": " John", "corrupt": "When Mary and John went to the store, Mary gave a drink to",
}  # fmt: skip
_LONGEST = 6000  # characters of a field that still go into an address


def link() -> dict[str, str]:
    """The fields of this session; at first as the address says."""
    if "link" not in st.session_state:
        given = {k: v for k, v in st.query_params.to_dict().items() if k in DEFAULTS}
        said = settings() | given
        plain = not {"prompt", "model", "target", "foil"} & set(said)
        st.session_state["link"] = DEFAULTS | (_EXAMPLE if plain else {}) | said
    return st.session_state["link"]


def settings() -> dict[str, str]:
    """What the command line said."""
    names = {"model": "INTERP_EXPLORE_MODEL", "run": "INTERP_EXPLORE_RUN"}
    found = {field: os.environ.get(name, "") for field, name in names.items()}
    found["run"] = Path(found["run"]).name if found["run"] else ""
    return {k: v for k, v in found.items() if v}


def runs_folder() -> Path:
    """The folder of runs: of the run that the command line named, or ./runs."""
    given = os.environ.get("INTERP_EXPLORE_RUN", "")
    return Path(given).absolute().parent if given else Path(os.environ.get("INTERP_EXPLORE_RUNS", "runs")).absolute()


def write_address() -> list[str]:
    """Put the fields into the address; return the names of those that are too long for one."""
    said = {k: v for k, v in link().items() if v and v != DEFAULTS[k]}
    long = [k for k, v in said.items() if len(v) > _LONGEST]
    st.query_params.from_dict({k: v for k, v in said.items() if k not in long})
    return long


def session() -> str:
    """This session's own name."""
    return st.session_state.setdefault("session", uuid.uuid4().hex)


def put(**fields: str) -> None:
    """Set fields; what is shown changes with the next run of the page."""
    link().update(fields)


def bound(
    field: str, read: Callable[[str], Any] = str, write: Callable[[Any], str] = str, also: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Arguments ``key`` and ``on_change`` that tie a control to a field.

    Args:
        field: The field.
        read: From the field's text to the control's value.
        write: Back; None of a control is an empty field.
        also: Fields that are emptied when this one changes.
    """
    key = f"control {field}"
    st.session_state[key] = read(link()[field])

    def changed() -> None:
        given = st.session_state[key]
        put(**{field: "" if given is None else write(given)}, **dict.fromkeys(also, ""))

    return {"key": key, "on_change": changed}
