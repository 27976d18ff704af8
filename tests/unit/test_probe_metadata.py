"""Masks as metadata of scikit-learn's searches, several labels for each example, and MP on what LEACE leaves."""

import numpy as np
import pytest
import sklearn
import torch
from sklearn.model_selection import GroupKFold, cross_validate
from sklearn.multiclass import OneVsRestClassifier

from interp.probes import LogisticProbe, MomentFeatures, TokenSets


def padded(n=60, seed=0):
    """Tokens whose padding holds NaN, their mask, labels and groups."""
    made = np.random.default_rng(seed)
    y, mask = np.arange(n) % 2, np.arange(7) < made.integers(2, 8, size=n)[:, None]
    x = made.normal(size=(n, 7, 4)) + y[:, None, None]
    return np.where(mask[:, :, None], x, np.nan), mask, y, np.arange(n) // 4


def test_masks_are_sliced_with_their_examples():
    x, mask, y, groups = padded()
    folds = GroupKFold(3)
    expected = cross_validate(
        LogisticProbe(C=1.0), TokenSets.from_padded(x, mask), y, groups=groups, cv=folds, error_score="raise"
    )
    with sklearn.config_context(enable_metadata_routing=True):
        probe = LogisticProbe(C=1.0).set_fit_request(mask=True, groups=False).set_score_request(mask=True)
        found = cross_validate(probe, x, y, params={"mask": mask, "groups": groups}, cv=folds, error_score="raise")
        np.testing.assert_array_equal(found["test_score"], expected["test_score"])
        with pytest.raises(ValueError, match="NaN or infinity"):
            cross_validate(LogisticProbe(C=1.0), x, y, cv=3, error_score="raise")


def test_several_labels_of_an_example_are_one_probe_each():
    made = np.random.default_rng(0)
    x = made.normal(size=(80, 5))
    y = (x[:, :3] + made.normal(size=(80, 3)) > 0).astype(int)
    found = OneVsRestClassifier(LogisticProbe(C=1.0)).fit(x, y)
    for k in range(3):
        alone = LogisticProbe(C=1.0).fit(x, y[:, k])
        np.testing.assert_array_equal(found.predict(x)[:, k], alone.predict(x))
    with pytest.raises(ValueError, match="1d array"):
        LogisticProbe(C=1.0).fit(x, y)


def test_signed_roots_are_not_invariant_to_rotations():
    made = torch.Generator().manual_seed(0)
    sets = TokenSets.from_list([torch.randn(6, 4, generator=made) for _ in range(12)])
    turn = torch.linalg.qr(torch.randn(4, 4, generator=made))[0]
    turned = sets.replace_values(sets.values @ turn)
    kernels = {}
    for norm in ("none", "signed_sqrt"):
        both = []
        for part in (sets, turned):
            features = MomentFeatures(4, norm=norm, skip_first=False).fit(part)
            features.mean_, features.std_ = np.zeros(4), np.ones(4)
            features.projection_ = np.eye(4)
            z = features.transform(part)[:, 4:]
            both.append(z @ z.T)
        kernels[norm] = both
    torch.testing.assert_close(*kernels["none"], rtol=1e-5, atol=1e-5)
    assert (kernels["signed_sqrt"][0] - kernels["signed_sqrt"][1]).abs().max() > 0.01
