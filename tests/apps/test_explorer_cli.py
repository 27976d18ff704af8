"""interp explore: what it refuses before a server starts, and what it starts."""

import json
import shutil
import socket

import pytest
from typer.testing import CliRunner

import interp
from interp.apps import cli
from interp.apps.explorer import desk, launch
from tests.apps.samples import tiny_load
from tests.apps.serving import free_port


@pytest.fixture
def call(monkeypatch, tmp_path, tokenizer):
    """Run the command on tiny models, with a server that only notes how it was started."""
    desk.workshop.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interp, "load", tiny_load(tokenizer), raising=False)
    for name in ("INTERP_EXPLORE_RUN", "INTERP_EXPLORE_MODEL"):
        monkeypatch.setenv(name, "")
    started: list = []
    monkeypatch.setattr(launch, "serve", lambda port, **options: started.append((port, options)))
    run = lambda *words: CliRunner().invoke(cli.app, ["explore", "--no-window", *words])
    run.started = started
    return run


def refused(call, words, *parts) -> None:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert call.started == []
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


def test_the_model_is_loaded_and_the_server_started(call):
    port = free_port()
    result = call("--model", "tiny-words", "--port", str(port))
    assert result.exit_code == 0, result.output
    assert f"http://127.0.0.1:{port}" in result.stdout
    assert call.started == [(port, {"window": False})]
    assert len(desk.workshop()._models) == 1


def test_a_saved_run_loads_no_model(call, tiny_run):
    result = call(str(tiny_run.path), "--port", str(free_port()))
    assert result.exit_code == 0, result.output
    assert desk.workshop()._models == {}


def test_a_port_that_is_taken_is_refused(call):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(call, ["--port", str(port)], f"port {port}", "a free port", f"--port {port + 1}")


def test_a_port_that_is_none_is_refused(call):
    refused(call, ["--port", "70000"], "port 70000", "1..65535")


def test_what_is_no_run_is_refused(call, tmp_path, tiny_run):
    refused(call, [str(tmp_path)], "is not a run folder")
    newer = tmp_path / "newer"
    shutil.copytree(tiny_run.path, newer)
    provenance = json.loads((newer / "provenance.json").read_text())
    (newer / "provenance.json").write_text(json.dumps(provenance | {"format": 99}))
    refused(call, [str(newer)], "format 99", "update interp")


def test_an_unknown_model_is_refused(call, monkeypatch):
    from interp.hooks.attach import load

    monkeypatch.setattr(interp, "load", load)
    refused(call, ["--model", "smollm2-135", "--port", str(free_port())], "smollm2-135m")


def test_without_streamlit_the_extra_is_named(call, monkeypatch):
    plain = launch.importlib.util.find_spec
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda n: None if n == "streamlit" else plain(n))
    refused(call, [], "interp[explorer]")
