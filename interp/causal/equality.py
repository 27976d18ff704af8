"""The two tasks on vectors of Sutter et al. 2025 (arXiv 2507.08802): hierarchical equality and the distributive law."""

from typing import Literal

import torch
from torch import Generator, Tensor

from interp.causal.models import CausalModel
from interp.causal.sampling import Inputs, Task
from interp.hooks.errors import ArgumentError

_LENGTH = 4  # numbers in a vector
EqualityAlgorithm = Literal["both", "left", "first_argument"]
LawAlgorithm = Literal["and_or", "and_or_and"]


def _equal(x: Tensor, y: Tensor) -> Tensor:
    return (x == y).all(-1)


def _same(x: Tensor, y: Tensor) -> Tensor:
    return x == y


def _fresh(n: int, generator: Generator) -> Tensor:
    return torch.rand(n, _LENGTH, generator=generator) - 0.5


def _coin(n: int, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator) < 0.5


def _encode(inputs: Inputs) -> Tensor:
    return torch.cat(list(inputs.values()), 1)


def hierarchical_equality(algorithm: EqualityAlgorithm = "both") -> Task:
    """Return the task "is x1 = x2 as true as x3 = x4", on four vectors of four numbers.

    Equal pairs are the same vector, different ones are two draws from [-0.5, 0.5]; both relations are fair coins.

    Args:
        algorithm: ``both`` equalities are computed (variables v1, v2); only the ``left`` one (v1); or the ``first
            argument`` is carried (variable v, a vector). A source of the last is coupled to its base, since an
            independent one would almost never equal the base's x2.

    Raises:
        ArgumentError: If there is no such algorithm.

    Example:
        >>> pairs = hierarchical_equality("both").sample(100, seed=0)
        >>> pairs.variables, pairs.pool.inputs.shape[1]
        (('v1', 'v2'), 16)
    """
    inputs = ["x1", "x2", "x3", "x4"]
    left, right = (["x1", "x2"], _equal), (["x3", "x4"], _equal)
    if algorithm == "both":
        model = CausalModel(inputs, {"v1": left, "v2": right}, (["v1", "v2"], _same), name="both equalities")
    elif algorithm == "left":
        output = (["v1", "x3", "x4"], lambda v1, x3, x4: v1 == _equal(x3, x4))
        model = CausalModel(inputs, {"v1": left}, output, name="left equality")
    elif algorithm == "first_argument":
        output = (["v", "x2", "x3", "x4"], lambda v, x2, x3, x4: _equal(v, x2) == _equal(x3, x4))
        model = CausalModel(inputs, {"v": (["x1"], torch.clone)}, output, name="identity of the first argument")
    else:
        raise ArgumentError(f"algorithm={algorithm!r}", "'both', 'left' or 'first_argument'")
    coupled = _coupled if algorithm == "first_argument" else None
    return Task("hierarchical equality", model, _draw_pairs_of(2), _encode, source=coupled, width=4 * _LENGTH)


def _draw_pairs_of(count: int):
    """Draws of ``count`` pairs of vectors, each pair equal with probability 1/2."""

    def draw(n: int, generator: Generator) -> Inputs:
        found = {}
        for pair in range(count):
            first, second = _fresh(n, generator), _fresh(n, generator)
            second = torch.where(_coin(n, generator)[:, None], first, second)
            found |= {f"x{2 * pair + 1}": first, f"x{2 * pair + 2}": second}
        return found

    return draw


def _coupled(variable: str, base: Inputs, generator: Generator) -> Inputs:
    """Sources whose x1 is the base's x2 half of the time."""
    n = len(base["x2"])
    drawn = _draw_pairs_of(2)(n, generator)
    first = torch.where(_coin(n, generator)[:, None], base["x2"], _fresh(n, generator))
    second = torch.where(_coin(n, generator)[:, None], first, _fresh(n, generator))
    return drawn | {"x1": first, "x2": second}


def distributive_law(algorithm: LawAlgorithm = "and_or") -> Task:
    """Return the task (a and b) or (b and c) on three pairs of vectors, where a, b, c say which pairs are equal.

    Labels are balanced by drawing again. Half of the pairs flip; the label is not balanced given the intervention.

    Args:
        algorithm: ``and_or``: v1 = b, v2 = a or c, output v1 and v2. ``and_or_and``: v1 = a and b, v2 = b and c, output
            v1 or v2.

    Raises:
        ArgumentError: If there is no such algorithm.

    Example:
        >>> distributive_law("and_or").sample(100, seed=0).pool.inputs.shape[1]
        24
    """
    inputs = [f"x{i}" for i in range(1, 7)]
    if algorithm == "and_or":
        nodes = {
            "v1": (["x3", "x4"], _equal),
            "v2": (["x1", "x2", "x5", "x6"], lambda x1, x2, x5, x6: _equal(x1, x2) | _equal(x5, x6)),
        }
        model = CausalModel(inputs, nodes, (["v1", "v2"], torch.logical_and), name="and-or")
    elif algorithm == "and_or_and":
        both = lambda a, b, c, d: _equal(a, b) & _equal(c, d)
        nodes = {"v1": (["x1", "x2", "x3", "x4"], both), "v2": (["x3", "x4", "x5", "x6"], both)}
        model = CausalModel(inputs, nodes, (["v1", "v2"], torch.logical_or), name="and-or-and")
    else:
        raise ArgumentError(f"algorithm={algorithm!r}", "'and_or' or 'and_or_and'")
    return Task("distributive law", model, _draw_law, _encode, flip=0.5, width=6 * _LENGTH)


def _draw_law(n: int, generator: Generator) -> Inputs:
    """Three pairs, drawn again until the label is the one that a fair coin asks for."""
    wanted = _coin(n, generator)
    equal = torch.rand(n, 3, generator=generator) < 0.5
    while len(rows := ((equal[:, 1] & (equal[:, 0] | equal[:, 2])) != wanted).nonzero().flatten()):
        equal[rows] = torch.rand(len(rows), 3, generator=generator) < 0.5
    found = {}
    for pair in range(3):
        first, second = _fresh(n, generator), _fresh(n, generator)
        second = torch.where(equal[:, pair, None], first, second)
        found |= {f"x{2 * pair + 1}": first, f"x{2 * pair + 2}": second}
    return found
