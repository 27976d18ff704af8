"""Each kind of intervention against its own formula, and where it takes hold."""

import numpy as np
import pytest
import torch

import interp
from interp.hooks.errors import InterventionError, InterventionNotAppliedError, PositionError, SiteError
from tests.cases import HEADS, IDS, MIXED, VOCAB, WIDTH, build, build_cnn, inputs_for

SITE, Z, K = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_k"
IDS = torch.tensor(IDS)
OTHER = (IDS * 7 + 3) % VOCAB
VECTOR = torch.linspace(-1, 1, WIDTH)


def close(left, right, tolerance=1e-6):
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def model():
    return interp.attach(build("llama"))


def changed(model, plan, site=SITE, inputs=IDS, **options):
    """The site under a plan, and without one."""
    return (model.capture(inputs, site, plan=plan, **options)[site], model.capture(inputs, site, **options)[site])


DIRECTIONS = torch.stack([VECTOR, VECTOR.cos()])


def _projector(rows):
    return torch.eye(rows.shape[1]) - rows.T @ torch.linalg.inv(rows @ rows.T) @ rows


@pytest.mark.parametrize(("step", "formula"), [
    (interp.Set(SITE, VECTOR), lambda v: VECTOR.expand_as(v)),
    (interp.Set(SITE, 0.5), lambda v: torch.full_like(v, 0.5)),
    (interp.Add(SITE, VECTOR, scale=-2.0), lambda v: v - 2 * VECTOR),
    (interp.Scale(SITE, 3.0), lambda v: v * 3),
    (interp.Scale(SITE, VECTOR), lambda v: v * VECTOR),
    (interp.Zero(SITE), torch.zeros_like),
    (interp.Mean(SITE), lambda v: v.mean((0, 1), keepdim=True).expand_as(v)),
    (interp.ProjectOut(SITE, DIRECTIONS), lambda v: v @ _projector(DIRECTIONS)),
    (interp.ProjectOut(SITE, VECTOR), lambda v: v @ _projector(VECTOR[None])),
    (interp.Erase(SITE, DIRECTIONS.T, DIRECTIONS, VECTOR), lambda v: v - (v - VECTOR) @ DIRECTIONS.T @ DIRECTIONS),
    (interp.Function(SITE, torch.tanh), torch.tanh),
], ids=lambda x: getattr(x, "kind", ""))  # fmt: skip
def test_each_kind_follows_its_formula(model, step, formula):
    new, old = changed(model, [step])
    close(new, formula(old), 1e-5)
    later = model.capture(IDS, "blocks.2.hook_resid_pre", plan=[step])["blocks.2.hook_resid_pre"]
    close(later, formula(old), 1e-5)
    assert not torch.equal(model.run(IDS, plan=[step]), model.run(IDS))


def test_steps_at_one_site_are_applied_in_order(model):
    new, old = changed(model, [interp.Add(SITE, VECTOR), interp.Scale(SITE, 2.0)])
    close(new, (old + VECTOR) * 2, 1e-5)
    new, old = changed(model, [interp.Scale(SITE, 2.0), interp.Add(SITE, VECTOR)])
    close(new, old * 2 + VECTOR, 1e-5)


def test_project_out_is_a_projection(model):
    once, _ = changed(model, [interp.ProjectOut(SITE, DIRECTIONS)])
    twice, _ = changed(model, [interp.ProjectOut(SITE, DIRECTIONS)] * 2)
    close(once, twice, 1e-5)
    close(once @ DIRECTIONS.T, torch.zeros(2, 7, 2), 1e-4)
    with pytest.raises(InterventionError, match="dependent"):
        model.run(IDS, plan=[interp.ProjectOut(SITE, torch.stack([VECTOR, 2 * VECTOR]))])
    with pytest.raises(InterventionError, match="32"):
        model.run(IDS, plan=[interp.ProjectOut(SITE, torch.ones(5))])


def test_mean_over_a_data_set_counts_real_tokens_only(model):
    rows = [model.capture([row], SITE)[SITE][0] for row in MIXED]
    wanted = torch.cat(rows).mean(0)
    for side in ("left", "right"):
        new, old = changed(model, [interp.Mean(SITE, over=model.batch(MIXED, side))])
        close(new, wanted.expand_as(old), 1e-5)
    own = model.capture(MIXED, SITE, plan=[interp.Mean(SITE)])
    close(own.real(SITE), wanted.expand_as(own.real(SITE)), 1e-5)
    head = model.capture(IDS, Z, plan=[interp.Mean(Z, over=MIXED, head=2)])[Z]
    z = torch.cat([model.capture([row], Z)[Z][0] for row in MIXED]).mean(0)
    close(head[..., 2, :], z[2].expand(2, 7, -1), 1e-5)


# Heads and positions


@pytest.mark.parametrize(("site", "head"), [(Z, 2), (Z, (0, 3)), (K, 1), (K, (1,)), ("blocks.1.attn.hook_q", 3)])
def test_only_the_named_heads_change(model, site, head):
    new, old = changed(model, [interp.Add(site, 1.5, head=head)], site)
    text, _ = changed(model, [interp.Add(str(interp.Site(site, head=tuple(np.atleast_1d(head).tolist()))), 1.5)], site)
    wanted = old.clone()
    wanted[:, :, [head] if isinstance(head, int) else list(head)] += 1.5
    close(new, wanted)
    assert torch.equal(text, new)


def test_a_key_head_feeds_its_group_of_query_heads(model):
    new, old = changed(model, [interp.Add(K, VECTOR[:8], head=1)], "blocks.1.attn.hook_attn_scores")
    moved = ((new - old).abs().amax((0, 2, 3)) > 1e-4).tolist()
    assert moved == [False, False, True, True]


def test_a_pattern_head(model):
    site = "blocks.1.attn.hook_pattern"
    new, old = changed(model, [interp.Zero(site, head=3, positions=[2, -1])], site)
    wanted = old.clone()
    wanted[:, 3, [2, 6]] = 0
    close(new, wanted)


@pytest.mark.parametrize(("positions", "rows"), [
    (2, [[2], [2]]), ([1, 4], [[1, 4], [1, 4]]), (-1, [[6], [6]]), ("last", [[6], [6]]), ([[0], [5]], [[0], [5]]),
    ([[1, -1], [-3, 2]], [[1, 6], [4, 2]]), (torch.tensor([3]), [[3], [3]]),
    (torch.tensor(3), [[3], [3]]), (np.array([1, 4]), [[1, 4], [1, 4]]), (np.int64(2), [[2], [2]]),
    ([np.int64(2)], [[2], [2]]),
])  # fmt: skip
def test_only_the_named_positions_change(model, positions, rows):
    new, old = changed(model, [interp.Add(SITE, VECTOR, positions=positions)])
    wanted = old.clone()
    for example, row in enumerate(rows):
        wanted[example, row] += VECTOR
    close(new, wanted)
    read = model.capture(IDS, SITE, positions)[SITE]
    close(read, torch.stack([old[i, row] for i, row in enumerate(rows)]), 0)


def test_values_by_position_and_example(model):
    value = torch.randn(2, 2, WIDTH)
    new, old = changed(model, [interp.Set(SITE, value, positions=[[4, 1], [2, 3]])])
    wanted = old.clone()
    wanted[0, [4, 1]], wanted[1, [2, 3]] = value[0], value[1]
    close(new, wanted, 0)


def test_positions_in_text(tokenizer):
    model = interp.attach(build("llama"), tokenizer)
    text = "the cat sat on the mat"
    assert torch.equal(model.capture(text, SITE, "cat sat")[SITE], model.capture(text, SITE, [1, 2])[SITE])
    assert torch.equal(model.capture(text, SITE, "mat")[SITE], model.capture(text, SITE, "last")[SITE])
    with pytest.raises(PositionError, match="2 times"):
        model.capture(text, SITE, "the")
    with pytest.raises(PositionError, match="0 times"):
        model.capture(text, SITE, "dog")


def test_globs_change_every_match(model):
    new = model.capture(IDS, "blocks.*.hook_mlp_out", plan=[interp.Zero("blocks.*.hook_mlp_out")])
    assert len(new) == 3
    assert all(v.abs().max() == 0 for v in new.values())


# Patches


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "neox-parallel", "granite", "bert"])
def test_patching_a_run_with_itself_changes_nothing(name):
    model = interp.attach(build(name))
    ids = inputs_for(name)
    plain = model.run(ids)
    exact = [r["site"] for r in model.sites("blocks.1.*") if not any(w in r["site"] for w in ("scale", "normalized"))]
    for site in exact:
        bitwise = not (name == "granite" and site.endswith("_out"))  # divided and multiplied by 0.22
        close(model.run(ids, plan=[interp.Patch(site, ids)]), plain, 0 if bitwise else 1e-5)
    for site in ("blocks.1.ln1.hook_scale", "blocks.1.ln2.hook_normalized", "ln_final.hook_scale"):
        if site in model.bindings.by_address:
            close(model.run(ids, plan=[interp.Patch(site, ids)]), plain, 2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "neox-parallel", "bert"])
def test_patching_a_whole_layer_gives_the_other_run(name):
    model = interp.attach(build(name))
    acts = model.capture(OTHER, SITE)
    for source in (OTHER, acts, acts[SITE]):
        close(model.run(IDS, plan=[interp.Patch(SITE, source)]), model.run(OTHER), 0)


def test_patch_one_head_at_one_position(model):
    other = model.capture(OTHER, Z)
    for source in (OTHER, other, model.capture(OTHER, f"{Z}#2"), model.capture(OTHER, f"{Z}#2@4")):
        new, old = changed(model, [interp.Patch(Z, source, head=2, positions=4)], Z)
        wanted = old.clone()
        wanted[:, 4, 2] = other[Z][:, 4, 2]
        close(new, wanted, 0)


def test_patch_between_positions_and_sites(model):
    other = model.capture(OTHER, "blocks.0.hook_resid_post")["blocks.0.hook_resid_post"]
    step = interp.Patch(SITE, OTHER, from_site="blocks.0.hook_resid_post", positions=[5], from_positions=[1])
    new, old = changed(model, [step])
    wanted = old.clone()
    wanted[:, 5] = other[:, 1]
    close(new, wanted, 0)


def test_a_captured_source_is_read_at_the_named_positions(model):
    full = model.capture(OTHER, SITE)[SITE]
    step = interp.Patch(SITE, model.capture(OTHER, SITE, positions=[2, 5]), positions=[5])
    new, _ = changed(model, [step])
    close(new[:, 5], full[:, 5], 0)
    with pytest.raises(InterventionError, match="captured"):
        model.run(IDS, plan=[interp.Patch(SITE, model.capture(OTHER, SITE, positions=[2]), positions=[5])])
    step = interp.Patch(SITE, model.capture(OTHER, SITE, positions=[2]), positions=[5], from_positions=[2])
    close(changed(model, [step])[0][:, 5], full[:, 2], 0)


def test_patch_within_one_run(model):
    step = interp.Patch(SITE, from_site="blocks.0.hook_resid_post")
    new = model.capture(IDS, [SITE, "blocks.0.hook_resid_post"], plan=[step])
    close(new[SITE], new["blocks.0.hook_resid_post"], 0)
    step = interp.Patch(SITE, from_site="blocks.0.hook_resid_post", positions=[6], from_positions=[0])
    new = model.capture(IDS, [SITE, "blocks.0.hook_resid_post"], plan=[step])
    close(new[SITE][:, 6], new["blocks.0.hook_resid_post"][:, 0], 0)
    for later in ("blocks.2.hook_resid_post", SITE):
        with pytest.raises(InterventionError, match="before"):
            model.run(IDS, plan=[interp.Patch(SITE, from_site=later)])
    modules = interp.attach(build("llama"), layout="modules")
    with pytest.raises(InterventionError, match="before"):
        modules.run(IDS, plan=[interp.Patch("model.layers.0.mlp", from_site="model.layers.1.mlp")])


def test_patch_sources_that_do_not_fit(model):
    with pytest.raises(InterventionError, match="equal lengths"):
        model.run(IDS, plan=[interp.Patch(SITE, [[3, 4]])])
    with pytest.raises(InterventionError, match="examples"):
        model.run(IDS, plan=[interp.Patch(SITE, torch.ones(3, 7, dtype=torch.long))])
    one = model.capture(OTHER[:1], SITE)[SITE]
    close(changed(model, [interp.Patch(SITE, OTHER[:1])])[0], one.expand(2, -1, -1), 0)


# Where an edit takes hold


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "granite", "neox-sequential"])
def test_resid_mid_feeds_the_mlp_and_the_skip(name):
    model = interp.attach(build(name))
    ids = inputs_for(name)
    sites = [f"blocks.1.{n}" for n in ("hook_resid_mid", "hook_mlp_out", "hook_resid_post")]
    mid, mlp, post = model.capture(ids, sites, plan=[interp.Add(sites[0], VECTOR)]).values()
    old_mid, old_mlp, _ = model.capture(ids, sites).values()
    close(mid, old_mid + VECTOR, 1e-5)
    assert (mlp - old_mlp).abs().max() > 1e-3
    close(post, mid + mlp, 1e-5)


def test_resid_mid_equals_a_forward_made_by_hand(model):
    layer = model.module.model.layers[1]
    mid = model.capture(IDS, "blocks.1.hook_resid_mid")["blocks.1.hook_resid_mid"] + VECTOR
    with torch.no_grad():
        wanted = mid + layer.mlp(layer.post_attention_layernorm(mid))
    close(changed(model, [interp.Add("blocks.1.hook_resid_mid", VECTOR)])[0], wanted, 1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_norm_sites_see_each_others_edits(name):
    model, block = interp.attach(build(name)), "blocks.1.ln2"
    sites = [f"{block}.hook_{n}" for n in ("scale", "normalized", "out")]
    scale, normalized, _ = model.capture(IDS, sites).values()
    norm = model.bindings.norms[block]
    two = model.capture(IDS, sites, plan=[interp.Scale(sites[0], 2.0)])
    close(two[sites[0]], 2 * scale, 1e-5)
    close(two[sites[1]], normalized / 2, 1e-5)
    close(two[sites[2]], norm.finish(normalized / 2).detach(), 1e-5)
    both = model.capture(IDS, sites, plan=[interp.Scale(sites[0], 2.0), interp.Add(sites[1], VECTOR)])
    close(both[sites[1]], normalized / 2 + VECTOR, 1e-5)
    close(both[sites[2]], norm.finish(normalized / 2 + VECTOR).detach(), 1e-5)


def test_an_edit_outside_the_run_is_an_error():
    class Switch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    model = interp.attach(Switch())
    model.run(torch.ones(1, 3), plan=[interp.Zero("a")])
    with pytest.raises(InterventionNotAppliedError, match="b"):
        model.run(torch.ones(1, 3), plan=[interp.Zero("b")])
    with pytest.raises(InterventionNotAppliedError):
        model.capture(torch.ones(1, 3), "a", plan=[interp.Zero("b")])
    with pytest.raises(SiteError, match="nothing was read"):
        model.capture(torch.ones(1, 3), "b")


def test_users_tensors_are_never_written():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True))
    model, value = interp.attach(module), -torch.ones(2, 4)
    acts = model.capture(torch.ones(2, 4), "0")
    kept = acts["0"].clone()
    for source in (interp.Set("0", value), interp.Add("0", value), interp.Patch("0", value), interp.Patch("0", acts)):
        model.run(torch.ones(2, 4), plan=[source])
    model.run(torch.ones(2, 4), plan=[interp.Function("0", lambda v: value)])
    assert torch.equal(value, -torch.ones(2, 4))
    assert torch.equal(acts["0"], kept)
    assert model.run(torch.ones(2, 4), plan=[interp.Set("0", -1.0)]).abs().max() == 0
    x = torch.ones(2, 4)
    model.run(x, plan=[interp.Scale("0:in", 2.0)])
    assert torch.equal(x, torch.ones(2, 4))


def test_captured_tensors_are_copies(model):
    acts = model.capture(IDS, "*")
    logits = model.run(IDS)
    for value in acts.values():
        value.fill_(7.0)
    assert torch.equal(model.run(IDS), logits)


def test_in_place_units_do_not_change_what_was_read():
    module, x = build_cnn(), torch.randn(2, 3, 6, 6)
    acts = interp.attach(module).capture(x, ["norm", "skip"])
    with torch.no_grad():
        before = module.norm(module.conv(x))
    assert (before < 0).any()
    close(acts["norm"], before, 0)
    assert (acts["skip"] < 0).any()


def test_functions_that_return_nonsense(model, unchecked):
    for fn in (lambda v: None, lambda v: v[:1], lambda v: 3.0):
        with pytest.raises(InterventionError, match="returned"):
            model.run(IDS, plan=[interp.Function(SITE, fn)])
    with pytest.raises(InterventionError, match="broadcast"):
        model.run(IDS, plan=[interp.Add(SITE, torch.ones(5))])
    with pytest.raises(InterventionError, match="number or a tensor"):
        model.run(IDS, plan=[interp.Set(SITE)])
    with pytest.raises(InterventionError, match="type str"):
        model.run(IDS, plan=["blocks.1.hook_resid_pre"])


def test_values_come_to_the_models_dtype():
    model = interp.attach(build("llama", dtype=torch.bfloat16))
    new, _ = changed(model, [interp.Set(SITE, VECTOR.double())])
    assert new.dtype == torch.bfloat16
    close(new, VECTOR.bfloat16().expand_as(new), 0)
    assert model.layout.n_heads == HEADS
