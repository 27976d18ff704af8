"""Small networks of the kinds that people linearise, randomly initialised: each map passes its checks.

Every network mixes spellings on purpose: modules, functions, methods, operators, in place, reused.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.nets import assert_checks, draw, scope_of


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = conv(3, 8), nn.BatchNorm2d(8)
        self.one, self.two, self.act = conv(8, 8), conv(8, 8, bias=False), nn.ReLU(inplace=True)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x):
        x = F.max_pool2d(self.act(self.bn(self.stem(x))), 3, 2, 1)
        branch = self.act(self.one(x))
        out = self.two(branch)
        out += x
        return self.head(self.pool(self.act(out)).flatten(1))


class VGG(nn.Sequential):
    def __init__(self):
        layers = [conv(3, 6), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), conv(6, 8), nn.ReLU(True), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(8 * 4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.three, self.five, self.proj = conv(3, 4, 1), conv(3, 4), conv(3, 4, 5), conv(3, 2, 1)

    def forward(self, x):
        pooled = self.proj(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        return torch.cat([torch.relu(self.one(x)), self.three(x).relu(), self.five(x).clamp(min=0), pooled], 1).mean(
            (2, 3)
        )


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3 + 4 * i), nn.ReLU(), conv(3 + 4 * i, 4)) for i in range(3)
        )

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return torch.cat(features, 1).amax((2, 3))


class MobileNet(nn.Module):
    """Inverted residual with squeeze and excite, hard-swish and ReLU6."""

    def __init__(self):
        super().__init__()
        self.expand, self.depthwise, self.project = conv(4, 8, 1), conv(8, 8, groups=8), conv(8, 4, 1)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        hidden = F.hardswish(self.expand(x))
        hidden = F.relu6(self.depthwise(hidden))
        gate = F.hardsigmoid(self.up(F.relu(self.down(hidden.mean((2, 3))))))
        return x + self.project(hidden * gate[:, :, None, None])


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.bottom = conv(1, 6), conv(6, 8)
        self.up, self.out = nn.ConvTranspose2d(8, 6, 2, stride=2), conv(12, 1)
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, x):
        skip = F.silu(self.norm(self.down(x)))
        deep = F.leaky_relu(self.bottom(F.max_pool2d(skip, 2)), 0.1)
        return self.out(torch.cat([skip, self.up(deep)], 1))


class ResidualDense(nn.Module):
    """Super-resolution: dense blocks, residual scaling, pixel shuffle, a mean that is added."""

    def __init__(self):
        super().__init__()
        self.head, self.grow, self.fuse, self.tail = conv(3, 8), conv(8, 4), conv(12, 8, 1), conv(8, 12)
        self.mean = nn.Buffer(torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))

    def forward(self, x):
        first = self.head(x - self.mean)
        dense = self.fuse(torch.cat((first, F.relu(self.grow(first))), 1)) * 0.2 + first
        return F.pixel_shuffle(self.tail(dense + first), 2) + self.mean


class Translator(nn.Module):
    """CycleGAN's generator: reflection padding, instance norm, transposed convolution, tanh at the end."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1), nn.Conv2d(4, 1, 3)
        self.norm = nn.InstanceNorm2d(4, affine=True)

    def forward(self, x):
        x = F.relu(self.norm(self.one(F.pad(x, (1, 1, 1, 1), mode="reflect"))))
        x = F.relu(F.instance_norm(self.up(F.relu(self.two(x)))))
        return torch.tanh(self.out(F.pad(x, [1] * 4, "reflect")))


class GatedCell(nn.Module):
    """A recurrent cell written out: sigmoid gates times live values, a convex combination by a gate."""

    def __init__(self):
        super().__init__()
        self.gates, self.new = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            reset, update = torch.sigmoid(self.gates(torch.cat([step, state], -1))).chunk(2, -1)
            fresh = torch.tanh(self.new(torch.cat([step, reset * state], -1)))
            state = state + update * (fresh - state)
        return state


NETWORKS = {
    "ResNet": (ResNet, (1, 3, 8, 8)),
    "VGG": (VGG, (1, 3, 8, 8)),
    "Inception": (Inception, (1, 3, 6, 6)),
    "DenseNet": (DenseNet, (1, 3, 5, 5)),
    "MobileNet": (MobileNet, (1, 4, 6, 6)),
    "U-Net": (UNet, (1, 1, 8, 8)),
    "residual dense": (ResidualDense, (1, 3, 5, 5)),
    "translator": (Translator, (1, 1, 8, 8)),
    "gated cell": (GatedCell, (1, 4, 3)),
}


def build(kind):
    torch.manual_seed(0)
    net = NETWORKS[kind][0]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5), module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.uniform_(module.bias, -0.5, 0.5)
    return net.double().eval()


@pytest.mark.parametrize("linearization", ["frozen", "exact"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_network_is_affine_complete_and_adjoint(kind, linearization):
    net, x = build(kind), draw(*NETWORKS[kind][1])
    scope = scope_of(net, x, linearization)
    assert torch.equal(scope.y, net(x))
    assert_checks(scope, 1e-10)
    target = tuple(0 for _ in scope.out_shape)
    assert scope.votes(target).completeness_error < 1e-12
    assert scope.bias_report(target).completeness_error < 1e-12
    if linearization == "exact":
        dense = torch.autograd.functional.jacobian(net, x).reshape(scope.y.numel(), x.numel())
        torch.testing.assert_close(scope.dense(), dense, rtol=1e-8, atol=1e-11)
