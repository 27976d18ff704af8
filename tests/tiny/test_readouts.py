"""What pages of the explorer read: next tokens, patterns, lenses at positions, extended paths, spectra."""

import numpy as np
import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, PositionError
from tests.cases import build

PROMPT = "Mary gave the book to"
FAMILIES = ("llama", "gpt2")


@pytest.fixture(params=FAMILIES)
def model(request, tokenizer):
    return interp.attach(build(request.param), tokenizer)


def ids_of(model):
    return torch.tensor([model.tokenizer.encode(PROMPT)])


@torch.no_grad()
@pytest.mark.parametrize("position", [-1, 1])
def test_next_tokens_are_the_models_own(model, position):
    p = torch.softmax(model.module(ids_of(model)).logits[0, position].double(), -1)
    found = interp.next_tokens(model, PROMPT, 5, position=position)
    order = p.argsort(descending=True)[:5].tolist()
    assert [row["id"] for row in found] == order
    np.testing.assert_allclose([row["probability"] for row in found], p[order], rtol=1e-5)
    assert [row["token"] for row in found] == [model.tokenizer.decode([i]) for i in order]


def test_next_tokens_follow_a_plan(model):
    plan = [interp.Zero("blocks.0.hook_resid_post")]
    assert interp.next_tokens(model, PROMPT, plan=plan).to_records() != interp.next_tokens(model, PROMPT).to_records()


def test_next_tokens_refuse(model):
    with pytest.raises(ArgumentError, match="k=0"):
        interp.next_tokens(model, PROMPT, 0)
    with pytest.raises(ArgumentError, match="2 prompts"):
        interp.next_tokens(model, [PROMPT, PROMPT])
    with pytest.raises(PositionError):
        interp.next_tokens(model, PROMPT, position=99)


@torch.no_grad()
def test_patterns_are_the_models_own(model):
    model.module.set_attn_implementation("eager")
    own = model.module(ids_of(model), output_attentions=True).attentions
    for layer in range(model.n_layers):
        found = interp.attention_patterns(model, PROMPT, layer)
        torch.testing.assert_close(found.pattern, own[layer][0], rtol=1e-5, atol=1e-6)
    assert found.tokens == [model.tokenizer.decode([i]) for i in ids_of(model)[0]]
    rows = found.to_records(1)
    assert sum(r["weight"] for r in rows) == pytest.approx(len(found.tokens))
    assert found.top(1)[0]["weight"] == pytest.approx(float(found.pattern[:, -1].max()))


def test_patterns_refuse_and_are_saved(model, tmp_path):
    with pytest.raises(ArgumentError, match="layer 9"):
        interp.attention_patterns(model, PROMPT, 9)
    found = interp.attention_patterns(model, PROMPT, 0)
    with pytest.raises(ArgumentError, match="head 77"):
        found.to_records(77)
    run = interp.Run.create(tmp_path, "demo", {})
    run.save("patterns", found)
    assert torch.equal(run.load("patterns").pattern, found.pattern)


def test_a_lens_at_positions_is_part_of_the_whole(model):
    whole = interp.logit_lens(model, PROMPT, ["John"])
    part = interp.logit_lens(model, PROMPT, ["John"], positions=[3, 1])
    assert part.tokens == [whole.tokens[3], whole.tokens[1]]
    assert part.places == [3, 1]
    assert torch.equal(part.top_ids, whole.top_ids[:, [3, 1]])
    torch.testing.assert_close(part.probabilities, whole.probabilities[:, [3, 1]])
    rows = {(r["layer"], r["position"]): r["top"] for r in whole.to_records()}
    assert all(rows[r["layer"], r["position"]] == r["top"] for r in part.to_records())
    assert [r["top"] for r in part.at(0)] == [rows[layer, 3] for layer in part.layers]
    assert interp.chart(part, position=0).to_dict()["params"][0]["value"] == [{"position": 3}]


@pytest.mark.parametrize("path", ["", "L2H0@3 -> logits@-1"])
def test_an_extended_path_is_one_round_of_the_search(model, path):
    n = interp.Observable.logit_diff(model, "John", "Mary")
    found = interp.extend_path(model, n, PROMPT, path)
    assert len(found.paths) == found.tried == len(set(found.paths))
    assert found.scores.abs().tolist() == sorted(found.scores.abs().tolist(), reverse=True)
    for longer, score in list(zip(found.paths, found.scores.tolist(), strict=True))[:5]:
        step = longer.split(" -> ")[0]
        if step == "embed":
            continue
        whole = interp.propagate(model, n, PROMPT, path=longer)
        reached = float(whole.score(model.capture(PROMPT, str(whole.site.whole)))[0] + whole.offset)
        if "H" in step:  # A head's own rule is linear in what it reads: its vector gives what it adds.
            assert reached == pytest.approx(score, rel=2e-2, abs=2e-3)
    if not path:
        searched = interp.find_paths(model, n, PROMPT, beam=3, max_length=1, score="attribution")
        assert searched.paths == found.paths[:3]


def test_an_extended_path_refuses(model):
    n = interp.Observable.logit_diff(model, "John", "Mary")
    with pytest.raises(ArgumentError, match="nothing feeds it"):
        interp.extend_path(model, n, PROMPT, "embed -> L1H0@2 -> logits@-1")
    with pytest.raises(ArgumentError, match="score"):
        interp.extend_path(model, n, PROMPT, score="linear")


def test_spectra_are_singular_values_of_dense_jacobians(model):
    found = interp.layer_spectra(
        model, PROMPT, "hook_resid_pre", "hook_resid_post", 3, positions=[1, -1], layers=[0, 2]
    )
    assert found.positions == [1, 4]
    for i, layer in enumerate(found.layers):
        ends = [f"blocks.{layer}.hook_resid_{side}" for side in ("pre", "post")]
        dense = interp.jacobian(model, PROMPT, *ends, [1, -1], method="autograd").dense()
        own = torch.linalg.svdvals(dense.double())[:, :3]
        np.testing.assert_allclose(found.values[i], own, rtol=1e-4)
    assert len(found.to_records()) == 2 * 2 * 3
    with pytest.raises(ArgumentError, match="layers"):
        interp.layer_spectra(model, PROMPT, layers=[99])
