"""Runs of observable propagation and of activation patching: computed, drawn, reported, opened; and refused."""

import pytest
from typer.testing import CliRunner

from interp.apps import cli
from interp.apps.report import sections
from interp.runs.run import Run
from tests.apps.samples import tiny_load

PROPAGATION = """
kind: observable_propagation
model: tiny-words
observables: [{target: John, foil: Mary}, {positive: [cat, dog], negative: [bird], name: animals}]
prompts: [Mary gave the book to]
norms: true
dataset: {prompts: {template: "{} gave the book to", words: [Mary, John, Mary]}}
couplings: {heads: 2, texts: [Mary gave the book to, the cat sat on the mat]}
vectors: [{path: L1H2}, {path: L1H2@0, prompt: Mary gave the book to}]
search: {clean: Mary gave the book to, corrupt: John gave the book to, beam: 3, max_length: 2}
"""
PATCHING = """
kind: activation_patching
model: tiny-words
pairs: [{clean: Mary gave the book to, corrupt: John gave the book to}]
metric: {target: John, foil: Mary}
grids:
  - {sites: resid_pre}
  - {method: attribution, sites: z, by: [layer, head], audit: 4}
  - {method: edges, audit: 5}
"""


@pytest.fixture
def call(monkeypatch, tmp_path, tokenizer):
    """Run a specification in an empty folder, with a tiny model in the place of a real one."""
    from interp.runs import language_specs

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language_specs, "load", tiny_load(tokenizer))

    def run(text: str):
        (tmp_path / "spec.yaml").write_text(text)
        return CliRunner().invoke(cli.app, ["run", "spec.yaml"])

    return run


def made(folder) -> Run:
    (path,) = (folder / "runs").iterdir()
    return Run.open(path)


def test_observables_are_propagated(call, tmp_path):
    result = call(PROPAGATION)
    assert result.exit_code == 0, result.output
    run = made(tmp_path)
    assert run.state == "finished"
    assert {
        "prompt-1-attribution-1", "prompt-1-attribution-2", "norms", "dataset", "couplings", "vector-1-1",
        "vector-1-2-tokens", "vector-2-table", "paths", "completeness",
    } <= set(run.names)  # fmt: skip
    assert all(row["completeness error"] < 1e-5 for row in run.load("completeness"))
    assert run.load("prompt-1-attribution-2").observable == "animals"
    assert (run.load("dataset").n, run.load("couplings").slopes.shape) == (3, (2, 2, 2))
    assert run.load("vector-1-1").form == "data-free"
    assert run.load("vector-2-1").position == 0
    names = [(section.name, section.text, len(section.figures)) for section in sections(run)]
    assert names == [
        ("prompt-1", "Mary gave the book to", 4), ("norms", "Heads without data", 2), ("dataset", "3 prompts", 2),
        ("couplings", "Couplings between observables", 3), ("paths", "Mary gave the book to", 1),
    ]  # fmt: skip
    for name in run.figures:
        assert (run.path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Predicted and measured slopes" in (run.path / "report.html").read_text()
    shown = CliRunner().invoke(cli.app, ["show", str(run.path)])
    assert "figure paths-found" in shown.stdout


def test_grids_are_patched(call, tmp_path):
    result = call(PATCHING)
    assert result.exit_code == 0, result.output
    run = made(tmp_path)
    assert set(run.names) == {"grid-1", "grid-2", "grid-3", "audits"}
    assert run.load("grid-1").values.shape == (3, 5)
    assert [row["cells"] for row in run.load("audits")] == [4, 5]
    assert run.figures == ["grid-1-cells", "grid-2-cells-1", "grid-2-cells-2", "grid-3-cells"]
    assert [s.text for s in sections(run)] == [
        "resid_pre by layer, position",
        "z by layer, head",
        "edges between components",
    ]


BAD = {
    "nothing is asked for": (PROPAGATION.split("prompts:")[0], ["at least one of prompts, norms, dataset"]),
    "a key that is misspelt": (PROPAGATION + "vector: []", ["key 'vector' is unknown", "did you mean vectors?"]),
    "two forms of an observable": (PROPAGATION.replace("foil: Mary", "positive: [Mary]"), ["either target (and foil)"]),
    "an observable of nothing": (PROPAGATION.replace("{target: John, foil: Mary}", "{name: x}"), ["either target"]),
    "a foil of several": (PROPAGATION.replace("positive: [cat", "foil: cat, positive: [cat"), ["foil belongs to"]),
    "no token": (PROPAGATION.replace("target: John", "target: John Mary"), ["encodes to 2 ids"]),
    "no unit": (PROPAGATION + "unit: heads", ["heads"]),
    "no position": (PROPAGATION + "position: 99", ["99"]),
    "no path": (PROPAGATION.replace("path: L1H2}", "path: L1X2}"), ["L1X2"]),
    "no head": (PROPAGATION.replace("path: L1H2}", "path: L1H99}"), ["head 99 out of range"]),
    "path and site": (PROPAGATION.replace("path: L1H2}", "path: L1H2, site: hook_embed}"), ["either path or site"]),
    "no path of a coupling": (PROPAGATION.replace("heads: 2", "paths: [L77H0]"), ["L77"]),
    "one observable to couple": (
        PROPAGATION.replace(", {positive: [cat, dog], negative: [bird], name: animals}", ""), ["two observables"],
    ),
    "a template without its place": (PROPAGATION.replace('"{} gave', '"she gave'), ["a template with {}"]),
    "a search without its corrupt prompt": (PROPAGATION.replace(", corrupt: John gave the book to", ""), ["a corrupt"]),
    "no linearization": (PROPAGATION.replace("path: L1H2}", "path: L1H2, linearization: frosen}"), ["frosen"]),
    "prompts of two lengths": (PATCHING.replace("John gave the", "John gave"), ["5", "4"]),
    "no site": (PATCHING.replace("sites: z", "sites: zz"), ["zz"]),
    "no axis of the site": (PATCHING.replace("sites: resid_pre", "by: [layer, head]"), ["head"]),
    "steps of a patch": (PATCHING.replace("{sites: resid_pre}", "{steps: 3}"), ["steps belong to method attribution"]),
    "an audit of a patch": (PATCHING.replace("{sites: resid_pre}", "{audit: 3}"), ["patching is exact"]),
    "axes of edges": (PATCHING.replace("method: edges", "method: edges, by: [layer]"), ["without by"]),
    "no metric": (PATCHING.replace("metric: {target: John, foil: Mary}", "metric: js"), ["metric"]),
    "no direction": (PATCHING.replace("{sites: resid_pre}", "{direction: up}"), ["direction 'up'"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), BAD.values(), ids=BAD)
def test_a_bad_specification_is_refused_before_any_work(call, tmp_path, unchecked, text, parts):
    result = call(text)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["tiny-eyes"])
def test_a_model_without_tokens_is_refused(call, tmp_path, unchecked, name):
    result = call(PATCHING.replace("tiny-words", name))
    assert result.exit_code == 2
    assert "a language model with a tokenizer" in result.stderr
