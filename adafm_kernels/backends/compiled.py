"""The compiled kernels of ``libadafm.so``: CPU (vectorised, threaded) and CUDA.

Arguments are checked by the caller. The library takes dense weights, and gamma and beta of any strides; this file
brings everything else into that form. The library is loaded before these functions are called.
"""

import torch
from torch import Tensor

from .._arguments import accumulation_type, dense

# modulate takes gamma and beta as [O, I], [O, 1] or [1, I] with any number of trailing ones, and checks everything.
BROADCASTS = True


def modulate(
    weight: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """W' = gamma * W + beta by one fused multiply-add each, rounded once to ``dtype`` (nearest even)."""
    return torch.ops.adafm_compiled.modulate.default(
        dense(weight),
        _given(gamma, 1.0, weight),
        _given(beta, 0.0, weight),
        dtype,
        memory_format != torch.contiguous_format,
    )


def modulate_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: list[bool], memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    """dW = gamma * G, dgamma = sum over K of G * W, dbeta = sum over K of G, summed in a fixed order.

    dW takes the weight's layout, which is ``memory_format`` by construction. Results not in ``mask`` have shape [0].
    """
    gamma = _given(gamma, 1.0, weight) if mask[0] else None
    return torch.ops.adafm_compiled.modulate_backward.default(dense(grad), dense(weight), gamma, *mask)


def modulate_many(
    weights: list[Tensor],
    gammas: list[Tensor | None],
    betas: list[Tensor | None],
    dtype: torch.dtype,
    memory_formats: list[torch.memory_format],
) -> list[Tensor]:
    """``modulate`` of every weight, in one parallel region or one launch."""
    return torch.ops.adafm_compiled.modulate_many.default(
        [dense(weight) for weight in weights],
        [_given(gamma, 1.0, weight) for gamma, weight in zip(gammas, weights, strict=True)],
        [_given(beta, 0.0, weight) for beta, weight in zip(betas, weights, strict=True)],
        dtype,
        [int(memory_format != torch.contiguous_format) for memory_format in memory_formats],
    )


def modulate_many_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor | None],
    mask: list[bool],
    memory_formats: list[torch.memory_format],
) -> list[Tensor]:
    """``modulate_backward`` of every weight: all dW, then all dgamma, then all dbeta, without those not in ``mask``.

    Each dW takes its weight's layout, which is that of ``memory_formats`` by construction.
    """
    return torch.ops.adafm_compiled.modulate_many_backward.default(
        [dense(grad) for grad in grads],
        [dense(weight) for weight in weights],
        [_given(gamma, 1.0, weight) for gamma, weight in zip(gammas, weights, strict=True)],
        *mask,
    )


def modulate_per_sample(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    samples: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """W'[n] = gamma[n] * W + beta[n], ``[N, O, I, *K]``; the weight is read once."""
    stacked = torch.ops.adafm_compiled.modulate_per_sample.default(
        dense(weight),
        _given(gamma, 1.0, weight, samples),
        _given(beta, 0.0, weight, samples),
        dtype,
        channels_last,
    )
    return stacked.unflatten(0, (samples, weight.shape[0]))


def modulate_per_sample_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: list[bool], memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    """dW = sum over n of gamma[n] * G[n] in the order of n, dgamma[n] = sum over K of G[n] * W, dbeta[n] = sum of G[n].

    dW takes the weight's layout, which is ``memory_format`` by construction. Results not in ``mask`` have shape [0].
    """
    return torch.ops.adafm_compiled.modulate_per_sample_backward.default(
        dense(grad.flatten(0, 1)), dense(weight), _given(gamma, 1.0, weight, grad.shape[0]), *mask
    )


def modulate_normalized(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    over: str,
    eps: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """gamma * (W - mean) / deviation + beta over each filter or output channel; two passes, sums in a fixed order."""
    return torch.ops.adafm_compiled.modulate_normalized.default(
        dense(weight),
        _given(gamma, 1.0, weight),
        _given(beta, 0.0, weight),
        over == "channel",
        eps,
        dtype,
        memory_format != torch.contiguous_format,
    )


def modulate_normalized_backward(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    over: str,
    eps: float,
    mask: list[bool],
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``modulate_normalized``; mean and deviation are worked out anew.

    dW takes the weight's layout, which is ``memory_format`` by construction. Results not in ``mask`` have shape [0].
    """
    return torch.ops.adafm_compiled.modulate_normalized_backward.default(
        dense(grad), dense(weight), _given(gamma, 1.0, weight), over == "channel", eps, *mask
    )


def modulate_lowrank(
    weight: Tensor,
    gamma: Tensor | None,
    left: Tensor,
    right: Tensor,
    beta: Tensor | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """W' = (gamma + left @ right) * W + beta; the sum over the rank is formed in registers or in the first cache."""
    return torch.ops.adafm_compiled.modulate_lowrank.default(
        dense(weight),
        _given(gamma, 1.0, weight),
        left.contiguous(),
        right.contiguous(),
        _given(beta, 0.0, weight),
        dtype,
        memory_format != torch.contiguous_format,
    )


def modulate_many_out(
    weight: Tensor, gamma: Tensor, beta: Tensor, layers: Tensor, tiles: Tensor | None, out: Tensor
) -> None:
    """W' of every layer of an arena, written to ``out``."""
    torch.ops.adafm_compiled.modulate_many_out.default(weight, gamma, beta, layers, tiles, out)


def modulate_many_backward_out(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    layers: Tensor,
    tiles: Tensor | None,
    grad_weight: Tensor | None,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
) -> None:
    """The gradients of every layer of an arena, written to those given."""
    torch.ops.adafm_compiled.modulate_many_backward_out.default(
        grad, weight, gamma, layers, tiles, grad_weight, grad_gamma, grad_beta
    )


def step_many(
    grad: Tensor,
    weight: Tensor,
    layers: Tensor,
    tiles: Tensor | None,
    hyper: Tensor,
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    average: Tensor | None,
    out: Tensor | None,
) -> None:
    """Reduce, Adam, average and the next W' of every layer of an arena, in place."""
    torch.ops.adafm_compiled.step_many.default(
        grad, weight, layers, tiles, hyper, parameters, exp_avg, exp_avg_sq, average, out
    )


def adam_many(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rates: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    skip: Tensor | None,
) -> None:
    """One step of Adam on every parameter, in place; csrc/include/adafm/adam_many.h."""
    torch.ops.adafm_compiled.adam_many.default(
        parameters, grads, exp_avgs, exp_avg_sqs, steps, rates, beta1, beta2, eps, skip
    )
    # The op's own writes are not seen by autograd.
    torch.autograd.graph.increment_version([*parameters, *exp_avgs, *exp_avg_sqs])


def _given(parameter: Tensor | None, default: float, weight: Tensor, samples: int | None = None) -> Tensor:
    """The parameter, or the default as ``[O, I]`` (``[N, O, I]``) with zero strides."""
    if parameter is not None:
        return parameter
    pairs = weight.shape[:2] if samples is None else (samples, *weight.shape[:2])
    return torch.full((), default, dtype=accumulation_type(weight), device=weight.device).expand(pairs)
