"""``modulate_per_sample`` and its backward: N gammas and betas on one weight."""

import pytest
import torch
import torch.nn.functional as F
from derivatives import Record, assert_agree, chain, check, leaves
from modulation import assert_forward, channels_last, gradients, inputs, layouts, normal, unit

from adafm_kernels import modulate, modulate_per_sample, use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PER_SAMPLE = torch.ops.adafm.modulate_per_sample.default
PER_SAMPLE_BACKWARD = torch.ops.adafm.modulate_per_sample_backward.default
ALL = [True, True, True]
SHAPES = ((5, 7), (4, 3, 5), (8, 16, 3, 3), (5, 3, 3, 3), (3, 9, 4, 4), (1, 1, 1, 1), (2, 3, 7, 7), (2, 8, 2, 3, 2))
EMPTY = ((0, 3, 3, 3), (3, 0, 3, 3), (2, 3, 0, 3), (0, 0))


def sets(shape, samples=3, dtype=torch.float32, device="cpu"):
    """weight, and gamma and beta of N samples with trailing ones."""
    weight, _, _ = inputs(shape, dtype, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = (samples, *shape[:2], *(1,) * (len(shape) - 2))
    return weight, normal(pairs, wide, device, 1), normal(pairs, wide, device, 2)


def of(parameter, sample):
    """The sample's own parameter."""
    return None if parameter is None else parameter[min(sample, parameter.shape[0] - 1)]


def plain(weight, gamma, beta):
    taps = (1,) * (weight.dim() - 2)
    gamma, beta = (p.reshape(*p.shape[:3], *taps) for p in (gamma, beta))
    return gamma * weight + beta


def on(target):
    return lambda *tensors: modulate_per_sample(*tensors, backend=target.backend)


def registered(target):
    return lambda *tensors: PER_SAMPLE(*tensors, None, None, target.backend)


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


def identify(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_values(target, types, shape):
    weight, gamma, beta = sets(shape, 3, types[0], target.device)
    found = modulate_per_sample(weight, gamma, beta, dtype=types[1], backend=target.backend)
    assert found.shape == (3, *shape) and found.is_contiguous()
    for n in range(3):
        assert_forward(found[n], weight, gamma[n], beta[n], types[1], target.truncates)


@pytest.mark.parametrize("shape", [(6, 16, 3, 3), (5, 3, 3, 3), (2, 8, 2, 3, 2), (4, 6)], ids=identify)
def test_same_bits_as_modulate_in_every_layout(target, shape):
    """N modulations of one weight; each lies in the asked layout, one behind the other."""
    weight, gamma, beta = sets(shape, 4, device=target.device)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    for name, view in layouts(weight).items():
        for form in dict.fromkeys((None, torch.contiguous_format, last)):
            options = dict(dtype=torch.bfloat16, memory_format=form, backend=target.backend)
            found = modulate_per_sample(view, gamma, beta, **options)
            for n in range(4):
                expected = modulate(view, gamma[n], beta[n], **options)
                assert torch.equal(found[n], expected) and found[n].stride() == expected.stride(), (name, form)
            assert found.stride(0) == weight.numel() and found.storage_offset() == 0


PARAMETERS = {
    "one set": ((1, 4, 6), (1, 4, 6, 1, 1), 1),
    "no gamma": (None, (3, 4, 6), 3),
    "no beta": ((3, 4, 6, 1), None, 3),
    "rows and columns": ((3, 4, 1), (3, 1, 6), 3),
    "shared beta": ((5, 1, 1), (1, 4, 6), 5),
    "shared gamma": ((1, 1, 6), (2, 4, 1), 2),
}


@pytest.mark.parametrize(("gamma_shape", "beta_shape", "samples"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameter_shapes(target, gamma_shape, beta_shape, samples):
    """Values, and gradients in each parameter's own shape."""
    weight = normal((4, 6, 3, 2), torch.float64, target.device).requires_grad_()
    gamma = None if gamma_shape is None else normal(gamma_shape, torch.float64, target.device, 1).requires_grad_()
    beta = None if beta_shape is None else normal(beta_shape, torch.float64, target.device, 2).requires_grad_()
    found = modulate_per_sample(weight, gamma, beta, backend=target.backend)
    assert found.shape == (samples, 4, 6, 3, 2)
    for n in range(samples):
        assert_forward(found[n].detach(), weight.detach(), of(gamma, n), of(beta, n), torch.float64, False)
    points = [p for p in (weight, gamma, beta) if p is not None]
    one, zero = torch.ones(1, 1, 1, device=target.device), torch.zeros(1, 1, 1, device=target.device)
    expected = plain(weight, one if gamma is None else gamma, zero if beta is None else beta).expand(found.shape)
    grad = normal(found.shape, torch.float64, target.device, 9)
    gradients_found = torch.autograd.grad(found, points, grad)
    assert_agree(gradients_found, torch.autograd.grad(expected, points, grad))


def test_parameters_of_other_types_and_strides(target):
    weight = normal((4, 6, 3, 3), device=target.device)
    gamma = normal((6, 4, 8), torch.float64, target.device, 1).permute(2, 1, 0)[::2]
    beta = normal((4, 1, 6), torch.bfloat16, target.device, 2).expand(4, 4, 6)
    found = modulate_per_sample(weight, gamma, beta, backend=target.backend)
    for n in range(4):
        assert_forward(found[n], weight, gamma[n].float(), beta[n], torch.float32, False)


@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_backward_values(target, types, shape):
    """dgamma and dbeta are those of each sample, dW their sum."""
    weight, gamma, _ = sets(shape, 3, types[0], target.device)
    grad = normal((3, *shape), types[1], target.device, 5)
    found = PER_SAMPLE_BACKWARD(grad, weight, gamma, ALL, target.backend)
    wide = torch.float64 if types[0] == torch.float64 else torch.float32
    assert found[0].dtype == types[0] and found[1].dtype == found[2].dtype == wide
    assert found[1].shape == found[2].shape == (3, *shape[:2])
    each = [gradients(grad[n], weight, gamma[n]) for n in range(3)]
    terms = [gradients(grad[n].abs(), weight.abs(), gamma[n].abs()) for n in range(3)]
    expected, allowed = sum(e[0] for e in each), sum(t[0] for t in terms)
    step = unit(types[0]) * (1.0 if target.truncates and types[0] == torch.bfloat16 else 0.5)
    tiny = torch.finfo(types[0]).tiny
    assert (
        (found[0].double() - expected).abs() <= 1.01 * step * expected.abs() + 4 * unit(wide) * allowed + tiny
    ).all()
    taps = weight.shape[2:].numel()
    for part in (1, 2):
        for n in range(3):
            error = (found[part][n].double() - each[n][part]).abs()
            assert (error <= taps * unit(wide) * gradients(grad[n].abs(), weight.abs(), None)[part]).all()


@pytest.mark.parametrize("mask", range(8))
def test_backward_masks(target, mask):
    weight, gamma, _ = sets((5, 6, 3, 3), device=target.device)
    grad = normal((3, *weight.shape), torch.bfloat16, target.device, 5)
    asked = [bool(mask & 1), bool(mask & 2), bool(mask & 4)]
    complete = PER_SAMPLE_BACKWARD(grad, weight, gamma, ALL, target.backend)
    found = PER_SAMPLE_BACKWARD(grad, weight, gamma, asked, target.backend)
    for part, whole, wanted in zip(found, complete, asked, strict=True):
        assert torch.equal(part, whole) if wanted else part.shape == (0,)


def test_backward_layouts(target):
    """Gradients and weights in every layout; dW lies as the weight."""
    weight, gamma, _ = sets((6, 16, 3, 3), device=target.device)
    grad = normal((3, *weight.shape), device=target.device, seed=5)
    expected = PER_SAMPLE_BACKWARD(grad, weight, gamma, ALL, target.backend)
    grads = {
        "contiguous": grad,
        "channels_last": channels_last(grad.flatten(0, 1)).unflatten(0, (3, 6)),
        "permuted": grad.permute(4, 0, 2, 1, 3).contiguous().permute(1, 3, 2, 4, 0),
        "sliced": torch.stack([grad, grad], 1).flatten(0, 1)[::2],
    }
    for grad_name, grad_view in grads.items():
        for name, view in layouts(weight).items():
            found = PER_SAMPLE_BACKWARD(grad_view, view, gamma, ALL, target.backend)
            # The reference's sums follow torch's own order, which depends on the layout.
            same = torch.equal if target.backend != "reference" else close
            assert all(same(a, b) for a, b in zip(found, expected, strict=True)), (grad_name, name)
            form = torch.channels_last if name == "channels_last" else torch.contiguous_format
            assert found[0].is_contiguous(memory_format=form)
    one = torch.ones((), device=target.device).expand(grad.shape)
    found = PER_SAMPLE_BACKWARD(one, weight, gamma, ALL, target.backend)
    assert torch.equal(found[2], torch.full((3, 6, 16), 9.0, device=target.device))


@pytest.mark.parametrize("shape", EMPTY, ids=identify)
@pytest.mark.parametrize("samples", [0, 2])
def test_empty(target, shape, samples):
    weight, gamma, beta = sets(shape, samples, device=target.device)
    found = modulate_per_sample(weight, gamma, beta, backend=target.backend)
    assert found.shape == (samples, *shape)
    d_weight, *sums = PER_SAMPLE_BACKWARD(found, weight, gamma, ALL, target.backend)
    assert d_weight.shape == weight.shape
    assert all(s.shape == (samples, *shape[:2]) and (s == 0).all() for s in sums)


def test_no_samples_of_a_weight(target):
    """dW of no sample is zero."""
    weight, gamma, beta = sets((3, 4, 3, 3), 0, device=target.device)
    assert modulate_per_sample(weight, gamma, beta, backend=target.backend).shape == (0, 3, 4, 3, 3)
    grad = torch.empty((0, 3, 4, 3, 3), device=target.device)
    d_weight, *sums = PER_SAMPLE_BACKWARD(grad, weight, gamma, ALL, target.backend)
    assert torch.equal(d_weight, torch.zeros_like(weight)) and all(s.shape == (0, 3, 4) for s in sums)


def test_same_bits_every_time_and_with_any_number_of_threads(target):
    weight, gamma, beta = sets((64, 48, 3, 3), 5, device=target.device)
    grad = normal((5, *weight.shape), torch.bfloat16, target.device, 5)

    def run():
        value = modulate_per_sample(weight, gamma, beta, dtype=torch.bfloat16, backend=target.backend)
        return value, *PER_SAMPLE_BACKWARD(grad, weight, gamma, ALL, target.backend)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


# ---- derivatives ----


@pytest.mark.parametrize("entry", [on, registered], ids=["function", "op"])
def test_gradcheck(target, entry):
    check(entry(target), leaves((2, 2, 2, 1), (2, 2, 1, 1, 1), (1, 2, 2), device=target.device), target)
    check(entry(target), leaves((1, 2), (2, 1, 2), (2, 1, 1), device=target.device), target)


@pytest.mark.parametrize("mask", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_gradcheck_of_the_backward(target, mask):
    points = leaves((2, 2, 2, 2), (2, 2, 2), (2, 2, 1), device=target.device)
    asked = [bool(m) for m in mask]

    def call(*tensors):
        found = PER_SAMPLE_BACKWARD(*tensors, asked, target.backend)
        return tuple(part for part, wanted in zip(found, asked, strict=True) if wanted)

    check(call, points, target)


@pytest.mark.parametrize("entry", [on, registered], ids=["function", "op"])
def test_derivatives_agree_with_the_formula(target, entry):
    points = leaves((3, 4, 2, 2), (5, 3, 1), (1, 3, 4, 1, 1), device=target.device)
    assert_agree(chain(entry(target), points), chain(plain, points))


@pytest.mark.parametrize("needs", [(0, 1, 1), (1, 0, 0), (0, 0, 1), (1, 1, 1)], ids=str)
def test_backward_computes_what_is_needed(target, needs):
    tensors = sets((4, 6, 3, 3), device=target.device)
    for tensor, needed in zip(tensors, needs, strict=True):
        tensor.requires_grad_(bool(needed))
    with Record() as record:
        modulate_per_sample(*tensors, backend=target.backend).sum().backward()
    assert record.names == ["modulate_per_sample", "modulate_per_sample_backward"]
    assert list(record.calls[1][1][3]) == [bool(n) for n in needs]
    assert [t.grad is not None for t in tensors] == [bool(n) for n in needs]


def test_only_what_backward_reads_is_saved():
    weight, gamma, beta = sets((4, 6, 3, 3))
    gamma.requires_grad_(), beta.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        modulate_per_sample(weight, gamma, beta)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]


@pytest.mark.parametrize("case", [(torch.float32, torch.bfloat16, torch.channels_last), (torch.float64, None, None)])
def test_opcheck(target, case):
    dtype, result, layout = case
    weight, gamma, beta = leaves((3, 4, 3, 3), (2, 3, 4), (2, 3, 1, 1), device=target.device, dtype=dtype)
    torch.library.opcheck(PER_SAMPLE, (weight, gamma, beta, result, layout, target.backend))
    torch.library.opcheck(PER_SAMPLE, (weight, None, beta, result, layout, target.backend))
    grad = normal((2, 3, 4, 3, 3), result or dtype, target.device, 9).requires_grad_()
    for mask in (ALL, [True, False, False], [False, True, True]):
        torch.library.opcheck(PER_SAMPLE_BACKWARD, (grad, weight, gamma, mask, target.backend))


def test_torch_func(target):
    """grad, grad of grad, vmap over any argument, and vmap of grad."""
    weight, gamma, beta = (p.detach() for p in leaves((2, 3, 2), (2, 2, 3, 1), (2, 2, 1), device=target.device))
    cases = (
        ((weight, normal((2, 4, 2, 3), torch.float64, target.device, 5), beta), (None, 1, None)),
        ((normal((2, 3, 4, 2), torch.float64, target.device, 6), gamma, beta), (2, None, None)),
        (
            (
                normal((4, 2, 3, 2), torch.float64, target.device, 7),
                gamma,
                normal((4, 1, 1, 3), torch.float64, target.device, 8),
            ),
            (0, None, 0),
        ),
    )

    def loss(call):
        return lambda *tensors: (call(*tensors).square() * call(*tensors)).sum()

    def second(call):
        first = torch.func.grad(loss(call), argnums=(0, 1, 2))
        return torch.func.grad(lambda *t: sum(g.square().sum() for g in first(*t)), argnums=(0, 1, 2))

    gradient = [torch.func.grad(loss(f), argnums=(0, 1, 2)) for f in (on(target), plain)]
    assert_agree(*(g(weight, gamma, beta) for g in gradient))
    assert_agree(second(on(target))(weight, gamma, beta), second(plain)(weight, gamma, beta))
    for tensors, dims in cases:
        chosen = [t if d is None else t.select(d, 0) for t, d in zip(tensors, dims, strict=True)]
        assert on(target)(*chosen).shape == plain(*chosen).shape
        members = [[t if d is None else t.select(d, n) for t, d in zip(tensors, dims, strict=True)] for n in range(4)]
        found = torch.vmap(on(target), in_dims=dims)(*tensors)
        assert_agree([found], [torch.stack([plain(*member) for member in members])])
        found = torch.vmap(gradient[0], in_dims=dims)(*tensors)
        expected = [torch.stack(parts) for parts in zip(*(gradient[1](*member) for member in members), strict=True)]
        assert_agree(found, expected)


def test_vmap_of_modulate_reads_the_weight_once(target):
    """A batch of gammas and betas on one weight is one call of the per-sample op, forwards and backwards."""
    weight, gamma, beta = sets((3, 4, 2, 2), 5, device=target.device)

    def call(g, b):
        return modulate(weight, g, b, backend=target.backend)

    with Record() as record:
        found = torch.vmap(call)(gamma, beta)
    assert record.names == ["modulate_per_sample"]
    assert torch.equal(found, modulate_per_sample(weight, gamma, beta, backend=target.backend))
    with Record() as record:
        slopes = torch.vmap(torch.func.grad(lambda g, b: call(g, b).square().sum()))(gamma, beta)
    assert record.names[0] == "modulate_per_sample"
    expected = (2 * found.double() * weight.double()).sum((-2, -1))
    assert torch.allclose(slopes.double().reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


def test_grouped_convolution_of_each_image_with_its_own_filters(target):
    weight, gamma, beta = sets((4, 3, 3, 3), 2, device=target.device)
    images = normal((2, 3, 6, 6), device=target.device, seed=4)
    bank = modulate_per_sample(weight, gamma, beta, backend=target.backend).flatten(0, 1)
    found = F.conv2d(images.flatten(0, 1)[None], bank, groups=2).view(2, 4, 4, 4)
    for n in range(2):
        single = modulate(weight, gamma[n], beta[n], backend=target.backend)
        assert torch.allclose(found[n], F.conv2d(images[n : n + 1], single)[0], atol=1e-5)


def test_forward_mode_raises():
    weight, gamma, beta = sets((2, 3, 2, 2))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda g: modulate_per_sample(weight, g, beta), (gamma,), (gamma,))


def test_compiled_graph_has_no_breaks(target):
    weight, gamma, beta = sets((4, 3, 3, 3), device=target.device)
    gamma.requires_grad_(), beta.requires_grad_()

    def layer(scale):
        return modulate_per_sample(weight, gamma, beta, memory_format=torch.channels_last) * scale

    with use_backend(target.backend):
        torch._dynamo.reset()
        results = []
        for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            y = function(torch.ones((), device=target.device))
            results.append((y, *torch.autograd.grad(y.square().sum(), (gamma, beta))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_type_follows_autocast():
    weight, gamma, beta = sets((2, 3, 3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert modulate_per_sample(weight, gamma, beta).dtype == torch.bfloat16
        assert modulate_per_sample(weight.double(), gamma, beta).dtype == torch.float64
        assert modulate_per_sample(weight, gamma, beta, dtype=torch.float32).dtype == torch.float32


ERRORS = {
    "weight not a tensor": (dict(weight=[1.0]), TypeError, "weight is a list"),
    "beta not a tensor": (dict(beta=2.0), TypeError, "beta is a float"),
    "neither": (dict(gamma=None, beta=None), ValueError, "gamma and beta are both None"),
    "gamma of one sample, no N": (
        dict(gamma=torch.ones(4, 6)),
        ValueError,
        r"gamma has shape \[4, 6\]; expected \[N, 4, 6\]",
    ),
    "counts differ": (dict(gamma=torch.ones(2, 4, 6)), ValueError, "gamma holds 2 samples and beta 3"),
    "transposed": (dict(gamma=torch.ones(3, 6, 4)), ValueError, r"gamma has shape \[3, 6, 4\]"),
    "over taps": (dict(beta=torch.ones(3, 4, 6, 3, 3)), ValueError, r"beta has shape \[3, 4, 6, 3, 3\]"),
    "integers": (dict(beta=torch.ones(3, 4, 6).int()), TypeError, "beta is torch.int32"),
    "complex": (dict(gamma=torch.ones(3, 4, 6) * 1j), TypeError, "gamma is torch.complex64"),
    "device": (dict(gamma=torch.ones(3, 4, 6, device="meta")), ValueError, "gamma is on meta and weight on cpu"),
    "rank": (dict(weight=torch.ones(4)), ValueError, r"weight has shape \[4\]"),
    "dtype": (dict(dtype=torch.int8), TypeError, "dtype is torch.int8"),
    "layout": (dict(memory_format=torch.channels_last_3d), ValueError, "channels_last_3d for a weight of rank 4"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(change, kind, message):
    given = dict(weight=torch.ones(4, 6, 3, 3), gamma=torch.ones(3, 4, 6), beta=torch.ones(3, 4, 6)) | change
    with pytest.raises(kind, match=message):
        modulate_per_sample(given.pop("weight"), given.pop("gamma"), given.pop("beta"), **given)


def test_backward_errors():
    weight, gamma, _ = sets((4, 6, 3, 3))
    with pytest.raises(ValueError, match=r"grad has shape \[4, 6, 3, 3\] on cpu; expected \[N, 4, 6, 3, 3\]"):
        PER_SAMPLE_BACKWARD(weight, weight, gamma, ALL)
    with pytest.raises(ValueError, match=r"gamma has shape \[3, 4, 6, 1, 1\]; expected \[2, 4, 6\]"):
        PER_SAMPLE_BACKWARD(weight.expand(2, 4, 6, 3, 3), weight, gamma, ALL)
