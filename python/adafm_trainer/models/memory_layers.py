"""Layers of GAN memory: modulated as AdaFM's, with a bias shift; a linear layer with one gamma and beta for each row.

Source: Cong, Zhao, Li, Wang and Carin, "GAN Memory with No Forgetting", NeurIPS 2020, section 4.1 (mAdaFM and mFiLM).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adafm_kernels import modulate
from adafm_kernels.nn import AdaFMConv2d, AdaFMLinear


class ShiftedConv2d(AdaFMConv2d):
    """Convolution with the weight ``gamma * weight + beta`` and the bias ``bias + shift``.

    gamma and beta are ``[O, I / groups, 1, 1]``, ``shift [O]`` starts at 0. Otherwise as ``AdaFMConv2d``: a
    ``ModulationPlan`` serves its weight; the shift is added in every forward. Differentiable as often as the
    convolution is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shift = nn.Parameter(_zeros_for(self.weight))

    def reset_modulation(self) -> None:
        """Set gamma to 1, beta and shift to 0: the plain layer."""
        super().reset_modulation()
        if "shift" in self._parameters:
            nn.init.zeros_(self.shift)

    @classmethod
    def from_module(cls, module: nn.Module, *, freeze: bool = True) -> ShiftedConv2d:
        """As ``AdaFMConv2d.from_module``; the shift starts at 0."""
        layer = super().from_module(module, freeze=freeze)
        layer.shift = nn.Parameter(_zeros_for(module.weight))
        return layer

    def merge(self) -> nn.Module:
        """A plain convolution with the modulated weight and the shifted bias."""
        return _with_shift(super().merge(), self.shift)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self._modulated_weight(input), shifted(self.bias, self.shift))


class RowLinear(AdaFMLinear):
    """``x (gamma * weight + beta)^T + bias + shift`` with one gamma and one beta for each output.

    ``weight [O, I]``; gamma and beta ``[O, 1]``; ``shift [O]``, or None with ``shift=False``. GAN memory's files hold
    gamma and beta as ``(1, O)``; ``memory_names`` turns them. Differentiable any number of times.
    """

    def __init__(self, *args: Any, shift: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gamma, self.beta = (nn.Parameter(p.detach()[:, :1].clone()) for p in (self.gamma, self.beta))
        self.shift = nn.Parameter(_zeros_for(self.weight)) if shift else None

    def reset_modulation(self) -> None:
        """Set gamma to 1, beta and shift to 0: the plain layer."""
        super().reset_modulation()
        if self._parameters.get("shift") is not None:
            nn.init.zeros_(self.shift)

    @classmethod
    def from_module(cls, module: nn.Module, *, freeze: bool = True, shift: bool = True) -> RowLinear:
        """As ``AdaFMLinear.from_module``, with gamma and beta for each row; the shift starts at 0."""
        layer = super().from_module(module, freeze=freeze)
        layer.shift = nn.Parameter(_zeros_for(module.weight)) if shift else None
        return layer

    def merge(self) -> nn.Module:
        """A plain linear layer with the modulated weight and the shifted bias."""
        layer = super().merge()
        return layer if self.shift is None else _with_shift(layer, self.shift)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._served
        if weight is None:
            weight = modulate(self.weight, self.gamma, self.beta)
        return F.linear(input, weight, shifted(self.bias, self.shift))


def shifted(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The sum of those that are there."""
    if bias is None or shift is None:
        return shift if bias is None else bias
    return bias + shift


def _zeros_for(weight: Tensor) -> Tensor:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.zeros(weight.shape[0], dtype=dtype, device=weight.device)


def _with_shift(layer: nn.Module, shift: Tensor) -> nn.Module:
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.detach().to(layer.weight.dtype).clone())
    else:
        layer.bias.data.add_(shift.detach())
    return layer
