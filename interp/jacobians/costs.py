"""Costs: flops and bytes of an engine, for the plan and for the size of chunks."""

import math

from interp.jacobians.branches import GateBranch
from interp.jacobians.chain import ChainEngine
from interp.jacobians.engine import Engine
from interp.jacobians.fused import choice_of
from interp.jacobians.graph import GraphEngine
from interp.jacobians.heads import AttentionBranch
from interp.jacobians.places import End, Place
from interp.jacobians.plan import Plan, gemm_rate
from interp.jacobians.replay import ReplayEngine
from interp.jacobians.zero import ZeroEngine

# Values that a backward pass through one position of one block holds at a time, in units of the source's width.
LIVE = 16
# Tokens of the trial that chooses between a kernel and torch.
_TRIED = 8
# A backward pass reaches about this share of a matrix product's speed.
_AUTOGRAD_SPEED = 0.5


def probe_bytes(engine: Engine) -> int:
    """Bytes of scratch that one probe needs, roughly."""
    each = engine.like.element_size()
    if isinstance(engine, ReplayEngine):
        return engine.bytes_each
    if isinstance(engine, ZeroEngine):
        return each * max(math.prod(shape) for shape in engine.shapes)
    if isinstance(engine, GraphEngine):
        output, leaf = engine.recording.output, engine.recording.leaves[0]
        return LIVE * max(output.numel(), leaf.numel()) * each
    assert isinstance(engine, ChainEngine)
    length = engine.span.stop - engine.span.start
    widths = [0]
    for branch in (b for _, branches in engine.stages for b in branches):
        if isinstance(branch, GateBranch):
            widths.append(2 * branch.p.shape[-1])
        elif isinstance(branch, AttentionBranch):
            heads, _, keys = branch.pattern.shape
            widths.append(heads * (3 * keys + 4 * branch.v.shape[-1]))
    return (max(widths) + 3 * engine.shapes[0][0] + engine.shapes[1][0]) * length * each


def make_plan(
    ends: tuple[End, End], places: list[Place], engines: dict[int, Engine], budget: int, notes: list[str],
    error: float | None,
) -> Plan:  # fmt: skip
    """Return the plan of a batch of Jacobians."""
    engine = engines[places[0].example]
    sizes = [
        (engines[p.example].count(p, 1, ends[1].indices), engines[p.example].count(p, 0, ends[0].indices))
        for p in places
    ]
    each = engine.like.element_size()
    largest = max(rows * columns for rows, columns in sizes) * each
    flops = sum(_flops(engines[p.example], p, *size) for p, size in zip(places, sizes, strict=True))
    scratch = engine.chunk * probe_bytes(engine)
    composed = isinstance(engine, ChainEngine) and engine.composes(places[0], min(sizes[0]))
    method = engine.method
    if isinstance(engine, ChainEngine):
        side = "columns" if engine.by_columns(sizes[0][1], sizes[0][0]) else "rows"
        method += ", block by block" if composed else f", pruned, by {side}"
        kernel = choice_of(engine, places[:_TRIED], ends[1].indices, ends[0].indices)
        if kernel is not None:
            method += ", fused kernel" if kernel.fused else ", scaled weights of several tokens"
            notes = [*notes, f"chosen: {kernel}"]
        scratch = 2 * math.prod(engine.shapes[0]) * _width(engine) * each if composed else scratch
    speed = gemm_rate(engine.like.device.type, engine.like.dtype) * (1 if composed else _AUTOGRAD_SPEED)
    return Plan(
        method=method, shape=(len(places), *max(sizes)), flops=flops,
        result_bytes=sum(rows * columns for rows, columns in sizes) * each, scratch_bytes=int(scratch), budget=budget,
        maps=min(len(places), max(1, int(budget / 2 / max(largest, 1)))), probes=engine.chunk, seconds=flops / speed,
        precision=engine.precision, check=error, notes=notes,
    )  # fmt: skip


def _width(engine: ChainEngine) -> int:
    widths = [b.p.shape[-1] for _, branches in engine.stages for b in branches if isinstance(b, GateBranch)]
    return max(widths, default=engine.shapes[0][0])


def _flops(engine: Engine, place: Place, rows: int, columns: int) -> float:
    """Of one dense matrix."""
    if isinstance(engine, ZeroEngine):
        return 0.0
    if isinstance(engine, ReplayEngine):
        return 2 * engine.flops * rows if not engine.by_columns(columns, rows) else engine.flops * columns
    if isinstance(engine, GraphEngine):
        # Weights are read once by each row at each position.
        weights = engine.weights
        length = engine.recording.output.numel() / max(math.prod(engine.shapes[1]), 1)
        share = 1 / max(length, 1) if engine.local and place.single == (True, True) else 1.0
        return 2.0 * rows * weights * length * share
    assert isinstance(engine, ChainEngine)
    d, k = engine.shapes[0][0], min(rows, columns)
    composed = engine.composes(place, k)
    length = engine.reach(place).stop - engine.reach(place).start
    total = 0.0
    for step, branches in engine.stages:
        for branch in branches:
            if isinstance(branch, GateBranch):
                f, factors = branch.p.shape[-1], 3 if branch.q is not None else 2
                alone = len(engine.stages) == 1 and not step.skip
                total += 2 * f * (rows * columns if alone else d * d) if composed else 2 * factors * d * f * k * length
            else:
                total += 4 * d**3 if composed else 8 * d * d * k * length
        total += 2 * d * d * k if composed and len(engine.stages) > 1 else 0
    return total
