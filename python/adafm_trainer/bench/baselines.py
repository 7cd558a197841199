"""What a user would write instead of the ops, and the copy that no op of the same bytes can beat."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Names of the ways to compute a case, beside those of measure.py.
AUTHORS, BROADCAST, PARAMETRIZE = "authors", "broadcast", "parametrize"
COMPILE, COMPILE_PACKED, COMPILE_BARE = "compile", "compile, prepacked", "compile, outside autograd"


def authors(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The released AdaFM code's way: gamma and beta ``[O, I, 1, 1]`` repeated to the filter's size, then two passes."""
    height, width = weight.shape[2:]
    return weight * gamma.repeat(1, 1, height, width) + beta.repeat(1, 1, height, width)


def broadcast(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The same by broadcasting."""
    return gamma * weight + beta


def backward(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dgamma and dbeta ``[O, I]`` written out; what torch.compile gets."""
    wide = grad.float()
    return (wide * weight).sum((2, 3)), wide.sum((2, 3))


def stored(expression: Callable[..., Tensor], dtype: torch.dtype, layout: torch.memory_format) -> Callable[..., Tensor]:
    """An expression whose result goes to a convolution of that type and layout."""
    return lambda weight, gamma, beta: expression(weight, gamma, beta).to(dtype, memory_format=layout)


def through_autograd(outputs: Any, inputs: Sequence[Tensor], grads: Any) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass alone: the graph is kept."""
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


class _Modulated(nn.Module):
    def __init__(self, gamma: Tensor, beta: Tensor) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(gamma, False), nn.Parameter(beta, False)

    def forward(self, weight: Tensor) -> Tensor:
        return self.gamma * weight + self.beta


def parametrized(weight: Tensor, gamma: Tensor, beta: Tensor) -> nn.Module:
    """A convolution whose ``weight`` is computed at every access by torch.nn.utils.parametrize."""
    outer, inner, *side = weight.shape
    layer = nn.Conv2d(inner, outer, side, bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return parametrize.register_parametrization(layer, "weight", _Modulated(gamma, beta))


def compiled(function: Callable) -> Callable:
    """torch.compile with its defaults, for the one shape it is called with."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def cannot_compile(device: str) -> str | None:
    """Why torch.compile does not work here, None where it should."""
    if device == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "torch.compile needs a C++ compiler on PATH"
    return None


def copy_of(moved: int, device: str) -> Callable[[], Tensor]:
    """A float32 copy that reads half of so many bytes and writes the other half."""
    source = torch.ones(max(moved // 8, 1), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)
