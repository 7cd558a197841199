"""The compiled kernels of ``libadafm.so``: CPU (vectorised, threaded) and CUDA.

Arguments are checked by the caller. The library takes dense weights and gamma, beta ``[O, I]`` of any strides; this
file brings everything else into that form. The library is loaded before these functions are called.
"""

import torch
from torch import Tensor

from .._arguments import accumulation_type, dense


def modulate(
    weight: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """W' = gamma * W + beta by one fused multiply-add each, rounded once to ``dtype`` (nearest even)."""
    if gamma is None:
        gamma = _constant(1.0, weight)
    if beta is None:
        beta = _constant(0.0, weight)
    channels_last = memory_format != torch.contiguous_format
    return torch.ops.adafm_compiled.modulate.default(dense(weight), gamma, beta, dtype, channels_last)


def modulate_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: list[bool], memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    """dW = gamma * G, dgamma = sum over K of G * W, dbeta = sum over K of G, summed in a fixed order.

    dW takes the weight's layout, which is ``memory_format`` by construction. Results not in ``mask`` have shape [0].
    """
    if gamma is None:
        gamma = _constant(1.0, weight)
    return torch.ops.adafm_compiled.modulate_backward.default(dense(grad), dense(weight), gamma, *mask)


def _constant(value: float, weight: Tensor) -> Tensor:
    """The value as ``[O, I]`` with zero strides."""
    return torch.full((), value, dtype=accumulation_type(weight), device=weight.device).expand(weight.shape[:2])
