"""Alignments: stacked maps, the last token run again, a whole fit, and a training step against pyvene 0.1.8.

    make bench            # or: python -m tests.benchmarks.bench_causal [PYTHON_WITH_PYVENE]

Times are CPU seconds of one thread; ways take turns. The row of pyvene needs the interpreter of an environment of its
own, with torch and pyvene==0.1.8, and is left out without one.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import interp
from interp.causal import OrthogonalMap, Partition, Pool, RevNetMap, Training, hierarchical_equality, mlp
from interp.causal.lanes import Lane
from interp.causal.stages import cut
from interp.causal.training import fit_lanes

TASK = hierarchical_equality()
SITES, SIZES = ("block1", "block2", "block3"), (1, 2, 8)
BATCH, ROUNDS = 800, 3


def cpu(call):
    """Seconds of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def lane(model, site="block1", size=8, tau=None):
    partition = Partition({"v1": size, "v2": size})
    return Lane(model, site, tau or OrthogonalMap(16, seed=1), partition.mask(("v1", "v2"), 16))


def budget(steps):
    return Training(steps=steps, batch_size=BATCH, validate_every=steps, patience=steps)


def per_step(lanes, splits, steps):
    """CPU seconds of a step: many steps less few, so that reading activations is not counted."""
    cost = lambda n: cpu(lambda: fit_lanes(lanes, splits.train, splits.validation, budget(n)))
    few = cost(5)
    return (cost(steps + 5) - few) / steps


def stacked(splits, steps=150):
    """Milliseconds of a step of one map and of nine in a stack, by kind of map."""
    model, found = interp.attach(mlp(TASK, seed=0)), {}
    for name, tau in (("orthogonal", lambda: OrthogonalMap(16, seed=1)), ("RevNet 1x16", lambda: RevNetMap(16, 1))):
        one = [lane(model, tau=tau())]
        nine = [lane(model, site, size, tau()) for site in SITES for size in SIZES]
        rounds = [(per_step(one, splits, steps), per_step(nine, splits, steps)) for _ in range(ROUNDS)]
        found[name] = [1000 * statistics.median(column) for column in zip(*rounds, strict=True)]
    return found


def whole_fit(splits, steps=1600):
    """CPU seconds of a fit of the orthogonal map at d = 16, with reading the activations."""
    model = interp.attach(mlp(TASK, seed=0))
    return cpu(lambda: fit_lanes([lane(model)], splits.train, splits.validation, budget(steps)))


def last_token(model, block=20, texts=16, length=20):
    """Milliseconds, for one batch of prompts, of a plain forward call, of one with h put in, and of the last token.

    The plain call is the network's own, without any hook, on tokens that are ready. Activations, keys and values are
    read before.
    """
    generator = torch.Generator().manual_seed(0)
    pool = Pool(torch.randint(100, 5000, (texts, length), generator=generator).tolist(), {})
    site, rows = f"blocks.{block}.hook_resid_post@last", torch.arange(texts)
    ways = [cut(model, site, pool, cache=cache) for cache in (False, True)]
    candidates, batch = torch.tensor([[5, 9]]).expand(texts, -1), model.batch(pool.inputs)
    calls = [lambda: model.module(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)]
    calls += [lambda way=way: way.logits(way.acts, rows, candidates) for way in ways]
    with torch.no_grad():
        rounds = [[cpu(call) for call in calls] for _ in range(ROUNDS + 1)]
    return [1000 * statistics.median(column) for column in zip(*rounds[1:], strict=True)]


def against_pyvene(python, splits, steps=40):
    """Milliseconds of a step here and in pyvene, in turn: two variables, one rotation, halves, batches of 800."""
    model, data = interp.attach(mlp(TASK, seed=0)), splits.train
    both = data.chosen.all(1).nonzero().flatten()  # pyvene swaps all blocks or none: pairs that set both variables
    data, inputs = data.take(both), data.pool.inputs
    problem = {"base": inputs[data.base], "one": inputs[data.sources[:, 0]], "two": inputs[data.sources[:, 1]],
               "labels": data.labels, "batch": BATCH}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.save(problem, Path(folder) / "problem.pt")
        command = [python, str(Path(__file__).parent / "pyvene_step.py"), str(Path(folder) / "problem.pt")]
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdin
        assert other.stdout

        def theirs():
            other.stdin.write(f"{steps}\n")
            other.stdin.flush()
            for line in other.stdout:
                if line.startswith("seconds"):
                    return float(line.split()[1]) / steps
            raise RuntimeError("pyvene's process ended")

        one, rounds = [lane(model)], []
        theirs()
        for _ in range(ROUNDS):
            cost = lambda n: cpu(lambda: fit_lanes(one, data, splits.validation, budget(n)))
            few = cost(5)
            rounds.append(((cost(5 + steps) - few) / steps, theirs()))
        other.stdin.close()
        other.wait()
    return [1000 * statistics.median(column) for column in zip(*rounds, strict=True)]


def test_goals():
    torch.set_num_threads(1)
    splits = TASK.splits(32_000, 500, 500)
    one, nine = stacked(splits)["orthogonal"]
    assert nine < 2.5 * one
    assert whole_fit(splits) < 10


def main(python=None):
    torch.set_num_threads(1)
    splits = TASK.splits(128_000, 1000, 1000)
    say = lambda text: sys.stdout.write(text + "\n") and sys.stdout.flush()
    for name, (one, nine) in stacked(splits).items():
        say(f"| {name}: one map, nine maps, ratio | {one:.2f} ms | {nine:.2f} ms | {nine / one:.2f} |")
    say(f"| orthogonal fit, 1600 steps | {whole_fit(splits):.1f} s |")
    if python:
        ours, theirs = against_pyvene(python, splits)
        say(f"| step: interp, pyvene 0.1.8, ratio | {ours:.2f} ms | {theirs:.2f} ms | {theirs / ours:.1f} |")
    else:
        say("pyvene: left out, since no interpreter was given that has it.")
    for block in (10, 20, 28):
        plain, whole, short = last_token(interp.load("smollm2-135m"), block)
        times = f"{plain:.0f} ms | {whole:.0f} ms | {short:.0f} ms"
        say(f"| block {block}: plain, h put in, last token, plain / last token | {times} | {plain / short:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:2])
