"""Token blocks: how much each token's embedding can move, and does move, the output at each position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.errors import ArgumentError, SizeError
from interp.hooks.table import Rows

if TYPE_CHECKING:
    from interp.hooks.linear_scope import LinearScope

MOST_ROWS = 20_000
_CHUNK = 64
_TOKENS = 8


@dataclass(frozen=True)
class TokenBlocks(Rows):
    """Blocks F_ts, s the input token and t the output position: their norms, and what they contribute.

    A large norm says what an embedding could do, a contribution what this one does; the signed part of it that reaches
    one target is the token's vote, <row_s, E_s>.

    Attributes:
        norms: [output position, input token]; exactly 0 for s > t in a causal model.
        standard_errors: Of estimated norms, or None where they are exact.
        positions: Output positions.
        tokens: Input tokens.
        contributions: ‖F_ts (E_s - o_s)‖ with the token's own embedding E_s and the origin o [output position, input
            token].
        linearization: What was held.
    """

    norms: Float[Tensor, "out in"] = field(repr=False)
    standard_errors: Float[Tensor, "out in"] | None = field(repr=False)
    positions: list[int]
    tokens: list[str] | None = field(repr=False)
    contributions: Float[Tensor, "out in"] = field(repr=False)
    linearization: str = ""

    def to_records(self) -> list[dict[str, Any]]:
        """One row for each block."""
        rows = []
        for i, t in enumerate(self.positions):
            pairs = zip(self.norms[i].tolist(), self.contributions[i].tolist(), strict=True)
            for s, (norm, moved) in enumerate(pairs):
                token = self.tokens[s] if self.tokens else ""
                rows.append({"output": t, "input": s, "token": token, "norm": norm, "contribution": moved})
        return rows


def token_blocks(scope: "LinearScope", positions: Sequence[int] | None, probes: int | None, seed: int) -> TokenBlocks:
    """Return the block norms of a scope over tokens: exact by rows, or estimated from probes.

    Raises:
        ArgumentError: If input or output have no token positions, or there are no probes.
        SizeError: If the exact computation takes too many rows.
    """
    if scope.batch.ids is None or len(scope.out_shape) < 2 or scope.out_shape[0] != scope.in_shape[0]:
        raise ArgumentError(f"a map {list(scope.in_shape)} -> {list(scope.out_shape)}", "token positions on both sides")
    if probes is not None and probes < 2:
        raise ArgumentError(f"probes={probes}", "at least 2, or None for exact norms")
    length, width = scope.out_shape[0], math.prod(scope.out_shape[1:])
    wanted = [int(p) for p in scope.batch.positions(list(range(length)) if positions is None else list(positions))[0]]
    if probes is None and width * len(wanted) > MOST_ROWS:
        raise SizeError(
            f"{width * len(wanted):,} rows", f"at most {MOST_ROWS:,}",
            "give probes=128 for an estimate, fewer positions, or output='blocks.N.hook_resid_post'",
        )  # fmt: skip
    made = torch.Generator().manual_seed(seed)
    found = [_squares(scope, t, probes, made) for t in wanted]
    if probes is None:
        norms, errors = torch.stack([s.sum(0) for s in found]).sqrt(), None
    else:
        mean = torch.stack([s.mean(0) for s in found])
        spread = torch.stack([s.std(0) for s in found]) / math.sqrt(probes)
        norms = mean.sqrt()
        errors = spread / (2 * norms).clamp(min=torch.finfo(norms.dtype).tiny)
    moved = _contributions(scope)[wanted]
    return TokenBlocks(norms, errors, wanted, scope.labels, moved, scope.network.held.name)


def _contributions(scope: "LinearScope") -> Float[Tensor, "out in"]:
    """‖F_ts (E_s - o_s)‖ by one column each: the reference with every other token zero."""
    value = (scope.x - scope.origin)[0]
    found = []
    for some in torch.arange(len(value)).split(_TOKENS):
        probes = torch.zeros(len(some), *value.shape, dtype=scope.dtype, device=scope.device)
        probes[torch.arange(len(some)), some] = value[some]
        found.append(scope.matvec(probes).double().flatten(2).norm(dim=-1))
    return torch.cat(found).T.contiguous()


def _squares(scope: "LinearScope", t: int, probes: int | None, made: torch.Generator) -> Float[Tensor, "probe in"]:
    """‖(Fᵀ w)_s‖² for unit vectors, or random ones, w at position t."""
    width = math.prod(scope.out_shape[1:])
    at = torch.eye(width) if probes is None else torch.randn(probes, width, generator=made)
    rows = []
    for some in at.split(_CHUNK):
        w = torch.zeros(len(some), *scope.out_shape, dtype=scope.dtype, device=scope.device)
        w[:, t] = some.reshape(len(some), *scope.out_shape[1:]).to(w)
        rows.append(scope.rmatvec(w).double().flatten(2).pow(2).sum(-1))
    return torch.cat(rows)
