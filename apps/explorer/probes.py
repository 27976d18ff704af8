"""Page Probes: sweeps, learning curves, transfer and what directions do, of the run that is open."""

import streamlit as st

from interp.apps.explorer import desk
from interp.apps.explorer.runs import BESIDE_PROBES, PROBING, headed, result, results_of


def show() -> None:
    """The page."""
    found = headed()
    if found is None:
        return
    made, run = found
    for name in results_of(run, PROBING + BESIDE_PROBES):
        result(made, run, name)
        loaded = desk.result(made.method("result", "load", name), name)
        if type(loaded).__name__ == "ProbeSweep":
            _best(loaded)
        if type(loaded).__name__ == "ProbeUse":
            st.caption(
                f"{desk.escaped(loaded.site)}, {loaded.rank} dimensions erased: {loaded.verdict}; p {loaded.p:.3f}."
            )


def _best(sweep) -> None:
    best = sweep.best()
    st.caption(
        f"Chosen inside the training parts: {sweep.metric.replace('_', ' ')} {best['value']:.3f} on data the choice "
        f"did not see; majority {sweep.majority:.3f}."
    )
    with st.expander("Layer by probe, with controls"):
        st.dataframe(sweep.curve().to_records(), hide_index=True)
