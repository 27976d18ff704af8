"""Jacobians against torch.func and matrix products of the same flops: ratios of CPU time, the ways taking turns.

    make bench            # or: python -m tests.benchmarks.bench_jacobians

Writes docs/benchmarks/jacobians.md when run as a module.
"""

import ctypes
import gc
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.func import jacrev, jvp, vmap

import interp
from interp.jacobians.gates import Gates
from tests.benchmarks.bench_hooks import PROMPT

LAYER, FIRST, LAST = 12, 10, 13
MID, OUT = f"blocks.{LAYER}.hook_resid_mid", f"blocks.{LAYER}.hook_mlp_out"
ENDS = f"blocks.{FIRST}.hook_resid_pre", f"blocks.{LAST}.hook_resid_post"
LENGTH, AT = 48, 24
MIB = 2**20


@dataclass
class Row:
    """How many times less CPU time one way takes than another (of the share of a speed, a quotient below 1)."""

    task: str
    needed: float | None
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    def __str__(self) -> str:
        needed = "" if self.needed is None else f"{self.needed:g}"
        return f"| {self.task} | {needed} | {self.ratio:.2f} | {self.ours * 1e3:.1f} | {self.theirs * 1e3:.1f} |"


def turns(calls, rounds):
    """Median CPU seconds of each call; the calls take turns, so that a slow moment of the machine hits all."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def load(name="smollm2-135m"):
    torch.set_num_threads(1)
    model = interp.load(name)
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    return model


def tokens(model, n):
    return model.batch(PROMPT * 12).ids[:, :n]


def branch(model, layer=LAYER):
    """One MLP with its norm, as a function of one token."""
    block = model.module.model.layers[layer]
    return lambda x: block.mlp(block.post_attention_layernorm(x))


def mlp(model, n=16, rounds=5):
    """Each token's own MLP Jacobian."""
    ids, f = tokens(model, n), branch(model)
    x = model.capture(ids, MID)[MID][0]
    made, out = interp.jacobian(model, ids, MID, OUT, "same"), torch.empty(n, 576, 576)
    half = interp.jacobian(model, ids, MID, OUT, "same", precision="bf16")
    left, right, one = torch.randn(576, 1536), torch.randn(1536, 576), torch.empty(576, 576)
    error = (made.dense(out) - torch.stack([jacrev(f)(t) for t in x])).norm() / out.norm()
    assert error < 1e-5
    t = turns(
        {
            "each": lambda: [jacrev(f)(t) for t in x],
            "vmap": lambda: vmap(jacrev(f))(x),
            "ours": lambda: made.dense(out),
            "bf16": lambda: half.dense(out),
            "gemm": lambda: [torch.mm(left, right, out=one) for _ in range(n)],
        },
        rounds,
    )
    return [
        Row("MLP of 16 tokens against `jacrev` of each", 3.0, t["ours"], t["each"]),
        Row("... against `vmap(jacrev)`", 3.5, t["ours"], t["vmap"]),
        Row("... against matrix products of the same flops", 0.80, t["ours"], t["gemm"]),
        Row("... `precision='bf16'` against the same (1.8 where the processor has AMX)", None, t["bf16"], t["gemm"]),
    ]


def summaries(model, n=128, rounds=3):
    """Mean and inner products of many tokens, in closed form and from the matrices."""
    made, out = interp.jacobian(model, tokens(model, n), MID, OUT, "same"), torch.empty(n, 576, 576)

    def matrices():
        return made.dense(out).flatten(1)

    assert (matrices() @ out.flatten(1).T - made.reduce("gram").value).abs().max() < 1e-3 * out.pow(2).sum((1, 2)).max()

    def with_tables():
        made.engines[0].stages[0][1][0].__dict__.pop("tables", None)
        return made.reduce("gram")

    t = turns(
        {
            "means": lambda: matrices().mean(0),
            "mean": lambda: made.reduce("mean"),
            "grams": lambda: (lambda m: m @ m.T)(matrices()),
            "tables": with_tables,
            "gram": lambda: made.reduce("gram"),
        },
        rounds,
    )
    return [
        Row("mean of 128 tokens against that of the matrices", 30, t["mean"], t["means"]),
        Row("gram of 128 tokens, tables of the layer there, against that of the matrices", 20, t["gram"], t["grams"]),
        Row("... tables made as well", None, t["tables"], t["grams"]),
    ]


def features(model, n=64, latents=2048, active=32, rounds=3):
    """32 active latents of one dictionary by 32 of another, at each token."""
    made = torch.Generator().manual_seed(0)
    decoder, encoder = torch.randn(latents, 576, generator=made), torch.randn(576, latents, generator=made)
    at = [torch.rand(latents, generator=made).topk(active).indices for _ in range(2 * n)]
    ids, f = tokens(model, n), branch(model)
    x = model.capture(ids, MID)[MID][0]
    between = interp.jacobian(model, ids, MID, OUT, "same")
    gates = Gates.of(between)
    sides = gates.sides(encoder.T.contiguous(), decoder)
    chosen = list(zip(at[:n], at[n:], strict=True))

    def one(t):
        rows, columns = chosen[t]
        reads, writes = encoder[:, rows], decoder[columns]
        return jacrev(lambda z: f(x[t] + z @ writes) @ reads)(torch.zeros(active))

    for t in (0, 5):
        assert (gates.between(sides, chosen)[t] - one(t)).norm() < 1e-4 * one(t).norm()
    t = turns(
        {
            "each": lambda: [one(t) for t in range(n)],
            "ours": lambda: gates.between(sides, chosen),
            "sides": lambda: gates.between(gates.sides(encoder.T.contiguous(), decoder), chosen),
        },
        rounds,
    )
    return [
        Row("features, 32 x 32 active of 2048, dictionaries read before, against `jacrev`", 12, t["ours"], t["each"]),
        Row("... dictionaries read as well, for 64 tokens", None, t["sides"], t["each"]),
    ]


def blocks(model, x):
    """Blocks FIRST to LAST as a function of their input."""
    inner = model.module.model
    rotary = inner.rotary_emb(x[None], torch.arange(len(x))[None])
    mask = torch.full((len(x), len(x)), -torch.inf).triu(1)[None, None]

    def run(value):
        value = value[None]
        for block in inner.layers[FIRST : LAST + 1]:
            value = block(value, attention_mask=mask, position_embeddings=rotary)
        return value[0] if value.ndim == 3 else value

    return run


def reverse(model, x, source, stop, chunk):
    """The Jacobian of position AT by one source through torch.func, of a text cut at ``stop``."""
    run = blocks(model, x[:stop])

    def one(value):
        return run(x[:stop].index_copy(0, torch.tensor([source]), value[None]))[AT]

    return lambda: jacrev(one, chunk_size=chunk)(x[source])


def eager(model):
    """Fused attention has no batching rule for its second half: torch.func needs the plain one."""
    model.module.set_attn_implementation("eager")
    return model


def chain(model, source, rounds=1):
    """Four layers: from one position to the same, or to one 8 behind it."""
    ids = tokens(model, LENGTH)
    x = model.capture(ids, ENDS[0])[ENDS[0]][0]
    made = interp.jacobian(model, ids, *ENDS, [(source, AT)])
    engine = made.engines[0]
    pushed = super(type(engine), engine).dense
    whole, cut = (reverse(model, x, source, stop, 64) for stop in (LENGTH, AT + 1))
    calls = {"whole": whole, "cut": cut, "push": lambda: pushed(made.places[0], None, None)}
    calls["made"] = made.dense
    calls["all"] = lambda: interp.jacobian(model, ids, *ENDS, [(source, AT)]).dense()
    wanted = cut()
    assert (made.dense()[0] - wanted).norm() < 1e-4 * wanted.norm()
    t = turns(calls, rounds)
    if source != AT:
        return [
            Row("position to one 8 behind it, 4 layers, pruned push, against `jacrev`", 3, t["push"], t["whole"]),
            Row("... set-up and self-check as well", None, t["all"], t["whole"]),
        ]
    return [
        Row("one position, 4 layers, block by block, against `jacrev(chunk_size=64)`", 60, t["made"], t["whole"]),
        Row("... against the same of the text cut behind the position", 30, t["made"], t["cut"]),
        Row("... pruned push against `jacrev`", 20, t["push"], t["whole"]),
        Row("... pruned push against the same of the cut text", 10, t["push"], t["cut"]),
        Row("... block by block, set-up and self-check as well, against `jacrev`", None, t["all"], t["whole"]),
    ]


def sweep(model):
    """4 logits to 30 layers at all positions: one sweep against one call for each layer."""
    ids, rows = tokens(model, LENGTH), [10, 20, 30, 40]
    names = [f"blocks.{i}.hook_resid_pre" for i in range(30)]

    def each():
        for name in names:
            interp.row_sweep(model, ids, name, "logits@-1", rows)

    t = turns({"each": each, "ours": lambda: interp.row_sweep(model, ids, names, "logits@-1", rows)}, rounds=1)
    return [Row("4 logits to 30 layers and 48 positions, against one sweep for each layer", 10, t["ours"], t["each"])]


def pictures(rounds=5):
    """8 class rows and 8 pixel columns of EfficientNet-Lite0."""
    model = load("efficientnet-lite0")
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) / 2
    f = lambda z: model.module(z[None])[0]
    rows, pixels = [1, 5, 100, 200, 300, 400, 500, 600], [(0, 10 * i + 30, 12 * i + 20) for i in range(8)]
    ways = torch.zeros(8, 3, 224, 224)
    for way, pixel in zip(ways, pixels, strict=True):
        way[pixel] = 1
    by_row = interp.jacobian(model, x, "stem:in", "classifier", rows=rows)
    by_column = interp.jacobian(model, x, "stem:in", "classifier", columns=pixels)
    pull = lambda: jacrev(lambda z: f(z)[rows])(x[0])
    push = lambda: vmap(lambda v: jvp(f, (x[0],), (v,))[1])(ways)
    for found, wanted in ((by_row.dense()[0], pull().flatten(1)), (by_column.dense()[0].T, push())):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()
    t = turns({"rows": by_row.dense, "pull": pull, "columns": by_column.dense, "push": push}, rounds)
    return [
        Row("8 class rows of a convolutional network, replayed, against `jacrev`", 1.5, t["rows"], t["pull"]),
        Row("8 pixel columns, replayed, against `vmap(jvp)`", 2, t["columns"], t["push"]),
    ]


def level(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the mark was set back."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measured(what: str) -> int:
    """The high-water mark of this process during one of the ways, minus the level before it and the result."""
    model = load()
    ids = tokens(model, 64 if "mlp" in what else LENGTH)
    site = MID if "mlp" in what else ENDS[0]
    x = model.capture(ids, site)[site][0]
    out = torch.zeros(64, 576, 576) if what == "mlp" else torch.zeros(1, 576, 576)
    if what == "mlp":
        made = interp.jacobian(model, ids, MID, OUT, "same")
        call, result = (lambda: made.dense(out)), 0
    elif what == "mlp, vmap":
        call, result = (lambda: vmap(jacrev(branch(model)))(x)), 64 * 576 * 576 * 4
    elif what in ("block by block", "push"):
        made = interp.jacobian(model, ids, *ENDS, [(AT, AT)])
        engine = made.engines[0]
        dense = engine.dense if what != "push" else super(type(engine), engine).dense
        call, result = (lambda: dense(made.places[0], None, None, out[0])), 0
    else:
        call, result = reverse(eager(model), x, AT, LENGTH, 64 if "64" in what else None), 576 * 576 * 4
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what set-up used and freed would hide what the way needs
    Path("/proc/self/clear_refs").write_text("5")
    before = level("VmRSS")
    call()
    return level("VmHWM") - before - result


def peaks():
    """Rows of the table of memory; each way in a process of its own."""
    ways = {
        "MLP of 64 tokens, `dense(out)`": ("mlp", 16), "the same, `vmap(jacrev)`": ("mlp, vmap", None),
        "one position, 4 layers, block by block": ("block by block", 32), "the same, pruned push": ("push", None),
        "the same, `jacrev(chunk_size=64)`": ("jacrev 64", None), "the same, `jacrev`": ("jacrev", None),
    }  # fmt: skip
    rows = []
    for name, (what, needed) in ways.items():
        command = [sys.executable, "-m", "tests.benchmarks.bench_jacobians", what]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        rows.append((name, needed, int(found) / MIB))
    return rows


def test_ratios():
    """What must hold on any machine: required values of the method's page, with room for noise."""
    model = load()
    for row in [*mlp(model, n=8, rounds=3), *summaries(model), *features(model)]:
        assert row.needed is None or row.ratio >= 0.75 * row.needed, row


def main():
    start, model = time.time(), load()
    rows = [*mlp(model), *summaries(model), *features(model)]
    rows += sweep(model)
    rows += [*chain(eager(model), AT), *chain(model, AT - 8), *pictures()]
    memory = "\n".join(
        f"| {name} | {'' if needed is None else needed} | {found:.0f} |" for name, needed, found in peaks()
    )
    text = f"""# Jacobians against torch.func

`python -m tests.benchmarks.bench_jacobians`: SmolLM2-135M (d = 576, f = 1536) and EfficientNet-Lite0 in float32,
{processor()}, torch {torch.__version__}, 1 thread. CPU time, medians of rounds in one process in which the ways take
turns (of layers and sweeps one round). Other work ran on the machine at the same time (load {os.getloadavg()[1]:.0f} on
{os.cpu_count()} cores): read the ratios, not the milliseconds.

| task | goal, times faster | measured | ms | ms of the other way |
|---|---|---|---|---|
{chr(10).join(map(str, rows))}

A gram matrix needs tables over pairs of neurons, which cost as much as the Jacobians of 12 tokens here: once for each
layer, however many tokens. Likewise a dictionary is read once, however many tokens.

Peak memory beyond the level before and beyond the result:

| task | goal, at most MiB | MiB |
|---|---|---|
{memory}
"""
    page = Path("docs/benchmarks/jacobians.md")
    _, mark, others = page.read_text(encoding="utf-8").partition("\n## ")
    page.write_text(text + mark + others, encoding="utf-8")
    print(text, f"\n{time.time() - start:.0f} s")


def processor() -> str:
    """The processor's name."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measured(sys.argv[1]))
    else:
        main()
