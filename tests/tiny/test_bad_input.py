"""What cannot be done is refused by a named error that says what was given, what was needed, what to do."""

import pytest
import torch

import interp
from interp.hooks.errors import (
    ArgumentError,
    CompiledModelError,
    InputError,
    LayoutError,
    MetaWeightsError,
    NonFiniteError,
    PositionError,
    SiteError,
    SiteUnavailableError,
    TrainModeError,
    UnknownFamilyError,
)
from tests.cases import HAND_LAYOUT, VOCAB, build, build_cnn, build_hand, inputs_for

SITE = "blocks.1.hook_resid_post"
pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
]


@pytest.fixture(scope="module")
def models():
    return {name: interp.attach(build(name)) for name in ("llama", "gpt2", "vit", "mixtral", "neox-parallel", "bert")}


@pytest.fixture(scope="module")
def cnn():
    return interp.attach(build_cnn())


IDS = [[3, 17, 42]]
NONSENSE = {
    "empty text": ("", "tokenizer"), "text without a tokenizer": ("the cat", "tokenizer"),
    "no examples": ([], "inputs"),
    "an empty example": ([[]], "at least one token"), "one empty example": ([[3, 4], []], "at least one token"),
    "float ids": ([[1.5, 2.0]], "integers"), "float tensor": (torch.ones(1, 3), "integers"),
    "later float ids": ([[1], [1.5]], "integers"), "bool ids": (torch.ones(1, 3, dtype=torch.bool), "integers"),
    "an id too large": ([[3, VOCAB]], f"0..{VOCAB - 1}"), "a negative id": ([[3, -1]], f"0..{VOCAB - 1}"),
    "ids nested too deep": ([[[1, 2]]], "nested"), "nothing": (None, "text"), "a number": (3, "text"),
    "texts and ids mixed": (["a", [1]], "text"), "ids and texts mixed": ([[1], "a"], "token ids"),
    "ids of None": ([[None]], "token ids"), "a scalar tensor": (torch.tensor(3), "batch, pos"),
    "a cube of ids": (torch.ones(1, 2, 3, dtype=torch.long), "batch, pos"),
    "an encoding without ids": ({"attention_mask": torch.ones(1, 2)}, "input_ids"),
    "an encoding of lists": ({"input_ids": [[1, 2]]}, "tensor"),
    "an encoding with a foreign key": ({"input_ids": torch.tensor(IDS), "colour": 3}, "colour"),
    "a mask of another shape": ({"input_ids": torch.tensor(IDS), "attention_mask": torch.ones(1, 2)}, "equal shapes"),
    "a mask with a gap": ({"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor([[1, 0, 1]])}, "gaps"),
    "a mask of nothing": ({"input_ids": torch.tensor(IDS), "attention_mask": torch.zeros(1, 3)}, "at least one token"),
}  # fmt: skip


@pytest.mark.parametrize("what", NONSENSE)
@pytest.mark.parametrize("call", ["run", "capture", "generate"])
def test_token_inputs(models, what, call):
    inputs, word = NONSENSE[what]
    act = {
        "run": lambda m: m.run(inputs),
        "capture": lambda m: m.capture(inputs, SITE),
        "generate": lambda m: m.generate(inputs),
    }[call]
    with pytest.raises(InputError, match=word) as caught:
        act(models["llama"])
    assert caught.value.given
    assert caught.value.needed or caught.value.do


def test_empty_text(tokenizer):
    model = interp.attach(build("llama"), tokenizer)
    for text in ("", ["the cat", ""], "   "):
        with pytest.raises(InputError, match=r"empty|at least one"):
            model.run(text)


def test_texts_longer_than_learned_positions(models):
    with pytest.raises(InputError, match=r"33 tokens.*at most 32"):
        models["gpt2"].run([[5] * 33])
    assert models["gpt2"].run([[5] * 32]).shape == (1, 32, VOCAB)


@pytest.mark.parametrize(
    "inputs", ["a text", ["a", "b"], [], None, 3, (), {}, {"x": 3}, torch.tensor(2.0), torch.ones(0, 3)]
)
def test_inputs_of_a_network_that_takes_tensors(cnn, inputs):
    with pytest.raises(InputError) as caught:
        cnn.run(inputs)
    assert caught.value.needed


@pytest.mark.parametrize("inputs", [
    "a text", ["a"], None, torch.ones(3, 12), torch.ones(1, 3, 12, 12, dtype=torch.long), {"pixels": torch.ones(1)},
    torch.ones(0, 3, 12, 12),
])  # fmt: skip
def test_inputs_of_an_image_model(models, inputs):
    with pytest.raises(InputError):
        models["vit"].run(inputs)


def test_a_single_image(models):
    image = inputs_for("vit")[0]
    assert torch.equal(models["vit"].run(image), models["vit"].run(image[None]))


@pytest.mark.parametrize(("positions", "word"), [
    (3, r"-3\.\.2"), (-4, r"-3\.\.2"), ([0, 7], r"7"), ([[0]], "one for each of 2"), ([[0], [1, 2]], "same number"),
    ([], "at least one"), ([[], []], "at least one"), ("last one", "texts as inputs"), (1.5, "ints"), ([1.5], "1.5"),
    ([True], "True"), (torch.tensor([0.5]), "0.5"), ({"a": 1}, "ints"), ([None], "None"),
])  # fmt: skip
def test_positions(models, positions, word):
    ids = [[3, 17, 42], [5, 9, 11, 2]]
    for act in (
        lambda: models["llama"].capture(ids, SITE, positions),
        lambda: models["llama"].run(ids, plan=[interp.Zero(SITE, positions=positions)]),
    ):
        with pytest.raises(PositionError, match=word):
            act()


def test_positions_where_there_are_none(models, cnn):
    with pytest.raises((PositionError, SiteError), match="position"):
        cnn.capture(torch.ones(1, 3, 6, 6), "conv", 0)
    with pytest.raises((PositionError, SiteError), match="position"):
        models["vit"].capture(inputs_for("vit"), SITE, 0)


@pytest.mark.parametrize(("name", "site", "kind", "word"), [
    ("llama", "blocks.1.hook_resid_pst", SiteError, "did you mean 'blocks.1.hook_resid_post'"),
    ("llama", "block.1.hook_resid_post", SiteError, "did you mean 'blocks.1.hook_resid_post'"),
    ("llama", "blocks.1.attn.hook_patern", SiteError, "hook_pattern"),
    ("llama", "blocks.7.hook_resid_post", SiteError, "did you mean"),
    ("llama", "blocks.*.hook_foo", SiteError, r"model\.sites\(\)"),
    ("llama", "blocks.1.attn.hook_z#4", SiteError, r"4 query heads \(0-3\)"),
    ("llama", "blocks.1.attn.hook_k#2", SiteError, "2 key/value heads"),
    ("llama", "blocks.1.hook_resid_post#0", SiteError, "a site with heads"),
    ("llama", "model.layers.1.mlp#0", SiteError, "a site with heads"),
    ("neox-parallel", "blocks.1.hook_resid_mid", SiteUnavailableError, "both read the block's input"),
    ("mixtral", "blocks.1.mlp.hook_post", SiteUnavailableError, "experts"),
    ("llama", "model.layers.1[3]", SiteError, "selector"), ("llama", "model.layers.1:in[9]", SiteError, "index below"),
    ("llama", "model[colour]", SiteError, "last_hidden_state"), ("llama", "model", SiteError, "add a selector"),
    ("llama", "model.rotary_emb", SiteError, "add a selector"), ("llama", [], SiteError, "at least one"),
])  # fmt: skip
def test_sites(models, name, site, kind, word):
    with pytest.raises(kind, match=word):
        models[name].capture(IDS, site)
    if site:
        with pytest.raises(kind, match=word):
            models[name].run(IDS, plan=[interp.Zero(site)])


def test_selected_sites_that_do_exist(models):
    model = models["llama"]
    last = model.capture(IDS, "model[last_hidden_state]")["model[last_hidden_state]"]
    assert torch.equal(last, model.capture(IDS, "ln_final.hook_out")["ln_final.hook_out"])
    cos, sin = model.capture(IDS, ["model.rotary_emb[0]", "model.rotary_emb[1]"]).values()
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    given = model.capture(IDS, "model.layers.0.self_attn:in[hidden_states]")[
        "model.layers.0.self_attn:in[hidden_states]"
    ]
    assert torch.equal(given, model.capture(IDS, "blocks.0.ln1.hook_out")["blocks.0.ln1.hook_out"])


def test_canonical_names_without_a_layout():
    model = interp.attach(build("llama"), layout="modules")
    with pytest.raises(SiteError, match="need a layout"):
        model.capture(IDS, SITE)
    assert model.family == "modules"
    assert model.capture(IDS, "model.layers.1").axes == {"model.layers.1": ("batch", "pos", "width")}


# States of models


def test_training_mode():
    module = build("gpt2").train()
    model = interp.attach(module)
    for act in (model.run, lambda x: model.capture(x, SITE), model.generate):
        with pytest.raises(TrainModeError, match=r"drop.*call model.eval\(\)"):
            act(IDS)
    module.eval()
    model.run(IDS)
    interp.attach(build("llama").train()).run(IDS)  # nothing in it differs in training
    with pytest.raises(TrainModeError):
        interp.attach(build_cnn().train()).run(torch.ones(2, 3, 6, 6))


def test_a_wrong_layout_is_seen_in_training_mode_too():
    with pytest.raises(LayoutError):
        interp.attach(build_hand().train(), layout=interp.Layout(**HAND_LAYOUT | {"ln1": "n2", "ln2": "n1"}))


def test_compiled_and_wrapped_models():
    module = build("llama")
    model = interp.attach(torch.compile(module))
    assert model.module is module

    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

    assert interp.attach(DistributedDataParallel(module)).module is module
    assert interp.attach(torch.compile(DistributedDataParallel(module))).module is module
    assert interp.attach(model) is model
    parallel = torch.nn.Sequential(DistributedDataParallel(torch.nn.Linear(2, 2)))
    with pytest.raises(CompiledModelError, match="0 is a DistributedDataParallel"):
        interp.attach(parallel)
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    for wrapped in (scripted, torch.nn.Sequential(torch.nn.ReLU(), scripted)):
        with pytest.raises(CompiledModelError, match="scripted"):
            interp.attach(wrapped)


@pytest.mark.parametrize("part", ["", "model.layers.1"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_modules_compiled_in_place(part, when):
    module = build("llama")
    if when == "before":
        module.get_submodule(part).compile()
        with pytest.raises(CompiledModelError, match="compiled in place"):
            interp.attach(module)
    else:
        model = interp.attach(module)
        module.get_submodule(part).compile()
        with pytest.raises(CompiledModelError, match="compiled in place"):
            model.run(IDS)


def test_weights_without_data_or_not_finite():
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(MetaWeightsError, match=r"0\.weight"):
        interp.attach(empty)
    module = build("llama")
    module.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 "):
        interp.attach(module)
    interp.attach(module, check=False)


# Architectures


def test_an_unknown_language_model_is_refused_until_it_is_described():
    module = build_hand()
    with pytest.raises(UnknownFamilyError, match=r"HandLM.*interp\.Layout"):
        interp.attach(module)
    model = interp.attach(module, layout=interp.Layout(**HAND_LAYOUT))
    assert model.family == "hand"
    assert torch.equal(model.run(IDS), module(torch.tensor(IDS)).detach())
    assert interp.attach(module, layout="modules").capture(IDS, "stack.0.mix")["stack.0.mix"].shape == (1, 3, 32)


@pytest.mark.parametrize(("wrong", "word"), [
    ({"ln1": "n3"}, "did you mean n2, n1"), ({"embed": "wrds"}, "did you mean words"),
    ({"blocks": "words"}, "ModuleList"),
    ({"o": None}, "layout.o"), ({"n_heads": 0}, "n_heads"), ({"unembed": "head"}, "unembed"),
])  # fmt: skip
def test_layouts_with_paths_that_do_not_exist(wrong, word):
    with pytest.raises(ArgumentError, match=word):
        interp.attach(build_hand(), layout=interp.Layout(**HAND_LAYOUT | wrong))


@pytest.mark.parametrize("wrong", [{"ln1": "n2", "ln2": "n1"}, {"q": "mix.wk", "k": "mix.wq"}, {"v": "mix.wk"}])
def test_layouts_that_say_the_wrong_thing(wrong):
    with pytest.raises(LayoutError):
        interp.attach(build_hand(), layout=interp.Layout(**HAND_LAYOUT | wrong))


def test_each_module_is_verified_for_itself_where_there_is_no_configuration():
    layout = interp.Layout(**HAND_LAYOUT)
    interp.attach(build_hand(), layout=layout)
    other = build_hand()
    for block in other.stack:  # the same parts, put together in another way
        block.forward = lambda x, b=block: x + b.mix(b.n1(x)) + b.down(torch.relu(b.up(b.n2(x))))
    with pytest.raises(LayoutError):
        interp.attach(other, layout=layout)


@pytest.mark.parametrize("thing", [None, 3, "smollm2-135m", {"a": 1}, torch.ones(2), build_cnn])
def test_things_that_are_no_modules(thing):
    with pytest.raises(InputError, match=r"nn\.Module"):
        interp.attach(thing)
    with pytest.raises(ArgumentError, match="layout="):
        interp.attach(build_cnn(), layout="llama")


@pytest.mark.parametrize("call", [
    lambda m: m.run(IDS, position=3), lambda m: m.capture(IDS, SITE, position=3), lambda m: m.sites(glob="*"),
    lambda m: m.generate(IDS, max_tokens=3), lambda m: m.tokens("a", chatty=True), lambda m: m.batch(IDS, side="left"),
    lambda m: interp.attach(m.module, tokeniser=None), lambda m: interp.load("smollm2-135m", torch_dtype=torch.float32),
    lambda m: interp.Add(SITE, valu=3), lambda m: interp.Site(SITE, heads=3), lambda m: interp.Layout("x", colour=2),
    lambda m: m.run(IDS, [interp.Zero(SITE)]),
])  # fmt: skip
def test_unknown_keywords_are_never_swallowed(models, call):
    with pytest.raises(TypeError):
        call(models["llama"])


def test_padding_side(models):
    with pytest.raises(InputError, match="'left' or 'right'"):
        models["llama"].run(IDS, padding_side="centre")


def test_reading_what_was_not_captured(models):
    acts = models["llama"].capture(IDS, [SITE])
    with pytest.raises(SiteError, match=SITE):
        acts["blocks.0.hook_resid_post"]
    assert acts.get("blocks.0.hook_resid_post") is None
    assert "blocks.0.hook_resid_post" not in acts
    assert SITE in acts
    assert interp.Site(SITE) in acts
