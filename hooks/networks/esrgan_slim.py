"""ESRGAN-slim, the super-resolution network: a small residual dense network.

Twelve convolutions and four ReLUs, all else linear and every step a module of its own: at a given picture the
output is exactly J x + c. Pixels are RGB in 0..255 as floats, in and out, with no scaling; the raw output
reaches a little beyond that range and `to_image` clips and rounds it.
"""

import torch
from torch import nn

WIDTH = 64
GROWTH = 4


def _conv(channels_in: int, channels_out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)


class DenseBlock(nn.Module):
    """x + fuse(concat[x, relu(conv(x))]): [B, 64, H, W] to the same shape."""

    def __init__(self):
        super().__init__()
        self.conv = _conv(WIDTH, GROWTH, 3)
        self.activation = nn.ReLU()
        self.fuse = _conv(WIDTH + GROWTH, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 64, H, W] to [B, 64, H, W]."""
        return self.fuse(torch.cat([x, self.activation(self.conv(x))], dim=1)) + x


class EsrganSlim(nn.Module):
    """ESRGAN-slim for one magnification.

    Children in the order in which they run: `shallow`, `entry`, `dense` (two `DenseBlock`), `global_fuse`,
    `global_conv`, `up_conv1`, `up_relu1`, `up_conv2`, `up_relu2`, `up_conv3`, `enlarge` (nearest neighbour,
    not pixel shuffle), `restore`.

    Args:
        scale: How many times larger the output is: 2, 3, 4 or 8.

    Example:
        >>> EsrganSlim(3)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 3, 24, 24])
    """

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale
        self.shallow = _conv(3, WIDTH, 3)
        self.entry = _conv(WIDTH, WIDTH, 3)
        self.dense = nn.ModuleList([DenseBlock(), DenseBlock()])
        self.global_fuse = _conv(2 * WIDTH, WIDTH, 1)
        self.global_conv = _conv(WIDTH, WIDTH, 3)
        self.up_conv1 = _conv(WIDTH, WIDTH, 5)
        self.up_relu1 = nn.ReLU()
        self.up_conv2 = _conv(WIDTH, WIDTH // 2, 3)
        self.up_relu2 = nn.ReLU()
        self.up_conv3 = _conv(WIDTH // 2, 3 * scale**2, 3)
        self.enlarge = nn.Upsample(scale_factor=scale, mode="nearest")
        self.restore = _conv(3 * scale**2, 3, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The enlarged picture, raw.

        Args:
            pixels: [B, 3, H, W], RGB in 0..255.

        Returns:
            [B, 3, scale H, scale W], roughly -30..300, neither clipped nor rounded.
        """
        shallow = self.shallow(pixels)
        first = self.dense[0](self.entry(shallow))
        second = self.dense[1](first)
        deep = self.global_conv(self.global_fuse(torch.cat([first, second], dim=1))) + shallow
        up = self.up_relu2(self.up_conv2(self.up_relu1(self.up_conv1(deep))))
        return self.restore(self.enlarge(self.up_conv3(up)))
