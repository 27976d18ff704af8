"""Attention around a reference, its query-key side included, pushed, pulled and as a matrix in closed form.

Per head, with A the pattern, g the scores' derivative by queries times keys (scale, and soft-cap), o = A v:
dS = g (dq · k + q · dk), dA = A (dS - Σ A dS), do = dA v + A dv. A pattern that is held leaves A dv alone.
Tangents live at a span of positions; queries before it do not move, keys and values before it are constants.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks import guards
from interp.hooks.block_weights import projection_to
from interp.hooks.errors import SiteUnavailableError
from interp.hooks.interventions import Intervention
from interp.hooks.linearization import Linearization
from interp.hooks.model import Model
from interp.hooks.session import Edit, Read, Session
from interp.hooks.site import Site
from interp.jacobians.branches import NORM_PARTS, NormAt
from interp.jacobians.kernels.rows import softmax_jvp
from interp.propagation.reference import Reference
from interp.query_key import score_scale

_PARTS = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")


def attention_sites(layer: int) -> list[str]:
    """What a reference must hold for `AttentionBranch`."""
    norms = [f"blocks.{layer}.{norm}.{part}" for norm in ("ln1", "ln1_post") for part in NORM_PARTS]
    return [*(f"blocks.{layer}.attn.{part}" for part in _PARTS), *norms]


class _Cut(Intervention):
    """Puts a leaf of its own in the place of a value, so that a graph begins there."""

    kind = "cut"
    leaf: Tensor

    def __init__(self, site: Site):
        super().__init__(site)
        object.__setattr__(self, "leaf", None)

    def apply(self, value, context):
        """The same value, as a leaf."""
        object.__setattr__(self, "leaf", value.detach().clone().requires_grad_())
        return self.leaf


def cap_slope(y: Tensor, z: Tensor, cap: float, held: Linearization) -> Tensor:
    """Of a soft-cap y = c tanh(z/c): its tangent 1 - (y/c)², or its gain y/z."""
    if held.activation == "tangent":
        return 1 - (y / cap) ** 2
    return torch.where(z == 0, 1.0, y / torch.where(z == 0, 1.0, z))


@dataclass(frozen=True)
class Turns:
    """What lies between a projection and the scores at some positions: rotation, and a norm where there is one.

    Attributes:
        start: The first of the positions.
        query: [pos, head, turned, plain], or [pos, head, turned, head, plain] where a norm runs over all heads.
        key: Likewise, of key/value heads.
    """

    start: int
    query: Tensor
    key: Tensor

    def push(self, v: Float[Tensor, "k pos head d"], which: str, span: slice) -> Float[Tensor, "k pos head d"]:
        """Turned tangents."""
        map_ = self._at(which, span)
        return torch.einsum("phtgd,kpgd->kpht" if map_.ndim == 5 else "phtd,kphd->kpht", map_, v)

    def pull(self, w: Float[Tensor, "k pos head d"], which: str, span: slice) -> Float[Tensor, "k pos head d"]:
        """Covectors on plain queries or keys."""
        map_ = self._at(which, span)
        return torch.einsum("phtgd,kpht->kpgd" if map_.ndim == 5 else "phtd,kpht->kphd", map_, w)

    def _at(self, which: str, span: slice) -> Tensor:
        return (self.query if which == "q" else self.key)[span.start - self.start : span.stop - self.start]


def find_turns(model: Model, ref: Reference, layers: list[int], span: slice) -> dict[int, Turns]:
    """Return the turns of each layer at a span of positions, from one run and a few backward passes of each.

    Raises:
        SiteUnavailableError: If queries or keys cannot be seen apart.
        ModelStateError: If activations are checkpointed.
    """
    if not layers:
        return {}
    guards.refuse_checkpointing(model.module)
    known = model.bindings.by_address if model.bindings else {}
    names = [f"blocks.{i}.attn.hook_{part}" for i in layers for part in ("q", "k")]
    missing = [name for name in names if name not in known]
    if missing:
        raise SiteUnavailableError(f"{missing[0]} of {type(model.module).__name__}", "queries and keys of plain heads")
    where = torch.arange(span.start, span.stop)[None]
    cuts = {name: _Cut(Site(name)) for name in names}
    edits = [Edit(cut, Site(name), known[name], where) for name, cut in cuts.items()]
    turned = [name.replace("hook_", "hook_rot_") for name in names]
    reads = [Read(Site(name), known[name], where) for name in turned]
    with torch.enable_grad():
        session = Session(model.module, reads, edits, stop=True, keep_graph=True, size=1, extent=ref.batch.extent)
        with session:
            model.forward(ref.batch)
        maps = {n: _turn(session.values[Site(t)], cuts[n].leaf) for n, t in zip(names, turned, strict=True)}
    dtype = ref.weights.dtype
    return {
        i: Turns(span.start, *(maps[f"blocks.{i}.attn.hook_{part}"].to(dtype) for part in ("q", "k"))) for i in layers
    }


def _turn(turned: Tensor, plain: Tensor) -> Tensor:
    """d turned / d plain at each position, all positions and (where they do not mix) all heads at once."""
    heads, width = turned.shape[2:]
    eye = torch.eye(width, dtype=turned.dtype, device=turned.device)
    seeds = eye[:, None, None, None].expand(width, *turned.shape)
    grads = torch.autograd.grad(turned, plain, seeds, is_grads_batched=True, retain_graph=True)[0][:, 0]
    if heads == 1 or not _mixes(turned, plain):
        return grads.permute(1, 2, 0, 3)
    eye = torch.eye(heads * width, dtype=turned.dtype, device=turned.device).unflatten(-1, (heads, width))
    seeds = eye[:, None, None].expand(-1, *turned.shape[:2], -1, -1)
    grads = torch.autograd.grad(turned, plain, seeds, is_grads_batched=True, retain_graph=True)[0][:, 0]
    return grads.unflatten(0, (heads, width)).permute(2, 0, 1, 3, 4)


def _mixes(turned: Tensor, plain: Tensor) -> bool:
    """Whether one head's turned value depends on another head's plain one."""
    seed = torch.zeros_like(turned)
    seed[:, :, 0] = 1.0
    grad = torch.autograd.grad(turned, plain, seed, retain_graph=True)[0]
    return bool(grad[:, :, 1:].any())


class AttentionBranch:
    """One layer's attention with the norms before and behind it.

    Args:
        ref: A reference that holds `attention_sites`.
        layer: Which block.
        held: What is held.
        turns: Of this layer; None where the pattern is held.
        before: Whether the norm in front belongs to it.
        behind: Whether the branch's multiplier and post-norm belong to it.

    Raises:
        SiteUnavailableError: If scores are not queries times keys.
    """

    def __init__(
        self, ref: Reference, layer: int, held: Linearization, turns: Turns | None, before: bool = True,
        behind: bool = True,
    ):  # fmt: skip
        self.name, self.layer, self.turns = f"blocks.{layer}.attn", layer, turns
        factor = ref.weights.layout.branch_scale if behind else 1.0
        self.before = NormAt(ref, f"blocks.{layer}.ln1" if before else None, held)
        self.behind = NormAt(ref, f"blocks.{layer}.ln1_post" if behind else None, held, factor)
        model, dtype = ref.model, ref.weights.dtype
        self.pattern, self.v = ref.pattern(layer), ref.at(f"{self.name}.hook_v")
        self.repeat = self.pattern.shape[0] // self.v.shape[1]
        self.wo, self.wv = ref.weights.output(layer).weight, ref.weights.values(layer).weight
        if turns is None:
            return
        self.wq = projection_to(model, f"{self.name}.hook_q", dtype).weight
        self.wk = projection_to(model, f"{self.name}.hook_k", dtype).weight
        self.q, self.k = ref.at(f"{self.name}.hook_rot_q"), ref.at(f"{self.name}.hook_rot_k")
        self.slope = self._slopes(ref, held)

    def _slopes(self, ref: Reference, held: Linearization) -> Float[Tensor, "head pos key"]:
        """g: the scores' derivative by queries times keys (with a gain, their quotient); 0 where nothing is seen."""
        cap = getattr(ref.model.config, "attn_logit_softcapping", None)
        slope = torch.full_like(self.pattern, score_scale(ref, self.layer))
        if cap is not None:
            scores = ref.at(f"{self.name}.hook_attn_scores")
            product = slope * torch.einsum("phd,jhd->hpj", self.q, self._wide(self.k))
            slope = slope * cap_slope(scores, product, cap, held)
        return torch.where(self.pattern == 0, 0.0, slope)

    def _wide(self, x: Tensor) -> Tensor:
        """Key/value heads repeated for the query heads of their group (the last axis but one)."""
        return x if self.repeat == 1 else x.repeat_interleave(self.repeat, -2)

    def _group(self, x: Tensor) -> Tensor:
        """Query heads of a group summed."""
        return x if self.repeat == 1 else x.unflatten(-2, (-1, self.repeat)).sum(-2)

    def push(self, v: Float[Tensor, "k pos d"], span: slice) -> Float[Tensor, "k pos d"]:
        """J v."""
        n = self.before.push(v, span)
        dv = self._wide(_through(n, self.wv))
        do = torch.einsum("hpj,kjhd->kphd", self.pattern[:, span, span], dv)
        if self.turns is not None:
            dq = self.turns.push(_through(n, self.wq), "q", span)
            dk = self._wide(self.turns.push(_through(n, self.wk), "k", span))
            ds = torch.einsum("kphd,jhd->khpj", dq, self._wide(self.k))
            ds[..., span] += torch.einsum("phd,kjhd->khpj", self.q[span], dk)
            da = self._softmax(ds.mul_(self.slope[:, span]), span)
            do = do + torch.einsum("khpj,jhd->kphd", da, self._wide(self.v))
        return self.behind.push(torch.einsum("kphe,hed->kpd", do, self.wo), span)

    def pull(self, w: Float[Tensor, "k pos d"], span: slice) -> Float[Tensor, "k pos d"]:
        """Jᵀ w."""
        do = torch.einsum("kpd,hed->kphe", self.behind.pull(w, span), self.wo)
        dv = torch.einsum("hpj,kphd->kjhd", self.pattern[:, span, span], do)
        n = _back(self._group(dv), self.wv)
        if self.turns is not None:
            da = torch.einsum("kphd,jhd->khpj", do, self._wide(self.v))
            ds = self._softmax(da, span).mul_(self.slope[:, span])
            dq = torch.einsum("khpj,jhd->kphd", ds, self._wide(self.k))
            dk = torch.einsum("khpj,phd->kjhd", ds[..., span], self.q[span])
            n = n + _back(self.turns.pull(dq, "q", span), self.wq)
            n = n + _back(self.turns.pull(self._group(dk), "k", span), self.wk)
        return self.before.pull(n, span)

    def _softmax(self, x: Tensor, span: slice) -> Tensor:
        """A (x - Σ A x): the softmax's derivative, its own transpose."""
        return softmax_jvp(self.pattern[:, span], x)

    def dense(self, position: int, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """The Jacobian of one position by itself: query, value and own key, each as the columns of W_O's factor."""
        parts = sum(self.paths(position).values())
        core = self.wo.flatten(0, 1).T @ parts.flatten(0, 1)  # type: ignore[union-attr]
        core = self.behind.finish_left(self.before.finish(core, position), position)
        core = core if rows is None else core[rows]
        return core if columns is None else core[:, columns]

    def paths(self, t: int, s: int | None = None) -> dict[str, Float[Tensor, "head d_head d"]]:
        """The parts of d output_t / d input_s in front of W_O, by the normalised input: value, key, query where s is t.

        C = Σ_j A_j g_j (v_j - o) k_jᵀ; query: C R W_Q, value: A_ts W_V, key: A_ts g_s (v_s - o) (Rᵀ q_t)ᵀ W_K.
        """
        s = t if s is None else s
        fold = lambda weight: self.before.fold(weight.flatten(1).T).unflatten(0, weight.shape[1:])
        wide = lambda x: x if self.repeat == 1 else x.repeat_interleave(self.repeat, 0)
        a = self.pattern[:, t]
        found = {"value": a[:, s, None, None] * wide(fold(self.wv))}
        if self.turns is None:
            return found
        v = self._wide(self.v)
        moved = v - torch.einsum("hj,jhd->hd", a, v)
        if s == t:
            core = torch.einsum("hj,jhd,jhe->hde", a * self.slope[:, t], moved, self._wide(self.k))
            found["query"] = self._own_query(core, slice(t, t + 1), fold)
        key = self._read_key(t, slice(s, s + 1))
        found["key"] = torch.einsum("h,hd,hx->hdx", (a * self.slope[:, t])[:, s], moved[s], key(fold))
        return found

    def _own_query(self, core: Float[Tensor, "head d_head d_query"], here: slice, fold) -> Tensor:
        """C R W_Q of each head, by the normalised input."""
        assert self.turns is not None
        if self.turns.query.ndim == 4:
            query = self.turns.pull(core.transpose(0, 1)[:, None], "q", here)[:, 0]
            return torch.einsum("dhe,hex->hdx", query, fold(self.wq))
        return torch.einsum("hdt,htge,gex->hdx", core, self.turns._at("q", here)[0], fold(self.wq))

    def _read_key(self, t: int, here: slice):
        """q_tᵀ R W_K of each query head for one position's key, by the normalised input."""
        assert self.turns is not None
        map_ = self.turns._at("k", here)[0]
        grouped = self.q[t].unflatten(0, (-1, self.repeat))
        if map_.ndim == 3:
            turned = torch.einsum("grt,gtd->grd", grouped, map_)
            return lambda fold: torch.einsum("grd,gdx->grx", turned, fold(self.wk)).flatten(0, 1)
        turned = torch.einsum("grt,gtnd->grnd", grouped, map_)
        return lambda fold: torch.einsum("grnd,ndx->grx", turned, fold(self.wk)).flatten(0, 1)


def _through(n: Float[Tensor, "k pos d"], weight: Float[Tensor, "d head e"]) -> Float[Tensor, "k pos head e"]:
    return (n @ weight.flatten(1)).unflatten(-1, weight.shape[1:])


def _back(w: Float[Tensor, "k pos head e"], weight: Float[Tensor, "d head e"]) -> Float[Tensor, "k pos d"]:
    return w.flatten(2) @ weight.flatten(1).T
