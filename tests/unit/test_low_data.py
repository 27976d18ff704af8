"""The low-data comparison on made-up activations whose best direction is known."""

import pytest
import torch

from interp.hooks.errors import ArgumentError
from interp.hooks.linearization import Linearization
from interp.hooks.site import Site
from interp.low_data import low_data_comparison
from interp.propagation.feature_vectors import FeatureVector

N, D = 120, 40


def vector(v):
    return FeatureVector(v, 0.0, Site("blocks.1.hook_resid_pre"), "m", "L1H1", Linearization.of("path"))


def data(noise=0.0):
    made = torch.Generator().manual_seed(0)
    x, truth = torch.randn(N, D, generator=made), torch.randn(D, generator=made)
    return x, truth, x @ truth + noise * torch.randn(N, generator=made)


def test_the_true_direction_is_perfect_and_probes_catch_up_with_data():
    x, truth, m = data()
    found = low_data_comparison(vector(truth), x, m, sizes=(10, 90), seeds=5)
    assert float(found.r2[0].min()) > 1 - 1e-6
    assert float(found.auc[0].min()) == 1.0
    linear = found.r2[1].mean(1)
    assert float(linear[0]) < 0.6
    assert float(linear[1]) > 1 - 1e-4  # 90 examples determine 40 weights
    assert float(found.auc[2, 1].mean()) > float(found.auc[2, 0].mean()) > 0.5
    assert found.tested == N - 90


def test_a_direction_of_noise_scores_nothing():
    x, _, m = data()
    found = low_data_comparison(vector(torch.randn(D, generator=torch.Generator().manual_seed(9))), x, m, sizes=(20,))
    assert float(found.r2[0].mean()) < 0.2


def test_groups_never_lie_on_both_sides():
    """A direction that only names the group is useless on held-out groups."""
    made = torch.Generator().manual_seed(1)
    groups = [i // 10 for i in range(N)]
    offsets = 5 * torch.randn(12, generator=made)
    x = 0.1 * torch.randn(N, D, generator=made)
    x[torch.arange(N), torch.tensor(groups)] += 1.0
    m = offsets[torch.tensor(groups)] + 0.1 * torch.randn(N, generator=made)
    free = torch.randn(D, generator=made)
    mixed = low_data_comparison(vector(free), x, m, sizes=(60,), seeds=5)
    apart = low_data_comparison(vector(free), x, m, groups=groups, sizes=(40,), seeds=5)
    assert float(mixed.r2[1].mean()) > 0.6
    assert float(apart.r2[1].mean()) < 0.3


def test_the_free_vector_has_one_row_and_intervals_hold_the_mean():
    x, truth, m = data(noise=1.0)
    rows = low_data_comparison(vector(truth), x, m, sizes=(10, 20), seeds=10).to_records()
    assert [r["training examples"] for r in rows] == [0, 10, 20, 10, 20, 10, 20]
    assert all(r["r2 low"] <= r["r2"] <= r["r2 high"] for r in rows)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sizes": (2,)}, r"sizes=\[2\]"), ({"sizes": (119,)}, "119"), ({"seeds": 1}, "seeds=1"),
        ({"labels": torch.ones(N, dtype=torch.bool)}, "one class"), ({"groups": [0] * 5}, "5 groups"),
        ({"groups": [0] * N}, "1 groups"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(change, text):
    x, truth, m = data()
    with pytest.raises(ArgumentError, match=text):
        low_data_comparison(vector(truth), x, m, **({"sizes": (10,)} | change))


def test_other_widths_are_refused():
    x, truth, m = data()
    with pytest.raises(ArgumentError, match="rows of width 40"):
        low_data_comparison(vector(truth), x[:, :5], m)
