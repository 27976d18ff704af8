"""Specifications: a YAML file that says what a run computes. `KINDS` maps a kind to its specification.

A specification is checked twice before any run folder is made: its fields when it is read, and what they name (models,
tokens, classes, pixels) when it is prepared.
"""

import difflib
import importlib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from interp.hooks.errors import ArgumentError
from interp.runs.run import Progress, Run

Work = Callable[[Run, Progress], None]

# A kind is a module with a subclass of Spec, and its row here. The module is imported when a file asks for the kind, so
# that a kind may live in any room.
KINDS = {
    "activation_patching": "interp.runs.patching_specs:PatchingSpec",
    "demo": "interp.runs.demo:DemoSpec",
    "linear_scope": "interp.runs.scope_specs:LinearScopeSpec",
    "observable_propagation": "interp.runs.propagation_specs:PropagationSpec",
}


class Fields(BaseModel):
    """Fields of a specification: frozen, and a key that does not exist is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Spec(Fields):
    """What a run computes."""

    def prepare(self, progress: Progress) -> Work:
        """Load and check what the fields name, and return the work: a function of a run and of its steps.

        Args:
            progress: Told what is being loaded.

        Raises:
            InterpError: If something that a field names does not exist.
        """
        raise NotImplementedError


def kind_of(spec: Spec) -> str:
    """Return the kind of a specification."""
    home = f"{type(spec).__module__}:{type(spec).__name__}"
    return next(kind for kind, place in KINDS.items() if place == home)


def execute(spec: Spec, root: str | Path, progress: Progress = lambda _: None) -> Run:
    """Compute what a specification asks for, and return its finished Run.

    Args:
        spec: The specification.
        root: Folder of runs; a run's folder is made in it once everything is checked.
        progress: Told each step.

    Raises:
        InterpError: If something that the specification names does not exist (then there is no run), or a step fails
            (then the run holds what was finished, and its state is failed).
    """
    work = spec.prepare(progress)
    run = Run.create(root, kind_of(spec), spec.model_dump(mode="json"))
    with run.working(progress) as step:
        work(run, step)
    return run


def read_spec(path: str | Path) -> Spec:
    r"""Return the specification in a YAML file: ``kind``, and the fields of that kind.

    Raises:
        ArgumentError: If the file cannot be read, or a field is missing, unknown, given twice or has a wrong value.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "spec.yaml"
        >>> _ = path.write_text("kind: linear_scope\nmodel: smollm2-135m\ninputs: [{text: The cat}]")
        >>> read_spec(path).model
        'smollm2-135m'
    """
    path = Path(path)
    given = _read_yaml(path)
    if not isinstance(given, dict):
        raise ArgumentError(f"{path} holds {type(given).__name__}", "keys and values", "begin with kind: linear_scope")
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ArgumentError(f"{path}: kind {kind!r}", f"one of {', '.join(KINDS)}", "begin the file with kind: ...")
    return make_spec(kind, given, str(path))


def make_spec(kind: str, given: dict[str, Any], where: str) -> Spec:
    """Return the specification of a kind with these fields.

    Args:
        kind: One of `KINDS`.
        given: The fields.
        where: What the error names: a file.

    Raises:
        ArgumentError: If a field is missing, unknown or has a wrong value.
    """
    module, _, name = KINDS[kind].partition(":")
    cls: type[Spec] = getattr(importlib.import_module(module), name)
    try:
        return cls.model_validate(given)
    except ValidationError as error:
        raise _refusal(cls, error, where) from error


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe, and refuses a key that stands twice."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((k for i, k in enumerate(keys) if k in keys[:i]), None):
            raise ArgumentError(f"{path}: key {twice!r} stands twice, line {node.start_mark.line + 1}", "each key once")
        return {k: loader.construct_object(v, deep=True) for k, (_, v) in zip(keys, node.value, strict=True)}

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}", "a YAML file", "check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} is not YAML: {' '.join(str(error).split())}", "keys and values") from error


def _refusal(cls: type[BaseModel], error: ValidationError, where: str) -> ArgumentError:
    """One complaint, in our words: the key's path, what was needed, the nearest key that exists."""
    found = error.errors()
    # A misspelt key is also a missing one: the misspelling is what helps.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_owner(cls, first["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        do = f"did you mean {near[0]}?" if near else "remove the key"
        return ArgumentError(f"{where}: key {place!r} is unknown", f"one of {', '.join(known)}", do)
    if first["type"] == "missing":
        return ArgumentError(f"{where}: key {place!r} is missing", "a value for it")
    said = first["msg"].removeprefix("Value error, ")
    given = repr(first["input"])
    given = given if len(given) <= 80 else f"{given[:79]}…"
    return ArgumentError(f"{where}: {place} {given}" if place else f"{where}: {given}", said[:1].lower() + said[1:])


def _owner(cls: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel]:
    """The class whose fields stand at a place of a specification."""
    for part in place:
        if isinstance(part, str) and part in cls.model_fields:
            cls = _model_in(cls.model_fields[part].annotation) or cls
    return cls


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)
