"""Jacobians that cannot be had, or would be zero by structure, are refused before work, by name."""

import inspect
import re

import pytest
import torch

import interp
from interp.hooks.errors import (
    ArgumentError,
    CompiledModelError,
    InputError,
    MetaWeightsError,
    ModelStateError,
    NonFiniteError,
    NoPathError,
    PositionError,
    SiteError,
    SiteUnavailableError,
    SizeError,
    TrainModeError,
    UnsupportedOpError,
)
from tests.cases import IDS, build, build_cnn, inputs_for

pytestmark = pytest.mark.usefixtures("unchecked")
ONE, MID, OUT = torch.tensor(IDS[:1]), "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def llama():
    return interp.attach(build("llama"))


CASES = {
    "an unknown source": (dict(source="blocks.1.hook_resid_mad"), SiteError, "did you mean"),
    "an unknown target": (dict(target="blocks.9.hook_mlp_out"), SiteError, "unknown site"),
    "many sources": (dict(source="blocks.*.hook_resid_mid"), SiteError, "row_sweep"),
    "a pattern": (dict(target="blocks.1.attn.hook_pattern"), SiteError, "pairs of positions"),
    "a source behind its target": (dict(source="blocks.2.hook_resid_mid"), NoPathError, "zero by structure"),
    "a source beside its target": (
        dict(source="blocks.1.attn.hook_k", target="blocks.1.attn.hook_v"), NoPathError, "does not depend",
    ),
    "a position outside": (dict(positions=[7]), PositionError, "7 tokens"),
    "a pair outside": (dict(positions=[(2, 9)]), PositionError, "7 tokens"),
    "a pair backwards": (dict(positions=(5, 2)), PositionError, "zero by causality"),
    "a backward pair of sites": (dict(source=f"{MID}@5", target=f"{OUT}@2"), PositionError, "zero by causality"),
    "positions twice": (dict(source=f"{MID}@5", positions="same"), ArgumentError, "one of the two"),
    "a word": (dict(positions="everywhere"), PositionError, "token indices"),
    "lists for other examples": (dict(positions=[[1], [2]]), PositionError, "one for each of 1"),
    "no rows": (dict(rows=[]), ArgumentError, "at least one"),
    "a row outside": (dict(rows=[32]), ArgumentError, "below 32"),
    "a column outside": (dict(columns=[(0, 1)]), ArgumentError, r"index into \[32\]"),
    "rows by name": (dict(rows=["a"]), ArgumentError, "ints"),
    "rows of booleans": (dict(rows=[True, False]), ArgumentError, "ints"),
    "a linearisation": (dict(linearization="exactly"), ArgumentError, "one of exact"),
    "a reduction": (dict(reduce="median"), ArgumentError, "svd:k"),
    "a reduction of nothing": (dict(reduce="svd:0"), ArgumentError, "svd:k"),
    "too many singular values": (dict(reduce="svd:400"), ArgumentError, "up to 224"),
    "a method": (dict(method="fast"), ArgumentError, "'auto'"),
    "a precision": (dict(precision="int8"), ArgumentError, "float64"),
    "a precision of autograd": (dict(precision="float64", method="autograd"), ArgumentError, "closed form"),
    "tf32 without a GPU": (dict(precision="tf32"), ArgumentError, "a cuda device"),
    "a budget in words": (dict(budget="plenty"), ArgumentError, "2GiB"),
    "a budget of nothing": (dict(budget=0), ArgumentError, "positive"),
    "a budget below one row": (dict(budget=1000), SizeError, "budget="),
    "out of another shape": (dict(positions="same", out=torch.empty(7, 32, 31)), ArgumentError, r"\[7, 32, 32\]"),
    "out of another dtype": (
        dict(positions="same", out=torch.empty(7, 32, 32, dtype=torch.float64)), ArgumentError, "float32",
    ),
    "out in a graph": (
        dict(positions="same", out=torch.empty(7, 32, 32, requires_grad=True)), ArgumentError, "without a gradient",
    ),
    "out on another device": (
        dict(positions="same", out=torch.empty(7, 32, 32, device="meta")), ArgumentError, "on meta",
    ),
    "out that is written over": (
        dict(positions="same", out=torch.empty(1, 32, 32).expand(7, 32, 32)), ArgumentError, "share memory",
    ),
    "a dtype of nothing stored": (dict(out_dtype=torch.float16), ArgumentError, "a path as out"),
    "out that is no tensor": (dict(out=["here"]), ArgumentError, "a tensor or a path"),
    "out beside a reduction": (dict(out=torch.empty(1), reduce="mean"), ArgumentError, "one of the two"),
    "float ids": (dict(inputs=torch.ones(1, 3)), InputError, "integers"),
    "an override of nothing": (
        dict(linearization=interp.Linearization(overrides={"no.such": "tangent"})), ArgumentError, "no.such",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(llama, case):
    options, error, text = CASES[case]
    given = {"inputs": ONE, "source": MID, "target": OUT} | options
    with pytest.raises(error, match=text):
        interp.jacobian(llama, **given)


def test_rows_named_twice_are_allowed_with_a_word(llama):
    with pytest.warns(UserWarning, match="more than once"):
        found = interp.jacobian(llama, ONE, MID, OUT, [3], rows=[4, 4])
    assert torch.equal(found.dense()[0, 0], found.dense()[0, 1])


def test_a_result_over_the_budget_names_its_bytes_and_the_smallest_remedies(llama):
    found = interp.jacobian(llama, ONE, "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post", budget=150_000)
    with pytest.raises(SizeError) as caught:
        found.dense()
    needed = (7 * 32) ** 2 * 4
    for part in (f"{needed:,} bytes", f"budget={needed}", "iterate over the chunks", "reduce=", "rows="):
        assert part in str(caught.value)
    v = torch.randn(7, 32)
    assert found.matvec(v).shape == (1, 7, 32)  # what fits is still there


def test_maps_of_different_shapes_are_not_stacked(llama):
    found = interp.jacobian(llama, [[1, 2, 3], [4, 5]], MID, OUT)
    with pytest.raises(ArgumentError, match="different shapes"):
        found.dense()
    assert [found[i].dense().shape[0] for i in range(2)] == [96, 64]


def test_probes_of_another_shape(llama):
    found = interp.jacobian(llama, ONE, MID, OUT, "same")
    with pytest.raises(InputError, match=r"\[32\], or \[7, 32\]"):
        found.matvec(torch.ones(31))
    with pytest.raises(IndexError):
        found[7]


def test_training_mode():
    model = interp.attach(build("gpt2"))
    model.module.train()
    for method in ("auto", "autograd"):
        with pytest.raises(TrainModeError, match=r"model\.eval"):
            interp.jacobian(model, ONE, MID, OUT, method=method)
    cnn = interp.attach(build_cnn())
    cnn.module.train()
    with pytest.raises(TrainModeError, match="norm"):
        interp.jacobian(cnn, torch.ones(1, 3, 6, 6), "conv:in", "head")


def test_images_have_no_positions():
    model = interp.attach(build("vit"))
    with pytest.raises(PositionError, match="token inputs"):
        interp.jacobian(model, inputs_for("vit")[:1], "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "same")
    cnn = interp.attach(build_cnn())
    with pytest.raises(PositionError, match="token inputs"):
        interp.jacobian(cnn, torch.ones(1, 3, 6, 6), "conv:in", "head", [1])
    with pytest.raises(InputError, match="float"):
        interp.jacobian(cnn, torch.ones(1, 3, 6, 6, dtype=torch.complex64), "conv:in", "head")


def test_activations_that_are_not_finite():
    module = build("llama")
    module.model.layers[1].mlp.up_proj.bias.data[3] = torch.inf
    model = interp.attach(module, check=False)
    for method in ("auto", "autograd"):
        with pytest.raises(NonFiniteError, match="blocks"):
            interp.jacobian(model, ONE, MID, OUT, method=method)


def test_what_has_no_rule_is_named_when_parts_are_held():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.special.i1(x)

    model = interp.attach(torch.nn.Sequential(torch.nn.Linear(3, 3), Odd(), torch.nn.Linear(3, 2)))
    assert interp.jacobian(model, torch.ones(1, 3), "0", "2").dense().shape == (1, 2, 3)
    with pytest.raises(UnsupportedOpError, match="special_i1"):
        interp.jacobian(model, torch.ones(1, 3), "0", "2", linearization="frozen")


def test_quantised_and_offloaded_weights_fall_back_to_autograd_with_a_note():
    module = build("llama")
    wanted = interp.jacobian(interp.attach(module), ONE, MID, OUT, [3]).dense()

    class Packed(torch.nn.Module):
        """A linear module of bytes and a scale."""

        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            scale = linear.weight.detach().abs().max() / 127
            self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
            self.register_buffer("bias", linear.bias.detach().clone())
            self.scale = scale

        def forward(self, x):
            return torch.nn.functional.linear(x, self.codes * self.scale, self.bias)

    module.model.layers[1].mlp.up_proj = Packed(module.model.layers[1].mlp.up_proj)
    found = interp.jacobian(interp.attach(module, check=False), ONE, MID, OUT, [3])
    assert "no closed form" in found.plan.notes[0]
    assert "without a plain floating-point weight" in found.plan.notes[0]
    error = (found.dense() - wanted).norm() / wanted.norm()
    assert 0 < error < 0.05  # bytes round


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory):
    """A model of which one block is on the disk, brought by accelerate's hooks."""
    from accelerate import dispatch_model

    module = build("llama")
    places = dict.fromkeys([name for name, _ in module.model.named_children() if name != "layers"], "cpu")
    places = {f"model.{name}": where for name, where in places.items()} | {"lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(len(module.model.layers))}
    folder = tmp_path_factory.mktemp("offloaded")
    dispatch_model(module, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    return interp.attach(module, check=False)


def test_several_devices_are_named(llama, offloaded):
    found = interp.jacobian(offloaded, ONE, MID, OUT, [3])
    wanted = interp.jacobian(llama, ONE, MID, OUT, [3], method="autograd")
    torch.testing.assert_close(found.dense(), wanted.dense())
    named = r"several devices, cpu \(model.embed_tokens.weight\), meta \(model.layers.1.*\)"
    assert re.search(named, found.plan.notes[0])
    with pytest.raises(ArgumentError, match=named):
        interp.jacobian(offloaded, ONE, MID, OUT, [3], method="closed")
    with pytest.raises(ArgumentError, match=named):
        interp.JacobianLens.fit(offloaded, ONE, skip=2, method="closed")


def cached(name):
    """A model, and tokens beside the keys and values of earlier ones."""
    from transformers import DynamicCache

    module = build(name)
    takes = inspect.signature(module.forward).parameters
    keyword = next(key for key in ("cache", "past_key_values") if key in takes)
    cache = DynamicCache()
    with torch.no_grad():
        module(ONE, **{keyword: cache})
    return interp.attach(module), {"input_ids": ONE, keyword: cache}, cache


def test_a_cache_is_refused_before_it_grows():
    model, inputs, cache = cached("llama")
    asked = (
        lambda: interp.jacobian(model, inputs, MID, OUT),
        lambda: interp.jacobian(model, inputs, MID, OUT, method="autograd"),
        lambda: interp.row_sweep(model, inputs, "blocks.*.hook_resid_pre", "logits@-1", rows=[1]),
        lambda: interp.JacobianLens.fit(model, [inputs], skip=2),
    )
    for ask in asked:
        with pytest.raises(InputError, match=r"derivatives by its tokens would be zero.*leave .* out"):
            ask()
    assert cache.get_seq_length() == ONE.shape[1]


AFTER = {
    "a site behind": ("blocks.2.hook_resid_mid", OUT, 32),
    "a site beside": ("blocks.1.attn.hook_k", "blocks.1.attn.hook_v", None),
}


@pytest.mark.parametrize("case", AFTER)
@pytest.mark.parametrize("method", ["auto", "autograd"])
def test_zeros_by_structure_are_given_where_they_are_asked_for(llama, case, method, tmp_path):
    source, target, width = AFTER[case]
    with pytest.raises(NoPathError, match="allow_zero=True"):
        interp.jacobian(llama, ONE, source, target, "same", method=method)
    options = dict(method=method, allow_zero=True)
    found = interp.jacobian(llama, ONE, source, target, "same", **options)
    assert found.plan.method == "zero by structure"
    assert found.plan.flops == 0
    acts = llama.capture(ONE, [source, target])
    shapes = [acts[site][0, 0].shape for site in (source, target)]
    sizes = [shape.numel() for shape in shapes]
    assert found.shape == (7, sizes[1], sizes[0])
    assert width is None or sizes == [width, width]
    assert not found.dense().any()
    assert not found[2].matvec(torch.ones(shapes[0])).any()
    assert found[2].rmatvec(torch.ones(shapes[1])).shape == shapes[0]
    assert found.reduce("norm").value.tolist() == [0.0] * 7
    kept = interp.jacobian(llama, ONE, source, target, "same", rows=[1, 2], columns=[0], **options)
    assert kept.dense().shape == (7, 2, 1)
    stored = interp.jacobian(llama, ONE, source, target, "same", out=tmp_path / "zero.safetensors", **options)
    assert not stored.dense().any()
    # What is not zero is the same with and without the word.
    plain = interp.jacobian(llama, ONE, MID, OUT, [3], method=method)
    torch.testing.assert_close(interp.jacobian(llama, ONE, MID, OUT, [3], **options).dense(), plain.dense())


def test_compiled_and_meta_models():
    module = build("llama")
    model = interp.attach(module)
    module.model.layers[1].compile()
    with pytest.raises(CompiledModelError):
        interp.jacobian(model, ONE, MID, OUT)
    with torch.device("meta"), pytest.raises((MetaWeightsError, NotImplementedError)):
        interp.jacobian(interp.attach(torch.nn.Linear(2, 2)), torch.ones(1, 2, device="cpu"), "", "")


def test_sites_that_are_not_one_tensor_say_why():
    model = interp.attach(build("mixtral"))
    with pytest.raises(SiteUnavailableError, match="a dense MLP"):
        interp.jacobian(model, ONE, MID, "blocks.1.mlp.hook_pre")
    cnn = interp.attach(build_cnn())
    with pytest.raises(InputError, match="int64"):
        interp.jacobian(cnn, torch.ones(1, 3, 6, 6, dtype=torch.int64), "conv:in", "head")


class Checkpointed(torch.nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.zeroth, self.first, self.last = torch.nn.Linear(3, 3), torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        inner = lambda z: torch.tanh(self.first(z))
        return self.last(checkpoint(inner, self.zeroth(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("method", ["auto", "autograd"])
@pytest.mark.parametrize(
    ("reentrant", "source", "text"),
    [
        (False, "zeroth", "turn checkpointing off"),
        (False, "first:in", "turn checkpointing off"),
        (True, "zeroth", "use_reentrant=True"),
        (True, "first:in", "first:in, which the network computes with gradients off"),
    ],
)
def test_checkpoints_are_named(method, reentrant, source, text):
    model = interp.attach(Checkpointed(reentrant))
    with pytest.raises(ModelStateError, match=text):
        interp.jacobian(model, torch.ones(1, 3), source, "last", method=method)


@pytest.mark.parametrize("method", ["auto", "autograd"])
def test_wrapped_and_in_place_networks(method):
    """A wrapper is looked through, and what is written in place is read before."""
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.SiLU(inplace=True), torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True)
    ).double()
    x, wrapped = torch.ones(1, 3, dtype=torch.float64), interp.attach(torch.nn.DataParallel(net))
    z = net[0](x).detach()
    slope = torch.autograd.functional.jacobian(torch.nn.functional.silu, z)[0, :, 0]
    after = net[2](torch.nn.functional.silu(z)).detach()
    wanted = (after[0] > 0)[:, None] * (net[2].weight.detach() @ slope)
    found = interp.jacobian(wrapped, x, "0", "3", method=method).dense()[0]
    torch.testing.assert_close(found, wanted)


def test_a_module_that_runs_twice_is_not_a_site():
    shared = torch.nn.Tanh()
    model = interp.attach(torch.nn.Sequential(torch.nn.Linear(2, 2), shared, torch.nn.Linear(2, 2), shared))
    for held in ("exact", "frozen"):
        with pytest.raises(SiteError, match="more than once"):
            interp.jacobian(model, torch.ones(1, 2), "0", "1", linearization=held)
    assert interp.jacobian(model, torch.ones(1, 2), "0", "2").dense().shape == (1, 2, 2)


REFUSED_SWEEPS = {
    "a target everywhere": (dict(target="logits"), ArgumentError, "one position"),
    "many targets": (dict(target="blocks.*.hook_resid_pre@2"), ArgumentError, "selects 3"),
    "rows and directions": (dict(rows=[1], directions=torch.ones(1, 61)), ArgumentError, "one of the two"),
    "other directions": (dict(directions=torch.ones(1, 60)), InputError, "61"),
    "two examples": (dict(inputs=IDS), InputError, "2 examples"),
    "a source behind": (dict(target="blocks.0.hook_resid_mid@2"), ArgumentError, "does not depend"),
}


@pytest.mark.parametrize("case", REFUSED_SWEEPS)
def test_sweeps_refused(llama, case):
    options, error, text = REFUSED_SWEEPS[case]
    given = {"inputs": ONE, "sources": "blocks.*.hook_resid_pre", "target": "logits@-1"} | options
    with pytest.raises(error, match=text):
        interp.row_sweep(llama, **given)


def test_inference_mode_is_refused_and_no_grad_is_not(llama):
    asked = (
        lambda: interp.jacobian(llama, ONE, MID, OUT, [3]),
        lambda: interp.jacobian(llama, ONE, MID, OUT, [3], method="autograd"),
        lambda: interp.row_sweep(llama, ONE, "blocks.*.hook_resid_pre", "logits@-1", rows=[1]),
        lambda: interp.JacobianLens.fit(llama, ONE, skip=2),
        lambda: interp.LinearRelation.fit(llama, "the {} is", [("cat", "red")], 1),
    )
    with torch.inference_mode():
        for ask in asked:
            with pytest.raises(ModelStateError, match=r"inference_mode.*torch\.no_grad"):
                ask()
    for method in ("auto", "autograd"):
        found = interp.jacobian(llama, ONE, MID, OUT, [3], method=method)
        with torch.no_grad():
            wanted = interp.jacobian(llama, ONE, MID, OUT, [3], method=method).dense()
        with torch.inference_mode():
            torch.testing.assert_close(found.dense(), wanted)


@pytest.mark.parametrize("method", ["closed", "autograd"])
def test_weights_that_were_written_since(method):
    module = build("llama")
    model = interp.attach(module)
    found = interp.jacobian(model, ONE, MID, OUT, "same", method=method)
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    asked = (
        found.dense, lambda: found[2].dense(), lambda: found.matvec(torch.ones(32)), lambda: found.reduce("mean"),
        lambda: found.svd(2), lambda: list(found),
    )  # fmt: skip
    for ask in asked:
        with pytest.raises(ModelStateError, match=r"layers\.1\.mlp\.up_proj\.weight, written since"):
            ask()


def test_checkpoints_of_transformers_are_named():
    module = build("llama").train()
    module.gradient_checkpointing_enable()
    for layer in module.model.layers:
        layer.self_attn.attention_dropout = 0.0
    for method in ("auto", "closed", "autograd"):
        with pytest.raises(ModelStateError, match=r"model\.layers\.0 checkpoints|model checkpoints"):
            interp.jacobian(interp.attach(module), ONE, "blocks.0.hook_resid_pre", OUT, method=method)
    module.eval()
    assert interp.jacobian(interp.attach(module), ONE, MID, OUT, [3]).dense().shape == (1, 32, 32)


class Odd(torch.nn.Module):
    """A call between two linear maps."""

    def __init__(self, call):
        super().__init__()
        self.first, self.call, self.last = torch.nn.Linear(3, 4), call, torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.call(self.first(x)))


DROPPED = {
    "dropout": lambda z: torch.nn.functional.dropout(z, 0.5),
    "torch.dropout": lambda z: torch.dropout(z, 0.5, True),
    "alpha_dropout": lambda z: torch.nn.functional.alpha_dropout(z, 0.5, True),
    "attention": lambda z: torch.nn.functional.scaled_dot_product_attention(*[z[:, :, None]] * 3, dropout_p=0.5)[
        ..., 0
    ],
}


@pytest.mark.parametrize("case", DROPPED)
def test_dropout_that_a_call_switches_on(case):
    model = interp.attach(Odd(DROPPED[case]))
    for method in ("auto", "autograd"):
        with pytest.raises(TrainModeError, match="live"):
            interp.jacobian(model, torch.ones(1, 3), "first", "last", method=method)
    calm = interp.attach(Odd(lambda z: torch.nn.functional.dropout(z, 0.5, training=False)))
    found = interp.jacobian(calm, torch.ones(1, 3), "first", "last", method="autograd").dense()[0]
    torch.testing.assert_close(found, calm.module.last.weight.detach())


def test_calls_that_a_network_hides_are_not_replayed():
    call = torch.vmap(lambda row: row * row.sum())
    model, x = interp.attach(Odd(call).double()), torch.tensor([[0.3, -0.7, 1.1]], dtype=torch.float64)
    z = model.module.first(x).detach()
    wanted = torch.autograd.functional.jacobian(lambda z: model.module.last(call(z)), z)[0, :, 0]
    found = interp.jacobian(model, x, "first", "last")
    assert "columns and rows" in found.plan.notes[0]
    v = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(found.dense()[0], wanted)
    torch.testing.assert_close(found[0].matvec(v), wanted @ v)
