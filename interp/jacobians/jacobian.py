"""jacobian: batched Jacobians between any two sites, exact or partly frozen."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from interp.hooks import guards
from interp.hooks.budget import bytes_of
from interp.hooks.errors import (
    ArgumentError,
    InputError,
    LinearizationError,
    MetaWeightsError,
    NoPathError,
    SiteUnavailableError,
    UnknownFamilyError,
)
from interp.hooks.examples import each_example
from interp.hooks.inputs import Batch
from interp.hooks.linearization import Linearization, LinearizationLike
from interp.hooks.model import Model
from interp.hooks.precision import HALF
from interp.hooks.site import SiteLike
from interp.jacobians.chain import ChainEngine, Step, find_steps
from interp.jacobians.checks import FallbackWarning, check_chain
from interp.jacobians.costs import make_plan, probe_bytes
from interp.jacobians.engine import Engine
from interp.jacobians.files import STORED, record_of, write_jacobians
from interp.jacobians.graph import EXACT, GraphEngine
from interp.jacobians.places import End, Place, check_indices, comes_after, find_ends, find_places
from interp.jacobians.plan import probes_within
from interp.jacobians.reductions import JacobianSummary, check_reduction
from interp.jacobians.replay import ReplayEngine
from interp.jacobians.results import Jacobians, check_out
from interp.jacobians.stored import StoredJacobians
from interp.jacobians.zero import ZeroEngine

Method = Literal["auto", "closed", "autograd"]
Precision = Literal["float32", "float64", "tf32", "bf16"]
_NO_CLOSED_FORM = (SiteUnavailableError, UnknownFamilyError, MetaWeightsError)


def jacobian(
    model: Model, inputs: Any, source: SiteLike, target: SiteLike, positions: Any = None, *, rows: Any = None,
    columns: Any = None, reduce: str | Callable[[Tensor], Any] | None = None,
    linearization: LinearizationLike = "exact", precision: Precision | None = None,
    budget: int | str = "2GiB", out: Tensor | str | Path | None = None, out_dtype: torch.dtype | None = None,
    method: Method = "auto", check: bool = True, allow_zero: bool = False,
) -> Jacobians | JacobianSummary | StoredJacobians:  # fmt: skip
    """Return the Jacobians J[n, o, i] = d target_o / d source_i between two sites.

    MLPs (gated or not, or experts), attention with its query-key side, norms, residual sums and unembeddings are
    differentiated in closed form, in decoders and encoders: a gated MLP as one product
    K = W_out (diag(p) W_pre + diag(q) W_up) and a rank-one term for its norm, several layers by pushing tangents only
    at the positions between source and target, or by multiplying the blocks' matrices, whichever is cheaper. Each
    closed form is compared with autograd on random directions first. Networks over pictures are replayed from recorded
    slopes. Where a closed form disagrees, or the network is none of these, autograd runs in chunks. Examples are taken
    one by one without padding. Nothing dense is computed before it is asked for; ``plan`` says what it costs.

    Args:
        model: An attached model.
        inputs: As for `capture`; several examples give the maps of each, in order.
        source: Site that is moved. With a position (``...@3``) only there.
        target: Site that is read, behind the source.
        positions: None: one map of all positions to all for each example. ``"same"``: one map for each token, target
            and source at that token. Ints, ``"last"``, a substring: the same at those tokens. (s, t), or a list of
            such tuples: position pairs, source first. Counted from the example's first real token.
        rows: Components of the target that are kept (at each position): ints, or tuples into its shape there.
        columns: Components of the source, likewise.
        reduce: Give a summary instead: ``mean``, ``sum`` (over maps), ``norm`` (Frobenius, of each), ``gram`` (inner
            products of all pairs), ``trace``, ``svd:k`` (k singular values of each), or a function of chunks
            [n, out, in]. Means, norms, grams and traces of MLPs never form a Jacobian.
        linearization: What is held: ``exact`` is the derivative; ``frozen``, ``path`` or another holds parts. Of the
            norms, the attention or the gates alone: ``Linearization(norm="frozen")``, ``(attention="frozen")``,
            ``(product="gate")``.
        precision: dtype of weights and sums in closed forms; by default float32, or float64 for float64 models. The
            process-wide flag for tf32 has no say; ``tf32`` allows it, on a GPU. ``bf16``, on a CPU, makes the matrices
            of MLPs from products in bfloat16: about twice as fast where the processor has them, off by 3e-3;
            ``plan.notes`` says by how much here.
        budget: Bytes for scratch and dense result, ``"2GiB"`` or a number.
        out: Tensor [n, out, in] that is filled at once. Or a path: the result is written there chunk by chunk, as a
            safetensors file (above 4 GiB a folder of such files), and comes back as `StoredJacobians`, read from the
            disk; only a chunk has to fit the budget. A call that was killed goes on when it is made again.
        out_dtype: Of what is written to a path: by default that of the computation; ``torch.float16`` (scaled by each
            map's largest entry) and ``torch.bfloat16`` halve it.
        method: ``auto``, or only ``closed`` forms, or only ``autograd``.
        check: Whether closed forms are compared with autograd.
        allow_zero: Give zeros where the target does not depend on the source, which is refused otherwise.

    Raises:
        SiteError: If a site does not exist, or does not name one tensor.
        PositionError: If a position lies outside an example, or a source behind its target.
        NoPathError: If the target does not depend on the source, and zeros are not allowed.
        ArgumentError: If indices are out of range, or ``out`` does not fit.
        InputError: If keys and values of earlier tokens are given.
        SizeError: If the budget does not hold one row, or the result.
        TrainModeError: If dropout or batch statistics are live.
        ModelStateError: If activations are checkpointed, or `torch.inference_mode` is on.
        LinearizationError: If a call has no rule under the linearisation.
        StoreError: If the path holds something else, or what another model, input or choice made.

    Example:
        >>> import interp
        >>> model = interp.load("smollm2-135m")
        >>> J = interp.jacobian(
        ...     model, "The cat sat", "blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out", positions="same"
        ... )
        >>> J.dense().shape
        torch.Size([3, 576, 576])
    """
    held, size = Linearization.of(linearization), bytes_of(budget)
    _check_options(method, precision, reduce, out, out_dtype)
    found = find_ends(model, source, target, allow_zero)
    examples = each_example(model, inputs)
    _check_inputs(examples)
    places = find_places(model, examples, found[:2], found[2:], positions)
    made = _Maker(model, held, size, precision, method, check, allow_zero).make(examples, places, found[:2])
    engines, notes, error = made
    ends = _keep(found[:2], engines[0].shapes, rows, columns)
    plan = make_plan(ends, places, engines, size, notes, error)
    jacobians = Jacobians(ends, places, engines, held, plan, out if isinstance(out, Tensor) else None)
    if reduce is not None:
        return jacobians.reduce(reduce)
    if isinstance(out, (str, Path)):
        return _stored(model, examples, jacobians, Path(out), out_dtype)
    if out is not None:
        check_out(out, jacobians.shape, engines[0].like)
        jacobians.dense(out)
    return jacobians


def _stored(
    model: Model, examples: list[Batch], jacobians: Jacobians, path: Path, dtype: torch.dtype | None
) -> StoredJacobians:
    dtype = dtype or jacobians.like.dtype
    write_jacobians(jacobians, path, record_of(model, examples, jacobians, dtype), dtype)
    return StoredJacobians(path, jacobians.plan.budget)


def _check_options(method: str, precision: str | None, reduce: Any, out: Any, out_dtype: torch.dtype | None) -> None:
    if method not in ("auto", "closed", "autograd"):
        raise ArgumentError(f"method={method!r}", "'auto', 'closed' or 'autograd'")
    if precision is not None and precision not in get_args(Precision):
        raise ArgumentError(f"precision={precision!r}", f"None, or one of {', '.join(get_args(Precision))}")
    if precision is not None and method == "autograd":
        raise ArgumentError(
            f"precision={precision!r} with method='autograd'", "a closed form", "autograd runs in the model's dtype"
        )
    if reduce is not None:
        check_reduction(reduce)
    if reduce is not None and out is not None:
        raise ArgumentError(f"reduce={reduce!r} and out=", "one of the two")
    if out is not None and not isinstance(out, (Tensor, str, Path)):
        raise ArgumentError(f"out of type {type(out).__name__}", "a tensor or a path")
    if out_dtype is not None and (not isinstance(out, (str, Path)) or out_dtype not in STORED):
        raise ArgumentError(
            f"out_dtype={out_dtype} with out of type {type(out).__name__}",
            f"one of {', '.join(map(str, STORED))}, and a path as out",
        )


def _check_inputs(examples: list[Batch]) -> None:
    for value in (*examples[0].args, *examples[0].kwargs.values()):
        if isinstance(value, Tensor) and value.is_complex():
            raise InputError(f"an input of dtype {value.dtype}", "a float tensor", "take real and imaginary part apart")
    guards.refuse_cache(examples[0].kwargs)
    guards.refuse_inference_mode()


def _keep(ends: tuple[End, End], shapes, rows: Any, columns: Any) -> tuple[End, End]:
    kept = check_indices("columns", columns, shapes[0]), check_indices("rows", rows, shapes[1])
    return replace(ends[0], indices=kept[0]), replace(ends[1], indices=kept[1])


class _Maker:
    """Chooses and makes the engine of each example."""

    def __init__(
        self, model: Model, held: Linearization, budget: int, precision, method: Method, check: bool, allow_zero: bool
    ):
        self.weights = guards.WeightsHeld(model.module)
        self.allow_zero, self.devices = allow_zero, guards.devices_named(model.module)
        self.model, self.held, self.budget, self.method, self.check = model, held, budget, method, check
        self.precision, self.tf32 = precision, precision == "tf32"
        self.dtype = getattr(torch, precision if precision == "float64" else "float32") if precision else None
        for name, device in (("tf32", "cuda"), ("bf16", "cpu")):
            if precision == name and model.device.type != device:
                raise ArgumentError(f"precision={name!r} on {model.device}", f"a {device} device", "use float32")

    def make(
        self, examples: list[Batch], places: list[Place], ends: tuple[End, End]
    ) -> tuple[dict[int, Engine], list[str], float | None]:
        """Return engines by example, what to know about the choice, and the self-check's largest error."""
        if comes_after(*ends):
            return {i: ZeroEngine(self.model, batch, ends) for i, batch in enumerate(examples)}, [], None
        steps, notes = self._steps(ends), []
        if self.devices and self.method != "autograd":
            notes.append(f"no closed form: parameters on several devices, {self.devices}")
        engines: dict[int, Engine] = {}
        errors: list[float] = []
        for index, batch in enumerate(examples):
            mine = [place for place in places if place.example == index]
            batch = self._cut(batch, mine)
            if steps is not None:
                engine, why = self._closed(batch, steps, mine, ends, errors)
                if engine is not None:
                    engines[index] = engine
                    notes += [engine.use_bf16()] if self.precision == "bf16" else []
                    continue
                notes.append(why)
                steps = None
            engines[index] = self._autograd(batch, ends, notes)
        for engine in engines.values():
            engine.prepared = self.weights
        if self.precision is not None and not all(isinstance(e, (ChainEngine, ZeroEngine)) for e in engines.values()):
            notes.append(f"precision={self.precision!r} is of closed forms: autograd runs in the model's dtype")
        return engines, notes, max(errors, default=None)

    def _steps(self, ends: tuple[End, End]) -> list[Step] | None:
        closed = self.method != "autograd" and not self.held.overrides and not self.devices
        steps = find_steps(self.model, *ends) if closed else None
        if steps is None and self.method == "closed":
            raise ArgumentError(
                f"method='closed' from {ends[0].site} to {ends[1].site} of {self.model.family}"
                + (f", with parameters on several devices, {self.devices}" if self.devices else ""),
                "sites of a decoder's stream, branches or norms, on one device, without overrides",
                "method='auto' runs autograd",
            )
        return steps

    def _closed(
        self, batch: Batch, steps: list[Step], places: list[Place], ends: tuple[End, End], errors: list[float]
    ) -> tuple[ChainEngine | None, str]:
        try:
            engine = ChainEngine(self.model, batch, steps, places, self.held, 1, self.dtype)
        except _NO_CLOSED_FORM as error:
            if self.method == "closed":
                raise
            return None, f"no closed form: {error}"
        engine.chunk, engine.tf32 = probes_within(self.budget, probe_bytes(engine)), self.tf32
        if self.check:
            error, culprit = check_chain(self.model, batch, engine, places, ends)
            if culprit:
                message = f"the closed form of {culprit} is off by {error:.1e} from autograd, which is used instead"
                if self.method == "closed":
                    raise ArgumentError(message, "a block that the closed form fits", "method='auto' runs autograd")
                warnings.warn(message, FallbackWarning, stacklevel=5)
                return None, message
            errors.append(error)
        return engine, ""

    def _autograd(self, batch: Batch, ends: tuple[End, End], notes: list[str]) -> Engine:
        try:
            return self._replay(batch, ends, notes) or self._graph(batch, ends)
        except NoPathError:
            if not self.allow_zero:
                raise
            return ZeroEngine(self.model, batch, ends)

    def _replay(self, batch: Batch, ends: tuple[End, End], notes: list[str]) -> Engine | None:
        """The engine for pictures, where every call has a rule."""
        if self.method == "autograd" or batch.ids is not None or self.model.dtype in HALF:
            return None
        try:
            engine = ReplayEngine(self.model, batch, ends, self.held, self.budget)
        except LinearizationError as error:
            if self.held != EXACT:
                raise
            notes.append(f"no replay: {error}")
            return None
        engine.chunk = probes_within(self.budget, probe_bytes(engine))
        return engine

    def _graph(self, batch: Batch, ends: tuple[End, End]) -> Engine:
        engine = GraphEngine(self.model, batch, ends, self.held, 1, is_local_pair(self.model, ends))
        engine.chunk = probes_within(self.budget, probe_bytes(engine))
        return engine

    def _cut(self, batch: Batch, places: list[Place]) -> Batch:
        """A causal model's example up to the last position that is asked for: what follows does not matter."""
        causal = self.model.layout is not None and self.model.layout.modality == "tokens"
        plain = batch.ids is not None and set(batch.kwargs) <= {"input_ids", "use_cache"} and len(batch.args) <= 1
        if not causal or not plain or any(p.targets is None for p in places):
            return batch
        stop = 1 + max(max((*(p.sources or ()), *(p.targets or ()))) for p in places)
        assert batch.ids is not None
        return batch if stop >= batch.ids.shape[1] else self.model.batch(batch.ids[:, :stop])


def is_local_pair(model: Model, ends: tuple[End, End]) -> bool:
    """Whether no attention lies between two sites, so that positions do not mix."""
    if model.bindings is None or not all(end.has_positions for end in ends):
        return False
    if any(end.binding.where.startswith("raw") for end in ends):
        return False
    scores = [b.order for name, b in model.bindings.by_address.items() if name.endswith("attn.hook_attn_scores")]
    first, last = (sum(order < end.binding.order for order in scores) for end in ends)
    return first == last
