"""Readings of scopes of language models: several texts at once, both ways to share a product, token contributions."""

import pytest
import torch

import interp
from interp.hooks.errors import InputError
from interp.hooks.linearization import Linearization
from interp.saving import load_result, save_result
from tests.cases import build, inputs_for

SPLIT = Linearization("gain", "frozen", "frozen", "split")
TEXTS = ["the cat sat on the mat", "dog", "the mouse sat"]


def assert_equal(one, two):
    assert one.in_shape == two.in_shape
    for name, block in one.blocks.items():
        assert torch.equal(block.value, two.blocks[name].value)
    scale = float(two.y.abs().max())
    assert (one.y - two.y).abs().max() <= 1e-6 * scale
    first, second = one.votes(5, margin_to=7), two.votes(5, margin_to=7)
    assert (first.map - second.map).abs().max() <= 1e-5 * first.abs_total
    assert abs(first.residual - second.residual) <= 1e-5 * first.abs_total


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_text_has_its_own_scope_whatever_its_mates(name, tokenizer):
    model = interp.attach(build(name), tokenizer)
    order = [2, 0, 1]
    for scope, i in zip(interp.LinearScope.each(model, [TEXTS[i] for i in order]), order, strict=True):
        alone = interp.LinearScope(model, TEXTS[i])
        assert_equal(scope, alone)
        assert scope.labels == alone.labels


@pytest.mark.parametrize(("name", "side"), [("llama", "left"), ("gpt2", "left"), ("gpt2", "right"), ("bert", "right")])
def test_padding_of_a_batch_does_not_matter(name, side):
    model = interp.attach(build(name))
    rows = [[5, 9, 3, 20, 11], [7, 2]]
    alone = [interp.LinearScope(model, torch.tensor([row])) for row in rows]
    batch = model.batch(rows, padding_side=side)
    for inputs in (batch, {"input_ids": batch.ids, "attention_mask": batch.mask.long()}):
        for scope, one in zip(interp.LinearScope.each(model, inputs), alone, strict=True):
            assert_equal(scope, one)


def test_what_belongs_to_each_token_is_kept_and_the_rest_refused():
    model = interp.attach(build("bert"))
    ids = torch.tensor([[5, 9, 3], [7, 2, 0]])
    given = {
        "input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "token_type_ids": torch.tensor([[0, 1, 1], [1, 1, 0]]),
    }  # fmt: skip
    first, second = interp.LinearScope.each(model, given)
    alone = {"input_ids": ids[1:, :2], "token_type_ids": torch.ones(1, 2, dtype=torch.long)}
    assert_equal(second, interp.LinearScope(model, alone))
    assert first.in_shape[0] == 3
    with pytest.raises(InputError, match="position_ids"):
        interp.LinearScope.each(model, {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2]])})


# Products and what they say ---


@pytest.mark.parametrize("linearization", ["frozen", SPLIT], ids=["gate", "split"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_votes_for_a_logit_and_a_margin_sum_under_gate_and_split(name, linearization):
    model, ids = interp.attach(build(name)), inputs_for(name)[:1]
    scope = interp.LinearScope(model, ids, linearization)
    logits = model.run(ids)[0, 3]
    for arguments, options, value in (
        ((5,), {}, logits[5]), ((5, 7), {}, logits[5] - logits[7]),
        ((5, [7, 8]), {}, logits[5] - logits[[7, 8]].mean()),
        ((5,), {"centred": True}, logits[5] - logits.mean()),
    ):  # fmt: skip
        votes = scope.votes(*arguments, position=3, **options)
        assert votes.value == pytest.approx(float(value), abs=1e-5)
        assert votes.total + votes.residual == pytest.approx(float(value), abs=1e-4)
        assert votes.map[4:].abs().max() == 0
        assert votes.linearization == scope.network.held.name


def test_gate_and_split_share_the_products_in_different_ways():
    model, ids = interp.attach(build("llama")), inputs_for("llama")[:1]
    gate, split = (interp.LinearScope(model, ids, held).votes(5, margin_to=7) for held in ("frozen", SPLIT))
    assert (gate.map - split.map).abs().max() > 1e-2 * gate.map.abs().max()


def test_votes_under_exact_are_gradient_times_input():
    module, ids = build("llama"), inputs_for("llama")[:1]
    scope = interp.LinearScope(interp.attach(module), ids, "exact")
    embeddings = module.get_input_embeddings()(ids).detach().requires_grad_()
    logits = module(inputs_embeds=embeddings).logits[0, -1]
    wanted = (torch.autograd.grad(logits[5] - logits[7], embeddings)[0] * embeddings).sum(-1)[0].detach()
    votes = scope.votes(5, margin_to=7)
    assert (votes.map - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_mean_embedding_as_origin():
    model, ids = interp.attach(build("gpt2")), inputs_for("gpt2")[:1]
    plain = interp.LinearScope(model, ids)
    scope = interp.LinearScope(model, ids, origin="mean")
    row = plain.rmatvec(plain.direction(5))
    wanted = (row * (plain.x[0] - plain.x[0].mean(0))).sum(-1)
    torch.testing.assert_close(scope.votes(5).map, wanted, rtol=1e-4, atol=1e-5)
    report = scope.bias_report(5)
    assert report.residual == pytest.approx(scope.votes(5).residual, rel=1e-4, abs=1e-5)
    assert report.origin == "mean"


# Token blocks ---


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_contributions_are_the_moved_embeddings(name, tmp_path):
    model, ids = interp.attach(build(name)), inputs_for(name)[:1]
    scope = interp.LinearScope(model, ids, output="blocks.1.hook_resid_post")
    length, width = scope.out_shape
    dense = scope.dense().reshape(length, width, length, width).double()
    wanted = torch.einsum("tisj,sj->tsi", dense, scope.x[0].double()).norm(dim=-1)
    found = scope.token_blocks([2, -1])
    torch.testing.assert_close(found.contributions, wanted[[2, length - 1]], rtol=1e-5, atol=1e-6)
    assert (found.contributions <= found.norms * scope.x[0].norm(dim=-1).double() * (1 + 1e-5)).all()
    assert found.contributions[0, 3:].abs().max() == 0, "a later token moves nothing earlier"
    assert torch.equal(scope.token_blocks([2, -1], probes=4).contributions, found.contributions)
    moved = interp.LinearScope(model, ids, output="blocks.1.hook_resid_post", origin="mean").token_blocks([2])
    less = torch.einsum("isj,sj->si", dense[2], (scope.x[0] - scope.x[0].mean(0)).double()).norm(dim=-1)
    torch.testing.assert_close(moved.contributions[0], less, rtol=1e-4, atol=1e-6)
    row = found.to_records()[1]
    assert row["contribution"] == pytest.approx(float(wanted[2, 1]), rel=1e-5)
    save_result(found, tmp_path / "blocks")
    back = load_result(tmp_path / "blocks")
    assert torch.equal(back.norms, found.norms)
    assert torch.equal(back.contributions, found.contributions)
    assert (back.positions, back.standard_errors, back.linearization) == (found.positions, None, "frozen")


def test_a_votes_share_of_a_contribution():
    """The signed part of ‖F_ts E_s‖ along an output direction is the token's vote."""
    model, ids = interp.attach(build("llama")), inputs_for("llama")[:1]
    scope = interp.LinearScope(model, ids, output="blocks.1.hook_resid_post")
    w = torch.zeros(scope.out_shape)
    w[4] = torch.linspace(-1, 1, scope.out_shape[1])
    votes, blocks = scope.votes(w).map, scope.token_blocks([4]).contributions[0]
    assert (votes.abs() <= blocks * w.norm() * (1 + 1e-5)).all()
