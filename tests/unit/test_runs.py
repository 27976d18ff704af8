"""Runs and results on disk: bit-exact, atomic, refused when foreign."""

import json
import multiprocessing

import pytest
import torch

from interp.attribution.direct import Attribution
from interp.hooks.errors import RunError
from interp.hooks.table import Table
from interp.hooks.votes import Votes
from interp.runs.run import Run, canonical
from interp.saving import load_result, save_result


def votes():
    blocks = {"hook_embed": torch.randn(5), "hook_pos_embed": torch.randn(5)}
    return Votes(blocks["hook_embed"], blocks, 0.1 + 0.2, 3.0, 1e-17, 0.3, ["a", "\n</script>", "ö", "d", "e"], "'x'")


def attribution(heads):
    layer = torch.randn(2)
    return Attribution("a - b", 1.5, heads, layer, layer, layer, {"embedding": 0.1}, 0.0, 1e-8, 3)


@pytest.mark.parametrize("result", [votes(), attribution(torch.randn(2, 4)), attribution(None)])
def test_results_come_back_bit_for_bit(result, tmp_path):
    save_result(result, tmp_path / "one")
    back = load_result(tmp_path / "one")
    for name, value in vars(result).items():
        again = getattr(back, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again)
            assert value.dtype == again.dtype
        elif name != "blocks":
            assert value == again
    assert not list(tmp_path.glob(".*")), "no temporary file stays"


def test_saving_twice_gives_the_same_bytes(tmp_path):
    result = votes()
    save_result(result, tmp_path / "one")
    save_result(result, tmp_path / "two")
    for end in ("json", "safetensors"):
        assert (tmp_path / f"one.{end}").read_bytes() == (tmp_path / f"two.{end}").read_bytes()


def test_foreign_and_corrupt_results_are_refused(tmp_path):
    with pytest.raises(RunError, match="type dict"):
        save_result({"a": 1}, tmp_path / "one")
    save_result(votes(), tmp_path / "one")
    record = json.loads((tmp_path / "one.json").read_text())
    for change, text in (({"format": 99}, "format 99"), ({"type": "os.system"}, "os.system")):
        (tmp_path / "bad.json").write_text(json.dumps(record | change))
        with pytest.raises(RunError, match=text):
            load_result(tmp_path / "bad")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        load_result(tmp_path / "bad")
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(RunError, match="is missing"):
        load_result(tmp_path / "one")


def test_a_second_run_is_a_second_run(tmp_path):
    spec = {"prompt": "hello", "k": 3}
    one, two = Run.create(tmp_path, "demo", spec), Run.create(tmp_path, "demo", dict(reversed(spec.items())))
    other = Run.create(tmp_path, "demo", spec | {"k": 4})
    assert one.path.name.endswith("-001")
    assert two.path.name == one.path.name[:-3] + "002"
    assert other.path.name.endswith("-001")
    assert canonical({"b": 1, "a": "ö"}) == '{"a":"ö","b":1}'


def test_a_run_opens_with_what_was_finished(tmp_path):
    run = Run.create(tmp_path, "demo", {})
    run.save("first", Table([{"a": 1}]))
    run.status("failed")
    again = Run.open(run.path)
    assert (again.state, again.names) == ("failed", ["first"])
    assert again.load("first").to_records() == [{"a": 1}]
    assert {"python", "torch", "transformers"} <= set(again.provenance["versions"])
    for name in ("../evil", "", ".hidden", "a/b"):
        with pytest.raises(RunError, match="plain file name"):
            run.save(name, Table([]))
    with pytest.raises(RunError, match="one of first"):
        run.load("second")


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        Run.open(tmp_path)
    run = Run.create(tmp_path, "demo", {})
    provenance = json.loads((run.path / "provenance.json").read_text())
    (run.path / "provenance.json").write_text(json.dumps(provenance | {"format": 99}))
    with pytest.raises(RunError, match="format 99"):
        Run.open(run.path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can be written"):
        Run.create(tmp_path / "file", "demo", {})


def _create(arguments):
    root, _ = arguments
    return Run.create(root, "demo", {"same": True}).path.name


def test_processes_that_start_at_once_never_share_a_folder(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        names = pool.map(_create, [(tmp_path, i) for i in range(6)])
    assert len(set(names)) == 6


def test_every_saved_type_can_be_found_and_drawn_types_are_saved():
    import importlib

    from interp.plots import _DRAWN_BY
    from interp.saving import _TYPES

    for kind, home in _TYPES.items():
        assert hasattr(importlib.import_module(home), kind)
    assert set(_DRAWN_BY) - {"LinearScope"} <= set(_TYPES), "a scope holds a live model and is not saved"


def _hold(path, ready, go):
    run = Run.open(path)
    with run.working() as step:
        run.save("first", Table([{"a": 1}]))
        step("waiting")
        ready.set()
        go.wait(60)


def test_one_process_at_a_time_works_on_a_run(tmp_path):
    run, context = Run.create(tmp_path, "demo", {}), multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(run.path, ready, go))
    process.start()
    assert ready.wait(60)
    assert run.state == "running"
    for write in (lambda: run.save("first", Table([{"a": 2}])), lambda: run.status("failed"), run.working().__enter__):
        with pytest.raises(RunError, match=f"process {process.pid} on .*one process at a time.*interp show"):
            write()
    go.set()
    process.join(60)
    assert (run.state, run.load("first")[0]) == ("finished", {"a": 1})
    run.save("first", Table([{"a": 2}]))
    assert run.load("first")[0] == {"a": 2}


def _save_often(arguments):
    path, seed = arguments
    run = Run.open(path)
    for _ in range(20):
        run.save("votes", Votes(torch.full((2000,), float(seed)), {}, float(seed), 3.0, 0.0, 0.0, None, "x"))


def test_processes_that_write_one_result_leave_one_of_theirs(tmp_path):
    run = Run.create(tmp_path, "demo", {})
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_save_often, [(run.path, 1), (run.path, 2)])
    found = run.load("votes")
    assert found.map.unique().tolist() == [found.total]
    assert not list(run.path.glob("*/.*.tmp"))


def test_a_file_that_is_damaged_is_named(tmp_path):
    run = Run.create(tmp_path, "demo", {})
    run.save("votes", votes())
    (run.path / "results" / "votes.safetensors").unlink()
    with pytest.raises(RunError, match=r"votes\.safetensors is missing.*interp resume"):
        run.load("votes")
    (run.path / "status.json").write_text("{")
    with pytest.raises(RunError, match=r"status\.json is corrupt.*restore it"):
        _ = run.state
    (run.path / "provenance.json").write_text("[]")
    with pytest.raises(RunError, match=r"provenance\.json holds list"):
        Run.open(run.path)
    (run.path / "provenance.json").unlink()
    with pytest.raises(RunError, match=r"provenance\.json cannot be read"):
        Run.open(run.path)


def test_provenance_says_where_results_come_from(tmp_path, monkeypatch):
    import subprocess

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert "git" not in Run.create(tmp_path, "demo", {}).provenance
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    (work / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    run = Run.create(tmp_path, "demo", {})
    assert (len(run.provenance["git"]["commit"]), run.provenance["git"]["changed"]) == (40, False)
    (work / "file").write_text("2")
    assert Run.create(tmp_path, "demo", {}).provenance["git"]["changed"]
    with run.working():
        pass
    assert list(Run.open(run.path).provenance["times"]) == ["made", "started", "finished"]
    assert run.provenance["command"]
