"""Runs: a folder that holds what was asked, where it was computed, and what came out.

A run opens without model, data or GPU. Each result is written when it is finished: a crash loses none of those.
"""

import hashlib
import io
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from interp.hooks.errors import RunError
from interp.hooks.model import Model
from interp.saving import load_result, save_result, write_atomically

Progress = Callable[[str], None]

FORMAT = 1
_VERSIONS = ("interp", "torch", "transformers", "safetensors", "numpy")


def canonical(spec: Mapping[str, Any]) -> str:
    """Return a spec's canonical JSON: sorted keys, no spaces."""
    return json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class Run:
    """One run's folder.

    Attributes:
        path: The folder.
        spec: What was asked: plain data.
        provenance: Library versions, machine, models.

    Example:
        >>> import tempfile
        >>> run = Run.create(tempfile.mkdtemp(), "demo", {"prompt": "hello"})
        >>> run.path.name[:5], Run.open(run.path).spec
        ('demo-', {'prompt': 'hello'})
    """

    def __init__(self, path: Path, spec: dict[str, Any], provenance: dict[str, Any]):
        self.path, self.spec, self.provenance = path, spec, provenance

    @classmethod
    def create(cls, root: str | Path, kind: str, spec: Mapping[str, Any]) -> "Run":
        """Make a new folder ROOT/KIND-HASH-COUNTER: hash of the spec; a second run of one spec gets the next counter.

        Raises:
            RunError: If the folder cannot be made.
        """
        digest = hashlib.sha256(canonical(spec).encode()).hexdigest()[:8]
        root = Path(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            path = _claim(root, f"{kind}-{digest}")
            (path / "results").mkdir()
        except OSError as error:
            raise RunError(f"run folder in {root} ({error})", "a folder that can be written") from error
        run = cls(
            path,
            json.loads(canonical(spec)),
            {"format": FORMAT, "kind": kind, "spec_sha256": digest, "versions": _versions(), "machine": _machine()},
        )
        run._write("spec.json", run.spec)
        run._write("provenance.json", run.provenance)
        run.status("running")
        return run

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run's folder.

        Raises:
            RunError: If it is none, or of a newer format.
        """
        path = Path(path)
        try:
            spec = json.loads((path / "spec.json").read_text())
            provenance = json.loads((path / "provenance.json").read_text())
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} is not a run folder ({error})", "a folder with spec.json and provenance.json"
            ) from error
        if not isinstance(spec, dict) or not isinstance(provenance, dict):
            raise RunError(f"{path} is not a run folder", "fields in spec.json and provenance.json")
        if provenance.get("format", 0) > FORMAT:
            raise RunError(f"{path} has format {provenance['format']}", f"format {FORMAT} or older", "update interp")
        return cls(path, spec, provenance)

    @property
    def names(self) -> list[str]:
        """Names of the finished results, in order of writing."""
        return _in_order(self.path / "results")

    def save(self, name: str, result: Any) -> None:
        """Write a result.

        Raises:
            RunError: If the name is not a plain file name, or the type cannot be saved.
        """
        _plain_name(name, "result")
        save_result(result, self.path / "results" / name)

    def load(self, name: str) -> Any:
        """Read a result back.

        Raises:
            RunError: If there is no such result.
        """
        if name not in self.names:
            raise RunError(f"result {name!r} in {self.path.name}", f"one of {', '.join(self.names)}")
        return load_result(self.path / "results" / name)

    def save_picture(self, name: str, picture: Any) -> None:
        """Write a `PIL.Image` beside the results, as PNG."""
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
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
        heading: str = "",
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

        Raises:
            RunError: If the name is not a plain file name.
        """
        import vl_convert

        _plain_name(name, "figure")
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        spec = figure.to_dict()
        words = {"section": section, "title": title, "sees": sees, "silent": silent, "wide": wide, "heading": heading}
        write_atomically(folder / f"{name}.png", vl_convert.vegalite_to_png(spec, scale=1.5))
        text = json.dumps({**words, "spec": spec}, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / f"{name}.json", text.encode())

    @property
    def figures(self) -> list[str]:
        """Names of the written figures, in order of writing."""
        return _in_order(self.path / "figures")

    def figure(self, name: str) -> dict[str, Any]:
        """Read a figure: its section, words and Vega-Lite specification.

        Raises:
            RunError: If there is no such figure.
        """
        if name not in self.figures:
            raise RunError(f"figure {name!r} in {self.path.name}", f"one of {', '.join(self.figures)}")
        return json.loads((self.path / "figures" / f"{name}.json").read_text())

    def record_model(self, role: str, model: Model) -> None:
        """Write down which model played a role: its identity, class, configuration hash, dtype, device."""
        config = model.config
        text = config.to_json_string() if hasattr(config, "to_json_string") else repr(model.module)
        self.provenance.setdefault("models", {})[role] = {
            **model.identity,
            "class": type(model.module).__name__,
            "family": model.family,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        }
        self._write("provenance.json", self.provenance)

    def log(self, line: str) -> None:
        """Append a line to the log, with the time."""
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}\n")

    def status(self, state: str, **more: str) -> None:
        """Write the run's state: running, finished or failed; with the step and the error, where it failed."""
        self._write("status.json", {"state": state, **more})
        self.log(" ".join([state, *(f"{key}: {value}" for key, value in more.items())]))

    @contextmanager
    def working(self, progress: Progress = lambda _: None) -> Iterator[Progress]:
        """Give a function that says and logs each step; end as finished, or as failed with the step and the error.

        What was finished before an error stays. The error goes on, with a note that names the run and the step.

        Example:
            >>> import tempfile
            >>> run = Run.create(tempfile.mkdtemp(), "demo", {})
            >>> with run.working() as step:
            ...     step("votes")
            >>> run.state
            'finished'
        """
        steps = ["start"]

        def step(name: str) -> None:
            steps.append(name)
            self.log(name)
            progress(name)

        try:
            yield step
        except BaseException as error:
            self.status("failed", step=steps[-1], error=f"{type(error).__name__}: {error}")
            error.add_note(f"run {self.path} failed at: {steps[-1]}; what was finished is kept")
            raise
        self.status("finished")

    @property
    def failure(self) -> dict[str, str]:
        """Step and error of a run that failed; else empty."""
        return {key: value for key, value in self._status().items() if key != "state"}

    @property
    def state(self) -> str:
        """The run's state."""
        return self._status()["state"]

    def _status(self) -> dict[str, str]:
        try:
            return json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path.name} has no state ({error})", "a run folder with status.json") from error

    def _write(self, name: str, data: Any) -> None:
        write_atomically(self.path / name, json.dumps(data, indent=1, ensure_ascii=False).encode())

    def __repr__(self) -> str:
        return f"Run({self.path.name}, {self.state}, {len(self.names)} results)"


def _plain_name(name: str, what: str) -> None:
    if not name or Path(name).name != name or name.startswith("."):
        raise RunError(f"{what} name {name!r}", "a plain file name")


def _in_order(folder: Path) -> list[str]:
    """Names of the JSON files of a folder, in order of writing."""
    return [f.stem for f in sorted(folder.glob("*.json"), key=lambda f: (f.stat().st_mtime_ns, f.name))]


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


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _VERSIONS}


def _machine() -> dict[str, Any]:
    import torch

    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
