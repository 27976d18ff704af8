"""Paths: chains of components in execution order, such as ``L6H6@3 -> L9H1@3 -> L13MLP -> logits@-1``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Union

from interp.hooks.errors import ArgumentError, PositionError
from interp.hooks.model import Model
from interp.propagation.reference import no_stream

PathLike = Union[str, "Path", Sequence["Step"]]

_STEP = re.compile(r"L(?P<layer>\d+)(?:H(?P<head>\d+)(?:@(?P<source>-?\d+))?|(?P<mlp>MLP))")
_FORM = "L9H1@3 -> L13MLP -> L13H11@5 [-> logits@-1], in execution order, @ the source position of a head"


@dataclass(frozen=True)
class Step:
    """One component of a path.

    Attributes:
        layer: Which block.
        head: Query head, or None for the block's MLP.
        source: Position that the head reads, or None.
    """

    layer: int
    head: int | None = None
    source: int | None = None

    @property
    def kind(self) -> Literal["head", "mlp"]:
        """``head`` or ``mlp``."""
        return "mlp" if self.head is None else "head"

    def __str__(self) -> str:
        if self.head is None:
            return f"L{self.layer}MLP"
        return f"L{self.layer}H{self.head}" + ("" if self.source is None else f"@{self.source}")


@dataclass(frozen=True)
class Path:
    """Components from the input end to the logits, and the position whose logits are measured.

    Attributes:
        steps: Components in execution order; none for the path from the final stream alone.
        position: Position of the logits (negative from the end).
        embed: Whether the path begins at the token embedding rather than at the first component's input.

    Example:
        >>> str(Path.parse("L6H6@3 -> L9H1@3 -> logits@-1"))
        'L6H6@3 -> L9H1@3 -> logits@-1'
    """

    steps: tuple[Step, ...]
    position: int = -1
    embed: bool = False

    @classmethod
    def parse(cls, text: PathLike) -> "Path":
        """Return the path that a text or a list of steps names (a Path passes through).

        Raises:
            ArgumentError: If the text does not have the form of a path.
        """
        if isinstance(text, Path):
            return text
        if not isinstance(text, str):
            return cls(tuple(text))
        parts = [part.strip() for part in text.split("->")] if text.strip() else []
        position, embed = -1, False
        if parts and (match := re.fullmatch(r"logits(?:@(-?\d+))?", parts[-1])):
            position, parts = int(match[1] or -1), parts[:-1]
        if parts and parts[0] == "embed":
            embed, parts = True, parts[1:]
        steps = []
        for part in parts:
            match = _STEP.fullmatch(part)
            if match is None:
                raise ArgumentError(f"path step {part!r}", f"the form {_FORM}")
            number = lambda text: None if text is None else int(text)
            steps.append(Step(int(match["layer"]), number(match["head"]), number(match["source"])))
        return cls(tuple(steps), position, embed)

    def extended(self, step: Step) -> "Path":
        """This path with one more component at its input end."""
        return Path((step, *self.steps), self.position, self.embed)

    def check(self, model: Model, length: int | None = None) -> "Path":
        """Return the path with positions counted from 0, after checking that its edges exist.

        Args:
            model: The model that it runs through.
            length: Number of tokens of the prompt; None where there is none (then no positions are allowed).

        Raises:
            ArgumentError: If a layer or head does not exist, or a component cannot feed the next.
            PositionError: If a position lies outside the prompt, or behind the position that it feeds.
            SiteUnavailableError: If the model has no layout.
        """
        if model.layout is None:
            raise no_stream(model)
        for step in self.steps:
            _exists(model, step)
        for early, late in zip(self.steps, self.steps[1:], strict=False):
            _feeds(early, late, model.layout.parallel)
        return self if length is None else self._placed(length)

    def _placed(self, length: int) -> "Path":
        position = here = _from_zero(self.position, length)
        placed: list[Step] = []
        for step in reversed(self.steps):
            if step.source is not None:
                source = _from_zero(step.source, length)
                if source > here:
                    raise PositionError(f"source position {source} is after destination {here}", "a causal path")
                here = source
                step = Step(step.layer, step.head, source)
            placed.append(step)
        return Path(tuple(reversed(placed)), position, self.embed)

    def __str__(self) -> str:
        parts = [*(["embed"] if self.embed else []), *map(str, self.steps), f"logits@{self.position}"]
        return " -> ".join(parts)


def feeds(early: Step, late: Step, parallel: bool) -> bool:
    """Whether one component writes to what the other reads."""
    if early.layer != late.layer:
        return early.layer < late.layer
    return not parallel and early.kind == "head" and late.kind == "mlp"


def _feeds(early: Step, late: Step, parallel: bool) -> None:
    if feeds(early, late, parallel):
        return
    if parallel and early.layer == late.layer and early.kind != late.kind:
        raise ArgumentError(
            f"L{early.layer} attention and MLP are parallel in this model", "components of which one feeds the other"
        )
    raise ArgumentError(f"path goes backwards: {early} cannot feed {late}", "components in execution order")


def _exists(model: Model, step: Step) -> None:
    layout = model.layout
    assert layout is not None
    if not 0 <= step.layer < model.n_layers:
        raise ArgumentError(f"layer {step.layer} of {step}", f"layers 0-{model.n_layers - 1}")
    if step.head is not None and not 0 <= step.head < layout.n_heads:
        raise ArgumentError(
            f"head {step.head} out of range for layer {step.layer}",
            f"{layout.n_heads} query heads (0-{layout.n_heads - 1}), {layout.n_kv_heads} key/value heads",
        )


def _from_zero(position: int, length: int) -> int:
    if not -length <= position < length:
        raise PositionError(f"position {position}", f"an int in {-length}..{length - 1} ({length} tokens)")
    return position % length
