"""LinearScope: a network around one input as F x + r, with votes that sum.

Source: Navarrete Michelini, Liu, Lu, Jiang, "A Tour of Convolutional Networks Guided by Linear Interpreters", ICCV
2019; extended to smooth units, norms, products and attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.budget import Chunk, bytes_of
from interp.hooks.checks import check, refuse_incomplete
from interp.hooks.errors import CompletenessError, InputError, NonFiniteError
from interp.hooks.examples import each_example
from interp.hooks.frozen import FrozenNetwork
from interp.hooks.held_units import unit_table
from interp.hooks.linear_map import LinearMap
from interp.hooks.linearization import Linearization, LinearizationLike
from interp.hooks.model import Model
from interp.hooks.one_batch import Together, in_chunks
from interp.hooks.origins import origin_of
from interp.hooks.outputs import output_of
from interp.hooks.pictures import filter_at, white_impulses
from interp.hooks.precision import HALF, compute_dtype_of, tolerance_of
from interp.hooks.site import SiteLike
from interp.hooks.stability import CELL, NOISE, Stability, stability
from interp.hooks.table import Table
from interp.hooks.targets import Targets
from interp.hooks.token_blocks import TokenBlocks, token_blocks
from interp.hooks.votes import BiasReport, Votes, report_biases
from interp.hooks.windows import WindowLike, restricted

_OUTLIER = 5


@dataclass(frozen=True)
class Block:
    """One block of the input: its value and its linear map."""

    name: str
    value: Tensor
    map: LinearMap


class LinearScope(LinearMap):
    """The network around one reference input: y = F x + r.

    For a language model x are the token embeddings; learned positions and token types are further blocks of the
    input, and r holds what is constant. Hooks live only while the scope is made or replayed; the module keeps its own
    code, flags and weights.

    Args:
        model: An attached model.
        x: One example: a text, token ids, an image tensor [1, ...].
        linearization: ``frozen`` (default), ``exact``, ``path``, or a Linearization.
        output: The output: a site (the network behind it is not run), or a function that picks a tensor from what the
            module returns; by default its logits or main tensor.
        origin: Origin o of the input space for votes: y = F (x - o) + (r + F o). Zero by default; ``"mean"``: the mean
            colour of the picture, or the mean embedding of the text; ``"black"``, ``"grey"``: pictures of that colour
            as the model's preprocessing gives them; or a tensor.
        chunk: How many probes are computed at once, or ``auto``; see `LinearMap`.
        budget: Memory that a chunk may take, in bytes or as ``"2GiB"``, beside the reference's own graph.
        compute_dtype: dtype of F, r and votes: ``torch.float32`` or ``torch.float64``; by default the model's own, and
            float32 for a model in half precision. Decisions are the model's in its own dtype: F x + r equals y to that
            one's rounding, while F is linear to that of ``compute_dtype``. Where the two differ, the scope keeps a
            copy of the weights in ``compute_dtype`` as long as it lives.

    Attributes:
        y: Output of the network itself, with its batch axis.
        Fx: Linear part, summed over blocks.
        r: Constant part: the frozen network's output for zero input.
        blocks: Input blocks by name.
        network: The frozen network underneath.

    Raises:
        LinearizationError: If a call cannot be linearised; the message names module and call.
        InputError: If there is not exactly one example.
        SizeError: If the budget is too small for one probe.

    Example:
        >>> import interp, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> scope = interp.LinearScope(interp.attach(net), torch.randn(1, 4))
        >>> scope.votes(2).completeness_error < 1e-5
        True
    """

    def __init__(
        self,
        model: Model,
        x: Any,
        linearization: LinearizationLike = "frozen",
        *,
        output: SiteLike | Callable[[Any], Tensor] | None = None,
        origin: Tensor | str | None = None,
        chunk: Chunk = "auto",
        budget: int | str = "2GiB",
        compute_dtype: torch.dtype | None = None,
    ):
        self.model, budget = model, bytes_of(budget)
        self.batch = model.batch(x)
        if self.batch.size != 1:
            raise InputError(f"{self.batch.size} examples", "one reference input", "LinearScope.each makes one of each")
        held = Linearization.of(linearization)
        select, self.y = output_of(model, self.batch, output, held)
        # Recorded first: where a unit gives NaN, the tape names it.
        dtype = compute_dtype_of(model, self.y.dtype, compute_dtype)
        self.network = FrozenNetwork(model, self.batch, held, select, compute_dtype=dtype)
        if not torch.isfinite(self.y).all():
            raise NonFiniteError("the network's output holds NaN or infinity", "finite output at the reference")
        values = self.network.values
        self.Fx = self.network.push(values)
        limits = {"chunk": chunk, "budget": budget}
        self.blocks = {name: Block(name, value, self._block_map(name, limits)) for name, value in values.items()}
        first = next(iter(self.blocks.values()))
        push, pull = first.map._push, first.map._pull
        super().__init__(push, pull, first.map.in_shape, first.map.out_shape, self.Fx, held, **limits)
        self._push, self._pull = push, pull  # one choice of the chunk for both maps
        self.x = first.value
        self.targets = Targets(model, self.batch, self.Fx)
        self.origin, self.origin_name = origin_of(model, self.x, origin, self.batch.ids is not None)
        self.r = self.replay({name: torch.zeros_like(value) for name, value in values.items()})
        refuse_incomplete(self)

    @classmethod
    def each(
        cls, model: Model, inputs: Any, linearization: LinearizationLike = "frozen", **options: Any
    ) -> list["LinearScope"]:
        """Return one scope for each example: a list of texts, rows of token ids, a batch of images.

        Every scope has its own tape and its example without padding, so that batch mates change nothing.

        Args:
            model: An attached model.
            inputs: Several examples.
            linearization: As for one scope.
            options: As for one scope: ``output``, ``origin``.

        Raises:
            InputError: If it is not plain which part of the inputs belongs to which example.
        """
        return [cls(model, one, linearization, **options) for one in each_example(model, inputs)]

    def replay(self, blocks: dict[str, Float[Tensor, "n ..."]]) -> Float[Tensor, "n ..."]:
        """Return F v + r by running the network's own code on other inputs with the recorded decisions held.

        Args:
            blocks: A value for each input block, [n, ...].

        Raises:
            ControlFlowDivergedError: If the network makes other calls than at the reference.
        """
        return self.network.replay(blocks)

    def run_together(self, probes: Float[Tensor, "..."] | dict[str, Float[Tensor, "n ..."]]) -> Together:
        """Return y and F v + r from one pass over the batch [reference; probes], with nothing recorded beforehand.

        Args:
            probes: Values of the first input block [n, *in_shape], other blocks zero; or of each block by its name.

        Raises:
            MixedBatchError: If the network mixes the items of a batch, or loses the batch axis before a unit.

        Example:
            >>> import interp
            >>> scope = LinearScope(interp.attach(torch.nn.Linear(3, 2)), torch.ones(1, 3))
            >>> torch.allclose(scope.run_together(torch.zeros(4, 3)).probes, scope.r.expand(4, 2))
            True
        """
        if not isinstance(probes, dict):
            probes = {next(iter(self.blocks)): self._probes(probes, self.in_shape, "run_together")[0]}
        return in_chunks(self.network.together, probes, self.y, self.tolerance, self._push.most)

    def _block_map(self, name: str, limits: dict[str, Any]) -> LinearMap:
        value, network = self.network.values[name], self.network
        return LinearMap(
            push=lambda v: network.push({name: v}),
            pull=lambda w: network.pull(name, w),
            in_shape=value.shape[1:], out_shape=self.y.shape[1:], like=self.Fx, linearization=network.held,
            push_bytes=network.push_bytes, pull_bytes=network.pull_bytes, **limits,
        )  # fmt: skip

    # Reading ---------------------------------------------------------------------------------------------------------

    def votes(
        self, target: Any, margin_to: Any = None, *, position: int = -1, centred: bool = False, stability: bool = False
    ) -> Votes:
        """Return each input element's vote for a target: (Fᵀ w) ⊙ (x - o), summed over channels.

        w is the target's unit vector, or target minus ``margin_to``, or a given tensor shaped like the output. Under
        ``exact`` votes are gradient × input, which on a transformer leaves most of the logit in the residual. A row
        is not robust by itself: `stability` says how far these votes can be read.

        Args:
            target: A token (string or id) of a language model, a class (label or index), an index tuple into the
                output (with slices: the mean over that box), a list of these (their mean), or a direction w.
            margin_to: A second target; the votes are then for the difference.
            position: For language models, whose next token; the last by default.
            centred: Votes for target minus the mean over all classes or tokens (w = e_k - 1/K): what a softmax sees.
            stability: Whether to add what small noise does to row and votes, as `stability` does by default.

        Raises:
            TokenError: If a string is not exactly one token.
            ArgumentError: If the target does not exist, or a margin is to be centred.
            CompletenessError: If votes and residual do not sum to the output.
        """
        w, name = self.targets.pair(target, margin_to, position, centred)
        tested = self.stability(target, margin_to, position=position, centred=centred) if stability else None
        shift = {next(iter(self.blocks)): self.origin[0]}
        rows = {n: b.map.rmatvec(w) for n, b in self.blocks.items()}
        elements = {n: rows[n] * (b.value[0] - shift.get(n, 0.0)) for n, b in self.blocks.items()}
        flat = torch.cat([e.flatten() for e in elements.values()]).double()
        residual = (w.double() * self.r[0].double()).sum()
        residual = residual + (next(iter(rows.values())).double() * self.origin[0].double()).sum()
        maps = {n: self.reduce(e) for n, e in elements.items()}
        votes = Votes(
            map=next(iter(maps.values())), blocks=maps, total=float(flat.sum()), abs_total=float(flat.abs().sum()),
            residual=float(residual), value=float((w.double() * self.y[0].double()).sum()),
            labels=self.labels, target=name, origin=self.origin_name, linearization=self.network.held.name,
            stability=tested,
        )  # fmt: skip
        if not votes.completeness_error <= self.tolerance:
            raise CompletenessError(
                f"votes {votes.total:.6g} + residual {votes.residual:.6g} against {votes.value:.6g} for {name} "
                f"(relative {votes.completeness_error:.1e})", f"at most {self.tolerance:.0e}",
                "the linearisation missed something in this network: scope.check() says more",
            )  # fmt: skip
        return votes

    @property
    def tolerance(self) -> float:
        """Relative error of completeness that the output's dtype allows."""
        return tolerance_of(self.y.dtype, self.model)

    @property
    def worst_tolerance(self) -> float:
        """As `tolerance`, for the single worst output rather than a sum: rounding of half precision is not averaged."""
        return self.tolerance * (_OUTLIER if self.y.dtype in HALF else 1)

    @property
    def map_tolerance(self) -> float:
        """Relative error of linearity and adjoint that the dtype of F allows."""
        return tolerance_of(self.dtype, self.model)

    def direction(self, target: Any, position: int = -1) -> Float[Tensor, "..."]:
        """Return the unit vector over outputs (without batch axis) that a target names.

        Raises:
            ArgumentError: If the target does not exist.
        """
        return self.targets.direction(target, position)

    def reduce(self, elements: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Sum what is shaped like one input over its channels: [pos] of embeddings, [height, width] of a picture."""
        if self.batch.ids is not None:
            return elements.sum(-1)
        return elements.sum(0) if elements.ndim == 3 else elements

    @property
    def labels(self) -> list[str] | None:
        """The input's tokens as strings, or None."""
        if self.batch.ids is None or self.model.tokenizer is None:
            return None
        return [self.model.tokenizer.decode([t]) for t in self.batch.ids[0].tolist()]

    def bias_report(
        self, target: Any, margin_to: Any = None, *, position: int = -1, centred: bool = False
    ) -> BiasReport:
        """Return which call put what into r: r · w = Σ <G, c>, c a call's constant, G the gradient at its output.

        Another origin o of the input space adds one term, F o. Constants are biases, normalisation shifts, offsets of
        units, learned positions inside the network, and whatever else is added to the live value. One replay and one
        backward pass.

        Args:
            target: As for `votes`.
            margin_to: As for `votes`.
            position: As for `votes`.
            centred: As for `votes`.

        Raises:
            CompletenessError: If the terms do not sum to r · w.
        """
        w, name = self.targets.pair(target, margin_to, position, centred)
        moved = (self.rmatvec(w) * self.origin[0]).detach()
        residual = float((w.double() * self.r[0].double()).sum() + moved.double().sum())
        report = report_biases(
            self.network.constants(w), moved, residual=residual, target=name, origin=self.origin_name,
            linearization=self.network.held.name,
        )  # fmt: skip
        if not report.completeness_error <= self.tolerance:
            raise CompletenessError(
                f"constants sum to {report.total:.6g}, r is {report.residual:.6g} for {name}",
                f"a relative difference below {self.tolerance:.0e}",
            )
        return report

    def stability(
        self, target: Any, margin_to: Any = None, *, position: int = -1, centred: bool = False,
        noise: float | None = None, noise_std: float | None = None, samples: int = 4, float64: bool = False,
        cell: int = CELL, seed: int = 0,
    ) -> Stability:  # fmt: skip
        """Return what small input noise (and float64, on a copy of the model) do to a row, its votes and decisions.

        Each noisy input costs as much as a new scope and a row.

        Args:
            target: As for `votes`.
            margin_to: As for `votes`.
            position: As for `votes`.
            centred: As for `votes`.
            noise: Norm of the noise relative to the input's; 0.01 where no noise_std is given.
            noise_std: Standard deviation of the noise in units of the input, instead.
            samples: How many noisy inputs.
            float64: Whether to compare with a float64 copy of the model.
            cell: Side of the square cells of a picture over which votes are summed.
            seed: Of the noise.

        Raises:
            ArgumentError: If a number is not positive, or both noise and noise_std are given.
        """
        w, name = self.targets.pair(target, margin_to, position, centred)
        noise = NOISE if noise is None and noise_std is None else noise
        return stability(
            self, w, name, noise=noise, noise_std=noise_std, samples=samples, float64=float64, cell=cell, seed=seed
        )

    def token_blocks(
        self, positions: Sequence[int] | None = None, *, probes: int | None = None, seed: int = 0
    ) -> TokenBlocks:
        """Return the norms ‖F_ts‖ of the blocks from each token s to outputs at positions t.

        Exact with one row for each output component; or estimated from random probes w at t, since the mean of
        ‖(Fᵀ w)_s‖² is ‖F_ts‖²; then with a standard error.

        Args:
            positions: Output positions; all by default.
            probes: How many random probes for each position; exact if None.
            seed: Of the probes.

        Raises:
            ArgumentError: If input or output have no token positions.
            SizeError: If an exact computation would take more rows than `token_blocks.MOST_ROWS`.
        """
        return token_blocks(self, positions, probes, seed)

    def restrict(
        self, window: WindowLike | None = None, input_window: WindowLike | None = None, *, centred: bool = False
    ) -> LinearMap:
        """Return F between windows of inputs and outputs as a map of its own, with its rows, columns, svd and eig.

        Args:
            window: Outputs: a mask shaped like the output (without batch axis), or a box of slices.
            input_window: Inputs: likewise.
            centred: Whether to subtract the mean over the last output axis: the common shift of logits.

        Raises:
            ArgumentError: If a window does not fit, or outputs to centre are no logits.
        """
        return restricted(self, window, input_window, centred)

    def impulse_responses(self, pixels: Sequence[Any]) -> Float[Tensor, "n ..."]:
        """Return what white input pixels (row, column) project into the output: columns summed over input channels.

        Raises:
            ArgumentError: If the input is no picture, or a pixel is outside it.
        """
        return white_impulses(self, pixels)

    def receptive_filter(self, at: Any) -> Float[Tensor, "..."]:
        """Return what an output pixel (row, column) reads: rows averaged over output channels; or the row of a class.

        Raises:
            ArgumentError: If the pixel or class does not exist.
        """
        return filter_at(self, at)

    @property
    def units(self) -> Table:
        """Every decision that is held: module, call, mode, shape; of units the share that is on and saturated.

        A gain above 100 is noted as ill-conditioned. See `interp.hooks.held_units.unit_table`.
        """
        return unit_table(self.network.entries)

    def check(self, probes: int = 2, seed: int = 0) -> Table:
        """Return the checks: completeness, reference untouched, replay against F, adjoint; each with its tolerance.

        The replay uses probes of ten times the input's norm: a live non-linearity shows only off the reference.
        """
        return check(self, probes, seed)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{n} {list(b.value.shape[1:])}" for n, b in self.blocks.items())
        return f"LinearScope({inputs} -> {list(self.y.shape[1:])}, {self.network.held.name})"
