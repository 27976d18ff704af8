"""Steering and reading while a model writes, against transformers' own generate and against the finished text."""

import pytest
import torch

import interp
from interp.hooks.errors import ArgumentError, InputError, InterventionError, SiteError, SiteUnavailableError
from tests.cases import MIXED, WIDTH, build, build_cnn

SITE = "blocks.1.hook_resid_post"
SITES = ["hook_embed", SITE, "blocks.2.hook_mlp_out", "blocks.0.attn.hook_z", "ln_final.hook_normalized"]
NAMES = ["llama", "mistral", "gpt2", "gemma3", "neox-parallel", "gpt-j"]
STEER = torch.linspace(-3, 3, WIDTH)


def greedy(module, rows, new):
    """transformers' own greedy decoding, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return module.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, use_cache=True
    )


@pytest.mark.parametrize("name", NAMES)
def test_tokens_equal_those_of_transformers(name):
    module = build(name)
    wanted = greedy(module, MIXED, 6)
    written = interp.attach(module).generate(MIXED, max_new_tokens=6, capture=SITE)
    assert torch.equal(written.tokens, wanted)
    for example, row in enumerate(MIXED):
        assert written.tokens[example][written.mask[example] & ~written.new[example]].tolist() == row


@pytest.mark.parametrize("name", NAMES)
def test_activations_equal_those_of_the_finished_text(name):
    """In a batch of mixed lengths of which one example ends early."""
    module = build(name)
    model = interp.attach(module)
    free = greedy(module, MIXED, 6)[:, -6:].tolist()
    stop = next(t for row in free for t in row[1:4] if sum(t in other for other in free) < len(free))
    module.generation_config.eos_token_id = stop
    written = model.generate(MIXED, max_new_tokens=6, capture=SITES)
    lengths = [row.index(stop) + 1 if stop in row else 6 for row in free]
    assert written.new.sum(1).tolist() == lengths
    assert len(set(lengths)) > 1
    for example, row in enumerate(free):
        assert written.tokens[example][written.new[example]].tolist() == row[: lengths[example]]
    read = written.positions.shape[1]
    assert read == written.tokens.shape[1] - 1
    for example, row in enumerate(MIXED):
        text = written.tokens[example][written.mask[example]]
        assert text[: len(row)].tolist() == row
        keep = written.mask[example, :read]
        assert written.positions[example][keep].tolist() == list(range(int(keep.sum())))
        assert (written.positions[example][~keep] == -1).all()
        acts = model.capture([text.tolist()], SITES)
        for site in SITES:
            found = written.activations[site][example][keep]
            torch.testing.assert_close(found, acts[site][0][: len(found)], rtol=2e-5, atol=2e-5, msg=site)
            new = written.generated(site, example)
            torch.testing.assert_close(new, acts[site][0][len(row) : len(found)], rtol=2e-5, atol=2e-5, msg=site)


def test_steering_changes_what_is_written():
    model = interp.attach(build("llama"))
    plain = model.generate(MIXED, max_new_tokens=6)
    steered = model.generate(MIXED, max_new_tokens=6, plan=[interp.Add(SITE, STEER)])
    assert not torch.equal(plain.tokens, steered.tokens)
    again = model.generate(MIXED, max_new_tokens=6, plan=[interp.Add(SITE, STEER, scale=0.0)])
    assert torch.equal(plain.tokens, again.tokens)
    one = model.generate(MIXED, max_new_tokens=6, plan=interp.Add(SITE, STEER))
    assert torch.equal(one.tokens, steered.tokens)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_steered_text_equals_token_by_token_runs(name):
    """The slow twin: at each step a plain run of the whole text, steered everywhere, and its most likely token."""
    model, plan = interp.attach(build(name)), [interp.Add(SITE, STEER)]
    text = list(MIXED[0])
    for _ in range(5):
        text.append(int(model.run([text], plan=plan)[0, -1].argmax()))
        if text[-1] == 2:
            break
    assert model.generate([MIXED[0]], max_new_tokens=5, plan=plan).tokens[0].tolist() == text


def test_phases():
    model = interp.attach(build("llama"))
    options = {"max_new_tokens": 5, "capture": SITE}
    prompt = model.generate(MIXED, plan=[interp.Zero(SITE, positions="prompt")], **options)
    generated = model.generate(MIXED, plan=[interp.Zero(SITE, positions="generated")], **options)
    first = model.generate([MIXED[0]], plan=[interp.Zero(SITE, positions=[0, 2])], **options)
    everywhere = model.generate(MIXED, plan=[interp.Zero(SITE)], **options)
    for example, row in enumerate(MIXED):
        old = prompt.mask[example] & ~prompt.new[example]
        assert prompt.activations[SITE][example][old[:-1]].abs().max() == 0
        assert prompt.generated(SITE, example).abs().min() > 0
        assert generated.activations[SITE][example][old[:-1]].abs().min() > 0
        assert len(row) == old.sum()
        for written in (generated, everywhere):
            assert written.generated(SITE, example).numel() == 0 or written.generated(SITE, example).abs().max() == 0
    zero = (first.activations[SITE][0].abs().amax(-1) == 0).nonzero().flatten().tolist()
    assert zero == [0, 2]


def test_patches_act_in_the_prompt():
    model = interp.attach(build("llama"))
    other = [row[::-1] for row in MIXED]
    plan = [interp.Patch(SITE, other, positions="last")]
    written = model.generate(MIXED, max_new_tokens=2, plan=plan, capture=SITE)
    wanted = model.capture(other, SITE, "last")[SITE]
    for example, row in enumerate(MIXED):
        keep = written.mask[example]
        value = written.activations[SITE][example][keep[: written.positions.shape[1]]][len(row) - 1]
        torch.testing.assert_close(value, wanted[example, 0], rtol=2e-5, atol=2e-5)
    with pytest.raises(InterventionError, match="generated"):
        model.generate(MIXED, plan=[interp.Patch(SITE, other, positions="generated")])


def test_sampling():
    model = interp.attach(build("llama"))
    state = torch.get_rng_state()
    one = model.generate(MIXED, max_new_tokens=8, do_sample=True, seed=3, temperature=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    two = model.generate(MIXED, max_new_tokens=8, do_sample=True, seed=3, temperature=2.0)
    other = model.generate(MIXED, max_new_tokens=8, do_sample=True, seed=4, temperature=2.0)
    assert torch.equal(one.tokens, two.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    likely = model.generate(MIXED, max_new_tokens=4, do_sample=True, seed=3, top_k=1)
    assert torch.equal(likely.tokens, model.generate(MIXED, max_new_tokens=4).tokens)


def test_text_and_its_decoding(tokenizer):
    model = interp.attach(build("gpt2"), tokenizer)
    written = model.generate(["the cat sat", "a dog"], max_new_tokens=4)
    for example, text in enumerate(written.texts):
        ids = written.tokens[example][written.new[example]]
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert interp.attach(build("gpt2")).generate(MIXED, max_new_tokens=2).texts == ["", "", ""]


@pytest.mark.parametrize("capture", [SITE, interp.Site(SITE), [SITE], [interp.Site(SITE)], "blocks.1.hook_resid_pos?"])
def test_ways_to_name_sites(capture):
    written = interp.attach(build("llama")).generate(MIXED, max_new_tokens=2, capture=capture)
    assert list(written.activations) == [SITE]
    assert torch.equal(written.generated(interp.Site(SITE)), written.generated(SITE))


@pytest.mark.parametrize("site", ["blocks.0.attn.hook_pattern", "blocks.0.attn.hook_rot_q", f"{SITE}@1", "logits"])
def test_sites_that_do_not_exist_while_writing(site):
    model = interp.attach(build("llama"))
    with pytest.raises(SiteUnavailableError, match="finished text"):
        model.generate(MIXED, capture=site)
    if ".attn." in site:
        with pytest.raises(SiteUnavailableError, match="finished text"):
            model.generate(MIXED, plan=[interp.Zero(site)])


def test_logits_can_be_steered():
    """A token can be forbidden; reading logits is refused, since of the prompt only the last are computed."""
    model = interp.attach(build("llama"))
    first = model.generate(MIXED, max_new_tokens=4).tokens[0, -1]
    penalty = torch.zeros(model.bindings.sizes["vocab"])
    penalty[first] = -1e4
    written = model.generate(MIXED, max_new_tokens=4, plan=[interp.Add("logits", penalty)])
    assert not (written.tokens[:, -4:] == first).any()


def test_means_while_writing():
    model = interp.attach(build("llama"))
    with pytest.raises(InterventionError, match="own batch"):
        model.generate(MIXED, plan=[interp.Mean(SITE)])
    written = model.generate(MIXED, max_new_tokens=3, plan=[interp.Mean(SITE, over=MIXED)], capture=SITE)
    wanted = model.capture(MIXED, SITE).real(SITE).mean(0)
    torch.testing.assert_close(written.generated(SITE)[0], wanted, rtol=1e-5, atol=1e-5)


def test_an_intervention_may_run_the_model_itself():
    model, seen = interp.attach(build("llama")), []

    def look(value):
        seen.append(model.run(MIXED))
        return value

    plain = model.generate(MIXED, max_new_tokens=3, capture=SITE)
    written = model.generate(MIXED, max_new_tokens=3, capture=SITE, plan=[interp.Function("hook_embed", look)])
    assert torch.equal(written.tokens, plain.tokens)
    assert written.activations[SITE].shape == plain.activations[SITE].shape
    assert len(seen) >= 2
    assert torch.equal(seen[0], model.run(MIXED))


def test_refusals(tokenizer):
    model = interp.attach(build("llama"))
    with pytest.raises(ArgumentError, match="at least 1"):
        model.generate(MIXED, max_new_tokens=0)
    with pytest.raises(SiteError, match="did you mean"):
        model.generate(MIXED, capture="blocks.1.hook_resid_pst")
    with pytest.raises(InputError, match="tokenizer"):
        model.generate("the cat")
    with pytest.raises(InputError, match="chat template"):
        interp.attach(build("llama"), tokenizer).generate("the cat", chat=True)
    with pytest.raises(TypeError, match="temprature"):
        model.generate(MIXED, temprature=1.0)
    with pytest.raises(ArgumentError, match="generate"):
        interp.attach(build_cnn()).generate(torch.ones(1, 3, 6, 6))
    with pytest.raises(ArgumentError, match="generate"):
        interp.attach(build("bert", base=True)).generate(MIXED)
    for option in ({"temperature": 0.0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}):
        with pytest.raises(ArgumentError, match=next(iter(option))):
            model.generate(MIXED, do_sample=True, **option)
    with pytest.raises(ArgumentError, match="do_sample"):
        model.generate(MIXED, temperature=0.7)
