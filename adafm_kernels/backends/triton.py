"""Triton launchers, registered as ``adafm_triton::modulate`` and ``adafm_triton::modulate_backward``.

They run on CUDA tensors, and on CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1`` before Python starts).
The interpreter truncates float32 to bfloat16 where a GPU rounds to nearest even: results there differ by one bfloat16
step. Imported on first use, since importing Triton takes time. Arguments are checked by the caller.
"""

import contextlib

import torch
import triton.language as tl
from torch import Tensor

from .._arguments import accumulation_type, dense, is_channels_last
from . import interpreting
from .triton_kernels import modulate_backward_kernel, modulate_flat_kernel, modulate_kernel

# Pairs held by one program (in registers: the backward holds two sums for each), elements of one flat program. The
# interpreter pays 0.7 ms for each program.
PAIRS = 1024
BACKWARD_PAIRS = 512
FLAT = 2048
_INTERPRETED_PAIRS = 1 << 14
_INTERPRETED_FLAT = 1 << 16
_MAX_UNROLL = 16

_library = torch.library.Library("adafm_triton", "DEF")
_library.define(
    "modulate(Tensor weight, Tensor? gamma, Tensor? beta, ScalarType dtype, MemoryFormat memory_format) -> Tensor"
)
_library.define(
    "modulate_backward(Tensor grad, Tensor weight, Tensor? gamma, bool[3] mask, MemoryFormat memory_format) "
    "-> (Tensor, Tensor, Tensor)"
)


def tiles(outer: int, inner: int, pairs: int) -> tuple[int, int]:
    """BLOCK_O and BLOCK_I, powers of two: whole rows where they fit into ``pairs``, and about that many pairs."""
    block_i = min(_next_power(inner), pairs)
    return min(_next_power(outer), pairs // block_i), block_i


def unroll(taps: int) -> int:
    """The largest divisor of ``taps`` that is not above 16."""
    return max(divisor for divisor in range(1, min(taps, _MAX_UNROLL) + 1) if taps % divisor == 0)


def _next_power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _taps(weight: Tensor) -> int:
    taps = 1
    for side in weight.shape[2:]:
        taps *= side
    return taps


def _constant(value: float, weight: Tensor) -> Tensor:
    return torch.full((), value, dtype=accumulation_type(weight), device=weight.device).expand(weight.shape[:2])


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _options(weight: Tensor) -> dict:
    """What every kernel takes: the type of the computation, and no contraction beside the written one."""
    wide = tl.float64 if weight.dtype == torch.float64 else tl.float32
    return {"ACC": wide, "num_warps": 4, "enable_fp_fusion": False}


def _launch_modulate(
    weight: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    weight = dense(weight)
    gamma = _constant(1.0, weight) if gamma is None else gamma
    beta = _constant(0.0, weight) if beta is None else beta
    taps, (outer, inner) = _taps(weight), weight.shape[:2]
    weight_last, out_last = is_channels_last(weight), is_channels_last(out)
    with _on(weight.device):
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
                **_options(weight),
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
            **_options(weight),
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
        gamma = _constant(1.0, weight)
    taps, (outer, inner) = _taps(weight), pairs
    block_o, block_i = tiles(outer, inner, _INTERPRETED_PAIRS if interpreting() else BACKWARD_PAIRS)
    with _on(weight.device):
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
            **_options(weight),
        )
    return d_weight, d_gamma, d_beta


_library.impl("modulate", _launch_modulate, "CompositeExplicitAutograd")
_library.impl("modulate_backward", _launch_modulate_backward, "CompositeExplicitAutograd")

modulate = torch.ops.adafm_triton.modulate.default
modulate_backward = torch.ops.adafm_triton.modulate_backward.default
