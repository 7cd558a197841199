"""Blocks of BigGAN: conditional batch norm, self-attention, and the residual blocks of both networks.

Sources: Brock, Donahue and Simonyan, "Large Scale GAN Training for High Fidelity Natural Image Synthesis" (ICLR 2019);
self-attention of Zhang et al., "Self-Attention Generative Adversarial Networks" (ICML 2019). Names of parameters and
buffers are those of the published PyTorch code. Everything has any order of differentiation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .biggan_config import BlockPlan
from .recompute import run_stage, second_run
from .spectral import SpectralConv2d, SpectralLinear, SpectralNorm, serving, spectral_layers

MOMENTUM = 0.1


class _Statistics(nn.Module):
    """Mean and (unbiased) variance of each channel, moved by a tenth towards every batch seen in train mode."""

    stored_mean: Tensor
    stored_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def normalize(self, x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Batch norm of ``x [B, C, H, W]``: by the batch's statistics in train mode, else by the stored ones."""
        mean, var = self.stored_mean, self.stored_var
        if self.training and second_run():
            mean, var = mean.clone(), var.clone()
        return F.batch_norm(x, mean, var, gain, bias, self.training, MOMENTUM, self.eps)


class BatchNorm(_Statistics):
    """Batch norm with one gain and bias for each channel."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels, eps)
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.gain, self.bias)


class ConditionalBatchNorm(_Statistics):
    """Batch norm whose gain, 1 + gain(y), and bias, bias(y), are made for each sample from what conditions it.

    ``y`` is ``[B, condition]`` for spectrally normalised linear maps without bias; with ``condition`` 0 it is the
    labels ``[B]`` for plain tables of ``classes`` rows.
    """

    def __init__(self, channels: int, condition: int, classes: int, norm: SpectralNorm, eps: float) -> None:
        super().__init__(channels, eps)
        if condition:
            self.gain = SpectralLinear(condition, channels, bias=False, norm=norm)
            self.bias = SpectralLinear(condition, channels, bias=False, norm=norm)
        else:
            self.gain = nn.Embedding(classes, channels)
            self.bias = nn.Embedding(classes, channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gain, bias = 1 + self.gain(y), self.bias(y)
        return self.normalize(x) * gain[:, :, None, None] + bias[:, :, None, None]


class SelfAttention(nn.Module):
    """``gamma * o(attention) + x`` for ``x [B, C, H, W]`` of at least 8 channels; gamma starts at 0.

    Queries theta have C / 8 channels, keys phi and values g (C / 2) are max-pooled by 2. Written out, as the fused
    attention of PyTorch has no second derivative.
    """

    def __init__(self, channels: int, norm: SpectralNorm) -> None:
        super().__init__()
        self.theta = SpectralConv2d(channels, channels // 8, 1, bias=False, norm=norm)
        self.phi = SpectralConv2d(channels, channels // 8, 1, bias=False, norm=norm)
        self.g = SpectralConv2d(channels, channels // 2, 1, bias=False, norm=norm)
        self.o = SpectralConv2d(channels // 2, channels, 1, bias=False, norm=norm)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        query = self.theta(x).flatten(2)
        key = F.max_pool2d(self.phi(x), 2).flatten(2)
        value = F.max_pool2d(self.g(x), 2).flatten(2)
        weights = torch.softmax(query.transpose(1, 2) @ key, -1)
        found = (value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return self.gamma * self.o(found) + x


class GeneratorBlock(nn.Module):
    """Residual block of the generator: norm, ReLU, upsampling, 3x3, norm, ReLU, 3x3; shortcut upsampling and 1x1.

    ``x [B, fin, H, W]`` and what conditions the norms give ``[B, fout, 2H, 2W]``.
    """

    def __init__(self, plan: BlockPlan, condition: int, classes: int, norm: SpectralNorm, eps: float) -> None:
        super().__init__()
        self.bn1 = ConditionalBatchNorm(plan.fin, condition, classes, norm, eps)
        self.conv1 = SpectralConv2d(plan.fin, plan.fout, 3, padding=1, norm=norm)
        self.bn2 = ConditionalBatchNorm(plan.fout, condition, classes, norm, eps)
        self.conv2 = SpectralConv2d(plan.fout, plan.fout, 3, padding=1, norm=norm)
        self.conv_sc = SpectralConv2d(plan.fin, plan.fout, 1, norm=norm)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.bn1(x, y)), scale_factor=2)
        h = self.conv2(F.relu(self.bn2(self.conv1(h), y)))
        return h + self.conv_sc(F.interpolate(x, scale_factor=2))


class DiscriminatorBlock(nn.Module):
    """Residual block of the discriminator: ReLU (not in the first block), 3x3, ReLU, 3x3, average pooling.

    The shortcut is a 1x1 convolution where the block changes width or side, before the pooling, and in the first block
    after it. ``[B, fin, H, W] -> [B, fout, H / 2, W / 2]``, or ``[B, fout, H, W]`` for a block that keeps the side.
    """

    def __init__(self, plan: BlockPlan, first: bool, norm: SpectralNorm) -> None:
        super().__init__()
        self.first, self.halve = first, plan.resample
        self.conv1 = SpectralConv2d(plan.fin, plan.fout, 3, padding=1, norm=norm)
        self.conv2 = SpectralConv2d(plan.fout, plan.fout, 3, padding=1, norm=norm)
        changes = plan.resample or plan.fin != plan.fout
        self.conv_sc = SpectralConv2d(plan.fin, plan.fout, 1, norm=norm) if changes else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        return self._pooled(h) + self._shortcut(x)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.first:
            x = self._pooled(x)
        if self.conv_sc is not None:
            x = self.conv_sc(x)
        return x if self.first else self._pooled(x)

    def _pooled(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.halve else x


def run_modules(network: nn.Module, modules: nn.ModuleList, h: Tensor, y: Tensor | None = None) -> Tensor:
    """A block and the attention after it, as one stage of ``recompute.run_stage``.

    A second run must not take another power iteration: the weights are normalised once, outside the stage.
    """

    def stage(h: Tensor, y: Tensor | None) -> Tensor:
        for module in modules:
            h = module(h, y)
        return h

    if not (network.checkpoint_activations and torch.is_grad_enabled()):
        return stage(h, y)
    layers = spectral_layers(modules)
    weights = [layer.normalized_weight() for layer in layers]

    def served(h: Tensor, y: Tensor | None, *weights: Tensor) -> Tensor:
        with serving(layers, weights):
            return stage(h, y)

    return run_stage(network, served, h, y, *weights)
