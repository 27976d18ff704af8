"""Exact path effects: what a measurement loses when only what flows along one path is changed.

A change of the stream in front of a path's first component is run through it alone: a head moves values with its clean
pattern, an MLP and all norms are computed afresh. Nothing else sees the change.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError
from interp.hooks.model import Model
from interp.observables.observable import Observable
from interp.observables.sequences import refuse_sequence
from interp.propagation.paths import Path, Step
from interp.propagation.reference import Reference
from interp.propagation.stages import MLP

_BRANCHES = ("attn.hook_out", "mlp.hook_out")


class ExactPaths:
    """A clean prompt, and what a corrupt one (or nothing) would have put in place of each component.

    Args:
        model: A decoder.
        observable: What is measured.
        clean: One prompt.
        corrupt: A prompt of as many tokens, or None: then all of what a component wrote is taken away.
        position: Whose logits are measured.

    Raises:
        ArgumentError: If the prompts have different lengths.
    """

    def __init__(self, model: Model, observable: Observable, clean: Any, corrupt: Any = None, position: int = -1):
        refuse_sequence(observable)
        self.model, self.observable = model, observable
        known = model.bindings.by_address if model.bindings else {}
        sites = tuple(
            s for i in range(model.n_layers) for p in (*_BRANCHES, "hook_mlp_out") if (s := f"blocks.{i}.{p}") in known
        )
        self.ref = self.clean = Reference(model, clean, sites)
        self.other = None if corrupt is None else Reference(model, corrupt, sites)
        if self.other is not None and self.other.length != self.ref.length:
            raise ArgumentError(
                f"clean has {self.ref.length} tokens, corrupt {self.other.length}",
                "prompts of one length", "path patching compares them position by position",
            )  # fmt: skip
        self.position = self.ref.position(position)
        w, self._constant = observable.pull_to_stream(model)
        self._w = w.to(self.ref.weights.dtype)
        self.measurement = self._measure(self.ref.at(self._last)[self.position])
        self.corrupt_measurement = (
            None if self.other is None else self._measure(self.other.at(self._last)[self.position])
        )

    @property
    def _last(self) -> str:
        return f"blocks.{self.model.n_layers - 1}.hook_resid_post"

    @property
    def labels(self) -> list[str] | None:
        """The clean prompt's tokens."""
        tokenizer = self.model.tokenizer
        if tokenizer is None or self.ref.batch.ids is None:
            return None
        return [tokenizer.decode([t]) for t in self.ref.batch.ids[0].tolist()]

    def _measure(self, x: Tensor) -> float:
        return float(self._readout(x))

    def _readout(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        norm = self.ref.weights.norm("ln_final")
        return (x if norm is None else norm(x).to(x)) @ self._w + self._constant

    # What a component wrote, and would have written -------------------------------------------------------------------

    def embedding(self, at: int) -> Float[Tensor, "d"]:
        """The embedding's difference at a position."""
        sites = [s for s in ("hook_embed", "hook_pos_embed") if self.ref.has(s)]
        total = sum(self.ref.at(s)[at] for s in sites)
        assert isinstance(total, Tensor)
        return total if self.other is None else total - sum(self.other.at(s)[at] for s in sites)

    def mlp(self, layer: int, at: int) -> Float[Tensor, "d"]:
        """The difference of what an MLP added to the stream."""
        site = f"blocks.{layer}.hook_mlp_out"
        here = self.ref.at(site)[at]
        return here if self.other is None else here - self.other.at(site)[at]

    def heads(self, layer: int, at: int) -> Float[Tensor, "head source d"]:
        """The difference of what each head moved from each source to a position, the clean pattern held."""
        weights, values = self.ref.weights, self._values(self.ref, layer, at)
        if self.other is not None:
            values = values - self._values(self.other, layer, at)
        output = weights.output(layer)
        spread = values.repeat_interleave(output.weight.shape[0] // values.shape[1], 1)
        moved = torch.einsum("hs,shk->hsk", self.ref.pattern(layer)[:, at, : at + 1], spread)
        raw = torch.einsum("hsk,hkd->hsd", moved, output.weight)
        return self._on_stream(layer, "ln1_post", "attn.hook_out", raw, at)

    @staticmethod
    def _values(ref: Reference, layer: int, at: int) -> Float[Tensor, "source kv_head d_head"]:
        name = f"blocks.{layer}.ln1"
        norm = ref.weights.norm(name)
        if norm is None:
            return ref.weights.values(layer)(ref.at(f"blocks.{layer}.hook_resid_pre")[: at + 1])
        return ref.weights.values(layer)(norm.finish(ref.at(f"{name}.hook_normalized")[: at + 1]).to(ref.weights.dtype))

    def _on_stream(self, layer: int, norm: str, site: str, raw: Float[Tensor, "... d"], at: int) -> Tensor:
        """A change of a branch's output as the change of what is added to the stream, post-norm computed afresh."""
        found = self.ref.weights.norm(f"blocks.{layer}.{norm}")
        scale = self.ref.weights.layout.branch_scale
        if found is None:
            return raw * scale
        before = self.ref.at(f"blocks.{layer}.{site}")[at]
        return (found(before).to(raw) - found(before - raw).to(raw)) * scale

    # Along a path -----------------------------------------------------------------------------------------------------

    def effects(self, path: Path, deltas: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
        """Return m_clean - m when the stream in front of a path's first component is x - delta, for that path alone.

        Args:
            path: With positions counted from 0; the empty path ends at the logits.
            deltas: Changes of the stream at the position that the path reads.
        """
        places = _places(path)
        for step, (source, destination) in zip(path.steps, places, strict=True):
            deltas = self._through(step, source, destination, deltas)
        x = self.ref.at(self._last)[self.position]
        return self._readout(x) - self._readout(x - deltas)

    def _through(self, step: Step, source: int, destination: int, deltas: Tensor) -> Tensor:
        layer, ref = step.layer, self.ref
        if step.head is None:
            norm = ref.weights.norm(ref.mlp_norm(layer))
            stream = "hook_resid_pre" if ref.weights.layout.parallel else "hook_resid_mid"
            x = ref.at(f"blocks.{layer}.{stream}")[source]
            apply = (lambda v: v) if norm is None else (lambda v: norm(v).to(v))
            mlp = MLP(ref, layer)
            raw = mlp(apply(x)) - mlp(apply(x - deltas))
            return self._on_stream(layer, "ln2_post", "mlp.hook_out", raw, destination)
        norm = ref.weights.norm(f"blocks.{layer}.ln1")
        x = ref.at(f"blocks.{layer}.hook_resid_pre")[source]
        changed = x - (x - deltas) if norm is None else norm(x).to(x) - norm(x - deltas).to(x)
        values, output = ref.weights.values(layer), ref.weights.output(layer)
        v = changed @ values.weight[:, ref.weights.group(step.head)]
        raw = ref.pattern(layer)[step.head, destination, source] * (v @ output.weight[step.head])
        return self._on_stream(layer, "ln1_post", "attn.hook_out", raw, destination)


def _places(path: Path) -> list[tuple[int, int]]:
    """(source, destination) of each step, in execution order."""
    here, found = path.position, []
    for step in reversed(path.steps):
        source = here if step.source is None else step.source
        found.append((source, here))
        here = source
    return found[::-1]
