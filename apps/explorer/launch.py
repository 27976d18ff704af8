"""Start the explorer's server on this machine."""

import importlib.util
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interp.hooks.errors import ArgumentError, MissingExtraError
from interp.runs.run import Run

_HOST = "127.0.0.1"
_OPTIONS = {
    "server.fileWatcherType": "none", "server.maxUploadSize": "32", "browser.gatherUsageStats": "false",
    "client.showErrorDetails": "none", "client.showErrorLinks": "false", "client.toolbarMode": "minimal",
    "theme.base": "light", "theme.primaryColor": "#2f78b3", "theme.textColor": "#1d2530",
    "theme.secondaryBackgroundColor": "#f4f6f8", "logger.level": "warning",
}  # fmt: skip


def check(run: Path | None, port: int) -> None:
    """Refuse what the explorer cannot open, before anything is loaded.

    Raises:
        MissingExtraError: If Streamlit is not installed.
        RunError: If the folder holds no run, or one of a newer format.
        ArgumentError: If the port is taken or is none.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise MissingExtraError("interp explore without Streamlit", "streamlit", "pip install 'interp[explorer]'")
    if run is not None:
        Run.open(run)
    if not 1 <= port <= 65535:
        raise ArgumentError(f"port {port}", "a port in 1..65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            do = f"add --port {port % 65535 + 1}, or end what listens there"
            raise ArgumentError(f"port {port} ({error.strerror})", "a free port", do) from error


def prepare(run: Path | None, model: str | None, step: Callable[[str], None]) -> None:
    """Say what opens first, and load the model that was asked for, so that the first page has it.

    Args:
        run: A run's folder.
        model: Language model to begin with; without one and without a run, the first packaged one.
        step: Told what is being loaded.

    Raises:
        InterpError: If the model cannot be loaded.
    """
    if run is not None:
        os.environ["INTERP_EXPLORE_RUN"] = str(run.absolute())
    if model is not None:
        os.environ["INTERP_EXPLORE_MODEL"] = model
    if run is not None and model is None:
        return
    from interp.apps.explorer.controls import offered
    from interp.apps.explorer.desk import workshop

    name = model or offered()[0]
    step(f"loading {name}")
    workshop().load(name)


def serve(port: int, *, window: bool) -> Any:
    """Serve the explorer until it is stopped, at http://127.0.0.1:PORT.

    Args:
        port: A free port.
        window: Whether to open the page in the browser.
    """
    from streamlit.web.cli import main

    from interp.apps.explorer.desk import workshop

    options = _OPTIONS | {"server.address": _HOST, "server.port": str(port)}
    options["server.headless"] = "false" if window else "true"
    page = Path(__file__).parent / "main.py"
    try:
        return main(["run", str(page), *(f"--{k}={v}" for k, v in options.items())], standalone_mode=False)
    finally:
        workshop().close()  # Else the process would wait for what is under way.
