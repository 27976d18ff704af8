"""Probes on token sets: fixed moments, moment probe, attention probe, and the MLP probe that is trained as they are."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import estimator_checks_generator

from interp.hooks.errors import ArgumentError
from interp.probes import AttentionProbe, LogisticProbe, MLPProbe, MomentFeatures, MomentHead, MomentProbe, TokenSets
from interp.probes.moments import second_moments, upper_triangle
from interp.probes.training import Schedule, Seeds, train_head, validation_rows

LENGTHS = (5, 1, 9, 3, 4, 2, 7, 6)


def items(n=8, width=6):
    return [torch.randn(LENGTHS[i % 8], width, dtype=torch.float64) for i in range(n)]


def padded(examples, side="right", extra=0, fill=float("nan")):
    longest = max(map(len, examples)) + extra
    x = torch.full((len(examples), longest, examples[0].shape[1]), fill, dtype=torch.float64)
    mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for i, item in enumerate(examples):
        place = slice(0, len(item)) if side == "right" else slice(longest - len(item), longest)
        x[i, place], mask[i, place] = item, True
    return x, mask


def correlated(n, seed, kind="covariance"):
    """Tokens whose class is in the covariance of channels (0, 1) and (2, 3), or in the mean; unit variance."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    sets = []
    for label in y:
        count = int(torch.randint(8, 25, (1,), generator=generator))
        x = torch.randn(count, 32, generator=generator)
        if kind == "covariance" and label:
            x[:, 1] = 0.77 * x[:, 0] + (1 - 0.77**2) ** 0.5 * x[:, 1]
            x[:, 3] = -0.77 * x[:, 2] + (1 - 0.77**2) ** 0.5 * x[:, 3]
        elif kind == "mean":
            x = x + 0.3 * (2 * label - 1) * (torch.arange(32) < 4)
        sets.append(x)
    return TokenSets.from_list(sets), y


# fixed moments


def test_moments_are_numpys():
    sets = TokenSets.from_list(items())
    for centre in ("tokens", "scalar", "none"):
        found = second_moments(sets, centre).numpy()
        for i in range(8):
            x = sets[i].numpy()
            if centre == "tokens":
                np.testing.assert_allclose(found[i], np.cov(x, rowvar=False, bias=True), atol=1e-10)
            else:
                x = x - x.mean() if centre == "scalar" else x
                np.testing.assert_allclose(found[i], x.T @ x / len(x), atol=1e-10)


def test_the_triangle_keeps_the_norm():
    moments = second_moments(TokenSets.from_list(items()))
    torch.testing.assert_close(upper_triangle(moments).norm(dim=1), moments.flatten(1).norm(dim=1))


@pytest.mark.parametrize("norm", ["signed_sqrt", "column_l2", "isqrt", "eig_power", "log_euclid", "none"])
@pytest.mark.parametrize("projection", ["pca", "sketch"])
def test_features_do_not_depend_on_padding_order_or_batch(norm, projection):
    examples = items()
    features = MomentFeatures(3, norm=norm, projection=projection)
    with pytest.warns(UserWarning, match="1 of 8 examples have one token"):
        expected = features.fit_transform(TokenSets.from_list(examples))
    assert expected.shape == (8, len(features.get_feature_names_out()))
    for side, extra in (("left", 2), ("right", 0)):
        x, mask = padded(examples, side, extra)
        torch.testing.assert_close(features.transform(x, mask), expected, rtol=1e-10, atol=1e-10)
    alone = torch.cat([features.transform([t.flip(0)]) for t in examples])
    torch.testing.assert_close(alone, expected, rtol=1e-8, atol=1e-8)


def test_the_subspace_whitens_training_tokens():
    sets = TokenSets.from_list(items(40))
    with pytest.warns(UserWarning, match="one token"):
        features = MomentFeatures(4).fit(sets)
    z = (sets.values.numpy() - features.mean_) / features.std_ @ features.projection_
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(4), atol=1e-10)
    first = features.transform(sets)[:, :6].numpy()
    np.testing.assert_allclose(first[0], ((sets[0].numpy() - features.mean_) / features.std_).mean(0))
    assert features.median_tokens_ == 4


def test_lone_tokens_are_refused_where_they_have_no_covariance(unchecked):
    x, y = torch.randn(20, 4), torch.arange(20) % 2
    for probe in (MomentFeatures(), MomentProbe(hidden=28)):
        with pytest.raises(ArgumentError, match='centre="none"'):
            probe.fit(x, y)
    assert MomentFeatures(2, centre="none").fit_transform(x).shape == (20, 7)
    assert MomentFeatures(order=1).fit_transform(x).shape == (20, 4)


# the synthetic second-order task


def test_what_is_in_the_covariance_is_found_by_moments_and_not_by_means():
    train, y = correlated(800, 0)
    test, truth = correlated(400, 1)
    linear = LogisticProbe().fit(train, y).score(test, truth)
    assert abs(linear - 0.5) < 3 * 0.5 / 400**0.5
    fixed = MomentFeatures(32)
    assert LogisticProbe().fit(fixed.fit_transform(train), y).score(fixed.transform(test), truth) >= 0.84
    moment = MomentProbe(hidden=128).fit(train, y)
    assert moment.score(test, truth) >= 0.93
    assert moment.parameters_ == sum(p.numel() for p in MomentHead(32, 2, hidden=128).parameters())


def test_what_is_in_the_mean_is_found_as_well_as_by_a_linear_probe():
    train, y = correlated(600, 0, "mean")
    test, truth = correlated(400, 1, "mean")
    linear = LogisticProbe().fit(train, y).score(test, truth)
    assert linear > 0.9
    assert MomentProbe(hidden=128, epochs=15).fit(train, y).score(test, truth) >= linear - 0.01
    assert AttentionProbe(epochs=15).fit(train, y).score(test, truth) >= linear - 0.02


# trained probes

TRAINED = {
    "moment": lambda **more: MomentProbe(hidden=28, epochs=3, **more),
    "moment, class token": lambda **more: MomentProbe(hidden=28, epochs=3, first="cls", centre="none", **more),
    "attention": lambda **more: AttentionProbe(2, epochs=3, **more),
    "mlp": lambda **more: MLPProbe(epochs=3, **more),
}


def task(n=48):
    examples = [torch.cat([t, t[:1] + 1]) for t in items(n)]
    return examples, torch.arange(n) % 3


@pytest.mark.parametrize("name", TRAINED)
def test_answers_do_not_depend_on_padding_batch_or_form(name):
    examples, y = task()
    probe = TRAINED[name]().fit(TokenSets.from_list(examples), y)
    expected = probe.predict_proba(TokenSets.from_list(examples))
    for side in ("left", "right"):
        x, mask = padded(examples, side, extra=2)
        torch.testing.assert_close(probe.predict_proba(x, mask), expected, rtol=1e-10, atol=1e-10)
        found = probe.predict_proba(x.numpy(), mask.numpy())
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-10)
    alone = torch.cat([probe.predict_proba([t]) for t in examples])
    torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-10)
    if "class token" not in name:
        shuffled = [t[torch.randperm(len(t))] for t in examples]
        torch.testing.assert_close(probe.predict_proba(shuffled), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", TRAINED)
def test_a_seed_is_a_result_and_the_global_state_is_left(name):
    examples, y = task()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = TRAINED[name](random_state=3).fit(examples, y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = TRAINED[name](random_state=(3, 3, 3)).fit(examples, y)
    assert torch.equal(again.predict_proba(examples), one.predict_proba(examples))
    for other in ((4, 3, 3), (3, 4, 3), (3, 3, 4)):
        assert not np.array_equal(TRAINED[name](random_state=other).fit(examples, y).loss_, one.loss_)


def test_attention_sums_to_one_over_valid_tokens():
    examples, y = task()
    probe = AttentionProbe(2, epochs=2).fit(examples, y)
    attention = probe.attention(*padded(examples, "left"))
    torch.testing.assert_close(attention.sum(2), torch.ones(48, 2).double())
    for weights, example in zip(attention, examples, strict=True):
        assert bool((weights[:, : len(example)] > 0).all())
        assert not weights[:, len(example) :].any()


def test_the_mlp_probe_sees_what_is_not_linear():
    x = torch.randn(600, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    assert MLPProbe(32, lr=1e-2, epochs=60).fit(x[:400], y[:400]).score(x[400:], y[400:]) > 0.85


def test_released_weights_make_a_probe(tmp_path):
    theirs = MomentHead(6, 3, hidden=64, first="cls", centre="scalar", eps=1e-12)
    names = {"down.0.weight": "downblocks.0.0.weight", "down.2.weight": "downblocks.0.2.weight"}
    state = {names.get(key, key): value for key, value in theirs.state_dict().items()}
    probe = MomentProbe.from_released(state, ["a", "b", "c"])
    x = torch.randn(5, 7, 6)
    torch.testing.assert_close(probe.decision_function(x).float(), theirs(x), rtol=1e-4, atol=1e-5)
    probe.save(tmp_path / "released")
    assert torch.equal(MomentProbe.load(tmp_path / "released").decision_function(x), probe.decision_function(x))
    with pytest.raises(ArgumentError, match="2 classes for 3 logits"):
        MomentProbe.from_released(state, ["a", "b"])


@pytest.mark.parametrize(("make", "params", "match"), [
    (MomentProbe, {"hidden": 30}, "hidden=30"), (MomentProbe, {"hidden": 16}, "4 channels"),
    (MomentProbe, {"epochs": 0}, "epochs=0"), (MomentProbe, {"start": "zero"}, "start='zero'"),
    (MomentProbe, {"validation": 1.0}, "validation=1.0"), (MomentProbe, {"random_state": "x"}, "random_state"),
    (MomentProbe, {"first": "cls", "skip_first": True}, "skip_first=True"),
    (AttentionProbe, {"queries": 0}, "queries=0"),
    (MLPProbe, {"hidden": -1}, "hidden=-1"), (MomentFeatures, {"rank": 0}, "rank=0"),
])  # fmt: skip
def test_malformed_parameters_are_refused(make, params, match, unchecked):
    examples, y = task()
    with pytest.raises(ArgumentError, match=match):
        make(**params).fit(examples, y)


def test_malformed_input_is_refused(unchecked):
    examples, y = task()
    probe = MomentProbe(hidden=28, epochs=1).fit(examples, y)
    with pytest.raises(ArgumentError, match="expecting 6 features"):
        probe.predict([torch.zeros(3, 5)])
    with pytest.raises(ArgumentError, match="length 47 for 48"):
        probe.fit(examples, y[1:])
    with pytest.raises(ArgumentError, match="groups of length 3"):
        probe.fit(examples, y, groups=[1, 2, 3])
    x, mask = padded(examples)
    with pytest.raises(ArgumentError, match="NaN or infinity"):
        probe.fit(x, y)
    mask[4] = False
    with pytest.raises(ArgumentError, match="1 examples without a valid token: 4"):
        probe.fit(x, y, mask=mask)


# training


def test_the_best_epoch_is_kept():
    x, y = torch.randn(200, 5), torch.randint(0, 2, (200,))
    head = torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    weights = torch.ones(200)
    schedule = Schedule(epochs=40, lr=3e-2, patience=40, validation=0.3)
    held = validation_rows(y, 0.3, None, 0)
    history = train_head(head, lambda h, rows: h(x[rows]), y, weights, schedule, Seeds(0, 0, 0), held=held)
    assert history["best"] == [float(np.argmin(history["validation"]))]
    assert len(history["validation"]) == len(history["loss"]) + 1
    loss = torch.nn.functional.cross_entropy(head(x[held]), y[held]).detach()
    assert float(loss) == pytest.approx(min(history["validation"]), rel=1e-5)
    assert history["loss"][-1] < history["loss"][0]


def test_the_validation_part_is_stratified_and_keeps_groups():
    y = torch.tensor([0] * 80 + [1] * 20)
    held = validation_rows(y, 0.2, None, 0)
    assert torch.bincount(y[held]).tolist() == [16, 4]
    groups = np.arange(100) // 5
    held = validation_rows(y, 0.2, groups, 0).numpy()
    assert not set(groups[held]) & set(np.delete(groups, held))
    assert not len(validation_rows(torch.tensor([0, 0, 1]), 0.2, None, 0))


# the scikit-learn contract, one token for each row

CONTRACT = [
    (MomentFeatures(centre="none"), False),
    (MLPProbe(epochs=15, lr=2e-2), True),
    (AttentionProbe(epochs=6), True),
    (MomentProbe(centre="none", hidden=28, epochs=5, lr=5e-3), True),
]


@pytest.mark.parametrize(("probe", "check"), [
    pytest.param(probe, check, id=f"{type(probe).__name__}-{number}", marks=[pytest.mark.slow] if slow else [])
    for probe, slow in CONTRACT
    for number, (_, check) in enumerate(estimator_checks_generator(probe, mark="skip"))
])  # fmt: skip
def test_the_contract_of_scikit_learn(probe, check, unchecked):
    if "array_api" in str(check):
        pytest.skip("needs SCIPY_ARRAY_API in the environment")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(probe)
