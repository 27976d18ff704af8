"""Jacobians of every family against autograd through the model's own code, by hooks that are not interp's."""

import pytest
import torch

import interp
from interp.hooks.errors import InputError
from tests.cases import DECODERS, HAND_LAYOUT, IDS, MIXED, build, build_cnn, build_hand, inputs_for

# transformers takes softmax and RMS norms in float32 whatever the dtype, so float64 models agree to that only.
CLOSE = 2e-6


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def dtype_of(name):
    return torch.float32 if name == "mixtral" else torch.float64


BLOCKS = {"gpt2": "transformer.h", "gpt-neo": "transformer.h", "gpt-j": "transformer.h"}
BLOCKS |= dict.fromkeys(("neox-parallel", "neox-sequential"), "gpt_neox.layers")


def oracle(module, blocks, ids, first, last):
    """d (output of block ``last``) / d (input of block ``first``), all positions: [T, d, T, d]."""
    kept = {}
    layers = module.get_submodule(blocks)

    def run(x):
        swap = layers[first].register_forward_pre_hook(lambda m, a, k: ((x, *a[1:]), k), with_kwargs=True)
        keep = layers[last].register_forward_hook(lambda m, a, o: kept.update(y=o[0] if isinstance(o, tuple) else o))
        try:
            module(ids)
        finally:
            swap.remove()
            keep.remove()
        return kept["y"]

    seen = {}
    look = layers[first].register_forward_pre_hook(lambda m, a, k: seen.update(x=a[0]), with_kwargs=True)
    with torch.no_grad():
        module(ids)
    look.remove()
    return torch.autograd.functional.jacobian(run, seen["x"].clone())[0, :, :, 0]


@pytest.mark.parametrize("name", DECODERS)
def test_stream_to_stream_over_blocks(name):
    module, ids = build(name, dtype=dtype_of(name)), inputs_for(name)[:1]
    wanted = oracle(module, BLOCKS.get(name, "model.layers"), ids, 0, 1)
    model = interp.attach(module)
    ends = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")
    whole = interp.jacobian(model, ids, *ends)
    length, d = wanted.shape[:2]
    assert relative(whole.dense()[0], wanted.reshape(length * d, length * d)) < CLOSE
    same = interp.jacobian(model, ids, *ends, positions="same")
    assert len(same) == length
    assert relative(same.dense(), torch.stack([wanted[t, :, t] for t in range(length)])) < CLOSE
    pairs = interp.jacobian(model, ids, *ends, positions=[(2, 5), (0, 6), (3, 3)])
    assert relative(pairs.dense(), torch.stack([wanted[t, :, s] for s, t in ((2, 5), (0, 6), (3, 3))])) < CLOSE
    assert whole.plan.method.startswith("closed")
    assert same.plan.method.endswith("block by block")


HELD = ["frozen", "path", interp.Linearization(norm="frozen"), interp.Linearization("gain", product="split")]


TAPED = [(name, "frozen") for name in ("llama", "gpt2", "olmo2", "neox-parallel", "cohere", "granite", "gemma2")]
TAPED += [(name, held) for name in ("llama", "gemma2") for held in HELD[1:]]


@pytest.mark.parametrize(("name", "held"), TAPED, ids=str)
def test_closed_forms_agree_with_the_taped_network(name, held):
    model, ids = interp.attach(build(name, dtype=dtype_of(name))), inputs_for(name)[:1]
    parallel = model.layout.parallel
    cases = [
        ("blocks.1.hook_resid_pre" if parallel else "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "same"),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", [(5, 5), (1, 5)]),
        ("blocks.1.hook_resid_pre", "logits", [(2, 6)]),
    ]
    for source, target, positions in cases:
        options = {"positions": positions, "linearization": held}
        plain = interp.jacobian(model, ids, source, target, method="autograd", **options)
        fast = interp.jacobian(model, ids, source, target, check=False, method="closed", **options)
        assert relative(fast.dense(), plain.dense()) < CLOSE, (source, target)


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel", "phi"])
def test_float64_is_exact_where_the_model_is(name):
    """These MLPs and their norms run in float64 throughout."""
    model, ids = interp.attach(build(name, dtype=torch.float64)), inputs_for(name)[:1]
    source = "blocks.1.hook_resid_pre" if model.layout.parallel else "blocks.1.hook_resid_mid"
    found = interp.jacobian(model, ids, source, "blocks.1.hook_mlp_out", "same")
    plain = interp.jacobian(model, ids, source, "blocks.1.hook_mlp_out", "same", method="autograd")
    assert relative(found.dense(), plain.dense()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_results(dtype):
    ids = inputs_for("llama")[:1]
    model, wide = interp.attach(build("llama", dtype=dtype)), interp.attach(build("llama", dtype=dtype).float())
    for ends, positions in (((SOURCE, MLP), "same"), (ENDS, [(2, 5)])):
        wanted = interp.jacobian(wide, ids, *ends, positions).dense()
        for method, tolerance in (("closed", 5e-2), ("autograd", 5e-2)):
            found = interp.jacobian(model, ids, *ends, positions, method=method).dense()
            assert found.dtype == torch.float32
            assert relative(found, wanted) < tolerance, (ends, method)


@pytest.fixture(scope="module")
def hand():
    """A model of our own in float64 throughout, with fused attention."""
    module = build_hand().double()
    return interp.attach(module, layout=interp.Layout(**HAND_LAYOUT))


ENDS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")


def test_fused_attention_gives_the_exact_numbers(hand):
    ids = torch.tensor(IDS[:1])
    plain = interp.attach(build_hand(fused=False).double(), layout=interp.Layout(**HAND_LAYOUT))
    for options in ({}, {"method": "autograd"}):
        wanted = interp.jacobian(plain, ids, *ENDS, method="autograd").dense()
        assert relative(interp.jacobian(hand, ids, *ENDS, **options).dense(), wanted) < 1e-11


@pytest.mark.parametrize("method", ["closed", "autograd"])
def test_push_pull_rows_and_columns_are_one_matrix(hand, method):
    ids, rows, columns = torch.tensor(IDS[:1]), [3, -1, 7], [0, 5]
    for positions in (None, (2, 6), [4, 6]):
        found = interp.jacobian(hand, ids, *ENDS, positions, method=method)
        matrix, one = found.dense(), found[len(found) - 1]
        v, w = torch.randn(one.in_shape, dtype=torch.float64), torch.randn(one.out_shape, dtype=torch.float64)
        torch.testing.assert_close(found.matvec(v).flatten(1), matrix @ v.flatten())
        torch.testing.assert_close(found.rmatvec(w).flatten(1), w.flatten() @ matrix)
        torch.testing.assert_close(one.dense(), matrix[-1])
        part = interp.jacobian(hand, ids, *ENDS, positions, method=method, rows=rows, columns=columns)
        spread = matrix.unflatten(1, (-1, 32)).unflatten(3, (-1, 32))[:, :, rows][..., columns]
        torch.testing.assert_close(part.dense(), spread.flatten(3).flatten(1, 2))
        v = torch.randn(part[0].in_shape, dtype=torch.float64)
        torch.testing.assert_close(part.matvec(v).flatten(1), part.dense() @ v.flatten())


def test_chunks_budget_and_batch_mates_change_nothing(hand):
    whole = interp.jacobian(hand, MIXED, *ENDS, "same")
    wanted = whole.dense()
    tight = interp.jacobian(hand, MIXED, *ENDS, "same", budget=wanted.element_size() * 32 * 32 * 4)
    assert tight.plan.maps == 2
    assert tight.plan.probes < whole.plan.probes
    parts = [(span, chunk) for span, chunk in tight]
    assert [span.start for span, _ in parts] == [0, 2, 4, 6, 7, 9, 10, 12, 14]
    torch.testing.assert_close(torch.cat([chunk for _, chunk in parts]), wanted)
    alone = torch.cat([interp.jacobian(hand, [ids], *ENDS, "same").dense() for ids in MIXED])
    assert torch.equal(alone, wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_either_side_changes_nothing(name):
    model = interp.attach(build(name, dtype=torch.float64))
    longest = max(map(len, MIXED))

    def padded(left):
        ids = torch.zeros(len(MIXED), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(MIXED):
            at = slice(longest - len(one), longest) if left else slice(0, len(one))
            ids[row, at], mask[row, at] = torch.tensor(one), 1
        return {"input_ids": ids, "attention_mask": mask}

    wanted = interp.jacobian(model, MIXED, *ENDS, [-1]).dense()
    for left in (True, False):
        for method in ("auto", "autograd"):
            found = interp.jacobian(model, padded(left), *ENDS, [-1], method=method).dense()
            assert relative(found, wanted) < CLOSE


def test_structure(hand):
    """Identity, chain rule, causality, scale invariance behind a norm."""
    ids = torch.tensor(IDS[:1])
    for method in ("closed", "autograd"):
        same = interp.jacobian(hand, ids, ENDS[0], ENDS[0], [4], method=method).dense()[0]
        torch.testing.assert_close(same, torch.eye(32, dtype=torch.float64))
    first = interp.jacobian(hand, ids, ENDS[0], "blocks.0.hook_resid_mid", [4]).dense()[0]
    second = interp.jacobian(hand, ids, "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post", [4]).dense()[0]
    both = interp.jacobian(hand, ids, ENDS[0], "blocks.0.hook_resid_post", [4]).dense()[0]
    torch.testing.assert_close(second @ first, both)
    whole = interp.jacobian(hand, ids, *ENDS).dense()[0].unflatten(0, (7, 32)).unflatten(2, (7, 32))
    assert not any(whole[t, :, s].any() for t in range(7) for s in range(t + 1, 7))
    x = hand.capture(ids, "blocks.0.hook_resid_mid")["blocks.0.hook_resid_mid"][0, 4]
    branch = interp.jacobian(hand, ids, "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out", [4])
    assert branch.matvec(x).norm() < 1e-5 * x.norm()


def test_a_frozen_map_reproduces_the_forward_value():
    """Llama without biases: every branch is a multiple of its input once gates, patterns and divisors are held."""
    module = build("qwen3", dtype=torch.float64)
    model, ids = interp.attach(module), inputs_for("qwen3")[:1]
    x, y = ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_post")
    acts = model.capture(ids, [x, y])
    found = interp.jacobian(model, ids, x, y, linearization="frozen")
    assert relative(found.matvec(acts[x][0])[0], acts[y][0]) < 1e-6
    assert relative(interp.jacobian(model, ids, x, y).matvec(acts[x][0])[0], acts[y][0]) > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "olmo2", "neox-parallel", "granite"])
def test_attention_parts_add_up_and_are_what_the_frozen_others_leave(name):
    model, ids = interp.attach(build(name, dtype=torch.float64)), inputs_for(name)[:1]
    ends, pairs = ("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out"), [(5, 5), (3, 6), (0, 0), (2, 2)]
    found = interp.attention_parts(model, ids, 1, pairs)
    whole = interp.jacobian(model, ids, *ends, pairs, method="autograd").dense()
    assert relative(found.whole, whole) < CLOSE
    held = interp.Linearization(activation="tangent", norm="tangent", attention="frozen", product="tangent")
    value = interp.jacobian(model, ids, *ends, pairs, method="autograd", linearization=held).dense()
    assert relative(found.value, value) < CLOSE
    assert not found.query[1].any()
    assert found.query[0].norm() > 1e-3 * found.value[0].norm()
    heads = [interp.attention_parts(model, ids, 1, pairs, head=i) for i in range(4)]
    for part in ("value", "query", "key"):
        assert relative(sum(getattr(h, part) for h in heads), getattr(found, part)) < 1e-12
    alone = interp.attention_parts(model, ids, 1, pairs, linearization=held)
    assert not alone.pattern.any()
    assert found.to_records()[1]["target"] == 6


def test_query_and_key_parts_by_holding_one_of_them(hand):
    """The key part of position t alone, from a network whose queries are constants."""
    ids, model = IDS[:1], hand
    parts = interp.attention_parts(model, ids, 1, [(5, 5)])
    acts = model.capture(ids, ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_q"])
    queries = interp.Set("blocks.1.attn.hook_q", value=acts["blocks.1.attn.hook_q"][0])
    x = acts["blocks.1.hook_resid_pre"][0]
    v = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def moved(step):
        value = x.clone()
        value[5] += step * v
        plan = [interp.Set("blocks.1.hook_resid_pre", value=value), queries]
        return model.capture(ids, "blocks.1.hook_attn_out", plan=plan)["blocks.1.hook_attn_out"][0, 5]

    difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert relative((parts.value + parts.key)[0] @ v, difference) < 1e-7


SOURCE, MLP = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"


@pytest.mark.parametrize(("name", "target", "held"), [
    ("llama", "hook_resid_post", "exact"), ("llama", "hook_mlp_out", "frozen"), ("gpt2", "hook_mlp_out", "exact"),
    ("granite", "hook_resid_post", "frozen"), ("gemma2", "hook_mlp_out", "exact"),
])  # fmt: skip
def test_summaries_equal_those_of_the_matrices(name, target, held):
    model = interp.attach(build(name, dtype=torch.float64))
    many = [row * 4 for row in MIXED]  # enough tokens for the closed form of a gram matrix to be cheaper
    found = interp.jacobian(model, many, SOURCE, f"blocks.1.{target}", "same", linearization=held)
    dense = found.dense()
    flat = dense.flatten(1)
    wanted = {
        "mean": dense.mean(0), "sum": dense.sum(0), "norm": flat.norm(dim=1), "gram": flat @ flat.T,
        "trace": dense.diagonal(dim1=1, dim2=2).sum(1), "svd:3": torch.linalg.svdvals(dense)[:, :3],
    }  # fmt: skip
    for how, value in wanted.items():
        summary = found.reduce(how)
        assert relative(summary.value, value) < 1e-12, how
        closed = how != "svd:3" and name != "gemma2"
        assert (summary.method == "closed form of the summary") == closed, how
    assert sum(interp.jacobian(model, many, SOURCE, MLP, "same", reduce=len).value) == len(found)


def test_summaries_of_chains_are_streamed(hand):
    found = interp.jacobian(hand, MIXED, *ENDS, "same", budget=100_000)
    dense = torch.cat([chunk.clone() for _, chunk in found])
    flat = dense.flatten(1)
    for how, value in {"mean": dense.mean(0), "gram": flat @ flat.T, "norm": flat.norm(dim=1)}.items():
        summary = found.reduce(how)
        assert "chunk by chunk" in summary.method
        assert relative(summary.value, value) < 1e-12, how


def test_each_is_an_operator(hand):
    one = interp.jacobian(hand, IDS[:1], *ENDS, [(2, 6)])[0]
    matrix = one.dense()
    made = torch.Generator().manual_seed(0)
    v, w = (torch.randn(32, 5, generator=made, dtype=torch.float64) for _ in range(2))
    assert one.shape == (32, 32)
    torch.testing.assert_close(one.matmat(v), matrix @ v)
    torch.testing.assert_close(one.rmatmat(w), matrix.T @ w)
    scipy = one.to_scipy()
    torch.testing.assert_close(torch.from_numpy(scipy @ v.numpy()), matrix @ v)
    torch.testing.assert_close(torch.from_numpy(scipy.T @ w[:, 0].numpy()), matrix.T @ w[:, 0])
    with pytest.raises(InputError, match=r"\[32, n\]"):
        one.matmat(v.T)


def test_svd_of_each(hand):
    found = interp.jacobian(hand, IDS[:1], *ENDS, [3, 6])
    for one, matrix in zip(found.svd(4), found.dense(), strict=True):
        torch.testing.assert_close(one.s, torch.linalg.svdvals(matrix)[:4])
        assert one.residuals.max() < 1e-12
    assert found.reduce("svd:2").to_records()[1]["value"] == pytest.approx(found.svd(2)[1].s.tolist())


@pytest.mark.parametrize("name", ["llama", "bert", "gemma3", "mixtral"])
@pytest.mark.parametrize("held", ["exact", "path"])
def test_a_sweep_gives_the_rows_of_every_site(name, held):
    model, ids = interp.attach(build(name)), inputs_for(name)[:1]
    sites = ["blocks.*.hook_resid_pre", "blocks.1.attn.hook_z"]
    found = interp.row_sweep(model, ids, sites, "logits@-1", rows=[3, 8], linearization=held)
    assert len(found) == 4
    for site, rows in found.items():
        last = ids.shape[1] - 1
        wanted = interp.jacobian(
            model, ids, site, "logits@-1", rows=[3, 8], linearization=held, method="autograd"
        ).dense()
        assert relative(rows.flatten(1), wanted[0]) < 1e-5, (site, last)
    ways = torch.zeros(1, 61)
    ways[0, 3], ways[0, 8] = 1.0, -1.0
    moved = interp.row_sweep(model, ids, sites, "logits@-1", directions=ways, linearization=held)
    for site, rows in found.items():
        assert relative(moved[site][0], rows[0] - rows[1]) < 1e-5


@pytest.mark.parametrize("method", ["auto", "autograd"])
def test_a_vision_network_rows_and_columns(method):
    module = build_cnn().double()
    model = interp.attach(module)
    x = torch.linspace(0, 9, 3 * 36, dtype=torch.float64).sin().reshape(1, 3, 6, 6)
    wanted = torch.autograd.functional.jacobian(module, x)[0, :, 0]
    found = interp.jacobian(model, x, "conv:in", "head", method=method)
    assert found.plan.method.startswith("replay" if method == "auto" else "autograd")
    assert found.plan.flops > 0
    assert relative(found.dense()[0], wanted.flatten(1)) < 1e-12
    v, w = torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.randn(5, *wanted.shape[:1], dtype=torch.float64)
    torch.testing.assert_close(found[0].matvec(v), v.flatten(1) @ wanted.flatten(1).T)
    torch.testing.assert_close(found[0].rmatvec(w).flatten(1), w @ wanted.flatten(1))
    part = interp.jacobian(model, x, "conv:in", "head", rows=[2], columns=[(0, 1, 2), (2, 5, 5)], method=method)
    torch.testing.assert_close(part.dense()[0, 0], torch.stack([wanted[2, 0, 1, 2], wanted[2, 2, 5, 5]]))
    inner = interp.jacobian(model, x, "conv", "head", method=method)
    first = interp.jacobian(model, x, "conv:in", "conv", method=method)
    assert relative(inner.dense()[0] @ first.dense()[0], wanted.flatten(1)) < 1e-12


@pytest.mark.parametrize("held", ["exact", "path"])
def test_image_transformers_are_replayed(held):
    model = interp.attach(build("vit", dtype=torch.float64))
    x, ends = inputs_for("vit")[:1].double(), ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")
    found = interp.jacobian(model, x, *ends, linearization=held)
    plain = interp.jacobian(model, x, *ends, linearization=held, method="autograd")
    assert found.plan.method.startswith("replay")
    assert relative(found.dense(), plain.dense()) < CLOSE
    v = torch.randn(3, *found[0].in_shape, dtype=torch.float64)
    assert relative(found[0].matvec(v).flatten(1), v.flatten(1) @ found.dense()[0].T) < CLOSE


@pytest.mark.parametrize("held", ["exact", "frozen", "path"])
def test_encoders_have_closed_forms(held):
    """Post-norm blocks that see both ways: one position reaches itself through all others."""
    model, ids = interp.attach(build("bert", dtype=torch.float64)), inputs_for("bert")[:1]
    cases = [
        (ENDS, None), (ENDS, "same"), (ENDS, [(2, 5), (5, 2)]), ((SOURCE, MLP), "same"),
        (("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"), [3]),
        (("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out"), [(6, 0)]),
        (("blocks.0.ln1.hook_out", "blocks.2.ln2.hook_out"), [(0, 4)]),
    ]  # fmt: skip
    for ends, positions in cases:
        options = {"positions": positions, "linearization": held}
        found = interp.jacobian(model, ids, *ends, method="closed", **options)
        plain = interp.jacobian(model, ids, *ends, method="autograd", **options)
        assert relative(found.dense(), plain.dense()) < 1e-11, (ends, positions)
        v = torch.randn(found[0].in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert relative(found.matvec(v), plain.matvec(v)) < 1e-11
    alone = interp.jacobian(model, ids, "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", [3])
    assert alone.plan.method.endswith("block by block")


def test_encoders_and_images_against_differences():
    for name, ends in {"bert": SOURCE, "vit": "blocks.1.hook_resid_pre"}.items():
        module = build(name, dtype=torch.float64)
        model, x = interp.attach(module), inputs_for(name)[:1]
        x = x.double() if x.is_floating_point() else x
        found = interp.jacobian(model, x, ends, "blocks.1.hook_resid_post", "same" if name == "bert" else None)
        v = torch.randn(found[0].in_shape, dtype=torch.float64)
        index = len(found) - 1
        value = model.capture(x, ends)[ends]
        step = torch.zeros_like(value)
        step[(0, index) if name == "bert" else 0] = 1e-3 * v
        moved = [
            model.capture(x, "blocks.1.hook_resid_post", plan=[interp.Set(ends, value=value + s * step)])
            for s in (1, -1)
        ]
        difference = (moved[0]["blocks.1.hook_resid_post"] - moved[1]["blocks.1.hook_resid_post"])[0] / 2e-3
        difference = difference[index] if name == "bert" else difference
        assert relative(found[index].matvec(v), difference) < 2e-3


def test_a_wrong_closed_form_is_noticed_named_and_replaced(monkeypatch):
    from interp.jacobians.branches import GateBranch

    model, ids = interp.attach(build("llama")), inputs_for("llama")[:1]
    wanted = interp.jacobian(model, ids, *ENDS, [5], method="autograd").dense()
    right = GateBranch.pull
    monkeypatch.setattr(
        GateBranch, "pull", lambda self, w, span: right(self, w, span) * (1.1 if self.layer == 1 else 1)
    )
    with pytest.warns(interp.FallbackWarning, match=r"blocks\.1\.mlp is off by"):
        found = interp.jacobian(model, ids, *ENDS, [5])
    assert found.plan.method.startswith("autograd")
    assert torch.equal(found.dense(), wanted)


def test_weights_that_modules_compute():
    module, ids = build("llama"), inputs_for("llama")[:1]
    wanted = interp.jacobian(interp.attach(module), ids, *ENDS, [5]).dense()
    torch.nn.utils.parametrizations.weight_norm(module.model.layers[1].mlp.up_proj)
    torch.nn.utils.parametrizations.weight_norm(module.model.layers[0].self_attn.o_proj)
    for method in ("closed", "autograd"):
        found = interp.jacobian(interp.attach(module), ids, *ENDS, [5], method=method)
        assert relative(found.dense(), wanted) < 1e-5


@pytest.mark.parametrize("method", ["auto", "autograd"])
def test_all_sources_of_one_target_in_the_middle(hand, method):
    """Those behind the target are zero."""
    whole = interp.jacobian(hand, IDS[:1], *ENDS).dense()[0].reshape(7, 32, 7, 32)
    found = interp.jacobian(hand, IDS[:1], ENDS[0], f"{ENDS[1]}@4", method=method)
    assert relative(found.dense()[0].reshape(32, 7, 32), whole[4]) < 1e-12
    assert not whole[4][:, 5:].any()


@pytest.mark.parametrize("positions", ["same", [2, 3, 5], [(1, 2), (3, 5)]], ids=str)
def test_what_a_hook_changes_at_one_position_alone_is_noticed(positions):
    module, ids = build("llama"), inputs_for("llama")[:1]
    module.model.layers[1].mlp.register_forward_hook(
        lambda m, a, out: out * (1 + 2 * (torch.arange(out.shape[1]) == 3))[:, None]
    )
    wanted = oracle(module, "model.layers", ids, 0, 1)
    with pytest.warns(interp.FallbackWarning, match=r"blocks\.1\.mlp is off by"):
        found = interp.jacobian(interp.attach(module, check=False), ids, *ENDS, positions)
    at = [(p.sources[0], p.targets[0]) for p in found.places]
    assert relative(found.dense(), torch.stack([wanted[t, :, s] for s, t in at])) < 1e-5


def test_experts_and_their_router():
    """Against autograd, with weights that sum to one and with plain shares; the router's part is not small."""
    module, ids = build("mixtral"), inputs_for("mixtral")[:1]
    model = interp.attach(module)
    found = interp.jacobian(model, ids, SOURCE, MLP, "same", method="closed")
    plain = interp.jacobian(model, ids, SOURCE, MLP, "same", method="autograd")
    assert relative(found.dense(), plain.dense()) < CLOSE
    v, w = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.matvec(v), plain.matvec(v), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.rmatvec(w), plain.rmatvec(w), rtol=1e-4, atol=1e-5)
    branch = found.engines[0].stages[0][1][0]
    branch.outputs = torch.zeros_like(branch.outputs)  # the router's part is gone
    assert relative(found.dense(), plain.dense()) > 1e-2

    def shares(self, hidden):
        logits = hidden.reshape(-1, self.hidden_dim) @ self.weight.T
        top = torch.softmax(logits, -1).topk(self.top_k, -1)
        return logits, top.values, top.indices

    for layer in module.model.layers:
        layer.mlp.gate.forward = shares.__get__(layer.mlp.gate)
    options = {"positions": [(2, 5)]}
    found = interp.jacobian(model, ids, *ENDS, method="closed", **options).dense()
    assert relative(found, interp.jacobian(model, ids, *ENDS, method="autograd", **options).dense()) < CLOSE
    held = interp.jacobian(model, ids, SOURCE, MLP, [3], linearization="frozen")
    assert "under frozen" in held.plan.notes[0]


def test_products_in_bfloat16_are_asked_for_reported_and_leave_flags_alone():
    model, ids = interp.attach(build("llama")), inputs_for("llama")[:1]
    flags = torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision
    for ends, positions in (((SOURCE, MLP), "same"), (ENDS, [5])):
        wanted = interp.jacobian(model, ids, *ends, positions).dense()
        found = interp.jacobian(model, ids, *ends, positions, precision="bf16")
        assert "in bfloat16 differ" in found.plan.notes[0]
        assert found.plan.precision == "bf16"
        assert found.plan.check < 1e-5  # the closed form itself is as right as ever
        assert 1e-4 < relative(found.dense(), wanted) < 1e-2
        assert found.dense().dtype == torch.float32
        part = interp.jacobian(model, ids, *ends, positions, precision="bf16", rows=[1, 4]).dense()
        assert relative(part, wanted[:, [1, 4]]) < 2e-2
    assert flags == (torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision)
    moe = interp.attach(build("mixtral"))
    found = interp.jacobian(moe, ids, SOURCE, MLP, [3], precision="bf16")
    assert "there is no plain MLP" in found.plan.notes[-1]
    found = interp.jacobian(moe, ids, SOURCE, MLP, [3], precision="bf16", linearization="frozen")
    assert "autograd runs in the model's dtype" in found.plan.notes[-1]


def test_a_wrongly_composed_matrix_is_refused(hand, monkeypatch):
    from interp.hooks.errors import CompletenessError
    from interp.jacobians.heads import AttentionBranch

    right = AttentionBranch.dense
    monkeypatch.setattr(AttentionBranch, "dense", lambda self, *at: right(self, *at) * 1.1)
    with pytest.raises(CompletenessError, match="from its own pull"):
        interp.jacobian(hand, IDS[:1], *ENDS, [5]).dense()


def test_the_module_is_left_as_it_was(hand):
    before = {n: (p.requires_grad, p.grad) for n, p in hand.module.named_parameters()}
    for method in ("closed", "autograd"):
        interp.jacobian(hand, IDS[:1], *ENDS, [5], method=method).dense()
    assert before == {n: (p.requires_grad, p.grad) for n, p in hand.module.named_parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hand.module.modules())
