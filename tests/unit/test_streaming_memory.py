"""A store that is larger than the budget is fitted within it: the high-water mark of a process of its own."""

import subprocess
import sys

import pytest
import torch

import interp
from interp.store.store import ActivationStore

BUDGET, SLACK = 24 << 20, 40 << 20  # slack: labels and folds, kernels that torch loads when first used
CHILD = """
import sys
import numpy as np, torch
from interp.probes import LDAProbe, closed_forms, stream_probes
from interp.store.store import ActivationStore

def status(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024

def run(store, y, budget):
    closed_forms(store, y, pool="last", budget=budget)
    stream_probes(store, y, pool="last", C=0.01, budget=budget, tol=1e-4)

torch.set_num_threads(1)
y = np.arange(1000) % 2
run({"0": torch.randn(1000, 256)}, y, 24 << 20)
store = ActivationStore.open(sys.argv[1])
before = status("VmHWM")
run(store, np.arange(len(store)) % 2, int(sys.argv[2]))
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_is_within_the_budget_and_not_the_size_of_the_store(tmp_path):
    model = interp.attach(torch.nn.Sequential(torch.nn.Linear(4, 256)))
    store = ActivationStore.build(
        model, torch.randn(200_000, 4), "0", tmp_path / "s", pools=["last"], batch_size=4096, batch_tokens=4096,
        shard="8MiB",
    )  # fmt: skip
    size = sum(file.stat().st_size for file in store.path.glob("chunks/*"))
    command = [sys.executable, "-c", CHILD, str(store.path), str(BUDGET)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert size > 200_000_000
    assert int(done.stdout) < BUDGET + SLACK
