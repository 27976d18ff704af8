"""The explorer's server in a process of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

# Running, a figure that is not drawn yet, or what stands there from before.
BUSY = (
    "[data-test-script-state]:not([data-test-script-state=notRunning]), [data-testid=stSkeleton], [data-stale=true], "
    "[data-testid=stVegaLiteChart]:not(:has(.marks))"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(*words: str, **environment: str):
    """The address of a server started with these words behind ``interp explore``, up and healthy."""
    port = free_port()
    command = [sys.executable, "-m", "interp.apps.cli", "explore", *words, "--port", str(port), "--no-window"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    try:
        _wait(process, f"http://127.0.0.1:{port}/_stcore/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def _wait(process, address: str) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(address, timeout=2)
            return
        time.sleep(0.2)
    raise RuntimeError(f"the explorer's server did not start (exit code {process.poll()})")


def settled(page, seconds: float = 90, calm_for: int = 4) -> None:
    """Wait until the page neither runs nor waits for work, so many looks in a row."""
    page.wait_for_selector("[data-testid=stSidebar]", timeout=30_000)
    until = time.monotonic() + seconds
    calm = 0
    while calm < calm_for:
        if time.monotonic() > until:
            raise TimeoutError(page.inner_text("body")[:2000])
        busy = page.locator(BUSY).count() or page.get_by_text("Cancel", exact=True).count()
        calm = 0 if busy else calm + 1
        page.wait_for_timeout(250)
