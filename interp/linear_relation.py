"""LinearRelation: from a subject in the middle of a network to its object at the end, as one affine map.

Source: Hernandez et al., "Linearity of Relation Decoding in Transformer Language Models", ICLR 2024.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks import guards
from interp.hooks.errors import ArgumentError, PositionError, SiteUnavailableError, TokenError
from interp.hooks.inputs import Batch
from interp.hooks.interventions import Set
from interp.hooks.model import Model
from interp.hooks.site import Site
from interp.hooks.table import Rows
from interp.jacobians.chain import Step, find_steps
from interp.jacobians.checks import FallbackWarning, tolerance
from interp.jacobians.graph import Recording
from interp.jacobians.jacobian import jacobian
from interp.jacobians.places import End, find_ends
from interp.jacobians.stream_sweep import StreamSweep
from interp.lens.fit import NO_CLOSED_FORM
from interp.lens.logit_lens import read_logits

Pair = tuple[str, str]


@dataclass(frozen=True)
class RelationScore(Rows):
    """How well a linear relation does on pairs.

    Attributes:
        rows: One for each pair: subject, object, what model and relation say, whether they agree, and with an inverse
            to which object the subject was edited, and what the model then says.
        faithfulness: Share of pairs on which the relation's first token is the model's.
        accuracy: Share on which it is the object's.
        model_accuracy: Share on which the model's own is the object's.
        causality: Share of edits after which the model says the other object; None without.
        rank: Of the inverse.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    faithfulness: float
    accuracy: float
    model_accuracy: float
    causality: float | None = None
    rank: int | None = None

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each pair."""
        return self.rows


@dataclass(frozen=True, eq=False)
class LinearRelation:
    """R(s) = β W s + b: a subject's last token at one block's output to the last stream behind the prompt.

    W is the mean over examples of the Jacobian d o / d s, b that of o - W s; β > 1 makes up for a W that is too small.

    Attributes:
        weight: W [d_model, d_model], output index first.
        bias: b [d_model].
        layer: The block whose output s is.
        template: Prompt with ``{}`` for the subject.
        examples: Pairs (subject, object) that it was fitted on; they stand in front of every prompt where few_shot.
        few_shot: Whether the other examples stand in front of the prompt.
        beta: β.
    """

    weight: Float[Tensor, "d_model d_model"] = field(repr=False)
    bias: Float[Tensor, "d_model"] = field(repr=False)
    layer: int
    template: str
    examples: Sequence[Sequence[str]] = field(repr=False)
    few_shot: bool = True
    beta: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "examples", [(s, o) for s, o in self.examples])

    @classmethod
    @torch.no_grad()
    def fit(
        cls, model: Model, template: str, examples: Sequence[Pair], layer: int, *, few_shot: bool = True,
        beta: float = 1.0,
    ) -> "LinearRelation":  # fmt: skip
        """Return the relation from a few examples, each seen behind the others.

        Args:
            model: A decoder.
            template: Prompt with ``{}`` for the subject, as ``"The capital of {} is"``; the object follows a space.
            examples: Pairs (subject, object).
            layer: Block whose output is read at the subject's last token.
            few_shot: Whether each prompt begins with the other examples, one on a line.
            beta: Factor β of W.

        Raises:
            ArgumentError: If the template has no ``{}``, there are no examples or equal ones, or a number is out of
                range.
            PositionError: If a subject's last token cannot be told from what follows it.
            SiteUnavailableError: If the model has no residual stream that branches add to.

        Example:
            >>> import interp
            >>> model = interp.load("smollm2-135m")
            >>> pairs = [("France", "Paris"), ("Japan", "Tokyo")]
            >>> capital = interp.LinearRelation.fit(model, "The capital of {} is", pairs, layer=26)
            >>> capital
            LinearRelation(layer=26, template='The capital of {} is', few_shot=True, beta=1.0)
            >>> capital.evaluate(model, [("Italy", "Rome"), ("Egypt", "Cairo")]).model_accuracy
            1.0
        """
        pairs = _check(model, template, examples, layer, beta)
        total, offset = None, None
        for index, (subject, _) in enumerate(pairs):
            shown = [p for i, p in enumerate(pairs) if i != index] if few_shot else []
            seen = _look(model, layer, *_prompt(model, template, shown, subject))
            matrix = _matrix(model, seen, layer)
            rest = seen.object.double() - matrix @ seen.subject.double()
            total = matrix if total is None else total + matrix
            offset = rest if offset is None else offset + rest
        assert total is not None
        assert offset is not None
        n = len(pairs)
        return cls((total / n).float(), (offset / n).float(), layer, template, pairs, few_shot, float(beta))

    def __call__(self, subject: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        """β W s + b."""
        return self.beta * (subject.to(self.weight) @ self.weight.T) + self.bias

    def with_beta(self, beta: float) -> "LinearRelation":
        """Return the relation with another β.

        Raises:
            ArgumentError: If it is not positive.
        """
        if not beta > 0:
            raise ArgumentError(f"beta={beta!r}", "a positive number")
        return replace(self, beta=float(beta))

    def inverse(self, rank: int) -> Float[Tensor, "d_model d_model"]:
        """The pseudo-inverse of W by its largest singular values, V S⁻¹ Uᵀ: small ones would blow errors up.

        Raises:
            ArgumentError: If the rank is out of range, or W has a smaller one.
        """
        d = len(self.weight)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= d:
            raise ArgumentError(f"rank={rank!r}", f"a whole number in 1..{d}")
        u, s, vh = torch.linalg.svd(self.weight.double())
        if float(s[rank - 1]) <= 1e-12 * float(s[0]):
            raise ArgumentError(f"rank={rank}", f"at most W's own, {int((s > 1e-12 * s[0]).sum())}")
        return ((vh[:rank].T / s[:rank]) @ u[:, :rank].T).float()

    @torch.no_grad()
    def evaluate(self, model: Model, pairs: Sequence[Pair], rank: int | None = None) -> RelationScore:
        """Return faithfulness, and with ``rank`` causality, on pairs that it was not fitted on.

        Causality: the subject's state becomes s + W†(o' - o), with o and o' the last streams behind this subject and
        the next one whose object is another; does the model then say the other object?

        Raises:
            ArgumentError: If there are no pairs, one was fitted on, or all objects are the same where rank is given.
            TokenError: If an object is empty.
        """
        pairs = _pairs(pairs)
        if shared := [s for s, _ in pairs if s in {s for s, _ in self.examples}]:
            raise ArgumentError(f"the subject {shared[0]!r}, which it was fitted on", "pairs that are new to it")
        shown = _pairs(self.examples) if self.few_shot else []
        seen = [_look(model, self.layer, *_prompt(model, self.template, shown, s)) for s, _ in pairs]
        firsts = [_first_token(model, o) for _, o in pairs]
        said = [int(read_logits(model, look.object[None])[0].argmax()) for look in seen]
        linear = [int(read_logits(model, self(look.subject)[None])[0].argmax()) for look in seen]
        rows: list[dict[str, Any]] = [
            {
                "subject": s, "object": o, "model": _text(model, a), "relation": _text(model, b), "agree": a == b,
                "right": b == first,
            }
            for (s, o), a, b, first in zip(pairs, said, linear, firsts, strict=True)
        ]  # fmt: skip
        share = lambda flags: sum(flags) / len(pairs)
        causality = None if rank is None else self._edits(model, pairs, seen, firsts, self.inverse(rank), rows)
        return RelationScore(
            rows, share(a == b for a, b in zip(said, linear, strict=True)), share(r["right"] for r in rows),
            share(a == b for a, b in zip(said, firsts, strict=True)), causality, rank,
        )  # fmt: skip

    def _edits(
        self, model: Model, pairs: list[Pair], seen: list["_Look"], firsts: list[int], inverse: Tensor, rows: list[dict]
    ) -> float:
        hits = 0
        for i, look in enumerate(seen):
            others = [j for j in (*range(i + 1, len(seen)), *range(i)) if firsts[j] != firsts[i]]
            if not others:
                raise ArgumentError("pairs of one object", "different objects, so that one can become another")
            moved = look.subject + inverse @ (seen[others[0]].object - look.object)
            site = f"blocks.{self.layer}.hook_resid_post@{look.position}"
            logits = model.run(look.batch, plan=[Set(Site.parse(site), moved.to(model.dtype))])
            token = int(logits[0, -1].argmax())
            hits += token == firsts[others[0]]
            rows[i] |= {"edited to": pairs[others[0]][1], "then": _text(model, token)}
        return hits / len(seen)


@dataclass(frozen=True)
class _Look:
    """A prompt with the subject's state and the last stream's."""

    batch: Batch
    position: int
    subject: Tensor
    object: Tensor


def _check(model: Model, template: str, examples: Sequence[Pair], layer: int, beta: float) -> list[Pair]:
    if model.layout is None or model.layout.post_ln or model.layout.modality != "tokens":
        raise SiteUnavailableError(
            f"a linear relation in {type(model.module).__name__} ({model.family})", "a decoder with a residual stream"
        )
    guards.refuse_inference_mode()
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ArgumentError(f"template={template!r}", "a prompt with one {} for the subject")
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < model.n_layers - 1:
        raise ArgumentError(f"layer={layer!r}", f"a block in 0..{model.n_layers - 2}")
    if not beta > 0:
        raise ArgumentError(f"beta={beta!r}", "a positive number")
    return _pairs(examples)


def _pairs(pairs: Sequence[Sequence[str]]) -> list[Pair]:
    found = [(p[0], p[1]) for p in pairs if len(p) == 2 and all(isinstance(part, str) and part for part in p)]
    if not found or len(found) < len(pairs):
        raise ArgumentError(f"pairs {list(pairs)!r:.60}", "at least one pair (subject, object) of texts, none empty")
    if len({s for s, _ in found}) < len(found):
        raise ArgumentError("a subject that occurs twice", "each subject once")
    return found


def _prompt(model: Model, template: str, shown: list[Pair], subject: str) -> tuple[Batch, int]:
    """The prompt and the position of the subject's last token."""
    lines = "".join(f"{template.format(s)} {o}\n" for s, o in shown)
    begin = len(lines) + template.index("{}")
    batch = model.batch(lines + template.format(subject))
    if batch.spans is None:
        raise PositionError(f"the subject {subject!r}", "a model with a fast tokenizer, which tells where tokens are")
    end = begin + len(subject)
    inside = [i for i, (a, b) in enumerate(batch.spans[0]) if a < end and b > begin]
    if not inside or batch.spans[0][inside[-1]][1] > end:
        raise PositionError(
            f"the subject {subject!r}, whose last token goes beyond it", "a template in which a token ends with it"
        )
    return batch, inside[-1]


def _look(model: Model, layer: int, batch: Batch, position: int) -> _Look:
    names = f"blocks.{layer}.hook_resid_post", f"blocks.{model.n_layers - 1}.hook_resid_post"
    acts = model.capture(batch, list(names))
    return _Look(batch, position, acts[names[0]][0, position].float(), acts[names[1]][0, -1].float())


def _matrix(model: Model, look: _Look, layer: int) -> Float[Tensor, "d d"]:
    """d o / d s: by one sweep from the last position back, or as `jacobian` does it where a block is unknown."""
    names = f"blocks.{layer}.hook_resid_post", f"blocks.{model.n_layers - 1}.hook_resid_post"
    source, target, _, _ = find_ends(model, *names)
    steps = find_steps(model, source, target)
    span = slice(look.position, look.batch.lengths[0])
    d = len(look.subject)
    made = None if steps is None else _swept(model, look, steps, span, d)
    if made is not None and not (error := _gap(model, look, made, source, target)) <= tolerance(model):
        warnings.warn(f"a closed form off by {error:.1e} from autograd, which is used", FallbackWarning, stacklevel=4)
        made = None
    if made is None:
        ends = (look.position, span.stop - 1)
        made = jacobian(model, look.batch, *names, positions=ends, method="autograd").dense()[0]  # type: ignore
    return made.double().cpu()


def _swept(model: Model, look: _Look, steps: list[Step], span: slice, d: int) -> Tensor | None:
    """The matrix in closed form, or None where a block has none."""
    try:
        sweep = StreamSweep(model, look.batch, steps, span)
        seeds = torch.zeros(span.stop - span.start, d, d, dtype=sweep.dtype, device=model.device)
        seeds[-1] = torch.eye(d, dtype=sweep.dtype)
        *_, (_, state) = sweep.run(seeds)
    except NO_CLOSED_FORM:
        return None
    return state[0]


def _gap(model: Model, look: _Look, made: Tensor, source: End, target: End) -> float:
    """Relative difference of one random covector's pull from autograd's."""
    recording = Recording(model, look.batch, [source], target)
    w = torch.randn(len(made), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seeds = torch.zeros_like(recording.output)[None]
    seeds[0, 0, -1] = w.to(seeds)
    wanted = recording.pull(seeds)[0][0, 0, look.position].double().cpu()
    return float((w @ made.double().cpu() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _first_token(model: Model, text: str) -> int:
    found = model.tokenizer.encode(f" {text}", add_special_tokens=False)
    if not found:
        raise TokenError(f"the object {text!r}", "a text of at least one token")
    return found[0]


def _text(model: Model, token: int) -> str:
    return model.tokenizer.decode([token])
