"""The op family beside ``modulate``: values, derivatives of any order, transforms, repeatability, on every backend."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from modulation import normal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from adafm_kernels import modulate, modulate_lowrank, modulate_many, modulate_normalized, modulate_per_sample
from adafm_kernels._ops_lowrank import ModulateLowrankBackward
from adafm_kernels._ops_many import ModulateManyBackward
from adafm_kernels._ops_normalized import ModulateNormalizedBackward
from adafm_kernels._ops_per_sample import ModulatePerSampleBackward

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = torch.ops.adafm


def wide(parameter: Tensor, weight: Tensor, leading: int = 2) -> Tensor:
    return parameter.reshape(*parameter.shape[:leading], *(1,) * (weight.dim() - 2))


def plain_many(weights, gammas, betas):
    return [wide(g, w) * w + wide(b, w) for w, g, b in zip(weights, gammas, betas, strict=True)]


def plain_per_sample(weight, gamma, beta):
    return wide(gamma, weight, 3) * weight + wide(beta, weight, 3)


def plain_normalized(weight, gamma, beta, over="filter"):
    dims = tuple(range(2 if over == "filter" else 1, weight.dim()))
    mean, deviation = weight.mean(dims, keepdim=True), weight.std(dims, keepdim=True)
    return wide(gamma, weight) * (weight - mean) / deviation + wide(beta, weight)


def plain_lowrank(weight, gamma, u, s, v, beta):
    return wide(gamma + u @ torch.diag(s) @ v.t(), weight) * weight + wide(beta, weight)


@dataclass(frozen=True)
class Op:
    """One op: shapes of its tensors, and how it is called as Function, as registered op, and in plain PyTorch.

    ``function`` and ``op`` take the tensors and a backend; ``backward`` the gradient, the tensors, a mask, a backend
    and which of the two entries; its results that are asked for come back.
    """

    shapes: tuple[tuple[int, ...], ...]
    function: Callable
    op: Callable
    plain: Callable
    backward: Callable
    masks: tuple[tuple[int, ...], ...]
    skip: tuple[int, ...]  # positions of the tensors that the backward does not take


def asked(results, mask):
    return tuple(result for result, wanted in zip(results, mask, strict=True) if wanted)


def lists(tensors):
    return tensors[0:2], tensors[2:4], tensors[4:6]


def many_backward(grads, tensors, mask, backend, function):
    weights, gammas, _ = lists(tensors)
    if function:
        return ModulateManyBackward.apply(2, mask, backend, *grads, *weights, *gammas)
    return tuple(OPS.modulate_many_backward.default(list(grads), weights, gammas, mask, backend))


def single_backward(function_class, op, *settings, keep=2):
    def call(grads, tensors, mask, backend, function):
        entry = function_class.apply if function else op
        return asked(entry(*grads, *tensors[:keep], *settings, mask, backend), mask)

    return call


THREE = ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1))
FAMILY = {
    "many": Op(
        ((2, 3, 2, 1), (3, 2), (2, 3, 1, 1), (3, 1), (2, 3), (1, 2)),
        lambda t, backend: tuple(modulate_many(*map(list, lists(t)), backend=backend)),
        lambda t, backend: tuple(OPS.modulate_many.default(*map(list, lists(t)), None, None, backend)),
        lambda t: tuple(plain_many(*lists(t))),
        many_backward,
        THREE,
        (4, 5),
    ),
    "per_sample": Op(
        ((2, 3, 2, 1), (4, 2, 3, 1, 1), (4, 1, 3)),
        lambda t, backend: modulate_per_sample(*t, backend=backend),
        lambda t, backend: OPS.modulate_per_sample.default(*t, None, None, backend),
        lambda t: plain_per_sample(*t),
        single_backward(ModulatePerSampleBackward, OPS.modulate_per_sample_backward.default),
        THREE,
        (2,),
    ),
    "normalized over filters": Op(
        ((2, 3, 2, 2), (2, 1, 1, 1), (2, 3)),
        lambda t, backend: modulate_normalized(*t, backend=backend),
        lambda t, backend: OPS.modulate_normalized.default(*t, "filter", 1e-8, None, None, backend),
        lambda t: plain_normalized(*t),
        single_backward(ModulateNormalizedBackward, OPS.modulate_normalized_backward.default, "filter", 1e-8),
        THREE,
        (2,),
    ),
    "normalized over channels": Op(
        ((2, 3, 2), (1, 3, 1), (2, 3)),
        lambda t, backend: modulate_normalized(*t, over="channel", backend=backend),
        lambda t, backend: OPS.modulate_normalized.default(*t, "channel", 1e-8, None, None, backend),
        lambda t: plain_normalized(*t, "channel"),
        single_backward(ModulateNormalizedBackward, OPS.modulate_normalized_backward.default, "channel", 1e-8),
        THREE,
        (2,),
    ),
    "lowrank": Op(
        ((2, 3, 2, 1), (2, 1), (2, 2), (2,), (3, 2), (2, 3)),
        lambda t, backend: modulate_lowrank(*t, backend=backend),
        lambda t, backend: OPS.modulate_lowrank.default(*t, None, None, backend),
        lambda t: plain_lowrank(*t),
        single_backward(ModulateLowrankBackward, OPS.modulate_lowrank_backward.default, keep=5),
        ((1,) * 6, (1, 0, 0, 0, 0, 0), (0, 0, 1, 0, 0, 0), (0, 1, 0, 1, 0, 0), (0, 0, 0, 0, 1, 1)),
        (5,),
    ),
}


@pytest.fixture(params=FAMILY.values(), ids=FAMILY)
def family(request):
    return request.param


def leaves(shapes, device, dtype=torch.float64):
    return [normal(shape, dtype, device, seed).requires_grad_() for seed, shape in enumerate(shapes)]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def check_derivatives(call, points, target):
    # Interpreted Triton is slow: one random direction instead of all.
    fast = target.backend == "triton"
    assert gradcheck(call, points, fast_mode=fast)
    assert gradgradcheck(call, points, fast_mode=fast)


@pytest.mark.parametrize("entry", ["function", "op"])
def test_values_and_derivatives(target, family, entry):
    points = leaves(family.shapes, target.device)
    call = getattr(family, entry)
    for found, want in zip(as_tuple(call(points, target.backend)), as_tuple(family.plain(points)), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    check_derivatives(lambda *t: call(list(t), target.backend), points, target)


@pytest.mark.parametrize("entry", ["function", "op"])
def test_derivatives_of_the_backward(target, family, entry):
    """The internal op is differentiable as often as the other, whatever is asked of it."""
    points = leaves(family.shapes, target.device)
    grads = [normal(t.shape, torch.float64, target.device, 50).requires_grad_() for t in as_tuple(family.plain(points))]
    taken = [t for position, t in enumerate(points) if position not in family.skip]
    count = len(grads)
    for mask in family.masks if target.backend != "triton" else family.masks[:2]:
        wanted = [bool(part) for part in mask]

        def call(*t, wanted=wanted):
            return family.backward(t[:count], list(t[count:]), wanted, target.backend, entry == "function")

        check_derivatives(call, (*grads, *taken), target)


LAYOUTS = (None, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["own layout", "channels-last"])
def test_opcheck(target, layout):
    device, backend = target.device, target.backend

    def t(*shapes, dtype=torch.float32):
        return [normal(shape, dtype, device, seed).requires_grad_() for seed, shape in enumerate(shapes)]

    weight, gamma, beta, grad = t((3, 4, 2, 2), (3, 4, 1, 1), (1, 4), (3, 4, 2, 2))
    other, one = t((2, 5), (2, 5))
    sets, more = t((2, 3, 4), (2, 3, 4, 2, 2))
    u, s, v = t((3, 2), (2,), (4, 2))
    both, three = ([weight, other], [gamma, one], [beta, one]), [True, True, True]
    check = torch.library.opcheck
    check(OPS.modulate_many.default, (*both, torch.bfloat16, layout, backend))
    check(OPS.modulate_many_backward.default, ([grad, one], *both[:2], three, backend))
    check(OPS.modulate_per_sample.default, (weight, sets, None, torch.float16, layout, backend))
    check(OPS.modulate_per_sample_backward.default, (more, weight, sets, three, backend))
    for over in ("filter", "channel"):
        check(OPS.modulate_normalized.default, (weight, gamma, beta, over, 1e-8, None, layout, backend))
        check(OPS.modulate_normalized_backward.default, (grad, weight, None, over, 1e-8, three, backend))
    check(OPS.modulate_lowrank.default, (weight, gamma, u, s, v, None, None, layout, backend))
    check(OPS.modulate_lowrank_backward.default, (grad, weight, None, u, s, v, [True] * 6, backend))


def test_same_input_same_bits(target, family):
    points = [t.detach().float() for t in leaves(family.shapes, target.device)]
    first, second = (as_tuple(family.function(points, target.backend)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    grads = [normal(t.shape, torch.float32, target.device, 50) for t in first]
    mask = [True] * len(family.masks[0])
    taken = [t for position, t in enumerate(points) if position not in family.skip]
    first, second = (family.backward(grads, taken, mask, target.backend, True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_layouts_types_and_autocast():
    weight = normal((6, 8, 3, 3))
    gamma, beta = normal((2, 6, 8), seed=1), normal((2, 6, 8), seed=2)
    last = modulate_per_sample(weight, gamma, beta, dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert last.flatten(0, 1).is_contiguous(memory_format=torch.channels_last) and last.dtype == torch.bfloat16
    for n in range(2):
        single = modulate(weight, gamma[n], beta[n], dtype=torch.bfloat16, memory_format=torch.channels_last)
        assert torch.equal(last[n], single)
    matrix = normal((6, 8), seed=3)
    results = modulate_many([weight, matrix], [gamma[0], None], [None, None], memory_format=torch.channels_last)
    assert results[0].is_contiguous(memory_format=torch.channels_last) and torch.equal(results[1], matrix)
    with torch.autocast("cpu", torch.bfloat16):
        for result in (
            *modulate_many([weight], [gamma[0]], [None]),
            modulate_per_sample(weight, gamma, None),
            modulate_normalized(weight, None, None),
            modulate_lowrank(weight, None, normal((6, 2)), normal((2,)), normal((8, 2)), None),
        ):
            assert result.dtype == torch.bfloat16
        assert modulate_normalized(weight.double(), None, None).dtype == torch.float64


def test_empty_weights(target):
    for shape in ((0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)):
        weight = torch.zeros(shape, device=target.device)
        gamma = torch.ones(2, *shape[:2], device=target.device, requires_grad=True)
        result = modulate_per_sample(weight, gamma, None, backend=target.backend)
        assert result.shape == (2, *shape)
        (found,) = torch.autograd.grad(result.sum(), gamma)
        assert found.shape == gamma.shape and not found.any()
        single = gamma[0].detach().requires_grad_()
        (many,) = modulate_many([weight], [single], [None], backend=target.backend)
        (found,) = torch.autograd.grad(many.sum(), single)
        assert many.shape == shape and not found.any()


def test_a_constant_filter_has_a_guarded_deviation(target):
    """eps takes the place of the deviation; the weight's gradient then has no part through it."""
    weight = normal((2, 2, 3, 3), torch.float64, target.device)
    weight[0, 0] = 0.25
    weight.requires_grad_()
    eps = 0.5
    result = modulate_normalized(weight, None, None, eps=eps, backend=target.backend)
    assert torch.equal(result[0, 0], torch.zeros_like(result[0, 0]))
    direction = normal(result.shape, torch.float64, target.device, 5)
    (found,) = torch.autograd.grad(result, weight, direction)
    inner = direction[0, 0]
    torch.testing.assert_close(found[0, 0], (inner - inner.mean()) / eps)
    assert gradcheck(
        lambda w: modulate_normalized(w, None, None, eps=0.01, backend=target.backend),
        weight[1:].detach().requires_grad_(),
    )


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_vmap_over_gamma_and_beta_reads_the_weight_once():
    weight, gamma, beta = normal((4, 3, 3, 3)), normal((5, 4, 3, 1, 1), seed=1), normal((5, 4, 3), seed=2)
    with Record() as record:
        found = torch.vmap(lambda g, b: modulate(weight, g, b))(gamma, beta)
    assert "adafm.modulate_per_sample.default" in record.names and "adafm.modulate.default" not in record.names
    torch.testing.assert_close(found, gamma * weight + beta[:, :, :, None, None])
    for dims in ((0, None), (None, 0)):
        pair = (gamma if dims[0] == 0 else gamma[0], beta if dims[1] == 0 else beta[0])
        found = torch.vmap(lambda g, b: modulate(weight, g, b), in_dims=dims)(*pair)
        torch.testing.assert_close(found, (pair[0] * weight + pair[1][..., None, None]).expand(5, 4, 3, 3, 3))


def test_func_grad_and_vmap(family):
    points = [t.detach() for t in leaves(family.shapes, "cpu")]

    def loss(call):
        return lambda *t: sum(part.sin().sum() for part in as_tuple(call(list(t))))

    ours, plain = loss(lambda t: family.function(t, None)), loss(family.plain)
    everything = tuple(range(len(points)))
    found, want = (torch.func.grad(f, argnums=everything)(*points) for f in (ours, plain))
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)
    batched = [torch.stack([t, 2 * t, t - 1]) for t in points]
    if family is FAMILY["per_sample"]:
        batched[0] = points[0]
    dims = tuple(None if t is points[0] else 0 for t in batched)
    found, want = (torch.vmap(f, in_dims=dims)(*batched) for f in (ours, plain))
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)


def test_fullgraph_compile(family):
    points = leaves(family.shapes, "cpu", torch.float32)

    def loss(*t):
        return sum(part.sin().sum() for part in as_tuple(family.function(list(t), None)))

    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*points), points)
    want = torch.autograd.grad(loss(*points), points)
    torch.testing.assert_close(found, want)


def test_forward_mode_raises(family):
    points = [t.detach() for t in leaves(family.shapes, "cpu")]
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda *t: family.function(list(t), None), tuple(points), tuple(points))


W, M = torch.zeros(4, 3, 2, 2), torch.zeros(4, 3)
BAD = {
    "list lengths": (lambda: modulate_many([W], [M, M], [M]), ValueError, "gammas holds 2 tensors; expected 1"),
    "a tensor for a list": (lambda: modulate_many(W, [M], [M]), TypeError, "weights is a Tensor; expected a list"),
    "no tensor in a list": (lambda: modulate_many([W], [1.0], [M]), TypeError, r"gammas\[0\] is a float"),
    "types in a list": (
        lambda: modulate_many([W, W.double()], [M, M], [M, M]),
        ValueError,
        r"weights\[1\] is torch.float64.*weights\[0\] torch.float32",
    ),
    "channels in a list": (lambda: modulate_many([W], [M.t()], [M]), ValueError, r"gammas\[0\] has shape \[3, 4\]"),
    "integer weight": (lambda: modulate_many([W.int()], [M], [M]), TypeError, r"weights\[0\] is torch.int32"),
    "complex gamma": (lambda: modulate_many([W], [M + 0j], [M]), TypeError, r"gammas\[0\] is torch.complex64"),
    "no samples": (lambda: modulate_per_sample(W, None, None), ValueError, "gamma and beta are both None"),
    "numbers of samples": (
        lambda: modulate_per_sample(W, M.expand(2, 4, 3), M.expand(3, 4, 3)),
        ValueError,
        "gamma holds 2 samples and beta 3",
    ),
    "sets without samples": (
        lambda: modulate_per_sample(W, M, None),
        ValueError,
        r"gamma has shape \[4, 3\]; expected",
    ),
    "over": (lambda: modulate_normalized(W, M, M, over="layer"), ValueError, "over is 'layer'"),
    "eps": (lambda: modulate_normalized(W, M, M, eps=-1.0), ValueError, "eps is -1.0"),
    "one weight in a filter": (lambda: modulate_normalized(M, M, M), ValueError, 'at least 2; over="channel"'),
    "rank": (
        lambda: modulate_lowrank(W, M, torch.zeros(4, 2), torch.zeros(3), torch.zeros(3, 2), M),
        ValueError,
        r"u has shape \[4, 2\]; expected \[4, R\] with R = 3",
    ),
    "integer factor": (
        lambda: modulate_lowrank(W, M, torch.zeros(4, 2).int(), torch.zeros(2), torch.zeros(3, 2), M),
        TypeError,
        "u is torch.int32",
    ),
    "dtype": (
        lambda: modulate_lowrank(W, M, M, torch.zeros(3), torch.zeros(3, 3), M, dtype=torch.int8),
        TypeError,
        "int8",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
