"""What Streamlit runs: the frame around the pages."""

import importlib
from pathlib import Path

import streamlit as st
import torch
from PIL import Image

from interp.apps.explorer import desk
from interp.apps.explorer.runs import ALIGNMENTS, PROBING, results_of
from interp.apps.explorer.state import bound, link, runs_folder, write_address
from interp.hooks.errors import ArgumentError, InterpError
from interp.plots.pictures import signed
from interp.runs.run import Run

# Pages of what the open run holds, with the types of results that they show.
_MORE = {"Probes": "probes", "Alignment": "alignment"}
_SHOWN = {"Probes": PROBING, "Alignment": ALIGNMENTS}
PAGES = {
    "Prompt": "prompt",
    "Observables": "observables",
    "Linear map": "linear_map",
    "Jacobians": "jacobians",
    "Runs": "runs",
}

# A named icon would be fetched from elsewhere.
_ICON = Image.fromarray(signed(torch.eye(4) - torch.eye(4).flip(0), 1.5)).resize((32, 32), Image.Resampling.NEAREST)

_STYLE = """
.stMainBlockContainer { padding: 2.2rem 2.5rem 4rem; }
.stMainBlockContainer h3 { font-size: 1.15rem; padding: 1rem 0 0.4rem; }
[data-testid=stVegaLiteChart] { overflow-x: auto; margin-bottom: -1.5rem; }
[data-testid=stSidebar] { min-width: 15rem; max-width: 15rem; }
"""


def _more() -> list[str]:
    """Pages of what the open run holds."""
    name = link()["run"]
    try:
        run = Run.open(runs_folder() / name) if name and Path(name).name == name else None
    except InterpError:
        return []  # Page Runs says why it cannot be opened.
    return [] if run is None else [page for page, kinds in _SHOWN.items() if results_of(run, kinds)]


def main() -> None:
    """Draw the page that the address names."""
    st.set_page_config("interp", layout="wide", page_icon=_ICON)
    st.html(f"<style>{_STYLE}</style>")
    desk.begin()
    st.sidebar.title("interp", anchor=False)
    names = [*PAGES, *_more()]
    page = link()["page"] = link()["page"] or ("Runs" if link()["run"] else names[0])
    known = page in names
    st.sidebar.radio("Page", names, label_visibility="collapsed", **bound("page", lambda p: p if p in names else None))
    try:
        if not known:
            raise ArgumentError(f"page {page!r} in the address", f"one of {', '.join(names)}")
        importlib.import_module(f"interp.apps.explorer.{(PAGES | _MORE)[page]}").show()
    except InterpError as error:
        desk.complain(error)
    finally:
        desk.end()
        if long := write_address():
            st.sidebar.caption(f"Too long for the address: {', '.join(long)}.")


if __name__ == "__main__":
    main()
