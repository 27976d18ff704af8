"""Site: the address of one activation."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Union

from interp.hooks.errors import SiteError

SiteLike = Union[str, "Site"]

_PATTERN = re.compile(
    r"(?P<address>[^:\[\]#@\s]+)"
    r"(?::(?P<io>in|out))?"
    r"(?P<selector>(?:\[[^\[\]]+\])*)"
    r"(?:#(?P<head>\d+(?:,\d+)*))?"
    r"(?:@(?P<positions>last|-?\d+(?:,-?\d+)*))?"
)
_GRAMMAR = "ADDRESS[:in|:out][[SELECTOR]...][#HEAD,...][@POSITION,...|@last]"


@dataclass(frozen=True)
class Site:
    """Address of one activation: frozen, hashable, parses from and prints to text.

    Text form: ``ADDRESS[:in|:out][[SELECTOR]...][#HEAD,...][@POSITION,...]``, for example
    ``blocks.6.attn.hook_z#3@5`` or ``features.3.conv:in``. A glob in the address selects many sites.

    Attributes:
        address: A canonical name (``blocks.6.hook_resid_post``) or a module's path (``features.3.conv``).
        io: For module paths: the module's input or its output.
        selector: Keys into a tuple or mapping, outermost first.
        head: Query heads (key/value heads at key and value sites), or None for all.
        positions: Token indices of each example (negative from its end), ``"last"``, or None for all.

    Example:
        >>> Site.parse("blocks.6.attn.hook_z#3@5")
        Site('blocks.6.attn.hook_z#3@5')
        >>> Site("blocks.0.hook_resid_pre").at(positions="last").positions
        'last'
    """

    address: str
    io: Literal["in", "out"] = "out"
    selector: tuple[int | str, ...] = ()
    head: tuple[int, ...] | None = None
    positions: tuple[int, ...] | Literal["last"] | None = None

    def __post_init__(self):
        """Bring ``head`` and ``positions`` to tuples; refuse what could not be printed and parsed back."""
        for name in ("head", "positions"):
            value = getattr(self, name)
            if isinstance(value, int):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, (list, range)):
                object.__setattr__(self, name, tuple(value))
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        try:
            match = _PATTERN.fullmatch(str(self))
        except TypeError:
            match = None
        if match is None or _read(match) != values:
            raise SiteError(f"site fields {values} do not print to a site's text", f"the form {_GRAMMAR}")

    @classmethod
    def parse(cls, text: SiteLike) -> "Site":
        """Return the site that ``text`` names (a Site passes through).

        Raises:
            SiteError: If the text does not have the form of a site.
        """
        if isinstance(text, Site):
            return text
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise SiteError(
                f"site {text!r} does not parse",
                f"the form {_GRAMMAR}",
                "for example 'blocks.6.attn.hook_z#3@5'",
            )
        return cls(**_read(match))

    def at(self, *, head=None, positions=None) -> "Site":
        """Return this site at other heads and positions; None keeps its own."""
        as_tuple = lambda v: (v,) if isinstance(v, int) else tuple(v) if isinstance(v, (list, range)) else v
        return replace(
            self,
            head=self.head if head is None else as_tuple(head),
            positions=self.positions if positions is None else as_tuple(positions),
        )

    @property
    def whole(self) -> "Site":
        """This site without heads and positions."""
        return replace(self, head=None, positions=None)

    @property
    def is_glob(self) -> bool:
        """Whether the address selects by pattern."""
        return any(c in self.address for c in "*?")

    def __str__(self) -> str:
        text = self.address + (":in" if self.io == "in" else "")
        text += "".join(f"[{key}]" for key in self.selector)
        if self.head is not None:
            text += "#" + ",".join(map(str, self.head))
        if self.positions is not None:
            text += "@" + ("last" if self.positions == "last" else ",".join(map(str, self.positions)))
        return text

    def __repr__(self) -> str:
        return f"Site({str(self)!r})"


def _read(match: re.Match[str]) -> dict[str, Any]:
    """The fields that a matched text stands for."""
    keys, positions = re.findall(r"\[([^\[\]]+)\]", match["selector"]), match["positions"]
    return {
        "address": match["address"],
        "io": "in" if match["io"] == "in" else "out",
        "selector": tuple(int(k) if re.fullmatch(r"-?\d+", k) else k for k in keys),
        "head": _ints(match["head"]),
        "positions": "last" if positions == "last" else _ints(positions),
    }


def _ints(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else tuple(int(part) for part in text.split(","))
