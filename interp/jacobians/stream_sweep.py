"""Stream sweep: covectors on the last stream, pulled back through every block at once, as a few matrix products.

State w[t, k, d]: the k-th covector at each position of a span. With k as many as the stream is wide, a block's own
matrix is worth building: an MLP costs 2d²f + 2d²k by its matrix against 6dfk (gated) pulled through, for each token.
Attention mixes positions: from z̄[t] = w[t] W_O, per head with pattern A, scores' slope g, o = A v and rotations R,
v̄[j] = Σ_t A[t, j] z̄[t]; s̄[t, j] = z̄[t] · P[t, j] with P = A g (v_j - o_t); k̄[j] = Σ_t s̄[t, j] q_t R_j, and for queries
either z̄[t] (Σ_j P[t, j] k_jᵀ R_t W_Q) or, where heads times keys are fewer than the heads' width, s̄[t] (k R_t W_Q).
Gains, centring and the norm's rank-one term go into the right-hand matrices, of one token each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.inputs import Batch
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.jacobians.branches import GateBranch, mlp_sites
from interp.jacobians.chain import Step
from interp.jacobians.heads import AttentionBranch, Turns, attention_sites, find_turns
from interp.propagation.reference import Reference

EXACT = Linearization.of("exact")
# Bytes of one chunk's z̄ in attention: what stays in a processor's cache is rearranged at no cost.
_IN_CACHE = 4 << 20
_LAYERS_AT_ONCE = 8


class StreamSweep:
    """One prompt's blocks in closed form, from the last stream back to earlier ones.

    Args:
        model: A decoder whose blocks `interp.jacobians.chain.find_steps` knows.
        batch: One example, without padding.
        steps: From the lowest stream to the last one.
        span: Positions whose covectors are kept. What lies before it is not asked for, and cannot come back: positions
            only pull on earlier ones.
        half: Whether products of float32 matrices round their factors to bfloat16.

    Raises:
        SiteUnavailableError: If a branch has no closed form.
    """

    def __init__(self, model: Model, batch: Batch, steps: list[Step], span: slice, half: bool = False):
        self.model, self.steps, self.span, self.half = model, steps, span, half
        known = model.bindings.by_address  # type: ignore[union-attr]
        sites = [s for step in steps for s in (*mlp_sites(model, step.layer), *attention_sites(step.layer))]
        self.ref = Reference(model, batch, only=[s for s in dict.fromkeys(sites) if s in known])
        self.dtype = self.ref.weights.dtype
        self.layers = sorted({step.layer for step in steps if "attention" in step.kinds})
        self._turns: dict[int, Turns] = {}

    def use(self, dtype: torch.dtype) -> None:
        """Hold weights and sums in another dtype."""
        self.ref.weights.dtype = self.dtype = dtype

    def bytes_each(self) -> int:
        """Scratch that one covector needs: states, and what attention makes of it."""
        n, sizes = self.span.stop - self.span.start, self.ref.weights.sizes
        heads = self.ref.weights.layout.n_heads * sizes["d_head"]
        return n * (3 * sizes["d_model"] + 3 * heads) * self.dtype.itemsize

    def bytes_fixed(self) -> int:
        """Scratch whatever the number of covectors: activations, one layer's folded weights and tables."""
        n, sizes, layout = self.span.stop - self.span.start, self.ref.weights.sizes, self.ref.weights.layout
        width, d, f = sizes["d_head"], sizes["d_model"], sizes.get("d_mlp", 4 * sizes["d_model"])
        tables = layout.n_heads * n * (2 * self.span.stop * width + 2 * _LAYERS_AT_ONCE * width * width)
        held = sum(value.nbytes for value in self.ref.acts.values())
        return held + (tables + 3 * d * f + 2 * n * layout.n_kv_heads * width * d) * self.dtype.itemsize

    def run(self, seeds: Float[Tensor, "pos k d"]) -> Iterator[tuple[int, Float[Tensor, "pos k d"]]]:
        """Pull covectors at the last stream back; yields (layer, state at that block's input) from the last one down.

        The state is overwritten by the next step. ``seeds`` is kept.
        """
        state = seeds.to(self.dtype).clone()
        scratch = torch.empty_like(state) if any(len(step.kinds) > 1 for step in self.steps) else None
        for index in reversed(range(len(self.steps))):
            step = self.steps[index]
            given = state
            if scratch is not None and len(step.kinds) > 1:  # branches of a parallel block read the same stream
                given = scratch.copy_(state)
            with products_of(state):
                for kind in step.kinds:
                    if kind == "mlp":
                        self._through_mlp(step, given, state)
                    else:
                        self._through_attention(step, given, state)
            if index == 0 or self.steps[index - 1].layer != step.layer:
                yield step.layer, state

    def _through_mlp(self, step: Step, given: Tensor, out: Tensor) -> None:
        branch = GateBranch(self.ref, step.layer, EXACT, step.before, step.behind)
        n, k, d = given.shape
        if not builds(k, d, branch.p.shape[-1], branch.q is not None):
            out += branch.pull(given.transpose(0, 1), self.span).transpose(0, 1)
            return
        matrix, moved = given.new_empty(d, d), given.new_empty(k, d)
        block = _HalfGate(branch) if self.half else branch
        for t in range(n):
            if not given[t].any():  # where seeds stand at the last position alone, until attention has spread them
                continue
            matrix = block.dense(self.span.start + t, out=matrix)
            out[t] += self._mm(given[t], matrix, moved)

    def _through_attention(self, step: Step, given: Tensor, out: Tensor) -> None:
        branch = AttentionBranch(self.ref, step.layer, EXACT, self._turn(step.layer), step.before, step.behind)
        assert branch.turns is not None
        if branch.turns.query.ndim != 4:  # a norm over all heads of queries and keys
            out += branch.pull(given.transpose(0, 1), self.span).transpose(0, 1)
            return
        tables = HeadTables.of(branch, self.span, given.shape[1])
        covectors = self._heads(branch, tables, given)
        for t in range(len(given)):
            rows = branch.before.pull(tables.rows(t)[:, None], slice(self.span.start + t, self.span.start + t + 1))
            self._add(out[t], covectors[t], rows[:, 0])

    def _heads(self, branch: AttentionBranch, tables: "HeadTables", given: Tensor) -> Float[Tensor, "pos k rows"]:
        """Covectors on keys, values and queries (or their scores), beside each other."""
        n, k, _ = given.shape
        width = branch.wo.shape[0] * branch.wo.shape[1]
        found = given.new_empty(n, k, tables.width)
        # What covectors on queries are multiplied by reads the heads' outputs: they are made in their place.
        z = found.new_empty(n, k, width) if tables.contracted else found[..., tables.width - width :]
        output = branch.wo.flatten(0, 1).T.contiguous()
        for t in range(n):
            here, part = slice(self.span.start + t, self.span.start + t + 1), given[t]
            if branch.behind.norm is not None or branch.behind.factor != 1.0:
                part = branch.behind.pull(part[:, None], here)[:, 0]
            self._mm(part, output, z[t])
        size = max(1, _IN_CACHE // (n * width * given.element_size()))
        for start in range(0, k, size):
            some = slice(start, min(start + size, k))
            tables.fill(found[:, some], z[:, some])
        return found

    def _turn(self, layer: int) -> Turns:
        if layer not in self._turns:
            here = self.layers.index(layer) + 1
            wanted = self.layers[max(0, here - _LAYERS_AT_ONCE) : here]
            self._turns = dict(find_turns(self.model, self.ref, wanted, self.span))
        return self._turns[layer]

    def _mm(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        if self.half:
            return out.copy_(left.bfloat16() @ right.bfloat16())
        return torch.mm(left, right, out=out)

    def _add(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        if self.half:
            out += left.bfloat16() @ right.bfloat16()
        else:
            out.addmm_(left, right)


@contextmanager
def products_of(like: Tensor) -> Iterator[None]:
    """No gradients, and float32 products as they are, whatever the process-wide flag for tf32 says."""
    before = torch.backends.cuda.matmul.allow_tf32
    if like.is_cuda:
        torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        if like.is_cuda:
            torch.backends.cuda.matmul.allow_tf32 = before


def builds(k: int, d: int, f: int, gated: bool) -> bool:
    """Whether k covectors of one token go through an MLP's matrix, built for them, rather than through its neurons."""
    return 2 * d * d * f + 2 * k * d * d < (6 if gated else 4) * k * d * f


class _HalfGate:
    """A gate branch whose matrices are products in bfloat16."""

    def __init__(self, branch: GateBranch):
        self.branch, self.left = branch, branch.out.bfloat16()

    def dense(self, position: int, out: Tensor) -> Tensor:
        branch, (pre, up) = self.branch, self.branch.folded
        middle = pre * branch.p[position][:, None]
        if up is not None and branch.q is not None:
            middle.addcmul_(up, branch.q[position][:, None])
        core = out.copy_(self.left @ middle.bfloat16())
        return branch.behind.finish_left(branch.before.finish(core, position), position)


@dataclass
class HeadTables:
    """What one layer's attention is multiplied by, over a span of positions.

    Attributes:
        pattern: A of keys in the span [kv_head, (query head of the group, pos), key].
        moved: P [head, pos, key, d_head], of keys in the span, or of all where scores are contracted.
        queries: Turned queries [kv_head, (query head of the group, pos), d_head].
        key_rows: R_j W_K of each position [pos, kv_head, d_head, d].
        value_rows: W_V [(kv_head, d_head), d].
        query_maps: Σ_j P k_jᵀ R [pos, head, d_head, d_head], or k R [pos, head, key, d_head] where contracted.
        query_weight: W_Q [head, d_head, d].
        contracted: Whether query covectors stay covectors on scores.
    """

    pattern: Tensor
    moved: Tensor
    queries: Tensor
    key_rows: Tensor
    value_rows: Tensor
    query_maps: Tensor
    query_weight: Tensor
    contracted: bool

    @classmethod
    def of(cls, branch: AttentionBranch, span: slice, k: int) -> "HeadTables":
        """Make the tables of a layer."""
        turns, group = branch.turns, branch.v.shape[1]
        assert turns is not None
        wide = lambda x: x[: span.stop].repeat_interleave(branch.repeat, 1).transpose(0, 1)
        v, keys = wide(branch.v), wide(branch.k)
        a = branch.pattern[:, span, : span.stop]
        slope = branch.slope[:, span, : span.stop]
        moved = (a * slope)[..., None] * (v[:, None] - (a @ v)[:, :, None])
        back = torch.einsum("hjt,phtd->phjd", keys, turns.query)
        heads, _, seen, width = moved.shape
        contracted = _contracts(k, heads, width, seen, span.start, branch.wq.shape[0])
        maps = back if contracted else torch.einsum("hpje,phjd->phed", moved, back)
        grouped = lambda x: x.unflatten(0, (group, -1)).flatten(1, 2)
        return cls(
            grouped(a[..., span]), moved if contracted else moved[:, :, span], grouped(branch.q[span].transpose(0, 1)),
            torch.einsum("pgtd,xgd->pgtx", turns.key, branch.wk), branch.wv.flatten(1).T, maps,
            branch.wq.permute(1, 2, 0).contiguous(), contracted,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """How many covectors each position has."""
        group, width = self.key_rows.shape[1:3]
        heads = self.query_maps.shape[1]
        return 2 * group * width + heads * self.query_maps.shape[2]

    def fill(self, out: Float[Tensor, "pos k width"], z: Float[Tensor, "pos k head_width"]) -> None:
        """Covectors on keys, values and contracted scores from covectors on the heads' outputs."""
        n, k, _ = z.shape
        heads, _, seen, width = self.moved.shape
        group = self.pattern.shape[0]
        by_head = z.unflatten(-1, (heads, width)).permute(2, 0, 1, 3).contiguous()
        scores = torch.bmm(by_head.flatten(0, 1), self.moved.flatten(0, 1).mT).view(heads, n, k, seen)
        span = scores[..., seen - n :].contiguous() if seen > n else scores
        keys = torch.bmm(self.queries.mT, span.view(group, -1, k * n)).view(group, width, k, n)
        values = torch.bmm(self.pattern.mT, by_head.view(group, -1, k * width)).view(group, n, k, width)
        size = group * width
        out[..., :size].unflatten(-1, (group, width)).copy_(keys.permute(3, 2, 0, 1))
        out[..., size : 2 * size].unflatten(-1, (group, width)).copy_(values.permute(1, 2, 0, 3))
        if self.contracted:
            out[..., 2 * size :].unflatten(-1, (heads, seen)).copy_(scores.permute(1, 2, 0, 3))

    def rows(self, t: int) -> Float[Tensor, "width d"]:
        """What a position's covectors are multiplied by, to be covectors on its normalised input."""
        queries = torch.bmm(self.query_maps[t], self.query_weight).flatten(0, 1)
        return torch.cat([self.key_rows[t].flatten(0, 1), self.value_rows, queries])


def _contracts(k: int, heads: int, width: int, seen: int, before: int, d: int) -> bool:
    """Whether scores are fewer than the heads' width, with what it takes to have those of keys before the span."""
    scores = heads * seen * (k * d + width * d) + heads * before * width * k
    return scores < heads * width * (k * d + width * d)
