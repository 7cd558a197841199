"""Triton's kernels of a whole network in arenas, against the formulas in float64: flags, padding, repeats."""

import pytest
import torch
from conftest import INTERPRETED
from modulation import normal

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or an NVIDIA GPU"
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"

# O, I, taps, flags: vector tiles of whole filters and of pieces of one filter, scalar tiles of many pairs,
# kernels of one tap, of more taps than are unrolled, fixed gamma and beta.
LAYERS = (
    (5, 16, 9, 0),
    (9, 3, 9, 0),
    (2, 1048, 4, 1),
    (7, 40, 1, 2),
    (11, 161, 1, 0),
    (1, 1, 49, 3),
    (2, 8, 25, 0),
    (130, 8, 2, 0),
)
TYPES = (
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.bfloat16),
    (torch.float64, torch.float64, torch.float64),
)


def name_types(kinds):
    return "-".join(str(kind)[6:] for kind in kinds)


def up(number):
    return -(-number // 8) * 8


def table(layers):
    """Rows of arena.h, with a gap of eight elements of padding between layers, and the two arenas' sizes."""
    rows, weight, pair = [], 8, 16
    for outer, inner, taps, flags in layers:
        rows.append((weight, pair, outer, inner, taps, flags))
        weight, pair = up(weight + outer * inner * taps) + 8, up(pair + outer * inner) + 8
    return rows, weight, pair


def plan(rows):
    """Tiles by the rules of arena.h, in plain Python."""
    tiles = []
    for weight, pair, outer, inner, taps, flags in rows:
        if inner % 8 == 0:
            row = inner // 8
            filters = max(1, 128 // row)
            for first in range(0, outer, filters):
                vectors = min(filters, outer - first) * row
                for piece in range(0, vectors, 128):
                    place = (weight + first * inner * taps) // 8 + piece, (pair + first * inner) // 8 + piece
                    tiles.append((*place, min(128, vectors - piece) | flags << 24, row | taps << 16))
        else:
            for first in range(0, outer, 128):
                pairs = min(128, outer - first) * inner
                place = (weight + first * inner * taps) // 8, (pair + first * inner) // 8
                tiles.append((*place, pairs | flags << 24 | 1 << 31, inner | taps << 16))
    signed = [[word - (1 << 32) if word >> 31 else word for word in tile] for tile in tiles]
    return torch.tensor(signed, dtype=torch.int32, device=DEVICE).view(-1, 4)


class Arena:
    """Inputs of a network, and what should come out in float64."""

    def __init__(self, types, layers=LAYERS):
        self.weight_type, self.grad_type, self.out_type = types
        self.wide = torch.float64 if self.weight_type == torch.float64 else torch.float32
        self.rows, weights, pairs = table(layers)
        self.layers = torch.tensor(self.rows, dtype=torch.int64).view(-1, 6)
        self.tiles = plan(self.rows)
        self.weight = normal((weights,), self.weight_type, DEVICE, 1)
        self.grad = normal((weights,), self.grad_type, DEVICE, 2)
        self.parameters = normal((2, pairs), self.wide, DEVICE, 3)
        self.weights, self.pairs = weights, pairs

    def each(self):
        """Slices of weights and of pairs, and the shapes of both, for every layer."""
        for weight, pair, outer, inner, taps, flags in self.rows:
            yield slice(weight, weight + outer * taps * inner), slice(pair, pair + outer * inner), outer, inner, flags

    def empty(self, shape, dtype):
        return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)

    def expected(self, gamma, beta):
        """gamma * weight + beta, and the size of its terms, NaN in the padding."""
        result = self.empty((self.weights,), torch.float64)
        terms = result.clone()
        for weights, pairs, outer, inner, _ in self.each():
            weight = self.weight[weights].double().view(outer, -1, inner)
            product = gamma[pairs].double().view(outer, 1, inner) * weight
            shift = beta[pairs].double().view(outer, 1, inner)
            result[weights], terms[weights] = (product + shift).flatten(), (product.abs() + shift.abs()).flatten()
        return result, terms

    def sums(self):
        """dgamma, dbeta, and the sums of the sizes of their terms, NaN in the padding."""
        found = self.empty((4, self.pairs), torch.float64)
        for weights, pairs, outer, inner, _ in self.each():
            grad, weight = (x[weights].double().view(outer, -1, inner) for x in (self.grad, self.weight))
            values = (grad * weight).sum(1), grad.sum(1), (grad * weight).abs().sum(1), grad.abs().sum(1)
            found[:, pairs] = torch.stack(values).flatten(1)
        return found[:2], found[2:]

    def fixed(self):
        """Which parameters the layers' flags fix, ``[2, pairs]``."""
        fixed = torch.zeros(2, self.pairs, dtype=torch.bool, device=DEVICE)
        for _, pairs, _, _, flags in self.each():
            fixed[0, pairs], fixed[1, pairs] = bool(flags & 1), bool(flags & 2)
        return fixed


def triton():
    from adafm_kernels.backends import triton

    return triton


def unit(dtype):
    return torch.finfo(dtype).eps


def store_error(dtype, wide):
    """Relative error of a rounding on store; the interpreter truncates to bfloat16."""
    if dtype == wide:
        return 0.0
    return unit(dtype) * (1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5) * 1.01


def assert_close(found, expected, allowed):
    """Equal within ``allowed``; NaN, the padding that nobody wrote, where and only where it is expected."""
    assert torch.equal(found.isnan(), expected.isnan())
    inside = ~expected.isnan()
    assert ((found.double() - expected).abs() <= allowed)[inside].all()


@pytest.mark.parametrize("kinds", TYPES, ids=name_types)
def test_modulate(kinds):
    arena = Arena(kinds)
    gamma, beta = arena.parameters
    found = [arena.empty((arena.weights,), arena.out_type) for _ in range(2)]
    for out in found:
        triton().modulate_many_out(arena.weight, gamma, beta, arena.layers, arena.tiles, out)
    expected, terms = arena.expected(gamma, beta)
    allowed = store_error(arena.out_type, arena.wide) * expected.abs() + unit(arena.wide) * terms
    assert_close(found[0], expected, allowed + torch.finfo(arena.out_type).tiny)
    assert torch.equal(found[0].nan_to_num(7.0), found[1].nan_to_num(7.0))


@pytest.mark.parametrize("kinds", TYPES, ids=name_types)
def test_backward(kinds):
    arena = Arena(kinds)
    results = []
    for _ in range(2):
        d_weight = arena.empty((arena.weights,), arena.weight_type)
        sums = arena.empty((2, arena.pairs), arena.wide)
        triton().modulate_many_backward_out(
            arena.grad, arena.weight, arena.parameters[0], arena.layers, arena.tiles, d_weight, *sums
        )
        results.append((d_weight, sums))
    d_weight, sums = results[0]
    expected, sizes = arena.sums()
    assert_close(sums, expected, 49 * unit(arena.wide) * sizes)
    scaled = arena.empty((arena.weights,), torch.float64)
    for weights, pairs, outer, inner, _ in arena.each():
        gamma = arena.parameters[0, pairs].double().view(outer, 1, inner)
        scaled[weights] = (gamma * arena.grad[weights].double().view(outer, -1, inner)).flatten()
    error = store_error(arena.weight_type, arena.wide) + unit(arena.wide)
    assert_close(d_weight, scaled, error * scaled.abs())
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True)])
def test_backward_computes_what_is_asked(mask):
    arena = Arena(TYPES[0], LAYERS[:2])
    whole, parts = (
        [arena.empty((arena.weights,), torch.float32), *arena.empty((2, arena.pairs), torch.float32)] for _ in range(2)
    )
    fixed = arena.grad, arena.weight, None, arena.layers, arena.tiles
    triton().modulate_many_backward_out(*fixed, *whole)
    triton().modulate_many_backward_out(
        *fixed, *(part if asked else None for part, asked in zip(parts, mask, strict=True))
    )
    for asked, part, one in zip(mask, parts, whole, strict=True):
        assert torch.equal(part.nan_to_num(7.0), one.nan_to_num(7.0)) if asked else part.isnan().all()
    inside = ~whole[0].isnan()
    assert torch.equal(whole[0][inside], arena.grad[inside])


@pytest.mark.parametrize(
    "kinds, with_out, with_average, layers",
    [
        (TYPES[1], True, True, LAYERS),
        (TYPES[2], True, True, LAYERS[:4]),
        (TYPES[3], True, True, LAYERS[:4]),
        (TYPES[0], False, True, LAYERS[:4]),
        (TYPES[0], True, False, LAYERS[:4]),
        (TYPES[0], False, False, LAYERS[:4]),
    ],
)
def test_step(kinds, with_out, with_average, layers):
    arena = Arena(kinds, layers)
    rate, beta1, beta2, eps, decay, count = 1e-2, 0.9, 0.99, 1e-8, 0.98, 3
    hyper = torch.tensor(
        [rate, beta1, beta2, eps, 1 / (1 - beta1**count), 1 / (1 - beta2**count), decay, 0.0], dtype=arena.wide
    ).to(DEVICE)
    lr, b1, b2, e, c1, c2, keep, _ = hyper.double()
    start = [
        arena.parameters,
        normal((2, arena.pairs), arena.wide, DEVICE, 4) * 0.1,
        normal((2, arena.pairs), arena.wide, DEVICE, 5).square() * 0.1,
        normal((2, arena.pairs), arena.wide, DEVICE, 6),
    ]
    results = []
    for _ in range(2):
        state = [tensor.clone() for tensor in start]
        out = arena.empty((arena.weights,), arena.out_type) if with_out else None
        average = state[3] if with_average else None
        triton().step_many(arena.grad, arena.weight, arena.layers, arena.tiles, hyper, *state[:3], average, out)
        results.append((state, out))
    for first, second in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(first, second)

    sums, sizes = arena.sums()
    padding, fixed = sums.isnan(), arena.fixed()
    kept = padding | fixed
    before = [tensor.double() for tensor in start]
    exp_avg = torch.where(kept, before[1], b1 * before[1] + (1 - b1) * sums)
    exp_avg_sq = torch.where(kept, before[2], b2 * before[2] + (1 - b2) * sums * sums)
    update = lr * (exp_avg * c1) / ((exp_avg_sq * c2).sqrt() + e)
    parameters = torch.where(kept, before[0], before[0] - update)
    average = torch.where(padding, before[3], before[3] + (1 - keep) * (parameters - before[3]))
    (found, out), error = results[0], 64 * unit(arena.wide)
    size = sizes.nan_to_num(0.0)
    assert_close(found[1], exp_avg, error * (before[1].abs() + size))
    assert_close(found[2], exp_avg_sq, error * (before[2].abs() + size * size))
    # An update's error is that of its sum, at most: exp_avg / sqrt(exp_avg_sq) has slope (1 - beta1) / root.
    slope = lr * c1 * (size + before[1].abs()) / ((exp_avg_sq * c2).sqrt() + e)
    assert_close(found[0], parameters, error * (before[0].abs() + slope * 2))
    for index, tensor in enumerate(found[:3]):
        assert torch.equal(tensor[kept], start[index][kept])
    if with_average:
        assert_close(found[3], average, error * (before[3].abs() + parameters.abs() + slope))
        assert torch.equal(found[3][padding], start[3][padding])
    else:
        assert torch.equal(found[3], start[3])
    if with_out:
        # With the parameters that were stored: modulate of them, bit by bit.
        again = arena.empty((arena.weights,), arena.out_type)
        triton().modulate_many_out(arena.weight, *found[0], arena.layers, arena.tiles, again)
        assert torch.equal(out.nan_to_num(7.0), again.nan_to_num(7.0))


def test_no_layers():
    arena = Arena(TYPES[0], ())
    out = arena.empty((8,), torch.float32)
    triton().modulate_many_out(arena.weight, *arena.parameters, arena.layers, arena.tiles, out)
    assert out.isnan().all()


def test_unaligned_stride_of_the_parameters():
    """[2, pairs] with a number of pairs that is no multiple of eight."""
    arena = Arena(TYPES[0], LAYERS[:1])
    state = [
        x[:, : arena.pairs - 3].contiguous()
        for x in (arena.parameters, torch.zeros(2, arena.pairs), torch.ones(2, arena.pairs))
    ]
    even = [arena.parameters.clone(), torch.zeros(2, arena.pairs), torch.ones(2, arena.pairs)]
    hyper = torch.tensor([1e-2, 0.9, 0.99, 1e-8, 1.0, 1.0, 0.9, 0.0])
    for tensors in (state, even):
        triton().step_many(arena.grad, arena.weight, arena.layers, arena.tiles, hyper, *tensors, None, None)
    for one, other in zip(state, even, strict=True):
        assert torch.equal(one, other[:, : arena.pairs - 3])
