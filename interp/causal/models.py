"""CausalModel: an algorithm as a directed acyclic graph, evaluated for many inputs at once."""

import graphlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from interp.hooks.errors import ArgumentError, ShapeMismatchError, UnmatchedVariableError

Mechanism = Callable[..., Tensor]
Values = Mapping[str, Any]
OUTPUT = "output"


class CausalModel:
    """A deterministic algorithm: inputs, hidden variables and one output, each a function of its parents.

    Every value has a first axis over examples: a variable that is a number is a tensor [n], one that is a vector is
    [n, k]. Mechanisms take the parents' tensors and return a tensor of n values; the output is the number of a label.
    Geiger et al. 2021 (arXiv 2106.02997), section 2.

    Args:
        inputs: Names of the inputs.
        nodes: For each hidden variable its parents and its mechanism, in any order.
        output: The parents and the mechanism of the output.
        labels: Number of labels, 0 to labels - 1.
        name: For messages and files.

    Raises:
        ArgumentError: If a name is used twice, a parent does not exist, or the graph has a cycle.

    Example:
        >>> model = CausalModel(["a", "b", "c"], {"sum": (["a", "b"], torch.add)}, (["sum", "c"], torch.gt))
        >>> base = {"a": [1, 1], "b": [1, 1], "c": [1, 1]}
        >>> model.run(base)["output"].tolist()
        [1, 1]
        >>> model.run(base, do={"sum": [0, 5]})["output"].tolist()
        [0, 1]
    """

    def __init__(
        self, inputs: Sequence[str], nodes: Mapping[str, tuple[Sequence[str], Mechanism]],
        output: tuple[Sequence[str], Mechanism], *, labels: int = 2, name: str = "causal model",
    ):  # fmt: skip
        self.inputs, self.variables, self.labels, self.name = tuple(inputs), tuple(nodes), labels, name
        self.mechanisms = {**{v: (tuple(p), f) for v, (p, f) in nodes.items()}, OUTPUT: (tuple(output[0]), output[1])}
        names = [*self.inputs, *self.variables, OUTPUT]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ArgumentError(f"{name}: {', '.join(twice)} used twice", "one name for one node ('output' is taken)")
        for node, (parents, _) in self.mechanisms.items():
            if unknown := [p for p in parents if p not in names or p == OUTPUT]:
                raise ArgumentError(f"{name}: parents {unknown} of {node!r}", f"some of {', '.join(names[:-1])}")
        try:
            order = graphlib.TopologicalSorter({n: p for n, (p, _) in self.mechanisms.items()}).static_order()
            self.order = tuple(n for n in order if n in self.mechanisms)
        except graphlib.CycleError as error:
            raise ArgumentError(f"{name}: a cycle {' -> '.join(error.args[1])}", "an acyclic graph") from error

    def run(
        self, inputs: Values, do: Values | None = None, where: Mapping[str, Bool[Tensor, "n"]] | None = None
    ) -> dict[str, Tensor]:
        """Return the value of every node, hidden ones by name and the label as ``output``, under an intervention.

        The function of an intervened node is not called, unless it is intervened on in some examples only.

        Args:
            inputs: One value of each input for each example; a bare number for one example.
            do: Values that hidden variables are set to.
            where: For a variable in ``do``, the examples in which it is set; by default all.

        Raises:
            UnmatchedVariableError: If an input is missing, a variable does not exist, or the label is undefined.
            ShapeMismatchError: If inputs or values have different numbers of examples.
        """
        values = self._checked(inputs)
        n = len(next(iter(values.values())))
        forced = {v: self._forced(v, value, n) for v, value in (do or {}).items()}
        for node in self.order:
            parents, mechanism = self.mechanisms[node]
            chosen = None if where is None or node not in forced else where.get(node)
            if node in forced and chosen is None:
                values[node] = forced[node]
                continue
            values[node] = torch.as_tensor(mechanism(*(values[p] for p in parents)))
            if node in forced and chosen is not None:
                mask = chosen.view(-1, *[1] * (values[node].ndim - 1))
                values[node] = torch.where(mask, forced[node].to(values[node].dtype), values[node])
        values[OUTPUT] = self._labels(values[OUTPUT], n)
        return values

    def interchange(
        self, base: Values, sources: Mapping[str, Values], chosen: Mapping[str, Bool[Tensor, "n"]] | None = None
    ) -> Int64[Tensor, "n"]:
        """Return the labels A(base | do(v = A(source of v)[v])): what the network should answer when swapped.

        Args:
            base: Inputs.
            sources: For each intervened variable the inputs from whose run its value is taken.
            chosen: For a variable, the examples in which it is intervened on; by default all.

        Raises:
            UnmatchedVariableError: If a variable does not exist or has no source.

        Example:
            >>> model = CausalModel(["a", "b"], {"v": (["a"], torch.neg)}, (["v", "b"], torch.gt))
            >>> model.interchange({"a": [1], "b": [0]}, {"v": {"a": [-3], "b": [0]}}).tolist()
            [1]
        """
        for variable, source in sources.items():
            self._known(variable)
            if source is None:
                raise UnmatchedVariableError(f"source None for {variable!r}", "inputs whose run gives its value")
        do = {v: self.run(source)[v] for v, source in sources.items()}
        return self.run(base, do, chosen)[OUTPUT]

    def _known(self, variable: str) -> None:
        if variable not in self.variables:
            raise UnmatchedVariableError(
                f"variable {variable!r} of {self.name}", f"one of {', '.join(self.variables) or 'none: it has none'}"
            )

    def _checked(self, inputs: Values) -> dict[str, Tensor]:
        if missing := [i for i in self.inputs if inputs.get(i) is None]:
            raise UnmatchedVariableError(f"no value for {', '.join(missing)}", f"the inputs {', '.join(self.inputs)}")
        values = {i: _tensor(i, inputs[i]) for i in self.inputs}
        counts = {i: len(v) for i, v in values.items()}
        if len(set(counts.values())) > 1:
            raise ShapeMismatchError(f"inputs of {counts} examples", "one number of examples")
        return values

    def _forced(self, variable: str, value: Any, n: int) -> Tensor:
        self._known(variable)
        if value is None:
            raise UnmatchedVariableError(f"do({variable} = None)", "a value")
        tensor = _tensor(variable, value)
        if len(tensor) not in (1, n):
            raise ShapeMismatchError(f"{len(tensor)} values for {variable!r}", f"1 or {n}, one for each example")
        return tensor.expand(n, *tensor.shape[1:])

    def _labels(self, value: Tensor, n: int) -> Int64[Tensor, "n"]:
        whole = not value.is_floating_point() or bool((value == value.round()).all())
        if value.shape != (n,) or not whole or not bool(((value >= 0) & (value < self.labels)).all()):
            raise UnmatchedVariableError(
                f"{self.name} gives an output {list(value.shape)} with values like {value.flatten()[:3].tolist()}",
                f"one label in 0..{self.labels - 1} for each of {n} examples",
                "the output's function must be defined for every value that its parents can be set to",
            )
        return value.long()

    def __repr__(self) -> str:
        chain = f"{', '.join(self.inputs)} -> {', '.join(self.variables)} -> {self.labels} labels"
        return f"CausalModel({self.name!r}, {chain})"


def _tensor(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnmatchedVariableError(
            f"values {value!r:.60} of {name!r}", "numbers, which can be compared", "give words their number in a list"
        ) from error
    return tensor[None] if tensor.ndim == 0 else tensor
