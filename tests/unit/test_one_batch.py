"""The reference and its probes in one batch: against replay, push and the network itself; mixtures refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import interp
from interp.hooks.errors import InputError, MixedBatchError
from tests.nets import Call, draw, scope_of
from tests.unit.test_networks import NETWORKS, build


@pytest.mark.parametrize("linearization", ["frozen", "exact"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_one_batch_gives_what_tape_and_network_give(kind, linearization):
    net, shape = build(kind), NETWORKS[kind][1]
    x, probes = draw(*shape), 10 * draw(5, *shape[1:], seed=3)
    scope = scope_of(net, x, linearization)
    y, out = scope.run_together(probes)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    close(y, net(x))
    close(out, scope.matvec(probes) + scope.r)
    close(out, scope.replay({"input": probes}))
    close(scope.run_together(torch.cat([x, torch.zeros_like(x)])).probes, torch.cat([y, scope.r]))


def test_one_batch_needs_nothing_recorded():
    net, x = build("U-Net"), draw(*NETWORKS["U-Net"][1])
    scope = scope_of(net, x)
    wanted = scope.matvec(x) + scope.r
    scope.network.entries.clear()
    torch.testing.assert_close(scope.run_together(x).probes, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("budget", ["1GiB", 3])
def test_chunks_and_company_change_nothing(budget):
    net, x = build("MobileNet"), draw(*NETWORKS["MobileNet"][1])
    scope, probes = scope_of(net, x), draw(7, *NETWORKS["MobileNet"][1][1:], seed=1)
    if budget == 3:
        scope._push.budget = 4 * scope._push.bytes_each
    out = scope.run_together(probes).probes
    single = torch.cat([scope.run_together(p).probes for p in probes])
    torch.testing.assert_close(out, single, rtol=1e-12, atol=1e-13)
    assert scope.run_together(probes[:0]).probes.shape == (0, 4, 6, 6)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x):
        y = self.one(x)
        y *= torch.sigmoid(x)
        y.clamp_(min=-0.3).add_(x)
        F.relu_(y[:, 1:])
        out = torch.empty_like(y)
        out[:, :2], out[:, 2:] = F.silu(y[:, :2]), y[:, 2:].tanh()
        return out, y


def test_writes_in_place_and_into_views():
    for which in (0, 1):
        scope = scope_of(InPlace(), draw(1, 4), output=lambda pair, which=which: pair[which])
        probes = draw(3, 4, seed=2)
        torch.testing.assert_close(scope.run_together(probes).probes, scope.matvec(probes) + scope.r)


def test_constants_with_a_batch_axis_and_without():
    mask = draw(1, 5, seed=4) > 0

    def net(x):
        wide = mask.expand(len(x), 5)
        return torch.maximum(x, 0.1 * wide.double()) + F.prelu(x, torch.full((5,), 0.2).double())

    for n in (1, 3, 5):  # with 3 probes the batch has as many items as there are slopes
        scope, probes = scope_of(net, draw(1, 5)), draw(n, 5, seed=1)
        torch.testing.assert_close(scope.run_together(probes).probes, scope.matvec(probes) + scope.r)


@pytest.mark.parametrize(
    "overrides", [{"relu": "constant"}, {"LayerNorm": "frozen_stats"}, {"sigmoid": "chord"}, {"mul": "split:0.3"}]
)
def test_overrides_decide_here_too(overrides):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x):
            y = self.norm(x)
            return self.one(torch.sigmoid(y) * y + F.relu(x))

    held = interp.Linearization("gain", "frozen", "frozen", "gate", overrides=overrides)
    scope, probes = scope_of(Net(), draw(1, 6), held), draw(4, 6, seed=5)
    torch.testing.assert_close(scope.run_together(probes).probes, scope.matvec(probes) + scope.r)


def test_masks_and_statistics_of_a_training_network_are_the_references():
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.4), nn.Flatten()).double()
    held = interp.Linearization(overrides={"batch_norm": "batch_stats", "dropout": "one_mask"})
    mean = net[1].running_mean.clone()
    scope = interp.LinearScope(interp.attach(net.train(), check=False), draw(1, 1, 6, 6), held)
    y, out = scope.run_together(scope.x)
    torch.testing.assert_close(y, scope.y)
    torch.testing.assert_close(out, scope.y)
    assert torch.equal(net[1].running_mean, mean)


def test_the_check_has_a_row_where_it_applies():
    has_row = lambda scope: [row for row in scope.check() if row["check"].startswith("one batch")]
    (row,) = has_row(scope_of(build("VGG"), draw(1, 3, 8, 8)))
    assert row["holds"]
    assert row["error"] < 1e-13
    assert not has_row(scope_of(lambda x: x - x.mean(0, keepdim=True) + F.silu(x), draw(1, 4)))


MIXERS = {
    "flip": (lambda x: F.silu(x.flip(0)), "flip"),
    "roll": (lambda x: F.silu(x).roll(1, 0), "roll"),
    "mean kept": (lambda x: F.silu(x) - 0.5 * x.mean(0, keepdim=True), "mean"),
    "sum": (lambda x: F.relu(x).sum(0, keepdim=True).expand_as(x), "sum"),
    "cumulated": (lambda x: F.silu(x).cumsum(0), "cumsum"),
    "reference into probe": (lambda x: torch.cat([x[:1], x[1:] + 0.1 * x[:1]]) + x.tanh(), "getitem"),
    "matrix from the left": (lambda x: (torch.ones(len(x), len(x)).double().triu() @ x).tanh(), "matmul"),
    "flattened": (lambda x: F.silu(x.reshape(-1)).reshape(x.shape), "silu"),
    "transposed": (lambda x: F.silu(x.T).T, "silu"),
    "flattened in place": (lambda x: F.relu_(x.clone().view(-1)).view(x.shape), "relu"),
    "a constant of one item": (lambda x: torch.zeros(1, 6).double().copy_(F.silu(x)), "copy"),
    "lost": (lambda x: F.silu(x)[:1], "an output"),
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 4, 3])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_network_that_mixes_the_batch_is_refused_by_name(mixer, n):
    """With 4 probes the batch has as many items as the input has entries: shapes alone do not tell."""
    fn, name = MIXERS[mixer]
    scope, probes = scope_of(Call(fn), draw(1, 6)), draw(n, 6, seed=9)
    with pytest.raises(MixedBatchError, match="replay") as caught:
        scope.run_together(probes)
    if not (mixer == "transposed" and n == 4):  # then the first call to see a mixture is a later one
        assert name in str(caught.value)


def test_probes_of_another_shape_are_refused():
    scope = scope_of(nn.Linear(4, 2), draw(1, 4))
    with pytest.raises(InputError, match=r"run_together of a tensor \[3\]"):
        scope.run_together(torch.zeros(3))
