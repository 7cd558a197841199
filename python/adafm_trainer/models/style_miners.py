"""MineGAN's miners of a style-based generator's further inputs: its noise maps, or its learned constant.

Source: the authors' StyleGAN and StyleGAN2 code of MineGAN (CVPR 2020), whose parameter names are kept. They go with
any generator that takes noise maps, or a constant, as an argument: ``generator(z, noise=noise_maps(miner(u)))``. The
codes themselves are mined by ``miners.MLPMiner``. (In the authors' StyleGAN script the noise miner got no gradients;
here it is trained like any other.)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .miners import check_input


class NoiseMapMiner(nn.Module):
    """``u [B, u_dim]`` to the generator's lowest noise maps, flat: ``[B, u_dim], [B, 4 u_dim], [B, 16 u_dim], ...``.

    With u_dim 16 and ``maps`` 4 these are the maps of 4, 8, 16 and 32 pixels. Each is made from the one before it, by
    ReLU and a linear layer. PyTorch's default initialisation.
    """

    def __init__(self, u_dim: int = 16, maps: int = 4) -> None:
        super().__init__()
        if u_dim < 1 or maps < 1:
            raise ValueError(f"u_dim is {u_dim} and maps {maps}; both must be at least 1")
        self.u_dim = u_dim
        self.transform_4 = nn.Sequential(nn.Linear(u_dim, u_dim), nn.ReLU(), nn.Linear(u_dim, u_dim))
        self._further = [f"transform_{4 << i}" for i in range(1, maps)]
        for i, name in enumerate(self._further):
            width = u_dim << (2 * i)
            self.add_module(name, nn.Sequential(nn.ReLU(), nn.Linear(width, 4 * width)))

    def forward(self, u: Tensor) -> list[Tensor]:
        check_input(u, self.u_dim)
        made = [self.transform_4(u)]
        for name in self._further:
            made.append(self.get_submodule(name)(made[-1]))
        return made


def noise_maps(flat: list[Tensor]) -> list[Tensor]:
    """Flat maps ``[B, s * s]`` as a generator takes them, ``[B, 1, s, s]``.

    Raises:
        ValueError: a length that is no square.
    """
    shaped = []
    for values in flat:
        side = math.isqrt(values.shape[1])
        if side * side != values.shape[1]:
            raise ValueError(f"a map of {values.shape[1]} values is not square; the miner's u_dim must be a square")
        shaped.append(values.view(-1, 1, side, side))
    return shaped


class ConstantMiner(nn.Module):
    """What replaces a StyleGAN2 generator's learned constant: ``forward(batch)`` gives ``[batch, channels, 4, 4]``.

    A learned constant ``[1, code_dim, 4, 4]`` and three 1x1 convolutions without bias, to 4 and 16 times ``code_dim``
    and to ``channels``; after the first two a bias and leaky ReLU (slope 0.2, times sqrt 2). Weights start from N(0, 1)
    and are divided by the square root of their fan-in when they are used.
    """

    def __init__(self, code_dim: int = 8, channels: int = 512) -> None:
        super().__init__()
        if code_dim < 1 or channels < 1:
            raise ValueError(f"code_dim is {code_dim} and channels {channels}; both must be at least 1")
        self.input = _Constant(code_dim)
        self.conv1 = _EqualConv(code_dim, 4 * code_dim)
        self.relu1 = _BiasedReLU(4 * code_dim)
        self.conv2 = _EqualConv(4 * code_dim, 16 * code_dim)
        self.relu2 = _BiasedReLU(16 * code_dim)
        self.conv3 = _EqualConv(16 * code_dim, channels)

    def forward(self, batch: int) -> Tensor:
        made = self.conv3(self.relu2(self.conv2(self.relu1(self.conv1(self.input.input)))))
        return made.expand(batch, -1, -1, -1)


class _Constant(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


class _EqualConv(nn.Module):
    def __init__(self, fin: int, fout: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fout, fin, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / math.sqrt(self.weight.shape[1]))


class _BiasedReLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.bias[:, None, None], 0.2) * math.sqrt(2)
