"""`interp run`: specifications are refused before any work, computed into runs, and a crash keeps what was finished."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from interp.apps import cli
from interp.apps.report import sections, write_report
from interp.hooks.attach import attach
from interp.hooks.errors import ArgumentError
from interp.hooks.networks.images import RawPixels
from interp.runs.run import Run
from interp.runs.specs import KINDS, execute, make_spec, read_spec
from tests.apps.samples import tiny_load
from tests.apps.test_plots_linear import Enlarger

EYES = """
kind: linear_scope
model: tiny-eyes
inputs: [{image: "sample:flower.jpg"}]
"""
WORDS = """
kind: linear_scope
model: tiny-words
inputs: [{text: Mary gave the book to}]
targets: [{target: John, margin_to: Mary}]
linearization: {preset: frozen, product: split}
token_blocks: {probes: null, positions: [-1]}
"""
LARGER = """
kind: linear_scope
model: tiny-larger
inputs: [{image: "sample:flower.jpg", crop: [0, 0, 40, 40], resize: [10, 12]}]
figures: [parts, {figure: impulse, at: [3, 4], radius: 2}, {figure: strip, along: [[3, 1], [3, 2]], radius: 2}, votes]
targets: [{target: [0, 3, 4]}]
svd: {k: 3, input_window: [2, 2, 8, 8]}
"""


@pytest.fixture
def call(monkeypatch, tmp_path, tokenizer):
    """Run a specification in an empty folder, with tiny models in the place of real ones."""
    from interp.runs import scope_specs

    plain = tiny_load(tokenizer)

    def load(name):
        if name != "tiny-larger":
            return plain(name)
        torch.manual_seed(0)
        return attach(Enlarger().eval(), layout="modules", preprocess=RawPixels(), identity={"name": name})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scope_specs, "load", load)

    def run(text: str, *words: str):
        (tmp_path / "spec.yaml").write_text(text)
        return CliRunner().invoke(cli.app, ["run", "spec.yaml", *words])

    return run


def made(folder) -> Run:
    (path,) = (folder / "runs").iterdir()
    return Run.open(path)


def test_a_picture_is_classified_into_parts(call, tmp_path):
    result = call(EYES)
    assert result.exit_code == 0, result.output
    assert "votes + r" in result.stdout
    run = made(tmp_path)
    assert run.state == "finished"
    assert {"input-1-checks", "input-1-outputs", "input-1-votes-1", "input-1-bias-2", "completeness"} <= set(run.names)
    assert all(row["completeness error"] < 1e-5 for row in run.load("completeness"))
    names = [f"input-1-{n}" for n in ("1-outputs", "2-classes", "3-votes-1", "3-votes-2", "4-bias-1", "4-bias-2")]
    assert run.figures[:6] == names
    for name in run.figures:
        assert (run.path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    (section,) = sections(run)
    assert (section.kind, section.text, len(section.figures)) == ("picture", "flower.jpg", len(run.figures))
    assert section.target.startswith("class")
    assert "Votes for class" in (run.path / "report.html").read_text()
    shown = CliRunner().invoke(cli.app, ["show", str(run.path)])
    assert "figure input-1-1-outputs" in shown.stdout


def test_a_text_has_votes_and_blocks(call, tmp_path):
    result = call(WORDS, "--no-report", "--out", "runs")
    assert result.exit_code == 0, result.output
    run = made(tmp_path)
    assert not (run.path / "report.html").exists()
    assert run.load("input-1-votes-1").linearization.endswith("product=split")
    assert run.load("input-1-blocks").norms.shape == (1, 5)
    assert run.figures == ["input-1-1-outputs", "input-1-2-votes", "input-1-blocks-1", "input-1-blocks-2"]


def test_a_picture_to_a_picture(call, tmp_path):
    result = call(LARGER)
    assert result.exit_code == 0, result.output
    run = made(tmp_path)
    assert [f.removeprefix("input-1-") for f in run.figures] == [
        "1-parts", "2-impulse", "3-strip", "4-votes", "svd-1", "svd-2",
    ]  # fmt: skip
    assert run.load("input-1-svd").v[:, :, :2].abs().max() == 0
    assert run.load("input-1-votes-1").target == "(0, 3, 4)"


def test_a_run_is_the_same_twice(call, tmp_path):
    for _ in range(2):
        assert call(WORDS + "figures: []", "--no-report").exit_code == 0
    first, second = sorted((tmp_path / "runs").iterdir())
    assert first.name[:-3] == second.name[:-3]
    for path in (first / "results").iterdir():
        assert path.read_bytes() == (second / "results" / path.name).read_bytes()


BAD = {
    "a key that is misspelt": (
        EYES + "orgin: black", ["spec.yaml: key 'orgin' is unknown", "one of model, inputs", "did you mean origin?"],
    ),
    "a key inside": (EYES.replace("image:", "imag:"), ["key 'inputs.0.imag' is unknown", "did you mean image?"]),
    "a key of the linearization": (WORDS.replace("product", "produkt"), ["'linearization.produkt'", "mean product?"]),
    "a key that is missing": ("kind: linear_scope\nmodel: x", ["key 'inputs' is missing"]),
    "a key that stands twice": (EYES + "model: other", ["key 'model' stands twice"]),
    "another kind": (EYES.replace("linear_scope", "linear"), ["kind 'linear'", "did you mean linear_scope"]),
    "no kind": ("model: x", ["kind None"]),
    "no mapping": ("- 1", ["holds list"]),
    "no YAML": ("a: [", ["is not YAML"]),
    "a value of another type": (EYES + "stability: maybe", ["stability 'maybe'", "valid boolean"]),
    "no preset": (EYES + "linearization: frosen", ["linearization 'frosen'", "frozen"]),
    "no mode": (EYES + "linearization: {norm: frosen}", ["norm='frosen'"]),
    "no override": (EYES + "linearization: {overrides: {'*': x}}", ["override '*': 'x'"]),
    "no origin": (EYES + "origin: white", ["origin 'white'", "one of zero, mean, black, grey"]),
    "no figure": (EYES + "figures: [pie]", ["pie", "'parts', 'outputs'"]),
    "a figure without its place": (LARGER.replace("at: [3, 4], ", ""), ["figure 'impulse' needs at"]),
    "text and picture": (EYES.replace("{image", "{text: x, image"), ["either text or image"]),
    "no model": (EYES.replace("tiny-eyes", "smollm2-135"), ["smollm2-135"]),
    "no picture": (EYES.replace("sample:flower", "sample:moon"), ["sample:moon", "sample:china.jpg"]),
    "a text to a network of pictures": (WORDS.replace("tiny-words", "tiny-eyes"), ["a model with a tokenizer"]),
    "no token": (WORDS.replace("target: John", "target: John Mary"), ["encodes to 2 ids"]),
    "no class": (EYES + "targets: [{target: cat}]", ["class 'cat'"]),
    "no such figure of this network": (EYES + "figures: [parts]", ["figure 'parts' of a picture -> [12]"]),
    "a pixel outside": (LARGER.replace("[3, 4]", "[10, 4]", 1), ["pixel (10, 4)", "inside 10 x 12"]),
    "a crop outside": (LARGER.replace("0, 40, 40", "0, 40, 4000"), ["crop [0, 0, 40, 4000]"]),
    "a window outside": (LARGER.replace("[2, 2, 8, 8]", "[20, 2, 28, 8]"), ["a window without inputs"]),
    "too many triplets": (LARGER.replace("k: 3", "k: 300"), ["svd k=300"]),
    "no site": (WORDS.replace("probes: null", "site: blocks.99.x"), ["blocks.99.x"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), BAD.values(), ids=BAD)
def test_a_bad_specification_is_refused_before_any_work(call, tmp_path, monkeypatch, unchecked, text, parts):
    from interp.hooks import attach as attaching

    if "smollm2-135" in text:
        from interp.runs import scope_specs

        monkeypatch.setattr(scope_specs, "load", attaching.load)
    result = call(text)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_not_there_is_refused(tmp_path):
    result = CliRunner().invoke(cli.app, ["run", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert "No such file" in result.stderr


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("the cat sat"), 1), (ArgumentError("the cat sat"), 1)])
def test_a_crash_keeps_what_was_finished_and_says_where(call, tmp_path, monkeypatch, error, code):
    from interp.runs import scope_runs

    def fail(*_):
        raise error

    monkeypatch.setattr(scope_runs, "draw_targets", fail)
    result = call(EYES)
    assert result.exit_code == code
    run = made(tmp_path)
    assert run.state == "failed"
    assert run.failure == {"step": "input-1: figure votes", "error": f"{type(error).__name__}: the cat sat"}
    assert "input-1-bias-2" in run.names
    assert run.figures == ["input-1-1-outputs", "input-1-2-classes"]
    notes = getattr(result.exception, "__notes__", []) or [result.stderr]
    assert "failed at: input-1: figure votes" in " ".join(notes)
    text = (run.path / "report.html").read_text()
    assert "This run is failed at “input-1: figure votes”" in text
    assert "failed\n  step: input-1: figure votes" in CliRunner().invoke(cli.app, ["show", str(run.path)]).stdout


def test_a_map_that_is_not_affine_ends_the_run(call, tmp_path, monkeypatch):
    from interp.hooks.linear_scope import LinearScope
    from interp.hooks.table import Table

    row = {"check": "adjoint", "error": 0.5, "tolerance": 1e-5, "holds": False}
    monkeypatch.setattr(LinearScope, "check", lambda self: Table([row]))
    result = call(EYES)
    assert (result.exit_code, made(tmp_path).names) == (1, ["input-1-checks"])
    assert "adjoint: 5.0e-01" in result.stderr


def test_every_kind_has_its_specification():
    for kind, home in KINDS.items():
        assert home.split(":")[1].endswith("Spec")
        with pytest.raises(ArgumentError, match="key 'bogus' is unknown"):
            make_spec(kind, {"bogus": 1}, "here")


def test_the_demo_is_a_kind(monkeypatch, tmp_path, tokenizer):
    from interp.runs import demo

    monkeypatch.setattr(demo, "load", tiny_load(tokenizer))
    path = tmp_path / "demo.yaml"
    path.write_text("kind: demo\nmodel: tiny-words\nimage_model: tiny-eyes\nprompts: [{prompt: the cat sat on}]")
    run = execute(read_spec(path), tmp_path / "runs")
    assert run.path.name.startswith("demo-")
    assert "prompt-1-lens" in run.names
    path.write_text("kind: demo\nprompts: [{prompts: the cat}]")
    with pytest.raises(ArgumentError, match=r"key 'prompts.0.prompts' is unknown.*mean prompt"):
        read_spec(path)


def test_figures_come_back_and_names_are_plain(tmp_path):
    from interp.hooks.errors import RunError
    from interp.plots import chart
    from tests.apps.samples import tokens_table

    run, words = Run.create(tmp_path, "linear_scope", {"inputs": [{"text": "</script>", "image": None}]}), {}
    words = {"section": "input-1", "title": "</script>", "sees": "a", "silent": "b"}
    run.save_figure("one", chart(tokens_table(["</script>", "b"])), **words)
    again = Run.open(run.path).figure("one")
    assert {key: again[key] for key in words} == words
    assert json.dumps(again["spec"]["datasets"])
    assert "<h3></script>" not in write_report(run).read_text()
    for name in ("../evil", ".hidden", ""):
        with pytest.raises(RunError, match="plain file name"):
            run.save_figure(name, None, **words)
    with pytest.raises(RunError, match="one of one"):
        run.figure("two")


@pytest.mark.parametrize("network", [nn.Linear(3, 2)])
def test_a_network_without_pictures_is_refused(monkeypatch, network):
    from interp.runs import scope_specs

    monkeypatch.setattr(scope_specs, "load", lambda name: attach(network, layout="modules"))
    spec = make_spec("linear_scope", {"model": "x", "inputs": [{"image": "sample:china.jpg"}]}, "here")
    with pytest.raises(ArgumentError, match="a model of pictures"):
        spec.prepare(lambda _: None)
