"""Small networks for tasks on vectors: several seeds trained at once, and untrained copies as controls."""

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from interp.causal.sampling import Task
from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model

_VALIDATED = 10_000


def mlp(task: Task, *, blocks: int = 3, seed: int = 0) -> nn.Sequential:
    """Return an untrained network of blocks Linear, ReLU of the input's width, and a head: torch's default start.

    Sites are ``block1``, ``block2`` and so on.

    Raises:
        ArgumentError: If the task's inputs are no vectors.

    Example:
        >>> from interp.causal.equality import hierarchical_equality
        >>> list(mlp(hierarchical_equality())._modules)
        ['block1', 'block2', 'block3', 'head']
    """
    if task.width is None:
        raise ArgumentError(f"an MLP for {task.name}", "a task whose inputs are vectors")
    width = task.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [(f"block{i + 1}", nn.Sequential(nn.Linear(width, width), nn.ReLU())) for i in range(blocks)]
        return nn.Sequential(OrderedDict([*parts, ("head", nn.Linear(width, task.causal_model.labels))])).eval()


def train_mlps(
    task: Task, seeds: Sequence[int] = (0,), *, blocks: int = 3, samples: int = 1_048_576, epochs: int = 20,
    batch_size: int = 1024, lr: float = 1e-3, enough: float = 0.999, data_seed: int = 1000,
) -> tuple[list[nn.Sequential], list[float]]:  # fmt: skip
    """Train one network for each seed, all at once on the same batches, and return them with their test accuracies.

    Args:
        task: What is learned.
        seeds: Of the initial weights.
        blocks: Number of blocks.
        samples: Inputs in an epoch.
        epochs: Most epochs.
        batch_size: Inputs in a step.
        lr: Learning rate of Adam.
        enough: Accuracy of the worst network at which training ends, looked at every 256 steps.
        data_seed: Of the inputs.
    """
    networks = [mlp(task, blocks=blocks, seed=seed) for seed in seeds]
    parameters, buffers = torch.func.stack_module_state(networks)  # type: ignore[arg-type]
    call = lambda p, b, x: torch.func.functional_call(networks[0], (p, b), (x,))
    run = torch.func.vmap(call, in_dims=(0, 0, None))
    x, y = task.labelled(samples, data_seed)
    held, labels = task.labelled(_VALIDATED, data_seed + 1)
    optimizer = torch.optim.Adam(list(parameters.values()), lr=lr)
    generator, step, done = torch.Generator().manual_seed(data_seed), 0, False
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            logits = run(parameters, buffers, x[rows])
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), y[rows].repeat(len(seeds)), reduction="sum")
            optimizer.zero_grad()
            (losses / len(rows)).backward()
            optimizer.step()
            step += 1
            if step % 256 == 0 and float(_accuracy(run, parameters, buffers, held, labels).min()) >= enough:
                done = True
                break
        if done:
            break
    for index, network in enumerate(networks):
        network.load_state_dict({name: p.detach()[index].clone() for name, p in parameters.items()})
    return networks, _accuracy(run, parameters, buffers, *task.labelled(_VALIDATED, data_seed + 2)).tolist()


@torch.no_grad()
def _accuracy(run, parameters, buffers, x: Tensor, labels: Tensor) -> Tensor:
    return (run(parameters, buffers, x).argmax(-1) == labels).float().mean(1)


def untrained(model: Model, seed: int) -> Model:
    """Return a network of the same architecture with weights drawn anew: the control arm of every alignment.

    Raises:
        ArgumentError: If a part of the network cannot be initialised again.
    """
    module = model.module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(module, "config") and hasattr(module, "init_weights"):
            fresh = type(module)(copy.deepcopy(module.config))
        else:
            fresh = copy.deepcopy(module)
            _reset(fresh)
    fresh = fresh.to(device=model.device, dtype=model.dtype)
    for part, original in zip(fresh.modules(), module.modules(), strict=True):
        part.training = original.training
    return Model(
        fresh, model.tokenizer, model.layout, preprocess=model.preprocess,
        identity={**model.identity, "initialised": f"anew, seed {seed}"},
    )  # fmt: skip


def _reset(module: nn.Module) -> None:
    for name, part in module.named_modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(part.parameters(recurse=False), None) is not None:
            raise ArgumentError(
                f"{name or 'the network'} ({type(part).__name__}) has parameters and no reset_parameters()",
                "a way to draw its weights anew", "pass random_models=, untrained networks of the same architecture",
            )  # fmt: skip
