"""What looking costs: ratios in one process, interleaved, medians; with the memory that is kept.

    make bench            # or: python -m tests.benchmarks.bench_hooks

Writes docs/benchmarks/hooks.md when run as a module.
"""

import gc
import platform
import statistics
import time
import tracemalloc
from pathlib import Path

import torch

import interp

PROMPT = "When Mary and John went to the store, John gave a drink to"
ROUNDS = 15


def interleaved(calls, rounds=ROUNDS):
    """Median seconds of each call; the calls take turns, so that a slow moment of the machine hits all."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def plain_hooks(module, ids):
    """What a careful user writes by hand: a hook on each block that keeps a copy."""
    kept, handles = [], []
    try:
        for block in module.model.layers:
            handles.append(block.register_forward_hook(lambda m, a, out: kept.append(out.detach().clone())))
        module(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def measure(batch: int, length: int):
    model = interp.load("smollm2-135m")
    module = model.module
    ids = model.batch([PROMPT]).ids[0].repeat(8)[:length].expand(batch, -1).contiguous()
    with torch.no_grad():
        calls = {
            "module alone": lambda: module(ids, use_cache=False),
            "attached, idle (`model.run`)": lambda: model.run(ids),
            "30 residuals by plain hooks": lambda: plain_hooks(module, ids),
            "30 residuals by `model.capture`": lambda: model.capture(ids, "blocks.*.hook_resid_post"),
            "one residual of block 3 (stops early)": lambda: model.capture(ids, "blocks.3.hook_resid_post"),
            "30 patterns by `model.capture`": lambda: model.capture(ids, "blocks.*.attn.hook_pattern"),
            "all sites of all blocks": lambda: model.capture(ids, "*"),
        }
        times = interleaved(calls)
    base = times["module alone"]
    return [(name, seconds * 1e3, seconds / base) for name, seconds in times.items()]


def held_bytes():
    """Bytes that one capture keeps alive: one site at one position, and 30 residuals, of a 4 x 64 batch."""
    model = interp.load("smollm2-135m")
    ids = torch.arange(256).reshape(4, 64) + 100
    size = lambda acts: sum(acts[s].untyped_storage().nbytes() for s in acts)
    return {
        "one site, last position": size(model.capture(ids, "blocks.7.hook_resid_post", positions="last")),
        "30 residuals": size(model.capture(ids, "blocks.*.hook_resid_post")),
    }


def growth(captures: int = 200):
    """Python-side bytes and live tensors added by many captures in a row."""
    model = interp.load("smollm2-135m")
    ids = model.batch([PROMPT])
    look = lambda: model.capture(ids, ["blocks.3.hook_resid_post", "blocks.3.attn.hook_pattern"])
    look()
    gc.collect()
    count = lambda: sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    tracemalloc.start()
    before, tensors = tracemalloc.get_traced_memory()[0], count()
    for _ in range(captures):
        look()
    gc.collect()
    return tracemalloc.get_traced_memory()[0] - before, count() - tensors


def test_benchmark_hooks():
    assert main()


def main() -> str:
    torch.set_num_threads(2)
    lines = [
        "# Cost of looking",
        "",
        "`python -m tests.benchmarks.bench_hooks` on SmolLM2-135M, float32, "
        f"{platform.machine()} CPU with 2 cores, torch {torch.__version__} with 2 threads. "
        f"Medians of {ROUNDS} interleaved rounds in one process.",
        "",
    ]
    for batch, length in ((1, 14), (4, 64)):
        lines += [f"Batch {batch} x {length} tokens:", "", "| call | ms | ratio to the module alone |", "|---|---|---|"]
        lines += [f"| {name} | {ms:.0f} | {ratio:.2f} |" for name, ms, ratio in measure(batch, length)]
        lines.append("")
    lines += ["Bytes kept by a capture of a 4 x 64 batch:", "", "| capture | bytes |", "|---|---|"]
    lines += [f"| {name} | {value:,} |" for name, value in held_bytes().items()]
    added, tensors = growth()
    lines += ["", f"200 captures in a row: {added:,} bytes of Python objects and {tensors} tensors more than before."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = main()
    target = Path("docs/benchmarks/hooks.md")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    print(text)
