"""Low-rank storage of GAN memory's gamma and beta over a sequence of tasks (Cong et al., NeurIPS 2020, section 4.3).

A task's matrix is ``R + U diag(s) V^T``: U and V are what earlier tasks stored, s (over all of it) and R are trained.
Storing a task keeps of R the singular vectors that a share of all singular values asks for, and drops the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adafm_kernels import modulate_lowrank

from .memory_config import MemoryConfig
from .memory_layers import shifted
from .plan import generator_plan

# Stages at the image's end whose gamma and beta are stored as they are.
FULL_STAGES = 3
# Share of the sum of singular values that is kept, by output channels.
_THRESHOLDS = {64: 1.0, 128: 1.0, 256: 0.95, 512: 0.9, 1024: 0.8}


def energy_threshold(channels: int) -> float:
    """The share of the sum of singular values that is stored for a matrix of ``channels`` rows.

    Published are 1 for 64 and 128, 0.95 for 256, 0.9 for 512, 0.8 for 1024 and more. Between two of them the share is
    linear in the logarithm of ``channels``; below 64 everything is kept.
    """
    known = sorted(_THRESHOLDS)
    if channels <= known[0]:
        return _THRESHOLDS[known[0]]
    for low, high in zip(known[:-1], known[1:], strict=True):
        if channels <= high:
            share = math.log(channels / low) / math.log(high / low)
            return _THRESHOLDS[low] + share * (_THRESHOLDS[high] - _THRESHOLDS[low])
    return _THRESHOLDS[known[-1]]


@dataclass(frozen=True)
class Components:
    """``U diag(s) V^T``: ``u [O, R]``, ``s [R]``, ``v [I, R]``."""

    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Components:
        """No components of a matrix of the size ``like [O, I, ...]`` has."""
        rows, columns = like.shape[:2]
        return cls(like.new_empty(rows, 0), like.new_empty(0), like.new_empty(columns, 0))

    def matrix(self) -> Tensor:
        """``[O, I]``."""
        return (self.u * self.s) @ self.v.t()


@torch.no_grad()
def store(residual: Tensor, earlier: Components) -> tuple[Components, int]:
    """A task's matrix ``residual + earlier``, the residual cut to the components that matter, and how many those are.

    With E0 the sum of ``|earlier.s|`` and c_j = E0 plus the j largest singular values of ``residual [O, I, ...]``:
    where E0 / c_last lies below the threshold of O, all j with c_j / c_last below it are kept and one more; else none.
    """
    u, sigma, vh = torch.linalg.svd(residual.reshape(residual.shape[:2]), full_matrices=False)
    start = earlier.s.abs().sum()
    reached = start + sigma.cumsum(0)
    total, threshold = reached[-1], energy_threshold(residual.shape[0])
    count = 0
    if total > 0 and start / total < threshold:
        count = min(int((reached / total < threshold).sum()) + 1, len(sigma))
    kept = Components(
        torch.cat([earlier.u, u[:, :count]], 1),
        torch.cat([earlier.s, sigma[:count]]),
        torch.cat([earlier.v, vh[:count].t()], 1),
    )
    return kept, count


def stored_numbers(shape: tuple[int, ...], count: int) -> int:
    """Numbers that ``count`` new components of an ``[O, I, ...]`` matrix take: (O + I + 1) each."""
    return (shape[0] + shape[1] + 1) * count


def stored_numbers_as_published(shape: tuple[int, ...], count: int) -> int:
    """The same as the released code counts it, (2 O + 1) each; it is right for square matrices only."""
    return (2 * shape[0] + 1) * count


def rank_penalty(matrices: Iterable[Tensor], weight: float = 0.01) -> Tensor:
    """``weight`` times the sum over matrices and their n singular values of sigma_i (0.1 + sigmoid(10 i / n)).

    i counts from 0 at the largest, so small singular values cost more for their size. The factors are formed in float32
    whatever the matrices' type, as in the released code. ``matrices`` are ``[O, I]`` with any trailing ones;
    differentiable (twice where singular values differ).

    Raises:
        ValueError: there are no matrices.
    """
    parts = []
    for matrix in matrices:
        sigma = torch.linalg.svdvals(matrix.reshape(matrix.shape[:2]))
        place = torch.arange(len(sigma), dtype=torch.float32, device=sigma.device)
        parts.append((sigma * (0.1 + torch.sigmoid(10 * place / len(sigma)))).sum())
    if not parts:
        raise ValueError("there are no matrices whose rank could be penalised")
    return weight * torch.stack(parts).sum()


def low_rank_layers(cfg: MemoryConfig) -> list[str]:
    """The generator's convolutions whose gamma and beta are stored so: all but those of the last three stages.

    Published for the seven stages of resnet4: the wide ones, where it pays.
    """
    stages = generator_plan(cfg.source).stages[:-FULL_STAGES]
    return [f"{block.name}.{leaf}" for stage in stages for block in stage for leaf in ("conv_0", "conv_1")]


class LowRankConv2d(nn.Module):
    """A convolution with the weight ``(gamma + G) * weight + (beta + B)`` and the bias ``bias + shift``.

    G = ``gamma_u diag(gamma_s) gamma_v^T`` and B likewise hold what earlier tasks stored; u and v are frozen, s is
    trained, as are the residuals gamma and beta ``[O, I, 1, 1]``, which start at 0, and the shift ``[O]``. Modulates in
    every forward; no ``ModulationPlan`` serves it. Differentiable as often as the convolution is.

    Args:
        conv: the plain convolution, whose weight and bias are taken over and frozen.
        gamma_count, beta_count: numbers of stored components.
    """

    stored = ("gamma_u", "gamma_v", "beta_u", "beta_v")

    def __init__(self, conv: nn.Conv2d, gamma_count: int, beta_count: int) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
        rows, columns = conv.weight.shape[:2]
        wide = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
        at = {"dtype": wide, "device": conv.weight.device}
        for name, count in (("gamma", gamma_count), ("beta", beta_count)):
            self.register_parameter(name, nn.Parameter(torch.zeros(rows, columns, 1, 1, **at)))
            self.register_parameter(f"{name}_u", nn.Parameter(torch.zeros(rows, count, **at), requires_grad=False))
            self.register_parameter(f"{name}_s", nn.Parameter(torch.zeros(count, **at)))
            self.register_parameter(f"{name}_v", nn.Parameter(torch.zeros(columns, count, **at), requires_grad=False))
        self.shift = nn.Parameter(torch.zeros(rows, **at))
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)

    def components(self, name: str) -> Components:
        """The stored part of ``gamma`` or ``beta`` with its weights as they are now."""
        return Components(*(getattr(self, f"{name}_{part}").detach() for part in "usv"))

    @torch.no_grad()
    def put(self, gamma: Components, beta: Components, shift: Tensor) -> None:
        """Start from stored components and a shift, with no residual."""
        for name, found in (("gamma", gamma), ("beta", beta)):
            for part in "usv":
                getattr(self, f"{name}_{part}").copy_(getattr(found, part))
            getattr(self, name).zero_()
        self.shift.copy_(shift)

    def reset_modulation(self) -> None:
        """No residual, no stored component, no shift."""
        for name, parameter in self.named_parameters():
            if name not in ("weight", "bias"):
                nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        beta = self.beta.flatten(1) + (self.beta_u * self.beta_s) @ self.beta_v.t()
        weight = modulate_lowrank(self.weight, self.gamma, self.gamma_u, self.gamma_s, self.gamma_v, beta)
        return nn.functional.conv2d(input, weight, shifted(self.bias, self.shift), *self._settings)
