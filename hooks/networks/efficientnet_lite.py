"""EfficientNet-Lite0, the image classifier, for inference.

Inverted residual blocks without squeeze-and-excitation; every non-linearity is a ReLU6 module of its own, so
that each can be hooked, and batch normalisation is affine in eval mode: the network is piecewise linear.

Numbers: 4.65 M parameters, 1,000 ImageNet classes, made for 224 x 224 pixels. Padding is TensorFlow's "same"
for an even size at each stride (one more row and column after the picture than before it); it is part of the
network, so pictures of another size are taken too, and sizes that 32 divides agree with TensorFlow's rule
exactly.
"""

from collections import OrderedDict

import torch
from torch import nn

_EPSILON = 1e-3

# kernel, stride of the first block, expansion, channels in, channels out, blocks
_STAGES = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)


class ConvNorm(nn.Sequential):
    """Convolution, batch normalisation and, where asked for, ReLU6.

    Children in order: `pad` (only at stride 2), `conv`, `norm`, `activation` (only where `activate`).
    Shapes: [B, channels_in, H, W] to [B, channels_out, H / stride, W / stride].
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activate: bool = True,
    ):
        steps: OrderedDict[str, nn.Module] = OrderedDict()
        around = kernel // 2
        if stride == 2:
            before = (kernel - 2) // 2
            after = kernel - 2 - before
            steps["pad"] = nn.ZeroPad2d((before, after, before, after))
            around = 0
        steps["conv"] = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=around, groups=groups, bias=False)
        steps["norm"] = nn.BatchNorm2d(channels_out, eps=_EPSILON, momentum=0.01)
        if activate:
            steps["activation"] = nn.ReLU6()
        super().__init__(steps)


class InvertedResidual(nn.Module):
    """Widen (1x1), filter each channel (k x k), narrow (1x1), and add the input where the shapes allow it.

    `expand` is an `Identity` in the first block, whose expansion is 1. `project` has no activation.
    Shapes: [B, channels_in, H, W] to [B, channels_out, H / stride, W / stride].
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = channels_in * expansion
        self.expand = ConvNorm(channels_in, wide, 1) if expansion != 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, channels_out, 1, activate=False)
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels_in, H, W] to [B, channels_out, H / stride, W / stride]."""
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0.

    Children: `stem` (3 to 32 channels, stride 2), `features` (16 `InvertedResidual` blocks, numbered from 0
    as in the publication), `head` (320 to 1,280 channels), `pool`, `flatten`, `classifier`. Drop-connect and
    dropout, which act in training only, are left out.

    Example:
        >>> EfficientNetLite().eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, stride=2)
        blocks = []
        for kernel, stride, expansion, channels_in, channels_out, count in _STAGES:
            blocks.append(InvertedResidual(channels_in, channels_out, kernel, stride, expansion))
            blocks += [InvertedResidual(channels_out, channels_out, kernel, 1, expansion) for _ in range(count - 1)]
        self.features = nn.Sequential(*blocks)
        self.head = ConvNorm(320, 1280, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Class logits.

        Args:
            pixels: [B, 3, H, W], RGB as (value - 127) / 128.

        Returns:
            [B, classes], before any softmax.
        """
        return self.classifier(self.flatten(self.pool(self.head(self.features(self.stem(pixels))))))
