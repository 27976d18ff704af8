"""The fused gate sandwich on a GPU against cuBLAS of the same shape, torch.func and torch.compile of it.

    python -m tests.benchmarks.bench_kernels          # needs a CUDA device and triton; says so where there is none

Each row: milliseconds (best of rounds in which all ways take turns, by events, after 100 ms of warming up), TFLOP/s of
the 2 T d_in d_out f that the sandwich needs (autograd does three times as much), the share of the yardstick, which is
cuBLAS on one product of the stacked shape, and memory beyond the result.
"""

import time

import pytest
import torch
from torch.func import jacrev, vmap

from interp.jacobians.kernels import choice, device
from interp.jacobians.kernels.sandwich import sandwich, trial
from tests.kernel_cases import make, relative

ROUNDS = 7
# [tokens, d, d, f]: SmolLM2-135M, Llama 3.2 1B, Llama 3 8B, and one token of it.
SHAPES = ((64, 576, 576, 1536), (16, 2048, 2048, 8192), (8, 4096, 4096, 14336), (1, 4096, 4096, 14336))
PRECISIONS = {
    "bf16": (torch.bfloat16, "float32"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "float32"),
}
AUTOGRAD, YARDSTICK = "`vmap(jacrev)`", "cuBLAS, stacked shape"


def what_is_missing():
    """Why nothing can be measured here, or ''."""
    if not torch.cuda.is_available():
        return "no CUDA device: the kernels are not measured here"
    return "" if device.has_triton() else "triton is not installed: pip install 'interp[kernels]'"


def milliseconds(call):
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def extra(call, result):
    """MiB at the highest point beyond the level before and the result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return max(0.0, torch.cuda.max_memory_allocated() - before - result) / 2**20


def ways(x, precision):
    """The ways by name. Autograd runs the MLP whose derivative the sandwich is: silu(G n) * (U n), then W_out."""
    tokens, d_out, d_in = x.shape
    out = torch.empty(x.shape, device="cuda", dtype=torch.float32)
    left = torch.randn(tokens * d_in, x.out.shape[1], device="cuda").to(x.out.dtype)
    stacked = torch.empty(tokens * d_in, d_out, device="cuda", dtype=x.out.dtype)
    n = x.n.to(x.out.dtype)

    def mlp(v):
        return (torch.nn.functional.silu(v @ x.pre) * (v @ x.up)) @ x.out.T

    jacobians = vmap(jacrev(mlp), chunk_size=max(1, min(tokens, 2**28 // (d_out * x.out.shape[1]))))
    return {
        YARDSTICK: lambda: torch.mm(left, x.out.T, out=stacked),
        "fused kernel": lambda: sandwich(x, out, precision, "fused"),
        "scaled weights + cuBLAS": lambda: sandwich(x, out, precision, "torch"),
        AUTOGRAD: lambda: jacobians(n),
        "`torch.compile` of it": torch.compile(lambda: jacobians(n)),
    }


def measure(shape, name):
    """(way, ms, TFLOP/s, share of the yardstick, MiB) of each way that runs, and the reason where one does not."""
    dtype, precision = PRECISIONS[name]
    x, wanted = make(shape, dtype, device="cuda")
    limit = {"bf16": 1e-2, "tf32": 2e-3, "float32": 2e-6}[name]
    for way in ("fused", "torch"):
        assert relative(sandwich(x, precision=precision, way=way), wanted) < limit
    del wanted
    x = x.aligned()
    best, rows = {}, []
    with device.float32_products(x.out, precision == "tf32"):
        calls = ways(x, precision)
        for way in list(calls):
            try:
                stop = time.monotonic() + 0.1
                while time.monotonic() < stop:
                    calls[way]()
                    torch.cuda.synchronize()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                rows.append((way, str(error).splitlines()[0][:60]))
                del calls[way]
                torch.cuda.empty_cache()
        for _ in range(ROUNDS):
            for way, call in calls.items():
                best[way] = min(best.get(way, float("inf")), milliseconds(call))
        result = {AUTOGRAD: x.p.shape[0] * x.out.shape[0] * x.pre.shape[1] * x.out.element_size()}
        memory = {way: extra(call, result.get(way, 0)) for way, call in calls.items()}
    tokens, d_out, d_in, f = shape
    flops = 2 * tokens * d_out * d_in * f
    for way, ms in best.items():
        rows.append((way, ms, flops / ms / 1e9, best[YARDSTICK] / ms, memory[way]))
    return rows, trial(x, precision)


def main():
    reason = what_is_missing()
    if reason:
        print(reason)
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    for name in PRECISIONS:
        for shape in SHAPES:
            rows, won = measure(shape, name)
            print(f"{name}, tokens x d x d x f = {' x '.join(map(str, shape))}; {won}\n")
            print("| way | ms | TFLOP/s | share of cuBLAS | MiB beyond the result |\n|---|---|---|---|---|")
            for way, *values in rows:
                cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
                print("| " + " | ".join([way, *cells, *[""] * (4 - len(cells))]) + " |")
            print(flush=True)


def test_ratios():
    """What the method's page requires of an H100: of cuBLAS in the same run, and against autograd."""
    if what_is_missing():
        pytest.skip(what_is_missing())
    choice._KNOWN.clear()
    for name, share in (("bf16", 0.6), ("tf32", 0.55)):
        rows, _ = measure((16, 2048, 2048, 8192), name)
        found = {row[0]: row for row in rows if len(row) == 5}
        assert found["fused kernel"][3] >= share
        assert found["fused kernel"][4] <= 16
        if AUTOGRAD in found:
            assert found[AUTOGRAD][1] >= 4 * found["fused kernel"][1]


if __name__ == "__main__":
    main()
