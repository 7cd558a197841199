"""The Triton kernels of ``modulate_lowrank``: gamma + left @ right is formed in registers, in the order of the rank.

``left`` is ``[O, rank]`` and ``right`` ``[rank, I]``, both dense in the type of the computation.
"""

import triton
import triton.language as tl

from .triton_kernels import _pair_offsets, _tap_offset


@triton.jit
def modulate_lowrank_kernel(
    weight_ptr, gamma_ptr, left_ptr, right_ptr, beta_ptr, out_ptr, outer, inner, rank,
    gamma_stride_o, gamma_stride_i, beta_stride_o, beta_stride_i,
    TAPS: tl.constexpr, UNROLL: tl.constexpr, WEIGHT_LAST: tl.constexpr, OUT_LAST: tl.constexpr,
    ACC: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out = (gamma + left @ right) * weight + beta for BLOCK_O x BLOCK_I pairs; UNROLL divides TAPS."""
    offs_o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_o, mask_i = offs_o < outer, offs_i < inner
    mask = mask_o[:, None] & mask_i[None, :]
    offs_gamma = offs_o[:, None] * gamma_stride_o + offs_i[None, :] * gamma_stride_i
    offs_beta = offs_o[:, None] * beta_stride_o + offs_i[None, :] * beta_stride_i
    gamma = tl.load(gamma_ptr + offs_gamma, mask=mask, other=0.0)  # [BLOCK_O, BLOCK_I]
    beta = tl.load(beta_ptr + offs_beta, mask=mask, other=0.0)  # [BLOCK_O, BLOCK_I]
    shape: tl.constexpr = [BLOCK_O, BLOCK_I]
    for r in range(0, rank):
        left = tl.load(left_ptr + offs_o * rank + r, mask=mask_o, other=0.0)  # [BLOCK_O]
        right = tl.load(right_ptr + tl.cast(r, tl.int64) * inner + offs_i, mask=mask_i, other=0.0)  # [BLOCK_I]
        gamma = tl.fma(tl.broadcast_to(left[:, None], shape), tl.broadcast_to(right[None, :], shape), gamma)
    offs_weight = _pair_offsets(offs_o, offs_i, inner, TAPS, WEIGHT_LAST)
    offs_out = _pair_offsets(offs_o, offs_i, inner, TAPS, OUT_LAST)
    for first in range(0, TAPS, UNROLL):
        for step in tl.static_range(UNROLL):
            tap = _tap_offset(first + step, inner, WEIGHT_LAST)
            weight = tl.load(weight_ptr + offs_weight + tap, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
            out = tl.fma(gamma, weight, beta).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + offs_out + _tap_offset(first + step, inner, OUT_LAST), out, mask=mask)


@triton.jit
def modulate_lowrank_rows_kernel(
    weight_ptr, gamma_ptr, left_ptr, right_ptr, beta_ptr, out_ptr, pairs, inner, rank,
    gamma_stride_o, gamma_stride_i, beta_stride_o, beta_stride_i,
    TAPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TAPS: tl.constexpr,
):  # fmt: skip
    """The same with weight and out contiguous: BLOCK pairs by their taps, so that lanes read side by side."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < pairs
    offs_o = pair // inner
    offs_i = pair - offs_o * inner
    gamma = tl.load(gamma_ptr + offs_o * gamma_stride_o + offs_i * gamma_stride_i, mask=mask, other=0.0)  # [BLOCK]
    beta = tl.load(beta_ptr + offs_o * beta_stride_o + offs_i * beta_stride_i, mask=mask, other=0.0)  # [BLOCK]
    for r in range(0, rank):
        left = tl.load(left_ptr + offs_o * rank + r, mask=mask, other=0.0)  # [BLOCK]
        right = tl.load(right_ptr + tl.cast(r, tl.int64) * inner + offs_i, mask=mask, other=0.0)  # [BLOCK]
        gamma = tl.fma(left, right, gamma)
    tap = tl.arange(0, BLOCK_TAPS)
    offs = pair[:, None] * TAPS + tap[None, :]
    inside = mask[:, None] & (tap < TAPS)[None, :]
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(ACC)  # [BLOCK, BLOCK_TAPS]
    shape: tl.constexpr = [BLOCK, BLOCK_TAPS]
    out = tl.fma(tl.broadcast_to(gamma[:, None], shape), weight, tl.broadcast_to(beta[:, None], shape))
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=inside)
