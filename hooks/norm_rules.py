"""Rules of normalisations: the divisor is held at its value (the mean too, if asked for), or differentiated."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interp.hooks import calls
from interp.hooks.basic_rules import affine, bound, held, linear, tangent
from interp.hooks.errors import TrainModeError, UnsupportedOpError
from interp.hooks.tape import DIVISOR, MEAN, SOURCE, Call, Tags, Tape

NORM_MODES = ("tangent", "frozen", "frozen_stats")


def norm_mode(tape: Tape, call: Call, by_name: tuple[str, ...] = ()) -> str:
    """Mode of a norm, a divisor or a quotient."""
    return tape.choices.mode(call, NORM_MODES, tape.linearization.norm, by_name)


def layer_norm(tape: Tape, call: Call) -> Any:
    """LayerNorm as one call: γ (v - mean v)/σ + β with σ held."""
    mode = norm_mode(tape, call)
    if mode == "tangent":
        return tangent(tape, call)
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = bound(call, names, {"weight": None, "bias": None, "eps": 1e-5})
    v, dims = given["input"], tuple(range(-len(given["normalized_shape"]), 0))
    return affine(tape, _standardised(tape, call, mode, v, dims, given["eps"]), given["weight"], given["bias"])


def _standardised(tape: Tape, call: Call, mode: str, v: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(v - mean v)/σ with σ held; under ``frozen_stats`` the mean too."""
    v = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
    mean = lambda: v.detach().mean(dims, keepdim=True)
    sigma = lambda: ((v.detach() - mean()).pow(2).mean(dims, keepdim=True) + eps).sqrt()
    if mode == "frozen":
        scale = tape.decide(call, mode, sigma)
        out = (v - v.mean(dims, keepdim=True)) / scale
    else:
        centre, scale = tape.decide(call, mode, lambda: (mean(), sigma()))
        out = (v if tape.homogeneous else v - centre) / scale
    return out.to(call.live[0].dtype)


def rms_norm(tape: Tape, call: Call) -> Any:
    """RMSNorm as one call: γ v/rms with rms held."""
    mode = norm_mode(tape, call)
    if mode == "tangent":
        return tangent(tape, call)
    given = bound(call, ("input", "normalized_shape", "weight", "eps"), {"weight": None, "eps": None})
    v, dims = given["input"], tuple(range(-len(given["normalized_shape"]), 0))
    eps = torch.finfo(v.dtype).eps if given["eps"] is None else given["eps"]
    wide = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
    scale = tape.decide(call, mode, lambda: (wide.detach().pow(2).mean(dims, keepdim=True) + eps).sqrt())
    return affine(tape, (wide / scale).to(v.dtype), given["weight"], None)


def group_norm(tape: Tape, call: Call) -> Any:
    """GroupNorm as one call: per group γ (v - mean v)/σ + β with σ held."""
    mode = norm_mode(tape, call)
    if mode == "tangent":
        return tangent(tape, call)
    names = ("input", "num_groups", "weight", "bias", "eps")
    given = bound(call, names, {"weight": None, "bias": None, "eps": 1e-5})
    v = given["input"]
    groups = v.reshape(v.shape[0], given["num_groups"], -1)
    out = _standardised(tape, call, mode, groups, (-1,), given["eps"]).reshape(v.shape)
    shape = (1, -1, *[1] * (v.ndim - 2))
    gain, bias = (None if t is None else t.reshape(shape) for t in (given["weight"], given["bias"]))
    return affine(tape, out, gain, bias)


def instance_norm(tape: Tape, call: Call) -> Any:
    """InstanceNorm: an affine constant with running statistics, else GroupNorm with a group for each channel."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    given = bound(call, names, {"running_mean": None, "running_var": None, "weight": None, "bias": None, "eps": 1e-5})
    if not given.get("use_input_stats", True) and given["running_mean"] is not None:
        args = (*(given[n] for n in names[:5]), False, 0.1, given["eps"])
        return batch_norm(tape, call.instead(F.batch_norm, *args))
    args = (given["input"], given["input"].shape[1], given["weight"], given["bias"], given["eps"])
    return group_norm(tape, call.instead(F.group_norm, *args))


def batch_norm(tape: Tape, call: Call) -> Any:
    """An affine constant with running statistics; batch statistics are refused, or held as the reference's own."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    defaults = {"training": False, "running_mean": None, "weight": None, "bias": None, "eps": 1e-5}
    given = bound(call, names, defaults)
    v, batch = given["input"], given["training"] or given["running_mean"] is None
    if batch and tape.choices.mode(call, ("batch_stats",), "refuse") == "refuse":
        raise TrainModeError(
            f"{call} uses batch statistics",
            "running statistics",
            "call model.eval(), or hold those of the reference: Linearization(overrides={'batch_norm': 'batch_stats'})",
        )
    if not batch and not tape.homogeneous:
        return linear(tape, call)
    centre: Any
    var: Any
    if batch:
        dims = tuple(d for d in range(v.ndim) if d != 1)
        centre, var = tape.decide(call, "batch_stats", lambda: _moments(v.detach(), dims))
    else:
        centre, var = given["running_mean"], given["running_var"]
    scale = torch.rsqrt(var + given["eps"])
    gain = scale if given["weight"] is None else scale * given["weight"]
    bias = -centre * gain if given["bias"] is None else given["bias"] - centre * gain
    shape = (1, -1, *[1] * (v.ndim - 2))
    return Tags.put(affine(tape, v, gain.reshape(shape), bias.reshape(shape)), {})


def _moments(v: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return v.mean(dims), v.var(dims, unbiased=False)


def divisor(tape: Tape, call: Call) -> Any:
    """A norm's divisor: held, or differentiated."""
    if norm_mode(tape, call) == "tangent":
        return Tags.put(tangent(tape, call), {DIVISOR: str(call)})
    return held(tape, call)


def quotient(tape: Tape, call: Call) -> Any:
    """a / b: linear in a; a live divisor is held, or differentiated where norms are."""
    given = bound(call, ("input", "other"), {})
    top, bottom = given["input"], given["other"]
    if call.name.startswith("r"):
        top, bottom = bottom, top
    if call.kwargs.get("rounding_mode") is not None:
        raise UnsupportedOpError(f"{call} rounds", "a smooth quotient")
    if not calls.is_live(bottom):
        return Tags.put(call.run(), Tags.moved(call.live))
    if norm_mode(tape, call) == "tangent":
        return tangent(tape, call)
    call.held = [bottom]
    fixed = tape.decide(call, "constant", lambda: bottom.detach().clone())
    if not calls.is_live(top):
        call.is_constant = True
    return Tags.put(call.write(top / fixed), Tags.moved(calls.tensors(top)))


def mean(tape: Tape, call: Call) -> Any:
    """A mean, which is linear; what it is the mean of is marked, so that a norm by hand is recognised."""
    source = call.live[0]
    token = str(id(source))
    Tags.put(source, Tags.of([source]) | {SOURCE: token})
    return Tags.put(linear(tape, call), Tags.moved(call.live) | {MEAN: token})


def difference(tape: Tape, call: Call) -> Any:
    """a - b; under ``frozen_stats`` the mean that is subtracted from its own argument is held."""
    given = bound(call, ("input", "other"), {})
    v, other = given["input"], given["other"]
    both = calls.is_live(v) and calls.is_live(other)
    centred = both and Tags.of([other]).get(MEAN, "") == Tags.of([v]).get(SOURCE)
    if not centred or tape.choices.mode(call, ("frozen_stats",), "live") == "live":
        return linear(tape, call)
    call.held = [other]
    fixed = tape.decide(call, "frozen_stats", lambda: other.detach().clone())
    return Tags.put(call.write(v.clone() if tape.homogeneous else v - fixed), Tags.of([v]))
