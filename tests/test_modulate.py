"""``modulate`` and ``modulate_backward``: values on every backend, types, layouts, masks, errors, repeatability."""

import pytest
import torch
from conftest import INTERPRETED
from modulation import assert_forward, channels_last, gradients, inputs, layouts, normal, truth, unit

from adafm_kernels import modulate

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = (
    (5, 7),
    (4, 3, 5),
    (3, 5, 1, 1),
    (8, 16, 3, 3),
    (5, 3, 3, 3),
    (2, 9, 4, 4),
    (3, 2, 1, 3),
    (2, 3, 7, 7),
    (1, 1, 3, 3),
    (2, 16, 2, 3, 2),
)
EMPTY = ((0, 3, 3, 3), (3, 0, 3, 3), (2, 3, 0, 3), (0, 0))


def identify(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_values(target, types, shape):
    weight, gamma, beta = inputs(shape, types[0], target.device)
    found = modulate(weight, gamma, beta, dtype=types[1], backend=target.backend)
    assert found.shape == weight.shape and found.is_contiguous()
    assert_forward(found, weight, gamma, beta, types[1], target.truncates)


@pytest.mark.parametrize("shape", [(6, 16, 3, 3), (5, 3, 3, 3), (4, 8, 1, 1), (2, 16, 2, 3, 2)], ids=identify)
def test_every_layout_gives_the_same_bits(target, shape):
    weight, gamma, beta = inputs(shape, device=target.device)
    expected = modulate(weight, gamma, beta, dtype=torch.bfloat16, backend=target.backend)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    for name, view in layouts(weight).items():
        for form in (None, torch.contiguous_format, last):
            found = modulate(view, gamma, beta, dtype=torch.bfloat16, memory_format=form, backend=target.backend)
            assert torch.equal(found, expected), (name, form)
            wanted = form or (last if name == "channels_last" else torch.contiguous_format)
            assert found.is_contiguous(memory_format=wanted), (name, form)


@pytest.mark.parametrize("backend", ["compiled"])
@pytest.mark.parametrize("result", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_rounds_once(backend, result):
    """The fused multiply-add in float32, then the nearest value of the result's type: exact bits."""
    weight, gamma, beta = inputs((16, 24, 3, 3))
    expected = truth(weight, gamma, beta).float().to(result)
    assert torch.equal(modulate(weight, gamma, beta, dtype=result, backend=backend), expected)


@pytest.mark.parametrize(
    ("gamma_shape", "beta_shape"),
    [((4, 6), (4, 6, 1, 1)), ((4, 1), (1, 6, 1, 1)), ((1, 6), (4, 1, 1)), ((1, 1), None), (None, (4, 6)), (None, None)],
    ids=str,
)
def test_parameter_shapes(target, gamma_shape, beta_shape):
    weight = normal((4, 6, 3, 2), device=target.device)
    gamma = None if gamma_shape is None else normal(gamma_shape, device=target.device, seed=1)
    beta = None if beta_shape is None else normal(beta_shape, device=target.device, seed=2)
    found = modulate(weight, gamma, beta, backend=target.backend)
    assert_forward(found, weight, gamma, beta, torch.float32, False)


def test_parameters_of_other_types_and_strides(target):
    weight = normal((4, 6, 3, 3), device=target.device)
    gamma = normal((6, 8), torch.float64, target.device, 1).t()[::2]
    beta = normal((1, 6), torch.bfloat16, target.device, 2).expand(4, 6)
    found = modulate(weight, gamma, beta, backend=target.backend)
    assert_forward(found, weight, gamma.float(), beta, torch.float32, False)


@pytest.mark.parametrize("shape", EMPTY, ids=identify)
def test_empty(target, shape):
    weight, gamma, beta = inputs(shape, device=target.device)
    assert modulate(weight, gamma, beta, backend=target.backend).shape == weight.shape
    found = torch.ops.adafm.modulate_backward(weight, weight, gamma, [True] * 3, target.backend)
    assert found[0].shape == weight.shape
    for sums in found[1:]:
        assert sums.shape == weight.shape[:2] and (sums == 0).all()


def test_result_is_fresh_and_inputs_stay(target):
    weight, gamma, beta = inputs((4, 5, 3, 3), device=target.device)
    before = [t.clone() for t in (weight, gamma, beta)]
    found = modulate(weight, None, None, backend=target.backend)
    assert torch.equal(found, weight)
    found.zero_()
    dW, dgamma, dbeta = torch.ops.adafm.modulate_backward(weight, weight, None, [True] * 3, target.backend)
    dW.zero_(), dgamma.zero_(), dbeta.zero_()
    modulate(weight, gamma, beta, backend=target.backend).zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, gamma, beta), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_backward_values(target, types, shape):
    """dW within one rounding; the sums within one rounding for each tap."""
    weight, gamma, _ = inputs(shape, types[0], target.device)
    grad = normal(shape, types[1], target.device, 5)
    found = torch.ops.adafm.modulate_backward(grad, weight, gamma, [True] * 3, target.backend)
    expected = gradients(grad, weight, gamma)
    wide = torch.float64 if types[0] == torch.float64 else torch.float32
    assert found[0].dtype == types[0] and found[1].dtype == found[2].dtype == wide
    step = unit(types[0]) * (1.0 if target.truncates and types[0] == torch.bfloat16 else 0.5) + unit(wide)
    tiny = torch.finfo(types[0]).tiny
    assert ((found[0].double() - expected[0]).abs() <= 1.01 * step * expected[0].abs() + tiny).all()
    absolute = gradients(grad.abs(), weight.abs(), None)
    taps = weight[0, 0].numel()
    for sums, reference, terms in zip(found[1:], expected[1:], absolute[1:], strict=True):
        assert sums.is_contiguous()
        assert ((sums.double() - reference).abs() <= taps * unit(wide) * terms).all()


@pytest.mark.parametrize("mask", range(8))
def test_backward_masks(target, mask):
    """What is not asked has shape [0]; what is asked has the bits it has when all is asked."""
    weight, gamma, _ = inputs((5, 6, 3, 3), device=target.device)
    grad = normal(weight.shape, torch.bfloat16, target.device, 5)
    asked = [bool(mask & 1), bool(mask & 2), bool(mask & 4)]
    complete = torch.ops.adafm.modulate_backward(grad, weight, gamma, [True] * 3, target.backend)
    found = torch.ops.adafm.modulate_backward(grad, weight, gamma, asked, target.backend)
    for part, whole, wanted in zip(found, complete, asked, strict=True):
        assert torch.equal(part, whole) if wanted else part.shape == (0,)


def test_backward_layouts(target):
    """Layouts of G and W mixed; dW lies as W; an expanded G."""
    weight, gamma, _ = inputs((6, 16, 3, 3), device=target.device)
    grad = normal(weight.shape, device=target.device, seed=5)
    expected = torch.ops.adafm.modulate_backward(grad, weight, gamma, [True] * 3, target.backend)
    for grad_name, grad_view in layouts(grad).items():
        for name, view in layouts(weight).items():
            found = torch.ops.adafm.modulate_backward(grad_view, view, gamma, [True] * 3, target.backend)
            # The reference's sums follow torch's own order, which depends on the layout.
            same = torch.equal if target.backend != "reference" else torch.allclose
            assert torch.equal(found[0], expected[0]), (grad_name, name)
            assert all(same(a, b) for a, b in zip(found[1:], expected[1:], strict=True)), (grad_name, name)
            form = torch.channels_last if name == "channels_last" else torch.contiguous_format
            assert found[0].is_contiguous(memory_format=form)
    one = torch.ones((), device=target.device).expand(weight.shape)
    found = torch.ops.adafm.modulate_backward(one, weight, gamma, [True] * 3, target.backend)
    assert torch.equal(found[2], torch.full((6, 16), 9.0, device=target.device))


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_no_worse_than_eager(target, low):
    """The error against float64 is at most twice that of the eager formula in the same type."""
    weight, gamma, beta = inputs((32, 16, 3, 3), low, target.device)
    grad = normal(weight.shape, low, target.device, 5)
    found = modulate(weight, gamma, beta, backend=target.backend)
    eager = gamma.to(low) * weight + beta.to(low)
    expected = truth(weight, gamma, beta)
    assert (found.double() - expected).abs().max() <= 2 * (eager.double() - expected).abs().max()
    sums = torch.ops.adafm.modulate_backward(grad, weight, gamma, [False, True, True], target.backend)[1:]
    expected_sums = gradients(grad, weight, gamma)[1:]
    for part, eager, wanted in zip(sums, ((grad * weight).sum((2, 3)), grad.sum((2, 3))), expected_sums, strict=True):
        assert (part.double() - wanted).abs().max() <= 2 * (eager.double() - wanted).abs().max()


def test_same_bits_every_time_and_with_any_number_of_threads(target):
    weight, gamma, beta = inputs((64, 48, 3, 3), device=target.device)
    grad = normal(weight.shape, torch.bfloat16, target.device, 5)

    def run():
        value = modulate(weight, gamma, beta, dtype=torch.bfloat16, backend=target.backend)
        return value, *torch.ops.adafm.modulate_backward(grad, weight, gamma, [True] * 3, target.backend)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_memory_is_poisoned():
    """The fixture works: otherwise an unwritten element would go unseen in this file."""
    assert torch.empty(1000).isnan().all() and torch.empty(1000, dtype=torch.bfloat16).isnan().all()


def test_type_follows_autocast():
    weight, gamma, beta = inputs((2, 3, 3, 3))
    assert modulate(weight, gamma, beta).dtype == torch.float32
    assert modulate(weight.half(), gamma, beta).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = modulate(weight, gamma, beta)
        assert found.dtype == torch.bfloat16
        assert modulate(weight.double(), gamma, beta).dtype == torch.float64
        assert modulate(weight, gamma, beta, dtype=torch.float32).dtype == torch.float32
    # Parameters are read in float32 and the result is rounded once.
    assert torch.equal(found, truth(weight, gamma, beta).float().bfloat16())


ERRORS = {
    "weight not a tensor": (dict(weight=[1.0]), TypeError, "weight is a list"),
    "gamma not a tensor": (dict(gamma=2.0), TypeError, "gamma is a float"),
    "weight of integers": (dict(weight=torch.ones(4, 6, 3, 3, dtype=torch.int32)), TypeError, "weight is torch.int32"),
    "weight complex": (dict(weight=torch.ones(4, 6, 3, 3, dtype=torch.complex64)), TypeError, "torch.complex64"),
    "gamma complex": (dict(gamma=torch.ones(4, 6, dtype=torch.complex64)), TypeError, "gamma is torch.complex64"),
    "beta of integers": (dict(beta=torch.ones(4, 6, dtype=torch.int64)), TypeError, "beta is torch.int64"),
    "dtype of integers": (dict(dtype=torch.int8), TypeError, "dtype is torch.int8"),
    "weight of rank 1": (dict(weight=torch.ones(4)), ValueError, r"weight has shape \[4\]; expected \[O, I\]"),
    "weight of rank 6": (dict(weight=torch.ones(4, 6, 1, 1, 1, 1)), ValueError, "one to three kernel dimensions"),
    "gamma of rank 1": (dict(gamma=torch.ones(6)), ValueError, r"gamma has shape \[6\]; expected \[4, 6\]"),
    "gamma transposed": (dict(gamma=torch.ones(6, 4)), ValueError, r"gamma has shape \[6, 4\]; expected \[4, 6\]"),
    "beta over taps": (dict(beta=torch.ones(4, 6, 3, 3)), ValueError, r"beta has shape \[4, 6, 3, 3\]"),
    "device": (dict(gamma=torch.ones(4, 6, device="meta")), ValueError, "gamma is on meta and weight on cpu"),
    "layout of 3-D": (
        dict(memory_format=torch.channels_last_3d),
        ValueError,
        "channels_last_3d for a weight of rank 4",
    ),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; expected one of reference, compiled, triton"),
}


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(change, kind, message):
    arguments = dict(weight=torch.ones(4, 6, 3, 3), gamma=torch.ones(4, 6), beta=torch.ones(4, 6)) | change
    with pytest.raises(kind, match=message):
        modulate(arguments.pop("weight"), arguments.pop("gamma"), arguments.pop("beta"), **arguments)


def test_backward_errors():
    weight = torch.ones(4, 6, 3, 3)
    with pytest.raises(ValueError, match=r"grad has shape \[4, 6\]; expected the weight's shape"):
        torch.ops.adafm.modulate_backward(torch.ones(4, 6), weight, None, [True] * 3)
    with pytest.raises(TypeError, match=r"grad is torch.int64"):
        torch.ops.adafm.modulate_backward(weight.long(), weight, None, [True] * 3)


@pytest.mark.triton
@pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET 1")
@pytest.mark.parametrize("shape", [(5, 13, 3, 3), (9, 40, 1, 3), (3, 5, 7, 7)], ids=identify)
def test_triton_with_many_small_blocks(monkeypatch, shape):
    """Several programs along both axes, none of them full, and a kernel walked in more than one stretch."""
    from adafm_kernels.backends import triton

    monkeypatch.setattr(triton, "_INTERPRETED_PAIRS", 16)
    monkeypatch.setattr(triton, "_INTERPRETED_FLAT", 64)
    weight, gamma, beta = inputs(shape)
    grad = normal(shape, seed=5)
    for view in (weight, channels_last(weight)):
        assert_forward(modulate(view, gamma, beta, backend="triton"), weight, gamma, beta, torch.float32, False)
        found = torch.ops.adafm.modulate_backward(grad, view, gamma, [True] * 3, "triton")
        expected = torch.ops.adafm.modulate_backward(grad, weight, gamma, [True] * 3, "compiled")
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))
