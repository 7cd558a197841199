"""The Triton kernels of ``modulate`` and ``modulate_backward``. Importing this file imports Triton.

A weight ``[O, I, *K]`` with T taps lies in memory as ``o, i, t`` (contiguous) or ``o, t, i`` (channels-last). The tiled
kernels take either for every tensor: a program holds BLOCK_O x BLOCK_I pairs of gamma and beta in registers and walks
over the taps, UNROLL at a time, so that gamma and beta are read once and every sum runs in one fixed order. With both
tensors contiguous the forward is flat instead, for full-width accesses. No atomics; offsets are 64-bit; fused
multiply-adds are written out, so that results do not depend on the compiler's contraction.
"""

import triton
import triton.language as tl


@triton.jit
def modulate_flat_kernel(
    weight_ptr, gamma_ptr, beta_ptr, out_ptr, count, TAPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """out = gamma * weight + beta; weight and out ``[count / TAPS, TAPS]``, gamma and beta ``[count / TAPS]``."""
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    offs_pair = offs // TAPS
    gamma = tl.load(gamma_ptr + offs_pair, mask=mask, other=0.0).to(ACC)  # [BLOCK]
    beta = tl.load(beta_ptr + offs_pair, mask=mask, other=0.0).to(ACC)  # [BLOCK]
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK]
    tl.store(out_ptr + offs, tl.fma(gamma, weight, beta).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pair_offsets(offs_o, offs_i, inner, TAPS: tl.constexpr, LAST: tl.constexpr):
    """Offset of tap 0 of each pair; LAST: channels-last, else contiguous."""
    if LAST:
        return offs_o[:, None] * (TAPS * inner) + offs_i[None, :]
    return (offs_o[:, None] * inner + offs_i[None, :]) * TAPS


@triton.jit
def _tap_offset(tap, inner, LAST: tl.constexpr):
    if LAST:
        return tap * inner
    return tap


@triton.jit
def modulate_kernel(
    weight_ptr,
    gamma_ptr,
    beta_ptr,
    out_ptr,
    outer,
    inner,
    gamma_stride_o,
    gamma_stride_i,
    beta_stride_o,
    beta_stride_i,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    WEIGHT_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out = gamma * weight + beta; ``outer`` = O, ``inner`` = I; UNROLL divides TAPS."""
    pid_o = tl.program_id(0).to(tl.int64)
    pid_i = tl.program_id(1).to(tl.int64)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = pid_i * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (offs_o < outer)[:, None] & (offs_i < inner)[None, :]
    offs_gamma = offs_o[:, None] * gamma_stride_o + offs_i[None, :] * gamma_stride_i
    offs_beta = offs_o[:, None] * beta_stride_o + offs_i[None, :] * beta_stride_i
    gamma = tl.load(gamma_ptr + offs_gamma, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
    beta = tl.load(beta_ptr + offs_beta, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
    offs_weight = _pair_offsets(offs_o, offs_i, inner, TAPS, WEIGHT_LAST)
    offs_out = _pair_offsets(offs_o, offs_i, inner, TAPS, OUT_LAST)
    for first in range(0, TAPS, UNROLL):
        for step in tl.static_range(UNROLL):
            tap = first + step
            tap_weight = _tap_offset(tap, inner, WEIGHT_LAST)
            weight = tl.load(weight_ptr + offs_weight + tap_weight, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
            out = tl.fma(gamma, weight, beta).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + offs_out + _tap_offset(tap, inner, OUT_LAST), out, mask=mask)


@triton.jit
def modulate_backward_kernel(
    grad_ptr,
    weight_ptr,
    gamma_ptr,
    grad_weight_ptr,
    grad_gamma_ptr,
    grad_beta_ptr,
    outer,
    inner,
    gamma_stride_o,
    gamma_stride_i,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    GRAD_LAST: tl.constexpr,
    WEIGHT_LAST: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_GAMMA: tl.constexpr,
    NEED_BETA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """grad_weight = gamma * grad; grad_gamma, grad_beta ``[O, I]`` = sums over the taps of grad * weight and of grad.

    grad_weight lies as weight does. What is not needed is neither read nor written; its pointer may be any.
    """
    pid_o = tl.program_id(0).to(tl.int64)
    pid_i = tl.program_id(1).to(tl.int64)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = pid_i * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (offs_o < outer)[:, None] & (offs_i < inner)[None, :]
    offs_grad = _pair_offsets(offs_o, offs_i, inner, TAPS, GRAD_LAST)
    offs_weight = _pair_offsets(offs_o, offs_i, inner, TAPS, WEIGHT_LAST)
    if NEED_WEIGHT:
        offs_gamma = offs_o[:, None] * gamma_stride_o + offs_i[None, :] * gamma_stride_i
        gamma = tl.load(gamma_ptr + offs_gamma, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
    sum_gamma = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    sum_beta = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    for first in range(0, TAPS, UNROLL):
        for step in tl.static_range(UNROLL):
            tap = first + step
            tap_weight = _tap_offset(tap, inner, WEIGHT_LAST)
            grad = tl.load(grad_ptr + offs_grad + _tap_offset(tap, inner, GRAD_LAST), mask=mask, other=0.0).to(ACC)
            if NEED_WEIGHT:
                scaled = (gamma * grad).to(grad_weight_ptr.dtype.element_ty)
                tl.store(grad_weight_ptr + offs_weight + tap_weight, scaled, mask=mask)
            if NEED_GAMMA:
                weight = tl.load(weight_ptr + offs_weight + tap_weight, mask=mask, other=0.0).to(ACC)
                sum_gamma = tl.fma(grad, weight, sum_gamma)
            if NEED_BETA:
                sum_beta += grad
    offs_pair = offs_o[:, None] * inner + offs_i[None, :]
    if NEED_GAMMA:
        tl.store(grad_gamma_ptr + offs_pair, sum_gamma, mask=mask)
    if NEED_BETA:
        tl.store(grad_beta_ptr + offs_pair, sum_beta, mask=mask)


@triton.jit
def modulate_backward_flat_kernel(
    grad_ptr,
    weight_ptr,
    gamma_ptr,
    grad_weight_ptr,
    grad_gamma_ptr,
    grad_beta_ptr,
    pairs,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_GAMMA: tl.constexpr,
    NEED_BETA: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same with everything contiguous; BLOCK pairs for one program.

    grad_weight is written element by element, at full width. The sums read grad again, and weight, tap by tap: each
    load of a warp touches all the lines that the next taps touch, so these come from the cache. Full-width loads would
    leave the taps of a pair in several threads, and their sum to a tree across threads instead of the order of taps.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if NEED_WEIGHT:
        for start in range(0, BLOCK * TAPS, BLOCK):
            offs = first * TAPS + start + tl.arange(0, BLOCK)
            mask = offs < pairs * TAPS
            gamma = tl.load(gamma_ptr + offs // TAPS, mask=mask, other=0.0).to(ACC)  # [BLOCK]
            grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK]
            tl.store(grad_weight_ptr + offs, (gamma * grad).to(grad_weight_ptr.dtype.element_ty), mask=mask)
    if NEED_GAMMA or NEED_BETA:
        offs_pair = first + tl.arange(0, BLOCK)
        mask = offs_pair < pairs
        sum_gamma = tl.zeros([BLOCK], ACC)
        sum_beta = tl.zeros([BLOCK], ACC)
        for start in range(0, TAPS, UNROLL):
            for step in tl.static_range(UNROLL):
                offs = offs_pair * TAPS + start + step
                grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK]
                if NEED_GAMMA:
                    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK]
                    sum_gamma = tl.fma(grad, weight, sum_gamma)
                if NEED_BETA:
                    sum_beta += grad
        if NEED_GAMMA:
            tl.store(grad_gamma_ptr + offs_pair, sum_gamma, mask=mask)
        if NEED_BETA:
            tl.store(grad_beta_ptr + offs_pair, sum_beta, mask=mask)
