"""A small network of AdaFM layers and what the tests of its plan compare."""

import pytest
import torch
from modulation import normal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adafm_kernels.nn import AdaFMConv2d, AdaFMConvTranspose2d, AdaFMLinear

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Net(nn.Module):
    """Every kind of layer, odd and even channel counts, 1x1, 3x3, 4x4 and transposed filters."""

    def __init__(self):
        super().__init__()
        self.image = AdaFMConv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.LeakyReLU(), AdaFMConv2d(8, 5, 1, bias=False), AdaFMConv2d(5, 16, 4, padding=2))
        self.up = AdaFMConvTranspose2d(16, 4, 4, 2, 1)
        self.head = AdaFMLinear(4, 2)

    def forward(self, x):
        return self.head(self.up(self.body(self.image(x))).mean((2, 3)))


def network(device="cpu", dtype=torch.float64, seed=0):
    net = Net().to(dtype)
    for number, parameter in enumerate(net.parameters()):
        parameter.data.copy_(normal(parameter.shape, dtype, seed=seed + number) * 0.3)
    for module in net.modules():
        if hasattr(module, "gamma"):
            module.gamma.data.add_(1.0)
    return net.to(device)


def images(device="cpu", dtype=torch.float64, seed=99):
    return normal((2, 3, 6, 6), dtype, device, seed)


def modulation(net):
    return [p for name, p in net.named_parameters() if name.endswith(("gamma", "beta"))]


def gradients_of(net):
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def same(actual, expected, **tolerances):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert (actual[name] is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(actual[name], want, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


def twice(net, x):
    """Two forwards and backwards, as one step of a discriminator has."""
    net(x).square().sum().backward()
    net(2 * x).sin().sum().backward()


class Count(TorchDispatchMode):
    """Calls of torch operators by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
