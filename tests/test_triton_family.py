"""Triton's kernels for lists of weights, per sample, normalised and of low rank, against the formulas in float64."""

import itertools

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
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Types of the weight, of the gradient and of the result.
KINDS = (
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.float16),
    (torch.float64, torch.float64, torch.float64),
)
SHAPES = ((5, 16, 3, 3), (7, 5, 3, 3), (3, 40, 1, 1), (6, 9), (2, 8, 5, 5), (2, 3, 2, 1, 2))


def identify(value):
    if isinstance(value, tuple):
        return "-".join(str(entry).removeprefix("torch.") for entry in value)
    return None


def triton():
    from adafm_kernels.backends import triton

    return triton


def unit(dtype):
    return torch.finfo(dtype).eps


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def store_error(dtype, wide):
    """Relative error of a rounding on store; the interpreter truncates to bfloat16."""
    if dtype == wide:
        return 0.0
    return unit(dtype) * (1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5) * 1.01


def lay(tensor, last):
    return tensor.contiguous(memory_format=FORMATS[tensor.dim()]) if last and tensor.dim() in FORMATS else tensor


def form(weight, last):
    return FORMATS[weight.dim()] if last and weight.dim() in FORMATS else torch.contiguous_format


def spread(parameter, weight):
    """``[..., O, I]`` in float64 with one trailing 1 for each kernel dimension."""
    return parameter.double().reshape(*parameter.shape, *(1,) * (weight.dim() - 2))


def over_taps(product, rank):
    """Summed over the kernel dimensions, which follow the first ``rank`` ones."""
    taps = tuple(range(rank, product.dim()))
    return product.sum(taps) if taps else product


def assert_close(found, expected, allowed):
    assert found.shape == expected.shape
    difference = (found.double() - expected).abs()
    assert (difference <= allowed).all(), f"off by {(difference / allowed).max()} times what is allowed"


def assert_forward(found, weight, gamma, beta, dtype):
    """gamma * weight + beta within one rounding of the result's type and two of the computation."""
    wide = wide_of(weight.dtype)
    product, shift = spread(gamma, weight) * weight.double(), spread(beta, weight)
    expected = product + shift
    allowed = store_error(dtype, wide) * expected.abs() + unit(wide) * (product.abs() + shift.abs())
    assert found.dtype == dtype
    assert_close(found, expected, allowed + torch.finfo(dtype).tiny)


def network(kinds):
    """Weights, gradients, gammas, betas: every layout, an unaligned weight, a broadcast gamma, identities."""
    weights, grads, gammas, betas = [], [], [], []
    shapes = (*SHAPES, (3, 16, 3, 3), (4, 24, 3, 3), (5, 16, 3, 3))
    for seed, shape in enumerate(shapes):
        wide = wide_of(kinds[0])
        weight, grad = lay(normal(shape, kinds[0], DEVICE, seed), seed % 2 == 0), normal(shape, kinds[1], DEVICE, seed)
        weights.append(weight)
        grads.append(lay(grad, seed % 4 != 1))
        gammas.append(normal(shape[:2], wide, DEVICE, seed + 20))
        betas.append(normal((shape[0], 1), wide, DEVICE, seed + 40).expand(shape[:2]))
    flat = torch.zeros(weights[6].numel() + 1, dtype=kinds[0], device=DEVICE)
    weights[6] = flat[1:].view(3, 3, 3, 16).copy_(weights[6].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    gammas[7] = normal((4, 1), wide_of(kinds[0]), DEVICE, 60).expand(4, 24)
    # Neither contiguous nor channels-last.
    weights[8] = weights[8].transpose(0, 1).contiguous().transpose(0, 1)
    return weights, grads, gammas, betas


@pytest.mark.parametrize("kinds", KINDS, ids=identify)
def test_many(kinds):
    weights, _, gammas, betas = network(kinds)
    given = [None if index == 3 else gamma for index, gamma in enumerate(gammas)]
    gammas[3] = torch.ones_like(gammas[3])
    formats = [form(weight, index % 3 != 1) for index, weight in enumerate(weights)]
    found = triton().modulate_many(weights, given, betas, kinds[2], formats)
    again = triton().modulate_many(weights, given, betas, kinds[2], formats)
    for out, same, weight, gamma, beta, shape in zip(found, again, weights, gammas, betas, formats, strict=True):
        assert out.is_contiguous(memory_format=shape)
        assert_forward(out, weight, gamma, beta, kinds[2])
        assert torch.equal(out, same)


@pytest.mark.parametrize("kinds", KINDS, ids=identify)
def test_many_backward(kinds):
    weights, grads, gammas, _ = network(kinds)
    grads[2] = grads[2].float()
    formats = [form(weight, not weight.is_contiguous()) for weight in weights]
    formats[8] = torch.contiguous_format
    found = triton().modulate_many_backward(grads, weights, gammas, [True, True, True], formats)
    again = triton().modulate_many_backward(grads, weights, gammas, [True, True, True], formats)
    assert all(map(torch.equal, found, again))
    wide, count = wide_of(kinds[0]), len(weights)
    for index, (grad, weight, gamma) in enumerate(zip(grads, weights, gammas, strict=True)):
        d_weight, d_gamma, d_beta = found[index::count]
        assert d_weight.dtype == kinds[0] and d_gamma.dtype == d_beta.dtype == wide
        scaled, product = spread(gamma, weight) * grad.double(), grad.double() * weight.double()
        error = store_error(kinds[0], wide) + unit(wide)
        assert_close(d_weight, scaled, error * scaled.abs() + torch.finfo(kinds[0]).tiny)
        assert_close(d_gamma, over_taps(product, 2), 49 * unit(wide) * over_taps(product.abs(), 2))
        assert_close(d_beta, over_taps(grad.double(), 2), 49 * unit(wide) * over_taps(grad.double().abs(), 2))


@pytest.mark.parametrize("mask", [mask for mask in itertools.product((False, True), repeat=3) if not all(mask)])
def test_many_backward_computes_what_is_asked(mask):
    weights, grads, gammas, _ = network(KINDS[0])
    weights, grads, gammas = weights[:3], grads[:3], gammas[:3]
    formats = [form(weight, not weight.is_contiguous()) for weight in weights]
    whole = triton().modulate_many_backward(grads, weights, gammas, [True, True, True], formats)
    found = triton().modulate_many_backward(grads, weights, gammas, list(mask), formats)
    wanted = [one for index, one in enumerate(whole) if mask[index // 3]]
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def test_many_without_layers_or_elements():
    empty = torch.empty(0, 3, 3, 3, device=DEVICE)
    no_taps = torch.empty(2, 3, 0, 3, device=DEVICE)
    last = [torch.channels_last] * 2
    assert triton().modulate_many([], [], [], torch.float32, []) == []
    found = triton().modulate_many([empty, no_taps], [None] * 2, [None] * 2, torch.float16, last)
    assert [out.shape for out in found] == [empty.shape, no_taps.shape]
    sums = triton().modulate_many_backward([no_taps], [no_taps], [None], [True, True, True], last[:1])
    assert torch.equal(sums[1], torch.zeros(2, 3, device=DEVICE)) and torch.equal(sums[2], sums[1])


@pytest.mark.parametrize("lasts", [(False, False), (False, True), (True, True)], ids=identify)
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_per_sample(shape, lasts):
    kinds = KINDS[SHAPES.index(shape) % len(KINDS)]
    wide, samples = wide_of(kinds[0]), 3
    weight = lay(normal(shape, kinds[0], DEVICE), lasts[0])
    gamma = normal((samples, *shape[:2]), wide, DEVICE, 1)
    beta = normal((samples, 1, shape[1]), wide, DEVICE, 2).expand(samples, *shape[:2])
    last = lasts[1] and weight.dim() in FORMATS
    out = triton().modulate_per_sample(weight, gamma, beta, samples, kinds[2], last)
    assert out.stride(0) == weight.numel()
    assert all(sample.is_contiguous(memory_format=form(weight, last)) for sample in out)
    assert_forward(out, weight, gamma, beta, kinds[2])
    identity = triton().modulate_per_sample(weight, None, beta, samples, kinds[2], last)
    assert_forward(identity, weight, torch.ones_like(gamma), beta, kinds[2])

    grad = normal(out.shape, kinds[1], DEVICE, 3)
    # Samples in the result's layout, the other way round, and expanded.
    for given in (torch.empty_like(out, dtype=kinds[1]).copy_(grad), grad, grad[:1].expand(out.shape)):
        mask, layout = [True, True, True], form(weight, lasts[0])
        found = triton().modulate_per_sample_backward(given, weight, gamma, mask, layout)
        scaled = spread(gamma, weight) * given.double()
        product = given.double() * weight.double()
        error = store_error(kinds[0], wide) * scaled.sum(0).abs() + 4 * unit(wide) * scaled.abs().sum(0)
        assert found[0].dtype == kinds[0] and found[0].is_contiguous(memory_format=layout)
        assert_close(found[0], scaled.sum(0), error + torch.finfo(kinds[0]).tiny)
        assert_close(found[1], over_taps(product, 3), 49 * unit(wide) * over_taps(product.abs(), 3))
        assert_close(found[2], over_taps(given.double(), 3), 49 * unit(wide) * over_taps(given.double().abs(), 3))
    again = triton().modulate_per_sample_backward(given, weight, gamma, mask, layout)
    assert all(map(torch.equal, found, again))
    for index in range(3):
        mask = [entry == index for entry in range(3)]
        alone = triton().modulate_per_sample_backward(given, weight, gamma, mask, layout)
        assert torch.equal(alone[index], found[index])
        assert [part.shape == (0,) for part in alone] == [not asked for asked in mask]


def test_no_samples():
    weight = normal((2, 3, 3, 3), torch.float32, DEVICE)
    gamma = torch.empty(0, 2, 3, device=DEVICE)
    assert triton().modulate_per_sample(weight, gamma, None, 0, torch.float32, False).shape == (0, 2, 3, 3, 3)
    grad = torch.empty(0, 2, 3, 3, 3, device=DEVICE)
    found = triton().modulate_per_sample_backward(grad, weight, gamma, [True] * 3, torch.contiguous_format)
    assert torch.equal(found[0], torch.zeros_like(weight)) and found[1].shape == found[2].shape == (0, 2, 3)


def normalized(weight, gamma, beta, over, eps):
    """The formula in float64."""
    taps = tuple(range(2 if over == "filter" else 1, weight.dim()))
    deviation = weight.std(taps, keepdim=True)
    guarded = torch.where(deviation < eps, torch.full_like(deviation, eps), deviation)
    return spread(gamma, weight) * (weight - weight.mean(taps, keepdim=True)) / guarded + spread(beta, weight)


# The last eps guards every deviation.
@pytest.mark.parametrize("eps", [1e-5, 10.0])
@pytest.mark.parametrize(
    "shape, kinds, lasts, over",
    [
        ((5, 16, 3, 3), KINDS[0], (True, True), "filter"),
        ((5, 16, 3, 3), KINDS[0], (True, True), "channel"),
        ((5, 16, 3, 3), KINDS[1], (True, False), "filter"),
        ((5, 16, 3, 3), KINDS[1], (True, False), "channel"),
        ((7, 5, 3, 3), KINDS[3], (False, False), "filter"),
        ((7, 5, 3, 3), KINDS[3], (False, False), "channel"),
        ((7, 5, 4, 4), KINDS[2], (False, True), "filter"),
        ((7, 5, 4, 4), KINDS[2], (False, True), "channel"),
        ((6, 9), KINDS[0], (False, False), "channel"),
        ((2, 3, 2, 1, 2), KINDS[3], (True, True), "filter"),
    ],
    ids=identify,
)
def test_normalized(shape, kinds, lasts, over, eps):
    wide = wide_of(kinds[0])
    weight, gamma, beta = (
        lay(normal(shape, kinds[0], DEVICE), lasts[0]),
        normal(shape[:2], wide, DEVICE, 1),
        normal((1, shape[1]), wide, DEVICE, 2).expand(shape[:2]),
    )
    exact = [tensor.double().clone().requires_grad_() for tensor in (weight, gamma, beta)]
    expected = normalized(*exact, over, eps)
    form_out = form(weight, lasts[1])
    out = triton().modulate_normalized(weight, gamma, beta, over, eps, kinds[2], form_out)
    assert out.dtype == kinds[2] and out.is_contiguous(memory_format=form_out)
    # Mean and deviation lose a few units of the largest weight, which a small deviation magnifies.
    taps = tuple(range(2 if over == "filter" else 1, weight.dim()))
    deviation = exact[0].detach().std(taps, keepdim=True).clamp_min(eps)
    largest = exact[0].detach().abs().amax(taps, keepdim=True) / deviation
    error = 8 * unit(wide) * (spread(gamma, weight).abs() * (1 + largest) ** 2 + spread(beta, weight).abs())
    tiny = torch.finfo(kinds[2]).tiny
    assert_close(out, expected.detach(), store_error(kinds[2], wide) * expected.detach().abs() + error + tiny)

    grad = lay(normal(shape, kinds[1], DEVICE, 3), lasts[1])
    wanted = torch.autograd.grad(expected, exact, grad.double())
    mask, form_in = [True, True, True], form(weight, lasts[0])
    found = triton().modulate_normalized_backward(grad, weight, gamma, over, eps, mask, form_in)
    size = (spread(gamma, weight) * grad.double()).abs()
    group = size.sum(taps, keepdim=True) * (1 + largest) ** 3 / deviation
    store = store_error(kinds[0], wide) * wanted[0].abs() + torch.finfo(kinds[0]).tiny
    assert found[0].dtype == kinds[0] and found[0].is_contiguous(memory_format=form_in)
    assert_close(found[0], wanted[0], store + 8 * unit(wide) * group)
    normal_size = over_taps(grad.double().abs() * (1 + largest) ** 2, 2)
    assert_close(found[1], wanted[1], 8 * unit(wide) * normal_size)
    assert_close(found[2], wanted[2], 16 * unit(wide) * over_taps(grad.double().abs(), 2))
    again = triton().modulate_normalized_backward(grad, weight, gamma, over, eps, mask, form_in)
    assert all(map(torch.equal, found, again))
    for index in range(3):
        mask = [entry == index for entry in range(3)]
        alone = triton().modulate_normalized_backward(grad, weight, gamma, over, eps, mask, form_in)
        assert torch.equal(alone[index], found[index])


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("lasts", [(False, False), (False, True), (True, True)], ids=identify)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=identify)
def test_lowrank(shape, lasts, rank):
    kinds = KINDS[SHAPES.index(shape)]
    wide = wide_of(kinds[0])
    weight = lay(normal(shape, kinds[0], DEVICE), lasts[0])
    gamma = normal((shape[0], 1), wide, DEVICE, 1).expand(shape[:2])
    beta = normal(shape[:2], wide, DEVICE, 2)
    left, right = normal((shape[0], rank), wide, DEVICE, 3), normal((rank, shape[1]), wide, DEVICE, 4)
    form_out = form(weight, lasts[1])
    out = triton().modulate_lowrank(weight, gamma, left, right, beta, kinds[2], form_out)
    assert out.dtype == kinds[2] and out.is_contiguous(memory_format=form_out)
    total = gamma.double() + left.double() @ right.double()
    expected = spread(total, weight) * weight.double() + spread(beta, weight)
    size = gamma.double().abs() + left.double().abs() @ right.double().abs()
    error = (rank + 2) * unit(wide) * (spread(size, weight) * weight.double().abs() + spread(beta, weight).abs())
    assert_close(out, expected, store_error(kinds[2], wide) * expected.abs() + error + torch.finfo(kinds[2]).tiny)
    assert torch.equal(out, triton().modulate_lowrank(weight, gamma, left, right, beta, kinds[2], form_out))
    one = triton().modulate_lowrank(weight, None, left, right, None, kinds[2], form_out)
    ones, zeros = torch.ones_like(beta), torch.zeros_like(beta)
    assert torch.equal(one, triton().modulate_lowrank(weight, ones, left, right, zeros, kinds[2], form_out))


@pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET 1")
@pytest.mark.parametrize("lasts", [(False, False), (True, True)], ids=identify)
def test_many_small_blocks(monkeypatch, lasts):
    """Several programs along every axis, none of them full, and the samples divided among programs."""
    from adafm_kernels.backends import triton_many, triton_variants

    shape, samples = (5, 24, 1, 3), 5
    weight, grads = lay(normal(shape, torch.float32), lasts[0]), normal((samples, *shape), torch.float32, seed=1)
    gammas, betas = (normal((samples, *shape[:2]), torch.float32, seed=seed) for seed in (2, 3))
    grad, gamma, beta, layout, mask = lay(grads[0], lasts[1]), gammas[0], betas[0], form(weight, lasts[0]), [True] * 3
    left, right = normal((5, 2), torch.float32, seed=4), normal((2, 24), torch.float32, seed=5)

    def everything():
        dtype = torch.float32
        found = triton().modulate_many([weight] * 2, [gamma] * 2, [beta] * 2, dtype, [layout] * 2)
        found += triton().modulate_many_backward([grad] * 2, [weight] * 2, [gamma] * 2, mask, [layout] * 2)
        found += [triton().modulate_per_sample(weight, gammas, betas, samples, dtype, lasts[1])]
        found += triton().modulate_per_sample_backward(grads, weight, gammas, mask, layout)
        found += [triton().modulate_normalized(weight, gamma, beta, "filter", 1e-5, dtype, layout)]
        found += triton().modulate_normalized_backward(grad, weight, gamma, "filter", 1e-5, mask, layout)
        found += [triton().modulate_lowrank(weight, gamma, left, right, beta, dtype, layout)]
        channel = [triton().modulate_normalized(weight, gamma, beta, "channel", 1e-5, dtype, layout)]
        channel += triton().modulate_normalized_backward(grad, weight, gamma, "channel", 1e-5, mask, layout)
        return found, channel

    found, channel = everything()
    monkeypatch.setattr(triton_many, "_INTERPRETED_PAIRS", 16)
    monkeypatch.setattr(triton_variants, "_INTERPRETED", 16)
    monkeypatch.setattr(triton_variants, "_INTERPRETED_PROGRAMS", 24)
    again, channel_again = everything()
    # No sum depends on the blocks, but those over a whole channel, which are added in the tree of a block.
    assert all(map(torch.equal, again, found))
    for one, other in zip(channel_again, channel, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
