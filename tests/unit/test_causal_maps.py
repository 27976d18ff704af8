"""Alignment maps: the way back, orthogonality, stacks, and what is refused."""

import pytest
import torch

from interp.causal import (
    BoundlessMap,
    FixedMap,
    IdentityMap,
    InvertibleMap,
    LowRankMap,
    OrthogonalMap,
    PCAMap,
    RevNetMap,
    build_map,
)  # fmt: skip
from interp.causal.maps import stack, unstack
from interp.hooks.errors import ArgumentError, NonInvertibleMapError, ShapeMismatchError

SPECS = [
    {"kind": "identity"}, {"kind": "random"}, {"kind": "pca"}, {"kind": "orthogonal"}, {"kind": "low_rank", "rank": 3},
    {"kind": "invertible"}, {"kind": "revnet", "blocks": 3, "hidden": 5}, {"kind": "boundless", "variables": 2},
]  # fmt: skip
WIDTH = 8


def rows(n=20):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def moved(spec, seed=0):
    """A map away from its start."""
    tau = build_map(spec, WIDTH, seed=seed, acts=rows(), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in tau.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return tau


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s["kind"])
def test_the_way_back_is_exact(spec):
    tau, x = moved(spec), rows()
    z, rest = tau.encode(x)
    torch.testing.assert_close(tau.decode(z, rest), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tau(x), z)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s["kind"])
def test_a_stack_is_its_maps_one_by_one(spec):
    maps, x = [moved(spec, seed) for seed in range(3)], rows()
    together = stack(maps)
    z, rest = together.encode(x.expand(3, -1, -1))
    for i, tau in enumerate(maps):
        torch.testing.assert_close(z.expand(3, -1, -1)[i], tau(x), rtol=1e-10, atol=1e-10)
    back = together.decode(z, rest).expand(3, -1, -1)
    torch.testing.assert_close(back, x.expand(3, -1, -1), rtol=1e-9, atol=1e-9)
    unstack(together, maps)
    torch.testing.assert_close(maps[1](x), z.expand(3, -1, -1)[1])


@pytest.mark.parametrize("spec", [s for s in SPECS if s["kind"] in ("orthogonal", "random", "pca", "boundless")],
                         ids=lambda s: s["kind"])  # fmt: skip
def test_an_orthogonal_map_keeps_lengths_wherever_training_leads(spec):
    x = rows()
    torch.testing.assert_close(moved(spec)(x).norm(dim=1), x.norm(dim=1))


def test_a_low_rank_map_is_columns_of_an_orthogonal_one():
    tau, x = moved({"kind": "low_rank", "rank": 3}), rows()
    z, rest = tau.encode(x)
    torch.testing.assert_close(z.norm(dim=1) ** 2 + rest.norm(dim=1) ** 2, x.norm(dim=1) ** 2)
    torch.testing.assert_close(tau.encode(rest)[0], torch.zeros_like(z), atol=1e-12, rtol=0)


def test_principal_axes_are_those_of_numpy():
    import numpy as np

    x = rows(50)
    wanted = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)[2]
    cosines = (PCAMap.fit(x, dtype=torch.float64).matrix.T * torch.tensor(wanted)).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines))


def test_a_revnet_is_no_linear_map():
    tau, x = moved({"kind": "revnet", "blocks": 3, "hidden": 5}), rows()
    assert not torch.allclose(tau(2 * x) - tau(x), tau(x) - tau(0 * x), atol=1e-2)


def test_a_boundary_is_soft_in_training_and_hard_in_evaluation():
    tau = BoundlessMap(WIDTH)
    mask = torch.ones(1, WIDTH, dtype=torch.bool)
    soft, hard = tau.train().weights(mask), tau.eval().weights(mask)
    assert bool(((soft > 0) & (soft < 1)).all())
    assert hard.int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    tau.progress(1.0)
    torch.testing.assert_close(tau.train().weights(mask), hard.float(), atol=0.01, rtol=0)


def test_numbers_that_an_intervention_can_depend_on():
    assert OrthogonalMap(8).num_parameters == 28
    assert OrthogonalMap(8).effective_dimension([2, 2]) == (64 - 4 - 4 - 16) / 2
    assert InvertibleMap(8).effective_dimension([2, 2]) == 64 - 24
    assert IdentityMap(8).num_parameters == 0
    assert FixedMap(8).effective_dimension([2]) == 0


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: OrthogonalMap(8, dtype=torch.bfloat16), NonInvertibleMapError, "bfloat16.*force=True"),
    (lambda: IdentityMap(0), ShapeMismatchError, "width=0"), (lambda: LowRankMap(4, 5), ShapeMismatchError, "rank=5"),
    (lambda: OrthogonalMap(8)(torch.zeros(2, 7)), ShapeMismatchError, r"\[2, 7\]"),
    (lambda: FixedMap(4, torch.eye(3)), ShapeMismatchError, r"\[3, 3\]"),
    (lambda: build_map({"kind": "spline"}, 4), ArgumentError, "spline.*identity"),
    (lambda: build_map({"kind": "revnet", "depth": 3}, 4), ArgumentError, "depth"),
    (lambda: build_map({"kind": "pca"}, 4), ArgumentError, "without activations"),
])  # fmt: skip
def test_maps_that_are_none_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_low_precision_can_be_forced():
    assert RevNetMap(8, dtype=torch.bfloat16, force=True).dtype == torch.bfloat16
