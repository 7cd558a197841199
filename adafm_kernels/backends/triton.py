"""The Triton backend: launchers of ``modulate`` and ``modulate_backward``, and the other functions by import.

They run on CUDA tensors, and on CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1`` before Python starts).
The interpreter truncates float32 to bfloat16 where a GPU rounds to nearest even: results there differ by one bfloat16
step. Imported on first use, since importing Triton takes time. Arguments are checked by the caller.
"""

import torch
from torch import Tensor

from .._arguments import accumulation_type, dense, is_channels_last
from . import interpreting
from .triton_arena import modulate_many_backward_out, modulate_many_out, step_many
from .triton_kernels import (
    modulate_backward_flat_kernel,
    modulate_backward_kernel,
    modulate_flat_kernel,
    modulate_kernel,
)
from .triton_launch import constant, on_device, options, register, taps_of, tiles, unroll
from .triton_many import modulate_many, modulate_many_backward
from .triton_variants import (
    modulate_lowrank,
    modulate_normalized,
    modulate_normalized_backward,
    modulate_per_sample,
    modulate_per_sample_backward,
)

__all__ = [
    "modulate",
    "modulate_backward",
    "modulate_lowrank",
    "modulate_many",
    "modulate_many_backward",
    "modulate_many_backward_out",
    "modulate_many_out",
    "modulate_normalized",
    "modulate_normalized_backward",
    "modulate_per_sample",
    "modulate_per_sample_backward",
    "step_many",
]

# gamma and beta come as [O, I].
BROADCASTS = False

# Pairs held by one program (in registers: the backward holds two sums for each), elements of one flat program. The
# interpreter pays 0.7 ms for each program.
PAIRS = 1024
BACKWARD_PAIRS = 512
FLAT = 2048
# Taps in flight where both tensors of the backward are contiguous.
FLAT_UNROLL = 8
_INTERPRETED_PAIRS = 1 << 14
_INTERPRETED_FLAT = 1 << 16


def _launch_modulate(
    weight: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    weight = dense(weight)
    gamma = constant(1.0, weight) if gamma is None else gamma
    beta = constant(0.0, weight) if beta is None else beta
    taps, (outer, inner) = taps_of(weight), weight.shape[:2]
    weight_last, out_last = is_channels_last(weight), is_channels_last(out)
    with on_device(weight.device):
        if not weight_last and not out_last:
            block = _INTERPRETED_FLAT if interpreting() else FLAT
            modulate_flat_kernel[(-(-weight.numel() // block),)](
                weight,
                gamma.contiguous(),
                beta.contiguous(),
                out,
                weight.numel(),
                TAPS=taps,
                BLOCK=block,
                **options(weight),
            )
            return out
        block_o, block_i = tiles(outer, inner, _INTERPRETED_PAIRS if interpreting() else PAIRS)
        modulate_kernel[(-(-outer // block_o), -(-inner // block_i))](
            weight,
            gamma,
            beta,
            out,
            outer,
            inner,
            *gamma.stride(),
            *beta.stride(),
            TAPS=taps,
            UNROLL=unroll(taps),
            WEIGHT_LAST=weight_last,
            OUT_LAST=out_last,
            BLOCK_O=block_o,
            BLOCK_I=block_i,
            **options(weight),
        )
    return out


def _launch_modulate_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: list[bool], memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_type(weight)
    pairs = weight.shape[:2]
    grad, weight = dense(grad), dense(weight)
    d_weight = torch.empty_like(weight, memory_format=memory_format) if mask[0] else weight.new_empty(0)
    # No tap: the sums are zero, and there is nothing to launch.
    empty = weight.new_zeros if weight.numel() == 0 else weight.new_empty
    d_gamma = empty(pairs if mask[1] else (0,), dtype=wide)
    d_beta = empty(pairs if mask[2] else (0,), dtype=wide)
    if weight.numel() == 0 or not any(mask):
        return d_weight, d_gamma, d_beta
    if gamma is None:
        gamma = constant(1.0, weight)
    taps, (outer, inner) = taps_of(weight), pairs
    if taps > 1 and not is_channels_last(grad) and not is_channels_last(weight):
        block = _INTERPRETED_PAIRS if interpreting() else BACKWARD_PAIRS
        with on_device(weight.device):
            modulate_backward_flat_kernel[(-(-outer * inner // block),)](
                grad,
                weight,
                gamma.contiguous(),
                d_weight,
                d_gamma,
                d_beta,
                outer * inner,
                TAPS=taps,
                UNROLL=unroll(taps, FLAT_UNROLL),
                NEED_WEIGHT=mask[0],
                NEED_GAMMA=mask[1],
                NEED_BETA=mask[2],
                BLOCK=block,
                **options(weight),
            )
        return d_weight, d_gamma, d_beta
    block_o, block_i = tiles(outer, inner, _INTERPRETED_PAIRS if interpreting() else BACKWARD_PAIRS)
    with on_device(weight.device):
        modulate_backward_kernel[(-(-outer // block_o), -(-inner // block_i))](
            grad,
            weight,
            gamma,
            d_weight,
            d_gamma,
            d_beta,
            outer,
            inner,
            *gamma.stride(),
            TAPS=taps,
            UNROLL=unroll(taps),
            GRAD_LAST=is_channels_last(grad),
            WEIGHT_LAST=is_channels_last(weight),
            NEED_WEIGHT=mask[0],
            NEED_GAMMA=mask[1],
            NEED_BETA=mask[2],
            BLOCK_O=block_o,
            BLOCK_I=block_i,
            **options(weight),
        )
    return d_weight, d_gamma, d_beta


modulate = register(
    "modulate(Tensor weight, Tensor? gamma, Tensor? beta, ScalarType dtype, MemoryFormat memory_format) -> Tensor",
    _launch_modulate,
)
modulate_backward = register(
    "modulate_backward(Tensor grad, Tensor weight, Tensor? gamma, bool[3] mask, MemoryFormat memory_format) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_modulate_backward,
)
