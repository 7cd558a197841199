"""Networks as other people write them, for the tests of adapters: none uses anything of this package."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune


class DCGenerator(nn.Module):
    """The generator of the PyTorch DCGAN tutorial, narrow."""

    def __init__(self, nz=8, ngf=4):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 2, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.main(z)


class SNBlock(nn.Module):
    def __init__(self, norm, channels, wide):
        super().__init__()
        self.c1 = norm(nn.Conv2d(channels, wide, 3, padding=1))
        self.c2 = norm(nn.Conv2d(wide, wide, 3, padding=1))
        self.c_sc = norm(nn.Conv2d(channels, wide, 1))

    def forward(self, x):
        return F.avg_pool2d(self.c2(F.relu(self.c1(F.relu(x)))) + self.c_sc(x), 2)


class SNDiscriminator(nn.Module):
    """A projection discriminator with spectral normalisation on every layer."""

    def __init__(self, norm, channels=3, classes=5):
        super().__init__()
        self.blocks = nn.ModuleList([SNBlock(norm, channels, 4), SNBlock(norm, 4, 6)])
        self.l_y = norm(nn.Embedding(classes, 6))
        self.l6 = norm(nn.Linear(6, 1))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = F.relu(x).sum((2, 3))
        label = torch.arange(len(x), device=x.device) % 5
        return self.l6(x) + (self.l_y(label) * x).sum(1, keepdim=True)


class SamePadConv(nn.Conv2d):
    """A subclass whose forward does something of its own."""

    def forward(self, input):
        return self._conv_forward(F.pad(input, (1, 1, 1, 1), mode="reflect"), self.weight, self.bias)


class EqualConv(nn.Module):
    """Not a torch convolution at all: an equalised learning rate, as in the progressive GAN."""

    def __init__(self, channels, wide):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(wide, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(wide))
        self.scale = (channels * 9) ** -0.5

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=1)


class UNet(nn.Module):
    """Skip connections, a subclass, a convolution with a hook and one with a buffer."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(0.2))
        self.inner = SamePadConv(4, 6, 3)
        self.equal = EqualConv(6, 6)
        self.up = nn.ConvTranspose2d(6, 4, 4, 2, 1)
        self.out = nn.Conv2d(7, 3, 1)
        self.out.register_forward_hook(lambda module, args, output: output * 0.5)
        self.down[0].register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        return self.out(torch.cat([x, self.up(self.equal(self.inner(self.down(x))))], 1))


class WaveNet(nn.Module):
    """One and three dimensions, and weight normalisation."""

    def __init__(self, norm):
        super().__init__()
        self.wave = nn.Sequential(norm(nn.Conv1d(2, 4, 5, padding=2)), nn.ReLU(), nn.ConvTranspose1d(4, 2, 4, 2, 1))
        self.cube = nn.Sequential(nn.Conv3d(1, 2, 2), norm(nn.ConvTranspose3d(2, 1, 3)))

    def forward(self, x):
        return self.cube(self.wave(x).reshape(len(x), 1, 2, 3, 4))


class OuterNorm(nn.Module):
    """The spectral normalisation of early GAN code: a wrapper that sets the weight of the module inside."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        weight = module.weight
        del module._parameters["weight"]
        module.register_parameter("weight_bar", weight)
        self.module.weight = weight.detach()

    def forward(self, x):
        bar = self.module.weight_bar
        self.module.weight = bar / bar.flatten(1).norm()
        return self.module.forward(x)


def pruned():
    layer = nn.Conv2d(3, 4, 3)
    return nn.Sequential(prune.l1_unstructured(layer, "weight", 0.5), nn.ReLU(), nn.Conv2d(4, 2, 1))


# How many modules target_modules=None adapts, the network, and the shape of its input.
NETWORKS = {
    "DCGAN": (3, DCGenerator, (4, 8, 1, 1)),
    "SNGAN, hooks": (6, lambda: SNDiscriminator(nn.utils.spectral_norm), (3, 3, 8, 8)),
    "SNGAN, parametrized": (6, lambda: SNDiscriminator(nn.utils.parametrizations.spectral_norm), (3, 3, 8, 8)),
    "U-Net": (4, UNet, (2, 3, 8, 8)),
    "WaveNet, hooks": (4, lambda: WaveNet(nn.utils.weight_norm), (2, 2, 6)),
    "WaveNet, parametrized": (4, lambda: WaveNet(nn.utils.parametrizations.weight_norm), (2, 2, 6)),
    "pruned": (2, pruned, (2, 3, 6, 6)),
}
