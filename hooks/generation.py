"""Steering and reading while text is written."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.hooks import guards
from interp.hooks.bindings import ATTENTION_TAPS
from interp.hooks.errors import ArgumentError, InterventionError, InterventionNotAppliedError, SiteUnavailableError
from interp.hooks.inputs import Batch
from interp.hooks.interventions import Intervention, Mean, Patch, PlanLike
from interp.hooks.plans import resolve_plan
from interp.hooks.session import Read, Session
from interp.hooks.site import Site, SiteLike

if TYPE_CHECKING:
    from interp.hooks.model import Model

_LAST_ONLY = ("unembed.hook_out", "logits")  # of a prompt, transformers unembeds the last token only


@dataclass(frozen=True)
class Generation:
    """Text that a model wrote.

    Attributes:
        texts: The new text of each example.
        tokens: Prompt and new tokens [batch, pos], padded on the left.
        mask: True at real tokens [batch, pos].
        new: True at generated tokens [batch, pos].
        activations: By site, Tensor[batch, read, ...] of the tokens that the model read: all but the last of each row.
        positions: Index of each read token in its own example [batch, read], -1 at padding.
    """

    texts: list[str]
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    new: Bool[Tensor, "batch pos"]
    activations: dict[str, Tensor] = field(repr=False)
    positions: Int[Tensor, "batch read"] = field(repr=False)

    def generated(self, site: SiteLike, example: int = 0) -> Tensor:
        """Return one example's activations of its generated tokens that the model read back, [token, ...]."""
        read = self.positions.shape[1]
        return self.activations[str(site)][example][self.new[example, :read]]


def generate(
    model: "Model",
    inputs,
    *,
    max_new_tokens: int = 20,
    plan: PlanLike = (),
    capture: SiteLike | Iterable[SiteLike] = (),
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool = False,
) -> Generation:
    """Return what the model writes under a plan of interventions, with activations of every token it read.

    A step of the plan holds at all tokens, of the prompt and generated, unless its positions say otherwise:
    ``"prompt"``, ``"generated"`` (each generated token as it is read back), or positions inside the prompt. Values
    that differ by position fit only steps with positions inside the prompt; so do patches.

    Args:
        model: An attached Hugging Face language model.
        inputs: Text, texts, token ids or an encoding; with ``chat`` a message or a list of messages.
        max_new_tokens: Most tokens to write for each example.
        plan: Interventions.
        capture: Sites to read (not inside attention: their key axis grows).
        do_sample: Sample instead of taking the most likely token.
        temperature: Of sampling.
        top_k: Of sampling.
        top_p: Of sampling.
        seed: Of sampling; the global random state stays as it was.
        chat: Whether to put the inputs into the tokenizer's chat template.

    Raises:
        ArgumentError: If the model cannot generate, or an option is out of range.
        SiteUnavailableError: If a site lies inside attention.
        InterventionNotAppliedError: If a step never ran.
    """
    if not callable(getattr(model.module, "generate", None)):
        raise ArgumentError(f"generate on {type(model.module).__name__}", "a Hugging Face model with generate()")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens={max_new_tokens}", "a whole number, at least 1")
    _check_sampling(do_sample, temperature, top_k, top_p)
    guards.refuse_compiled(model.module)
    guards.refuse_training(model.module)
    if chat:
        from interp.hooks.text import chat_ids

        inputs = [chat_ids(model, inputs)]
    batch = model.batch(inputs, padding_side="left")
    phases = _Phases(model, batch, plan, capture)
    options = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    with phases, torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = model.module.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),  # type: ignore[union-attr]
            max_new_tokens=max_new_tokens,
            pad_token_id=_pad_token(model),
            return_dict_in_generate=False,
            num_beams=1,
            num_return_sequences=1,
            **options,
        )
    return _result(model, batch, output, phases)


def _check_sampling(do_sample: bool, temperature: float | None, top_k: int | None, top_p: float | None) -> None:
    legal = {
        "temperature": (temperature, "above 0", lambda v: v > 0),
        "top_k": (top_k, "at least 1", lambda v: v >= 1),
        "top_p": (top_p, "above 0, at most 1", lambda v: 0 < v <= 1),
    }
    for name, (value, needed, holds) in legal.items():
        if value is not None and not holds(value):
            raise ArgumentError(f"{name}={value}", needed)
        if value is not None and not do_sample:
            raise ArgumentError(f"{name}={value} without do_sample=True", "do_sample=True, or no option of sampling")


class _Phases(ExitStack):
    """One session for the pass over the prompt, one for each generated token's; a hook on the root switches."""

    def __init__(self, model: "Model", batch: Batch, plan: PlanLike, capture):
        super().__init__()
        self.model, self.step = model, -1
        self.pieces: dict[str, list[Tensor]] = {}
        wanted = [capture] if isinstance(capture, (str, Site)) else list(capture)
        reads = [Read(site, binding) for site, binding in model.resolve(wanted)] if wanted else []
        plan = [plan] if isinstance(plan, Intervention) else list(plan)
        for step in plan:
            if not isinstance(step, Intervention):
                raise InterventionError(f"a plan step of type {type(step).__name__}", "an Intervention")
        first = resolve_plan(model, batch, [s for p in plan if (s := _in_prompt(p)) is not None])
        later = resolve_plan(model, batch, [s for p in plan if (s := _in_generated(p)) is not None])
        for one in (*reads, *first, *later):
            last_only = one.binding.address in _LAST_ONLY and (isinstance(one, Read) or one.where is not None)
            if one.binding.where in ATTENTION_TAPS or last_only or one.site.positions is not None:
                raise SiteUnavailableError(
                    f"{one.site} while generating",
                    "a site outside attention and in front of the unembedding, at all positions",
                    "capture the finished text",
                )
        keep = lambda site, value: self.pieces.setdefault(str(site), []).append(value)
        self.sessions = [
            Session(model.module, reads, edits, on_read=keep, size=batch.size, extent=batch.extent)
            for edits in (first, later)
        ]

    def __enter__(self):
        super().__enter__()
        try:
            self.callback(self.model.module.register_forward_pre_hook(self._advance).remove)
            for session in self.sessions:
                session.active = False
                self.callback(session._stack.close)
                session._install()
        except BaseException:
            self.close()
            raise
        return self

    def _advance(self, module, args) -> None:
        if any(session.paused for session in self.sessions):
            return  # A step of the plan runs the model itself.
        self.step += 1
        self.sessions[0].active, self.sessions[1].active = self.step == 0, self.step > 0

    def check(self) -> None:
        """Raise if an edit of a phase that took place never ran."""
        for session in self.sessions[: 1 + (self.step > 0)]:
            missed = [str(e.site) for i, e in enumerate(session.edits) if i not in session.applied]
            if missed:
                raise InterventionNotAppliedError(f"nothing was changed at {', '.join(missed)}", "sites that run")


def _in_prompt(step: Intervention) -> Intervention | None:
    if step.positions == "generated":
        return None
    return replace(step, positions=None) if step.positions == "prompt" else step


def _in_generated(step: Intervention) -> Intervention | None:
    if step.at is not None and step.at != "generated":
        return None
    if isinstance(step, Mean) and step.over is None:
        raise InterventionError("a Mean of the run's own batch while generating", "over=inputs, or positions='prompt'")
    if isinstance(step, Patch):
        if step.at == "generated":
            raise InterventionError("a Patch at generated tokens", "Set or Add with a value, or a Patch in the prompt")
        return None
    return replace(step, positions=None)


def _pad_token(model: "Model") -> int:
    pad = getattr(model.tokenizer, "pad_token_id", None)
    return 0 if pad is None else int(pad)


def _stop_tokens(model: "Model") -> set[int]:
    stop = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    return set() if stop is None else set(stop) if isinstance(stop, (list, tuple)) else {int(stop)}


def _result(model: "Model", batch: Batch, output: Tensor, phases: _Phases) -> Generation:
    phases.check()
    assert batch.mask is not None
    start, stop = batch.mask.shape[1], _stop_tokens(model)
    written = output[:, start:]
    ended = torch.zeros_like(written, dtype=torch.bool)
    for token in stop:
        ended |= written == token
    alive = (ended.int().cumsum(1) - ended.int()) == 0
    mask = torch.cat([batch.mask, alive], 1)
    new = torch.cat([torch.zeros_like(batch.mask), alive], 1)
    decode = model.tokenizer.decode if model.tokenizer is not None else lambda ids, **_: ""
    texts = [decode(row[keep], skip_special_tokens=True) for row, keep in zip(written, alive, strict=True)]
    activations = {site: torch.cat(pieces, 1) for site, pieces in phases.pieces.items()}
    read = output.shape[1] - 1
    positions = torch.where(mask, mask.long().cumsum(1) - 1, -1)[:, :read]
    return Generation(texts, output, mask, new, activations, positions)
