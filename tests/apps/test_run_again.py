"""Runs that go on after a kill, that are computed again, and that are compared."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from typer.testing import CliRunner

from interp.apps import cli
from interp.runs.again import TOLERANCES, default_tolerance
from interp.runs.run import Run
from interp.runs.specs import execute, make_spec
from tests.apps.samples import tiny_load
from tests.apps.test_run import WORDS
from tests.apps.test_run_language import PATCHING, PROPAGATION

DEMO = "kind: demo\nmodel: tiny-words\nimage_model: tiny-eyes\nprompts: [{prompt: the cat sat on}]"
BARE = WORDS + "figures: []"
SLOW = pytest.mark.slow
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture
def call(monkeypatch, tmp_path, tokenizer):
    """The command line in an empty folder, with tiny models in the place of real ones."""
    from interp.runs import demo, language_specs, scope_specs

    monkeypatch.chdir(tmp_path)
    for module in (demo, language_specs, scope_specs):
        monkeypatch.setattr(module, "load", tiny_load(tokenizer))
    return lambda *words: CliRunner().invoke(cli.app, list(map(str, words)))


@pytest.fixture
def computed(call, tmp_path):
    """Compute a specification; return its run."""

    def compute(text: str, *words: str) -> Run:
        (tmp_path / "spec.yaml").write_text(text)
        before = set((tmp_path / "runs").glob("*"))
        result = call("run", "spec.yaml", "--no-report", *words)
        assert result.exit_code == 0, result.output
        (path,) = set((tmp_path / "runs").glob("*")) - before
        return Run.open(path)

    return compute


def files(run: Run) -> dict[str, bytes]:
    folders = (run.path / "results", run.path / "figures")
    return {f"{f.parent.name}/{f.name}": f.read_bytes() for d in folders if d.is_dir() for f in d.iterdir()}


class Killed(BaseException):
    """Stands for a kill where the process must live on."""


def stop_at(monkeypatch, number: int) -> None:
    """Stop in the middle of a result: its tensors are there, its fields are not."""
    from interp import saving
    from interp.runs import run

    count, write = iter(range(10_000)), saving.write_atomically

    def cut(path, data):
        if path.parent.name in ("results", "figures") and next(count) == number:
            path.with_name(f".{path.name}.1.tmp").write_bytes(data[:10])
            raise Killed
        write(path, data)

    for module in (saving, run):
        monkeypatch.setattr(module, "write_atomically", cut)


@pytest.mark.parametrize(
    ("text", "stops"),
    [(DEMO, 3), (PATCHING, 4), pytest.param(WORDS, 5, marks=SLOW), pytest.param(PROPAGATION, 9, marks=SLOW)],
    ids=["demo", "patching", "scope", "propagation"],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(call, computed, tmp_path, monkeypatch, text, stops):
    whole = computed(text)
    with monkeypatch.context() as patch:
        stop_at(patch, stops)
        with pytest.raises(Killed):
            call("run", "spec.yaml", "--no-report")
    torn = Run.open(whole.path.with_name(f"{whole.path.name[:-3]}002"))
    finished = {n: (torn.path / "results" / f"{n}.json").stat().st_mtime_ns for n in torn.names}
    assert torn.state == "failed"
    assert 0 < len(finished) < len(whole.names)
    result = call("resume", torn.path)
    assert result.exit_code == 0, result.output
    again = Run.open(torn.path)
    assert again.state == "finished"
    assert files(again) == files(whole)
    touched = [n for n, t in finished.items() if (torn.path / "results" / f"{n}.json").stat().st_mtime_ns != t]
    assert set(touched) <= {"completeness", "audits", "vector-1-table", "image-classes"}
    assert len(again.provenance["resumed"]) == 1
    assert "nothing to do" in call("resume", torn.path).stdout


def _killed(folder: str, tokenizer) -> None:
    """A process that computes a run, and is killed while it writes the second grid."""
    from interp.runs import language_specs, run

    language_specs.load = tiny_load(tokenizer)
    save = run.save_result

    def kill(result, stem):
        save(result, stem)
        if stem.name == "grid-2":
            (stem.parent / "grid-2.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    run.save_result = kill
    import yaml

    given = yaml.safe_load(PATCHING)
    execute(make_spec(given.pop("kind"), given, "here"), folder)


@posix
def test_a_killed_process_loses_nothing_finished(call, computed, tmp_path, tokenizer):
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(str(tmp_path / "killed"), tokenizer))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (path,) = (tmp_path / "killed").iterdir()
    run = Run.open(path)
    assert (run.state, run.names) == ("interrupted", ["grid-1"])
    assert f"to go on: interp resume {path}" in call("show", path).stdout
    assert call("resume", path, "--no-report").exit_code == 0
    assert files(Run.open(path)) == files(computed(PATCHING))


def test_a_run_is_verified(call, computed):
    run = computed(BARE)
    result = call("verify", run.path)
    assert result.exit_code == 0, result.output
    assert "largest relative deviation: 0, tolerance 0.0001" in result.stdout
    votes = run.load("input-1-votes-1")
    votes.map[0] += 1e-3 * votes.map.abs().max()
    run.save("input-1-votes-1", votes)
    result = call("verify", run.path, "--out", "second")
    assert result.exit_code == 1
    assert "not the same results" in result.stderr
    assert "second run: second/linear_scope-" in result.stdout
    assert call("verify", run.path, "--tolerance", "0.01").exit_code == 0
    assert call("verify", run.path, "--tolerance", "-1").exit_code == 2


def test_a_tolerance_is_that_of_the_coarsest_dtype(tmp_path):
    run = Run.create(tmp_path, "demo", {})
    assert default_tolerance(run) == TOLERANCES["float32"]
    run.provenance["models"] = {"a": {"dtype": "float64"}, "b": {"dtype": "bfloat16"}}
    assert default_tolerance(run) == TOLERANCES["bfloat16"]


def test_two_runs_are_compared(call, computed):
    first, second = computed(BARE), computed(BARE, "inputs.0.text=Mary gave the dog to", "token_blocks=null")
    result = call("diff", first.path, second.path)
    assert result.exit_code == 0, result.output
    for part in ("inputs[0].text", '"Mary gave the dog to"', f"not in {second.path.name}", "largest relative"):
        assert part in result.stdout
    assert "are the same" in call("diff", first.path, first.path).stdout


REFUSED = {
    "a changed specification": ("spec.json", lambda s: s | {"stability": True}, "was changed since the run was made"),
    "an unknown kind": ("provenance.json", lambda p: p | {"kind": "novel"}, "kind 'novel'"),
}


@pytest.mark.parametrize(("name", "change", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("command", ["resume", "verify"])
def test_what_cannot_be_computed_again_is_refused(call, tmp_path, command, name, change, said):
    run = Run.create(tmp_path, "linear_scope", {"model": "x", "inputs": [{"text": "the"}]})
    file = run.path / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    result = call(command, run.path)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "to do:" in result.stderr


def test_a_run_that_is_not_finished_is_not_verified(call, tmp_path):
    run = Run.create(tmp_path, "linear_scope", {"model": "x", "inputs": [{"text": "the"}]})
    assert f"interp resume {run.path}" in call("verify", run.path).stderr


def test_another_model_does_not_go_on(call, computed, monkeypatch, tokenizer):
    from interp.runs import scope_specs

    run = computed(BARE)
    run.status("failed", step="x", error="y")
    plain = tiny_load(tokenizer)

    def other(name):
        model = plain(name)
        model.identity["sha256"] = "1" * 64
        return model

    monkeypatch.setattr(scope_specs, "load", other)
    result = call("resume", run.path, "--no-report")
    assert result.exit_code == 1
    assert "make a new run" in result.stderr


def test_a_result_that_is_gone_is_computed_again(call, computed):
    run = computed(PATCHING)
    before = files(run)
    (run.path / "results" / "grid-2.json").unlink()
    assert Run.open(run.path).missing == ["grid-2"]
    result = call("show", run.path)
    assert result.exit_code == 2
    for part in ("grid-2.json is missing", f"interp resume {run.path}"):
        assert part in result.stderr
    assert call("resume", run.path, "--no-report").exit_code == 0
    assert files(run) == before


def test_show_names_a_corrupt_result_beside_the_others(call, computed):
    run = computed(PATCHING)
    file = run.path / "results" / "grid-1.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    result = call("show", run.path)
    assert result.exit_code == 2
    assert "grid-3: PatchGrid" in result.stdout
    assert f"{file} cannot be read" in result.stderr
    assert "delete it" in result.stderr


def test_a_comparison_sees_small_columns_and_numbers_that_are_none(tmp_path):
    from interp.hooks.table import Table
    from interp.runs.comparison import compare_runs

    first, second = (Run.create(tmp_path, "demo", {}) for _ in range(2))
    for run, p, error in ((first, 1e-6, 1e-8), (second, 2e-6, 3e-8)):
        run.save("rows", Table([{"id": 49_000, "probability": p, "completeness error": error}]))
        run.save("hole", Table([{"value": 1.0 if run is first else float("nan")}]))
    rows = {row["result"]: row for row in compare_runs(first, second).to_records()}
    assert rows["rows"]["relative"] == pytest.approx(0.5)
    assert rows["hole"]["relative"] == float("inf")
    assert torch.tensor(rows["rows"]["deviation"]) == pytest.approx(1e-6)
