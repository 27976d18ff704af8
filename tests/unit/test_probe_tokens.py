"""Token sets: masks, padding, pooling, first tokens."""

import numpy as np
import pytest
import torch
from sklearn.model_selection import KFold, cross_val_score

from interp.hooks.errors import ArgumentError
from interp.probes import FirstTokenWarning, MassMeanProbe, MomentFeatures, TokenSets
from interp.probes.tokens import EmptyExampleWarning, as_token_sets

LENGTHS = (4, 1, 6, 3)


def ragged(width=5):
    return [torch.randn(n, width, dtype=torch.float64) for n in LENGTHS]


def padded(items, side="right", extra=0, fill=float("nan")):
    longest = max(map(len, items)) + extra
    x = torch.full((len(items), longest, items[0].shape[1]), fill, dtype=items[0].dtype)
    mask = torch.zeros(len(items), longest, dtype=torch.bool)
    for i, item in enumerate(items):
        place = slice(0, len(item)) if side == "right" else slice(longest - len(item), longest)
        x[i, place], mask[i, place] = item, True
    return x, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("pool", ["mean", "max", "last", "first", "cls", 0, -1])
def test_pooling_is_that_of_each_example_alone(side, fill, pool):
    items = ragged()
    sets = as_token_sets(*padded(items, side, extra=2, fill=fill))
    alone = {
        "mean": lambda t: t.mean(0), "max": lambda t: t.amax(0), "last": lambda t: t[-1], "first": lambda t: t[0],
        "cls": lambda t: t[0], 0: lambda t: t[0], -1: lambda t: t[-1],
    }[pool]  # fmt: skip
    torch.testing.assert_close(sets.pooled(pool), torch.stack([alone(t) for t in items]), rtol=1e-12, atol=1e-12)


def test_all_forms_of_input_are_one():
    items = ragged()
    sets = TokenSets.from_list(items)
    x, mask = padded(items)
    for other in (as_token_sets(x, mask), as_token_sets(x.numpy(), mask.numpy()), as_token_sets(x, mask.int()),
                  as_token_sets([t.numpy() for t in items])):  # fmt: skip
        assert torch.equal(other.values, sets.values)
        assert torch.equal(other.offsets, sets.offsets)
    again, valid = sets.padded()
    assert torch.equal(TokenSets.from_padded(again, valid).values, sets.values)


def test_slices_are_those_of_a_list():
    items = ragged()
    sets = TokenSets.from_list(items)
    assert torch.equal(sets[2], items[2])
    assert torch.equal(sets[-1], items[-1])
    for key in ([3, 0, 0], np.array([1, 2]), slice(1, 3), np.array([True, False, True, False])):
        rows = np.arange(4)[key]
        for found, i in zip(sets[key], rows, strict=True):
            assert torch.equal(found, items[i])


@pytest.mark.parametrize(("mask", "match"), [
    (torch.ones(4, 5).bool(), r"mask of shape \[4, 5\]"),
    (torch.zeros(4, 6), "4 examples without a valid token: 0, 1, 2, 3"),
    (torch.full((4, 6), 0.5), "other than 0 and 1"),
    (torch.tensor([0.0, -torch.inf]).repeat(4, 3), "additive"),
])  # fmt: skip
def test_a_malformed_mask_is_refused(mask, match):
    with pytest.raises(ArgumentError, match=match):
        as_token_sets(torch.zeros(4, 6, 2), mask)


def test_empty_examples_are_dropped_where_that_is_asked_for(unchecked):
    x, mask = padded(ragged())
    mask[1] = False
    with pytest.warns(EmptyExampleWarning, match="1 of 4 examples .*left out: 1$"):
        sets = TokenSets.from_padded(x, mask, on_empty="drop")
    assert sets.source.tolist() == [0, 2, 3]
    assert sets.lengths.tolist() == [4, 6, 3]
    assert torch.equal(sets.values, TokenSets.from_padded(x[[0, 2, 3]], mask[[0, 2, 3]]).values)
    y = np.array(["a", "b", "b", "a"])
    assert MassMeanProbe(skip_first=False).fit(sets, y[sets.source]).classes_.tolist() == ["a", "b"]
    mask[:] = True
    assert TokenSets.from_padded(x.nan_to_num(), mask, on_empty="drop").source.tolist() == [0, 1, 2, 3]
    with pytest.raises(ArgumentError, match="on_empty='skip'"):
        TokenSets.from_padded(x, mask, on_empty="skip")


def test_a_mask_without_padding_is_refused():
    with pytest.raises(ArgumentError, match="a mask for features"):
        as_token_sets(torch.zeros(4, 6), torch.ones(4, 6).bool())


def test_what_is_not_finite_is_named_where_it_is_valid():
    x, mask = padded(ragged())
    x[2, 5, 1] = float("inf")
    with pytest.raises(ArgumentError, match="1 valid tokens, first at example 2, token 5"):
        as_token_sets(x, mask)


def sink(n=20, width=6):
    """Tokens whose first one is loud and says nothing; class is a small shift of the others."""
    y = torch.arange(n) % 2
    x = torch.randn(n, 8, width) + y[:, None, None]
    x[:, 0] = torch.randn(n, width) * 300
    return x, y


def test_a_first_token_sink_is_left_out_and_said():
    x, y = sink()
    with pytest.warns(FirstTokenWarning, match="attention sink"):
        probe = MassMeanProbe().fit(x, y)
    assert probe.skip_first_
    assert probe.score(x, y) > 0.9
    same = MassMeanProbe(skip_first=True).fit(x, y)
    np.testing.assert_array_equal(same.coef_, MassMeanProbe(skip_first=False).fit(x[:, 1:], y).coef_)
    assert not MassMeanProbe(skip_first=False).fit(x, y).skip_first_
    assert not MassMeanProbe().fit(torch.randn(20, 8, 6), y).skip_first_
    assert not MassMeanProbe(pool="last").fit(x, y).skip_first_


def test_an_example_of_one_token_keeps_it():
    sets = TokenSets.from_list(ragged())
    with pytest.warns(FirstTokenWarning, match="1 of 4 examples"):
        rest = sets.without_first()
    assert rest.lengths.tolist() == [3, 1, 5, 2]
    assert torch.equal(rest[1], sets[1])
    assert torch.equal(rest[2], sets[2][1:])


def test_splitters_slice_token_sets():
    x, y = sink(30)
    sets = TokenSets.from_list(list(x[:, 1:]))
    scores = cross_val_score(MassMeanProbe(), sets, y.numpy(), cv=KFold(3))
    assert scores.mean() > 0.8


def test_other_choices_are_refused(unchecked):
    x, y = sink()
    with pytest.raises(ArgumentError, match="skip_first='maybe'"):
        MassMeanProbe(skip_first="auto").set_params(skip_first="maybe").fit(x, y)
    with pytest.raises(ArgumentError, match="pool"):
        MassMeanProbe().set_params(pool="middle").fit(x, y)
    with pytest.raises(ArgumentError, match="shortest has 1"):
        TokenSets.from_list(ragged()).pooled(2)
    with pytest.raises(ArgumentError, match="order=3"):
        MomentFeatures().set_params(order=3).fit(x)
