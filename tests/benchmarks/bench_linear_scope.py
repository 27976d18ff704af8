"""Speed and memory of LinearScope against what one would write by hand; ratios in one process, interleaved.

python -m tests.benchmarks.bench_linear_scope        # writes docs/benchmarks/linear_scope.md
"""

import platform
import subprocess
import sys
from pathlib import Path

import torch

import interp
from tests.benchmarks.bench_hooks import PROMPT, interleaved

N = 32


def photograph():
    from sklearn.datasets import load_sample_images

    return load_sample_images().images[0]


def columns():
    """32 columns of Lite0 at 96 pixels: replay without constants, jvp one by one or under vmap, and one batch."""
    model = interp.load("efficientnet-lite0")
    x = torch.nn.functional.interpolate(model.preprocess(photograph()), size=96, mode="bilinear")
    scope = interp.LinearScope(model, x)
    made = torch.Generator().manual_seed(0)
    probes = torch.zeros(N, *x.shape[1:])
    probes.view(N, -1)[torch.arange(N), torch.randperm(probes[0].numel(), generator=made)[:N]] = 1.0
    module = model.module

    def one(v):
        return torch.func.jvp(module, (x,), (v[None],))[1]

    def one_batch():
        return scope.run_together(probes).probes - scope.r

    with torch.no_grad():
        wanted = torch.cat([one(v) for v in probes])
        assert (scope.matvec(probes) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        # A difference to the constant part: digits are lost where that is large.
        assert (one_batch() - wanted).abs().max() <= 1e-3 * max(wanted.abs().max(), scope.r.abs().max())
        return interleaved(
            {
                "`torch.func.jvp`, one by one": lambda: [one(v) for v in probes],
                "`vmap(jvp)`, chunks of 8": lambda: torch.vmap(one, chunk_size=8)(probes),
                "`LinearScope.matvec`": lambda: scope.matvec(probes),
                "`LinearScope.run_together`": one_batch,
            },
            rounds=5,
        )


def rows(of: str):
    """64 rows: LinearScope.rows against a loop of `autograd.grad` over one kept graph."""
    if of == "image":
        model = interp.load("efficientnet-lite0")
        x = model.preprocess(photograph())
        scope = interp.LinearScope(model, x)
        leaf = x.clone().requires_grad_()
        out = model.module(leaf)
        seeds = [out[0, k] for k in range(64)]
        indices = range(64)
    else:
        model = interp.load("smollm2-135m")
        scope = interp.LinearScope(model, PROMPT, "exact", output="blocks.29.hook_resid_post")
        leaf = scope.x.clone().requires_grad_()
        acts = {}
        handle = model.module.model.layers[29].register_forward_hook(lambda m, a, out: acts.update(y=out))
        try:
            model.module.model(inputs_embeds=leaf)
        finally:
            handle.remove()
        seeds = [acts["y"][0, -1, k] for k in range(64)]
        indices = [(scope.out_shape[0] - 1, k) for k in range(64)]
    loop = lambda: torch.cat([torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in seeds])
    call = lambda: scope.rows(indices)
    wanted = loop()
    assert (call() - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    return interleaved({"loop over a kept graph": loop, "`LinearScope.rows`": call}, rounds=3)


def peak(*what: str) -> float:
    """Peak resident MiB of a process of its own that computes on Lite0: rows or columns, by a loop or by a scope."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_linear_scope", *what], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def child(what: str, budget: str = "2GiB") -> None:
    torch.set_num_threads(2)
    model = interp.load("efficientnet-lite0")
    x = model.preprocess(photograph())
    if what == "loop":
        leaf = x.requires_grad_()
        out = model.module(leaf)
        torch.cat([torch.autograd.grad(out[0, k], leaf, retain_graph=True)[0] for k in range(64)])
    elif what == "rows":
        interp.LinearScope(model, x, budget=budget).rows(range(64))
    else:
        scope = interp.LinearScope(model, x, chunk=64, budget=budget)
        if what == "columns":
            scope.columns(range(64))
    # Not getrusage: its maximum begins with that of the process which started this one.
    status = Path("/proc/self/status").read_text()
    print(int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024)


def budgets() -> list[str]:
    """Peak memory above that of a scope alone, for 64 columns asked for at once, under budgets."""
    alone = peak("scope")
    lines = [
        "64 columns of EfficientNet-Lite0 at 224 x 224 with `chunk=64`:",
        "",
        "| budget | peak above the scope alone |",
    ]
    lines += ["|---|---|"]
    for budget in ("2GiB", "512MiB", "128MiB"):
        lines.append(f"| {budget} | {peak('columns', budget) - alone:.0f} MiB |")
    return [*lines, ""]


def completeness():
    """Largest |F x + r - y| over the sum of absolute terms of each logit, Lite0 in float32 and float64."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = interp.load("efficientnet-lite0", dtype=dtype)
        votes = interp.LinearScope(model, model.preprocess(photograph()).to(dtype)).votes("palace")
        found[str(dtype).removeprefix("torch.")] = votes.completeness_error
    return found


def table(title: str, times: dict[str, float], baseline: str) -> list[str]:
    lines = [f"{title}:", "", f"| way | ms | ratio to {baseline} |", "|---|---|---|"]
    base = next(iter(times.values()))
    return [*lines, *(f"| {name} | {1e3 * s:.0f} | {s / base:.2f} |" for name, s in times.items()), ""]


def test_benchmark_linear_scope():
    assert main()


def main() -> str:
    torch.set_num_threads(2)
    lines = [
        "# LinearScope against hand-written code",
        "",
        f"`python -m tests.benchmarks.bench_linear_scope`, float32, {platform.machine()} CPU with 2 cores, "
        f"torch {torch.__version__} with 2 threads. Medians of interleaved rounds in one process.",
        "",
        *table(f"{N} columns of EfficientNet-Lite0 at 96 x 96", columns(), "the loop"),
        *table("64 rows of EfficientNet-Lite0 at 224 x 224", rows("image"), "the loop"),
        *table("64 rows of SmolLM2-135M (14 tokens, embeddings to the last stream, exact)", rows("text"), "the loop"),
    ]
    loop, scope = peak("loop"), peak("rows")
    lines += [
        *budgets(),
        f"Peak resident memory of a process that makes the 64 image rows: {loop:.0f} MiB by the loop, "
        f"{scope:.0f} MiB by LinearScope ({scope - loop:+.0f}).",
        "",
        "Completeness error of the votes for one logit of Lite0, relative to the sum of absolute terms: "
        + ", ".join(f"{error:.1e} in {dtype}" for dtype, error in completeness().items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(*sys.argv[1:])
    else:
        text = main()
        target = Path("docs/benchmarks/linear_scope.md")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        print(text)
