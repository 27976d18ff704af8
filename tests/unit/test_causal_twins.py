"""Alignments against slow twins: each pair swapped by hand, one at a time, in the plain network."""

import pytest
import torch

import interp
from interp.causal import Alignment, Partition, build_map, greedy_neurons, hierarchical_equality, mlp
from interp.causal.lanes import Lanes
from interp.causal.maps import stack
from interp.causal.scoring import score_lanes

SPECS = [
    {"kind": "identity"}, {"kind": "random"}, {"kind": "pca"}, {"kind": "orthogonal"},
    {"kind": "low_rank", "rank": 9}, {"kind": "invertible"}, {"kind": "revnet", "blocks": 2, "hidden": 5},
    {"kind": "boundless", "variables": 2},
]  # fmt: skip
TASK = hierarchical_equality("both")
PAIRS = TASK.sample(120, seed=3)


def whole(network, x, put):
    """Activations of every block and the logits of one input, with some blocks' outputs replaced."""
    seen = {}
    for name, part in network.named_children():
        x = part(x)
        x = seen[name] = put.get(name, x)
    return seen, x


def code(tau, h):
    return [part if part is None else part[0] for part in tau.encode(h[None].to(tau.dtype))]


def by_hand(network, data, sites, tau, partition):
    """Logits of every pair: read, swap and run again, one pair after the other."""
    found, width = [], tau.code_width
    for base, sources, chosen in zip(data.base, data.sources, data.chosen, strict=True):
        read = lambda i: whole(network, data.pool.inputs[i], {})[0]
        join = lambda seen: torch.cat([seen[s] for s in sites])
        z, rest = code(tau, join(read(base)))
        z = z.clone()
        for k, variable in enumerate(data.variables):
            if chosen[k]:
                block = partition.indices(width)[variable]
                z[block] = code(tau, join(read(sources[k])))[0][block]
        h = tau.decode(z[None], None if rest is None else rest[None])[0]
        put = dict(zip(sites, h.float().split(16), strict=True))
        found.append(whole(network, data.pool.inputs[base], put)[1])
    return torch.stack(found)


def perturbed(tau, seed=5):
    """A map away from its start, so that nothing cancels by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tau.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p))
    return tau.eval()


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s["kind"])
@pytest.mark.parametrize("sites", [("block2",), ("block1", "block2")], ids=["one", "two"])
def test_every_map_swaps_as_by_hand(spec, sites):
    network = mlp(TASK, seed=1)
    model, width = interp.attach(network), 16 * len(sites)
    tau = perturbed(build_map(spec, width, seed=2, acts=torch.randn(200, width)))
    partition = Partition({"v1": 3, "v2": [5, 8, 7, 4]})
    held = partition
    if spec["kind"] == "boundless":
        chosen = tau.weights(partition.mask(("v1", "v2"), width))
        held = Partition({v: row.nonzero().flatten().tolist() for v, row in zip(("v1", "v2"), chosen, strict=True)})
    wanted = by_hand(network, PAIRS, sites, tau, held)
    for cache in (True, False):
        one = Alignment(model, TASK.causal_model, list(sites), tau, partition, cache=cache)
        lanes = Lanes([one.lane], PAIRS)
        for rows in torch.arange(len(PAIRS)).split(50):
            assert (lanes.logits(stack([tau]).eval(), rows)[0] - wanted[rows]).abs().max() < 1e-5
            few = rows[:5]
            assert (lanes.logits(stack([tau]).eval(), few)[0] - wanted[few]).abs().max() < 1e-5
        score = score_lanes([one.lane], PAIRS)[0]
        right = wanted.argmax(1) == PAIRS.labels
        assert score.plain == pytest.approx(float(right.float().mean()))
        assert score.flip == pytest.approx(float(right[PAIRS.flips].float().mean()))
        assert score.stay == pytest.approx(float(right[~PAIRS.flips].float().mean()))
        own = network(PAIRS.pool.inputs).argmax(1) == PAIRS.pool.settings["output"]
        fair = torch.tensor(
            [
                bool(own[b]) and all(bool(own[s]) for s, c in zip(ss, cs, strict=True) if c)
                for b, ss, cs in zip(PAIRS.base, PAIRS.sources, PAIRS.chosen, strict=True)
            ]
        )
        assert score.n_right == int(fair.sum())
        assert score.where_right == pytest.approx(float(right[fair].float().mean()))
        names = PAIRS.intervened()
        for name in ("v1", "v2", "v1+v2"):
            rows = torch.tensor([n == name for n in names])
            assert score.by[name] == pytest.approx(float(right[rows].float().mean()))
        full = []
        for base, sources, chosen in zip(PAIRS.base, PAIRS.sources, PAIRS.chosen, strict=True):
            donor = sources[chosen][0]
            seen = whole(network, PAIRS.pool.inputs[donor], {})[0]
            full.append(whole(network, PAIRS.pool.inputs[base], {s: seen[s] for s in sites})[1].argmax())
        assert score.baselines["full swap"] == pytest.approx(float((torch.stack(full) == PAIRS.labels).float().mean()))
        nothing = network(PAIRS.pool.inputs[PAIRS.base]).argmax(1) == PAIRS.labels
        assert score.baselines["do nothing"] == pytest.approx(float(nothing.float().mean()))


def test_greedy_neurons_are_those_of_brute_force():
    network, data = mlp(TASK, seed=4), TASK.sample(80, seed=9)
    search = greedy_neurons(interp.attach(network), TASK.causal_model, "block1", data, most=2).search
    tau = build_map({"kind": "identity"}, 16)
    taken = ([], [])
    for size in (1, 2):
        free = [i for i in range(16) if i not in taken[0] + taken[1]]
        losses = {}
        for i, j in ((i, j) for i in free for j in free if i != j):
            blocks = Partition({"v1": [*taken[0], i], "v2": [*taken[1], j]})
            one = Alignment(interp.attach(network), TASK.causal_model, "block1", tau, blocks)
            losses[i, j] = float(Lanes([one.lane], data).evaluate(stack([tau]))[0][0])
        best = min(losses, key=lambda pair: (round(losses[pair], 6), pair))
        taken[0].append(best[0])
        taken[1].append(best[1])
        assert search.losses[size - 1] == pytest.approx(min(losses.values()), abs=1e-5)
    assert search.order == [taken[0], taken[1]]
