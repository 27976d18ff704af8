"""Gradients of a frozen network at sites: what each site adds to linear readouts of the output."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks import calls
from interp.hooks.frozen import FrozenNetwork
from interp.hooks.inputs import Batch
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.hooks.plans import Probe
from interp.hooks.session import Read, Session
from interp.hooks.site import SiteLike


class _Probed(FrozenNetwork):
    """A frozen network, up to one site, recorded with a zero leaf at each of some others."""

    def __init__(
        self,
        model: Model,
        batch: Batch,
        held: Linearization,
        select: Callable[[Tensor], Tensor],
        output: SiteLike,
        sites,
    ):
        found = [Read(site, binding) for site, binding in model.resolve(sites)]
        self.probes = [Probe(read.site) for read in found]
        self._edits = [probe.edit(read) for probe, read in zip(self.probes, found, strict=True)]
        self._end = [Read(site, binding) for site, binding in model.resolve(output)]
        # A free module may run twice: only a whole run, with its own value read as well, can tell.
        self._free = [read for read in found if read.binding.where.startswith("raw") and read not in self._end]
        super().__init__(model, batch, held, select)
        self.leaves = [probe.leaf for probe in self.probes]

    def _call(self, values: dict[str, Tensor]) -> Any:
        stop = not self._free and not self._end[0].binding.where.startswith("raw")
        session = Session(
            self.model.module, [*self._end, *self._free], self._edits, stop=stop, keep_graph=True,
            size=self.batch.size, extent=self.batch.extent,
        )  # fmt: skip
        with session:
            super()._call(values)
        return session.values[self._end[0].site]

    def push_from(self, v: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """F v for values v [n, ...] of the first site: a replay of the linear part, with zeros before that site."""
        zeros = {name: value.new_zeros(len(v), *value.shape[1:]) for name, value in self.values.items()}
        with self.probes[0].giving(calls.mark_live(v.detach().clone())):
            return self.push(zeros)

    def pull_to(self, w: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Fᵀ w at the first site, for output directions w [n, ...]."""
        leaf, batched = self.leaves[0], len(w) > 1
        given = w[:, None] if batched else w
        found = torch.autograd.grad(self.output, leaf, given, retain_graph=True, is_grads_batched=batched)[0]
        return found[:, 0] if batched else found


def probed_network(
    model: Model, batch: Batch, held: Linearization, sites: Sequence[SiteLike], output: SiteLike
) -> _Probed:
    """Return the frozen network of one example up to a site, with a zero leaf at each of some others.

    Its ``output`` [1, ...] carries the graph, its ``probes`` the leaves.

    Raises:
        LinearizationError: If a call cannot be linearised.
    """
    return _Probed(model, batch, held, lambda value: value, output, sites)


def frozen_gradients(
    model: Model, inputs: Any, sites: Sequence[SiteLike], output: SiteLike,
    readout: Callable[[Tensor], Float[Tensor, "k"]], linearization: Linearization,
) -> tuple[dict[str, Float[Tensor, "k ..."]], Float[Tensor, "k"]]:  # fmt: skip
    """Return the gradients of k readouts at sites of the network with its decisions held, and the readouts' constants.

    One recording and one batched backward pass for all sites and readouts; the constants are a replay on embeddings of
    zeros.

    Args:
        model: A model over tokens.
        inputs: One example.
        sites: Sites that carry the residual stream, branches, heads' z, values or neurons.
        output: The site that is read out; the network behind it is not run.
        readout: From its value [1, ...] to k numbers, linear in it.
        linearization: What is held.

    A site that does not reach the readout under this linearisation has gradient zero.

    Raises:
        LinearizationError: If a call cannot be linearised.
    """
    batch = model.batch(inputs)
    network = _Probed(model, batch, linearization, readout, output, sites)
    eye = torch.eye(len(network.output), dtype=network.output.dtype, device=network.output.device)
    leaves = [probe.leaf for probe in network.probes]
    grads = torch.autograd.grad(network.output, leaves, eye, is_grads_batched=True, allow_unused=True)
    found = {
        str(probe.site): probe.leaf.detach().expand(len(eye), *probe.leaf.shape[1:]) if grad is None else grad[:, 0]
        for probe, grad in zip(network.probes, grads, strict=True)
    }
    constant = network.replay({name: torch.zeros_like(value) for name, value in network.values.items()})
    return found, constant
