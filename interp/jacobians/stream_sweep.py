"""Stream sweep: covectors on the last stream, pulled back through every block at once, as a few matrix products.

State w[t, k, d]: the k-th covector at each position of a span. With k as many as the stream is wide, a block's own
matrix is worth building: an MLP costs 2d²f + 2d²k by its matrix against 6dfk (gated) pulled through, for each token.
Attention mixes positions: from z̄[t] = w[t] W_O, per head with pattern A, scores' slope g, o = A v and rotations R,
v̄[j] = Σ_t A[t, j] z̄[t]; s̄[t, j] = z̄[t] · P[t, j] with P = A g (v_j - o_t); k̄[j] = Σ_t s̄[t, j] q_t R_j, and for queries
either z̄[t] (Σ_j P[t, j] k_jᵀ R_t W_Q) or, where heads times keys are fewer than the heads' width, s̄[t] (k R_t W_Q).
The first positions of a prompt see few keys, and take the second way. Gains and centring go into the weights, the
norm's rank-one term into the sum.
"""

import math
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
# Positions whose scores are kept together, as many as the last of them has.
_TILE = 8
# Part of the cost below which covectors on scores pay: they are copied once more.
_PAYS = 0.9


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
        self._filled = False

    def use(self, dtype: torch.dtype) -> None:
        """Hold weights and sums in another dtype."""
        self.ref.weights.dtype = self.dtype = dtype

    def bytes_each(self) -> int:
        """Scratch that one covector needs: states, and what attention makes of it."""
        n, sizes = self.span.stop - self.span.start, self.ref.weights.sizes
        layout, width = self.ref.weights.layout, sizes["d_head"]
        return n * (3 * sizes["d_model"] + 2 * (layout.n_heads + layout.n_kv_heads) * width) * self.dtype.itemsize

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
        state, self._filled = seeds.to(self.dtype).clone(), all(bool(seed.any()) for seed in seeds)
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
            # Where seeds stand at the last position alone, until attention has spread them.
            if not self._filled and not given[t].any():
                continue
            matrix = block.dense(self.span.start + t, out=matrix)
            out[t] += self._mm(given[t], matrix, moved)

    def _through_attention(self, step: Step, given: Tensor, out: Tensor) -> None:
        branch = AttentionBranch(self.ref, step.layer, EXACT, self._turn(step.layer), step.before, step.behind)
        assert branch.turns is not None
        if branch.turns.query.ndim != 4:  # a norm over all heads of queries and keys
            out += branch.pull(given.transpose(0, 1), self.span).transpose(0, 1)
            return
        z = self._outputs(branch, given)
        tables = HeadTables.of(branch, self.span, given.shape[1])
        inner, scores = tables.spread(z)
        made = given.new_empty(given.shape[1:])
        for t in range(len(given)):
            self._mm(inner[t], tables.rows(t), made)
            self._add(made, scores[t] if t < len(scores) else z[t], tables.query_rows(t))
            out[t] += branch.before.finish(made, self.span.start + t)

    def _outputs(self, branch: AttentionBranch, given: Tensor) -> Float[Tensor, "pos k head_width"]:
        """Covectors on the heads' outputs."""
        z = given.new_empty(*given.shape[:2], branch.wo.shape[0] * branch.wo.shape[1])
        output = branch.wo.flatten(0, 1).T.contiguous()
        for t, part in enumerate(given):
            if branch.behind.norm is not None or branch.behind.factor != 1.0:
                part = branch.behind.pull(part[:, None], slice(self.span.start + t, self.span.start + t + 1))[:, 0]
            self._mm(part, output, z[t])
        return z

    def _turn(self, layer: int) -> Turns:
        """Of a layer: the last one found where it turns this layer's queries and keys as well, as rotations do."""
        if layer in self._turns:
            return self._turns[layer]
        known = next(iter(self._turns.values()), None)
        if known is not None and self._fits(known, layer):
            return known
        here = self.layers.index(layer) + 1
        wanted = self.layers[max(0, here - (1 if known is None else _LAYERS_AT_ONCE)) : here]
        self._turns = dict(find_turns(self.model, self.ref, wanted, self.span))
        return self._turns[layer]

    def _fits(self, known: Turns, layer: int) -> bool:
        """Whether turns of another layer, as linear maps, take this layer's plain queries and keys to the turned."""
        close = 1e2 * torch.finfo(self.dtype).eps
        for part, map_ in (("q", known.query), ("k", known.key)):
            plain, turned = (self.ref.at(f"blocks.{layer}.attn.hook_{name}{part}")[self.span] for name in ("", "rot_"))
            if map_.ndim != 4 or map_.shape[1] != turned.shape[1]:
                return False
            gap = known.push(plain[None].to(map_), part, self.span)[0] - turned
            if not gap.norm() <= close * turned.norm():
                return False
        return True

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

    The first positions see few keys: up to ``contracted`` covectors stay on scores instead of going on to queries.
    Weights read the normalised input: gain and centring of the norm are in them.

    Attributes:
        pattern: A of keys in the span [kv_head, (query head of the group, pos), key].
        moved: P [head, pos, key, d_head], of all keys.
        queries: Turned queries [kv_head, (query head of the group, pos), d_head].
        turned: R_j of keys [pos, kv_head, d_head, d_head].
        key_weight: W_K [kv_head, d_head, d].
        query_maps: By position: k R [head, key, d_head] where contracted, else Σ_j P k_jᵀ R [head, d_head, d_head].
        query_weight: W_Q [head, d_head, d].
        contracted: How many positions.
        room: Room for one position's rows of keys and values, the latter in place; and for those of queries.
    """

    pattern: Tensor
    moved: Tensor
    queries: Tensor
    turned: Tensor
    key_weight: Tensor
    query_maps: list[Tensor]
    query_weight: Tensor
    contracted: int
    room: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, branch: AttentionBranch, span: slice, k: int) -> "HeadTables":
        """Make the tables of a layer."""
        turns, group = branch.turns, branch.v.shape[1]
        assert turns is not None
        wide = lambda x: x[: span.stop].repeat_interleave(branch.repeat, 1).transpose(0, 1)
        v, keys = wide(branch.v), wide(branch.k)
        a, slope = (x[:, span, : span.stop] for x in (branch.pattern, branch.slope))
        moved = (a * slope)[..., None] * (v[:, None] - (a @ v)[:, :, None])
        heads, n, _, width = moved.shape
        fold = lambda w: branch.before.fold(w.flatten(1).T).unflatten(0, w.shape[1:]).contiguous()
        query, key, value = fold(branch.wq), fold(branch.wk), fold(branch.wv).flatten(0, 1)
        back = torch.einsum("hjt,phtd->phjd", keys, turns.query)
        ends = [min(t - t % _TILE + _TILE, n) for t in range(n)]
        few = [_contracts(k, heads, width, span.start + end, span.start, query.shape[2]) for end in ends]
        contracted = few.index(False) if False in few else n
        maps = [back[t, :, : span.start + ends[t]] for t in range(contracted)]
        maps += torch.einsum("hpje,phjd->phed", moved[:, contracted:], back[contracted:])
        rows = max((m.shape[1] for m in maps), default=0)
        room = value.new_empty(2 * len(value), value.shape[1]), value.new_empty(heads * rows * value.shape[1])
        room[0][len(value) :] = value
        grouped = lambda x: x.unflatten(0, (group, -1)).flatten(1, 2)
        return cls(
            grouped(a[..., span]), moved, grouped(branch.q[span].transpose(0, 1)), turns.key, key, maps, query,
            contracted, room,
        )  # fmt: skip

    def spread(self, z: Float[Tensor, "pos k head_width"]) -> tuple[Float[Tensor, "pos k width"], list[Tensor]]:
        """Covectors on keys and values, beside each other, and on scores [k, rows] of each contracted position."""
        n, k, _ = z.shape
        heads, start = len(self.moved), self.moved.shape[2] - n
        inner = z.new_empty(n, k, len(self.room[0]))
        tiles = [slice(t, min(t + _TILE, n)) for t in range(0, self.contracted, _TILE)]
        scores = [z.new_empty(tile.stop - tile.start, k, heads, start + tile.stop) for tile in tiles]
        size = max(1, _IN_CACHE // (z[:, 0].numel() * z.element_size()))
        for begin in range(0, k, size):
            some = slice(begin, min(begin + size, k))
            self._fill(inner[:, some], [part[:, some] for part in scores], z[:, some])
        return inner, [one.flatten(1) for part in scores for one in part]

    def _fill(self, out: Tensor, kept: list[Tensor], z: Tensor) -> None:
        """`spread` of a few covectors."""
        n, k, _ = z.shape
        heads, _, seen, width = self.moved.shape
        group, few, start = self.pattern.shape[0], self.contracted, seen - n
        by_head = z.unflatten(-1, (heads, width)).permute(2, 0, 1, 3).contiguous()
        scores = z.new_empty(heads, n, k, n)
        scores[:, :few, :, few:] = 0.0
        for head in range(heads):
            if few:
                first = torch.bmm(by_head[head, :few], self.moved[head, :few, : start + few].mT)
                scores[head, :few, :, :few] = first[..., start:]
                for i, part in enumerate(kept):
                    part[:, :, head] = first[i * _TILE : i * _TILE + len(part), :, : part.shape[-1]]
            if few < n:
                torch.bmm(by_head[head, few:], self.moved[head, few:, start:].mT, out=scores[head, few:])
        keys = torch.bmm(self.queries.mT, scores.view(group, -1, k * n)).view(group, width, k, n)
        values = torch.bmm(self.pattern.mT, by_head.view(group, -1, k * width)).view(group, n, k, width)
        size = group * width
        out[..., :size].unflatten(-1, (group, width)).copy_(keys.permute(3, 2, 0, 1))
        out[..., size:].unflatten(-1, (group, width)).copy_(values.permute(1, 2, 0, 3))

    def rows(self, t: int) -> Float[Tensor, "width d"]:
        """What a position's covectors on its key and value are multiplied by; the next call writes over it."""
        rows, weight = self.room[0], self.key_weight
        torch.bmm(self.turned[t], weight, out=rows[: weight.shape[0] * weight.shape[1]].view(weight.shape))
        return rows

    def query_rows(self, t: int) -> Float[Tensor, "rows d"]:
        """What covectors on the heads' outputs, or on scores, are multiplied by; the next call writes over it."""
        maps, weight = self.query_maps[t], self.query_weight
        shape = (*maps.shape[:2], weight.shape[2])
        return torch.bmm(maps, weight, out=self.room[1][: math.prod(shape)].view(shape)).flatten(0, 1)


def _contracts(k: int, heads: int, width: int, seen: int, before: int, d: int) -> bool:
    """Whether scores are fewer than the heads' width, with what it takes to have those of keys before the span."""
    scores = heads * seen * (k * d + width * d) + heads * before * width * k
    return scores < _PAYS * heads * width * (k * d + width * d)
