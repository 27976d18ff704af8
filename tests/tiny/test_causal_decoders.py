"""Alignments at the last token of decoders: the short way up is the whole network, whatever the padding or batch."""

import pytest
import torch

import interp
from interp.causal import Alignment, CausalModel, IdentityMap, Partition, Pool, Task, Training, sweep
from interp.causal.decoder_stage import DecoderStage
from interp.causal.stages import HookStage, cut
from interp.hooks.errors import ShapeMismatchError
from tests.cases import build

SITE = "blocks.1.hook_resid_post@last"
FAMILIES = ["llama", "gpt2", "gemma2", "qwen3", "neox-parallel", "mistral"]


def texts(n=7):
    """Token ids of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (n,), generator=generator).tolist()
    return [torch.randint(3, 60, (length,), generator=generator).tolist() for length in lengths]


def pool_of(inputs):
    return Pool(inputs, {"output": torch.zeros(len(inputs), dtype=torch.long)})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_short_way_is_the_whole_network(family):
    model, pool = interp.attach(build(family)), pool_of(texts())
    short, whole = cut(model, SITE, pool), cut(model, SITE, pool, cache=False)
    assert isinstance(short, DecoderStage)
    assert isinstance(whole, HookStage)
    torch.testing.assert_close(short.acts, whole.acts)
    h = short.acts + torch.randn(short.acts.shape, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([3, 0, 3, 6])
    torch.testing.assert_close(short.logits(h[rows], rows), whole.logits(h[rows], rows), rtol=1e-4, atol=1e-4)
    wanted = torch.tensor([[5, 9]] * 4)
    torch.testing.assert_close(
        short.logits(h[rows], rows, wanted), whole.logits(h[rows], rows).gather(1, wanted), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_both_ways_are_the_same(family):
    model, pool = interp.attach(build(family)), pool_of(texts())
    rows, grads = torch.arange(4), []
    for cache in (True, False):
        stage = cut(model, SITE, pool, cache=cache)
        h = stage.acts[rows].clone().requires_grad_()
        stage.logits(h, rows)[:, 7].sum().backward()
        grads.append(h.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_mates_in_a_batch_change_nothing():
    model, inputs = interp.attach(build("llama")), texts()
    together = cut(model, SITE, pool_of(inputs))
    for i in (0, 4):
        alone = cut(model, SITE, pool_of(inputs[i : i + 1]))
        torch.testing.assert_close(together.acts[i : i + 1], alone.acts, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            together.logits(together.acts[[i]], torch.tensor([i])), alone.logits(alone.acts, torch.tensor([0])),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_a_swap_of_all_coordinates_is_the_source_s_stream():
    module = build("llama")
    model, inputs = interp.attach(module), texts(4)
    algorithm = CausalModel(["a"], {"v": (["a"], torch.clone)}, (["v"], lambda v: v > 0))
    pools = [Pool(part, algorithm.run({"a": torch.tensor([1, -1])})) for part in (inputs[:2], inputs[2:])]
    found = Alignment(model, algorithm, SITE, IdentityMap(module.config.hidden_size), Partition(
        {"v": module.config.hidden_size}
    )).intervene(*pools)  # fmt: skip
    acts = model.capture(inputs[2:], ["blocks.1.hook_resid_post@last"])["blocks.1.hook_resid_post@last"].flatten(1)
    wanted = cut(model, SITE, pools[0], cache=False).logits(acts, torch.arange(2))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_site_without_a_position_is_refused():
    with pytest.raises(ShapeMismatchError, match="@last"):
        cut(interp.attach(build("gpt2")), "blocks.1.hook_resid_post", pool_of(texts(2)))


def test_a_sweep_over_a_decoder_is_the_same_both_ways():
    def draw(n, generator):
        return {name: torch.randint(top, (n,), generator=generator) for name, top in (("a", 2), ("b", 2), ("c", 40))}

    algorithm = CausalModel(["a", "b", "c"], {"v": (["a"], torch.clone)}, (["v", "b"], torch.ne), name="differ")
    task = Task(
        "tokens", algorithm, draw, lambda x: (torch.stack(list(x.values()), 1) + torch.tensor([3, 5, 7])).tolist(),
        candidates=lambda x: torch.tensor([[50, 51]]).expand(len(x["a"]), -1),
    )  # fmt: skip
    model, data = interp.attach(build("llama")), task.splits(40, 20, 20)
    short, whole = (
        sweep(
            model, data, [SITE, "blocks.0.hook_resid_post@last"], [{"kind": "low_rank", "rank": 4}], sizes=[2],
            training=Training(steps=2, batch_size=16), restarts=1, measure=False, cache=cache, lanes=lanes,
        )
        for cache, lanes in ((True, 24), (False, 3))
    )  # fmt: skip
    for key in ("validation loss", "random validation loss"):
        assert [r[key] for r in short.rows] == pytest.approx([r[key] for r in whole.rows], abs=1e-3)
    assert {r["site"] for r in short.rows} == {SITE, "blocks.0.hook_resid_post@last"}
    assert {r["random restarts"][0] == r["random"] for r in short.rows} == {True}


def put_by_hand(module, block, ids, h):
    """Logits behind one text alone, with h put in by a plain hook."""

    def put(_, __, output):
        stream = output[0] if isinstance(output, tuple) else output
        stream = torch.cat([stream[:, :-1], h[None, None]], 1)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handle = block.register_forward_hook(put)
    try:
        return module(input_ids=torch.tensor([ids])).logits[0, -1]
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_long_texts_behind_short_ones_are_answered_as_each_alone(family, side):
    module, generator = build(family), torch.Generator().manual_seed(3)
    inputs = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in (2, 1, 3, 2, 14, 9, 1)]
    model = interp.attach(module)
    blocks = module.transformer.h if family == "gpt2" else module.model.layers
    batch, rows = model.batch, torch.tensor([4, 1, 5, 6, 4])
    model.batch = lambda x, padding_side=None: batch(x, padding_side or side)
    for cache in (True, False):
        stage = cut(model, SITE, pool_of(inputs), cache=cache)
        h = stage.acts[rows] + torch.randn(5, stage.width, generator=generator)
        wanted = [put_by_hand(module, blocks[1], inputs[i], one) for i, one in zip(rows.tolist(), h, strict=True)]
        torch.testing.assert_close(stage.logits(h, rows), torch.stack(wanted), rtol=1e-4, atol=1e-4)
