"""The definition of every op in plain PyTorch: written for reading, runs on any device.

Arguments are checked by the caller. gamma and beta are ``[O, I]`` (or None: one and zero) in the type that the op
computes in: float32, or float64 for a float64 weight. Results are fresh and are cast once.
"""

import torch
from torch import Tensor

from .._arguments import accumulation_type
from .reference_arena import modulate_many_backward_out as modulate_many_backward_out
from .reference_arena import modulate_many_out as modulate_many_out
from .reference_arena import step_many as step_many

# gamma and beta come as [O, I].
BROADCASTS = False


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


def modulate_many(
    weights: list[Tensor],
    gammas: list[Tensor | None],
    betas: list[Tensor | None],
    dtype: torch.dtype,
    memory_formats: list[torch.memory_format],
) -> list[Tensor]:
    """``modulate`` of every weight."""
    layers = zip(weights, gammas, betas, memory_formats, strict=True)
    return [modulate(weight, gamma, beta, dtype, layout) for weight, gamma, beta, layout in layers]


def modulate_many_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor | None],
    mask: list[bool],
    memory_formats: list[torch.memory_format],
) -> list[Tensor]:
    """``modulate_backward`` of every weight: all dW, then all dgamma, then all dbeta, without those not in ``mask``."""
    layers = zip(grads, weights, gammas, memory_formats, strict=True)
    found = [modulate_backward(grad, weight, gamma, mask, layout) for grad, weight, gamma, layout in layers]
    return [layer[part] for part in range(3) if mask[part] for layer in found]


def modulate_per_sample(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    samples: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """W'[n] = gamma[n] * W + beta[n]; gamma and beta are ``[N, O, I]``."""
    result = weight.to(accumulation_type(weight)).expand(samples, *weight.shape)
    if gamma is not None:
        result = result * over_taps(gamma, weight)
    if beta is not None:
        result = result + over_taps(beta, weight)
    layout = torch.contiguous_format
    if channels_last:
        layout = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    stacked = result.to(dtype).reshape(samples * weight.shape[0], *weight.shape[1:])
    return stacked.clone(memory_format=layout).unflatten(0, (samples, weight.shape[0]))


def modulate_per_sample_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: list[bool], memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    """dW = sum over n of gamma[n] * G[n], dgamma[n] = sum over K of G[n] * W, dbeta[n] = sum over K of G[n]."""
    wide = accumulation_type(weight)
    grad = grad.to(wide, copy=True)
    taps = tuple(range(3, grad.dim()))
    d_weight, d_gamma, d_beta = weight.new_empty(0), weight.new_empty(0, dtype=wide), weight.new_empty(0, dtype=wide)
    if mask[0]:
        scaled = grad if gamma is None else grad * over_taps(gamma, weight)
        d_weight = scaled.sum(0).to(weight.dtype).contiguous(memory_format=memory_format)
    if mask[1]:
        product = grad * weight.to(wide)
        d_gamma = (product.sum(taps) if taps else product).contiguous()
    if mask[2]:
        d_beta = (grad.sum(taps) if taps else grad).contiguous()
    return d_weight, d_gamma, d_beta


def modulate_lowrank(
    weight: Tensor,
    gamma: Tensor | None,
    left: Tensor,
    right: Tensor,
    beta: Tensor | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """W' = (gamma + left @ right) * W + beta; left is ``[O, R]``, right ``[R, I]``."""
    total = left @ right + (1.0 if gamma is None else gamma)
    return modulate(weight, total, beta, dtype, memory_format)


def normalised(weight: Tensor, over: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(W - mean) / s, s, and where s is ``eps`` because the sample deviation is below it; differentiable.

    ``over`` "filter": mean and deviation of the taps of each filter; "channel": of all weights of each output channel.
    """
    dims = tuple(range(2 if over == "filter" else 1, weight.dim()))
    members = weight.shape[dims[0] :].numel()
    centred = weight - weight.mean(dims, keepdim=True)
    variance = centred.square().sum(dims, keepdim=True) / (members - 1)
    guarded = variance.sqrt() < eps
    # The square root is taken of 1 where it is not used: its derivative at 0 is infinite.
    scale = torch.where(guarded, eps, torch.where(guarded, 1.0, variance).sqrt())
    return centred / scale, scale, guarded


def modulate_normalized(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    over: str,
    eps: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """W' = gamma * n + beta with n = ``normalised`` W."""
    if weight.numel() == 0:
        return weight.new_empty(weight.shape, dtype=dtype).contiguous(memory_format=memory_format)
    n, _, _ = normalised(weight.to(accumulation_type(weight)), over, eps)
    return modulate(n, gamma, beta, dtype, memory_format)


def modulate_normalized_backward(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    over: str,
    eps: float,
    mask: list[bool],
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``modulate_normalized``; results not in ``mask`` have shape [0]."""
    wide = accumulation_type(weight)
    d_weight, d_gamma, d_beta = weight.new_empty(0), weight.new_empty(0, dtype=wide), weight.new_empty(0, dtype=wide)
    found = normalized_gradients(grad.to(wide), weight.to(wide), gamma, over, eps)
    if mask[0]:
        d_weight = found[0].to(weight.dtype, copy=True).contiguous(memory_format=memory_format)
    return d_weight, found[1] if mask[1] else d_gamma, found[2] if mask[2] else d_beta


def normalized_gradients(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, over: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dW, dgamma and dbeta of ``modulate_normalized`` in one type, differentiable.

    With dn = gamma * G over a group of M weights: dW = (dn - mean(dn) - n * sum(dn * n) / (M - 1)) / s, without the
    last term where s is guarded; dgamma = sum over K of G * n; dbeta = sum over K of G.
    """
    if weight.numel() == 0:
        pairs = weight.new_zeros(weight.shape[:2])
        return grad * weight, pairs, pairs.clone()
    n, scale, guarded = normalised(weight, over, eps)
    dims = tuple(range(2 if over == "filter" else 1, weight.dim()))
    members = weight.shape[dims[0] :].numel()
    dn = grad if gamma is None else grad * over_taps(gamma, weight)
    slope = (dn * n).sum(dims, keepdim=True) / (members - 1)
    d_weight = (dn - dn.mean(dims, keepdim=True) - n * torch.where(guarded, 0.0, slope)) / scale
    return d_weight, sum_taps(grad * n), sum_taps(grad)
