"""Report: an interchange intervention accuracy beside the controls that give it a meaning."""

import warnings
from dataclasses import dataclass, field
from typing import Any

from interp.causal.scoring import Score
from interp.hooks.errors import UncontrolledError
from interp.hooks.table import Rows, Table
from interp.intervals import Interval

NEEDED = ("random_model", "shuffle")


class CausalAbstractionWarning(UserWarning):
    """Something about an alignment that a reader of its accuracy must know."""


@dataclass(frozen=True)
class Control(Rows):
    """One control arm.

    Attributes:
        name: Which.
        values: Headline accuracy of every seed: of each, the best of its restarts.
        trained: Whether each left the plateau of a constant guess; an arm that did not says nothing about the map.
        note: What was done.
        beside: Further numbers.
    """

    name: str
    values: list[float]
    trained: list[bool]
    note: str
    beside: dict[str, float] = field(default_factory=dict)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each seed."""
        pairs = zip(self.values, self.trained, strict=True)
        return [{"control": self.name, "value": v, "trained": t} for v, t in pairs]

    @property
    def value(self) -> float:
        """The mean over seeds; of untrained networks over those whose map was trained, where there is one.

        Maps of permuted labels should not get off the plateau: all of them count.
        """
        kept = [v for v, t in zip(self.values, self.trained, strict=True) if t or self.name != "random_model"]
        kept = kept or self.values
        return sum(kept) / len(kept)

    def __str__(self) -> str:
        label = "" if any(self.trained) or self.name != "random_model" else " (not trained)"
        return f"{self.value:.2f}{label}"


@dataclass(frozen=True)
class AlignmentReport(Rows):
    """What an alignment was found to do, on held-out pairs.

    The accuracy can be read as ``iia`` only if the controls ``random_model`` and ``shuffle`` were run: any algorithm
    can be aligned with any network by a map that is flexible enough (Sutter et al. 2025).

    Attributes:
        what: Map, site, algorithm.
        budget: How it was trained.
        scores: One for each test split, the first being the headline's.
        controls: By name.
        complexity: Numbers that say how flexible the map is.
        fit: Steps, loss, and whether the map was trained.
    """

    what: str
    budget: str
    scores: list[Score]
    controls: dict[str, Control]
    complexity: dict[str, float] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)

    @property
    def controlled(self) -> bool:
        """Whether the needed controls were run."""
        return all(name in self.controls for name in NEEDED)

    @property
    def iia(self) -> Interval:
        """The headline accuracy on the first test split.

        Raises:
            UncontrolledError: If a needed control was not run.
        """
        if not self.controlled:
            raise UncontrolledError(
                f"iia of {self.what} without {', '.join(n for n in NEEDED if n not in self.controls)}",
                "the controls that give it a meaning",
                "evaluate(..., controls=('random_model', 'shuffle')), or read uncontrolled_iia",
            )
        return self.scores[0].headline

    @property
    def uncontrolled_iia(self) -> Interval:
        """The same, whatever was run: by itself it says nothing about the network."""
        return self.scores[0].headline

    @property
    def selectivity(self) -> float:
        """IIA minus that of untrained networks of the same architecture.

        Raises:
            UncontrolledError: If a needed control was not run.
        """
        return self.iia.estimate - self.controls["random_model"].value

    @property
    def line(self) -> str:
        """IIA with interval, controls and selectivity; or a word on what is missing."""
        if not self.controlled:
            missing = ", ".join(n for n in NEEDED if n not in self.controls)
            return f"IIA withheld: controls not run ({missing})"
        names = {"random_model": "random N", "shuffle": "shuffled"}
        parts = [f"{names.get(c.name, c.name.replace('_', ' '))} {c}" for c in self.controls.values()]
        label = "" if self.fit.get("trained", True) else " (not trained)"
        return f"IIA {self.iia}{label} | {' | '.join(parts)} | selectivity {self.selectivity:+.2f}"

    def table(self) -> Table:
        """One row for each test split."""
        return Table(self.to_records(), self.what)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each test split, with the controls in each; accuracies are left out without controls."""
        found = []
        for score in self.scores:
            row = score.to_records()[0]
            if not self.controlled:
                row = {k: row[k] for k in ("split", "n", "model accuracy", "do nothing", "full swap", "best constant")}
            controls = {f"control {c.name}": c.value for c in self.controls.values()}
            chosen = {"selectivity": self.selectivity} if self.controlled else {}
            found.append({**row, **controls, **chosen, **self.complexity})
        return found

    def __repr__(self) -> str:
        lines = [f"{self.what}; {self.budget}", self.line]
        for control in self.controls.values():
            values = " / ".join(
                f"{v:.3f}" + ("" if t else " not trained" if control.name == "random_model" else "")
                for v, t in zip(control.values, control.trained, strict=True)
            )
            more = "".join(f"; {k} {v:.3f}" for k, v in control.beside.items())
            lines.append(f"  {control.name.replace('_', ' ')}: {values} ({control.note}){more}")
        for score in self.scores if self.controlled else []:
            one = lambda x: "-" if x is None else f"{x:.3f}"
            base = ", ".join(f"{k} {v:.3f}" for k, v in score.baselines.items())
            lines.append(
                f"  {score.split}: {score.headline}, flip {one(score.flip)}, stay {one(score.stay)}, all "
                f"{score.plain:.3f}; network {score.model_accuracy:.3f}; {base}"
            )
        return "\n".join(lines)

    def warn(self) -> None:
        """Say what a reader must know: a network that errs often, an accuracy within a baseline, a strong control."""
        score = self.scores[0]
        say = lambda text: warnings.warn(f"{self.what}: {text}", CausalAbstractionWarning, stacklevel=3)
        if score.model_accuracy < 0.9:
            say(f"the network is right on {score.model_accuracy:.2f} of the bases: below 0.9 an IIA measures that too")
        constant = score.baselines["best constant"]
        if score.plain <= constant + (score.headline.high - score.headline.estimate):
            say(f"the accuracy {score.plain:.3f} is within the interval of the best constant guess, {constant:.3f}")
        random = self.controls.get("random_model")
        if random is not None and random.value > 0.6:
            say(f"untrained networks reach {random.value:.2f}: this map needs no network that has learned the task")
        if self.fit.get("stopped") and len(self.fit.get("losses", [0, 0])) <= 1:
            say("training ended at the first validation")
