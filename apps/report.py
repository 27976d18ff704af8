"""The report: one HTML file with a run's figures, their words, the checks and the provenance. It needs no network.

The Vega JavaScript is embedded once; a content security policy forbids every request.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.apps.captions import Caption, caption
from interp.hooks.errors import ArgumentError, RunError
from interp.hooks.table import Table
from interp.plots import can_draw, chart
from interp.plots.style import legible, visible
from interp.runs.run import Run
from interp.saving import write_atomically

_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Figure:
    """One drawing: its name, its words and its Vega-Lite specification."""

    name: str
    caption: Caption
    spec: dict[str, Any] = field(repr=False)
    wide: bool


@dataclass
class Section:
    """What belongs to one prompt or picture."""

    name: str
    kind: str
    text: str = ""
    target: str = ""
    foil: str = ""
    picture: str = ""
    figures: list[Figure] = field(default_factory=list)


def write_report(run: Run, path: str | Path | None = None) -> Path:
    """Write a run's report and return its path.

    Args:
        run: A run; one that failed is reported as far as it came.
        path: Where to; ``report.html`` in the run's folder by default.

    Raises:
        RunError: If the file cannot be written.
    """
    path = run.path / "report.html" if path is None else Path(path)
    text = render(run)
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise RunError(f"report {path} ({error})", "a file that can be written", "give another path") from error
    return path


def render(run: Run) -> str:
    """Return a run's report as HTML text."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "sort_keys": True, "separators": (",", ":")}
    environment.filters |= {"number": _number, "legible": legible}
    scripts = {"bundle": _bundle(), "start": (_ASSETS / "report.js").read_text(encoding="utf-8")}
    return environment.get_template("report.html.j2").render(
        run=run,
        sections=sections(run),
        models=run.provenance.get("models", {}),
        completeness=_completeness(run),
        spec=json.dumps(run.spec, indent=2, ensure_ascii=False),
        style=Markup((_ASSETS / "report.css").read_text(encoding="utf-8")),
        scripts={name: Markup(text) for name, text in scripts.items()},
        policy=_policy(*scripts.values()),
    )


def sections(run: Run) -> list[Section]:
    """A run's figures, by section; of a run without any, its results: ``prompt-1-lens`` belongs to ``prompt-1``."""
    found: dict[str, Section] = {}
    if run.figures:
        for name in run.figures:
            held = run.figure(name)
            if (group := held["section"]) not in found:
                text = held.get("heading")
                found[group] = Section(group, "prompt", text) if text else _input_section(run, group)
            section = found[group]
            words = Caption(held["title"], held["sees"], held["silent"])
            section.figures.append(Figure(name, words, held["spec"], held["wide"]))
        return list(found.values())
    for name in sorted(run.names, key=_order):
        result = run.load(name)
        if not _drawable(result):
            continue
        group = re.match(r"prompt-\d+|[^-]+", name)[0]  # type: ignore[index]
        section = found.setdefault(group, _section(run, group))
        section.figures.append(_figure(run, name, result))
        if type(result).__name__ == "LogitLens" and len(result.followed) == 2:
            section.target, section.foil = map(visible, result.followed)
        if isinstance(result, Table) and "class" in result.columns:
            section.target = legible(result[0]["class"])
    return list(found.values())


def _order(name: str) -> tuple[bool, int, int, str]:
    """Prompts by number, then pictures; small figures first, so that they stand side by side."""
    number = re.match(r"prompt-(\d+)", name)
    kinds = ["next-tokens", "classes", "votes", "margin", "lens", "attribution"]
    kind = next((i for i, k in enumerate(kinds) if name.endswith(k)), len(kinds))
    return (number is None, int(number[1]) if number else 0, kind, name)


def _drawable(result: Any) -> bool:
    return can_draw(result) and not (isinstance(result, Table) and "probability" not in result.columns)


def _input_section(run: Run, group: str) -> Section:
    """The heading of ``input-2``: its text, or its picture and the largest class."""
    number = int(group.rpartition("-")[2])
    given = run.spec["inputs"][number - 1]
    if given["text"] is not None:
        return Section(group, "prompt", given["text"])
    section = Section(group, "picture", _file_name(given["image"]), picture=_data(run, group))
    if f"{group}-outputs" in run.names:
        first = run.load(f"{group}-outputs")[0]
        section.target = legible(str(first["class"])) if "class" in first else ""
    return section


def _data(run: Run, picture: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(run.picture(picture)).decode()}"


def _section(run: Run, group: str) -> Section:
    number = re.fullmatch(r"prompt-(\d+)", group)
    prompts = run.spec.get("prompts", [])
    if number and int(number[1]) <= len(prompts):
        return Section(group, "prompt", prompts[int(number[1]) - 1]["prompt"])
    picture = run.path / "results" / f"{group}.png"
    if picture.is_file():
        return Section(group, "picture", _file_name(str(run.spec.get("image", group))), picture=_data(run, group))
    return Section(group, "other", group)


def _file_name(image: str) -> str:
    return re.split(r"[/\\:]", image)[-1]


def _figure(run: Run, name: str, result: Any) -> Figure:
    kind = type(result).__name__
    options: dict[str, Any] = {}
    if kind == "Votes" and result.map.ndim == 2:
        group = name.partition("-")[0]
        held = (run.path / "results" / f"{group}.png").is_file()
        options = {"picture": run.picture(group) if held else None, "size": 410}
    words = caption(result)
    try:
        spec = chart(result, **options).to_dict()
    except ValueError as error:
        raise ArgumentError(f"a figure of result {name!r} ({error})", "a result that can be drawn") from error
    return Figure(name, words, spec, wide=kind in ("LogitLens", "Attribution"))


def _completeness(run: Run) -> list[dict[str, Any]]:
    return run.load("completeness").to_records() if "completeness" in run.names else []


def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, of the version that the figures are written for."""
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    bundle = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]
    # What would end the script element, or start a comment in it, is written so that only JavaScript reads it.
    return re.sub("</(?=script)", r"<\\/", bundle, flags=re.IGNORECASE).replace("<!--", "<\\!--").replace("\r\n", "\n")


def _policy(*scripts: str) -> str:
    """Only these scripts may run, and nothing may be fetched. Vega compiles its expressions: hence unsafe-eval."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _number(value: Any) -> str:
    """A cell of a table: floats short, small ones in powers of ten."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
