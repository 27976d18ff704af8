"""Which mode each call is linearised in: the linearization's field for its kind, or an override that fits it."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from interp.hooks.errors import ArgumentError
from interp.hooks.linearization import Linearization

if TYPE_CHECKING:
    from interp.hooks.tape import Call

_QUOTED = 3


class Choices:
    """The modes of one run, and what became of each override.

    An override fits a call whose innermost module has a path that matches the glob, or a type of that name; or a call
    of that name, also inside a fused call of that name. It applies where the call has the mode; of several, the first.

    Args:
        linearization: The fields and the overrides.
    """

    def __init__(self, linearization: Linearization):
        self.overrides = linearization.overrides
        self.applied: set[str] = set()
        self.passed: dict[str, list[str]] = {}
        self._taken: dict[str, str] = {}

    def mode(self, call: "Call", modes: Sequence[str], default: str, by_name: Sequence[str] = ()) -> str:
        """Return the mode of a call.

        Args:
            call: The call.
            modes: Modes that it has.
            default: Its mode without overrides.
            by_name: Modes that it has only where an override names the call itself.
        """
        chosen = None
        for pattern, mode in self.overrides.items():
            named = pattern in call.names
            if not (named or pattern == call.type or fnmatchcase(call.path, pattern)):
                continue
            has = (*modes, *by_name) if named else modes
            if mode.partition(":")[0] not in has:
                self.passed.setdefault(pattern, []).append(f"{call}, which has {' or '.join(has)}")
            elif chosen is None:
                chosen = mode
                self.applied.add(pattern)
            else:
                self._taken[pattern] = f"{call} was taken by an override before it"
        return default if chosen is None else chosen

    def check(self) -> None:
        """Refuse overrides that changed nothing.

        Raises:
            ArgumentError: Naming the override, what it met and the modes which that has.
        """
        for pattern, mode in self.overrides.items():
            if pattern in self.applied:
                continue
            met = list(dict.fromkeys(self.passed.get(pattern, [])))[:_QUOTED]
            if pattern in self._taken:
                met = [self._taken[pattern]]
            raise ArgumentError(
                f"override {pattern!r}: {mode!r} applied to no call",
                f"a call that has this mode; it met {'; '.join(met) or 'none that has a choice'}",
                "name a module's path or type or a call as in scope.units, and a mode that it has",
            )
