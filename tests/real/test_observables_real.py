"""Observables on SmolLM2: what its tokenizer makes of words, and what the model says of them."""

import warnings

import pytest
import torch

from interp import Observable, ObservableSet, direct_attribution
from interp.hooks.errors import TokenError

pytestmark = pytest.mark.slow


def test_a_missing_space_is_pointed_out_with_both_ids(smollm2):
    with pytest.warns(UserWarning, match=r"'she' is id 6691; ' she' \(with a leading space\) is another token, 1041"):
        assert Observable.logit(smollm2, "she").ids == (6691,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Observable.logit(smollm2, " she").ids == (1041,)


def test_words_of_several_ids(smollm2):
    with pytest.raises(
        TokenError, match=r"' carpentry' encodes to 2 ids \[14727, 10842\]; needed: exactly one"
    ) as info:
        Observable.logit_diff(smollm2, " carpentry", " he")
    for way in ("pass an id", "multi_token='first' or 'mean'", "Observable.sequence(...)"):
        assert way in str(info.value)
    with pytest.raises(
        TokenError, match=r"'programmers' encodes to .*' programmers' \(with a leading space\) is one, 23983"
    ):
        Observable.logit(smollm2, "programmers")
    first = Observable.logit_diff(smollm2, " carpentry", " barista", multi_token="first")
    assert first.ids == (14727, 2753)
    long = Observable.logit_diff(smollm2, " antidisestablishment", " antidisestablishing", multi_token="first")
    assert long.ids == (30834, 15301)
    assert "behind the ids [1598, 17889]" in long.note
    mean = Observable.logit(smollm2, " carpentry", multi_token="mean")
    rows = smollm2.module.lm_head.weight.detach()
    torch.testing.assert_close(mean.pull_to_stream(smollm2)[0], rows[[14727, 10842]].mean(0))


def test_a_sequence_of_words_and_its_attribution(smollm2):
    found = Observable.sequence_log_prob(smollm2, "She works in", " carpentry")
    assert len(found.terms) == 2
    ids = [list(found.ids)]
    parts = [direct_attribution(smollm2, o, ids, position=p).total for p, o in found.terms]
    assert sum(parts) == pytest.approx(float(found.measure(smollm2.run(ids))), rel=1e-3, abs=1e-3)
    wanted = torch.log_softmax(smollm2.module(torch.tensor(ids)).logits[0].detach(), -1)
    log_p = sum(float(wanted[p, i]) for p, i in zip(found.positions, found.ids[-2:], strict=True))
    assert found.log_probability == pytest.approx(log_p, rel=1e-4)


def test_a_thousand_observables_equal_their_loop(smollm2):
    many = ObservableSet([Observable.logit_diff(smollm2, i, 2 * i + 1) for i in range(1, 1001)])
    w, _ = many.pull_to_stream(smollm2)
    for i in (0, 499, 999):
        torch.testing.assert_close(w[i], many[i].pull_to_stream(smollm2)[0])
    logits = smollm2.run("She works in")[0, -1]
    assert float(many.measure(logits)[499]) == pytest.approx(float(logits[500] - logits[1001]), abs=1e-5)
