"""Spectrally normalised layers: every forward divides the weight by an estimate of its largest singular value.

Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (ICLR 2018), algorithm 1, with the
left vectors kept as rows; several singular values by Gram-Schmidt, as in Brock, Donahue and Simonyan, "Large Scale
GAN Training for High Fidelity Natural Image Synthesis" (ICLR 2019), section 4.

The weight counts as a matrix ``W [O, rest]`` (an embedding's ``[entries, dim]``). Buffers have the published names:
``u0, u1, ... [1, O]`` are the left vectors that the next iteration starts from, ``sv0, sv1, ... [1]`` a record of the
singular values. Only the first value divides; it is ``v W^T u^T`` with u and v constant, so that the gradient passes
through W alone. Any order of differentiation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adafm_kernels.nn import AdaFMConv2d


@dataclass(frozen=True)
class SpectralNorm:
    """``values`` singular values from ``iterations`` power iterations each forward; ``eps`` bounds norms from below.

    In eval mode there is one iteration from the stored vectors, whatever ``iterations`` is, and nothing is stored.
    """

    values: int = 1
    iterations: int = 1
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("values", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"spectral norm: {name} is {getattr(self, name)}; it must be at least 1")
        if not self.eps > 0:
            raise ValueError(f"spectral norm: eps is {self.eps}; it must be positive")


@torch.no_grad()
def power_iteration(matrix: Tensor, left: Sequence[Tensor], eps: float) -> tuple[list[Tensor], list[Tensor]]:
    """Left vectors ``[1, O]`` and right vectors ``[1, rest]`` of ``matrix [O, rest]``, one iteration on from ``left``.

    Each vector is made orthogonal to those of larger singular values before it is scaled to length 1.
    """
    us: list[Tensor] = []
    vs: list[Tensor] = []
    for u in left:
        vs.append(F.normalize(_orthogonal(u @ matrix, vs), eps=eps))
        us.append(F.normalize(_orthogonal(vs[-1] @ matrix.t(), us), eps=eps))
    return us, vs


def _orthogonal(x: Tensor, others: list[Tensor]) -> Tensor:
    for other in others:
        x = x - (other @ x.t()) / (other @ other.t()) * other
    return x


class SpectralLayer(nn.Module):
    """What the normalised layers share; ``weight`` is their parameter as it is stored, not yet normalised."""

    weight: nn.Parameter
    norm: SpectralNorm
    _served: Tensor | None = None

    def _prepare(self, norm: SpectralNorm) -> None:
        self.norm = norm
        like = {"dtype": self.weight.dtype, "device": self.weight.device}
        for i in range(norm.values):
            self.register_buffer(f"u{i}", torch.randn(1, self.weight.shape[0], **like))
            self.register_buffer(f"sv{i}", torch.ones(1, **like))

    def normalized_weight(self) -> Tensor:
        """``weight`` divided by its spectral norm, in its own type also under autocast; in train mode buffers advance.

        While ``serving`` is on: the weight that was handed over.
        """
        if self._served is not None:
            return self._served
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            us = [self.get_buffer(f"u{i}") for i in range(self.norm.values)]
            for _ in range(self.norm.iterations if self.training else 1):
                us, vs = power_iteration(matrix, us, self.norm.eps)
            sigma = (vs[0] @ matrix.t() @ us[0].t()).squeeze()
            if self.training:
                self._store(matrix, us, vs)
            return self.weight / sigma

    @torch.no_grad()
    def _store(self, matrix: Tensor, us: list[Tensor], vs: list[Tensor]) -> None:
        for i, (u, v) in enumerate(zip(us, vs, strict=True)):
            self.get_buffer(f"u{i}").copy_(u)
            self.get_buffer(f"sv{i}").copy_((v @ matrix.t() @ u.t()).view(1))


class SpectralConv2d(SpectralLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` with a normalised weight. ``norm``: see SpectralNorm; other arguments as in torch."""

    def __init__(self, *args: Any, norm: SpectralNorm, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare(norm)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.normalized_weight(), self.bias)


class SpectralLinear(SpectralLayer, nn.Linear):
    """``torch.nn.Linear`` with a normalised weight."""

    def __init__(self, *args: Any, norm: SpectralNorm, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare(norm)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.normalized_weight(), self.bias)


class SpectralEmbedding(SpectralLayer, nn.Embedding):
    """``torch.nn.Embedding`` with a normalised table."""

    def __init__(self, *args: Any, norm: SpectralNorm, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare(norm)

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.normalized_weight())


def spectral_layers(module: nn.Module) -> list[SpectralLayer]:
    """The normalised layers inside ``module``, in the order of its modules."""
    return [layer for layer in module.modules() if isinstance(layer, SpectralLayer)]


@contextmanager
def serving(layers: Sequence[SpectralLayer], weights: Sequence[Tensor]) -> Iterator[None]:
    """Let ``layers`` compute with these normalised weights and leave their buffers alone.

    A stage that runs a second time for its backward pass must use the weights of its first run.
    """
    for layer, weight in zip(layers, weights, strict=True):
        layer._served = weight
    try:
        yield
    finally:
        for layer in layers:
            layer._served = None


@torch.no_grad()
def modulate_spectral(layer: SpectralConv2d) -> AdaFMConv2d:
    """AdaFM on a normalised convolution: ``gamma * (W / sigma(W)) + beta``, with W / sigma(W) as the frozen weight.

    The order is the norm first, then the modulation: gamma and beta are free to change the norm of the filters (a norm
    taken afterwards would divide a common factor of gamma out again). sigma is the one that ``layer`` uses in eval mode
    and is fixed from here on, the vectors u are dropped. gamma 1 and beta 0 give the layer's eval-mode output bit for
    bit, in train mode too. ``layer`` is left as it is; the new layer shares its bias and takes its training mode.

    Raises:
        TypeError: not a SpectralConv2d (a plain convolution goes to ``AdaFMConv2d.from_module``).
    """
    if not isinstance(layer, SpectralConv2d):
        raise TypeError(
            f"layer is a {type(layer).__name__}; modulate_spectral takes a SpectralConv2d, and "
            "AdaFMConv2d.from_module a plain convolution"
        )
    training = layer.training
    layer.training = False
    try:
        weight = layer.normalized_weight()
    finally:
        layer.training = training
    settings = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    plain = nn.Conv2d(**{name: getattr(layer, name) for name in settings}, bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight), layer.bias
    return AdaFMConv2d.from_module(plain.train(training))
