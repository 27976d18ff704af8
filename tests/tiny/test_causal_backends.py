"""Alignments of language models: one accuracy whatever the padding, the batch and the library that holds the model."""

import pytest
import torch

import interp
from interp.causal import (
    Alignment,
    CausalModel,
    IdentityMap,
    InterchangeDataset,
    OrthogonalMap,
    Partition,
    Pool,
    Training,
    decoder_stage,
    stages,
)  # fmt: skip
from interp.causal.stages import cut
from interp.hooks.errors import ShapeMismatchError, SiteNotFoundError
from interp.hooks.model import Model
from tests.cases import WIDTH, build
from tests.tiny.test_engines import bridge_of, nnsight_of

SITE = "blocks.1.hook_resid_post@last"
FAMILIES = ["llama", "gpt2"]
SIGN = CausalModel(["a"], {"v": (["a"], torch.clone)}, (["v"], torch.clone), name="sign")
ENGINES = {"bridge": bridge_of, "nnsight": nnsight_of}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*which nnsight already serves"),
    pytest.mark.filterwarnings("ignore::interp.causal.report.CausalAbstractionWarning"),
]


def pairs(split, seed, n=16):
    """Pairs of prompts of 1 to 8 tokens; the label is whether the first token is large, as 5 or 9."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n,), generator=generator).tolist()
    ids = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in lengths]
    settings = SIGN.run({"a": torch.tensor([int(x[0] > 30) for x in ids])})
    pool = Pool(ids, settings, {}, torch.tensor([[5, 9]]).expand(n, -1))
    base, source = (torch.randint(n, (2 * n,), generator=generator) for _ in range(2))
    return InterchangeDataset.pair(
        SIGN, pool, base, source[:, None], torch.ones(2 * n, 1, dtype=torch.bool), split=split, seed=seed
    )


DATA = {name: pairs(name, seed) for seed, name in enumerate(("train", "validation", "test"))}


def align(model, tau=None, **options):
    tau = OrthogonalMap(WIDTH, seed=0) if tau is None else tau
    return Alignment(model, SIGN, SITE, tau, Partition({"v": 12}), **options)


def measured(model, tau, **options):
    """The map's score on test pairs, and the logits of some swaps."""
    found, test = align(model, tau, **options), DATA["test"]
    part = lambda rows: Pool(test.pool.take(rows), {k: v[rows] for k, v in test.pool.settings.items()}, {},
                             test.pool.candidates[rows])  # fmt: skip
    logits = found.intervene(part(test.base[:10]), part(test.sources[:10, 0]))
    return found.evaluate(test, controls=(), measure=False).scores[0], logits


def assert_same(model, plain, **options):
    tau, other = plain
    one = measured(model, tau, **options)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-3)
    assert one[0].plain == other[0].plain
    assert one[0].flip == other[0].flip
    assert one[0].baselines == other[0].baselines


@pytest.fixture(scope="module")
def plain():
    """For each family a map trained for some steps in the Hugging Face model, and what it comes to there."""
    found = {}
    for family in FAMILIES:
        one = align(interp.attach(build(family)))
        one.fit(DATA["train"], DATA["validation"], Training(steps=10, batch_size=32, lr=1e-2))
        found[family] = one.tau, measured(interp.attach(build(family)), one.tau)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_c18_three_libraries_give_one_accuracy(family, engine, plain, tokenizer, bridge_package, nnsight_package):
    model = interp.attach(ENGINES[engine](build(family), tokenizer))
    assert_same(model, plain[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_c9_the_whole_network_gives_the_same(family, plain):
    assert_same(interp.attach(build(family)), plain[family], cache=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_c16_the_side_of_padding_changes_nothing(family, cache, side, plain, monkeypatch):
    model = interp.attach(build(family))
    batch, keep = Model.batch, decoder_stage.DecoderStage._keep
    padded = lambda self, inputs, *_, **__: batch(self, inputs, padding_side=side)

    def kept(self):  # keys and values are padded on the left whatever the tokenizer does: left as they are
        with monkeypatch.context() as patch:
            patch.setattr(Model, "batch", batch)
            keep(self)

    monkeypatch.setattr(Model, "batch", padded)
    monkeypatch.setattr(decoder_stage.DecoderStage, "_keep", kept)
    assert_same(model, plain[family], cache=cache)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2])
def test_c16_the_number_of_texts_in_a_run_changes_nothing(family, size, plain, monkeypatch):
    from interp.causal import lanes

    for module, name in ((stages, "_TEXTS"), (decoder_stage, "_CHUNK"), (lanes, "_TEXTS")):
        monkeypatch.setattr(module, name, size)
    assert_same(interp.attach(build(family)), plain[family])


@pytest.mark.parametrize("cache", [True, False])
def test_c17_an_exception_in_a_run_leaves_the_model_as_it_was(cache):
    module = build("llama")
    module.lm_head.weight.requires_grad_(False)
    flags, mode = {n: p.requires_grad for n, p in module.named_parameters()}, module.training
    before = {n: p.clone() for n, p in module.state_dict().items()}
    found = align(interp.attach(module), cache=cache)

    def stop(_):
        raise RuntimeError("stop")

    budget = Training(steps=2, batch_size=16, validate_every=1)
    with pytest.raises(RuntimeError, match="stop"):
        found.fit(DATA["train"], DATA["validation"], budget, progress=stop)
    handle = module.model.layers[2].register_forward_pre_hook(lambda *_: stop(None))
    with pytest.raises(RuntimeError, match="stop"):
        found.lane.stage(DATA["train"]).logits(torch.zeros(3, WIDTH), torch.arange(3))
    handle.remove()
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
    assert module.training == mode
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(("site", "error", "text"), [
    ("blocks.9.hook_resid_post@last", SiteNotFoundError, "blocks.9"),
    ("blocks.1.hook_resid_pst@last", SiteNotFoundError, "hook_resid_post"),
    ("blocks.1.hook_resid_post@40", SiteNotFoundError, "40"),
    ("blocks.1.hook_resid_post", ShapeMismatchError, "@last"),
])  # fmt: skip
def test_places_that_a_language_model_has_not_are_refused_before_any_work(site, error, text):
    model = interp.attach(build("llama"))
    found = Alignment(model, SIGN, site, IdentityMap(WIDTH), Partition({"v": 4}))
    with pytest.raises(error, match=text):
        found.fit(DATA["train"], DATA["validation"])
    with pytest.raises(error, match=text):
        cut(model, site, DATA["test"].pool)
