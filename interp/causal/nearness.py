"""Injectivity: whether two inputs share what a layer holds, and how near the nearest come."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from interp.causal.data import Pool
from interp.causal.stages import last_logits, read
from interp.hooks.budget import bytes_of
from interp.hooks.errors import ArgumentError, NonFiniteError, UnmatchedVariableError
from interp.hooks.model import Model
from interp.hooks.site import Site, SiteLike
from interp.hooks.table import Rows

_CHUNK = 4096
_FEW_KINDS = 256  # different outputs or values up to which inputs are sorted by them
ALL, OUTPUTS, VALUES = "all pairs", "different output", "different values"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Nearness(Rows):
    """What one layer in one dtype tells apart.

    Attributes:
        site: The layer, or ``input``.
        dtype: In which the network was run.
        n: Number of inputs.
        duplicates: Inputs whose activations are, bit for bit, those of an input before them.
        least: Smallest distance of the sampled inputs to any other, for all pairs, pairs with another output of the
            network, and pairs with other values of the variables; infinite where there is no such pair.
        median: Median over the sampled inputs of the distance to the nearest, likewise.
    """

    site: str
    dtype: str
    n: int
    duplicates: int
    least: dict[str, float]
    median: dict[str, float] = field(repr=False)

    def to_records(self) -> list[dict[str, Any]]:
        """One row."""
        row = {"site": self.site, "dtype": self.dtype, "inputs": self.n, "duplicates": self.duplicates}
        return [row | self.least | {f"median, {name}": value for name, value in self.median.items()}]


@dataclass(frozen=True)
class Injectivity(Rows):
    """Duplicates and distances to the nearest other input, layer by layer.

    Attributes:
        layers: One for each layer and dtype.
        points: Inputs whose distance to all others was taken.
        variables: Whose values the last kind of pair differs in.
    """

    layers: list[Nearness]
    points: int
    variables: list[str]

    @property
    def injective(self) -> bool:
        """Whether no layer holds a duplicate, in any dtype."""
        return not any(layer.duplicates for layer in self.layers)

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each layer and dtype."""
        return [row for layer in self.layers for row in layer.to_records()]

    def __repr__(self) -> str:
        lines = [f"Injectivity({self.layers[0].n} inputs, {self.points} of them against all)"]
        for layer in self.layers:
            parts = ", ".join(f"{name} {value:.1e}" for name, value in layer.least.items())
            lines.append(f"  {layer.site} {layer.dtype}: {layer.duplicates} duplicates; least distance {parts}")
        return "\n".join(lines)


def injectivity(
    model: Model, pool: Pool, sites: Sequence[SiteLike], variables: Sequence[str] = (), *, points: int = 10_000,
    dtypes: Sequence[str] = ("float32", "float64"), budget: int | str = "512MiB", seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Injectivity:  # fmt: skip
    """Return how many inputs share the activations of a layer, and how near the nearest come: min_j |h(x_i) - h(x_j)|.

    A map can write any algorithm into a layer that tells all inputs apart (Sutter et al. 2025, arXiv 2507.08802,
    theorem 1 and its experiment); a distance near the rounding of float32 says by how little it does, and the run in
    float64 whether rounding is to blame. Distances are sums of squared differences, never |x|² + |y|² - 2 xy, whose
    rounding would hide the small ones. One layer is held at a time, and distances in blocks that fit the budget.

    Args:
        model: The network; a copy of it runs in each dtype that is not its own.
        pool: The inputs, from `Task.pool`.
        sites: The layers; of language models with a position.
        variables: Variables of the pool, of which pairs of the last kind differ in at least one.
        points: Inputs, drawn without replacement, whose distance to all others is taken.
        dtypes: In which the network is run: float32, float64.
        budget: Memory for a block of distances.
        seed: Of the draw.
        progress: Told of every layer.

    Raises:
        ArgumentError: If there are fewer than two inputs, no points, or an unknown dtype.
        UnmatchedVariableError: If the pool has no values of a variable.
        NonFiniteError: If a layer holds NaN or infinity.

    Example:
        >>> import interp
        >>> from interp.causal import hierarchical_equality, injectivity, mlp
        >>> task = hierarchical_equality()
        >>> pool = task.pool(task.draw(500, torch.Generator().manual_seed(0)))
        >>> found = injectivity(interp.attach(mlp(task)), pool, ["block1"], ["v1", "v2"], points=50)
        >>> found.injective, [layer.site for layer in found.layers]
        (True, ['input', 'block1', 'input', 'block1'])
    """
    if len(pool) < 2 or points < 1 or not sites or not dtypes or set(dtypes) - set(_DTYPES):
        raise ArgumentError(
            f"{len(pool)} inputs, points={points}, {len(sites)} sites, dtypes={list(dtypes)}",
            f"two inputs, one point, one site, dtypes of {', '.join(_DTYPES)}",
        )
    if unknown := [v for v in variables if v not in pool.settings]:
        raise UnmatchedVariableError(f"variables {unknown}", f"some of {', '.join(pool.settings)}")
    places, held = [Site.parse(s) for s in sites], bytes_of(budget)
    chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:points]
    values = {VALUES: _codes([pool.settings[v] for v in variables])} if variables else {}
    found = []
    for name in dtypes:
        network, inputs = _in_dtype(model, pool, _DTYPES[name])
        kinds = {OUTPUTS: _answers(network, inputs), **values}
        for site, acts in _layers(network, inputs, places, _DTYPES[name]):
            found.append(_nearness(site, name, acts, chosen, kinds, held))
            progress(f"{site} {name}: {found[-1].duplicates} duplicates")
    return Injectivity(found, len(chosen), list(variables))


def count_duplicates(rows: Float[Tensor, "n width"]) -> int:
    """Return how many rows equal, bit for bit, a row before them (zeros of either sign are one).

    Rows are sorted by a sum of their bits under random odd factors; only those that share it are compared.

    Example:
        >>> count_duplicates(torch.tensor([[1.0, 2.0], [0.0, 2.0], [1.0, 2.0], [-0.0, 2.0]]))
        2
    """
    plain = rows + 0.0  # -0 becomes 0
    bits = plain.view(torch.int32 if rows.dtype == torch.float32 else torch.int64)
    factors = torch.randint(2**62, (rows.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    keys = torch.zeros(len(rows), dtype=torch.int64)
    for column, factor in enumerate(factors.tolist()):
        mixed = bits[:, column].long() * factor
        keys += (mixed ^ (mixed >> 29)) * factor
    _, which, counts = keys.unique(return_inverse=True, return_counts=True)
    shared = plain[counts[which] > 1]
    return len(shared) - len(shared.unique(dim=0)) if len(shared) else 0


def least_distances(
    acts: Float[Tensor, "n width"], points: Int64[Tensor, "points"], kinds: dict[str, Int64[Tensor, "n"]], budget: int
) -> dict[str, Float[Tensor, "points"]]:
    """Return the distance of each point to the nearest other row: of all, and of those of another kind.

    Args:
        acts: The rows.
        points: Numbers of the rows whose distances are taken.
        kinds: For each name a number for every row; pairs count where the numbers differ.
        budget: Bytes of a block of distances.
    """
    order = _codes([*kinds.values()]).argsort(stable=True) if kinds else torch.arange(len(acts))
    rows, asked = acts[order], acts[points]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    place = place[points]
    sorted_kinds = {name: codes[order] for name, codes in kinds.items()}
    found = {name: torch.full((len(points),), torch.inf, dtype=acts.dtype) for name in (ALL, *kinds)}
    size = max(1, min(_CHUNK, budget // (3 * len(points) * acts.element_size())))
    for start, end in _blocks(sorted_kinds, len(rows), size):
        distance = torch.cdist(asked, rows[start:end], compute_mode="donot_use_mm_for_euclid_dist")
        own = ((place >= start) & (place < end)).nonzero().flatten()
        distance[own, place[own] - start] = torch.inf
        nearest = distance.amin(1)
        found[ALL] = torch.minimum(found[ALL], nearest)
        for name, codes in sorted_kinds.items():
            here, mine = codes[start:end], kinds[name][points]
            if bool((here == here[0]).all()):
                other = torch.where(mine != here[0], nearest, torch.inf)
            else:
                other = distance.masked_fill(mine[:, None] == here, torch.inf).amin(1)
            found[name] = torch.minimum(found[name], other)
    return found


def _blocks(kinds: dict[str, Tensor], n: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each of one kind where there are few kinds."""
    edges = [0, n]
    if kinds:
        change = torch.stack([codes.diff() != 0 for codes in kinds.values()]).any(0).nonzero().flatten() + 1
        edges = [0, *change.tolist(), n] if len(change) < _FEW_KINDS else edges
    for low, high in pairwise(edges):
        for start in range(low, high, size):
            yield start, min(start + size, high)


def _codes(values: Sequence[Tensor]) -> Int64[Tensor, "n"]:
    """One number for each combination of values."""
    columns = torch.cat([v.reshape(len(v), -1).double() for v in values], 1)
    return columns.unique(dim=0, return_inverse=True)[1]


def _in_dtype(model: Model, pool: Pool, dtype: torch.dtype) -> tuple[Model, Pool]:
    """The network and its inputs in a dtype; the network itself where it is in that dtype."""
    inputs = pool.inputs
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        inputs = inputs.to(dtype)
    if model.dtype != dtype:
        module = copy.deepcopy(model.module).to(dtype)
        model = Model(module, model.tokenizer, model.layout, preprocess=model.preprocess, identity=model.identity)
    return model, Pool(inputs, pool.settings, pool.groups, pool.candidates)


def _layers(model: Model, pool: Pool, sites: Sequence[Site], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The inputs, where they are vectors, and one layer after the other."""
    if isinstance(pool.inputs, Tensor) and pool.inputs.is_floating_point():
        yield "input", pool.inputs.flatten(1)
    for site in sites:
        yield str(site), read(model, [site], pool).to(dtype)


@torch.no_grad()
def _answers(model: Model, pool: Pool) -> Int64[Tensor, "n"]:
    found = []
    for rows in torch.arange(len(pool)).split(_CHUNK if model.reader.kind != "tokens" else 64):
        batch = model.batch(pool.take(rows))
        found.append(last_logits(batch, model.forward(batch)).argmax(1))
    return torch.cat(found)


def _nearness(site: str, dtype: str, acts: Tensor, points: Tensor, kinds: dict[str, Tensor], budget: int) -> Nearness:
    if not torch.isfinite(acts).all():
        raise NonFiniteError(f"NaN or infinity at {site} in {dtype}", "finite activations", "look at the inputs")
    found = least_distances(acts, points, kinds, budget)
    return Nearness(
        site, dtype, len(acts), count_duplicates(acts), {name: float(d.min()) for name, d in found.items()},
        {name: float(d.median()) for name, d in found.items()},
    )  # fmt: skip
