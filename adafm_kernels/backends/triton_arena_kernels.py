"""The Triton kernels of a whole network in arenas: one program for each tile of csrc/include/adafm/arena.h.

Weights lie as ``[O, taps, I]`` and pairs as ``[O, I]``, both from a multiple of eight elements on, so that a vector
tile (I a multiple of eight) is read and written 16 bytes at a time. O, I and the taps are data in the tile: a program
walks over the taps UNROLL at a time, taps beyond the last are masked by a bound of zero (``mask & scalar`` fails in the
interpreter, and the bound must stay a known multiple of eight for full-width accesses). Sums run over the taps in
order. A buffer that a kernel writes is never read through another argument.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(tiles_ptr):
    """This program's tile: first weight, first pair, the word of count and flags, row, taps."""
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * 4
    weight = (tl.load(tile_ptr).to(tl.int64) & 0xFFFFFFFF) * 8
    pair = (tl.load(tile_ptr + 1).to(tl.int64) & 0xFFFFFFFF) * 8
    count = tl.load(tile_ptr + 2)
    shape = tl.load(tile_ptr + 3)
    return weight, pair, count, shape & 0xFFFF, (shape >> 16) & 0xFFFF


@triton.jit
def _offsets(first, row, taps, BLOCK: tl.constexpr):
    """Numbers of BLOCK pairs inside the tile, and the offsets of their first weights."""
    pair = first + tl.arange(0, BLOCK)
    outer = pair // row
    return pair, outer.to(tl.int64) * (taps.to(tl.int64) * row) + (pair - outer * row)


@triton.jit
def _bound(tap, taps, count):
    return tl.where(tap < taps, count, 0)


@triton.jit
def _modulate_pairs(
    weight_ptr, out_ptr, gamma, beta, offs_pair, offs_weight, count, row, taps, UNROLL: tl.constexpr, ACC: tl.constexpr
):
    """out = gamma * weight + beta of the pairs below ``count``."""
    for first in range(0, taps, UNROLL):
        for step in tl.static_range(UNROLL):
            tap = first + step
            mask = offs_pair < _bound(tap, taps, count)
            offs = offs_weight + tap.to(tl.int64) * row
            weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK]
            tl.store(out_ptr + offs, tl.fma(gamma, weight, beta).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _modulate_tile(
    weight_ptr, gamma_ptr, beta_ptr, out_ptr, count, row, taps,
    UNROLL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for first in range(0, count, BLOCK):
        offs_pair, offs_weight = _offsets(first, row, taps, BLOCK)
        gamma = tl.load(gamma_ptr + offs_pair, mask=offs_pair < count, other=0.0)  # [BLOCK]
        beta = tl.load(beta_ptr + offs_pair, mask=offs_pair < count, other=0.0)  # [BLOCK]
        _modulate_pairs(weight_ptr, out_ptr, gamma, beta, offs_pair, offs_weight, count, row, taps, UNROLL, ACC)


@triton.jit
def modulate_arena_kernel(
    tiles_ptr, weight_ptr, gamma_ptr, beta_ptr, out_ptr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, SCALAR_BLOCK: tl.constexpr,
):  # fmt: skip
    """out = gamma * weight + beta; BLOCK is at least the 1024 pairs of a vector tile."""
    weight, pair, count, row, taps = _tile(tiles_ptr)
    pairs = count & 0xFFFFFF
    weight_ptr += weight
    gamma_ptr += pair
    beta_ptr += pair
    out_ptr += weight
    if count < 0:
        _modulate_tile(weight_ptr, gamma_ptr, beta_ptr, out_ptr, pairs, row, taps, 1, ACC, SCALAR_BLOCK)
    else:
        _modulate_tile(weight_ptr, gamma_ptr, beta_ptr, out_ptr, pairs * 8, row * 8, taps, UNROLL, ACC, BLOCK)


@triton.jit
def _sums(
    grad_ptr, weight_ptr, gamma, grad_weight_ptr, offs_pair, offs_weight, count, row, taps,
    NEED_GAMMA: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the taps of grad * weight and of grad; writes gamma * grad where ``grad_weight_ptr`` is given."""
    sum_gamma = tl.zeros([BLOCK], ACC)
    sum_beta = tl.zeros([BLOCK], ACC)
    for first in range(0, taps, UNROLL):
        for step in tl.static_range(UNROLL):
            tap = first + step
            mask = offs_pair < _bound(tap, taps, count)
            offs = offs_weight + tap.to(tl.int64) * row
            grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK]
            if grad_weight_ptr is not None:
                tl.store(grad_weight_ptr + offs, (gamma * grad).to(grad_weight_ptr.dtype.element_ty), mask=mask)
            if NEED_GAMMA:
                weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK]
                sum_gamma = tl.fma(grad, weight, sum_gamma)
            sum_beta += grad
    return sum_gamma, sum_beta


@triton.jit
def _backward_tile(
    grad_ptr, weight_ptr, gamma_ptr, grad_weight_ptr, grad_gamma_ptr, grad_beta_ptr, count, row, taps,
    UNROLL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for first in range(0, count, BLOCK):
        offs_pair, offs_weight = _offsets(first, row, taps, BLOCK)
        mask = offs_pair < count
        if grad_weight_ptr is not None:
            gamma = tl.load(gamma_ptr + offs_pair, mask=mask, other=0.0)  # [BLOCK]
        else:
            gamma = 0.0
        sum_gamma, sum_beta = _sums(
            grad_ptr, weight_ptr, gamma, grad_weight_ptr, offs_pair, offs_weight, count, row, taps,
            grad_gamma_ptr is not None, UNROLL, ACC, BLOCK,
        )  # fmt: skip
        if grad_gamma_ptr is not None:
            tl.store(grad_gamma_ptr + offs_pair, sum_gamma, mask=mask)
        if grad_beta_ptr is not None:
            tl.store(grad_beta_ptr + offs_pair, sum_beta, mask=mask)


@triton.jit
def modulate_backward_arena_kernel(
    tiles_ptr, grad_ptr, weight_ptr, gamma_ptr, grad_weight_ptr, grad_gamma_ptr, grad_beta_ptr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, SCALAR_BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_weight = gamma * grad, grad_gamma and grad_beta = sums over the taps of grad * weight and of grad.

    A result whose pointer is None is not computed, and neither is read what only it needs.
    """
    weight, pair, count, row, taps = _tile(tiles_ptr)
    pairs = count & 0xFFFFFF
    grad_ptr += weight
    weight_ptr += weight
    if grad_weight_ptr is not None:
        gamma_ptr += pair
        grad_weight_ptr += weight
    if grad_gamma_ptr is not None:
        grad_gamma_ptr += pair
    if grad_beta_ptr is not None:
        grad_beta_ptr += pair
    if count < 0:
        _backward_tile(
            grad_ptr, weight_ptr, gamma_ptr, grad_weight_ptr, grad_gamma_ptr, grad_beta_ptr, pairs, row, taps,
            1, ACC, SCALAR_BLOCK,
        )  # fmt: skip
    else:
        _backward_tile(
            grad_ptr, weight_ptr, gamma_ptr, grad_weight_ptr, grad_gamma_ptr, grad_beta_ptr, pairs * 8, row * 8, taps,
            UNROLL, ACC, BLOCK,
        )  # fmt: skip


@triton.jit
def _adam(
    gradient, hyper_ptr, parameter_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, offs, count, fixed, ACC: tl.constexpr
):
    """The new parameters; fixed ones and their moments are left as they are, the average follows all."""
    rate, beta1, beta2, eps = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2), tl.load(hyper_ptr + 3)
    correction1, correction2, decay = tl.load(hyper_ptr + 4), tl.load(hyper_ptr + 5), tl.load(hyper_ptr + 6)
    mask = offs < count
    old = tl.load(parameter_ptr + offs, mask=mask, other=0.0)  # [BLOCK]
    exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0)  # [BLOCK]
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0)  # [BLOCK]
    exp_avg = tl.fma(beta1 + tl.zeros_like(old), exp_avg, (1 - beta1) * gradient)
    exp_avg_sq = tl.fma(beta2 + tl.zeros_like(old), exp_avg_sq, (1 - beta2) * gradient * gradient)
    step = rate * (exp_avg * correction1)
    square = exp_avg_sq * correction2
    # tl.sqrt and / are approximate in float32; the exact ones know no float64, for which those are exact.
    if ACC == tl.float64:
        step = step / (tl.sqrt(square) + eps)
    else:
        step = tl.div_rn(step, tl.sqrt_rn(square) + eps)
    new = tl.where(fixed, old, old - step)
    mask_new = offs < tl.where(fixed, 0, count)
    tl.store(parameter_ptr + offs, new, mask=mask_new)
    tl.store(exp_avg_ptr + offs, exp_avg, mask=mask_new)
    tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=mask_new)
    if average_ptr is not None:
        average = tl.load(average_ptr + offs, mask=mask, other=0.0)  # [BLOCK]
        average = tl.fma(1 - decay + tl.zeros_like(old), new - average, average)
        tl.store(average_ptr + offs, average, mask=mask)
    return new


@triton.jit
def _step_tile(
    grad_ptr, weight_ptr, hyper_ptr, parameters_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, out_ptr,
    stride, count, row, taps, fixed_gamma, fixed_beta,
    UNROLL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for first in range(0, count, BLOCK):
        offs_pair, offs_weight = _offsets(first, row, taps, BLOCK)
        sum_gamma, sum_beta = _sums(
            grad_ptr, weight_ptr, 0.0, None, offs_pair, offs_weight, count, row, taps, True, UNROLL, ACC, BLOCK
        )
        gamma = _adam(
            sum_gamma, hyper_ptr, parameters_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr,
            offs_pair, count, fixed_gamma, ACC,
        )  # fmt: skip
        if average_ptr is not None:
            average_beta_ptr = average_ptr + stride
        else:
            average_beta_ptr = None
        beta = _adam(
            sum_beta, hyper_ptr, parameters_ptr + stride, exp_avg_ptr + stride, exp_avg_sq_ptr + stride,
            average_beta_ptr, offs_pair, count, fixed_beta, ACC,
        )  # fmt: skip
        if out_ptr is not None:
            _modulate_pairs(weight_ptr, out_ptr, gamma, beta, offs_pair, offs_weight, count, row, taps, UNROLL, ACC)


@triton.jit
def step_many_kernel(
    tiles_ptr, grad_ptr, weight_ptr, hyper_ptr, parameters_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, out_ptr,
    stride, UNIT: tl.constexpr, UNROLL: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, SCALAR_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the taps, Adam, average and the next modulate; see csrc/include/adafm/step_many.h.

    ``parameters``, the moments and ``average`` are ``[2, stride * UNIT]``; ``average_ptr`` and ``out_ptr`` may be None.
    """
    stride = tl.cast(stride, tl.int64) * UNIT
    weight, pair, count, row, taps = _tile(tiles_ptr)
    pairs = count & 0xFFFFFF
    fixed_gamma = (count & 0x1000000) != 0
    fixed_beta = (count & 0x2000000) != 0
    grad_ptr += weight
    weight_ptr += weight
    parameters_ptr += pair
    exp_avg_ptr += pair
    exp_avg_sq_ptr += pair
    if average_ptr is not None:
        average_ptr += pair
    if out_ptr is not None:
        out_ptr += weight
    if count < 0:
        _step_tile(
            grad_ptr, weight_ptr, hyper_ptr, parameters_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, out_ptr,
            stride, pairs, row, taps, fixed_gamma, fixed_beta, 1, ACC, SCALAR_BLOCK,
        )  # fmt: skip
    else:
        _step_tile(
            grad_ptr, weight_ptr, hyper_ptr, parameters_ptr, exp_avg_ptr, exp_avg_sq_ptr, average_ptr, out_ptr,
            stride, pairs * 8, row * 8, taps, fixed_gamma, fixed_beta, UNROLL, ACC, BLOCK,
        )  # fmt: skip
