"""Rules of products: which of two live factors is held, and with what share."""

from typing import Any

import torch
from torch import Tensor

from interp.hooks import calls
from interp.hooks.basic_rules import bound, held, tangent, with_held
from interp.hooks.errors import BilinearOpError, UnsupportedOpError
from interp.hooks.tape import ACTIVATED, BASE, DIVISOR, PATTERN, PENDING, RANK, Call, Tags, Tape
from interp.hooks.unit_rules import power

ATTENTION_MODES = ("tangent", "frozen", "split")


def contraction(tape: Tape, call: Call) -> Any:
    """A layer or a matrix product: linear with one live factor; of two, differentiated or held with the pattern."""
    factors = [t for t in calls.tensors(call.args[1:], call.kwargs) if calls.is_live(t)]
    if call.name not in _ADDING or not calls.is_live(call.args[0]):
        factors = call.live
    if len(factors) > 1:
        return _attention_product(tape, call, factors)
    if call.name in calls.WEIGHTED and tape.choices.mode(call, ("constant",), "live") == "constant":
        return held(tape, call)
    return Tags.put(_without_bias(call) if tape.homogeneous else call.run(), {})


# Calls whose first argument is added to the product of the others.
_ADDING = frozenset("addmm baddbmm addbmm addmv addr".split())


def _without_bias(call: Call) -> Any:
    """A layer or product with one live factor, without the constant that it adds."""
    args: tuple[Any, ...] = call.args
    kwargs = call.kwargs
    slot = 3 if call.name == "bilinear" else 2
    if call.name in ("linear", "bilinear") or call.name.startswith("conv"):
        args = (*args[:slot], None, *args[slot + 1 :]) if len(args) > slot else args
        kwargs = {k: v for k, v in kwargs.items() if k != "bias"}
    if call.name in _ADDING:
        first, *rest = args
        if not calls.is_live(first):
            args = (torch.zeros_like(first), *rest)
        elif len(call.live) == 1:
            return calls.without_constants(call.func, args, kwargs)
    return call.func(*args, **kwargs)


def _attention_product(tape: Tape, call: Call, factors: list[Tensor]) -> Any:
    """Two live matrices: scores (differentiated, or left to the softmax that holds them) or pattern times values."""
    mode = tape.choices.mode(call.also("softmax"), ATTENTION_MODES, tape.linearization.attention)
    marks = [Tags.of([t]) for t in factors]
    patterns = [i for i, t in enumerate(marks) if PATTERN in t]
    if mode == "split" and len(patterns) == 1 and len(factors) == 2:
        references = tape.decide(call, "split", lambda: [t.detach().clone() for t in factors])
        return Tags.put(sum(0.5 * with_held(call, t, z).run() for t, z in zip(factors, references, strict=True)), {})
    if mode != "frozen":
        return tangent(tape, call)
    written = [i for i, t in enumerate(marks) if PENDING in t and ACTIVATED in t]
    if len(written) == 1 and sum(PENDING in t for t in marks) == 1 and len(factors) == 2:
        pattern = factors[written[0]]
        call.held = [pattern]
        fixed = tape.decide(call, "frozen", lambda: pattern.detach().clone())
        return Tags.put(with_held(call, pattern, fixed).run(), {})
    return Tags.put(call.run(), {PENDING: str(call)})


def softmax(tape: Tape, call: Call) -> Any:
    """An attention pattern or a routing weight: held, or differentiated (and marked, where a product splits it)."""
    mode = tape.choices.mode(call, ATTENTION_MODES, tape.linearization.attention)
    if mode == "frozen":
        return held(tape, call)
    marks = {ACTIVATED: str(call), RANK: "2"} | ({PATTERN: str(call)} if mode == "split" else {})
    return Tags.put(tangent(tape, call), marks)


def log_softmax(tape: Tape, call: Call) -> Any:
    """v - logsumexp z, the logsumexp held; or differentiated."""
    if tape.choices.mode(call, ("tangent", "frozen"), tape.linearization.attention) == "tangent":
        return tangent(tape, call)
    v = call.live[0]
    shift = tape.decide(call, "frozen", lambda: (v - call.run()).detach())
    out = v.to(shift.dtype)
    return Tags.put(out.clone() if tape.homogeneous else out - shift, {})


def logsumexp(tape: Tape, call: Call) -> Any:
    """A log-partition: held, or differentiated."""
    mode = tape.choices.mode(call, ("tangent", "frozen"), tape.linearization.attention)
    return tangent(tape, call) if mode == "tangent" else held(tape, call)


def grid_sample(tape: Tape, call: Call) -> Any:
    """Sampling is linear in the image; a grid that depends on the input is held: torch has no forward derivative."""
    given = bound(call, ("input", "grid"), {})
    if not calls.is_live(given["grid"]):
        return Tags.put(call.run(), {})
    default = "tangent" if tape.linearization.product == "tangent" else "gate"
    if tape.choices.mode(call, ("gate",), default) == "tangent":
        raise UnsupportedOpError(
            f"{call} has a grid that depends on the input, and no forward derivative",
            "a grid that is held",
            "hold it: Linearization(overrides={'grid_sample': 'gate'})",
        )
    if not calls.is_live(given["input"]):
        return held(tape, call)
    call.held = [given["grid"]]
    fixed = tape.decide(call, "gate", lambda: given["grid"].detach().clone())
    fixed = fixed.expand(len(given["input"]), *fixed.shape[1:])
    return Tags.put(with_held(call, given["grid"], fixed).run(), {})


def product(tape: Tape, call: Call) -> Any:
    """a ⊙ b: linear with one live factor; of two, by the product mode (gate, split or tangent)."""
    given = bound(call, ("input", "other"), {})
    a, b = given["input"], given["other"]
    if len(call.live) < 2:
        return Tags.put(call.run(), Tags.moved(call.live) | _base(a, b))
    if a is b or Tags.of([a]).get(BASE, "") == Tags.of([b]).get(BASE):
        return power(tape, call)
    tags = [Tags.of([a]), Tags.of([b])]
    mode = tape.choices.mode(call, ("tangent", "gate", "split"), tape.linearization.product)
    if mode == "tangent" or DIVISOR in tags[0] or DIVISOR in tags[1]:
        return tangent(tape, call)
    gate = _gate_of(tags)
    if mode.startswith("split") and PENDING not in tags[0] and PENDING not in tags[1]:
        return _split(tape, call, (a, b), gate, mode)
    if gate is None and not any(PENDING in t or ACTIVATED in t for t in tags):
        raise BilinearOpError(
            f"{call} multiplies two live values, neither an activation's output",
            "a product with one gate",
            "choose product='split' or 'tangent', or hold a factor: overrides={'path of its layer': 'constant'}",
        )
    if gate is None:
        return Tags.put(call.run(), tags[0] | tags[1] | {PENDING: str(call)})
    call.held = [(a, b)[gate]]
    fixed = tape.decide(call, "gate", lambda: call.held[0].detach().clone())
    return Tags.put(call.write(fixed * b if gate == 0 else a * fixed), {})


def _base(a: Any, b: Any) -> dict[str, str]:
    """The mark of a number times a live value, with which the value and its other multiples are marked too."""
    live, number = (a, b) if calls.is_live(a) else (b, a)
    if isinstance(number, Tensor) and number.numel() != 1:
        return {}
    marks = Tags.of([live])
    mark = {BASE: marks.get(BASE, str(id(live)))}
    Tags.put(live, marks | mark)
    return mark


def _gate_of(tags: list[dict[str, str]]) -> int | None:
    """Index of the factor to hold: what is not affine yet, else the activation's output, else the truer gate of two."""
    for key in (PENDING, ACTIVATED):
        marked = [key in t for t in tags]
        if marked[0] != marked[1]:
            return marked.index(True)
    ranks = [t.get(RANK, "0") for t in tags]
    if PENDING in tags[0] or ACTIVATED not in tags[0] or ranks[0] == ranks[1]:
        return None
    return ranks.index(max(ranks))


def _split(tape: Tape, call: Call, factors: tuple[Tensor, Tensor], gate: int | None, mode: str) -> Tensor:
    """w · (gate held) + (1 - w) · (the other held); the first factor counts as the gate where neither is one."""
    weight = float(mode.partition(":")[2] or 0.5)
    gates, others = (factors[1], factors[0]) if gate == 1 else factors
    fixed_gate, fixed_other = tape.decide(call, mode, lambda: (gates.detach().clone(), others.detach().clone()))
    return Tags.put(call.write(weight * (fixed_gate * others) + (1 - weight) * (gates * fixed_other)), {})
