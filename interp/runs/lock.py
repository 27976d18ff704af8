"""One process at a time writes into a run's folder. The lock ends with its process, however that ends."""

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from interp.hooks.errors import RunError

_NAME = ".lock"
_POLL = 0.05


@contextmanager
def locked(folder: Path, wait: float = 2.0) -> Iterator[None]:
    """Hold a folder's lock.

    Args:
        folder: The folder.
        wait: Seconds to wait for another that writes a single result.

    Raises:
        RunError: If another holds it for longer, or the folder cannot be written.
    """
    path = folder / _NAME
    try:
        file = open(path, "a+b")  # noqa: SIM115
    except OSError as error:
        raise RunError(f"{path} ({error.strerror})", "a run folder that can be written", "copy it") from error
    with file:
        end = time.monotonic() + wait
        while not _take(file.fileno()):
            if time.monotonic() >= end:
                file.seek(0)
                holder = file.read(200).decode(errors="replace") or "another process"
                do = f"wait until it ends; `interp show {folder}` says how far it is"
                raise RunError(f"{folder} is written by {holder}", "one process at a time in a run's folder", do)
            time.sleep(_POLL)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether somebody holds a folder's lock now."""
    try:
        with open(folder / _NAME, "rb") as file:
            return not _take(file.fileno(), shared=True)
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _take(handle: int, shared: bool = False) -> bool:
        # Windows forbids reading what is locked: a byte far behind the text stands for the file.
        os.lseek(handle, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            if shared:
                msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _take(handle: int, shared: bool = False) -> bool:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
