"""Calls: what a page shows, as an expression of public names. It is carried out, and written down as Python.

A page never computes: it builds a call, and the same call gives the figure and the text under "copy as Python".
"""

import functools
import hashlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

Remember = Callable[["Call", Callable[[], Any]], Any]


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a public function, of a method of another call's result, a value, or an item of a result.

    Attributes:
        name: The variable that holds the result in the script.
        target: ``interp.logit_lens``, ``sklearn.datasets.load_sample_image``; with an owner, a method's name; ``=`` for
            a value, ``[]`` for an item and ``.`` for an attribute, the only argument of these.
        args: Plain data, and other calls.
        options: By name.
        owner: Whose method or item it is.
        stamp: State of what it reads outside, which tells its results apart; not part of the script.
    """

    name: str
    target: str
    args: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    owner: "Call | None" = None
    stamp: str = ""

    def stamped(self, stamp: str) -> "Call":
        """This call at a state of what it reads."""
        return replace(self, stamp=stamp)

    def method(self, name: str, method: str, *args: Any, **options: Any) -> "Call":
        """A method of this call's result, kept under a name."""
        return Call(name, method, args, tuple(options.items()), self)

    def attribute(self, name: str, attribute: str) -> "Call":
        """An attribute of this call's result."""
        return Call(name, ".", (attribute,), (), self)

    def item(self, name: str, index: Any) -> "Call":
        """An item of this call's result."""
        return Call(name, "[]", (index,), (), self)

    @functools.cached_property
    def key(self) -> str:
        """What tells this call from every other: a hash of its script and of the stamps in it."""
        text = "".join([script(self), *(c.stamp for c in self.needed())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def parts(self) -> tuple["Call", ...]:
        """The calls that it takes results from."""
        owner = () if self.owner is None else (self.owner,)
        return (*owner, *_calls((self.args, [v for _, v in self.options])))

    def needed(self) -> Iterator["Call"]:
        """All calls below it, first ones first, then itself."""
        for part in self.parts:
            yield from part.needed()
        yield self


def call(name: str, target: str, *args: Any, **options: Any) -> Call:
    """A call of a public function.

    Example:
        >>> prompt = value("prompt", "The cat")
        >>> print(script(call("lens", "interp.logit_lens", call("model", "interp.load", "gpt2"), prompt, k=3)))
        import interp
        <BLANKLINE>
        model = interp.load("gpt2")
        prompt = "The cat"
        lens = interp.logit_lens(model, prompt, k=3)
        <BLANKLINE>
    """
    return Call(name, target, args, tuple(options.items()))


def value(name: str, given: Any) -> Call:
    """Plain data under a name of its own."""
    return Call(name, "=", (given,))


def carry_out(wanted: Call, remember: Remember) -> Any:
    """The result of a call; of each call below it what ``remember`` has, or computes by the function it is given."""
    return remember(wanted, lambda: _perform(wanted, remember))


def script(*wanted: Call) -> str:
    """Python that gives each wanted call's result under its name, with public names only."""
    names, order = _named(wanted)
    lines = [f"{names[c]} = {_expression(c, names)}" for c in order]
    return "\n".join([*_imports(order), "", *lines, ""])


def _perform(wanted: Call, remember: Remember) -> Any:
    known = functools.partial(_with_results, remember=remember)
    args, options = known(wanted.args), {key: known(v) for key, v in wanted.options}
    if wanted.target == "=":
        return args[0]
    if wanted.owner is None:
        return _found(wanted.target)(*args, **options)
    owner = carry_out(wanted.owner, remember)
    if wanted.target == ".":
        return getattr(owner, args[0])
    return owner[args[0]] if wanted.target == "[]" else getattr(owner, wanted.target)(*args, **options)


def _found(target: str) -> Any:
    """What a dotted public name stands for."""
    module, _, name = target.rpartition(".")
    if module.startswith("interp."):  # A class method: interp.Observable.logit_diff.
        return getattr(_found(module), name)
    return getattr(importlib.import_module(module), name)


def _with_results(given: Any, remember: Remember) -> Any:
    """Plain data with the calls in it replaced by their results."""
    again = functools.partial(_with_results, remember=remember)
    if isinstance(given, Call):
        return carry_out(given, remember)
    if isinstance(given, (list, tuple)):
        return type(given)(map(again, given))
    return {k: again(v) for k, v in given.items()} if isinstance(given, dict) else given


def _calls(given: Any) -> Iterator[Call]:
    if isinstance(given, Call):
        yield given
    elif isinstance(given, (list, tuple)):
        for one in given:
            yield from _calls(one)
    elif isinstance(given, dict):
        yield from _calls(list(given.values()))


def _named(wanted: tuple[Call, ...]) -> tuple[dict[Call, str], list[Call]]:
    """A variable for each call, equal calls sharing one, and the calls in the order in which they are made."""
    names: dict[Call, str] = {}
    order: list[Call] = []
    by_text: dict[tuple[str, str], str] = {}
    for one in (c for w in wanted for c in w.needed()):
        text = _expression(one, names)
        same = by_text.get((one.name, text))
        if same is None:
            same = _free(one.name, set(by_text.values()))
            by_text[one.name, text] = same
            order.append(one)
        names[one] = same
    return names, order


def _free(name: str, taken: set[str]) -> str:
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 10_000))) if n not in taken)


def _expression(one: Call, names: dict[Call, str]) -> str:
    args = [_written(a, names) for a in one.args]
    if one.target == "=":
        return args[0]
    if one.target == ".":
        return f"{names[one.owner]}.{one.args[0]}"  # type: ignore[index]
    if one.target == "[]":
        return f"{names[one.owner]}[{args[0]}]"  # type: ignore[index]
    given = ", ".join([*args, *(f"{k}={_written(v, names)}" for k, v in one.options)])
    target = f"{names[one.owner]}.{one.target}" if one.owner else one.target
    return f"{target if target.startswith('interp.') or one.owner else target.rpartition('.')[2]}({given})"


def _written(given: Any, names: dict[Call, str]) -> str:
    if isinstance(given, Call):
        return names[given]
    if isinstance(given, list):
        return f"[{', '.join(_written(v, names) for v in given)}]"
    if isinstance(given, tuple):
        return f"({', '.join(_written(v, names) for v in given)}{',' if len(given) == 1 else ''})"
    if isinstance(given, dict):
        return "{" + ", ".join(f"{k!r}: {_written(v, names)}" for k, v in given.items()) + "}"
    text = repr(given)
    return f'"{text[1:-1]}"' if isinstance(given, str) and '"' not in text else text


def _imports(order: list[Call]) -> list[str]:
    targets = [c.target for c in order if c.owner is None and c.target != "="]
    others = sorted({t.rpartition(".")[::2] for t in targets if not t.startswith("interp.")})
    return ["import interp", *(f"from {module} import {name}" for module, name in others)]
