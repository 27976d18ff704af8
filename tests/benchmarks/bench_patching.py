"""What patching costs: a grid in one call against a loop of plain patched runs; first order against one backward pass.

    make bench            # or: python -m tests.benchmarks.bench_patching

Writes docs/benchmarks/patching.md when run as a module.
"""

import platform
from pathlib import Path

import torch

import interp
from tests.benchmarks.bench_hooks import interleaved

TEXT = "When {} and {} went to the store, {} gave a drink to"
LAYERS, ROUNDS = [0, 10, 20], 3


def measure():
    model = interp.load("smollm2-135m")
    clean, corrupt = TEXT.format("Mary", "John", "John"), TEXT.format("Mary", "John", "Mary")
    mary = interp.Observable.logit_diff(model, " Mary", " John")
    ids = model.batch(corrupt).ids
    sites = [f"blocks.{i}.hook_resid_pre" for i in range(model.n_layers)]
    source = model.capture(clean, sites)

    def loop():
        for layer in LAYERS:
            for position in range(ids.shape[1]):
                step = interp.Patch(sites[layer], source, positions=position)
                mary(model.run(corrupt, plan=step)[0, -1])

    def backward():
        model.module.zero_grad()
        mary(model.module(ids, use_cache=False).logits[:, -1]).sum().backward()

    grids = interleaved(
        {
            "loop of `model.run(plan=[Patch])`": loop,
            "`patch_grid`": lambda: interp.patch_grid(model, clean, corrupt, mary, layers=LAYERS),
        },
        ROUNDS,
    )
    first = interleaved(
        {
            "one forward and backward of the module (all weights)": backward,
            "`attribution_patching`, 30 layers x 14 positions": lambda: interp.attribution_patching(
                model, clean, corrupt, mary, audit=0
            ),
            "`attribution_patching`, 270 heads x 14 positions": lambda: interp.attribution_patching(
                model, clean, corrupt, mary, sites="z", by=("layer", "head", "position"), audit=0
            ),
            "`edge_attribution`": lambda: interp.edge_attribution(model, clean, corrupt, mary, audit=0),
        },
        ROUNDS,
    )
    model.module.zero_grad()
    return grids, first, len(LAYERS) * ids.shape[1]


def rows(times):
    base = next(iter(times.values()))
    head = ["| call | ms | ratio |", "|---|---|---|"]
    return head + [f"| {name} | {seconds * 1e3:.0f} | {seconds / base:.2f} |" for name, seconds in times.items()]


def test_benchmark_patching():
    assert main()


def main() -> str:
    torch.set_num_threads(1)
    grids, first, cells = measure()
    lines = [
        "# Cost of patching", "",
        "`python -m tests.benchmarks.bench_patching` on SmolLM2-135M, float32, one prompt pair of 14 tokens, "
        f"{platform.machine()} CPU, torch {torch.__version__} with 1 thread. "
        f"Medians of {ROUNDS} interleaved rounds in one process.", "",
        f"{cells} cells of the residual stream, exactly:", "", *rows(grids), "",
        "To first order, without the exact sample:", "", *rows(first),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = main()
    target = Path("docs/benchmarks/patching.md")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    print(text)
