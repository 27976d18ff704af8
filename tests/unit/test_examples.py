"""The examples in docstrings run. Those that load a packaged model are in the slow tier."""

import doctest
import importlib
import pkgutil

import pytest

import interp

ROOMS = ("interp", "interp.hooks", "interp.probes", "interp.apps")


def modules():
    for room in ROOMS:
        package = importlib.import_module(room)
        yield room
        for info in pkgutil.iter_modules(package.__path__, f"{room}."):
            if info.name not in ROOMS:
                yield info.name
                inner = importlib.import_module(info.name)
                if info.ispkg:
                    yield from (i.name for i in pkgutil.iter_modules(inner.__path__, f"{info.name}."))


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in dict.fromkeys(modules()):
        for example in finder.find(importlib.import_module(name), name):
            if example.examples:
                marks = [pytest.mark.slow] if "interp.load(" in example.docstring else []
                yield pytest.param(example, id=example.name, marks=marks)


@pytest.mark.parametrize("example", list(examples()))
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_there_are_examples():
    names = {p.id.rsplit(".", 1)[-1] for p in examples()}
    assert {"attach", "run", "capture", "Site", "LinearScope", "direct_attribution"} <= names
    assert interp.__version__
