"""The definition of every op in plain PyTorch: written for reading, runs on any device.

Arguments are checked by the caller. gamma and beta are ``[O, I]`` (or None: one and zero) in the type that the op
computes in: float32, or float64 for a float64 weight. Results are fresh and are cast once.
"""

import torch
from torch import Tensor

from .._arguments import accumulation_type


def modulate(
    weight: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """W' = gamma * W + beta, gamma and beta spread over the kernel dimensions."""
    result = weight.to(accumulation_type(weight), copy=True)
    if gamma is not None:
        result = result * over_taps(gamma, weight)
    if beta is not None:
        result = result + over_taps(beta, weight)
    return result.to(dtype).contiguous(memory_format=memory_format)


def modulate_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: list[bool], memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    """dW = gamma * G, dgamma = sum over K of G * W, dbeta = sum over K of G; results not in ``mask`` have shape [0].

    dW has the weight's dtype and ``memory_format``; dgamma and dbeta are ``[O, I]`` in the type of the computation.
    """
    wide = accumulation_type(weight)
    grad = grad.to(wide, copy=True)
    d_weight, d_gamma, d_beta = weight.new_empty(0), weight.new_empty(0, dtype=wide), weight.new_empty(0, dtype=wide)
    if mask[0]:
        scaled = grad if gamma is None else grad * over_taps(gamma, weight)
        d_weight = scaled.to(weight.dtype, copy=True).contiguous(memory_format=memory_format)
    if mask[1]:
        d_gamma = sum_taps(grad * weight.to(wide))
    if mask[2]:
        d_beta = sum_taps(grad)
    return d_weight, d_gamma, d_beta


def over_taps(parameter: Tensor, weight: Tensor) -> Tensor:
    """``[O, I]`` with one trailing 1 for each kernel dimension of the weight."""
    return parameter.reshape(parameter.shape + (1,) * (weight.dim() - 2))


def sum_taps(product: Tensor) -> Tensor:
    """``[O, I, *K]`` summed over its kernel dimensions, as a fresh contiguous ``[O, I]``."""
    if product.dim() == 2:
        return product.clone(memory_format=torch.contiguous_format)
    return product.sum(dim=tuple(range(2, product.dim()))).contiguous()
