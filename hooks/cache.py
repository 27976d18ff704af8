"""The cache folder: where fetched and converted models lie, and how a folder gets there in one step."""

import hashlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from interp.hooks.errors import NotCachedError

PARTIAL = ".partial"
_STALE_SECONDS = 24 * 3600
_BLOCK = 1 << 20


def cache_dir() -> Path:
    """The folder under which interp keeps models; it need not exist yet.

    `INTERP_CACHE` decides where set; else the platform's usual place for caches.

    Returns:
        An absolute path.

    Example:
        >>> cache_dir().is_absolute()
        True
    """
    chosen = os.environ.get("INTERP_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        return base / "interp" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "interp"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interp"


def build_folder(target: Path, build: Callable[[Path], None]) -> Path:
    """Make the folder `target` in one step, unless it is there.

    `build` fills a new sibling folder, which takes the name `target` only when `build` has returned and its
    files are on disk. A process that dies earlier leaves a sibling ending in `.partial`, which nothing reads
    and a later build removes. Two processes at once may both build; one of them wins, both return `target`.

    Args:
        target: Where the finished folder shall be.
        build: Called with an empty folder to fill.

    Returns:
        `target`, which exists.

    Raises:
        NotCachedError: The cache folder cannot be written.
        Exception: Whatever `build` raises; then nothing is left behind.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (build_folder(root / "a", lambda d: (d / "x").touch() or None) / "x").exists()
        True
    """
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        partial.mkdir()
    except OSError as error:
        raise NotCachedError(
            f"the cache folder {cache_dir()} cannot be written ({error.strerror or type(error).__name__})",
            f"a place for {target.name}",
            "set the environment variable INTERP_CACHE to a folder that can be written",
        ) from error
    try:
        build(partial)
        _flush(partial)
        try:
            os.replace(partial, target)
        except OSError:
            if not target.is_dir():  # somebody else was first, or it truly failed
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: The file cannot be read.

    Example:
        >>> sha256_file(os.devnull)[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def remembered_sha256(path: str | os.PathLike) -> str:
    """`sha256_file`, remembered in the cache folder by the file's real path, size and modification time.

    A file that was changed while its size and time were kept keeps its old hash; `sha256_file` does not trust
    either. A cache folder that cannot be written only costs the reuse.

    Returns:
        The hash in hexadecimal.

    Raises:
        OSError: The file cannot be read.

    Example:
        >>> remembered_sha256(__file__) == sha256_file(__file__)
        True
    """
    real = Path(path).resolve()
    status = real.stat()
    key = hashlib.sha256(f"{real}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()
    note = cache_dir() / "hashes" / key
    with suppress(OSError):
        found = note.read_text(encoding="ascii").strip()
        if len(found) == 64:
            return found
    value = sha256_file(real)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
        partial.write_text(value, encoding="ascii")
        os.replace(partial, note)
    return value


def _flush(folder: Path) -> None:
    """Hand every file of `folder` to the disk, so that the rename cannot overtake the contents."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _sweep(parent: Path) -> None:
    """Remove what builds that were killed left behind, once it is a day old."""
    for path in parent.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
