"""Triton launchers of the variants of ``modulate``: per sample, normalised, and with a low-rank gamma."""

import torch
from torch import Tensor

from .._arguments import accumulation_type, dense, is_channels_last
from . import interpreting
from .triton_launch import constant, next_power, on_device, options, register, taps_of, tiles, unroll
from .triton_lowrank_kernels import modulate_lowrank_kernel, modulate_lowrank_rows_kernel
from .triton_normalized_kernels import modulate_normalized_backward_kernel, modulate_normalized_kernel
from .triton_sample_kernels import (
    modulate_per_sample_flat_kernel,
    modulate_per_sample_kernel,
    modulate_per_sample_sums_kernel,
    modulate_per_sample_weight_kernel,
)

# Pairs, or elements, of one program. The interpreter pays 0.7 ms for each program.
PAIRS = 1024
FLAT = 1024
_INTERPRETED = 1 << 14
# Taps in flight: of the forward, of the sums, and of a weight kept in registers over all samples.
FORWARD_UNROLL = 9
SUMS_UNROLL = 5
KEPT_UNROLL = 5
# Programs that fill a GPU; below, the samples of one weight are divided among programs, which read the weight again.
WANTED_PROGRAMS = 1024
_INTERPRETED_PROGRAMS = 1


def _size(compiled: int) -> int:
    return _INTERPRETED if interpreting() else compiled


def _last(tensor: Tensor) -> bool:
    """Whether the taps of a dense weight lie outside its input channels; one tap lies either way."""
    return is_channels_last(tensor) or taps_of(tensor) == 1


def _form(weight: Tensor, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if weight.dim() == 4 else torch.channels_last_3d


def _divide_samples(samples: int, programs: int) -> int:
    """Samples of one program."""
    wanted = _INTERPRETED_PROGRAMS if interpreting() else WANTED_PROGRAMS
    groups = min(samples, max(1, wanted // programs))
    return -(-samples // groups)


def _sample_constant(value: float, weight: Tensor, samples: int) -> Tensor:
    return constant(value, weight).expand(samples, *weight.shape[:2])


def _launch_per_sample(
    weight: Tensor, gamma: Tensor | None, beta: Tensor | None, samples: int, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    form = _form(weight, channels_last)
    one = torch.empty(weight.shape, dtype=dtype, device="meta", memory_format=form)
    strides = (weight.numel(), *one.stride())
    out = torch.empty_strided((samples, *weight.shape), strides, dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    weight = dense(weight)
    gamma = _sample_constant(1.0, weight, samples) if gamma is None else gamma
    beta = _sample_constant(0.0, weight, samples) if beta is None else beta
    taps, (outer, inner) = taps_of(weight), weight.shape[:2]
    weight_last, out_last = _last(weight), _last(one)
    with on_device(weight.device):
        if not weight_last and not out_last:
            block = _size(FLAT)
            programs = -(-weight.numel() // block)
            share = _divide_samples(samples, programs)
            modulate_per_sample_flat_kernel[(programs, -(-samples // share))](
                weight,
                gamma,
                beta,
                out,
                samples,
                weight.numel(),
                inner,
                *gamma.stride(),
                *beta.stride(),
                TAPS=taps,
                SAMPLES=share,
                BLOCK=block,
                **options(weight),
            )
            return out
        block_o, block_i = tiles(outer, inner, _size(PAIRS))
        grid = (-(-outer // block_o), -(-inner // block_i))
        share = _divide_samples(samples, grid[0] * grid[1])
        modulate_per_sample_kernel[(*grid, -(-samples // share))](
            weight,
            gamma,
            beta,
            out,
            samples,
            outer,
            inner,
            *gamma.stride(),
            *beta.stride(),
            TAPS=taps,
            UNROLL=unroll(taps, KEPT_UNROLL),
            WEIGHT_LAST=weight_last,
            OUT_LAST=out_last,
            SAMPLES=share,
            BLOCK_O=block_o,
            BLOCK_I=block_i,
            **options(weight),
        )
    return out


def _launch_per_sample_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: list[bool], channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide, samples = accumulation_type(weight), grad.shape[0]
    weight = dense(weight)
    sums = (samples, *weight.shape[:2])
    # No tap or no sample: the sums are zero, and there is nothing to launch.
    empty = torch.zeros if grad.numel() == 0 else torch.empty
    d_weight = weight.new_empty(0)
    if mask[0]:
        d_weight = torch.empty_like(weight, memory_format=_form(weight, channels_last))
        if grad.numel() == 0:
            d_weight.zero_()
    d_gamma = empty(sums if mask[1] else (0,), dtype=wide, device=weight.device)
    d_beta = empty(sums if mask[2] else (0,), dtype=wide, device=weight.device)
    if grad.numel() == 0 or not any(mask):
        return d_weight, d_gamma, d_beta
    # Samples may lie anywhere, each must be dense.
    if not (grad[0].is_contiguous() or is_channels_last(grad[0])):
        grad = grad.contiguous()
    gamma = _sample_constant(1.0, weight, samples) if gamma is None else gamma
    taps, (outer, inner) = taps_of(weight), weight.shape[:2]
    layouts = {"GRAD_LAST": _last(grad[0]), "WEIGHT_LAST": _last(weight)}
    with on_device(weight.device):
        if mask[1] or mask[2]:
            block_o, block_i = tiles(outer, inner, _size(PAIRS))
            grid = (-(-outer // block_o), -(-inner // block_i))
            share = _divide_samples(samples, grid[0] * grid[1])
            modulate_per_sample_sums_kernel[(*grid, -(-samples // share))](
                grad,
                weight,
                d_gamma,
                d_beta,
                samples,
                outer,
                inner,
                grad.stride(0),
                TAPS=taps,
                UNROLL=unroll(taps, SUMS_UNROLL),
                NEED_GAMMA=mask[1],
                NEED_BETA=mask[2],
                SAMPLES=share,
                BLOCK_O=block_o,
                BLOCK_I=block_i,
                **layouts,
                **options(weight),
            )
        if mask[0]:
            block = _size(FLAT)
            modulate_per_sample_weight_kernel[(-(-weight.numel() // block),)](
                grad,
                gamma,
                d_weight,
                samples,
                outer,
                inner,
                grad.stride(0),
                *gamma.stride(),
                TAPS=taps,
                BLOCK=block,
                **layouts,
                **options(weight),
            )
    return d_weight, d_gamma, d_beta


def _normalized_tiles(weight: Tensor, over_channel: bool) -> tuple[int, int, tuple[int, int]]:
    """BLOCK_O, BLOCK_I and the grid: with ``over_channel`` a program walks over the input channels itself."""
    outer, inner = weight.shape[:2]
    block_o, block_i = tiles(outer, inner, _size(PAIRS))
    return block_o, block_i, (-(-outer // block_o), 1 if over_channel else -(-inner // block_i))


def _launch_normalized(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    over_channel: bool,
    eps: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    weight = dense(weight)
    gamma = constant(1.0, weight) if gamma is None else gamma
    beta = constant(0.0, weight) if beta is None else beta
    block_o, block_i, grid = _normalized_tiles(weight, over_channel)
    taps = taps_of(weight)
    with on_device(weight.device):
        modulate_normalized_kernel[grid](
            weight,
            gamma,
            beta,
            out,
            *weight.shape[:2],
            *gamma.stride(),
            *beta.stride(),
            TAPS=taps,
            UNROLL=unroll(taps, SUMS_UNROLL),
            WEIGHT_LAST=_last(weight),
            OUT_LAST=_last(out),
            OVER_CHANNEL=over_channel,
            EPS=eps,
            BLOCK_O=block_o,
            BLOCK_I=block_i,
            **options(weight),
        )
    return out


def _launch_normalized_backward(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    over_channel: bool,
    eps: float,
    mask: list[bool],
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, pairs = accumulation_type(weight), weight.shape[:2]
    grad, weight = dense(grad), dense(weight)
    d_weight = torch.empty_like(weight, memory_format=memory_format) if mask[0] else weight.new_empty(0)
    # No tap: the sums are zero, and there is nothing to launch.
    empty = weight.new_zeros if weight.numel() == 0 else weight.new_empty
    d_gamma = empty(pairs if mask[1] else (0,), dtype=wide)
    d_beta = empty(pairs if mask[2] else (0,), dtype=wide)
    if weight.numel() == 0 or not any(mask):
        return d_weight, d_gamma, d_beta
    gamma = constant(1.0, weight) if gamma is None else gamma
    block_o, block_i, grid = _normalized_tiles(weight, over_channel)
    taps = taps_of(weight)
    with on_device(weight.device):
        modulate_normalized_backward_kernel[grid](
            grad,
            weight,
            gamma,
            d_weight,
            d_gamma,
            d_beta,
            *pairs,
            *gamma.stride(),
            TAPS=taps,
            UNROLL=unroll(taps, SUMS_UNROLL),
            GRAD_LAST=_last(grad),
            WEIGHT_LAST=_last(weight),
            OVER_CHANNEL=over_channel,
            EPS=eps,
            NEED_WEIGHT=mask[0],
            NEED_GAMMA=mask[1],
            NEED_BETA=mask[2],
            BLOCK_O=block_o,
            BLOCK_I=block_i,
            **options(weight),
        )
    return d_weight, d_gamma, d_beta


def _launch_lowrank(
    weight: Tensor,
    gamma: Tensor | None,
    left: Tensor,
    right: Tensor,
    beta: Tensor | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    weight, left, right = dense(weight), left.contiguous(), right.contiguous()
    gamma = constant(1.0, weight) if gamma is None else gamma
    beta = constant(0.0, weight) if beta is None else beta
    taps, (outer, inner) = taps_of(weight), weight.shape[:2]
    weight_last, out_last = _last(weight), _last(out)
    strides = (*gamma.stride(), *beta.stride())
    with on_device(weight.device):
        if not weight_last and not out_last:
            block_taps = next_power(taps)
            block = max(1, _size(FLAT) // block_taps)
            modulate_lowrank_rows_kernel[(-(-outer * inner // block),)](
                weight,
                gamma,
                left,
                right,
                beta,
                out,
                outer * inner,
                inner,
                left.shape[1],
                *strides,
                TAPS=taps,
                BLOCK=block,
                BLOCK_TAPS=block_taps,
                **options(weight),
            )
            return out
        block_o, block_i = tiles(outer, inner, _size(PAIRS))
        modulate_lowrank_kernel[(-(-outer // block_o), -(-inner // block_i))](
            weight,
            gamma,
            left,
            right,
            beta,
            out,
            outer,
            inner,
            left.shape[1],
            *strides,
            TAPS=taps,
            UNROLL=unroll(taps, FORWARD_UNROLL),
            WEIGHT_LAST=weight_last,
            OUT_LAST=out_last,
            BLOCK_O=block_o,
            BLOCK_I=block_i,
            **options(weight),
        )
    return out


modulate_per_sample = register(
    "modulate_per_sample(Tensor weight, Tensor? gamma, Tensor? beta, int samples, ScalarType dtype, "
    "bool channels_last) -> Tensor",
    _launch_per_sample,
)
_per_sample_backward = register(
    "modulate_per_sample_backward(Tensor grad, Tensor weight, Tensor? gamma, bool[3] mask, bool channels_last) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_per_sample_backward,
)
_normalized = register(
    "modulate_normalized(Tensor weight, Tensor? gamma, Tensor? beta, bool over_channel, float eps, ScalarType dtype, "
    "MemoryFormat memory_format) -> Tensor",
    _launch_normalized,
)
_normalized_backward = register(
    "modulate_normalized_backward(Tensor grad, Tensor weight, Tensor? gamma, bool over_channel, float eps, "
    "bool[3] mask, MemoryFormat memory_format) -> (Tensor, Tensor, Tensor)",
    _launch_normalized_backward,
)
modulate_lowrank = register(
    "modulate_lowrank(Tensor weight, Tensor? gamma, Tensor left, Tensor right, Tensor? beta, ScalarType dtype, "
    "MemoryFormat memory_format) -> Tensor",
    _launch_lowrank,
)


def modulate_per_sample_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: list[bool], memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    """dW = sum over n of gamma[n] * G[n] in order, dgamma, dbeta ``[N, O, I]`` = sums over the taps, in order."""
    return _per_sample_backward(grad, weight, gamma, mask, memory_format != torch.contiguous_format)


def modulate_normalized(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    over: str,
    eps: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """W' = gamma * (W - mean) / max(deviation, eps) + beta over "filter" or "channel", rounded once."""
    return _normalized(weight, gamma, beta, over == "channel", eps, dtype, memory_format)


def modulate_normalized_backward(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    over: str,
    eps: float,
    mask: list[bool],
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor]:
    """dW, dgamma, dbeta of ``modulate_normalized``; every sum in a fixed order."""
    return _normalized_backward(grad, weight, gamma, over == "channel", eps, mask, memory_format)
