"""Pictures of a session: samples and uploads, kept as files, so that Python outside can read the same pixels."""

import hashlib
import io
import re
import tempfile
from pathlib import Path
from typing import Any

import streamlit as st

from interp.apps.explorer import desk
from interp.apps.explorer.state import bound, link
from interp.hooks.errors import ArgumentError, InputError, InterpError
from interp.runs.scope_specs import open_picture

_SAMPLES = ("sample:china.jpg", "sample:flower.jpg")
_SIDE = 48
_MOST_PIXELS = 40_000_000


def folder() -> Path:
    """Where pictures are kept on this machine."""
    made = Path(tempfile.gettempdir()) / "interp-explorer"
    made.mkdir(exist_ok=True)
    return made


def choose(crop: bool) -> str | None:
    """Choose a sample or upload a file; return the path of a PNG file, or None after a word on why not.

    Args:
        crop: Whether a small square is cut out, as networks from pictures to pictures need.
    """
    left, right = st.columns([1, 2])
    with right:
        st.file_uploader("Your own picture", key="upload", on_change=_uploaded)
    with left:
        given = link()["image"]
        st.radio("Picture", [*_SAMPLES, *([given] if given not in _SAMPLES else [])], **bound("image"))
    try:
        picture = _opened(link()["image"])
        return _kept(_cut(picture) if crop else picture)
    except InterpError as error:
        desk.complain(error)
        return None


def _uploaded() -> None:
    file = st.session_state["upload"]
    if file is None:
        return
    data = file.getvalue()
    name = hashlib.sha256(data).hexdigest()[:16]
    (folder() / name).write_bytes(data)
    link()["image"] = f"upload:{name}"


def _opened(name: str) -> Any:
    """The picture of a sample or an upload; an address cannot name other files."""
    if name in _SAMPLES:
        return open_picture(name)
    digest = name.removeprefix("upload:")
    if not re.fullmatch(r"[0-9a-f]{16}", digest) or not (folder() / digest).is_file():
        raise ArgumentError(f"picture {name!r}", f"one of {', '.join(_SAMPLES)}, or a file uploaded here")
    from PIL import Image

    try:
        with Image.open(io.BytesIO((folder() / digest).read_bytes())) as header:
            size = header.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError("an uploaded file that is no picture", "a PNG, JPEG or the like") from error
    if size[0] * size[1] > _MOST_PIXELS:
        raise InputError(f"a picture of {size[0]} x {size[1]}", f"at most {_MOST_PIXELS:,} pixels", "make it smaller")
    return open_picture(str(folder() / digest))


def _cut(picture: Any) -> Any:
    """A small square, placed by two sliders."""
    side = min(_SIDE, *picture.size)
    places = []
    for column, name, most in zip(st.columns(2), ("left", "top"), picture.size, strict=True):
        key, room = f"crop {name}", most - side
        at = min(st.session_state.setdefault(key, room // 2), room)
        st.session_state[key] = at
        places.append(column.slider(f"Square of {side}: {name}", 0, room, key=key) if room else 0)
    x, y = places
    return picture.crop((x, y, x + side, y + side))


def _kept(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    path = folder() / f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.png"
    if not path.is_file():
        path.write_bytes(buffer.getvalue())
    return str(path)
