"""PSRP: small modules that recalibrate the MLP branch of every block. They change the network; they are not probes.

Source: Gao et al., "Tuning Pre-trained Model via Moment Probing", ICCV 2023 (arXiv 2307.11342), section 3.3. A moment
head trained together with these modules is what the paper calls MP+. Such a result says nothing about what the frozen
representation holds, so no class here is an estimator and none can stand in a sweep over probes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.hooks.errors import ArgumentError, ModelStateError, UnknownFamilyError
from interp.hooks.layouts import Layout, child, recognise
from interp.hooks.weights import linear_weight
from interp.probes.training import adamw, warmup_cosine


@dataclass(frozen=True)
class BranchPoint:
    """Where a block is recalibrated, by module paths.

    Attributes:
        stream: The module whose input is t, the stream after attention; None to feed the generator with the branch's
            output (ConvNeXt).
        branch: The module whose output is u, before layer scale and drop-path.
        width: d.
    """

    stream: str | None
    branch: str
    width: int


# Blocks that are no transformer layout: the norm in front of the MLP, the module whose output is u, what a block has.
_BLOCKS = (
    ("layernorm_after", "mlp", "layernorm_before"),  # Swin
    ("norm2", "mlp", "norm1"),  # DINOv2; ViT and Swin of timm
    (None, "pwconv2", "dwconv"),  # ConvNeXt
    (None, "mlp", "conv_dw"),  # ConvNeXt of timm
)


class PSRP(nn.Module):
    """Two recalibrating parameters of each token: g = relu(D t), w = E_w g, b = E_b g. 3 d r parameters, no biases.

    The down projection D is shared by the two. E_w and E_b start at zero, so that the network is unchanged at first;
    the authors' code starts them at random.

    Example:
        >>> sum(p.numel() for p in PSRP(768, 16).parameters())
        36864
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.scale, self.shift = nn.Linear(rank, width, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.normal_(self.down.weight, std=width**-0.5)
        nn.init.zeros_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(
        self, source: Float[Tensor, "*batch d"], branch: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch d"]:
        """b + (1 + w) u."""
        shared = torch.relu(self.down(source))
        return self.shift(shared) + (1 + self.scale(shared)) * branch


class PSRPAdapter(nn.Module):
    """One `PSRP` for every block of a model, put in by hooks; ``adapter(...)`` runs the model with them.

    ``out = t + LayerScale(b + (1 + w) * MLP(LN2(t)))`` with t the stream after attention. While the adapter is on, the
    model's own parameters are frozen; ``remove()``, or leaving a ``with`` block, takes the hooks out and gives every
    parameter its flag back. ``parameters()`` are the adapter's alone. Training or evaluation mode stays as it is.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        ...                    image_size=8, patch_size=4)
        >>> model = ViTModel(config, add_pooling_layer=False).eval()
        >>> adapter = PSRPAdapter.wrap(model, rank=4)
        >>> sum(p.numel() for p in adapter.parameters()), len(adapter.points)
        (768, 2)
        >>> adapter.remove()
    """

    model: nn.Module

    def __init__(self, model: nn.Module, points: Sequence[BranchPoint], rank: int):
        super().__init__()
        if not isinstance(rank, int) or rank < 1:
            raise ArgumentError(f"rank={rank!r}", "a positive whole number")
        if not points:
            raise ArgumentError("no blocks to adapt", "at least one BranchPoint")
        if getattr(model, "_psrp", None) is not None:
            raise ModelStateError("a model that is adapted already", "one adapter at a time", "remove() the other one")
        like = next(model.parameters())
        self.points = tuple(points)
        self.generators = nn.ModuleList(PSRP(point.width, rank) for point in points).to(like.device, like.dtype)
        object.__setattr__(self, "model", model)  # not a child: its parameters are not the adapter's
        self._streams: dict[int, Tensor] = {}
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self._handles: list[Any] = []
        self._install(model)

    @classmethod
    def wrap(cls, model: nn.Module, rank: int = 16, *, points: Sequence[BranchPoint] | None = None) -> "PSRPAdapter":
        """Adapt every block of a model.

        Args:
            model: A module: any recognised transformer with attention before the MLP, Swin, DINOv2 or ConvNeXt.
            rank: r.
            points: Where to adapt, for an architecture that is not recognised.

        Raises:
            UnknownFamilyError: If no block is recognised.
            ArgumentError: If attention and MLP are parallel, so that there is no stream between them.
        """
        module = getattr(model, "module", model)
        return cls(module, points if points is not None else branch_points(module), rank)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's output."""
        if not self._handles:
            raise ModelStateError("an adapter that was removed", "an adapter that is on", "wrap the model again")
        return self.model(*args, **kwargs)

    def remove(self) -> None:
        """Take the hooks out and restore which parameters of the model are trained."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(self._flags[name])
            object.__delattr__(self.model, "_psrp")
        self._handles = []
        self._streams.clear()

    def __enter__(self) -> "PSRPAdapter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _install(self, model: nn.Module) -> None:
        missing = [p for point in self.points for p in (point.stream, point.branch) if p and child(model, p) is None]
        if missing:
            raise ArgumentError(f"no modules {', '.join(missing)} in {type(model).__name__}", "paths of the model")
        for index, point in enumerate(self.points):
            if point.stream is not None:
                hook = self._keep(index)
                stream = child(model, point.stream)
                self._handles.append(stream.register_forward_pre_hook(hook, with_kwargs=True))  # type: ignore[union-attr]
            branch = child(model, point.branch)
            self._handles.append(branch.register_forward_hook(self._change(index)))  # type: ignore[union-attr]
        object.__setattr__(model, "_psrp", True)
        model.requires_grad_(False)

    def _keep(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._streams[index] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def _change(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            source = first if self.points[index].stream is None else self._streams.pop(index)
            changed = self.generators[index](source, first)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook


def branch_points(model: nn.Module) -> list[BranchPoint]:
    """Where every block of a model is recalibrated.

    Raises:
        UnknownFamilyError: If no block is recognised.
        ArgumentError: If attention and MLP are parallel.
    """
    layout = recognise(model)
    if layout is not None:
        return _transformer(model, layout)
    found = []
    for path, module in model.named_modules():
        for norm, branch, mark in _BLOCKS:
            parts = dict(module.named_children())
            if mark in parts and branch in parts and (norm is None or norm in parts):
                found.append(_point(model, path, norm, branch))
                break
    if not found:
        raise UnknownFamilyError(
            f"{type(model).__name__} has no blocks that are recognised",
            "a transformer, Swin, DINOv2 or ConvNeXt", "give points=[BranchPoint(stream, branch, width), ...]",
        )  # fmt: skip
    return found


def _transformer(model: nn.Module, layout: Layout) -> list[BranchPoint]:
    if layout.parallel:
        raise ArgumentError(f"a parallel layout ({layout.name})", "attention before the MLP",
                            "there is no stream between them to recalibrate by")  # fmt: skip
    front = None if layout.post_ln else layout.ln2
    branch = layout.mlp or layout.mlp_down
    stream = front or layout.mlp or layout.mlp_pre
    blocks = child(model, layout.blocks)
    count = len(blocks)  # type: ignore[arg-type]
    return [_point(model, layout.block(layer), stream, str(branch)) for layer in range(count)]


def _point(model: nn.Module, block: str, stream: str | None, branch: str) -> BranchPoint:
    start = f"{block}." if block else ""
    front = child(model, f"{start}{stream}") if stream is not None else None
    norm = getattr(front, "weight", None)
    if isinstance(norm, Tensor) and norm.ndim == 1:
        width = len(norm)
    else:
        width = _output_width(child(model, f"{start}{branch}"))
    return BranchPoint(f"{start}{stream}" if stream is not None else None, f"{start}{branch}", width)


def _output_width(module: nn.Module | None) -> int:
    """Rows of the last matrix of a branch, in order of definition."""
    matrices = [m for m in module.modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 2]  # type: ignore[union-attr]
    last = matrices[-1]
    return linear_weight(last, type(last).__name__).shape[0]


def train_adapter(
    adapter: PSRPAdapter,
    head: nn.Module,
    read: Callable[[Any], tuple[Tensor, ...]],
    batches: Callable[[], Iterable[tuple[Any, Tensor]]],
    *,
    epochs: int = 10,
    lr: float = 1e-4,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    clip: float = 1.0,
) -> list[float]:
    """Train an adapter and a head together (MP+ where the head is a `MomentHead`); give the mean loss of each epoch.

    AdamW with weight decay on matrices, a linear warm-up and a cosine to zero. The model's mode stays as it is.

    Args:
        adapter: An adapter that is on.
        head: Logits of what ``read`` gives.
        read: From the model's output to the head's arguments, say tokens and mask.
        batches: Called once an epoch; gives (inputs, labels), inputs a dict of arguments or one argument.
        epochs: Passes.
        lr: Highest learning rate.
        weight_decay: On matrices.
        warmup: Share of the steps with a rising rate.
        clip: Largest norm of the gradient.

    Raises:
        ArgumentError: If there are no batches.
    """
    parameters = [*adapter.parameters(), *head.parameters()]
    optimizer = adamw(parameters, lr, weight_decay)
    steps = epochs * sum(1 for _ in batches())
    if not steps:
        raise ArgumentError(f"{epochs} epochs without batches", "at least one batch and one epoch")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps, warmup))
    losses = []
    for _ in range(epochs):
        total, count = 0.0, 0
        for inputs, labels in batches():
            output = adapter(**inputs) if isinstance(inputs, dict) else adapter(inputs)
            loss = nn.functional.cross_entropy(head(*read(output)), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            schedule.step()
            total, count = total + float(loss.detach()) * len(labels), count + len(labels)
        losses.append(total / count)
    return losses
