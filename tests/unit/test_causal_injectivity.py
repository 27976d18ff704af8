"""Duplicates and distances to the nearest, against all pairs written out one by one."""

import pytest
import torch
from torch import nn

import interp
from interp.causal import hierarchical_equality, injectivity, mlp
from interp.causal.nearness import ALL, OUTPUTS, VALUES, count_duplicates, least_distances
from interp.hooks.errors import ArgumentError, NonFiniteError, UnmatchedVariableError
from interp.saving import load_result, save_result

TASK = hierarchical_equality("both")


def pool_of(n, seed=0):
    return TASK.pool(TASK.draw(n, torch.Generator().manual_seed(seed)))


def slow_least(acts, points, codes):
    """The smallest distance of each point, pair by pair."""
    found = {ALL: [], **{name: [] for name in codes}}
    for i in points.tolist():
        pairs = [(float((acts[i] - acts[j]).pow(2).sum().sqrt()), j) for j in range(len(acts)) if j != i]
        found[ALL].append(min(d for d, _ in pairs))
        for name, code in codes.items():
            found[name].append(min((d for d, j in pairs if code[i] != code[j]), default=float("inf")))
    return found


@pytest.mark.parametrize("budget", [2000, 20_000, 10**9])
@pytest.mark.parametrize("many", [False, True])
def test_distances_are_those_of_all_pairs(budget, many):
    generator = torch.Generator().manual_seed(1)
    acts = torch.randn(150, 5, generator=generator, dtype=torch.float64)
    codes = {OUTPUTS: torch.randint(2, (150,), generator=generator),
             VALUES: torch.arange(150) if many else torch.randint(4, (150,), generator=generator)}  # fmt: skip
    points = torch.randperm(150, generator=generator)[:20]
    found, slow = least_distances(acts, points, codes, budget), slow_least(acts, points, codes)
    for name, values in found.items():
        torch.testing.assert_close(values, torch.tensor(slow[name], dtype=torch.float64))


def test_many_kinds_are_not_split_into_blocks(monkeypatch):
    monkeypatch.setattr("interp.causal.nearness._FEW_KINDS", 2)
    test_distances_are_those_of_all_pairs(20_000, False)


def test_a_distance_below_the_rounding_of_products_is_seen():
    acts = torch.full((3, 16), 0.3)
    acts[1, 0] = torch.nextafter(acts[1, 0], torch.tensor(1.0))
    acts[2] += 1
    found = least_distances(acts, torch.arange(3), {}, 10**6)[ALL]
    assert 0 < float(found[0]) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_are_counted_as_sets_of_tuples_count_them(dtype):
    rows = torch.randint(-1, 2, (4000, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = torch.where(rows == 0, rows * -1, rows)
    assert count_duplicates(rows) == 4000 - len(set(map(tuple, (rows + 0.0).tolist())))
    assert count_duplicates(torch.randn(1000, 3, dtype=dtype)) == 0


def test_layers_are_those_of_the_network_in_each_dtype():
    network, pool = mlp(TASK, seed=2), pool_of(120)
    found = injectivity(interp.attach(network), pool, ["block1", "block3"], ["v1", "v2"], points=30, seed=4)
    points = torch.randperm(120, generator=torch.Generator().manual_seed(4))[:30]
    values = 2 * pool.settings["v1"].long() + pool.settings["v2"].long()
    assert network.block1[0].weight.dtype == torch.float32
    for layer in found.layers:
        exact = mlp(TASK, seed=2).to(getattr(torch, layer.dtype))
        h = x = pool.inputs.to(getattr(torch, layer.dtype))
        if layer.site != "input":
            for name in list(exact._modules)[: int(layer.site[-1])]:
                h = exact._modules[name](h)
        slow = slow_least(h.detach().double(), points, {OUTPUTS: exact(x).argmax(1), VALUES: values})
        for name, least in layer.least.items():
            assert least == pytest.approx(min(slow[name]), rel=1e-5)
            assert layer.median[name] == pytest.approx(float(torch.tensor(slow[name]).median()), rel=1e-5)
    assert [(x.site, x.dtype) for x in found.layers[2:4]] == [("block3", "float32"), ("input", "float64")]


def test_a_layer_that_merges_inputs_is_found():
    network = mlp(TASK)
    with torch.no_grad():
        network.block2[0].bias.fill_(-100)  # every unit is off
    found = injectivity(interp.attach(network), pool_of(50), ["block1", "block2"], points=10, dtypes=["float32"])
    assert [layer.duplicates for layer in found.layers] == [0, 0, 49]
    assert found.layers[2].least[ALL] == 0
    assert not found.injective
    assert "49 duplicates" in repr(found)


def test_a_result_is_read_back(tmp_path):
    found = injectivity(interp.attach(mlp(TASK)), pool_of(40), ["block1"], ["v1"], points=5)
    save_result(found, tmp_path / "found")
    assert load_result(tmp_path / "found") == found


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"points": 0}, ArgumentError, "points=0"),
    ({"dtypes": ["float16"]}, ArgumentError, "float16"),
    ({"variables": ["w"]}, UnmatchedVariableError, "'w'"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        injectivity(interp.attach(mlp(TASK)), pool_of(20), ["block1"], **options)


def test_activations_that_are_no_numbers_are_refused():
    network = mlp(TASK)
    nn.init.constant_(network.block1[0].bias, float("nan"))
    with pytest.raises(NonFiniteError, match="block1"):
        injectivity(interp.attach(network), pool_of(20), ["block1"], dtypes=["float32"])
