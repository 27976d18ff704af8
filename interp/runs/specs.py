"""Specifications: a YAML or TOML file that says what a run computes. `KINDS` maps a kind to its specification.

A specification is checked twice before any run folder is made: its fields when it is read, and what they name (models,
tokens, classes, pixels) when it is prepared.
"""

import difflib
import importlib
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from interp.hooks.errors import ArgumentError, RunError
from interp.runs.files import put, read_fields
from interp.runs.run import Progress, Run, digest

Work = Callable[[Run, Progress], None]

# A kind is a module with a subclass of Spec, and its row here. The module is imported when a file asks for the kind, so
# that a kind may live in any room.
KINDS = {
    "activation_patching": "interp.runs.patching_specs:PatchingSpec",
    "alignment_sweep": "interp.runs.alignment_specs:AlignmentSweepSpec",
    "demo": "interp.runs.demo:DemoSpec",
    "jacobians": "interp.runs.jacobian_specs:JacobianSpec",
    "linear_scope": "interp.runs.scope_specs:LinearScopeSpec",
    "observable_propagation": "interp.runs.propagation_specs:PropagationSpec",
    "probe_sweep": "interp.probes.sweep_specs:ProbeSweepSpec",
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


def spec_of(run: Run) -> Spec:
    """Return the specification of a run, as it was computed.

    Raises:
        RunError: If the run's kind is not known here, or its specification was changed.
    """
    kind, file = run.provenance.get("kind"), run.path / "spec.json"
    if kind not in KINDS:
        do = "update interp, or compute it with what made it"
        raise RunError(f"{run.path}: kind {kind!r}", f"one of {', '.join(KINDS)}", do)
    if digest(run.spec) != run.provenance.get("spec_sha256"):
        do = "restore it; for a changed specification, make a new run: interp run SPEC key=value"
        raise RunError(f"{file} was changed since the run was made", "the specification that was computed", do)
    return make_spec(kind, run.spec, str(file))


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


def read_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    r"""Return the specification in a YAML or TOML file: ``kind``, and the fields of that kind.

    Args:
        path: The file; ``.toml`` is read as TOML, everything else as YAML.
        overrides: Texts ``key=value`` that replace fields: a key with dots for what is inside, ``inputs.0.text``, and a
            value in YAML.

    Raises:
        ArgumentError: If the file cannot be read, or a field is missing, unknown, given twice or has a wrong value.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "spec.yaml"
        >>> _ = path.write_text("kind: linear_scope\nmodel: smollm2-135m\ninputs: [{text: The cat}]")
        >>> read_spec(path, ["inputs.0.text=The dog"]).inputs[0].text
        'The dog'
    """
    path = Path(path)
    given = read_fields(path)
    for override in overrides:
        put(given, override)
    where = str(path) + (f" with {' '.join(overrides)}" if overrides else "")
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.5)
        do = f"did you mean {near[0]}?" if near else "begin the file with kind: ..."
        raise ArgumentError(f"{where}: kind {kind!r}", f"one of {', '.join(KINDS)}", do)
    return make_spec(kind, given, where)


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
