"""Runs: a folder that holds what was asked, where it was computed, and what came out.

A run opens without model, data or GPU. Each result is written when it is finished: a crash loses none of those, and
whoever goes on with the run computes only what is missing. One process at a time writes into the folder.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp.hooks.errors import RunError
from interp.hooks.model import Model
from interp.hooks.table import Rows
from interp.runs.lock import is_locked, locked
from interp.runs.provenance import now, surroundings
from interp.saving import load_result, save_result, write_atomically

Progress = Callable[[str], None]

FORMAT = 1
# Of a model, what must be the same in all results of one run.
_WHICH = ("sha256", "config_sha256", "dtype")


def canonical(spec: Mapping[str, Any]) -> str:
    """Return a spec's canonical JSON: sorted keys, no spaces."""
    return json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(spec: Mapping[str, Any]) -> str:
    """Return the hash by which a spec names its runs' folders."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()[:8]


class Run(Rows):
    """One run's folder.

    Attributes:
        path: The folder.
        spec: What was asked: plain data.
        provenance: Versions, machine, command, repository, models, times, names of the results.

    Example:
        >>> import tempfile
        >>> run = Run.create(tempfile.mkdtemp(), "demo", {"prompt": "hello"})
        >>> run.path.name[:5], Run.open(run.path).spec
        ('demo-', {'prompt': 'hello'})
    """

    def __init__(self, path: Path, spec: dict[str, Any], provenance: dict[str, Any]):
        self.path, self.spec, self.provenance = path, spec, provenance
        self._holds = False

    @classmethod
    def create(cls, root: str | Path, kind: str, spec: Mapping[str, Any]) -> "Run":
        """Make a new folder ROOT/KIND-HASH-COUNTER: hash of the spec; a second run of one spec gets the next counter.

        Raises:
            RunError: If the folder cannot be made.
        """
        root = Path(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            path = _claim(root, f"{kind}-{digest(spec)}")
            (path / "results").mkdir()
        except OSError as error:
            raise RunError(f"run folder in {root} ({error})", "a folder that can be written") from error
        run = cls(
            path,
            json.loads(canonical(spec)),
            {"format": FORMAT, "kind": kind, "spec_sha256": digest(spec), **surroundings(), "times": {"made": now()}},
        )
        run._write("spec.json", run.spec)
        run._write("provenance.json", run.provenance)
        run.status("created")
        return run

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run's folder.

        Raises:
            RunError: If it is none, or of a newer format.
        """
        path = Path(path)
        if not (path / "spec.json").is_file():
            do = "give the folder that `interp run` named, or compute one: interp demo"
            raise RunError(f"{path} is not a run folder", "a folder with spec.json and provenance.json", do)
        spec, provenance = (_read(path / name) for name in ("spec.json", "provenance.json"))
        version = provenance.get("format", 0)
        if not isinstance(version, int) or version > FORMAT:
            raise RunError(f"{path} has format {version}", f"format {FORMAT} or older", "update interp")
        return cls(path, spec, provenance)

    @property
    def names(self) -> list[str]:
        """Names of the finished results, in order of writing."""
        return self._ordered("results")

    @property
    def missing(self) -> list[str]:
        """Names of the results that a finished run had, and whose files are gone."""
        return [n for n in self.provenance.get("results", []) if not (self.path / "results" / f"{n}.json").is_file()]

    def save(self, name: str, result: Any) -> None:
        """Write a result.

        Raises:
            RunError: If the name is not a plain file name, or the type cannot be saved.
        """
        _plain_name(name, "result")
        with self._writing():
            save_result(result, self.path / "results" / name)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a result of this run if it is finished; else compute and write it.

        What a run computes through this is never computed twice, however often the run is interrupted.

        Args:
            name: Of the result.
            compute: Computes it.

        Raises:
            RunError: If the finished result cannot be read, or the new one cannot be saved.

        Example:
            >>> import tempfile
            >>> from interp.hooks.table import Table
            >>> run = Run.create(tempfile.mkdtemp(), "demo", {})
            >>> [run.once("rows", lambda: Table([{"n": n}]))[0]["n"] for n in (1, 2)]
            [1, 1]
        """
        return self.once_each([name], lambda: [compute()])[0]

    def once_each(self, names: Sequence[str], compute: Callable[[], Sequence[Any]]) -> list[Any]:
        """Return results that are computed together, as `once` does; all are computed again where one is missing."""
        finished = self.names
        if all(name in finished for name in names):
            return [self.load(name) for name in names]
        found = list(compute())
        for name, result in zip(names, found, strict=True):
            self.save(name, result)
        return found

    def load(self, name: str) -> Any:
        """Read a result back.

        Raises:
            RunError: If there is no such result, or its file is missing or corrupt.
        """
        again = f"delete it, then compute it again: interp resume {self.path}"
        file = self.path / "results" / f"{name}.json"
        if name in self.missing:
            raise RunError(f"{file} is missing", "every result of a finished run", again.partition("then ")[2])
        if name not in self.names:
            raise RunError(f"result {name!r} in {self.path.name}", f"one of {', '.join(self.names)}")
        try:
            return load_result(file.with_suffix(""))
        except RunError as error:
            raise RunError(error.given, error.needed, error.do if "update" in error.do else again) from error

    def save_picture(self, name: str, picture: Any) -> None:
        """Write a `PIL.Image` beside the results, as PNG."""
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        with self._writing():
            write_atomically(self.path / "results" / f"{name}.png", buffer.getvalue())

    def picture(self, name: str) -> bytes:
        """Read a picture's PNG bytes.

        Raises:
            RunError: If there is no such picture.
        """
        try:
            return (self.path / "results" / f"{name}.png").read_bytes()
        except OSError as error:
            raise RunError(f"picture {name!r} in {self.path.name}", "a picture of this run") from error

    def save_figure(
        self, name: str, figure: Any, *, section: str, title: str, sees: str, silent: str, wide: bool = False,
        heading: str = "", count: int = 1,
    ) -> None:  # fmt: skip
        """Write a figure as Vega-Lite with its words, and as PNG, into ``figures/``.

        For what is drawn of a live model, which a result cannot hold.

        Args:
            name: A plain file name.
            figure: An Altair chart.
            section: Name of what it is about, under which a report groups it.
            title: What is drawn.
            sees: What one sees.
            silent: What it does not show.
            wide: Whether it needs the whole width of a page.
            heading: Text of the section; a report looks it up among the specification's inputs where it is empty.
            count: How many figures are drawn together with this one.

        Raises:
            RunError: If the name is not a plain file name.
        """
        import vl_convert

        _plain_name(name, "figure")
        folder = self.path / "figures"
        spec = figure.to_dict()
        words = {"section": section, "title": title, "sees": sees, "silent": silent, "wide": wide, "heading": heading}
        text = json.dumps({**words, "count": count, "spec": spec}, ensure_ascii=False, allow_nan=False)
        picture = vl_convert.vegalite_to_png(spec, scale=1.5)
        with self._writing():
            folder.mkdir(exist_ok=True)
            write_atomically(folder / f"{name}.png", picture)
            write_atomically(folder / f"{name}.json", text.encode())

    @property
    def figures(self) -> list[str]:
        """Names of the written figures, in order of writing."""
        return self._ordered("figures")

    def figure(self, name: str) -> dict[str, Any]:
        """Read a figure: its section, words and Vega-Lite specification.

        Raises:
            RunError: If there is no such figure, or its file is corrupt.
        """
        if name not in self.figures:
            raise RunError(f"figure {name!r} in {self.path.name}", f"one of {', '.join(self.figures)}")
        do = f"delete it, then draw it again: interp resume {self.path}"
        return _read(self.path / "figures" / f"{name}.json", do)

    def record_model(self, role: str, model: Model) -> None:
        """Write down which model played a role: its identity, class, configuration hash, dtype, device.

        Raises:
            RunError: If another model played the role in this run before.
        """
        config = model.config
        text = config.to_json_string() if hasattr(config, "to_json_string") else repr(model.module)
        played = {
            **model.identity,
            "class": type(model.module).__name__,
            "family": model.family,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        }
        before = self.provenance.get("models", {}).get(role, played)
        if changed := [key for key in _WHICH if before.get(key) != played.get(key)]:
            given = f"{role} model: {', '.join(f'{k} {played.get(k)}, it was {before.get(k)}' for k in changed)}"
            raise RunError(given, "one model for all results of a run", "make a new run")
        self.provenance.setdefault("models", {})[role] = played
        self._record()

    def log(self, line: str) -> None:
        """Append a line to the log, with the time."""
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}\n")

    def status(self, state: str, **more: str) -> None:
        """Write the run's state: created, running, finished or failed; with step and error, where it failed."""
        with self._writing():
            self._write("status.json", {"state": state, **more})
        self.log(" ".join([state, *(f"{key}: {value}" for key, value in more.items())]))

    @contextmanager
    def working(self, progress: Progress = lambda _: None) -> Iterator[Progress]:
        """Give a function that says and logs each step; end as finished, or as failed with the step and the error.

        What was finished before an error stays. The error goes on, with a note that names the run and the step. As
        long as it works, no other process can write into the run.

        Raises:
            RunError: If another process works on this run.

        Example:
            >>> import tempfile
            >>> run = Run.create(tempfile.mkdtemp(), "demo", {})
            >>> with run.working() as step:
            ...     step("votes")
            >>> run.state
            'finished'
        """
        with self._writing():
            self._holds = True
            try:
                yield from self._work(progress)
            finally:
                self._holds = False

    def _work(self, progress: Progress) -> Iterator[Progress]:
        steps = ["start"]

        def step(name: str) -> None:
            steps.append(name)
            self.log(name)
            progress(name)

        self._begin()
        try:
            yield step
        except BaseException as error:
            self.status("failed", step=steps[-1], error=f"{type(error).__name__}: {error}")
            error.add_note(f"run {self.path} failed at: {steps[-1]}; what was finished is kept")
            raise
        self.provenance |= {"results": self.names, "figures": self.figures}
        self.provenance["times"]["finished"] = now()
        self._record()
        self.status("finished")

    def _begin(self) -> None:
        """Clear what a killed process left half-written; note where the run goes on, where it is not the first time."""
        for torn in (*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")):
            torn.unlink()
        times = self.provenance.setdefault("times", {})
        if "started" in times:
            self.provenance.setdefault("resumed", []).append({"time": now(), **surroundings()})
        else:
            times["started"] = now()
        self._record()
        self.status("running")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if self._holds:
            yield
            return
        with locked(self.path):
            yield

    def _record(self) -> None:
        with self._writing():
            self._write("provenance.json", self.provenance)

    @property
    def failure(self) -> dict[str, str]:
        """Step and error of a run that failed; else empty."""
        return {key: value for key, value in self._status().items() if key != "state"}

    @property
    def state(self) -> str:
        """The run's state: created, running, finished, failed, or interrupted where whoever ran it is gone."""
        said = self._status()["state"]
        return "interrupted" if said == "running" and not is_locked(self.path) else said

    def _status(self) -> dict[str, str]:
        return {"state": "created", **_read(self.path / "status.json")}

    def _ordered(self, folder: str) -> list[str]:
        """Names of the JSON files of a folder: as written down when the run ended, else by time of writing."""
        files = sorted((self.path / folder).glob("*.json"), key=lambda f: (f.stat().st_mtime_ns, f.name))
        there = dict.fromkeys(f.stem for f in files if not f.name.startswith("."))
        written = [name for name in self.provenance.get(folder, []) if name in there]
        return list(dict.fromkeys([*written, *there]))

    def _write(self, name: str, data: Any) -> None:
        write_atomically(self.path / name, json.dumps(data, indent=1, ensure_ascii=False).encode())

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each result and each figure that is in the folder."""
        found = {"result": self.names, "figure": self.figures}
        return [{"name": name, "kind": kind} for kind, names in found.items() for name in names]

    def __repr__(self) -> str:
        return f"Run({self.path.name}, {self.state}, {len(self.names)} results)"


def _plain_name(name: str, what: str) -> None:
    if not name or Path(name).name != name or "." in name:
        raise RunError(f"{what} name {name!r}", "a plain file name without dots")


def _read(path: Path, do: str = "restore it from a copy, or make a new run") -> dict[str, Any]:
    """Fields of a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror})", "a file of a run folder", do) from error
    except ValueError as error:
        raise RunError(f"{path} is corrupt ({error})", "the file as it was written", do) from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds {type(found).__name__}", "fields", do)
    return found


def _claim(root: Path, stem: str) -> Path:
    """Make the first free folder STEM-001, STEM-002, ...; two processes never get the same one."""
    for counter in range(1, 10_000):
        path = root / f"{stem}-{counter:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise RunError(f"{stem} has 9,999 runs in {root}", "an emptier folder")
