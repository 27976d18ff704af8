"""The rooms: who may import whom, what may not be written in them, and what the public face promises."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import interp
from interp import probes

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("hooks", "interp", "probes", "apps")
MAY_IMPORT = {
    "hooks": {"hooks"},
    "interp": {"hooks", "interp"},
    "probes": {"hooks", "interp", "probes"},
    "apps": {"hooks", "interp", "probes", "apps"},
}
FACE = ("interp", "interp.probes", "interp.causal")
HEAVY = {"transformers", "transformer_lens", "nnsight", "streamlit", "sklearn", "altair", "PIL"}
BASE_CLASSES = {"probes/estimator.py": {"sklearn"}}  # classes derive from scikit-learn's: nothing but probes imports it
MOST_LINES = 400

Remark = tuple[int, str]


def files(*folders: str) -> list[Path]:
    """Python files below folders of the repository; the links inside interp/ are not followed."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def remarks(check, *folders: str) -> list[str]:
    """What a check says about each file, with its place."""
    found = []
    for path in files(*folders):
        inside = path.relative_to(ROOT)
        for line, text in check(inside.parts[0], inside, ast.parse(path.read_text(encoding="utf-8"))):
            found.append(f"{inside}:{line}: {text}")
    return found


def imported(node: ast.AST) -> list[str]:
    """Names that an import statement names: `from interp import hooks` names interp.hooks."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == "interp":
        return [f"interp.{alias.name}" for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def at_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: no function bodies, nothing for type checkers only."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(inner, ast.If) and "TYPE_CHECKING" in ast.unparse(inner.test):
            for other in inner.orelse:
                yield other
                yield from at_module_level(other)
            continue
        yield inner
        yield from at_module_level(inner)


def room_of(name: str) -> str:
    """The room that a dotted name inside interp belongs to."""
    second = name.split(".")[1] if "." in name else ""
    return second if second in ROOMS else "interp"


# checks: each takes a room, a path and a tree, and yields (line, what is wrong)


def directions(room: str, path: Path, tree: ast.AST) -> Iterator[Remark]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "a relative import"
        for name in imported(node):
            top = name.split(".")[0]
            if top in ROOMS and top != "interp":
                yield node.lineno, f"import of a bare {top!r}, which is a second copy of interp.{top}"
            elif top == "interp" and room in MAY_IMPORT and room_of(name) not in MAY_IMPORT[room]:
                yield node.lineno, f"{room} imports {name}"


def public_face_only(room: str, path: Path, tree: ast.AST) -> Iterator[Remark]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "interp":
            names = {alias.name for alias in node.names}
            if node.module not in FACE or any(name.startswith("_") for name in names) or names & {"hooks", "apps"}:
                yield node.lineno, f"{ast.unparse(node)}: not the public face ({', '.join(FACE)})"
        elif isinstance(node, ast.Import):
            for name in imported(node):
                if name.split(".")[0] == "interp" and name not in FACE:
                    yield node.lineno, f"import of {name}: not the public face ({', '.join(FACE)})"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("interp.hooks", "interp.apps"):
            yield node.lineno, f"{ast.unparse(node)}: not the public face ({', '.join(FACE)})"


def heavy_imports(room: str, path: Path, tree: ast.AST) -> Iterator[Remark]:
    if room == "apps" or "plots" in (path.stem, path.parent.name):
        return
    for node in at_module_level(tree):
        for name in imported(node):
            if name.split(".")[0] in HEAVY - BASE_CLASSES.get(path.as_posix(), set()):
                yield node.lineno, f"{name} is imported with the module: import it where it is used"


def prints(room: str, path: Path, tree: ast.AST) -> Iterator[Remark]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "pprint"):
            yield node.lineno, "prints"


def broad_excepts(room: str, path: Path, tree: ast.AST) -> Iterator[Remark]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and _broad(node.type) and not _reraises(node):
            yield node.lineno, "catches everything and does not raise it again"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress") and any(map(_broad, node.args)):
            yield node.lineno, "suppresses everything"


def _broad(kind: ast.AST | None) -> bool:
    named = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or ast.unparse(k).split(".")[-1] in ("Exception", "BaseException") for k in named)


def _reraises(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and (last.exc is None or ast.unparse(last.exc) == handler.name)


# the repository


def test_there_is_something_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in files(*ROOMS)} == set(ROOMS)
    assert not [path for path in files("interp") if path.parent.is_symlink()]


@pytest.mark.parametrize(
    ("check", "folders"),
    [
        (directions, (*ROOMS, "tests", "tutorials")),
        (public_face_only, ("tutorials",)),
        (heavy_imports, ROOMS),
        (prints, ("hooks", "interp", "probes")),
        (broad_excepts, ("hooks", "interp", "probes")),
    ],
    ids=["directions", "public face", "heavy imports", "prints", "broad excepts"],
)
def test_no_file_breaks_a_rule(check, folders):
    assert remarks(check, *folders) == []


def test_no_file_is_long():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files(*ROOMS)}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


# the checks see what they should


@pytest.mark.parametrize(
    ("check", "path", "text", "count"),
    [
        (directions, "hooks/a.py", "import interp", 1),
        (directions, "hooks/a.py", "def f():\n  from interp.probes import suite", 1),
        (directions, "hooks/a.py", "from interp import hooks", 0),
        (directions, "hooks/a.py", "from interp import observables", 1),
        (directions, "hooks/a.py", "from interp.hooks.site import Site", 0),
        (directions, "hooks/a.py", "from . import site", 1),
        (directions, "interp/a.py", "import interp.apps.cli", 1),
        (directions, "interp/a.py", "from interp import probes", 1),
        (directions, "probes/a.py", "from interp.store.store import ActivationStore", 0),
        (directions, "probes/a.py", "from interp.apps import cli", 1),
        (directions, "apps/a.py", "from interp.probes import suite", 0),
        (directions, "tests/a.py", "import hooks.site", 1),
        (directions, "tests/a.py", "from probes import suite", 1),
        (public_face_only, "tutorials/a.py", "import interp\nfrom interp.probes import MomentProbe", 0),
        (public_face_only, "tutorials/a.py", "from interp.hooks.site import Site", 1),
        (public_face_only, "tutorials/a.py", "from interp import hooks", 1),
        (public_face_only, "tutorials/a.py", "import interp.observables.observable", 1),
        (public_face_only, "tutorials/a.py", "import interp\ninterp.hooks.site", 1),
        (public_face_only, "tutorials/a.py", "from interp.causal import _secret", 1),
        (heavy_imports, "probes/a.py", "from sklearn.svm import SVC", 1),
        (heavy_imports, "probes/estimator.py", "from sklearn.base import BaseEstimator", 0),
        (heavy_imports, "probes/estimator.py", "import transformers", 1),
        (heavy_imports, "probes/a.py", "class A:\n  import PIL.Image", 1),
        (heavy_imports, "probes/a.py", "def f():\n  import sklearn", 0),
        (heavy_imports, "probes/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import sklearn", 0),
        (heavy_imports, "probes/a.py", "try:\n  import nnsight\nexcept ImportError:\n  nnsight = None", 1),
        (heavy_imports, "interp/plots/lines.py", "import altair", 0),
        (heavy_imports, "apps/a.py", "import streamlit", 0),
        (prints, "hooks/a.py", "print('x')", 1),
        (prints, "hooks/a.py", "table.print()", 0),
        (broad_excepts, "hooks/a.py", "try:\n  f()\nexcept Exception:\n  pass", 1),
        (broad_excepts, "hooks/a.py", "try:\n  f()\nexcept:\n  pass", 1),
        (broad_excepts, "hooks/a.py", "try:\n  f()\nexcept (ValueError, BaseException) as e:\n  log(e)", 1),
        (broad_excepts, "hooks/a.py", "try:\n  f()\nexcept BaseException:\n  undo()\n  raise", 0),
        (broad_excepts, "hooks/a.py", "try:\n  f()\nexcept ValueError:\n  pass", 0),
        (broad_excepts, "hooks/a.py", "with suppress(Exception):\n  f()", 1),
    ],
)
def test_a_check_sees(check, path, text, count):
    room = path.split("/")[0]
    assert len(list(check(room, Path(path), ast.parse(text)))) == count


# the public face


@pytest.mark.parametrize("name", interp.__all__)
def test_a_public_name_resolves_and_is_explained(name):
    value = getattr(interp, name)
    text = (value.__doc__ or "").strip()
    assert text, f"interp.{name} has no docstring"
    assert not text.startswith(f"{name}("), f"interp.{name} has the docstring that dataclass makes up"
    home = getattr(value, "__module__", "interp")
    assert room_of(home) in MAY_IMPORT["interp"], f"interp.{name} comes from {home}"


@pytest.mark.parametrize(("face", "file"), [(interp, "interp/__init__.py"), (probes, "probes/__init__.py")])
def test_type_checkers_see_the_names_that_run_time_sees(face, file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    typed = {alias.name: node.module for block in blocks for node in block.body for alias in node.names}
    assert sorted(typed) == sorted(face.__all__) == sorted(set(face.__all__))
    assert set(face.__all__) <= set(dir(face))
    for name, module in typed.items():
        assert getattr(importlib.import_module(module), name) is getattr(face, name)


@pytest.mark.parametrize("face", [interp, probes])
def test_no_public_name_is_a_module_too(face):
    modules = {info.name for info in pkgutil.iter_modules(face.__path__)}
    assert not modules & set(face.__all__), "importing the module would put it in the name's place"


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        interp.nothing  # noqa: B018


def fresh(code: str) -> str:
    """What a new interpreter prints; interp is found in this checkout."""
    lead = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    done = subprocess.run([sys.executable, "-c", lead + code], capture_output=True, text=True, cwd=ROOT.anchor)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_interp_brings_nothing_but_itself_beside_torch():
    code = (
        "import torch\nbefore = set(sys.modules)\nimport interp\n"
        "tops = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(tops - sys.stdlib_module_names - {'interp'}))"
    )
    assert fresh(code) == "[]"


def test_the_probes_room_brings_no_heavy_package_before_a_probe_is_asked_for():
    code = f"import interp.probes, sys; print(sorted(set(sys.modules) & {HEAVY!r}))"
    assert fresh(code) == "[]"


@pytest.mark.parametrize("name", probes.__all__)
def test_a_public_name_of_probes_resolves_and_is_explained(name):
    text = (getattr(probes, name).__doc__ or "").strip()
    assert text, f"interp.probes.{name} has no docstring"
    assert not text.startswith(f"{name}("), f"interp.probes.{name} has the docstring that dataclass makes up"


def test_public_names_bring_no_heavy_package():
    code = (
        f"import interp\nfor name in interp.__all__: getattr(interp, name)\nprint(sorted(set(sys.modules) & {HEAVY!r}))"
    )
    assert fresh(code) == "[]"
