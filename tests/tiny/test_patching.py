"""Patching grids, their first order, edges and paths, against loops of plain patched runs, formulas and autograd."""

import warnings

import pytest
import torch
from torch import nn

import interp
from interp.hooks.errors import ArgumentError, PositionError, SiteError, SiteUnavailableError
from interp.saving import load_result, save_result
from tests.cases import DECODERS, VOCAB, WIDTH, build, inputs_for

CLEAN = [3, 17, 42, 8, 25, 9, 33]
CORRUPT = [3, 17, 11, 8, 25, 40, 33]
ALL = [*DECODERS, "bert"]
DENSE = [name for name in DECODERS if name != "mixtral"]


def case(name="llama", dtype=torch.float64):
    model = interp.attach(build(name, dtype=None if name == "mixtral" else dtype))
    return model, interp.Observable.tokens(model, [3, 5], [7], weights=[1.0, 2.0, -0.5])


def measured(model, metric, ids, plan=()):
    return float(metric(model.run(torch.tensor([ids]), plan=plan)[0, -1].double()))


def close(model, found, wanted):
    limit = 1e-9 if model.dtype == torch.float64 else 1e-4
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=limit, atol=limit)


# Exact grids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("site", "head"), [("resid_post", None), ("z", 3), ("k", 1)])
def test_a_grid_is_a_loop_of_plain_patched_runs(name, site, head):
    model, metric = case(name)
    address = {"resid_post": "blocks.{}.hook_resid_post"}.get(site, f"blocks.{{}}.attn.hook_{site}")
    by = ("layer", "position") if head is None else ("layer", "position", "head")
    heads = None if head is None else [head]
    found = interp.patch_grid(model, [CLEAN], [CORRUPT], metric, sites=site, by=by, positions=[2, 5, 6], heads=heads)
    for layer in range(model.n_layers):
        for column, position in enumerate((2, 5, 6)):
            step = interp.Patch(address.format(layer), source=torch.tensor([CLEAN]), head=head, positions=position)
            close(model, found.values[layer, column].sum(), measured(model, metric, CORRUPT, step))
    assert found.clean == pytest.approx(measured(model, metric, CLEAN), rel=1e-5)
    assert found.corrupt == pytest.approx(measured(model, metric, CORRUPT), rel=1e-5)
    assert found.effects.abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_a_whole_cut_restores_and_identical_prompts_change_nothing(name):
    model, metric = case(name)
    for direction in ("denoise", "noise"):
        whole = interp.patch_grid(
            model, [CLEAN], [CORRUPT], metric, sites="resid_post", by="layer", direction=direction
        )
        close(model, whole.values, [whole.target] * model.n_layers)
        embedded = interp.patch_grid(model, [CLEAN], [CORRUPT], metric, sites="hook_embed", by=(), direction=direction)
        close(model, embedded.normalised, 1.0)
    same = interp.patch_grid(model, [CLEAN], [CLEAN], metric, sites=["attn_out", "mlp_out"], by=("layer", "position"))
    close(model, same.effects, torch.zeros(2, model.n_layers, len(CLEAN)))


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batches_change_no_value(batch_size):
    model, metric = case("gemma2")
    clean, corrupt = [CLEAN, CLEAN[:5]], [CORRUPT, [*CORRUPT[:4], 50]]
    options = {"sites": ["q", "z"], "by": ("layer", "position", "head"), "positions": [2, -1]}
    whole = interp.patch_grid(model, clean, corrupt, [metric, metric], **options)
    parts = interp.patch_grid(model, clean, corrupt, metric, batch_size=batch_size, **options)
    close(model, parts.runs, whole.runs)
    estimate = lambda size: interp.attribution_patching(
        model, clean, corrupt, metric, steps=3, audit=0, batch_size=size, **options
    )
    close(model, estimate(batch_size).runs, estimate(None).runs)
    swept = lambda size: interp.path_patch(model, metric, clean, corrupt, receivers=["L2H1.q"], batch_size=size)
    close(model, swept(batch_size).runs, swept(None).runs)
    edges = lambda size: interp.edge_attribution(model, clean, corrupt, metric, audit=0, batch_size=size)
    close(model, edges(batch_size).runs.nan_to_num(7), edges(None).runs.nan_to_num(7))


@pytest.mark.parametrize("side", ["left", "right"])
def test_pairs_of_unequal_lengths_equal_each_pair_alone(side, tokenizer):
    module = build("llama", dtype=torch.float64)
    tokenizer.padding_side = side
    model = interp.attach(module, tokenizer=tokenizer)
    tokenizer.padding_side = "right"
    clean, corrupt = ["the cat sat on the mat", "a dog ran"], ["the bird sat on the mat", "a mouse ran"]
    metric = interp.Observable.logit_diff(model, "house", "tree")
    positions = {"animal": [1], "last": "last"}
    both = interp.patch_grid(model, clean, corrupt, metric, positions=positions)
    alone = [interp.patch_grid(model, a, b, metric, positions=positions) for a, b in zip(clean, corrupt, strict=True)]
    close(model, both.runs, torch.cat([one.runs for one in alone]))
    close(model, both.values, sum(one.values for one in alone) / 2)
    spread = torch.stack([one.effects for one in alone]).std(0) / 2**0.5
    close(model, both.errors, spread)
    assert alone[0].errors is None
    assert alone[0].tokens == ["cat/bird", "mat"]
    assert both.axes["position"] == ["animal", "last"]
    named = interp.patch_grid(model, clean[0], corrupt[0], metric, positions=["cat", [1, 2]])
    assert named.axes["position"] == ["cat", "1,2"]
    close(model, named.values[:, 0], alone[0].values[:, 0])


def test_patterns_neurons_and_spans_are_patched_where_they_say():
    model, metric = case("gpt2")
    patterns = interp.patch_grid(model, [CLEAN], [CORRUPT], metric, sites="pattern", by=("layer", "head"), heads=[2])
    neurons = interp.patch_grid(
        model, [CLEAN], [CORRUPT], metric, sites="mlp_post", by=("layer", "neuron"), neurons=[4, 9]
    )
    span = interp.patch_grid(model, [CLEAN], [CORRUPT], metric, sites="blocks.*.hook_resid_mid", positions=[[2, 5]])
    pattern = "blocks.1.attn.hook_pattern"
    other = {s: model.capture([CLEAN], s)[s] for s in (pattern, "blocks.1.mlp.hook_post")}
    mine = model.capture([CORRUPT], "blocks.1.mlp.hook_post")["blocks.1.mlp.hook_post"].clone()
    mine[..., 9] = other["blocks.1.mlp.hook_post"][..., 9]
    steps = [
        (patterns.values[1, 0], interp.Set(pattern, other[pattern][:, [2]], head=2)),
        (neurons.values[1, 1], interp.Set("blocks.1.mlp.hook_post", mine)),
        (span.values[1, 0], interp.Patch("blocks.1.hook_resid_mid", torch.tensor([CLEAN]), positions=[2, 5])),
    ]  # fmt: skip
    for found, step in steps:
        close(model, found, measured(model, metric, CORRUPT, step))


def test_divergence_from_the_clean_distribution_by_its_formula():
    model, _ = case()
    log_p, log_q = (torch.log_softmax(model.run([ids])[0, -1], -1) for ids in (CLEAN, CORRUPT))
    wanted = (log_p.exp() * (log_p - log_q)).sum()
    for direction in ("denoise", "noise"):
        found = interp.patch_grid(model, [CLEAN], [CORRUPT], "kl", by="layer", direction=direction)
        close(model, torch.tensor([found.clean, found.corrupt]), torch.stack([torch.zeros_like(wanted), wanted]))
    steps = interp.attribution_patching(model, [CLEAN], [CORRUPT], "kl", by="layer", direction="noise", steps=64)
    assert float(steps.values[0]) == pytest.approx(float(wanted), rel=0.05)


def test_a_function_may_read_all_positions():
    model, _ = case()
    total = lambda logits: logits[:, 2:4, 5].sum(1)
    found = interp.patch_grid(model, [CLEAN], [CORRUPT], total, position=None, by="layer")
    assert found.clean == pytest.approx(float(model.run([CLEAN])[0, 2:4, 5].sum()))
    close(model, found.normalised, torch.ones(model.n_layers))
    sequence = interp.Observable.sequence(model, [(2, 5), (3, 5)])
    same = interp.patch_grid(model, [CLEAN], [CORRUPT], sequence, position=None, by="layer")
    close(model, same.values, found.values)


# First order ---------------------------------------------------------------------------------------------------------


class LinearLM(nn.Module):
    """Linear in its embeddings: averages of earlier positions, linear MLPs, no norms."""

    main_input_name = "input_ids"

    class Block(nn.Module):
        class Mix(nn.Module):
            def __init__(self):
                super().__init__()
                self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
                for module in (self.wq, self.wk):
                    nn.init.zeros_(module.weight)

            def forward(self, x):
                q, k, v = (w(x).unflatten(-1, (4, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
                hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
                z = (q @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf).softmax(-1) @ v
                return self.wo(z.transpose(1, 2).flatten(-2))

        def __init__(self):
            super().__init__()
            self.mix, self.up, self.down = self.Mix(), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

        def forward(self, x):
            x = x + self.mix(x)
            return x + self.down(self.up(x))

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.stack = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, input_ids):
        x = self.words(input_ids)
        for block in self.stack:
            x = block(x)
        return self.out(x)


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    layout = interp.Layout(
        "linear", embed="words", blocks="stack", attn="mix", o="mix.wo", q="mix.wq", k="mix.wk", v="mix.wv",
        n_heads=4, n_kv_heads=4, mlp_pre="up", mlp_down="down", unembed="out",
    )  # fmt: skip
    return interp.attach(LinearLM().double().eval(), layout=layout)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_first_order_is_exact_where_the_network_is_linear(linear, direction):
    metric = interp.Observable.logit_diff(linear, 3, 5)
    for sites, by in (
        ("resid_mid", ("layer", "position")),
        ("z", ("layer", "position", "head")),
        ("v", ("layer", "head")),
    ):
        options = {"sites": sites, "by": by, "direction": direction}
        exact = interp.patch_grid(linear, [CLEAN], [CORRUPT], metric, **options)
        found = interp.attribution_patching(linear, [CLEAN], [CORRUPT], metric, **options)
        close(linear, found.values, exact.values)
        assert exact.effects.abs().max() > 1e-2
        assert found.audit == {
            "correlation": pytest.approx(1), "max_difference": pytest.approx(0, abs=1e-12), "sign_agreement": 1.0,
            "cells": min(20.0, found.values.numel()),
        }  # fmt: skip
    edges = interp.edge_attribution(linear, [CLEAN], [CORRUPT], metric, direction=direction, audit=30)
    assert edges.audit["max_difference"] < 1e-12
    assert edges.effects.nan_to_num(0).abs().max() > 1e-2


@pytest.mark.parametrize("name", [n for n in ALL if n != "mixtral"])  # routing jumps, gradients do not see it
def test_integrated_gradients_are_complete_over_a_cut(name):
    model, metric = case(name)
    gaps = []
    for steps in (8, 64):
        found = interp.attribution_patching(model, [CLEAN], [CORRUPT], metric, steps=steps, audit=0)
        gaps.append(float((found.effects.sum(1) - (found.clean - found.corrupt)).abs().max()))
    scale = max(abs(found.clean), abs(found.corrupt))
    assert gaps[1] < 0.02 * scale
    assert gaps[1] < 0.5 * gaps[0] or gaps[0] < 1e-3 * scale
    plain = interp.attribution_patching(model, [CLEAN], [CORRUPT], metric, audit=0)
    assert (plain.effects.sum(1) - (plain.clean - plain.corrupt)).abs().max() > 10 * gaps[1]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-j"])
def test_first_order_is_gradient_times_difference(name):
    model, metric = case(name)
    site = "blocks.1.attn.hook_z"
    target = lambda logits: metric(logits[:, -1].double())
    acts = model.capture([CORRUPT], site, gradient_of=target)
    product = acts.gradients[site] * (model.capture([CLEAN], site)[site] - acts[site])
    found = interp.attribution_patching(
        model, [CLEAN], [CORRUPT], metric, sites="z", by=("head", "layer", "position"), layers=1
    )
    close(model, found.effects[:, 0], product[0].sum(-1).T)


def test_one_step_is_the_gradient_half_way():
    model, metric = case()
    site = "blocks.1.hook_resid_post"
    clean, corrupt = (model.capture([ids], site)[site] for ids in (CLEAN, CORRUPT))
    half = interp.Set(site, value=(clean + corrupt) / 2)
    target = lambda logits: metric(logits[:, -1].double())
    slope = model.capture([CORRUPT], site, plan=half, gradient_of=target).gradients[site]
    found = interp.attribution_patching(
        model, [CLEAN], [CORRUPT], metric, sites="resid_post", steps=1, layers=[0, 1], audit=0
    )
    close(model, found.effects[1], (slope * (clean - corrupt))[0].sum(-1))


def test_gradients_of_all_cells_cost_one_backward_pass(monkeypatch):
    model, metric = case()
    calls, passes, plain = [], [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or plain(*a, **k))
    handle = model.module.register_forward_hook(lambda *a: calls.append(1))
    interp.attribution_patching(model, [CLEAN], [CORRUPT], metric, sites=["resid_pre", "mlp_out", "z"], audit=0)
    handle.remove()
    assert (len(calls), len(passes)) == (2, 1)


def test_a_grid_takes_few_forwards():
    model, metric = case()
    calls = []
    handle = model.module.register_forward_hook(lambda *a: calls.append(1))
    interp.patch_grid(model, [CLEAN], [CORRUPT], metric)
    handle.remove()
    assert len(calls) == 3


@pytest.mark.parametrize("name", DENSE)
def test_edges_of_a_source_sum_to_its_own_first_order_effect(name):
    model, metric = case(name)
    edges = interp.edge_attribution(model, [CLEAN], [CORRUPT], metric, audit=0)
    out = edges.effects.nan_to_num(0).sum(1)
    assert len(out) == 1 + model.n_layers * (model.layout.n_heads + 1)
    nodes = lambda site, by: (
        interp.attribution_patching(model, [CLEAN], [CORRUPT], metric, sites=site, by=by, audit=0).effects
    )
    wanted = torch.cat([nodes("z", ("layer", "head")), nodes("mlp_out", "layer")[:, None]], 1).flatten()
    # The model's own RMSNorm computes in float32.
    torch.testing.assert_close(out[1:], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[0], nodes("hook_embed", ()), rtol=1e-5, atol=1e-5)


def test_an_edge_of_a_mixture_of_experts_ends_at_its_own_norm():
    model, metric = case("mixtral")
    edges = interp.edge_attribution(model, [CLEAN], [CORRUPT], metric, audit=0)
    nodes = interp.attribution_patching(
        model, [CLEAN], [CORRUPT], metric, sites="z", by=("layer", "head"), audit=0
    ).effects
    heads = [i for i, name in enumerate(edges.axes["source"]) if "H" in name]
    torch.testing.assert_close(edges.effects.nan_to_num(0).sum(1)[heads], nodes.flatten(), rtol=1e-3, atol=1e-4)


# Paths ---------------------------------------------------------------------------------------------------------------


def read_out(model, x):
    """Final norm and unembedding by the model's own modules."""
    layout = model.layout
    part = lambda path: model.module.get_submodule(path)
    return part(layout.unembed)(part(layout.final_norm)(x))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neo", "neox-parallel", "neox-sequential", "gpt-j", "phi", "starcoder2"])
def test_head_to_logits_is_the_final_stream_with_the_heads_exchanged(name):
    model, metric = case(name)
    found = interp.path_patch(model, metric, [CLEAN], [CORRUPT])
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    sites = [last, "blocks.*.attn.hook_z"]
    clean, corrupt = (model.capture([ids], sites, positions="last") for ids in (CLEAN, CORRUPT))
    for layer in range(model.n_layers):
        z = f"blocks.{layer}.attn.hook_z"
        module = model.module.get_submodule(model.layout.block(layer, model.layout.o))
        bias = module(torch.zeros(1, clean[z][0, 0].numel(), dtype=torch.float64))
        for head in range(model.layout.n_heads):
            change = torch.zeros_like(clean[z][0])
            change[0, head] = (corrupt[z] - clean[z])[0, 0, head]
            moved = clean[last][0] + (module(change.flatten(1)) - bias)
            wanted = metric(read_out(model, moved)[0].double())
            assert float(found.values[layer, head]) == pytest.approx(float(wanted.detach()), rel=1e-6, abs=1e-6)
    assert found.effects.abs().max() > 1e-2


@pytest.mark.parametrize("name", [n for n in DENSE if not n.startswith("gemma")])
def test_with_frozen_norms_head_to_logits_is_the_linear_score(name):
    model, metric = case(name)
    found = interp.path_patch(model, metric, [CLEAN], [CORRUPT], freeze_norms=True)
    clean = interp.direct_attribution(model, metric, [CLEAN]).heads.double()
    scales = [f"{norm}.hook_scale" for norm in model.bindings.norms]
    sites = ["blocks.*.attn.hook_z", *scales]
    here, other = (model.capture([ids], sites) for ids in (CLEAN, CORRUPT))
    held = [interp.Set(site, value=here[site]) for site in scales]
    held += [interp.Set(site, value=other[site]) for site in other if site.endswith("hook_z")]
    corrupt = interp.direct_attribution(model, metric, [CLEAN], plan=held).heads.double()
    torch.testing.assert_close(found.effects.double(), corrupt - clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "freeze"), [*((n, "all") for n in ALL), *((n, "heads") for n in ("llama", "gemma2", "gpt-j"))]
)
def test_sender_to_receiver_is_the_three_runs_by_hand(name, freeze):
    model, metric = case(name)
    kv = "H" if model.layout.n_heads == model.layout.n_kv_heads else "KV"
    receivers = ["L2H3.q", f"L2{kv}1.k", f"L2{kv}0.v", "L1MLP"]
    found = interp.path_patch(model, metric, [CLEAN], [CORRUPT], ["L0H2", "L0MLP"], receivers, freeze=freeze)
    parts = ("attn.hook_z", "hook_mlp_out") if freeze == "all" else ("attn.hook_z",)
    z, out = "blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"
    read = ["blocks.2.attn.hook_q", "blocks.2.attn.hook_k", "blocks.2.attn.hook_v", "blocks.1.mlp.hook_out"]
    base = model.capture([CLEAN], ["blocks.*.attn.hook_z", "blocks.*.hook_mlp_out"])
    hold = [interp.Set(f"blocks.{i}.{p}", base[f"blocks.{i}.{p}"]) for i in range(3) for p in parts]
    for index, change in enumerate(
        (interp.Patch(z, [CORRUPT], head=2, positions=list(range(7))), interp.Patch(out, [CORRUPT]))
    ):
        seen = model.capture([CLEAN], read, plan=[*hold, change])
        plan = [
            *(interp.Set(site, seen[site][:, :, [h]], head=h) for site, h in zip(read, (3, 1, 0), strict=False)),
            interp.Set(read[3], seen[read[3]]),
        ]  # fmt: skip
        close(model, found.values[index], measured(model, metric, CLEAN, plan))
    assert found.effects.abs().max() > 1e-4


def test_a_path_may_be_narrowed_to_positions():
    model, metric = case()
    narrowed = interp.path_patch(
        model, metric, [CLEAN], [CORRUPT], "L0H2", "L2H1.q", positions=[2, 5], receiver_positions="last"
    )
    z, q = "blocks.0.attn.hook_z", "blocks.2.attn.hook_q"
    base = model.capture([CLEAN], ["blocks.*.attn.hook_z", "blocks.*.hook_mlp_out"])
    hold = [interp.Set(site, base[site]) for site in base]
    seen = model.capture([CLEAN], q, plan=[*hold, interp.Patch(z, [CORRUPT], head=2, positions=[2, 5])])
    # Without positions 2 and 5 at the last token, nothing of the sender reaches it directly.
    assert narrowed.values.shape == (1,)
    step = interp.Set(q, seen[q][:, [-1]][:, :, [1]], head=1, positions=-1)
    close(model, narrowed.values[0], measured(model, metric, CLEAN, step))
    everywhere = interp.path_patch(model, metric, [CLEAN], [CORRUPT], "L0H2", "L2H1.q", positions="last")
    assert float(everywhere.effects.abs().max()) > 1e-5


def test_frozen_patterns_stay_in_the_second_run():
    model, metric = case("gpt2")
    sites = [f"blocks.{i}.attn.hook_pattern" for i in range(3)]
    frozen = interp.path_patch(model, metric, [CLEAN], [CORRUPT], "L0H2", "L1H1.v", freeze_qk=True)
    base = model.capture([CLEAN], ["blocks.*.attn.hook_z", "blocks.*.hook_mlp_out", *sites])
    v = "blocks.1.attn.hook_v"
    hold = [interp.Set(site, base[site]) for site in base if site not in sites]
    change = interp.Patch("blocks.0.attn.hook_z", [CORRUPT], head=2, positions=list(range(7)))
    seen = model.capture([CLEAN], v, plan=[*hold, change])[v][:, :, [1]]
    plan = [*(interp.Set(site, base[site]) for site in sites), interp.Set(v, seen, head=1)]
    close(model, frozen.values[0], measured(model, metric, CLEAN, plan))
    loose = interp.path_patch(model, metric, [CLEAN], [CORRUPT], "L0H2", "L1H1.v")
    assert abs(float(frozen.values[0] - loose.values[0])) > 1e-6


# Results and refusals ------------------------------------------------------------------------------------------------


def test_results_save_print_and_give_records(tmp_path):
    model, metric = case()
    grid = interp.attribution_patching(model, [CLEAN, CLEAN], [CORRUPT, CORRUPT], metric, audit=6)
    rows = grid.to_records()
    assert len(rows) == 21
    assert {"layer", "position", "token", "value", "effect", "normalised", "error", "exact effect"} == set(rows[0])
    assert sum(r["exact effect"] is not None for r in rows) == 6
    assert abs(grid.top(3)[0]["effect"]) == pytest.approx(float(grid.effects.abs().max()))
    assert "exact patching of 6 cells" in repr(grid.table())
    save_result(grid, tmp_path / "grid")
    back = load_result(tmp_path / "grid")
    assert torch.equal(back.runs, grid.runs)
    assert torch.equal(back.audited, grid.audited)
    assert back.to_records() == rows
    assert back.axes == grid.axes
    again = interp.attribution_patching(model, [CLEAN, CLEAN], [CORRUPT, CORRUPT], metric, audit=6)
    assert torch.equal(again.audited, grid.audited)


def test_a_metric_that_does_not_tell_the_runs_apart_has_no_normalised_form():
    model, metric = case()
    grid = interp.patch_grid(model, [CLEAN], [CLEAN], metric, by="layer")
    with pytest.warns(UserWarning, match="both measure"):
        assert grid.normalised.isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(r["normalised"] != r["normalised"] for r in grid.to_records())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sites": "resid"}, ArgumentError, "did you mean 'resid_"), ({"sites": []}, ArgumentError, "no sites"),
        ({"by": ("layer", "token")}, ArgumentError, "distinct names among layer"),
        ({"by": ("layer", "head")}, ArgumentError, "a site with a head axis"),
        ({"heads": [0]}, ArgumentError, "a site with a head axis"),
        ({"sites": "k", "by": "head", "heads": [3]}, ArgumentError, "head 3 at blocks.0.attn.hook_k; needed: 0-1"),
        ({"sites": ["q", "k"], "by": ("layer", "head")}, ArgumentError, "different heads"),
        ({"sites": "hook_embed"}, ArgumentError, "a site of a block"), ({"layers": [3]}, ArgumentError, "layers 0-2"),
        ({"layers": []}, ArgumentError, "at least one layer"), ({"positions": []}, ArgumentError, "no positions"),
        ({"positions": [7]}, PositionError, "position 7"), ({"position": 9}, PositionError, "position 9"),
        ({"direction": "clean"}, ArgumentError, "'denoise'"), ({"batch_size": 0}, ArgumentError, "batch_size=0"),
        ({"sites": "blocks.*.nothing"}, SiteError, "unknown site"), ({"position": None}, ArgumentError, "one position"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(options, error, text, unchecked):
    model, metric = case()
    with pytest.raises(error, match=text):
        interp.patch_grid(model, [CLEAN], [CORRUPT], metric, **options)


def test_prompts_and_metrics_that_do_not_fit_are_refused(unchecked):
    model, metric = case()
    grid = lambda clean, corrupt, m=metric, **o: interp.patch_grid(model, clean, corrupt, m, **o)
    with pytest.raises(ArgumentError, match="clean has 7 tokens, corrupt 6; patching needs equal lengths"):
        grid([CLEAN], [CORRUPT[:6]])
    with pytest.raises(ArgumentError, match="clean has 7 tokens, corrupt 6 in pair 1"):
        grid([CLEAN, CLEAN], [CORRUPT, CORRUPT[:6]])
    with pytest.raises(ArgumentError, match="2 clean prompts and 1 corrupt"):
        grid([CLEAN, CLEAN], [CORRUPT])
    with pytest.raises(ArgumentError, match="name positions="):
        grid([CLEAN, CLEAN[:5]], [CORRUPT, CORRUPT[:5]])
    with pytest.raises(ArgumentError, match="1 observables for 2 pairs"):
        grid([CLEAN, CLEAN], [CORRUPT, CORRUPT], [metric])
    with pytest.raises(ArgumentError, match=r"needed: a tensor \[1\]"):
        grid([CLEAN], [CORRUPT], lambda logits: logits, batch_size=1)
    with pytest.raises(ArgumentError, match="an Observable, one for each pair"):
        grid([CLEAN], [CORRUPT], "logit")
    with pytest.raises(ArgumentError, match="a metric of the logits"):
        grid([CLEAN], [CORRUPT], interp.Observable.from_residual(torch.ones(WIDTH), site="blocks.1.hook_resid_post"))
    with pytest.raises(ArgumentError, match="position=None: it names its own"):
        grid([CLEAN], [CORRUPT], interp.Observable.sequence(model, [(2, 5), (3, 7)]))
    with pytest.raises(ArgumentError, match="an axis 'layer'"):
        interp.attribution_patching(model, [CLEAN], [CORRUPT], metric, by="position")
    with pytest.raises(ArgumentError, match="which is 0"):
        interp.attribution_patching(model, [CLEAN], [CORRUPT], "kl", direction="noise")
    with pytest.raises(ArgumentError, match="steps=0"):
        interp.attribution_patching(model, [CLEAN], [CORRUPT], metric, steps=0)


def test_sites_and_models_that_cannot_be_patched_are_refused():
    model, metric = case("gpt-j")
    with pytest.raises(SiteUnavailableError, match="both read the block's input"):
        interp.patch_grid(model, [CLEAN], [CORRUPT], metric, sites="resid_mid")
    image = interp.attach(build("vit"))
    with pytest.raises(SiteUnavailableError, match="patching ViT"):
        interp.patch_grid(image, inputs_for("vit")[:1], inputs_for("vit")[1:], "kl")
    encoder, metric = case("bert")
    with pytest.raises(SiteUnavailableError, match="one residual stream"):
        interp.edge_attribution(encoder, [CLEAN], [CORRUPT], metric)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"senders": "L3H0"}, "layer 3 of L3H0"), ({"senders": "L0H4"}, "4 query heads"), ({"senders": "H1"}, "'L9H6'"),
        ({"senders": []}, "no senders"), ({"receivers": []}, "at least one"), ({"receivers": "L1H0.x"}, "'L10H7.q'"),
        ({"receivers": ["logits", "L1MLP"]}, "the logits by themselves"),
        ({"receivers": "L2H3.k"}, "query heads 2-3 read key/value head 1"),
        ({"receivers": "L2H3"}, "'L2H3.q', 'L2KV1.k' or 'L2KV1.v'"), ({"receivers": "L2KV2.k"}, "2 key/value heads"),
        ({"receivers": "L2KV1.q"}, "'L2KV1.k'"), ({"senders": "L2H1", "receivers": "L1MLP"}, "path goes backwards"),
        ({"receivers": "L0H1.q"}, "receivers that heads can reach"), ({"freeze": "none"}, "'all' or 'heads'"),
        ({"senders": "L0H1", "receivers": "L2H1.q", "freeze_qk": True}, "other than queries and keys"),
    ],
)  # fmt: skip
def test_paths_that_do_not_exist_are_refused(options, text, unchecked):
    model, metric = case()
    with pytest.raises(ArgumentError, match=text):
        interp.path_patch(model, metric, [CLEAN], [CORRUPT], **options)


def test_the_model_is_left_as_it_was_also_after_an_exception(unchecked):
    model, metric = case()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())
    state = {k: v.clone() for k, v in model.module.state_dict().items()}
    before, plain = hooks(), model.run([CLEAN])

    def fails(logits):
        if logits.requires_grad or len(logits) > 1:
            raise RuntimeError("stop")
        return logits[:, 3]

    with pytest.raises(RuntimeError, match="stop"):
        interp.patch_grid(model, [CLEAN], [CORRUPT], fails)
    with pytest.raises(RuntimeError, match="stop"):
        interp.attribution_patching(model, [CLEAN], [CORRUPT], fails)
    interp.edge_attribution(model, [CLEAN], [CORRUPT], metric, audit=2)
    interp.patch_grid(model, [CLEAN], [CORRUPT], metric, sites="pattern", by="layer")
    assert hooks() == before
    assert all(torch.equal(v, state[k]) for k, v in model.module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())
    assert torch.equal(model.run([CLEAN]), plain)
