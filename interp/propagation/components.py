"""Components: what each head and MLP has written into the residual stream at one position."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.propagation.paths import Step
from interp.propagation.reference import Reference
from interp.propagation.stages import centred_gain


@dataclass(frozen=True, eq=False)
class Components:
    """The terms of the residual stream at one position: they sum to it.

    Attributes:
        names: ``embedding``, ``positions``, ``L3H1``, ``L3 attention bias``, ``L3MLP``, ..., ``rounding``.
        steps: The path step of each head and MLP; None for what no path goes through.
        values: [component, d].
    """

    names: list[str]
    steps: list[Step | None]
    values: Float[Tensor, "component d"] = field(repr=False)


WRITTEN = ("attn.hook_z", "hook_attn_out", "hook_mlp_out")


def written_sites(model: Any) -> tuple[str, ...]:
    """Sites that a Reference must hold so that its stream can be taken apart."""
    return tuple(f"blocks.{layer}.{part}" for layer in range(model.n_layers) for part in WRITTEN)


def components(ref: Reference, stream: str, position: int) -> Components:
    """Return the terms of a residual stream at one position: embeddings, heads, attention biases and MLPs.

    A head's term is W_O z behind the branch's post-norm, its divisor held, so that heads still sum to the branch.

    Args:
        ref: A reference that holds `written_sites`.
        stream: ``blocks.L.hook_resid_pre``, ``hook_resid_mid`` or ``hook_resid_post``.
        position: Index from 0.

    Raises:
        ArgumentError: If the site is no residual stream.
    """
    parts = stream.split(".")
    if len(parts) != 3 or parts[2] not in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post"):
        raise ArgumentError(f"stream {stream!r}", "a residual site, as blocks.6.hook_resid_pre")
    layer = int(parts[1])
    names, steps, values = [], [], []

    def add(name: str, step: Step | None, value: Tensor) -> None:
        names.append(name)
        steps.append(step)
        values.append(value)

    for site, name in (("hook_embed", "embedding"), ("hook_pos_embed", "positions")):
        if ref.has(site):
            add(name, None, ref.at(site)[position])
    for i in range(layer + 1):
        attention = i < layer or parts[2] != "hook_resid_pre"
        mlp = i < layer or parts[2] == "hook_resid_post"
        if attention:
            _add_heads(ref, i, position, add)
        if mlp:
            add(f"L{i}MLP", Step(i), ref.at(f"blocks.{i}.hook_mlp_out")[position])
    rounding = ref.at(stream)[position] - torch.stack(values).sum(0)
    add("rounding", None, rounding)
    return Components(names, steps, torch.stack(values))


def _add_heads(ref: Reference, layer: int, position: int, add) -> None:
    output = ref.weights.output(layer)
    z = ref.at(f"blocks.{layer}.attn.hook_z")[position]
    heads = torch.einsum("hk,hkd->hd", z, output.weight) * ref.weights.layout.branch_scale
    name = f"blocks.{layer}.ln1_post"
    norm = ref.weights.norm(name)
    if norm is not None:
        heads = centred_gain(heads, norm) / ref.at(f"{name}.hook_scale")[position]
    for head, value in enumerate(heads):
        add(f"L{layer}H{head}", Step(layer, head), value)
    if output.bias is not None or (norm is not None and norm.bias is not None):
        branch = ref.at(f"blocks.{layer}.hook_attn_out")[position]
        add(f"L{layer} attention bias", None, branch - heads.sum(0))
