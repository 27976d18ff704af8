"""Checks C1 to C20 of an alignment tool, on a network whose weights are written by hand; each test names its number.

C16 (padding), C17 (exceptions) and C18 need language models: tests/tiny/test_causal_backends.py.
"""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

import interp
from interp.causal import (
    Alignment,
    BoundlessMap,
    IdentityMap,
    InvertibleMap,
    OrthogonalMap,
    Partition,
    RevNetMap,
    Training,
    build_map,
    distributive_law,
    hierarchical_equality,
    largest_singular_values,
    load_alignment,
    save_alignment,
)  # fmt: skip
from interp.causal.lanes import Lanes
from interp.causal.maps import random_orthogonal, round_trip, stack
from interp.causal.swap import rows_needed, swap, swap_by_matrices
from interp.causal.training import fit_lanes
from interp.hooks.errors import (
    DegenerateDataError,
    NonInvertibleMapError,
    ShapeMismatchError,
    TrainModeError,
    UnmatchedVariableError,
)

TASK = hierarchical_equality("both")
HALVES = Partition({"v1": 8, "v2": 8})
LIVE = [
    {"kind": "orthogonal"},
    {"kind": "invertible"},
    {"kind": "revnet", "blocks": 4},
    {"kind": "low_rank", "rank": 12},
]
MAPS = [{"kind": "identity"}, {"kind": "random"}, *LIVE]
kind = lambda spec: spec["kind"]
pytestmark = pytest.mark.filterwarnings("ignore::interp.causal.report.CausalAbstractionWarning")


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def written(between=()):
    """Differences of the pairs; their sums u and v as |u - v|, u, v; the same; whether one differs. Between: modules.

    Units 0-7 and 8-15 of ``block1`` say whether the first and the second pair are equal.
    """
    apart = torch.zeros(16, 16)
    for row in range(16):
        pair, sign, i = row // 8, 1 - 2 * (row // 4 % 2), row % 4
        apart[row, 8 * pair + i], apart[row, 8 * pair + 4 + i] = sign, -sign
    u, v = torch.arange(16) < 8, torch.arange(16) >= 8
    total = torch.zeros(16, 16)
    total[:4] = torch.stack([u.float() - v.float(), v.float() - u.float(), u.float(), v.float()])
    head = torch.zeros(2, 16)
    head[0, :4] = torch.tensor([1, 1, -0.99, -0.99])
    block = lambda weight: nn.Sequential(linear(weight), nn.ReLU())
    return nn.Sequential(OrderedDict(
        block1=block(apart), **dict(between), block2=block(total), block3=block(torch.eye(16)),
        head=linear(head, torch.tensor([0, 1e-4])),
    )).eval()  # fmt: skip


class Apply(nn.Module):
    """A map as a module of a network, there or back."""

    def __init__(self, tau, back=False):
        super().__init__()
        self.tau, self.back = tau, back

    def forward(self, x):
        return self.tau.inverse(x) if self.back else self.tau(x)


class Undo(RevNetMap):
    """The inverse of a RevNet, with the same weights."""

    def encode(self, x, parts=None):
        return super().decode(x, None, parts), None

    def decode(self, z, rest=None, parts=None):
        return super().encode(z, parts)[0]


def align(network, tau, site="block1", partition=HALVES, task=TASK, **options):
    return Alignment(interp.attach(network), task.causal_model, site, tau, partition, **options)


def score(found, data):
    return found.evaluate(data, controls=(), measure=False).scores[0]


def turned(turn):
    return written([("turn", linear(turn.mT)), ("back", linear(turn))])


@pytest.fixture(scope="module")
def splits():
    return TASK.splits(16_000, 1000, 4000)


@pytest.fixture(scope="module")
def acts(splits):
    return written()[0](splits.test.pool.inputs).detach()


@pytest.fixture(scope="module")
def rotation():
    return random_orthogonal(16, torch.Generator().manual_seed(4)).float()


def moved(spec, scale=0.3, dtype=torch.float32):
    """A map away from its start."""
    tau = build_map(spec, 16, seed=2, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tau.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return tau.eval()


# Maps ---


@pytest.mark.parametrize("spec", MAPS, ids=kind)
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_c1_there_and_back_on_real_activations(spec, dtype, least, splits, acts):
    tau = build_map(spec, 16, seed=1, dtype=dtype)
    assert round_trip(tau, acts) <= least
    if tau.num_parameters:
        found = align(written(), tau, partition=Partition({"v1": 6, "v2": 6}))
        found.fit(splits, training=Training(steps=40, batch_size=256, lr=1e-2))
    assert round_trip(tau, acts) <= 10 * least
    z = 2 * torch.randn(100, tau.code_width, generator=torch.Generator().manual_seed(0), dtype=dtype)
    torch.testing.assert_close(tau(tau.inverse(z)), z, atol=100 * least, rtol=0)


@pytest.mark.parametrize("spec", [{"kind": "orthogonal"}, {"kind": "low_rank", "rank": 16}], ids=kind)
def test_c2_columns_stay_orthonormal_after_training_loading_and_going_on(spec, splits, tmp_path):
    one = align(written(), build_map(spec, 16, seed=1))
    budget = Training(steps=40, batch_size=128, lr=1e-2)
    one.fit(splits, training=budget)
    save_alignment(one, tmp_path / "map")
    again = load_alignment(tmp_path / "map", interp.attach(written()), TASK.causal_model)
    torch.testing.assert_close(again.tau.parts(), one.tau.parts(), rtol=0, atol=0)
    again.fit(splits, training=budget)
    assert not torch.allclose(again.tau.parts(), one.tau.parts(), atol=1e-3)
    for tau in (one.tau, again.tau):
        torch.testing.assert_close(tau.parts().mT @ tau.parts(), torch.eye(16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spec", MAPS, ids=kind)
@pytest.mark.parametrize("variables", [("v1", "v2"), ("v2",), ()])
def test_c3_c4_a_base_as_its_own_source_and_no_intervention_change_nothing(spec, variables, splits):
    network, pool = written(), splits.test.pool
    part = TASK.pool({k: pool.settings[k][:200] for k in TASK.causal_model.inputs})
    partition = Partition({"v1": 4, "v2": 4})
    found = align(network, moved(spec), partition=partition).intervene(part, part, variables)
    exact = spec["kind"] == "identity"
    torch.testing.assert_close(found, network(part.inputs).detach(), rtol=0, atol=0 if exact else 1e-4)


@pytest.mark.parametrize("spec", [s for s in MAPS if kind(s) != "low_rank"], ids=kind)
def test_c4_all_coordinates_of_one_source_are_the_source(spec, splits):
    network, pool = written(), splits.test.pool
    base, source = (TASK.pool({k: pool.settings[k][i : i + 200] for k in TASK.causal_model.inputs}) for i in (0, 200))
    found = align(network, moved(spec)).intervene(base, source)
    torch.testing.assert_close(found, network(source.inputs).detach(), rtol=0, atol=1e-4)
    assert not torch.allclose(found, network(base.inputs), atol=1e-2)


def rows_of(seed, width=16, n=60):
    """Activations of n bases and of their sources, with which of two variables are set."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(3 * n, width, generator=generator, dtype=torch.float64)
    chosen = torch.rand(n, 2, generator=generator) < 0.6
    base = torch.arange(n)
    return h, base, torch.stack([base + n, base + 2 * n], 1), chosen


def swapped(tau, weights, seed=0):
    h, base, sources, chosen = rows_of(seed, tau.width)
    needed, where = rows_needed(base, sources, chosen)
    return swap(tau, h[needed], where, weights, len(base)), (h, base, sources, chosen)


@pytest.mark.parametrize("spec", MAPS, ids=kind)
def test_c7_only_the_blocks_of_set_variables_change(spec):
    tau = moved(spec, dtype=torch.float64)
    mask = Partition({"v1": 3, "v2": [5, 6]}).mask(("v1", "v2"), tau.code_width)
    new, (h, base, sources, chosen) = swapped(tau, mask)
    z, before = tau(new), tau(h[base])
    given = (chosen[:, :, None] & mask).any(1)
    torch.testing.assert_close(z[~given], before[~given], atol=1e-8, rtol=0)
    for k in range(2):
        there = chosen[:, k, None] & mask[k]
        torch.testing.assert_close(z[there], tau(h[sources[:, k]])[there], atol=1e-8, rtol=0)


@pytest.mark.parametrize("spec", [*LIVE[:2], {"kind": "boundless", "variables": 2}], ids=kind)
@pytest.mark.parametrize("soft", [False, True])
def test_swaps_by_matrices_are_swaps_of_codes(spec, soft):
    tau = moved(spec, dtype=torch.float64)
    weights = Partition({"v1": 3, "v2": [5, 6]}).mask(("v1", "v2"), 16)
    if soft:
        weights = torch.rand(2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 2
    by_codes, (h, base, sources, chosen) = swapped(tau, weights)
    three = torch.stack([h[base], *(h[sources[:, k].where(chosen[:, k], base)] for k in range(2))])
    matrices = tau.swap_matrices(weights.double())
    torch.testing.assert_close(swap_by_matrices(three, matrices[None])[0], by_codes, atol=1e-9, rtol=0)


def test_c8_the_low_rank_form_is_the_orthogonal_map_with_these_columns():
    low, whole = moved({"kind": "low_rank", "rank": 5}, dtype=torch.float64), OrthogonalMap(16, dtype=torch.float64)
    u = low.parts().detach()
    rest = torch.linalg.svd(u).U[:, 5:]  # orthonormal columns at right angles to them
    whole.base.copy_(torch.cat([u, rest], 1))
    partition = Partition({"v1": 3, "v2": 2})
    found = [swapped(tau, partition.mask(("v1", "v2"), tau.code_width))[0] for tau in (low, whole)]
    torch.testing.assert_close(*found, atol=1e-10, rtol=0)


def test_c19_stretch_is_the_largest_singular_value_and_below_the_bound(acts):
    tau = moved({"kind": "invertible"}, scale=0.5)
    wanted = torch.linalg.svdvals(tau.weight.detach())[0]
    found = largest_singular_values(lambda h: tau.encode(h)[0], acts[:20], steps=100)
    torch.testing.assert_close(found, wanted.expand(20), rtol=1e-3, atol=0)
    net = moved({"kind": "revnet", "blocks": 3}, dtype=torch.float64)
    stretch = largest_singular_values(lambda h: net.encode(h)[0], acts[:20].double(), steps=100)
    dense = torch.func.vmap(torch.func.jacrev(lambda h: net.encode(h)[0]))(acts[:20].double())
    torch.testing.assert_close(stretch, torch.linalg.matrix_norm(dense, 2).detach(), rtol=1e-3, atol=0)
    assert float(stretch.max()) <= net.lipschitz_bound()


def test_c20_a_cold_boundary_is_a_hard_swap_of_the_first_coordinates():
    tau = BoundlessMap(16, seed=1, dtype=torch.float64).train()
    whole = OrthogonalMap(16, seed=1, dtype=torch.float64)
    with torch.no_grad():
        tau.boundary.fill_(5 / 16)
    tau.temperature = 1e-3
    h, base, sources, chosen = rows_of(0)
    needed, where = rows_needed(base, sources[:, :1], chosen[:, :1])
    hard = Partition({"v": 5}).mask(("v",), 16)
    soft = tau.weights(hard)
    assert soft.dtype == torch.float64
    found = [swap(one, h[needed], where, w, len(base)) for one, w in ((tau, soft), (whole, hard))]
    torch.testing.assert_close(*found, atol=1e-10, rtol=0)
    tau.temperature = 5.0
    assert not torch.allclose(swap(tau, h[needed], where, tau.weights(hard), len(base)), found[1], atol=1e-2)


def test_soft_weights_mix_all_sources_at_once_whatever_their_order():
    weights = torch.tensor([[0.5, 0.2], [0.3, 0.7]], dtype=torch.float64)
    h = torch.tensor([[1.0, 1], [2, 3], [5, 7]], dtype=torch.float64)
    where = [torch.tensor([0])] * 2
    wanted = torch.tensor([[0.2 * 1 + 0.5 * 2 + 0.3 * 5, 0.1 * 1 + 0.2 * 3 + 0.7 * 7]], dtype=torch.float64)
    tau = IdentityMap(2, dtype=torch.float64)
    torch.testing.assert_close(swap(tau, h, where, weights, 1), wanted)
    torch.testing.assert_close(swap(tau, h[[0, 2, 1]], where, weights.flip(0), 1), wanted)


# Alignments ---


@pytest.mark.parametrize("algorithm", ["both", "left"])
def test_c5_the_written_network_at_block_1(algorithm):
    task = hierarchical_equality(algorithm)
    data = task.sample(50_000, seed=8)
    network = written()
    assert torch.equal(network(data.pool.inputs).argmax(1), data.pool.settings["output"])
    partition = HALVES if algorithm == "both" else Partition({"v1": 8})
    assert score(align(network, IdentityMap(16), partition=partition, task=task), data).plain == 1.0


@pytest.mark.parametrize(("blocks", "wanted"), [
    ({"v1": [2], "v2": [3]}, 0.53), ({"v1": [0, 2], "v2": [1, 3]}, 0.69),
])  # fmt: skip
def test_c6_the_written_network_at_block_2_is_not_aligned(blocks, wanted):
    data = TASK.sample(20_000, seed=9)
    found = score(align(written(), IdentityMap(16), "block2", Partition(blocks)), data)
    assert found.plain == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("spec", LIVE, ids=kind)
def test_c9_loss_and_gradient_of_the_short_way_are_those_of_the_whole_network(spec, splits):
    rows, found = torch.arange(300), []
    for cache in (True, False):
        tau = moved(spec)
        lanes = Lanes([align(written(), tau, partition=Partition({"v1": 6, "v2": 6}), cache=cache).lane], splits.train)
        one = stack([tau]).train()
        loss = lanes.loss(one, rows)
        found.append((loss, torch.autograd.grad(loss.sum(), list(one.parameters()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert bool(one.any())


def test_c10_a_rotation_that_is_undone_changes_no_trained_rotation():
    task = replace(TASK, encode=lambda x: TASK.encode(x).double())  # in float32 two runs of Adam drift apart
    splits, found, rotation = task.splits(4000, 500, 2000), [], random_orthogonal(16, torch.Generator().manual_seed(4))
    for network, site, turn in ((written(), "block1", torch.eye(16)), (turned(rotation), "turn", rotation)):
        tau = OrthogonalMap(16, seed=1, dtype=torch.float64)
        tau.base.copy_(turn.double().mT @ tau.base)  # the same start, seen in the turned frame
        one = align(network.double(), tau, site)
        one.fit(splits, training=Training(steps=100, batch_size=256, lr=1e-2))
        found.append(score(one, splits).plain)
    assert found[0] == pytest.approx(found[1], abs=0.01)
    assert found[0] > 0.6


@pytest.mark.slow
def test_c11_a_rotation_hides_the_units_and_an_orthogonal_map_finds_them(rotation):
    splits = TASK.splits(64_000, 1000, 4000)
    network = turned(rotation)
    with torch.no_grad():  # the same answers, with logits far enough apart to be trained on
        for parameter in network.head.parameters():
            parameter *= 100
    assert score(align(network, IdentityMap(16), "turn"), splits).plain < 0.75
    found = align(network, OrthogonalMap(16, seed=0), "turn")
    found.fit(splits, training=Training(steps=2400, batch_size=800, lr=5e-3, patience=100, decay="linear"))
    assert score(found, splits).plain >= 0.99


def test_c12_a_revnet_hides_the_units_from_rotations_and_its_inverse_finds_them(splits):
    bent = moved({"kind": "revnet", "blocks": 3, "hidden": 16}, scale=0.3).requires_grad_(False)
    network = written([("bend", Apply(bent)), ("unbend", Apply(bent, back=True))])
    inverse = Undo(16, 3, 16)
    inverse.load_state_dict(bent.state_dict())
    assert score(align(network, inverse, "bend"), splits).plain == 1.0
    found = align(network, OrthogonalMap(16, seed=0), "bend")
    found.fit(splits, training=Training(steps=400, batch_size=400, lr=1e-2))
    assert score(found, splits).plain < 0.85


@pytest.mark.slow
def test_c13_permuted_labels_are_not_learned(rotation):
    splits = TASK.splits(128_000, 4000, 4000)
    found = align(turned(rotation), OrthogonalMap(16, seed=0), "turn")
    found.fit(splits, training=Training(steps=800, batch_size=800, lr=5e-3))
    report = found.evaluate(splits, controls=("shuffle",), seeds=1, measure=False)
    shuffled = report.controls["shuffle"]
    prior = float(splits.train.labels.float().mean())
    assert shuffled.beside["memorised"] == pytest.approx(max(prior, 1 - prior), abs=0.02)
    assert report.uncontrolled_iia.estimate - shuffled.value >= 0.2


# Pairs ---


def within_three_sigma(share, wanted, n):
    assert abs(share - wanted) <= 3 * (wanted * (1 - wanted) / n) ** 0.5 + 1e-12


def test_c14_shares_of_the_samplers():
    n = 2000
    both = TASK.sample(n, seed=12)
    sets = both.intervened()
    for one in ("v1", "v2", "v1+v2"):
        within_three_sigma(sets.count(one) / n, 1 / 3, n)
        rows = torch.tensor([s == one for s in sets])
        within_three_sigma(float(both.labels[rows].float().mean()), 0.5, int(rows.sum()))
    law = {"and_or": (0.44, 0.32, 0.50), "and_or_and": (0.63, 0.62, 0.49)}
    for algorithm, shares in law.items():
        data = distributive_law(algorithm).sample(n, seed=13)
        sets = data.intervened()
        within_three_sigma(float(data.flips.float().mean()), 0.5, n)
        for one, share in zip(("v1", "v2", "v1+v2"), shares, strict=True):
            rows = torch.tensor([s == one for s in sets])
            within_three_sigma(float(data.flips[rows].float().mean()), 0.5, int(rows.sum()))
            assert float(data.labels[rows].float().mean()) == pytest.approx(share, abs=0.06)  # three sigma


def test_c14_sources_of_the_first_argument_are_coupled_to_their_bases():
    n = 20_000
    data = hierarchical_equality("first_argument").sample(n, seed=14)
    x = data.pool.settings
    source = data.sources[:, 0]
    carried = (x["x1"][source] == x["x2"][data.base]).all(1)
    within_three_sigma(float(carried.float().mean()), 0.5, n)
    within_three_sigma(float((x["x1"] == x["x2"])[source].all(1).float().mean()), 0.5, n)


def brute_force(row, sources, chosen, task):
    """The label by hand, in plain Python: values of a pair's vectors, and of its sources'."""
    vector = lambda x, i: tuple(x[4 * i : 4 * i + 4])
    equal = lambda x, i: vector(x, 2 * i) == vector(x, 2 * i + 1)
    if task == "both":
        values = [lambda x: equal(x, 0), lambda x: equal(x, 1)]
        answer = lambda v: v[0] == v[1]
    elif task == "and_or":
        values = [lambda x: equal(x, 1), lambda x: equal(x, 0) or equal(x, 2)]
        answer = all
    else:
        values = [lambda x: equal(x, 0) and equal(x, 1), lambda x: equal(x, 1) and equal(x, 2)]
        answer = any
    return int(answer([f(sources[k] if chosen[k] else row) for k, f in enumerate(values)]))


@pytest.mark.parametrize("name", ["both", "and_or", "and_or_and"])
def test_c15_labels_of_a_thousand_pairs_are_those_of_plain_python(name):
    data = (TASK if name == "both" else distributive_law(name)).sample(1000, seed=15)
    rows = data.pool.inputs.tolist()
    wanted = [
        brute_force(rows[b], [rows[i] for i in s], c, name)
        for b, s, c in zip(data.base.tolist(), data.sources.tolist(), data.chosen.tolist(), strict=True)
    ]
    assert data.labels.tolist() == wanted


def test_c16_maps_trained_in_a_stack_are_those_trained_alone(splits):
    model, budget = interp.attach(written()), Training(steps=60, batch_size=256, lr=1e-2)

    def lanes():
        places = [("block1", 8), ("block2", 2), ("block1", 1), ("block3", 8)]
        return [
            Alignment(model, TASK.causal_model, s, OrthogonalMap(16, seed=i), Partition({"v1": k, "v2": k})).lane
            for i, (s, k) in enumerate(places)
        ]

    together, alone = lanes(), lanes()
    fits = fit_lanes(together, splits.train, splits.validation, budget)
    for one, other, fit in zip(together, alone, fits, strict=True):
        (by_itself,) = fit_lanes([other], splits.train, splits.validation, budget)
        assert by_itself.validation_loss == pytest.approx(fit.validation_loss, rel=1e-4)
        torch.testing.assert_close(one.tau.parts(), other.tau.parts(), atol=1e-3, rtol=0)


def test_c17_an_exception_in_training_leaves_the_network_as_it_was(splits):
    network = written()
    network.block2[0].weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in network.state_dict().items()}
    flags = {n: p.requires_grad for n, p in network.named_parameters()}

    def stop(_):
        raise RuntimeError("stop")

    for cache in (True, False):
        with pytest.raises(RuntimeError, match="stop"):
            align(network, OrthogonalMap(16), cache=cache).fit(
                splits.train.take(torch.arange(400), "train"), splits.validation,
                Training(steps=2, batch_size=64, validate_every=1), progress=stop,
            )  # fmt: skip
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    assert {n: p.requires_grad for n, p in network.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in network.modules())


# Refusals ---


def singular():
    tau = InvertibleMap(16)
    with torch.no_grad():
        tau.weight[0] = tau.weight[1]
    return tau


def not_finite():
    tau = OrthogonalMap(16)
    with torch.no_grad():
        tau.raw[3, 1] = torch.nan
    return tau


@pytest.mark.parametrize("tau", [singular, not_finite])
def test_maps_that_cannot_be_undone_are_refused_before_training(tau, splits):
    with pytest.raises(NonInvertibleMapError, match="before training"):
        align(written(), tau()).fit(splits)


def test_a_network_in_training_mode_is_refused(splits):
    network = written([("drop", nn.Dropout(0.1))]).train()
    with pytest.raises(TrainModeError, match="drop"):
        align(network, OrthogonalMap(16)).fit(splits)


def test_a_label_that_the_network_has_no_output_for_is_refused(splits):
    network = written()
    network.head = linear(torch.ones(1, 16))
    with pytest.raises(UnmatchedVariableError, match="1 outputs"):
        align(network, OrthogonalMap(16)).fit(splits)


def test_an_odd_width_is_refused_where_equal_halves_are_asked_for():
    with pytest.raises(ShapeMismatchError, match="equal size"):
        RevNetMap(7, equal_halves=True)


def test_bases_and_sources_of_different_number_are_refused(splits):
    part = lambda n: TASK.pool({k: splits.test.pool.settings[k][:n] for k in TASK.causal_model.inputs})
    with pytest.raises(ShapeMismatchError, match="3 bases, 2 sources"):
        align(written(), IdentityMap(16)).intervene(part(3), part(2))
    with pytest.raises(UnmatchedVariableError, match="v3"):
        align(written(), IdentityMap(16)).intervene(part(3), part(3), ["v3"])


@pytest.mark.parametrize(("rows", "text"), [
    (lambda d: d.labels == 1, "all labels equal"), (lambda d: ~d.flips, "no intervention changes a label"),
])  # fmt: skip
def test_pairs_that_say_nothing_are_refused(rows, text, splits):
    with pytest.raises(DegenerateDataError, match=text):
        splits.test.take(rows(splits.test)).check()
