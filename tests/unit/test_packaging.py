"""The wheel, and imports from where users stand: a folder of theirs that has the name of one of our rooms."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("hooks", "probes", "apps")


def sources() -> set[str]:
    """Every Python file of the package, as a wheel names it."""
    own = {f"interp/{p.relative_to(ROOT / 'interp')}" for p in (ROOT / "interp").rglob("*.py")}
    return own | {f"interp/{p.relative_to(ROOT)}" for room in ROOMS for p in (ROOT / room).rglob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, so that neither old builds nor other files in the checkout get into it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    for room in ("interp", *ROOMS, "tests"):
        shutil.copytree(ROOT / room, copy / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_each_file_once_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert max(Counter(names).values()) == 1
    assert {name for name in names if name.endswith(".py")} == sources()
    (info,) = {top for name in names if (top := name.split("/")[0]) != "interp"}
    assert info.endswith(".dist-info")
    assert "interp/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if "test" in Path(name).name]


def test_the_wheel_names_its_command_and_its_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "interp = interp.apps.cli:main" in texts["entry_points.txt"]
    needs = [line for line in texts["METADATA"].splitlines() if line.startswith("Requires-Dist:")]
    assert not [line for line in needs if "extra ==" not in line and ("<" in line or "==" in line)], "an upper pin"


def run_beside_own_hooks(folder: Path, package: Path) -> list[str]:
    """Run a script in a folder that has its own hooks/, and return the files that it imported."""
    (folder / "hooks").mkdir()
    (folder / "hooks" / "__init__.py").write_text("OWNER = 'user'\n")
    script = folder / "script.py"
    script.write_text(
        "import interp.hooks.site, hooks\n"
        "assert hooks.OWNER == 'user'\n"
        "print(interp.__file__, interp.hooks.__file__, interp.hooks.site.__file__, sep='\\n')\n"
    )
    env = os.environ | {"PYTHONPATH": str(package)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_users_hooks_folder_does_not_hide_ours(tmp_path):
    for path in run_beside_own_hooks(tmp_path, ROOT):
        assert Path(path).is_relative_to(ROOT / "interp")


def test_a_users_hooks_folder_does_not_hide_the_installed_ones(wheel, tmp_path):
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    user = tmp_path / "user"
    user.mkdir()
    for path in run_beside_own_hooks(user, installed):
        assert Path(path).is_relative_to(installed / "interp")
