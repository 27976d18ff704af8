"""The networks of the tables: trained once, then read from the folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from interp.causal import InterchangeDataset, Task, distributive_law, hierarchical_equality, mlp, train_mlps

CHUNK = 131_072  # inputs of a sixteenth of the training


def task_of(algorithm: str) -> Task:
    """The task with this algorithm."""
    made = distributive_law if algorithm.startswith("and") else hierarchical_equality
    return made(algorithm)  # type: ignore[arg-type]


def kept(folder: Path, name: str, task: Task, seeds: Sequence[int], make: Callable[[], list[nn.Sequential]]):
    """Networks of the folder, or made and written there."""
    files = [folder / f"{name}-{seed}.safetensors" for seed in seeds]
    if not all(file.is_file() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        for network, file in zip(make(), files, strict=True):
            save_model(network, str(file))
    networks = [mlp(task, seed=seed) for seed in seeds]
    for network, file in zip(networks, files, strict=True):
        load_model(network, str(file))
    return networks


def trained(folder: Path, algorithm: str, seeds: Sequence[int]) -> list[nn.Sequential]:
    """Networks that solve the task of an algorithm."""
    task = task_of(algorithm)
    name = task.name.replace(" ", "-")
    return kept(folder, name, task, seeds, lambda: train_mlps(task, seeds, enough=0.998)[0])


def halfway(folder: Path, state: str, seeds: Sequence[int]) -> list[nn.Sequential]:
    """Networks of hierarchical equality after none, a quarter and all of two passes over 1,048,576 inputs."""
    task = task_of("both")
    if state == "untrained":
        return [mlp(task, seed=seed) for seed in seeds]
    samples, epochs = (4 * CHUNK, 1) if state == "a quarter" else (8 * CHUNK, 2)
    make = lambda: train_mlps(task, seeds, samples=samples, epochs=epochs, enough=2.0)[0]
    return kept(folder, f"passes-{samples * epochs}", task, seeds, make)


def fitted(folder: Path, algorithm: str, seeds: Sequence[int], steps: int = 3000, pairs: int = 200_000):
    """Networks that hold an algorithm's variables in the two halves of block 2, as they were trained to."""
    task = task_of(algorithm)

    def make() -> list[nn.Sequential]:
        data = task.sample(pairs, seed=77, split="train")
        return [_fitted(task, data, seed, steps) for seed in seeds]

    return kept(folder, f"fitted-{algorithm}-{steps}", task, seeds, make)


def _fitted(task: Task, data: InterchangeDataset, seed: int, steps: int, batch: int = 512) -> nn.Sequential:
    """Cross-entropy of runs with halves of block 2 exchanged; in two of five pairs nothing is."""
    network, generator = mlp(task, seed=seed), torch.Generator().manual_seed(seed)
    low, high, half = network[:2], network[2:], task.width // 2  # type: ignore[operator]
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    x = data.pool.inputs
    for _ in range(steps):
        rows = torch.randint(len(data), (batch,), generator=generator)
        plain = torch.rand(batch, generator=generator) < 0.4
        chosen = data.chosen[rows] & ~plain[:, None]
        h = low(x[data.base[rows]])
        parts = [
            torch.where(chosen[:, k, None], low(x[data.sources[rows, k]])[:, cut], h[:, cut])
            for k, cut in enumerate((slice(0, half), slice(half, None)))
        ]
        labels = torch.where(plain, data.base_labels[rows], data.labels[rows])
        loss = nn.functional.cross_entropy(high(torch.cat(parts, 1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()
