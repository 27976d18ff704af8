"""Complexity of alignment maps: how much an accuracy could owe to the map rather than to the network."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.causal.data import InterchangeDataset
from interp.causal.flexible_maps import RevNetMap, build_map
from interp.causal.lanes import Lane, Lanes, bits, cross_entropy
from interp.causal.maps import AlignmentMap, IdentityMap, stack
from interp.causal.swap import rows_needed, swap
from interp.causal.training import Training, fit_lanes
from interp.hooks.errors import DegenerateDataError

_ROWS, _STEPS = 256, 20
_NEIGHBOURS = 5


def complexity(
    tau: AlignmentMap, acts: Float[Tensor, "rows width"], mask: Bool[Tensor, "variables code"]
) -> dict[str, float]:
    """Return measures of a map: sizes, stretch, and how far from linear it is on activations.

    ``parameters``, ``effective dimension`` (what an intervention on these blocks can depend on; of neurons the bits of
    their choice), ``aligned`` coordinates and their ``aligned share``; ``stretch`` and ``inverse stretch``, the largest
    singular values of the Jacobians of τ and τ⁻¹ (median and largest over 256 activations); ``nonlinearity``, 1 - R² of
    the best affine fit on other activations; of a RevNet ``stretch bound``.

    Example:
        >>> from interp.causal import OrthogonalMap, Partition
        >>> found = complexity(OrthogonalMap(4), torch.randn(600, 4), Partition({"v": 2}).mask(["v"], 4))
        >>> found["effective dimension"], round(found["stretch max"], 4), found["nonlinearity"] < 1e-5
        (4.0, 1.0, True)
    """
    found = sizes(tau, mask)
    x = acts[torch.linspace(0, len(acts) - 1, min(_ROWS, len(acts))).long()].to(tau.dtype)
    if tau.kind in ("low_rank", "dictionary"):  # no bijection between two spaces of one size
        return found
    z = tau.encode(x)[0].detach()
    for name, call, at in (("stretch", lambda h: tau.encode(h)[0], x), ("inverse stretch", tau.decode, z)):
        values = largest_singular_values(call, at)
        found |= {f"{name} median": float(values.median()), f"{name} max": float(values.max())}
    if isinstance(tau, RevNetMap):
        found["stretch bound"] = tau.lipschitz_bound()
    found["nonlinearity"] = nonlinearity(tau, acts) if tau.kind == "revnet" else 0.0  # the others are one matrix
    return found


def sizes(tau: AlignmentMap, mask: Bool[Tensor, "variables code"]) -> dict[str, float]:
    """Return the measures of a map that need no activations: ``parameters`` to ``aligned share`` of `complexity`.

    Example:
        >>> from interp.causal import Partition, RevNetMap
        >>> sizes(RevNetMap(4, blocks=1, hidden=2), Partition({"v": 2}).mask(["v"], 4))["parameters"]
        24.0
    """
    counts = (mask if tau.kind != "boundless" else _learned(tau, mask)).sum(1).tolist()
    found = {"parameters": float(tau.num_parameters), "effective dimension": tau.effective_dimension(counts)}
    if isinstance(tau, IdentityMap):
        found["effective dimension"] = _multinomial_bits(tau.width, counts)
    return found | {"aligned": float(sum(counts)), "aligned share": sum(counts) / tau.code_width}


def largest_singular_values(
    call: Callable[[Tensor], Tensor], x: Float[Tensor, "rows width"], steps: int = _STEPS
) -> Float[Tensor, "rows"]:
    """Return the largest singular value of the Jacobian of a row-wise function at each row, by power iteration.

    Example:
        >>> scale = torch.diag(torch.tensor([1.0, 3.0]))
        >>> largest_singular_values(lambda x: x @ scale, torch.ones(2, 2)).round().tolist()
        [3.0, 3.0]
    """
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    pull, size = torch.func.vjp(call, x)[1], torch.ones(len(x))
    for _ in range(steps):
        v = v / v.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        u = torch.func.jvp(call, (x,), (v,))[1]
        size, v = u.norm(dim=-1), pull(u)[0]
    return size.detach()


def refuse_few(rows: int, width: int) -> None:
    """Refuse too few activations for an affine fit.

    Raises:
        DegenerateDataError: If there are fewer than four for each coordinate.
    """
    if rows < 4 * width:
        raise DegenerateDataError(f"{rows} activations of width {width}", f"at least {4 * width}", "measure=False")


@torch.no_grad()
def nonlinearity(tau: AlignmentMap, acts: Float[Tensor, "rows width"]) -> float:
    """Return 1 - R² of the best affine fit to τ: fitted on one half of the activations, measured on the other.

    Raises:
        DegenerateDataError: If there are too few activations for such a fit.
    """
    x = acts[: 16 * max(_ROWS, tau.width)].double()
    refuse_few(len(x), tau.width)
    z = tau.encode(x.to(tau.dtype))[0].double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    half = len(x) // 2
    fitted = torch.linalg.lstsq(x[:half], z[:half], driver="gelsd").solution
    left, whole = z[half:] - x[half:] @ fitted, z[half:] - z[half:].mean(0)
    return float((left**2).sum() / (whole**2).sum())


@torch.no_grad()
def off_distribution(
    lane: Lane, data: InterchangeDataset, *, neighbours: int = _NEIGHBOURS, rows: int = 1000
) -> dict[str, float]:
    """Return how far swapped activations h* lie from natural ones, as a multiple of a natural one's own distance.

    The distance is that to the k-th nearest natural activation; ``median`` and ``0.95 quantile`` over pairs. Near 1,
    the network sees what it is used to.

    Args:
        lane: A trained map at its place.
        data: Pairs.
        neighbours: k.
        rows: Pairs that are looked at, and natural activations that they are compared with.
    """
    lanes = Lanes([lane], data)
    some = torch.arange(min(rows, len(data)))
    needed, where = rows_needed(data.base[some], data.sources[some], data.chosen[some])
    tau = stack([lane.tau]).eval()
    swapped = swap(tau, lanes.acts.index_select(1, needed), where, tau.weights(lanes.mask), len(some))[0]
    natural = lanes.acts[0, torch.linspace(0, lanes.acts.shape[1] - 1, min(4 * rows, lanes.acts.shape[1])).long()]
    own = torch.cdist(natural[:rows], natural).kthvalue(neighbours + 1).values  # the nearest is itself
    ratio = torch.cdist(swapped, natural).kthvalue(neighbours).values / own.median()
    return {"median": float(ratio.median()), "0.95 quantile": float(ratio.quantile(0.95))}


def codelength(
    lane: Lane, train: InterchangeDataset, validation: InterchangeDataset, training: Training | None = None, *,
    blocks: Sequence[float] = (0.0625, 0.125, 0.25, 0.5, 1.0), seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Return the prequential description length of the labels, given the network and this kind of map.

    MDL = n₁ log₂ |Y| + Σ_i Σ_{block i+1} -log₂ p(y), with a map trained from the start on the first i blocks; Blier and
    Ollivier 2018.

    Args:
        lane: The place; its map is not changed.
        train: Pairs, in the order in which they are sent.
        validation: Pairs that choose the step.
        training: The budget of every fit; by default that of `Training`.
        blocks: Shares of the pairs at which a map is trained again.
        seed: Of the maps and the order.

    Returns:
        ``bits`` in all, ``bits per pair``, and ``compression``, n log₂ |Y| over the bits.
    """
    training = Training() if training is None else training
    n, labels = len(train), train.causal_model.labels
    ends = [max(1, round(n * share)) for share in blocks]
    total = ends[0] * math.log2(labels)
    for i, (start, end) in enumerate(pairwise(ends)):
        tau = build_map(
            lane.tau.spec(), lane.tau.width, seed=seed + i, acts=lane.stage(train).acts, dtype=lane.tau.dtype
        )
        part = Lane(lane.model, lane.sites, tau, lane.mask, cache=lane.cache, stages=lane.stages)
        fit_lanes([part], train.take(torch.arange(start)), validation, training, seed=seed)
        coded = Lanes([part], train.take(torch.arange(start, end)), training.readout)
        trained = stack([tau]).eval()
        with torch.no_grad():
            for rows in torch.arange(end - start).split(4096):
                loss = cross_entropy(coded.logits(trained, rows), coded.targets(rows))
                total += bits(float(loss)) * len(rows)
    return {"bits": total, "bits per pair": total / ends[-1], "compression": ends[-1] * math.log2(labels) / total}


def _learned(tau: AlignmentMap, mask: Tensor) -> Tensor:
    """The blocks that a map has learned, as they are in evaluation."""
    training = tau.training
    blocks = tau.eval().weights(mask)
    tau.train(training)
    return blocks


def _multinomial_bits(width: int, sizes: Sequence[int]) -> float:
    parts = [*sizes, width - sum(sizes)]
    return (math.lgamma(width + 1) - sum(math.lgamma(k + 1) for k in parts)) / math.log(2)
