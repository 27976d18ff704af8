"""Where results come from: versions, machine, command, the state of the working directory's repository."""

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

_VERSIONS = ("interp", "torch", "transformers", "safetensors", "numpy")
_PATIENCE = 10


def surroundings() -> dict[str, Any]:
    """Return versions, machine and command of this process, and the repository's state where there is one."""
    found = {"versions": versions(), "machine": _machine(), "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]]}
    git = _git()
    return found | ({"git": git} if git else {})


def now() -> str:
    """Return the time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _VERSIONS}


def _machine() -> dict[str, Any]:
    import torch

    machine = {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        machine |= {"gpus": ", ".join(names), "cuda": torch.version.cuda}
    return machine


def _git() -> dict[str, Any]:
    """Commit, and whether tracked files differ from it; nothing outside of a repository, or without git."""
    commit = _said("rev-parse", "HEAD")
    if not commit:
        return {}
    return {"commit": commit, "changed": bool(_said("status", "--porcelain", "--untracked-files=no"))}


def _said(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words], capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
