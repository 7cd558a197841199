"""The residual block and the resampling of GP-GAN, without normalisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2


def lrelu(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.2; keeps shape, dtype and memory format."""
    return F.leaky_relu(x, SLOPE)


def upsample(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2: ``[B, C, H, W] -> [B, C, 2H, 2W]``; keeps the memory format."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """3x3 average pooling of stride 2 with padding 1 that counts in the mean: ``[B, C, H, W] -> [B, C, H/2, W/2]``."""
    return F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=True)


class ResBlock(nn.Module):
    """``shortcut(x) + 0.1 * conv_1(lrelu(conv_0(lrelu(x))))``: ``[B, fin, H, W] -> [B, fout, H, W]``.

    ``conv_0`` and ``conv_1`` are 3x3 with bias and hidden width ``min(fin, fout)``; the shortcut is the identity, or
    the 1x1 convolution ``conv_s`` without bias where the widths differ. It takes the un-activated ``x``.
    Any order of differentiation that the convolutions have.

    Args:
        conv: class of ``conv_0`` and ``conv_1``, called as ``conv(fin, fout, 3, padding=1)``.
        wide_stream: keep the residual stream in the input's dtype under autocast: ``conv_s`` then runs outside it.
    """

    def __init__(
        self, fin: int, fout: int, *, conv: Callable[..., nn.Module] = nn.Conv2d, wide_stream: bool = False
    ) -> None:
        super().__init__()
        hidden = min(fin, fout)
        self.conv_0 = conv(fin, hidden, 3, padding=1)
        self.conv_1 = conv(hidden, fout, 3, padding=1)
        self.conv_s = nn.Conv2d(fin, fout, 1, bias=False) if fin != fout else None
        self.wide_stream = wide_stream

    def forward(self, x: Tensor) -> Tensor:
        dx = self.conv_1(lrelu(self.conv_0(lrelu(x))))
        return torch.add(self._shortcut(x), dx, alpha=0.1)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.conv_s is None:
            return x
        if self.wide_stream:
            with torch.autocast(x.device.type, enabled=False):
                return self.conv_s(x)
        return self.conv_s(x)


def register(module: nn.Module, name: str, child: nn.Module) -> None:
    """Add ``child`` to ``module`` under a dotted name, making plain containers for the parents that are absent."""
    parent, _, leaf = name.rpartition(".")
    if parent and parent not in dict(module.named_children()):
        module.add_module(parent, nn.Module())
    module.get_submodule(parent).add_module(leaf, child)
