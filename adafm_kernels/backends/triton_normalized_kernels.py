"""The Triton kernels of ``modulate_normalized`` and its backward.

A program takes BLOCK_O x BLOCK_I pairs, or with OVER_CHANNEL BLOCK_O whole output channels in steps of
BLOCK_I pairs. Mean and deviation are taken in two passes over the weight, which after the first comes from the cache;
lanes sum over the taps (and steps) in order, then those of a channel are added in the fixed tree of ``tl.sum``.
"""

import triton
import triton.language as tl

from .triton_kernels import _pair_offsets, _tap_offset


@triton.jit
def _over_group(values, OVER_CHANNEL: tl.constexpr):
    """The sums of the lanes of a group: ``[BLOCK_O, 1]`` for channels, the lanes themselves for filters."""
    if OVER_CHANNEL:
        return tl.sum(values, 1)[:, None]
    else:
        return values


@triton.jit
def _divide(x, y, ACC: tl.constexpr):
    """The exact quotient: in float32 / is approximate, tl.div_rn is exact and knows no float64."""
    if ACC == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _root(x, ACC: tl.constexpr):
    """The exact square root, as ``_divide``."""
    if ACC == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _statistics(
    weight_ptr, offs_o, outer, inner, begin, end,
    TAPS: tl.constexpr, UNROLL: tl.constexpr, LAST: tl.constexpr, OVER_CHANNEL: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Mean, reciprocal of the guarded deviation, 1 where it was not guarded else 0, and M - 1, of each group."""
    members = tl.full([1, 1], TAPS, ACC)
    if OVER_CHANNEL:
        members *= inner
    total = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    for column in range(begin, end, BLOCK_I):
        offs_i = tl.cast(column, tl.int64) + tl.arange(0, BLOCK_I)
        mask = (offs_o < outer)[:, None] & (offs_i < inner)[None, :]
        offs = _pair_offsets(offs_o, offs_i, inner, TAPS, LAST)
        for first in range(0, TAPS, UNROLL):
            for step in tl.static_range(UNROLL):
                tap = _tap_offset(first + step, inner, LAST)
                total += tl.load(weight_ptr + offs + tap, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
    mean = _divide(_over_group(total, OVER_CHANNEL), members, ACC)
    total = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    for column in range(begin, end, BLOCK_I):
        offs_i = tl.cast(column, tl.int64) + tl.arange(0, BLOCK_I)
        mask = (offs_o < outer)[:, None] & (offs_i < inner)[None, :]
        offs = _pair_offsets(offs_o, offs_i, inner, TAPS, LAST)
        for first in range(0, TAPS, UNROLL):
            for step in tl.static_range(UNROLL):
                tap = _tap_offset(first + step, inner, LAST)
                weight = tl.load(weight_ptr + offs + tap, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
                centred = tl.where(mask, weight - mean, 0.0)
                total = tl.fma(centred, centred, total)
    deviation = _root(_divide(_over_group(total, OVER_CHANNEL), members - 1, ACC), ACC)
    guarded = deviation < EPS
    ones = tl.full(deviation.shape, 1.0, ACC)
    inverse = _divide(ones, tl.where(guarded, EPS, deviation), ACC)
    return mean, inverse, tl.where(guarded, 0.0, ones), members - 1


@triton.jit
def modulate_normalized_kernel(
    weight_ptr, gamma_ptr, beta_ptr, out_ptr, outer, inner,
    gamma_stride_o, gamma_stride_i, beta_stride_o, beta_stride_i,
    TAPS: tl.constexpr, UNROLL: tl.constexpr, WEIGHT_LAST: tl.constexpr, OUT_LAST: tl.constexpr,
    OVER_CHANNEL: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out = gamma * (weight - mean) / max(deviation, EPS) + beta; UNROLL divides TAPS."""
    offs_o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    begin = tl.program_id(1) * BLOCK_I
    end = begin + 1
    if OVER_CHANNEL:
        end = inner
    mean, inverse, _, _ = _statistics(
        weight_ptr, offs_o, outer, inner, begin, end, TAPS, UNROLL, WEIGHT_LAST, OVER_CHANNEL, EPS, ACC,
        BLOCK_O, BLOCK_I,
    )  # fmt: skip
    for column in range(begin, end, BLOCK_I):
        offs_i = tl.cast(column, tl.int64) + tl.arange(0, BLOCK_I)
        mask = (offs_o < outer)[:, None] & (offs_i < inner)[None, :]
        offs_gamma = offs_o[:, None] * gamma_stride_o + offs_i[None, :] * gamma_stride_i
        offs_beta = offs_o[:, None] * beta_stride_o + offs_i[None, :] * beta_stride_i
        gamma = tl.load(gamma_ptr + offs_gamma, mask=mask, other=0.0)  # [BLOCK_O, BLOCK_I]
        beta = tl.load(beta_ptr + offs_beta, mask=mask, other=0.0)  # [BLOCK_O, BLOCK_I]
        offs_weight = _pair_offsets(offs_o, offs_i, inner, TAPS, WEIGHT_LAST)
        offs_out = _pair_offsets(offs_o, offs_i, inner, TAPS, OUT_LAST)
        for first in range(0, TAPS, UNROLL):
            for step in tl.static_range(UNROLL):
                tap = _tap_offset(first + step, inner, WEIGHT_LAST)
                weight = tl.load(weight_ptr + offs_weight + tap, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
                out = tl.fma(gamma, (weight - mean) * inverse, beta).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + offs_out + _tap_offset(first + step, inner, OUT_LAST), out, mask=mask)


@triton.jit
def modulate_normalized_backward_kernel(
    grad_ptr, weight_ptr, gamma_ptr, grad_weight_ptr, grad_gamma_ptr, grad_beta_ptr, outer, inner,
    gamma_stride_o, gamma_stride_i,
    TAPS: tl.constexpr, UNROLL: tl.constexpr, GRAD_LAST: tl.constexpr, WEIGHT_LAST: tl.constexpr,
    OVER_CHANNEL: tl.constexpr, EPS: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_GAMMA: tl.constexpr, NEED_BETA: tl.constexpr,
    ACC: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """With n the normalised weight, s the guarded deviation and dn = gamma * grad:

    grad_gamma, grad_beta ``[O, I]`` = sums over the taps of grad * n and of grad;
    grad_weight = (dn - mean(dn) - n * sum(dn * n) / (M - 1)) / s, without the last term where s was guarded.
    """
    offs_o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    begin = tl.program_id(1) * BLOCK_I
    end = begin + 1
    if OVER_CHANNEL:
        end = inner
    mean, inverse, varies, degrees = _statistics(
        weight_ptr, offs_o, outer, inner, begin, end, TAPS, UNROLL, WEIGHT_LAST, OVER_CHANNEL, EPS, ACC,
        BLOCK_O, BLOCK_I,
    )  # fmt: skip
    total = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    product = tl.zeros([BLOCK_O, BLOCK_I], ACC)
    for column in range(begin, end, BLOCK_I):
        offs_i = tl.cast(column, tl.int64) + tl.arange(0, BLOCK_I)
        mask = (offs_o < outer)[:, None] & (offs_i < inner)[None, :]
        offs_grad = _pair_offsets(offs_o, offs_i, inner, TAPS, GRAD_LAST)
        offs_weight = _pair_offsets(offs_o, offs_i, inner, TAPS, WEIGHT_LAST)
        sum_gamma = tl.zeros([BLOCK_O, BLOCK_I], ACC)
        sum_beta = tl.zeros([BLOCK_O, BLOCK_I], ACC)
        for first in range(0, TAPS, UNROLL):
            for step in tl.static_range(UNROLL):
                tap = _tap_offset(first + step, inner, GRAD_LAST)
                grad = tl.load(grad_ptr + offs_grad + tap, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
                tap = _tap_offset(first + step, inner, WEIGHT_LAST)
                weight = tl.load(weight_ptr + offs_weight + tap, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
                sum_gamma = tl.fma(grad, (weight - mean) * inverse, sum_gamma)
                sum_beta += grad
        offs_pair = offs_o[:, None] * inner + offs_i[None, :]
        if NEED_GAMMA:
            tl.store(grad_gamma_ptr + offs_pair, sum_gamma, mask=mask)
        if NEED_BETA:
            tl.store(grad_beta_ptr + offs_pair, sum_beta, mask=mask)
        if NEED_WEIGHT:
            offs_gamma = offs_o[:, None] * gamma_stride_o + offs_i[None, :] * gamma_stride_i
            gamma = tl.load(gamma_ptr + offs_gamma, mask=mask, other=0.0)  # [BLOCK_O, BLOCK_I]
            total = tl.fma(gamma, sum_beta, total)
            product = tl.fma(gamma, sum_gamma, product)
    if NEED_WEIGHT:
        shift = _divide(_over_group(total, OVER_CHANNEL), degrees + 1, ACC)
        slope = varies * _divide(_over_group(product, OVER_CHANNEL), degrees, ACC)
        for column in range(begin, end, BLOCK_I):
            offs_i = tl.cast(column, tl.int64) + tl.arange(0, BLOCK_I)
            mask = (offs_o < outer)[:, None] & (offs_i < inner)[None, :]
            offs_gamma = offs_o[:, None] * gamma_stride_o + offs_i[None, :] * gamma_stride_i
            gamma = tl.load(gamma_ptr + offs_gamma, mask=mask, other=0.0)  # [BLOCK_O, BLOCK_I]
            offs_grad = _pair_offsets(offs_o, offs_i, inner, TAPS, GRAD_LAST)
            offs_weight = _pair_offsets(offs_o, offs_i, inner, TAPS, WEIGHT_LAST)
            for first in range(0, TAPS, UNROLL):
                for step in tl.static_range(UNROLL):
                    tap = _tap_offset(first + step, inner, GRAD_LAST)
                    grad = tl.load(grad_ptr + offs_grad + tap, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
                    offs = offs_weight + _tap_offset(first + step, inner, WEIGHT_LAST)
                    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
                    normal = (weight - mean) * inverse
                    d_weight = (tl.fma(gamma, grad, -shift) - normal * slope) * inverse
                    tl.store(grad_weight_ptr + offs, d_weight.to(grad_weight_ptr.dtype.element_ty), mask=mask)
