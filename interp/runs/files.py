"""Files of specifications: fields in YAML or TOML, and texts ``key=value`` that replace some of them."""

import tomllib
from pathlib import Path
from typing import Any

from interp.hooks.errors import ArgumentError


def read_fields(path: Path) -> dict[str, Any]:
    """Return the fields in a file: TOML where its name ends in ``.toml``, else YAML.

    Raises:
        ArgumentError: If the file cannot be read, a key stands twice, or it does not hold fields.
    """
    toml = path.suffix.lower() == ".toml"
    try:
        text = path.read_text(encoding="utf-8")
        given = tomllib.loads(text) if toml else _yaml(text, str(path))
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}", "a YAML or TOML file", "check the path") from error
    except ValueError as error:
        if isinstance(error, ArgumentError):
            raise
        said = " ".join(str(error).split())
        raise ArgumentError(f"{path} is not {'TOML' if toml else 'YAML'}: {said}", "keys and values") from error
    if not isinstance(given, dict):
        raise ArgumentError(f"{path} holds {type(given).__name__}", "keys and values", "begin with kind: linear_scope")
    return given


def put(fields: dict[str, Any], override: str) -> None:
    """Replace one of the fields.

    Args:
        fields: Of a specification; changed in place.
        override: ``key=value``. Dots go into fields, numbers into lists; the value is YAML.

    Raises:
        ArgumentError: If there is no ``=``, the value is not YAML, or the key goes into something without keys.

    Example:
        >>> fields = {"inputs": [{"text": "The cat"}]}
        >>> put(fields, "inputs.0.text=The dog")
        >>> put(fields, "svd.k=4")
        >>> fields
        {'inputs': [{'text': 'The dog'}], 'svd': {'k': 4}}
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ArgumentError(f"override {override!r}", "key=value", "write inputs.0.text='The cat', for example")
    value = _parsed(override, text)
    holder: Any = fields
    *outer, last = key.split(".")
    for n, part in enumerate(outer):
        place = _place(holder, part, outer[:n], override)
        if isinstance(holder, dict) and holder.get(place) is None:
            holder[place] = {}
        holder = holder[place]
    holder[_place(holder, last, outer, override)] = value


def _parsed(override: str, text: str) -> Any:
    try:
        return _yaml(text, f"override {override!r}")
    except ValueError as error:
        if isinstance(error, ArgumentError):
            raise
        do = "put quotes around the value, and others around those for the shell: 'key=\"a: b\"'"
        raise ArgumentError(f"override {override!r}: {text!r} is not YAML", "a value in YAML", do) from error


def _place(holder: Any, part: str, above: list[str], override: str) -> str | int:
    """The key or index of a part in what holds it."""
    if isinstance(holder, dict):
        return part
    name = ".".join(above)
    if not isinstance(holder, list):
        do = f"give it whole: {name}={{{part}: ...}}"
        raise ArgumentError(f"override {override!r}: {name} is {holder!r}, which has no {part!r}", "keys", do)
    if not part.isdecimal() or int(part) >= len(holder):
        needed = f"an index from 0 to {len(holder) - 1}" if holder else "a list with entries"
        raise ArgumentError(f"override {override!r}: {part!r} in {name}", needed)
    return int(part)


def _yaml(text: str, where: str) -> Any:
    """What a YAML text says; ValueError where it is none."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe, and refuses a key that stands twice."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((k for i, k in enumerate(keys) if k in keys[:i]), None):
            raise ArgumentError(
                f"{where}: key {twice!r} stands twice, line {node.start_mark.line + 1}", "each key once"
            )
        return {k: loader.construct_object(v, deep=True) for k, (_, v) in zip(keys, node.value, strict=True)}

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
