"""Chains: the part of a transformer between two sites as steps of known branches, and the engine that runs them.

Only the layers between source and target are used, and of a decoder only the positions between them.
"""

import re
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import CompletenessError
from interp.hooks.inputs import Batch
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.jacobians.branches import NORM_PARTS, Branch, GateBranch, NormAt, mlp_sites
from interp.jacobians.engine import Engine
from interp.jacobians.experts import ExpertBranch, experts_of
from interp.jacobians.fused import precision_of, sandwich_of
from interp.jacobians.heads import AttentionBranch, attention_sites, find_turns
from interp.jacobians.kernels.sandwich import sandwich
from interp.jacobians.places import End, Place
from interp.jacobians.unembedding import Unembedding
from interp.propagation.reference import Reference

# Relative error of a composed matrix against its own pull, by precision.
_COMPOSED = {"float32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}
_SITE = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Step:
    """One step of a chain.

    Attributes:
        kinds: ``attention``, ``mlp``, both (a parallel block), ``norm``, or ``unembed``.
        layer: Which block (of ``norm``: -1 is the final one).
        skip: Whether the stream is added to what the branches give.
        before: Whether the branches' norm in front belongs to it.
        behind: Whether their multiplier and post-norm belong to it.
    """

    kinds: tuple[str, ...]
    layer: int = -1
    skip: bool = True
    before: bool = True
    behind: bool = True
    norm: str = ""


def find_steps(model: Model, source: End, target: End) -> list[Step] | None:
    """Return the steps from source to target, or None where they are not all of a known kind."""
    layout = model.layout
    if layout is None or layout.modality not in ("tokens", "encoder"):
        return None
    if source.site.head is not None or target.site.head is not None:
        return None
    start, stop = _entry(model, source.site.address), _exit(model, target.site.address)
    if start is None or stop is None:
        return None
    point, first = start
    end, last = stop
    if first and last and first[0].layer == last[0].layer and last[0].kinds[0] in first[0].kinds and len(last) == 1:
        return [replace(last[0], before=False)]
    if point > end:
        return None
    return [*first, *_stream(model, point, end), *last]


def _stream(model: Model, start: int, stop: int) -> list[Step]:
    """Steps between two points of the stream: 2l in front of block l, 2l + 1 in the middle of it."""
    assert model.layout is not None
    if model.layout.parallel:
        return [Step(("attention", "mlp"), i) for i in range(start // 2, stop // 2)]
    behind = model.layout.post_ln
    steps = []
    for i in range(start, stop):
        steps.append(Step(("mlp" if i % 2 else "attention",), i // 2, before=not behind))
        if behind:
            steps.append(Step(("norm",), i // 2, skip=False, norm=f"blocks.{i // 2}.ln{1 + i % 2}"))
    return steps


_POINTS = {"hook_resid_pre": 0, "hook_resid_mid": 1, "hook_resid_post": 2}
# Where the stream itself is normalised, what a norm gives is the stream.
_POST_LN = _POINTS | {"ln1.hook_out": 1, "ln2.hook_out": 2}


def _points(model: Model) -> dict[str, int]:
    return _POST_LN if model.layout is not None and model.layout.post_ln else _POINTS


def _entry(model: Model, address: str) -> tuple[int, list[Step]] | None:
    """The point of the stream that a source is, or the step that begins behind a norm and the point after it."""
    layout = model.layout
    assert layout is not None
    if address == "hook_embed":
        return None if layout.embed_norm else (0, [])
    match = _SITE.fullmatch(address)
    if match is None:
        return None
    layer, part = int(match[1]), match[2]
    if part in _points(model):
        return 2 * layer + _points(model)[part], []
    shared = layout.parallel and layout.ln2 is None
    if part == "ln1.hook_out":
        kinds = ("attention", "mlp") if shared else ("attention",)
        return 2 * layer + (2 if layout.parallel else 1), [Step(kinds, layer, skip=False, before=False)]
    if part == "ln2.hook_out" and not shared:
        return 2 * layer + 2, [Step(("mlp",), layer, skip=False, before=False)]
    return None


def _exit(model: Model, address: str) -> tuple[int, list[Step]] | None:
    """The point of the stream that a target is or comes from, and the steps behind it."""
    layout = model.layout
    assert layout is not None
    final = [Step(("norm",), norm="ln_final", skip=False)]
    if address == "ln_final.hook_out":
        return 2 * model.n_layers, final
    if address in ("unembed.hook_out", "logits") and layout.final_norm:
        return 2 * model.n_layers, [*final, Step(("unembed",), norm=address, skip=False)]
    match = _SITE.fullmatch(address)
    if match is None:
        return None
    layer, part = int(match[1]), match[2]
    if part in _points(model):
        return 2 * layer + _points(model)[part], []
    middle, before = 2 * layer + (0 if layout.parallel else 1), not layout.post_ln
    branches = {
        "hook_attn_out": (2 * layer, Step(("attention",), layer, skip=False, before=before)),
        "attn.hook_out": (2 * layer, Step(("attention",), layer, skip=False, before=before, behind=False)),
        "hook_mlp_out": (middle, Step(("mlp",), layer, skip=False, before=before)),
        "mlp.hook_out": (middle, Step(("mlp",), layer, skip=False, before=before, behind=False)),
        "ln1.hook_out": (2 * layer, Step(("norm",), layer, skip=False, norm=f"blocks.{layer}.ln1")),
        "ln2.hook_out": (middle, Step(("norm",), layer, skip=False, norm=f"blocks.{layer}.ln2")),
    }
    if part not in branches:
        return None
    point, step = branches[part]
    return point, [step]


def is_local(steps: list[Step]) -> bool:
    """Whether no step moves anything between positions."""
    return not any("attention" in step.kinds for step in steps)


class ChainEngine(Engine):
    """Jacobians of one example through known branches, without autograd.

    Args:
        model: A decoder or encoder of tokens.
        batch: One example, without padding.
        steps: From source to target.
        places: What will be asked for: the example is cut behind the last target.
        held: What is held.
        chunk: How many tangents run at once.
        dtype: Of weights and sums; by default float32, or float64 for float64 models.

    Raises:
        SiteUnavailableError: If a branch has no closed form.
    """

    def __init__(
        self, model: Model, batch: Batch, steps: list[Step], places: list[Place], held: Linearization,
        chunk: int, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.steps, self.chunk, self.held = steps, chunk, held
        self.ref = ref = Reference(model, batch, only=_sites(model, steps), post_ln=True)
        ref.weights.dtype = dtype or ref.weights.dtype
        self.local = is_local(steps)
        self.sees_all = model.layout is not None and model.layout.modality == "encoder" and not self.local
        layers = [s.layer for s in steps if "attention" in s.kinds] if held.attention == "tangent" else []
        start = min(min(p.sources or (0,)) for p in places)
        stop = 1 + max(max(p.targets or (0,)) for p in places)
        self.span = slice(0, ref.length) if self.sees_all else slice(start, stop)
        turns = find_turns(model, ref, layers, self.span)
        self.stages = [(step, [self._branch(step, kind, turns) for kind in step.kinds]) for step in steps]
        for gate in self.gates[1:]:
            gate.scratch = self.gates[0].scratch
        d = ref.weights.sizes["d_model"]
        out = ref.weights.sizes["vocab"] if steps and steps[-1].kinds == ("unembed",) else d
        self.shapes = ((d,), (out,))
        self.like = torch.empty(0, dtype=ref.weights.dtype, device=model.device)
        self.method, self._seen = "closed forms", False

    def _branch(self, step: Step, kind: str, turns) -> Branch:
        if kind == "mlp" and experts_of(self.ref.model, step.layer) is not None:
            return ExpertBranch(self.ref, step.layer, self.held, step.before, step.behind)
        if kind == "mlp":
            return GateBranch(self.ref, step.layer, self.held, step.before, step.behind)
        if kind == "attention":
            turn = turns.get(step.layer)
            return AttentionBranch(self.ref, step.layer, self.held, turn, step.before, step.behind)
        return NormAt(self.ref, step.norm, self.held) if kind == "norm" else Unembedding(self.ref, step.norm, self.held)

    def push(self, place: Place, v: Tensor) -> Tensor:
        """Through the steps in order."""
        span = self.reach(place)
        x = self._widen(v, place.sources, span)
        for step, branches in self.stages:
            moved = _sum([branch.push(x, span) for branch in branches])
            x = x + moved if step.skip else moved
        return self._narrow(x, place.targets, span)

    def pull(self, place: Place, w: Tensor) -> Tensor:
        """Through the steps in reverse."""
        span = self.reach(place)
        y = self._widen(w, place.targets, span)
        for step, branches in reversed(self.stages):
            moved = _sum([branch.pull(y, span) for branch in branches])
            y = y + moved if step.skip else moved
        return self._narrow(y, place.sources, span)

    def dense(
        self, place: Place, rows: Tensor | None, columns: Tensor | None, out: Tensor | None = None
    ) -> Float[Tensor, "out in"]:
        """The matrix: block by block where one position is asked for and that is cheaper, else pushed or pulled."""
        n_in, n_out = self.count(place, 0, columns), self.count(place, 1, rows)
        if not self.composes(place, min(n_in, n_out)):
            return super().dense(place, rows, columns, out)
        assert place.sources is not None
        made = self._compose(place.sources[0], rows, columns, out)
        if not self._seen:
            self._check_composed(place, made, rows, columns)
        if out is None:
            return made
        return out if made.data_ptr() == out.data_ptr() else out.copy_(made)

    def dense_all(self, places: list[Place], rows: Tensor | None, columns: Tensor | None, out: Tensor) -> None:
        """The matrices of several places: on a GPU one layer's MLP at many tokens at once, else one by one."""
        x = sandwich_of(self, places, rows, columns)
        if x is None:
            super().dense_all(places, rows, columns, out)
            return
        sandwich(x, out, precision_of(self))
        if not self._seen:
            self._check_composed(places[0], out[0], rows, columns)

    def _check_composed(self, place: Place, made: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
        """Compare the first matrix that was put together with one pull."""
        self._seen = True
        generator = torch.Generator().manual_seed(1)
        w = torch.randn(1, len(made), generator=generator, dtype=torch.float64).to(made)
        wanted = self.keep(place, 0, columns, self.pull(place, self.spread(place, 1, rows, w)))
        error = float((w @ made - wanted).norm() / wanted.norm().clamp(min=1e-30))
        limit = _COMPOSED.get(self.precision, _COMPOSED["float32"])
        if not error <= limit:
            raise CompletenessError(
                f"a matrix of {len(self.steps)} blocks that is off by {error:.1e} from its own pull",
                f"a relative difference below {limit:.0e}", "method='autograd' computes it without closed forms",
            )  # fmt: skip

    @property
    def gates(self) -> list[GateBranch]:
        """The MLPs among the branches."""
        return [b for _, branches in self.stages for b in branches if isinstance(b, GateBranch)]

    @property
    def precision(self) -> str:
        """Of sums and products, in a word."""
        return "bf16" if any(gate.bf16 for gate in self.gates) else super().precision

    @torch.no_grad()
    def use_bf16(self) -> str:
        """Make matrices of MLPs from products in bfloat16; what that changes, in words."""
        for gate in self.gates:
            gate.bf16 = True
        if not self.gates:
            return "precision='bf16': there is no plain MLP between the two"
        gate, t = self.gates[0], self.span.stop - 1
        p, q = gate.p[t], None if gate.q is None else gate.q[t]
        rounded = gate.core(p, q, None, None)
        gate.bf16 = False
        plain = gate.core(p, q, None, None)
        gate.bf16 = True
        error = float((rounded - plain).norm() / plain.norm().clamp(min=1e-30))
        return (
            f"products of {gate.name} in bfloat16 differ from float32 by {error:.1e}; what is pushed stays in float32"
        )

    def composes(self, place: Place, k: int) -> bool:
        """Whether k tangents of one position cost more than building each block's matrix and multiplying.

        Pushing costs 2k(3df) per gated MLP (2k(2df) plain), building 2d²f + 2kd²: build when k > d/(3 - d/f).
        """
        if place.single != (True, True) or place.sources != place.targets or not self.stages:
            return False
        if self.sees_all and sum("attention" in step.kinds for step in self.steps) > 1:
            return False  # one position reaches itself through others
        gated = next(iter(self.gates), None)
        if gated is None:
            return True
        d, f = self.shapes[0][0], gated.p.shape[-1]
        return k > d / max((3 if gated.q is not None else 2) - d / f, 1.0)

    def _compose(self, t: int, rows: Tensor | None, columns: Tensor | None, out: Tensor | None) -> Tensor:
        last = len(self.stages) - 1
        made: Tensor | None = None
        for index, (step, branches) in enumerate(self.stages):
            keep = rows if index == last and not step.skip else None
            cut = columns if index == 0 and not step.skip else None
            direct = out if index == 0 == last and not step.skip and len(branches) == 1 else None
            first = branches[0]
            if direct is not None and isinstance(first, GateBranch):
                return first.dense(t, keep, cut, direct)
            block = _sum([branch.dense(t, keep, cut) for branch in branches])
            if made is None:
                made = block
                if step.skip:
                    made.diagonal().add_(1.0)
                    made = made if columns is None else made[:, columns]
                continue
            made = torch.addmm(made, block, made) if step.skip else block @ made
        assert made is not None
        return made[rows] if rows is not None and self.stages[last][0].skip else made

    def reach(self, place: Place) -> slice:
        """The positions that tangents from a place's sources pass on the way to its targets."""
        if self.sees_all:
            return self.span
        assert place.sources is not None
        assert place.targets is not None
        return slice(min(place.sources), max(place.targets) + 1)

    @staticmethod
    def _widen(part: Tensor, positions: tuple[int, ...] | None, span: slice) -> Tensor:
        """Values at some positions among all of a span; zero elsewhere."""
        assert positions is not None
        full = part.new_zeros(len(part), span.stop - span.start, *part.shape[2:])
        here = [i for i, p in enumerate(positions) if p < span.stop and p >= span.start]
        full[:, [positions[i] - span.start for i in here]] = part[:, here]
        return full

    @staticmethod
    def _narrow(full: Tensor, positions: tuple[int, ...] | None, span: slice) -> Tensor:
        assert positions is not None
        found = full.new_zeros(len(full), len(positions), *full.shape[2:])
        here = [i for i, p in enumerate(positions) if p < span.stop and p >= span.start]
        found[:, here] = full[:, [positions[i] - span.start for i in here]]
        return found


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _sites(model: Model, steps: list[Step]) -> list[str]:
    """What the reference of a chain must hold."""
    known = model.bindings.by_address  # type: ignore[union-attr]
    found: list[str] = []
    for step in steps:
        for kind in step.kinds:
            if kind == "mlp":
                found += mlp_sites(model, step.layer)
                found += [f"blocks.{step.layer}.mlp.hook_out"] if experts_of(model, step.layer) is not None else []
            elif kind == "attention":
                found += attention_sites(step.layer)
            elif kind == "norm":
                found += [f"{step.norm}.{part}" for part in NORM_PARTS]
            elif step.norm == "logits":
                found += ["logits", "unembed.hook_out"]
    return [name for name in dict.fromkeys(found) if name in known] or ["hook_embed"]
