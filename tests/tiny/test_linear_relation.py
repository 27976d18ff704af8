"""Linear relations in tiny models against autograd and edits through the model's own code."""

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, PositionError, SiteUnavailableError
from tests.cases import build
from tests.tiny.test_jacobians import CLOSE, dtype_of, relative

TEMPLATE, LAYER = "the {} sat in the", 0
EXAMPLES, NEW = [("cat", "house"), ("dog", "tree")], [("mouse", "river"), ("bird", "house"), ("Mary", "store")]


def attached(name, tokenizer, **options):
    return interp.attach(build(name, dtype=dtype_of(name), **options), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    return attached("llama", tokenizer)


@pytest.fixture(scope="module")
def relation(model):
    return interp.LinearRelation.fit(model, TEMPLATE, EXAMPLES, LAYER)


def prompts(examples, few_shot=True):
    """Each example's prompt, and where its subject is."""
    for subject, _ in examples:
        others = [f"the {s} sat in the {o}\n" for s, o in examples if s != subject] if few_shot else []
        yield "".join(others) + f"the {subject} sat in the"


def by_hand(model, prompt, layer=LAYER):
    """Subject's state, last state, and d last / d subject, by hooks and backward passes."""
    module, kept = model.module, {}
    blocks = module.model.layers if hasattr(module, "model") else module.transformer.h
    hidden = lambda o: o[0] if isinstance(o, tuple) else o
    hooks = [
        blocks[layer].register_forward_hook(lambda m, a, o: kept.update(s=hidden(o))),
        blocks[-1].register_forward_hook(lambda m, a, o: kept.update(o=hidden(o))),
    ]
    ids = model.batch(prompt).ids
    module(ids)
    for hook in hooks:
        hook.remove()
    at, last = ids.shape[1] - 4, kept["o"][0, -1]
    rows = [torch.autograd.grad(value, kept["s"], retain_graph=True)[0][0, at] for value in last]
    return kept["s"][0, at].detach(), last.detach(), torch.stack(rows), at


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2", "mixtral"])
@pytest.mark.parametrize("few_shot", [True, False])
def test_weight_and_bias_are_means_over_examples(name, few_shot, tokenizer):
    model = attached(name, tokenizer)
    found = interp.LinearRelation.fit(model, TEMPLATE, EXAMPLES, LAYER, few_shot=few_shot)
    seen = [by_hand(model, prompt) for prompt in prompts(EXAMPLES, few_shot)]
    close = 1e-4 if name == "mixtral" else CLOSE
    assert relative(found.weight, torch.stack([j for _, _, j, _ in seen]).mean(0).float()) < close
    rest = torch.stack([o - j @ s for s, o, j, _ in seen]).mean(0)
    assert relative(found.bias, rest.float()) < 10 * close


def test_one_example_is_met_exactly(model):
    found = interp.LinearRelation.fit(model, TEMPLATE, EXAMPLES[:1], LAYER)
    s, o, _, _ = by_hand(model, next(prompts(EXAMPLES[:1])))
    assert relative(found(s), o.float()) < 1e-5
    assert relative(found.with_beta(2.0)(s) - found.bias, 2 * (o.float() - found.bias)) < 1e-5


def test_the_inverse_undoes_the_largest_directions(relation):
    _, _, vh = torch.linalg.svd(relation.weight)
    for rank in (1, 5, 32):
        kept = vh[:rank].T @ vh[:rank]
        assert relative(relation.inverse(rank) @ relation.weight, kept) < 1e-3
    for rank in (0, 33, True):
        with pytest.raises(ArgumentError, match="rank"):
            relation.inverse(rank)
    flat = interp.LinearRelation(torch.ones(32, 32), torch.zeros(32), 0, TEMPLATE, EXAMPLES)
    with pytest.raises(ArgumentError, match="W's own, 1"):
        flat.inverse(2)


def test_scores_are_those_of_the_models_own_edits(model, relation):
    score = relation.evaluate(model, NEW, rank=8)
    module = model.module
    shown = "".join(f"the {s} sat in the {o}\n" for s, o in EXAMPLES)
    seen = [by_hand(model, f"{shown}the {s} sat in the") for s, _ in NEW]
    first = lambda text: model.tokenizer.encode(f" {text}", add_special_tokens=False)[0]
    say = lambda x: int(module.lm_head(module.model.norm(x.double())).argmax())
    agree, hits = [], []
    for i, (s, o, _, at) in enumerate(seen):
        agree.append(say(relation(s)) == say(o))
        moved = s + (relation.inverse(8) @ (seen[(i + 1) % 3][1] - o).float()).double()

        def edit(m, a, out, at=at, moved=moved):
            out = (out[0] if isinstance(out, tuple) else out).clone()
            out[0, at] = moved
            return out

        hook = module.model.layers[LAYER].register_forward_hook(edit)
        token = int(module(model.batch(f"{shown}the {NEW[i][0]} sat in the").ids).logits[0, -1].argmax())
        hook.remove()
        hits.append(token == first(NEW[(i + 1) % 3][1]))
        assert score.rows[i]["then"] == model.tokenizer.decode([token])
        assert score.rows[i]["edited to"] == NEW[(i + 1) % 3][1]
    assert score.faithfulness == pytest.approx(sum(agree) / 3)
    assert score.causality == pytest.approx(sum(hits) / 3)
    assert relation.evaluate(model, NEW).causality is None
    assert interp.chart(score, beside={"again": score}).to_dict()


def test_files_give_the_relation_back(relation, tmp_path):
    from interp.saving import load_result, save_result

    save_result(relation, tmp_path / "relation")
    found = load_result(tmp_path / "relation")
    assert torch.equal(found.weight, relation.weight)
    assert (found.layer, found.template, found.few_shot) == (LAYER, TEMPLATE, True)


BAD = {
    "no place": (dict(template="the cat"), ArgumentError, r"one \{\}"),
    "two places": (dict(template="{} and {}"), ArgumentError, r"one \{\}"),
    "no examples": (dict(examples=[]), ArgumentError, "at least one pair"),
    "an empty object": (dict(examples=[("cat", "")]), ArgumentError, "none empty"),
    "a triple": (dict(examples=[("cat", "tree", "red")]), ArgumentError, "pair"),
    "twice": (dict(examples=[("cat", "tree"), ("cat", "house")]), ArgumentError, "twice"),
    "the last layer": (dict(layer=2), ArgumentError, r"0\.\.1"),
    "a negative layer": (dict(layer=-1), ArgumentError, r"0\.\.1"),
    "beta": (dict(beta=0.0), ArgumentError, "positive"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name, model):
    options, error, words = BAD[name]
    options = dict(template=TEMPLATE, examples=EXAMPLES, layer=LAYER) | options
    with pytest.raises(error, match=words):
        interp.LinearRelation.fit(model, **options)


def test_bad_pairs_are_refused(model, relation):
    with pytest.raises(ArgumentError, match="fitted on"):
        relation.evaluate(model, EXAMPLES)
    with pytest.raises(ArgumentError, match="different objects"):
        relation.evaluate(model, [("mouse", "river"), ("bird", "river")], rank=4)
    with pytest.raises(ArgumentError, match="at least one"):
        relation.evaluate(model, [])
    with pytest.raises(SiteUnavailableError, match="linear relation in Bert"):
        interp.LinearRelation.fit(interp.attach(build("bert")), TEMPLATE, EXAMPLES, LAYER)
    with pytest.raises(PositionError, match="goes beyond"):
        interp.LinearRelation.fit(model, "the {}at sat", [("c", "house")], LAYER, few_shot=False)
