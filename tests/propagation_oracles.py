"""What propagation must give, by autograd through the model's own modules: hooks, detached values, nothing of interp.

Only a Layout's paths are used, to find the modules. Checks are functions that assert, so that a planted error can be
shown to be caught by them.
"""

import contextlib

import torch
from torch import nn

import interp
from tests.cases import VOCAB, build, inputs_for

WEIGHTS = {3: 1.0, 5: 2.0, 7: -0.5}
TOLERANCE = {"gpt2": 1e-11, "gpt-neo": 1e-11, "gpt-j": 1e-11}
# The others: transformers computes RMS norms, or the softmax, in float32 whatever the model's dtype.
LOOSE = 3e-6


def case(name, **options):
    """(model, observable, ids) in float64 where the family's code runs in it."""
    dtype = torch.float32 if name == "mixtral" else torch.float64
    module = build(name, **{"dtype": dtype, **options})
    rows = module.get_output_embeddings().weight
    rows.data = rows.data.bfloat16().to(rows.dtype)  # rows of few bits: their sums are exact in float32 too
    model = interp.attach(module)
    observable = interp.Observable.tokens(model, list(WEIGHTS), weights=list(WEIGHTS.values()))
    return model, observable, inputs_for(name)[:1]


def close(found, wanted, tolerance):
    """Assert that the norm of the difference is small against the norm of what is wanted."""
    wanted = wanted.detach().to(found.dtype)
    assert found.shape == wanted.shape
    assert float(wanted.norm()) > 0
    assert float((found - wanted).norm() / wanted.norm()) <= tolerance


def part(model, path, layer=None):
    """A module of the model, or of one of its blocks."""
    if path is None:
        return None
    return model.module.get_submodule(path if layer is None else f"{model.layout.blocks}.{layer}.{path}")


def measured(model, logits):
    """n · logits, before a soft-cap."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    return sum(w * logits[..., i] for i, w in WEIGHTS.items())


@contextlib.contextmanager
def hooks():
    """A list for hook handles, all removed at the end."""
    handles = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen_patterns():
    """Every softmax is a constant."""
    original = nn.functional.softmax
    nn.functional.softmax = lambda *args, **kwargs: original(*args, **kwargs).detach()
    try:
        yield
    finally:
        nn.functional.softmax = original


def frozen_norm(module, args, out, like=None):
    """A hook: the norm's output with its divisor held (at that of another value, if given), by its formula."""
    x = args[0]
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    layer_norm = isinstance(module, nn.LayerNorm) or "LayerNorm" in type(module).__name__
    eps = next(float(getattr(module, n)) for n in ("eps", "variance_epsilon") if hasattr(module, n))
    centre = lambda v: v - v.mean(-1, keepdim=True) if layer_norm else v
    x, held_at = centre(x), centre(x if like is None else like)
    gain = 1.0 if weight is None else weight + 1 if "Gemma" in type(module).__name__ else weight
    y = gain * x / (held_at.pow(2).mean(-1, keepdim=True) + eps).sqrt().detach()
    return y if bias is None else y + bias


def norms(model):
    """Every norm of the stream."""
    layout = model.layout
    found = [part(model, layout.final_norm)]
    for layer in range(model.n_layers):
        names = (layout.ln1, layout.ln2, layout.ln1_post, layout.ln2_post)
        found += [part(model, n, layer) for n in names if n is not None]
    return found


def activations(model):
    """(activation module, whether it gates) of every MLP."""
    layout = model.layout
    gated = layout.mlp_up is not None or layout.gate_up is not None
    for layer in range(model.n_layers):
        mlp = part(model, layout.mlp, layer)
        yield next(m for n, m in mlp.named_children() if "act" in n), gated


def held(gated):
    """A hook: the activation as a constant factor of its input, or as a constant."""
    return lambda m, args, out: out.detach() if gated else args[0] * (out / args[0]).detach()


def network_gradients(model, ids, linearization, position=-1, readout=None):
    """Gradient of the measurement in front of each block, at z and at the neurons, by the network's code.

    Another readout is a function of what was kept at these sites, and of the logits.
    """
    layout, kept = model.layout, {}

    def keep(name):
        def hook(module, args, kwargs=None):
            x = args[0] if args else kwargs["hidden_states"]
            x.retain_grad() if x.requires_grad else None
            kept[name] = x

        return hook

    with hooks() as handles, contextlib.ExitStack() as stack:
        embed = part(model, layout.embed)
        handles.append(embed.register_forward_hook(lambda m, a, out: out.detach().requires_grad_()))
        for layer in range(model.n_layers):
            block = part(model, layout.blocks)[layer]
            handles.append(block.register_forward_pre_hook(keep(f"blocks.{layer}.hook_resid_pre"), with_kwargs=True))
            handles.append(part(model, layout.o, layer).register_forward_pre_hook(keep(f"blocks.{layer}.attn.hook_z")))
            if layout.mlp_down:
                down = part(model, layout.mlp_down, layer)
                handles.append(down.register_forward_pre_hook(keep(f"blocks.{layer}.mlp.hook_post")))
        if linearization != "exact":
            stack.enter_context(frozen_patterns())
        if linearization == "frozen":
            handles += [m.register_forward_hook(frozen_norm) for m in norms(model)]
            handles += [m.register_forward_hook(held(gated)) for m, gated in activations(model)]
        logits = model.module(ids).logits
        value = measured(model, logits[0, position]) if readout is None else readout(kept, logits)
        value.backward()
    return {name: x.grad[0] for name, x in kept.items() if x.grad is not None}


def branch_pull(model, ids, layer, y, position, head=None, source=None):
    """y on what one head (or the MLP) adds to the stream at a position, pulled to the stream it reads: by autograd."""
    layout, leaf, out = model.layout, [], []
    is_head = head is not None
    shared = layout.ln1 if layout.parallel else None
    norm, post = (layout.ln1, layout.ln1_post) if is_head else (layout.ln2 or shared, layout.ln2_post)
    last = post or (layout.o if is_head else layout.mlp)

    def start(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        leaf.append(x.detach().requires_grad_())
        return ((leaf[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaf[0]})

    def one_head(module, args):
        z, width = args[0], args[0].shape[-1] // layout.n_heads
        own = torch.zeros_like(z)
        own[:, position, head * width : (head + 1) * width] = 1
        return (z.detach() + own * (z - z.detach()),)

    entry = norm or (layout.attn if is_head else layout.mlp)
    with hooks() as handles, frozen_patterns():
        handles.append(part(model, entry, layer).register_forward_pre_hook(start, with_kwargs=True))
        if is_head:
            handles.append(part(model, layout.o, layer).register_forward_pre_hook(one_head))
        take = lambda m, a, o: out.append(o[0] if isinstance(o, tuple) else o)
        handles.append(part(model, last, layer).register_forward_hook(take))
        model.module(ids)
    scale = getattr(model.config, "residual_multiplier", 1.0)
    grad = torch.autograd.grad(scale * (out[0][0, position] * y).sum(), leaf[0])[0][0]
    return grad[position if source is None else source]


def final_pull(model, ids, position=-1):
    """The gradient of the measurement at the final norm's input."""
    leaf = []

    def start(module, args):
        leaf.append(args[0].detach().requires_grad_())
        return (leaf[0],)

    with hooks() as handles:
        handles.append(part(model, model.layout.final_norm).register_forward_pre_hook(start))
        logits = model.module(ids).logits
    return torch.autograd.grad(measured(model, logits[0, position]), leaf[0])[0][0, position]


# Checks ---------------------------------------------------------------------------------------------


def path_is_autograd(name, steps, **options):
    """Check 9: a path's vector is a chain of autograd products, everything off the path detached."""
    model, observable, ids = case(name, **options)
    y, here = final_pull(model, ids), ids.shape[1] - 1
    for step in reversed(steps):
        layer, head, source = step
        y = branch_pull(model, ids, layer, y, here, head, source)
        here = here if source is None else source
    path = interp.Path(tuple(interp.Step(*step) for step in steps))
    found = interp.propagate(model, observable, ids, path=path)
    assert found.position == here
    close(found.vector, y, TOLERANCE.get(name, LOOSE))


def path_offset_is_what_flows(name, steps):
    """Vector · x + offset of a one-component path is u · (what the component wrote), its bias b_O left out."""
    model, observable, ids = case(name)
    (layer, head, source), place = steps[0], ids.shape[1] - 1
    u = interp.propagate(model, observable, ids, path=interp.Path(()), linearization="frozen")
    f = interp.propagate(model, observable, ids, path=interp.Path((interp.Step(*steps[0]),)), linearization="frozen")
    acts = model.capture(ids, [str(f.site.whole), f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.attn.hook_pattern"])
    flows = float(f.score(acts)[0]) + f.offset
    if head is None:
        wanted = float(u.vector @ acts[f"blocks.{layer}.hook_mlp_out"][0, place])
    else:
        z = values_of(model, ids, layer)[head // (model.layout.n_heads // model.layout.n_kv_heads), source]
        z = float(acts[f"blocks.{layer}.attn.hook_pattern"][0, head, place, source]) * z
        weight = part(model, model.layout.o, layer).weight
        weight = weight.T if type(part(model, model.layout.o, layer)).__name__ == "Conv1D" else weight
        width = weight.shape[1] // model.layout.n_heads
        wrote = (weight[:, head * width : (head + 1) * width] @ z) * getattr(model.config, "residual_multiplier", 1.0)
        if (post := part(model, model.layout.ln1_post, layer)) is not None:
            # The branch's divisor, its own: the post-norm is linear with it held.
            branch = model.capture(ids, f"blocks.{layer}.attn.hook_out")[f"blocks.{layer}.attn.hook_out"][0, place]
            wrote = frozen_norm(post, (wrote,), None, like=branch)
        wanted = float(u.vector @ wrote.detach())
    assert abs(flows - wanted) <= LOOSE * max(abs(wanted), abs(f.offset), 1e-3)


def values_of(model, ids, layer):
    """A layer's values by its own modules [kv_head, pos, d_head]."""
    layout, out = model.layout, []
    with hooks() as handles:
        source = part(model, layout.v or layout.qkv, layer)
        handles.append(source.register_forward_hook(lambda m, a, o: out.append(o[0])))
        model.module(ids)
    v = out[0]
    if layout.v is None:
        assert layout.fused == "split"
        width = v.shape[-1] // (layout.n_heads + 2 * layout.n_kv_heads)
        v = v[:, -layout.n_kv_heads * width :]
    return v.unflatten(-1, (layout.n_kv_heads, -1)).transpose(0, 1)


def totals_are_autograd(name, linearization, **options):
    """Check 10: totals are the network's gradients, with the same things held."""
    model, observable, ids = case(name, **options)
    found = interp.propagate_all(model, observable, ids, linearization=linearization)
    for site, wanted in network_gradients(model, ids, linearization).items():
        limit = TOLERANCE.get(name, LOOSE) if linearization != "exact" else 2e-5
        close(found[site][0], wanted.reshape(found[site][0].shape), limit)


# One of each kind of layout; scopes are slow.
BY_ANOTHER_ENGINE = ("llama", "gpt2", "neox-parallel", "gemma2", "olmo2", "mixtral")


def totals_sum_to_the_measurement(name, linearization="frozen"):
    """Check 13: Σ G x + c is n · logits at the embedding and every layer, c at the embedding by the frozen network."""
    model, observable, ids = case(name)
    found = interp.propagate_all(model, observable, ids, linearization=linearization)
    with torch.no_grad():
        out = model.module(ids, output_hidden_states=True)
    wanted, limit = measured(model, out.logits[0, -1]), 1e-5 if model.dtype == torch.float32 else LOOSE
    for layer, x in enumerate(out.hidden_states[: model.n_layers]):
        terms = found[f"blocks.{layer}.hook_resid_pre"][0] * x[0]
        offset = found.offsets[f"blocks.{layer}.hook_resid_pre"][0]
        assert abs(terms.sum() + offset - wanted) <= limit * (terms.abs().sum() + offset.abs())
    if name not in BY_ANOTHER_ENGINE:
        return
    scope = interp.LinearScope(model, ids, linearization, output="unembed.hook_out")
    scale = model.layout.logit_scale
    constant = scale * sum(w * scope.r[0, -1, i] for i, w in WEIGHTS.items())
    first = found.offsets["blocks.0.hook_resid_pre"][0]
    assert abs(first - constant) <= limit * (terms.abs().sum() + constant.abs())


def sequences_of_steps(model, length):
    """All paths to the last position, with the position that each reads: (steps, position)."""
    layout, last = model.layout, length - 1
    order = [(layer, kind) for layer in range(model.n_layers) for kind in ("head", "mlp")]
    found = [((), last)]
    for layer, kind in reversed(order):
        more = []
        for steps, here in found:
            if layout.parallel and steps and steps[0][0] == layer:
                continue
            if kind == "mlp":
                more.append((((layer, None, None), *steps), here))
            else:
                more += [(((layer, h, s), *steps), s) for h in range(layout.n_heads) for s in range(here + 1)]
        found += more
    return found


def paths_sum_to_the_total(name, model, linearization):
    """Check 14: the total at the entry is the sum of all paths from it."""
    observable = interp.Observable.tokens(model, list(WEIGHTS), weights=list(WEIGHTS.values()))
    ref = interp.Reference(model, torch.tensor([[3, 17, 42]]))
    total = interp.propagate_all(model, observable, ref, linearization=linearization)["blocks.0.hook_resid_pre"][0]
    summed = torch.zeros_like(total)
    for steps, position in sequences_of_steps(model, 3):
        path = interp.Path(tuple(interp.Step(*step) for step in steps))
        summed[position] += interp.propagate(model, observable, ref, path=path, linearization=linearization).vector
    assert float((summed - total).norm() / total.norm()) <= 1e-11 if model.dtype == torch.float64 else 1e-5


def dense_vector():
    """The observable as a vector over the vocabulary."""
    n = torch.zeros(VOCAB, dtype=torch.float64)
    for i, w in WEIGHTS.items():
        n[i] = w
    return n
