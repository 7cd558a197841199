"""The Triton kernels of ``modulate_many`` and ``modulate_many_backward``: one launch for layers that lie anywhere.

A table ``[fields, layers]`` of int64 names every layer: the number of its first program, how it is worked on,
addresses, sizes and strides. A program takes PAIRS pairs of one layer. Channels-last layers with aligned addresses and
I a multiple of eight are read and written 16 bytes at a time (ROWS, ROWS_ANY), and so are contiguous ones in the
forward (FLAT) and their dW; the sums over the taps of contiguous layers are read element by element, in the order of
the taps, from lines that stay in the cache. Everything else is GENERAL.
"""

import triton
import triton.language as tl

GENERAL: tl.constexpr = tl.constexpr(0)
ROWS: tl.constexpr = tl.constexpr(1)  # gamma and beta dense along I too
ROWS_ANY: tl.constexpr = tl.constexpr(2)
FLAT: tl.constexpr = tl.constexpr(3)


@triton.jit
def _layer(table_ptr, layers, LAYERS: tl.constexpr):
    """The layer of this program, and the program's number inside it; LAYERS is a power of two, at least ``layers``."""
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, LAYERS)
    starts = tl.load(table_ptr + offs, mask=offs < layers, other=0x7FFFFFFFFFFFFFFF)  # [LAYERS]
    layer = tl.sum((starts <= pid).to(tl.int32), 0) - 1
    return layer, pid - tl.load(table_ptr + layer)


@triton.jit
def _field(table_ptr, field: tl.constexpr, layers, layer, ALIGN: tl.constexpr = 1):
    """A field of the layer, a multiple of ALIGN: said of the load itself, since a call's result keeps no such hint."""
    return tl.multiple_of(tl.load(table_ptr + field * layers + layer), ALIGN)


@triton.jit
def _small(table_ptr, field: tl.constexpr, layers, layer, ALIGN: tl.constexpr = 1):
    """A field below 2^31, in one register."""
    return tl.multiple_of(tl.load(table_ptr + field * layers + layer), ALIGN).to(tl.int32)


@triton.jit
def _address(table_ptr, field: tl.constexpr, layers, layer, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    address = tl.load(table_ptr + field * layers + layer).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address, ALIGN)


@triton.jit
def _place(first, pairs, inner, BLOCK: tl.constexpr):
    """Filters before ``first``, then o (counted from there), i and the mask of BLOCK pairs from ``first`` on."""
    outer = first // inner
    column = (first - outer * inner).to(tl.int32) + tl.arange(0, BLOCK)
    row = column // inner
    return outer, row, column - row * inner, tl.arange(0, BLOCK) < pairs - first


@triton.jit
def _modulate_block(
    weight_ptr, gamma_ptr, beta_ptr, out_ptr, first, pairs, inner, taps,
    gamma_stride_o, gamma_stride_i, beta_stride_o, beta_stride_i,
    weight_stride_i, weight_stride_t, out_stride_i, out_stride_t,
    UNROLL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = gamma * weight + beta of BLOCK pairs from ``first`` on."""
    outer, row, column, mask = _place(first, pairs, inner, BLOCK)
    filters = outer + row.to(tl.int64)
    gamma = tl.load(gamma_ptr + filters * gamma_stride_o + column * gamma_stride_i, mask=mask, other=0.0)  # [BLOCK]
    beta = tl.load(beta_ptr + filters * beta_stride_o + column * beta_stride_i, mask=mask, other=0.0)  # [BLOCK]
    weight_ptr += filters * (taps.to(tl.int64) * inner) + column * weight_stride_i
    out_ptr += filters * (taps.to(tl.int64) * inner) + column * out_stride_i
    for start in range(0, taps, UNROLL):
        for step in tl.static_range(UNROLL):
            tap = start + step
            tap_wide = tap.to(tl.int64)
            inside = tl.arange(0, BLOCK) < tl.where(tap < taps, pairs - first, 0)
            weight = tl.load(weight_ptr + tap_wide * weight_stride_t, mask=inside, other=0.0).to(ACC)  # [BLOCK]
            out = tl.fma(gamma, weight, beta).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + tap_wide * out_stride_t, out, mask=inside)


@triton.jit
def _modulate_flat(
    weight_ptr, gamma_ptr, beta_ptr, out_ptr, first, elements, inner, taps,
    gamma_stride_o, gamma_stride_i, beta_stride_o, beta_stride_i,
    ACC: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of PAIRS pairs from ``first`` on in contiguous layers, element by element; beta_ptr None: no beta.

    ``elements`` is a multiple of eight, BLOCK divides PAIRS.
    """
    outer = first // inner
    column = (first - outer * inner).to(tl.int32)
    for start in range(0, PAIRS * taps, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < elements - first * taps
        pair = column + offs // taps
        row = pair // inner
        offs_gamma = (outer + row) * gamma_stride_o + (pair - row * inner) * gamma_stride_i
        gamma = tl.load(gamma_ptr + offs_gamma, mask=mask, other=0.0)  # [BLOCK]
        weight = tl.load(weight_ptr + first * taps + offs, mask=mask, other=0.0).to(ACC)  # [BLOCK]
        if beta_ptr is not None:
            offs_beta = (outer + row) * beta_stride_o + (pair - row * inner) * beta_stride_i
            out = tl.fma(gamma, weight, tl.load(beta_ptr + offs_beta, mask=mask, other=0.0))
        else:
            out = gamma * weight
        tl.store(out_ptr + first * taps + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def modulate_many_kernel(
    table_ptr, layers,
    WEIGHT: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, LAYERS: tl.constexpr, UNROLL: tl.constexpr,
    PAIRS: tl.constexpr, SCALAR_BLOCK: tl.constexpr, FLAT_BLOCK: tl.constexpr,
):  # fmt: skip
    """out = gamma * weight + beta for every layer of the table, whose fields ``triton_many.row_of_forward`` writes."""
    layer, number = _layer(table_ptr, layers, LAYERS)
    first = number * PAIRS
    mode = _field(table_ptr, 1, layers, layer)
    pairs = _field(table_ptr, 2, layers, layer)
    inner = _small(table_ptr, 3, layers, layer)
    taps = _small(table_ptr, 4, layers, layer)
    gamma_ptr = _address(table_ptr, 5, layers, layer, ACC, 1)
    gamma_stride_o = _field(table_ptr, 6, layers, layer)
    gamma_stride_i = _field(table_ptr, 7, layers, layer)
    beta_ptr = _address(table_ptr, 8, layers, layer, ACC, 1)
    beta_stride_o = _field(table_ptr, 9, layers, layer)
    beta_stride_i = _field(table_ptr, 10, layers, layer)
    if mode == GENERAL:
        weight_ptr = _address(table_ptr, 11, layers, layer, WEIGHT, 1)
        out_ptr = _address(table_ptr, 14, layers, layer, OUT, 1)
        for block in range(first, tl.minimum(first + PAIRS, pairs), SCALAR_BLOCK):
            _modulate_block(
                weight_ptr, gamma_ptr, beta_ptr, out_ptr, block, pairs, inner, taps,
                gamma_stride_o, gamma_stride_i, beta_stride_o, beta_stride_i,
                _small(table_ptr, 12, layers, layer), _small(table_ptr, 13, layers, layer),
                _small(table_ptr, 15, layers, layer), _small(table_ptr, 16, layers, layer),
                1, ACC, SCALAR_BLOCK,
            )  # fmt: skip
    else:
        weight_ptr = _address(table_ptr, 11, layers, layer, WEIGHT, 16)
        out_ptr = _address(table_ptr, 14, layers, layer, OUT, 16)
        if mode == FLAT:
            # The elements of such a layer, not its pairs, are a multiple of eight, and so is where a program begins.
            _modulate_flat(
                weight_ptr, gamma_ptr, beta_ptr, out_ptr, first, _field(table_ptr, 17, layers, layer, 8), inner, taps,
                gamma_stride_o, gamma_stride_i, beta_stride_o, beta_stride_i, ACC, PAIRS, FLAT_BLOCK,
            )  # fmt: skip
        else:
            pairs = _field(table_ptr, 2, layers, layer, 8)
            inner = _small(table_ptr, 3, layers, layer, 8)
            if mode == ROWS:
                _modulate_block(
                    weight_ptr, _address(table_ptr, 5, layers, layer, ACC, 16),
                    _address(table_ptr, 8, layers, layer, ACC, 16), out_ptr, first, pairs, inner, taps,
                    _field(table_ptr, 6, layers, layer, 8), 1, _field(table_ptr, 9, layers, layer, 8), 1,
                    1, inner, 1, inner, UNROLL, ACC, PAIRS,
                )  # fmt: skip
            else:
                _modulate_block(
                    weight_ptr, gamma_ptr, beta_ptr, out_ptr, first, pairs, inner, taps,
                    gamma_stride_o, gamma_stride_i, beta_stride_o, beta_stride_i,
                    1, inner, 1, inner, UNROLL, ACC, PAIRS,
                )  # fmt: skip


@triton.jit
def _backward_block(
    grad_ptr, weight_ptr, gamma_ptr, grad_weight_ptr, grad_gamma_ptr, grad_beta_ptr, first, pairs, written, inner, taps,
    gamma_stride_o, gamma_stride_i, grad_stride_i, grad_stride_t, weight_stride_i, weight_stride_t,
    NEED_WEIGHT: tl.constexpr, NEED_GAMMA: tl.constexpr, NEED_BETA: tl.constexpr,
    UNROLL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the taps, in order, of BLOCK pairs from ``first`` on; grad_weight = gamma * grad below ``written``."""
    outer, row, column, mask = _place(first, pairs, inner, BLOCK)
    filters = outer + row.to(tl.int64)
    if NEED_WEIGHT:
        gamma = tl.load(gamma_ptr + filters * gamma_stride_o + column * gamma_stride_i, mask=mask, other=0.0)  # [BLOCK]
    sum_gamma = tl.zeros([BLOCK], ACC)
    sum_beta = tl.zeros([BLOCK], ACC)
    grad_ptr += filters * (taps.to(tl.int64) * inner) + column * grad_stride_i
    offs_weight = filters * (taps.to(tl.int64) * inner) + column * weight_stride_i
    for start in range(0, taps, UNROLL):
        for step in tl.static_range(UNROLL):
            tap = start + step
            tap_wide = tap.to(tl.int64)
            inside = tl.arange(0, BLOCK) < tl.where(tap < taps, pairs - first, 0)
            grad = tl.load(grad_ptr + tap_wide * grad_stride_t, mask=inside, other=0.0).to(ACC)  # [BLOCK]
            offs = offs_weight + tap_wide * weight_stride_t
            if NEED_WEIGHT:
                scaled = (gamma * grad).to(grad_weight_ptr.dtype.element_ty)
                tl.store(
                    grad_weight_ptr + offs, scaled, mask=tl.arange(0, BLOCK) < tl.where(tap < taps, written - first, 0)
                )
            if NEED_GAMMA:
                weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(ACC)  # [BLOCK]
                sum_gamma = tl.fma(grad, weight, sum_gamma)
            if NEED_BETA:
                sum_beta += grad
    if NEED_GAMMA:
        tl.store(grad_gamma_ptr + first + tl.arange(0, BLOCK), sum_gamma, mask=mask)
    if NEED_BETA:
        tl.store(grad_beta_ptr + first + tl.arange(0, BLOCK), sum_beta, mask=mask)


@triton.jit
def modulate_many_backward_kernel(
    table_ptr, layers,
    GRAD: tl.constexpr, WEIGHT: tl.constexpr, ACC: tl.constexpr, LAYERS: tl.constexpr, UNROLL: tl.constexpr,
    PAIRS: tl.constexpr, SCALAR_BLOCK: tl.constexpr, FLAT_BLOCK: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_GAMMA: tl.constexpr, NEED_BETA: tl.constexpr,
):  # fmt: skip
    """dW = gamma * G and the sums over the taps for every layer, whose fields ``triton_many.row_of_backward`` writes.

    dW lies as the weight does, the sums are dense ``[O, I]``; addresses of what is not needed may be any.
    """
    layer, number = _layer(table_ptr, layers, LAYERS)
    first = number * PAIRS
    mode = _field(table_ptr, 1, layers, layer)
    pairs = _field(table_ptr, 2, layers, layer)
    inner = _small(table_ptr, 3, layers, layer)
    taps = _small(table_ptr, 4, layers, layer)
    gamma_ptr = _address(table_ptr, 5, layers, layer, ACC, 1)
    gamma_stride_o = _field(table_ptr, 6, layers, layer)
    gamma_stride_i = _field(table_ptr, 7, layers, layer)
    if mode == ROWS:  # the launcher makes gamma dense along I
        pairs = _field(table_ptr, 2, layers, layer, 8)
        inner = _small(table_ptr, 3, layers, layer, 8)
        _backward_block(
            _address(table_ptr, 8, layers, layer, GRAD, 16), _address(table_ptr, 11, layers, layer, WEIGHT, 16),
            _address(table_ptr, 5, layers, layer, ACC, 16), _address(table_ptr, 14, layers, layer, WEIGHT, 16),
            _address(table_ptr, 15, layers, layer, ACC, 16), _address(table_ptr, 16, layers, layer, ACC, 16),
            first, pairs, pairs, inner, taps, _field(table_ptr, 6, layers, layer, 8), 1, 1, inner, 1, inner,
            NEED_WEIGHT, NEED_GAMMA, NEED_BETA, UNROLL, ACC, PAIRS,
        )  # fmt: skip
    else:
        written = pairs
        if NEED_WEIGHT:
            if mode == FLAT:
                written = pairs * 0
                _modulate_flat(
                    _address(table_ptr, 8, layers, layer, GRAD, 16), gamma_ptr, None,
                    _address(table_ptr, 14, layers, layer, WEIGHT, 16), first,
                    _field(table_ptr, 17, layers, layer, 8), inner, taps,
                    gamma_stride_o, gamma_stride_i, 0, 0, ACC, PAIRS, FLAT_BLOCK,
                )  # fmt: skip
        for block in range(first, tl.minimum(first + PAIRS, pairs), SCALAR_BLOCK):
            _backward_block(
                _address(table_ptr, 8, layers, layer, GRAD, 1), _address(table_ptr, 11, layers, layer, WEIGHT, 1),
                gamma_ptr, _address(table_ptr, 14, layers, layer, WEIGHT, 1),
                _address(table_ptr, 15, layers, layer, ACC, 1), _address(table_ptr, 16, layers, layer, ACC, 1),
                block, pairs, written, inner, taps, gamma_stride_o, gamma_stride_i,
                _small(table_ptr, 9, layers, layer), _small(table_ptr, 10, layers, layer),
                _small(table_ptr, 12, layers, layer), _small(table_ptr, 13, layers, layer),
                NEED_WEIGHT, NEED_GAMMA, NEED_BETA, 1, ACC, SCALAR_BLOCK,
            )  # fmt: skip
