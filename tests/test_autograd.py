"""Derivatives of the modulation ops: any order, through torch.func, torch.compile and a real convolution."""

import pytest
import torch
import torch.nn.functional as F
from modulation import inputs, normal, spread
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from adafm_kernels import adafm_conv2d, modulate, use_backend
from adafm_kernels._ops import ModulateBackward

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MODULATE = torch.ops.adafm.modulate.default
MODULATE_BACKWARD = torch.ops.adafm.modulate_backward.default


def leaves(shape, device, *pairs, dtype=torch.float64):
    """weight and one parameter for each shape in ``pairs``, all asking for gradients."""
    shapes = (shape, *pairs)
    return tuple(normal(s, dtype, device, seed).requires_grad_() for seed, s in enumerate(shapes))


def plain(weight, gamma, beta):
    return spread(gamma, weight, 1.0).to(weight.dtype) * weight + spread(beta, weight, 0.0).to(weight.dtype)


class Record(TorchDispatchMode):
    """The calls of the package's ops, below autograd."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "adafm":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "gamma", "beta"),
    [((2, 3, 2, 1), (2, 3, 1, 1), (2, 3)), ((2, 3), (2, 1), (1, 3)), ((1, 2, 3), (1, 2, 1), (1, 1, 1))],
    ids=str,
)
@pytest.mark.parametrize("entry", ["function", "op"])
def test_gradcheck_of_modulate(target, entry, shape, gamma, beta):
    """First and second derivatives, of the public entry and of the registered op."""
    points = leaves(shape, target.device, gamma, beta)

    def call(*tensors):
        if entry == "function":
            return modulate(*tensors, backend=target.backend)
        return MODULATE(*tensors, None, None, target.backend)

    fast = target.backend == "triton"
    assert gradcheck(call, points, fast_mode=fast)
    assert gradgradcheck(call, points, fast_mode=fast)


@pytest.mark.parametrize("mask", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("entry", ["function", "op"])
def test_gradcheck_of_modulate_backward(target, entry, mask):
    """The internal op is differentiable as often as the other, whatever is asked of it."""
    grad = normal((2, 2, 2, 1), torch.float64, target.device, 9).requires_grad_()
    weight, gamma = leaves((2, 2, 2, 1), target.device, (2, 1, 1, 1))
    asked = [bool(m) for m in mask]

    def call(*tensors):
        op = ModulateBackward.apply if entry == "function" else MODULATE_BACKWARD
        return tuple(part for part, wanted in zip(op(*tensors, asked, target.backend), asked, strict=True) if wanted)

    fast = target.backend == "triton"
    assert gradcheck(call, (grad, weight, gamma), fast_mode=fast)
    assert gradgradcheck(call, (grad, weight, gamma), fast_mode=fast)


OPCHECKS = {
    "float32": ((3, 4, 3, 3), (3, 4, 1, 1), torch.float32, None, None),
    "to bfloat16 channels-last": ((3, 4, 3, 3), (3, 4), torch.float32, torch.bfloat16, torch.channels_last),
    "float64 broadcast": ((3, 4), (3, 1), torch.float64, None, torch.contiguous_format),
    "float16 3-D": ((2, 3, 2, 1, 3), (1, 3, 1, 1, 1), torch.float16, torch.float32, torch.channels_last_3d),
}


@pytest.mark.parametrize("case", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck_of_modulate(target, case):
    shape, pairs, dtype, result, layout = case
    weight, gamma, beta = leaves(shape, target.device, pairs, pairs, dtype=dtype)
    torch.library.opcheck(MODULATE, (weight, gamma, beta, result, layout, target.backend))
    torch.library.opcheck(MODULATE, (weight, None, beta, result, layout, target.backend))


@pytest.mark.parametrize("mask", [(1, 1, 1), (1, 0, 0), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("case", list(OPCHECKS.values())[:3], ids=list(OPCHECKS)[:3])
def test_opcheck_of_modulate_backward(target, case, mask):
    shape, pairs, dtype, result, _ = case
    weight, gamma = leaves(shape, target.device, pairs, dtype=dtype)
    grad = normal(shape, result or dtype, target.device, 9).requires_grad_()
    torch.library.opcheck(MODULATE_BACKWARD, (grad, weight, gamma, [bool(m) for m in mask], target.backend))


def test_gradients_in_each_parameters_own_shape_and_type(target):
    weight = normal((4, 6, 3, 3), torch.bfloat16, target.device).requires_grad_()
    gamma = normal((4, 1, 1, 1), torch.float16, target.device, 1).requires_grad_()
    beta = normal((1, 6), torch.float32, target.device, 2).requires_grad_()
    modulate(weight, gamma, beta, dtype=torch.float32, backend=target.backend).square().sum().backward()
    double = [t.detach().double().requires_grad_() for t in (weight, gamma, beta)]
    plain(*double).square().sum().backward()
    for found, expected in zip((weight, gamma, beta), double, strict=True):
        assert found.grad.shape == found.shape and found.grad.dtype == found.dtype
        unit = torch.finfo(found.dtype).eps
        assert (found.grad.double() - expected.grad).abs().max() <= 2 * unit * expected.grad.abs().max()


@pytest.mark.parametrize("needs", [(0, 1, 1), (1, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 1)], ids=str)
def test_backward_computes_what_is_needed(target, needs):
    """The mask follows requires_grad, and the first derivative takes one call of the op."""
    weight, gamma, beta = inputs((4, 6, 3, 3), device=target.device)
    for tensor, needed in zip((weight, gamma, beta), needs, strict=True):
        tensor.requires_grad_(bool(needed))
    with Record() as record:
        modulate(weight, gamma, beta, backend=target.backend).sum().backward()
    assert [func for func, _ in record.calls] == [MODULATE, MODULATE_BACKWARD]
    assert list(record.calls[1][1][3]) == [bool(n) for n in needs]
    assert [tensor.grad is not None for tensor in (weight, gamma, beta)] == [bool(n) for n in needs]


def test_only_what_backward_reads_is_saved():
    """With a frozen weight, gamma and beta may change between forward and backward: they are not kept."""
    weight, gamma, beta = inputs((4, 6, 3, 3))
    gamma.requires_grad_(), beta.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = modulate(weight, gamma, beta)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]
    with torch.no_grad():
        gamma.add_(1.0), beta.add_(1.0)
    result.sum().backward()
    assert torch.allclose(gamma.grad, weight.sum((2, 3), keepdim=True), atol=1e-5)
    saved.clear()
    gamma.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = modulate(weight, gamma, beta)
    assert saved == []
    beta.grad = None
    result.sum().backward()
    assert torch.equal(beta.grad, torch.full((4, 6, 1, 1), 9.0))


def test_second_derivative_with_each_output_alone(target):
    """Gradients that reach only one of dW, dgamma, dbeta; the others are undefined, not zero tensors."""
    points = leaves((2, 3, 2, 2), target.device, (2, 3, 1, 1), (2, 3, 1, 1))
    grad = normal((2, 3, 2, 2), torch.float64, target.device, 9).requires_grad_()
    for which in range(3):
        found = torch.autograd.grad(
            torch.autograd.grad(modulate(*points, backend=target.backend), points, grad, create_graph=True)[which]
            .square()
            .sum(),
            (*points, grad),
            allow_unused=True,
        )
        expected = torch.autograd.grad(
            torch.autograd.grad(plain(*points), points, grad, create_graph=True)[which].square().sum(),
            (*points, grad),
            allow_unused=True,
        )
        for part, wanted in zip(found, expected, strict=True):
            assert (part is None or not part.any()) if wanted is None else torch.allclose(part, wanted)


def test_r1_through_a_modulated_convolution(target):
    """The squared norm of the input gradient of a small critic, differentiated by every parameter."""
    image = normal((2, 3, 6, 6), torch.float64, target.device, 20).requires_grad_()
    first = leaves((4, 3, 3, 3), target.device, (4, 3, 1, 1), (4, 3, 1, 1))
    second = leaves((2, 4, 3, 3), target.device, (2, 4, 1, 1), (2, 4, 1, 1))

    def penalty(weight_of):
        hidden = F.softplus(F.conv2d(image, weight_of(*first), padding=1))
        logits = F.conv2d(hidden, weight_of(*second)).square().sum((1, 2, 3))
        (slope,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
        loss = logits.mean() + 5.0 * slope.square().sum((1, 2, 3)).mean()
        return torch.autograd.grad(loss, (*first, *second))

    found = penalty(lambda *tensors: modulate(*tensors, backend=target.backend))
    for part, wanted in zip(found, penalty(plain), strict=True):
        assert torch.allclose(part, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


def test_vmap(target):
    """Batched over every choice of arguments, at several batch dimensions, with broadcast parameters."""
    weight, gamma, beta = inputs((3, 4, 2, 2), device=target.device)
    many_weights = normal((3, 5, 4, 2, 2), device=target.device, seed=7)
    many_gammas = normal((3, 4, 5), device=target.device, seed=8)
    rows = normal((5, 3, 1), device=target.device, seed=9)

    def call(*tensors):
        return modulate(*tensors, backend=target.backend)

    cases = (
        ((weight, many_gammas, beta), (None, 2, None)),
        ((many_weights, gamma, beta), (1, None, None)),
        ((many_weights, many_gammas, rows), (1, 2, 0)),
        ((weight, None, rows), (None, None, 0)),
    )
    for tensors, dims in cases:
        found = torch.vmap(call, in_dims=dims)(*tensors)
        registered = torch.vmap(lambda *t: MODULATE(*t, None, None, target.backend), in_dims=dims)(*tensors)
        for n in range(5):
            chosen = [t if d is None else t.select(d, n) for t, d in zip(tensors, dims, strict=True)]
            assert torch.equal(found[n], call(*chosen))
            assert torch.equal(registered[n], found[n])


def test_torch_func(target):
    """grad, vmap of grad, and grad of grad agree with the plain formula."""
    weight, gamma, beta = inputs((2, 3, 2, 1), torch.float64, target.device)
    gammas = normal((4, 2, 3, 1, 1), torch.float64, target.device, 5)

    def loss(function, g, w, b):
        return function(w, g, b).square().sum() * g.sum()

    def found(g, w, b):
        return loss(lambda *t: modulate(*t, backend=target.backend), g, w, b)

    def expected(g, w, b):
        return loss(plain, g, w, b)

    def same(a, b):
        return all(torch.allclose(x, y) for x, y in zip(a, b, strict=True))

    def third(function):
        def inner(g, w, b):
            return sum(part.square().sum() for part in torch.func.grad(function, argnums=(0, 1, 2))(g, w, b))

        return torch.func.grad(inner, argnums=(0, 1, 2))

    arguments = (gamma, weight, beta)
    assert same(*(torch.func.grad(f, argnums=(0, 1, 2))(*arguments) for f in (found, expected)))
    assert same(*(third(f)(*arguments) for f in (found, expected)))
    batched = [
        torch.vmap(torch.func.grad(f, argnums=(0, 1, 2)), in_dims=(0, None, None))(gammas, weight, beta)
        for f in (found, expected)
    ]
    assert same(*batched)


def test_per_sample_gradients_of_a_convolution():
    """vmap of grad through the convolution, one gradient for each image."""
    weight, gamma, beta = inputs((4, 3, 3, 3))
    images = normal((5, 3, 6, 6), seed=3)

    def loss(g, image):
        return adafm_conv2d(image[None], weight, padding=1, gamma=g, beta=beta).square().mean()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(gamma, images)
    for n, image in enumerate(images):
        assert torch.allclose(found[n], torch.func.grad(loss)(gamma, image), rtol=1e-4, atol=1e-5)


def test_forward_mode_raises():
    weight, gamma, beta = inputs((2, 3, 2, 2))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda g: modulate(weight, g, beta), (gamma,), (gamma,))


def test_compiled_graph_has_no_breaks(target):
    """torch.compile(fullgraph=True): value and first derivatives have the bits of eager."""
    weight, gamma, beta = inputs((4, 3, 3, 3), device=target.device)
    gamma.requires_grad_(), beta.requires_grad_()
    image = normal((2, 3, 6, 6), device=target.device, seed=4).contiguous(memory_format=torch.channels_last)

    def layer(x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return adafm_conv2d(x, weight, None, 1, 1, gamma=gamma, beta=beta).float()

    with use_backend(target.backend):
        torch._dynamo.reset()
        results = []
        for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            y = function(image)
            results.append((y, *torch.autograd.grad(y.square().sum(), (gamma, beta))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_expanded_incoming_gradient(target):
    weight, gamma, beta = inputs((4, 6, 3, 3), device=target.device)
    gamma.requires_grad_()
    modulate(weight, gamma, beta, backend=target.backend).sum().backward()
    assert torch.allclose(gamma.grad, weight.sum((2, 3), keepdim=True), atol=1e-5)


def test_backward_runs_on_the_backend_of_the_forward():
    weight, gamma, beta = inputs((4, 6, 3, 3))
    gamma.requires_grad_()
    with use_backend("reference"):
        result = modulate(weight, gamma, beta)
    with Record() as record:
        result.sum().backward()
    assert record.calls[0][1][4] == "reference"
