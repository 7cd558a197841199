"""The Triton kernels of ``modulate_per_sample`` and its backward: N sets of gamma and beta over one weight.

The weight is read once: a program keeps UNROLL taps of its pairs in registers while it walks over its samples; for the
next taps it reads gamma and beta again, from the cache. gamma and beta are ``[N, O, I]`` of any strides. Sums run over
the taps, and dW over the samples, in order.
"""

import triton
import triton.language as tl

from .triton_kernels import _pair_offsets, _tap_offset


@triton.jit
def modulate_per_sample_kernel(
    weight_ptr, gamma_ptr, beta_ptr, out_ptr, samples, outer, inner,
    gamma_stride_n, gamma_stride_o, gamma_stride_i, beta_stride_n, beta_stride_o, beta_stride_i,
    TAPS: tl.constexpr, UNROLL: tl.constexpr, WEIGHT_LAST: tl.constexpr, OUT_LAST: tl.constexpr,
    SAMPLES: tl.constexpr, ACC: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out[n] = gamma[n] * weight + beta[n] for BLOCK_O x BLOCK_I pairs and SAMPLES samples; UNROLL divides TAPS."""
    offs_o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (offs_o < outer)[:, None] & (offs_i < inner)[None, :]
    offs_weight = _pair_offsets(offs_o, offs_i, inner, TAPS, WEIGHT_LAST)
    offs_out = _pair_offsets(offs_o, offs_i, inner, TAPS, OUT_LAST)
    offs_gamma = offs_o[:, None] * gamma_stride_o + offs_i[None, :] * gamma_stride_i
    offs_beta = offs_o[:, None] * beta_stride_o + offs_i[None, :] * beta_stride_i
    begin = tl.program_id(2) * SAMPLES
    for first in range(0, TAPS, UNROLL):
        weights = ()
        for step in tl.static_range(UNROLL):
            offs = offs_weight + _tap_offset(first + step, inner, WEIGHT_LAST)
            weights = weights + (tl.load(weight_ptr + offs, mask=mask, other=0.0),)  # noqa: RUF005 (no * in a kernel)
        for sample in range(begin, tl.minimum(begin + SAMPLES, samples)):
            n = tl.cast(sample, tl.int64)
            gamma = tl.load(gamma_ptr + n * gamma_stride_n + offs_gamma, mask=mask, other=0.0)  # [BLOCK_O, BLOCK_I]
            beta = tl.load(beta_ptr + n * beta_stride_n + offs_beta, mask=mask, other=0.0)  # [BLOCK_O, BLOCK_I]
            base_ptr = out_ptr + n * outer * inner * TAPS
            for step in tl.static_range(UNROLL):
                out = tl.fma(gamma, weights[step].to(ACC), beta).to(out_ptr.dtype.element_ty)
                tl.store(base_ptr + offs_out + _tap_offset(first + step, inner, OUT_LAST), out, mask=mask)


@triton.jit
def modulate_per_sample_flat_kernel(
    weight_ptr, gamma_ptr, beta_ptr, out_ptr, samples, count, inner,
    gamma_stride_n, gamma_stride_o, gamma_stride_i, beta_stride_n, beta_stride_o, beta_stride_i,
    TAPS: tl.constexpr, SAMPLES: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same with weight and results contiguous, ``count`` elements each: element by element, at full width."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    pair = offs // TAPS
    offs_o = pair // inner
    offs_i = pair - offs_o * inner
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK]
    begin = tl.program_id(1) * SAMPLES
    for sample in range(begin, tl.minimum(begin + SAMPLES, samples)):
        n = tl.cast(sample, tl.int64)
        offs_gamma = n * gamma_stride_n + offs_o * gamma_stride_o + offs_i * gamma_stride_i
        offs_beta = n * beta_stride_n + offs_o * beta_stride_o + offs_i * beta_stride_i
        gamma = tl.load(gamma_ptr + offs_gamma, mask=mask, other=0.0)  # [BLOCK]
        beta = tl.load(beta_ptr + offs_beta, mask=mask, other=0.0)  # [BLOCK]
        tl.store(out_ptr + n * count + offs, tl.fma(gamma, weight, beta).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def modulate_per_sample_sums_kernel(
    grad_ptr, weight_ptr, grad_gamma_ptr, grad_beta_ptr, samples, outer, inner, grad_stride_n,
    TAPS: tl.constexpr, UNROLL: tl.constexpr, GRAD_LAST: tl.constexpr, WEIGHT_LAST: tl.constexpr,
    NEED_GAMMA: tl.constexpr, NEED_BETA: tl.constexpr,
    SAMPLES: tl.constexpr, ACC: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """grad_gamma[n], grad_beta[n] ``[O, I]`` = sums over the taps of grad[n] * weight and of grad[n].

    Read again for every sample, the weight of a program comes from the cache.
    """
    offs_o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (offs_o < outer)[:, None] & (offs_i < inner)[None, :]
    offs_grad = _pair_offsets(offs_o, offs_i, inner, TAPS, GRAD_LAST)
    offs_weight = _pair_offsets(offs_o, offs_i, inner, TAPS, WEIGHT_LAST)
    offs_pair = offs_o[:, None] * inner + offs_i[None, :]
    begin = tl.program_id(2) * SAMPLES
    for sample in range(begin, tl.minimum(begin + SAMPLES, samples)):
        n = tl.cast(sample, tl.int64)
        sum_gamma = tl.zeros([BLOCK_O, BLOCK_I], ACC)
        sum_beta = tl.zeros([BLOCK_O, BLOCK_I], ACC)
        for first in range(0, TAPS, UNROLL):
            for step in tl.static_range(UNROLL):
                offs = n * grad_stride_n + offs_grad + _tap_offset(first + step, inner, GRAD_LAST)
                grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
                if NEED_GAMMA:
                    offs = offs_weight + _tap_offset(first + step, inner, WEIGHT_LAST)
                    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_I]
                    sum_gamma = tl.fma(grad, weight, sum_gamma)
                if NEED_BETA:
                    sum_beta += grad
        if NEED_GAMMA:
            tl.store(grad_gamma_ptr + n * outer * inner + offs_pair, sum_gamma, mask=mask)
        if NEED_BETA:
            tl.store(grad_beta_ptr + n * outer * inner + offs_pair, sum_beta, mask=mask)


@triton.jit
def modulate_per_sample_weight_kernel(
    grad_ptr, gamma_ptr, grad_weight_ptr, samples, outer, inner, grad_stride_n,
    gamma_stride_n, gamma_stride_o, gamma_stride_i,
    TAPS: tl.constexpr, GRAD_LAST: tl.constexpr, WEIGHT_LAST: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_weight = sum over n of gamma[n] * grad[n], element by element in the memory order of the weight."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < outer * inner * TAPS
    row = offs // inner
    if WEIGHT_LAST:
        offs_o, offs_i, tap = row // TAPS, offs - row * inner, row % TAPS
    else:
        pair = offs // TAPS
        offs_o = pair // inner
        offs_i, tap = pair - offs_o * inner, offs % TAPS
    if GRAD_LAST == WEIGHT_LAST:
        offs_grad = offs
    elif GRAD_LAST:
        offs_grad = (offs_o * TAPS + tap) * inner + offs_i
    else:
        offs_grad = (offs_o * inner + offs_i) * TAPS + tap
    offs_gamma = offs_o * gamma_stride_o + offs_i * gamma_stride_i
    total = tl.zeros([BLOCK], ACC)
    for sample in range(0, samples):
        n = tl.cast(sample, tl.int64)
        gamma = tl.load(gamma_ptr + n * gamma_stride_n + offs_gamma, mask=mask, other=0.0)  # [BLOCK]
        grad = tl.load(grad_ptr + n * grad_stride_n + offs_grad, mask=mask, other=0.0).to(ACC)  # [BLOCK]
        total = tl.fma(gamma, grad, total)
    tl.store(grad_weight_ptr + offs, total.to(grad_weight_ptr.dtype.element_ty), mask=mask)
