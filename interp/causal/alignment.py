"""Alignment: one algorithm, one network, one place, one map."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.causal.complexity import complexity
from interp.causal.controls import CONTROLS, Arms, ControlName, refuse_permuted, refuse_wrong
from interp.causal.data import InterchangeDataset, Pool, Splits, refuse_shared_pairs
from interp.causal.examples import interchange_examples
from interp.causal.lanes import Lane, Lanes
from interp.causal.maps import AlignmentMap, stack
from interp.causal.models import CausalModel
from interp.causal.neurons import NeuronSearch
from interp.causal.partition import Partition
from interp.causal.report import AlignmentReport
from interp.causal.scoring import score_lanes
from interp.causal.training import Fit, Progress, Training, fit_lanes
from interp.hooks.errors import ArgumentError, DegenerateDataError, ShapeMismatchError, UnmatchedVariableError
from interp.hooks.model import Model
from interp.hooks.site import SiteLike
from interp.hooks.table import Table


class Alignment:
    """A map of a site's activations whose blocks stand for an algorithm's variables.

    Args:
        model: The network.
        causal_model: The algorithm.
        sites: Where the variables are looked for; several sites are put side by side.
        tau: The map, trained in place.
        partition: Which coordinates carry which variable.
        cache: Whether the network below the sites is run once only; False for the whole network after each swap.

    Raises:
        UnmatchedVariableError: If the partition names a variable that the algorithm has not.
        ShapeMismatchError: If the blocks do not fit the map.

    Example:
        >>> import interp
        >>> from interp.causal import Alignment, IdentityMap, Partition, hierarchical_equality, mlp
        >>> task = hierarchical_equality()
        >>> model = interp.attach(mlp(task))
        >>> found = Alignment(model, task.causal_model, "block1", IdentityMap(16), Partition({"v1": 8, "v2": 8}))
        >>> found.intervene(*[task.pool(task.draw(2, torch.Generator().manual_seed(s))) for s in (0, 1)], ["v1"]).shape
        torch.Size([2, 2])
    """

    def __init__(
        self, model: Model, causal_model: CausalModel, sites: SiteLike | Sequence[SiteLike], tau: AlignmentMap,
        partition: Partition, *, cache: bool = True,
    ):  # fmt: skip
        for variable in partition.variables:
            if variable not in causal_model.variables:
                raise UnmatchedVariableError(
                    f"a block for {variable!r}",
                    f"variables of {causal_model.name}: {', '.join(causal_model.variables)}",
                )
        self.model, self.causal_model, self.sites, self.tau = model, causal_model, sites, tau
        self.partition, self.cache = partition, cache
        self.variables = tuple(v for v in causal_model.variables if v in partition.variables)
        self.mask = partition.mask(self.variables, tau.code_width)
        self.lane = Lane(model, sites, tau, self.mask, cache=cache)
        self.training: Training | None = None
        self.result: Fit | None = None
        self.search: NeuronSearch | None = None
        self._data: tuple[InterchangeDataset, InterchangeDataset] | None = None
        self._seed = 0

    def fit(
        self, train: InterchangeDataset | Splits, validation: InterchangeDataset | None = None,
        training: Training | None = None, *, seed: int = 0, progress: Progress = lambda _: None,
    ) -> Fit:  # fmt: skip
        """Train the map so that swapped runs give the algorithm's labels; keep it at the lowest validation loss.

        Args:
            train: Pairs, or splits, whose validation pairs are then taken.
            validation: Pairs that choose the step.
            training: The budget; by default that of `Training`.
            seed: Of the order of pairs.
            progress: Told of every validation.

        Raises:
            DegenerateDataError: If there are no validation pairs, they are among the training pairs, or nothing can be
                concluded from the training pairs (`InterchangeDataset.check`).
            UnmatchedVariableError: If the pairs intervene on a variable without a block.
            NonInvertibleMapError: If the map does not undo itself on real activations.
        """
        if isinstance(train, Splits):
            train, validation = train.train, train.validation
        if validation is None:
            raise DegenerateDataError("no validation pairs", "validation=, pairs that choose the step")
        training = Training() if training is None else training
        self._same_variables(train)
        self._same_variables(validation)
        train.check()
        refuse_shared_pairs(train, validation)
        self.result = fit_lanes([self.lane], train, validation, training, seed=seed, progress=progress)[0]
        before = 0 if self.training is None else self.training.steps  # of a map that goes on: controls get as many
        self.training = replace(training, steps=training.steps + before)
        self._data, self._seed = (train, validation), seed
        return self.result

    def searched(self, search: NeuronSearch, lane: Lane, evaluation: InterchangeDataset, training: Training) -> None:
        """Note that the blocks were searched for on these pairs: control arms then search too."""
        self.search, self.lane, self.training, self._data = search, lane, training, (evaluation, evaluation)
        self.result = search.as_fit()

    def evaluate(
        self, tests: InterchangeDataset | Mapping[str, InterchangeDataset] | Splits, *,
        controls: Sequence[ControlName] = ("random_model", "shuffle"), seeds: int = 3, restarts: int = 3,
        random_models: Sequence[Model] | None = None, wrong: CausalModel | None = None, by: Sequence[str] = (),
        measure: bool = True, progress: Progress = lambda _: None,
    ) -> AlignmentReport:  # fmt: skip
        """Score the map on held-out pairs, and train the control arms with the same pairs and budget.

        Args:
            tests: One split or several, the headline's first. An alignment that was loaded needs the `Splits` that it
                was trained on, since its controls are trained on the same pairs.
            controls: Which: ``random_model``, ``shuffle``, ``wrong_algorithm`` (needs ``wrong``), ``permuted``.
            seeds: Untrained networks of the first.
            restarts: Maps trained on each, of which the best counts.
            random_models: Untrained networks, where this one cannot be initialised anew.
            wrong: Another algorithm on the same inputs with as many variables.
            by: Kinds of groups to break the scores down by.
            measure: Whether to measure the map's complexity.
            progress: Told of every validation.

        Raises:
            ArgumentError: If a control or kind of groups is unknown, or a control needs what is not given.
            DegenerateDataError: If a split shares a pair with those that were trained on or chose, answers of one of
                its pairs begin with one token, or it has too few inputs to measure the map.
        """
        named = _named(tests)
        for data in named:
            self._same_variables(data)
            data.refuse_shared_tokens()
            if unknown := [kind for kind in by if kind not in data.pool.groups]:
                raise ArgumentError(f"by={unknown}", f"some of {', '.join(data.pool.groups) or 'no groups'}")
        self._controllable(tests, named, controls, seeds, restarts, wrong)
        for data in named:
            for fitted in self._data or ():
                refuse_shared_pairs(fitted, data)
        training = self.training or Training()
        measured = complexity(self.tau, self.lane.stage(named[0]).acts, self.mask) if measure else {}
        scores = [score_lanes([self.lane], data, training.readout, by)[0] for data in named]
        arms = Arms(self.lane, self._data, named[0], training, self._seed, progress)
        found = {}
        for name in controls:
            if name == "random_model":
                found[name] = arms.random_model(seeds, restarts, random_models)
            elif name == "shuffle":
                found[name] = arms.shuffle(seeds)
            elif name == "wrong_algorithm":
                found[name] = arms.wrong_algorithm(wrong)
            else:
                found[name] = arms.permuted(self.partition, self.variables)
        fit = asdict(self.result) if self.result else {}
        report = AlignmentReport(
            f"{self.tau} at {self.sites}, {self.causal_model.name}", str(training), scores, found, measured, fit
        )
        report.warn()
        return report

    @torch.no_grad()
    def intervene(
        self, base: Pool, source: Pool, variables: Sequence[str] | None = None
    ) -> Float[Tensor, "rows labels"]:
        """Return the network's output on bases with variables set to their values on sources, row by row.

        Args:
            base: Inputs, from `Task.pool`.
            source: As many inputs.
            variables: Which are set; by default all that have a block.

        Raises:
            ShapeMismatchError: If there is not one source for each base.
            UnmatchedVariableError: If a variable has no block.
        """
        if len(base) != len(source):
            raise ShapeMismatchError(f"{len(base)} bases, {len(source)} sources", "one source for each base")
        names = self.variables if variables is None else tuple(variables)
        if unknown := [v for v in names if v not in self.variables]:
            raise UnmatchedVariableError(f"variables {unknown}", f"variables with a block: {', '.join(self.variables)}")
        both = _joined(base, source)
        n, rows = len(base), torch.arange(len(base))
        chosen = torch.tensor([v in names for v in self.variables]).expand(n, -1)
        data = InterchangeDataset.pair(
            self.causal_model, both, rows, (rows + n)[:, None].expand(-1, len(self.variables)), chosen,
            variables=self.variables,
        )  # fmt: skip
        lane = copy.copy(self.lane)
        lane.stages = {}
        lanes = Lanes([lane], data, "vocabulary" if both.candidates is None else "candidates")
        return lanes.logits(stack([self.tau]).eval(), rows)[0]

    def examples(self, data: InterchangeDataset, n: int = 20) -> Table:
        """Return single interventions to look at: pairs that flip the label and pairs that keep it, in turn.

        Each row has the base, the variables with their values before and after, their sources, and what algorithm and
        network answer before and after.

        Args:
            data: Pairs.
            n: How many.

        Raises:
            ArgumentError: If n is not a positive int.
            UnmatchedVariableError: If the pairs intervene on a variable without a block.

        Example:
            >>> import interp
            >>> from interp.causal import Alignment, IdentityMap, Partition, hierarchical_equality, mlp
            >>> task = hierarchical_equality()
            >>> model, blocks = interp.attach(mlp(task)), Partition({"v1": 8, "v2": 8})
            >>> found = Alignment(model, task.causal_model, "block1", IdentityMap(16), blocks)
            >>> found.examples(task.sample(50, seed=0), 4).columns[-5:]
            ['algorithm before', 'algorithm', 'network before', 'network', 'right']
        """
        self._same_variables(data)
        return interchange_examples(self, data, n)

    def _controllable(
        self, tests: Any, named: Sequence[InterchangeDataset], controls: Sequence[str], seeds: int, restarts: int,
        wrong: CausalModel | None,
    ) -> None:  # fmt: skip
        """Refuse controls that cannot be run, before any is."""
        if unknown := [c for c in controls if c not in CONTROLS]:
            raise ArgumentError(f"controls {unknown}", f"some of {', '.join(CONTROLS)}")
        if seeds < 1 or restarts < 1:
            raise ArgumentError(f"seeds={seeds}, restarts={restarts}", "at least 1 of each")
        if "permuted" in controls:
            refuse_permuted(self.tau.kind, self.variables)
        if "wrong_algorithm" in controls:
            refuse_wrong(named[0], wrong)
        if self.result is None or self._data is not None or not set(controls) - {"permuted"}:
            return
        searched = self.tau.kind == "identity" and self.result.steps > 0
        if searched or not isinstance(tests, Splits):
            raise ArgumentError(
                "controls of an alignment that was loaded without the pairs that it was trained on",
                "the same pairs, to train the controls with", "controls=(), " + (
                    "or greedy_neurons(...) again" if searched else "or evaluate(splits), the Splits it was trained on"
                ),
            )  # fmt: skip
        self._data = (tests.train, tests.validation)

    def _same_variables(self, data: InterchangeDataset) -> None:
        if data.variables != self.variables:
            raise UnmatchedVariableError(
                f"pairs that intervene on {', '.join(data.variables)}",
                f"the variables with a block: {', '.join(self.variables)}",
                "give each variable a block, or draw pairs with task.with_variables(...)",
            )
        if data.causal_model.name != self.causal_model.name:
            raise UnmatchedVariableError(
                f"pairs with labels of {data.causal_model.name!r}", f"labels of {self.causal_model.name!r}",
                "InterchangeDataset.under(algorithm) asks another algorithm for the labels",
            )  # fmt: skip

    def __repr__(self) -> str:
        return f"Alignment({self.causal_model.name!r}, {self.sites}, {self.tau}, {self.partition})"


def _named(tests: Any) -> list[InterchangeDataset]:
    if isinstance(tests, Splits):
        tests = tests.tests
    found = [tests] if isinstance(tests, InterchangeDataset) else list(tests.values())
    if not found:
        raise DegenerateDataError("no test split", "at least one")
    return found


def _joined(base: Pool, source: Pool) -> Pool:
    tensors = isinstance(base.inputs, Tensor)
    inputs = torch.cat([base.inputs, source.inputs]) if tensors else [*base.inputs, *source.inputs]
    settings = {name: torch.cat([value, source.settings[name]]) for name, value in base.settings.items()}
    both = base.candidates is not None and source.candidates is not None
    candidates = torch.cat([base.candidates, source.candidates]) if both else None  # type: ignore[list-item]
    return Pool(inputs, settings, {}, candidates)
