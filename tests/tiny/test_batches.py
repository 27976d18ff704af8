"""Batch mates, padding, its side, and the order of requests change nothing."""

import numpy as np
import pytest
import torch

import interp
from tests.cases import CASES, DECODERS, HAND_LAYOUT, IDS, MIXED, HandLM, build, build_hand, inputs_for, perturb

TOLERANCE = 2e-5
SIDED = [(name, side) for name in [*DECODERS, "bert"] for side in ("left", "right") if (name, side) != ("bert", "left")]


def real_parts(acts, site, example):
    """One example's real entries of a site: [token, ...], for attention sites [head, token, token]."""
    value, keep = acts[site][example], acts.mask[example]
    if acts.axes[site][1] == "head":
        return value[:, keep][:, :, keep]
    return value[keep]


@pytest.mark.parametrize(("name", "side"), SIDED)
def test_a_mixed_batch_equals_its_examples(name, side):
    model = interp.attach(build(name))
    together = model.capture(MIXED, "*", padding_side=side)
    assert together.mask[:, 0].all() == (side == "right")
    for example, row in enumerate(MIXED):
        alone = model.capture([row], "*")
        for site in alone:
            found, wanted = real_parts(together, site, example), alone[site][0]
            shown = wanted > -1e9
            error = (found - wanted)[shown].abs().max() / wanted[shown].abs().max().clamp(min=1)
            assert error <= TOLERANCE, (site, float(error))
            assert (found[~shown] <= -1e9).all(), site


@pytest.mark.parametrize(("name", "side"), SIDED)
def test_logits_and_edits_of_a_mixed_batch(name, side):
    model = interp.attach(build(name))
    plan = [interp.Scale("blocks.1.hook_mlp_out", 0.5, positions="last"), interp.Zero("blocks.2.attn.hook_z", head=1)]
    together = model.run(MIXED, plan=plan, padding_side=side)
    mask = model.batch(MIXED, side).mask
    for example, row in enumerate(MIXED):
        alone = model.run([row], plan=plan)[0]
        torch.testing.assert_close(together[example][mask[example]], alone, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_one_is_a_row_of_many(name):
    model, x = interp.attach(build(name)), inputs_for(name)
    both, one = model.capture(x, "*"), model.capture(x[1:], "*")
    for site in one:
        torch.testing.assert_close(both[site][1:], one[site], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_real_tokens(side):
    model, site = interp.attach(build("gpt2")), "blocks.1.hook_resid_post"
    for positions in ("last", 0, -2, [0, -1]):
        found = model.capture(MIXED, site, positions, padding_side=side)[site]
        for example, row in enumerate(MIXED):
            alone = model.capture([row], site, positions)[site][0]
            torch.testing.assert_close(found[example], alone, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_with_the_end_token(side, tokenizer):
    """GPT-2's habit: pad == eos. A real end token inside a text stays a token."""
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    model = interp.attach(build("gpt2"), tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    texts = ["the cat <eos> sat", "a dog saw the red bird on the mat", "mouse <eos>"]
    acts = model.capture(texts, "blocks.2.hook_resid_post")
    assert acts.batch.lengths == [4, 9, 2]
    for example, text in enumerate(texts):
        alone = model.capture(text, "blocks.2.hook_resid_post")["blocks.2.hook_resid_post"][0]
        found = real_parts(acts, "blocks.2.hook_resid_post", example)
        torch.testing.assert_close(found, alone, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_encodings_texts_and_ids_are_the_same_input(name, tokenizer):
    model = interp.attach(build(name), tokenizer)
    texts = ["the cat sat", "a dog saw the red bird"]
    wanted = model.run(texts)
    encoding = tokenizer(texts, return_tensors="pt", padding=True)
    if name != "bert":
        encoding.pop("token_type_ids", None)
    assert torch.equal(model.run(encoding), wanted)
    assert torch.equal(model.run(dict(encoding)), wanted)
    assert torch.equal(model.run(model.batch(texts)), wanted)
    rows = [tokenizer(t)["input_ids"] for t in texts]
    assert torch.equal(model.run(rows), wanted)
    assert torch.equal(model.run([torch.tensor(r) for r in rows]), wanted)
    assert torch.equal(model.run(rows[0]), model.run([rows[0]]))
    assert torch.equal(model.run(torch.tensor(rows[0])), model.run([rows[0]]))
    assert torch.equal(model.run(tuple(texts)), wanted)


def test_equal_to_the_module_itself():
    for name in ("llama", "gpt2"):
        module = build(name)
        ids, mask = torch.tensor([[3, 17, 42, 0, 0], [5, 11, 50, 29, 7]]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
        with torch.no_grad():
            wanted = module(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(interp.attach(module).run({"input_ids": ids, "attention_mask": mask}), wanted)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_order_and_number_of_requests(name):
    model, x = interp.attach(build(name)), inputs_for(name)
    sites = [row["site"] for row in model.sites()]
    everything, backwards = model.capture(x, sites), model.capture(x, sites[::-1])
    assert list(backwards) == sites[::-1]
    for site in sites:
        assert torch.equal(everything[site], backwards[site])
        single = model.capture(x, site)[site]
        assert torch.equal(single, everything[site]), site
    twice = model.capture(x, [sites[3], sites[3], sites[1]])
    assert list(twice) == [sites[3], sites[1]]


def test_a_site_at_several_places_at_once():
    model, x = interp.attach(build("llama")), inputs_for("llama")
    acts = model.capture(x, ["blocks.1.attn.hook_z", "blocks.1.attn.hook_z#2", "blocks.1.attn.hook_z#2@-1"])
    whole, head, place = acts.values()
    assert torch.equal(head, whole[:, :, 2:3])
    assert torch.equal(place, whole[:, -1:, 2:3])
    assert [str(s) for s in acts.sites] == list(acts)


def test_a_causal_model_without_a_mask_is_padded_on_the_right_only():
    model = interp.attach(build_hand(), layout=interp.Layout(**HAND_LAYOUT))
    assert model.run([[1, 2, 3], [4, 5, 6]]).shape[:2] == (2, 3)
    together, alone = model.run([[1, 2, 3], [4, 5]]), model.run([[4, 5]])
    torch.testing.assert_close(together[1, :2], alone[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(interp.InterpError, match="attention_mask"):
        model.run([[1, 2, 3], [4, 5]], padding_side="left")


def test_real_rows():
    model, site = interp.attach(build("llama")), "blocks.0.hook_resid_post"
    for side in ("left", "right"):
        rows = model.capture(MIXED, site, padding_side=side).real(site)
        wanted = torch.cat([model.capture([row], site)[site][0] for row in MIXED])
        torch.testing.assert_close(rows, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(interp.InterpError, match="positions"):
        model.capture(MIXED, site, "last").real(site)


def test_position_embeddings_are_edited_for_one_example_only():
    """The model computes them once for the whole batch; a site has a row for each example all the same."""
    model, x = interp.attach(build("gpt2")), inputs_for("gpt2")
    plan = [interp.Zero("hook_pos_embed", positions=[[1], [3]])]
    found = model.capture(x, ["hook_pos_embed", "blocks.0.hook_resid_pre"], plan=plan)
    table = model.module.transformer.wpe.weight[: x.shape[1]].detach().expand(2, -1, -1).clone()
    table[0, 1], table[1, 3] = 0, 0
    assert torch.equal(found["hook_pos_embed"], table)
    words = model.module.transformer.wte.weight[x].detach()
    torch.testing.assert_close(found["blocks.0.hook_resid_pre"], words + table, rtol=0, atol=1e-6)


class Positional(HandLM):
    """A hand-written model whose forward calls its ids something else."""

    def forward(self, x):
        return super().forward(x)


def test_a_hand_written_model_may_call_its_ids_anything():
    torch.manual_seed(0)
    module = perturb(Positional()).eval()
    model = interp.attach(module, layout=interp.Layout(**HAND_LAYOUT))
    ids = torch.tensor([IDS[0]])
    assert torch.equal(model.run(ids), module(ids))
    assert torch.equal(model.run(np.asarray(ids)), module(ids))
    last = model.capture(MIXED, "blocks.1.hook_resid_post", positions="last")["blocks.1.hook_resid_post"]
    alone = model.capture([MIXED[1]], "blocks.1.hook_resid_post", positions="last")["blocks.1.hook_resid_post"]
    torch.testing.assert_close(last[1:2], alone, rtol=1e-5, atol=1e-5)
    scope = interp.LinearScope(model, ids)
    assert all(row["holds"] for row in scope.check())
    with pytest.raises(interp.InterpError, match="is off by"):
        interp.attach(perturb(Positional()).eval(), layout=interp.Layout(**HAND_LAYOUT | {"ln1": "n2", "ln2": "n1"}))
