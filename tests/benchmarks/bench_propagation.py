"""What propagation costs: totals of many observables, attribution of a dataset, norms of every head.

    make bench            # or: python -m tests.benchmarks.bench_propagation

Writes docs/benchmarks/propagation.md when run as a module. OMP_NUM_THREADS chooses the number of threads, 2 by default.
"""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import interp
from tests.benchmarks.bench_hooks import interleaved

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
TEXT = "When {} and {} went to the {}, {} gave a drink to"
NAMES = ["Mary", "John", "Anna", "Paul", "Emma", "Mark", "Lucy", "Jack", "Kate", "Tom"]
PLACES = ["store", "park", "old town hall", "office", "beach near the harbour", "school", "zoo", "club", "bar", "farm"]
LONG = "So, when Mary and John went to the store in the morning, John gave a bottle of milk to"


def prompts(count: int) -> list[str]:
    every = [TEXT.format(a, b, place, b) for place in PLACES for a in NAMES for b in NAMES]
    return (every * (count // len(every) + 1))[:count]


def observables(model, count: int) -> list:
    return [interp.Observable.logit_diff(model, 1000 + 7 * i, 9000 + 11 * i, name=f"{i}") for i in range(count)]


def totals():
    """All sites of 16 observables on 20 tokens, in forward and backward passes of the module."""
    model = interp.load("smollm2-135m")
    ids = model.batch(LONG).ids[:, :20]
    many = observables(model, 16)

    def backward():
        model.module.zero_grad()
        many[0].measure(model.module(ids, use_cache=False).logits[0, -1]).backward()

    reference = interp.Reference(model, ids)
    times = interleaved(
        {
            "one forward and backward of the module (all weights)": backward,
            "`propagate_all`, 16 observables, all sites": lambda: interp.propagate_all(model, many, ids),
            "the same, around a `Reference` made before": lambda: interp.propagate_all(model, many, reference),
        },
        5,
    )
    model.module.zero_grad()
    return times, ids.shape[1]


def throughput(count: int = 1000, piece: int = 100):
    """Seconds of plain forward calls and of `attribute_dataset` on the same prompts, in turns of 100 prompts."""
    model = interp.load("smollm2-135m")
    mary, rows, size = interp.Observable.logit_diff(model, " Mary", " John"), prompts(count), 16
    kept = interp.AttributionSummary([mary.name])
    plain = attributed = 0.0

    def forward(part):
        with torch.no_grad():
            for start in range(0, len(part), size):
                model.forward(model.batch(part[start : start + size]))

    forward(rows[:size])
    for start in range(0, count, piece):
        part = rows[start : start + piece]
        began = time.perf_counter()
        forward(part)
        middle = time.perf_counter()
        interp.attribute_dataset(model, mary, part, batch_size=size, into=kept)
        plain, attributed = plain + middle - began, attributed + time.perf_counter() - middle
    assert kept.n == count
    return plain, attributed, kept.completeness_error


def peak(what: str, count: int) -> float:
    """Peak MiB of a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_propagation", what, str(count)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def child(what: str, count: int) -> None:
    torch.set_num_threads(THREADS)
    model = interp.load("smollm2-135m")
    mary, rows = interp.Observable.logit_diff(model, " Mary", " John"), prompts(count)
    if what == "forward":
        with torch.no_grad():
            for start in range(0, count, 16):
                model.forward(model.batch(rows[start : start + 16]))
    else:
        interp.attribute_dataset(model, mary, rows)
    status = Path("/proc/self/status").read_text()
    print(int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024)


def norms():
    model = interp.load("smollm2-135m")
    one, many = observables(model, 1), observables(model, 100)
    return interleaved(
        {
            "`head_norms`, 270 heads x 1 observable": lambda: interp.head_norms(model, one),
            "`head_norms`, 270 heads x 100 observables": lambda: interp.head_norms(model, many),
            "`propagate(path=...)`, 270 heads x 1 observable, one by one": lambda: [
                interp.propagate(model, one[0], path=f"L{layer}H{head}").norm
                for layer in range(30)
                for head in range(9)
            ],
        },
        5,
    )


def test_benchmark_propagation():
    assert main()


def main() -> str:
    torch.set_num_threads(THREADS)
    lines = [
        "# What propagation costs",
        "",
        f"`python -m tests.benchmarks.bench_propagation`: SmolLM2-135M, float32, {platform.machine()} CPU with 2 "
        f"cores, torch {torch.__version__}, threads: {THREADS}.",
        "",
    ]
    times, length = totals()
    base = next(iter(times.values()))
    lines += [f"Totals ({length} tokens; medians of interleaved rounds):", "", "| call | ms | ratio |", "|---|---|---|"]
    lines += [f"| {name} | {1e3 * s:.0f} | {s / base:.2f} |" for name, s in times.items()]
    plain, attributed, error = throughput()
    lines += [
        "",
        "Attribution of 1,000 prompts of 13 to 16 tokens by head, batches of 16, in turns of 100 prompts. It stops in "
        "front of the unembedding, which the plain forward runs.",
        "",
        "| call | prompts/s | throughput |",
        "|---|---|---|",
        f"| plain forward | {1000 / plain:.1f} | 1.00 |",
        f"| `attribute_dataset` | {1000 / attributed:.1f} | {plain / attributed:.2f} |",
        "",
        f"Completeness error of the mean: {error:.1e}. Peak resident memory of a process: plain forward "
        f"{peak('forward', 1000):.0f} MiB at 1,000 prompts; `attribute_dataset` {peak('dataset', 100):.0f} MiB at "
        f"100 and {peak('dataset', 1000):.0f} MiB at 1,000.",
        "",
        "Norms of data-free feature vectors (medians of interleaved rounds):",
        "",
        "| call | ms |",
        "|---|---|",
        *(f"| {name} | {1e3 * s:.0f} |" for name, s in norms().items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(sys.argv[1], int(sys.argv[2]))
    else:
        text = main()
        target = Path("docs/benchmarks/propagation.md")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        print(text)
