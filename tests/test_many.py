"""``modulate_many`` and ``modulate_many_backward``: values, layouts, derivatives of any order, errors."""

import pytest
import torch
from derivatives import Record, assert_agree, chain, check, leaves
from modulation import assert_forward, channels_last, gradients, inputs, layouts, normal, spread, unit

from adafm_kernels import modulate, modulate_many, use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MANY = torch.ops.adafm.modulate_many.default
MANY_BACKWARD = torch.ops.adafm.modulate_many_backward.default
ALL = [True, True, True]

# Of every rank, with 1, 9, 16 and other numbers of taps, rows that are multiples of 8 and not, and empty ones.
SHAPES = (
    (8, 16, 3, 3),
    (5, 7),
    (3, 5, 1, 1),
    (0, 3, 3, 3),
    (2, 9, 4, 4),
    (4, 3, 5),
    (2, 8, 2, 3, 2),
    (3, 0),
    (1, 1, 7, 7),
)


def network(shapes=SHAPES, dtype=torch.float32, device="cpu"):
    """weights, gammas and betas of a network, as lists."""
    layers = [inputs(shape, dtype, device, 10 * number) for number, shape in enumerate(shapes)]
    return tuple(list(group) for group in zip(*layers, strict=True))


def plain(*tensors):
    """The plain formula of every layer; all weights, then all gammas, then all betas, in float64."""
    count = len(tensors) // 3
    layers = zip(tensors[:count], tensors[count : 2 * count], tensors[2 * count :], strict=True)
    return tuple(spread(gamma, weight, 1.0) * weight + spread(beta, weight, 0.0) for weight, gamma, beta in layers)


def on(target):
    """``modulate_many`` of the same tensors on a backend."""

    def call(*tensors):
        count = len(tensors) // 3
        lists = (tensors[:count], tensors[count : 2 * count], tensors[2 * count :])
        return tuple(modulate_many(*lists, backend=target.backend))

    return call


def registered(target):
    def call(*tensors):
        count = len(tensors) // 3
        lists = (list(tensors[:count]), list(tensors[count : 2 * count]), list(tensors[2 * count :]))
        return tuple(MANY(*lists, None, None, target.backend))

    return call


def test_values(target, types):
    weights, gammas, betas = network(dtype=types[0], device=target.device)
    found = modulate_many(weights, gammas, betas, dtype=types[1], backend=target.backend)
    assert len(found) == len(weights)
    for value, weight, gamma, beta in zip(found, weights, gammas, betas, strict=True):
        assert value.shape == weight.shape and value.is_contiguous()
        assert_forward(value, weight, gamma, beta, types[1], target.truncates)


def test_same_bits_as_one_weight_at_a_time(target):
    """Forward and backward, for layers in every layout and gradients in others."""
    weights, gammas, betas = network(device=target.device)
    views = [channels_last(w) if w.dim() == 4 and n % 4 == 0 else layouts(w)["offset"] for n, w in enumerate(weights)]
    found = modulate_many(views, gammas, betas, dtype=torch.bfloat16, backend=target.backend)
    for value, weight, gamma, beta in zip(found, views, gammas, betas, strict=True):
        expected = modulate(weight, gamma, beta, dtype=torch.bfloat16, backend=target.backend)
        assert torch.equal(value, expected) and value.stride() == expected.stride()
    grads = [normal(w.shape, torch.bfloat16, target.device, n) for n, w in enumerate(weights)]
    groups = MANY_BACKWARD(grads, views, gammas, ALL, target.backend)
    # The reference's sums follow torch's own order; the kernels' orders are equal for the two ops.
    for number, (grad, weight, gamma) in enumerate(zip(grads, views, gammas, strict=True)):
        single = torch.ops.adafm.modulate_backward(grad, weight, gamma, ALL, target.backend)
        for value, expected in zip(groups[number :: len(weights)], single, strict=True):
            assert torch.equal(value, expected) and value.stride() == expected.stride()


def test_backward_values(target, types):
    weights, gammas, _ = network(dtype=types[0], device=target.device)
    grads = [normal(w.shape, types[1], target.device, 70 + n) for n, w in enumerate(weights)]
    found = MANY_BACKWARD(grads, weights, gammas, ALL, target.backend)
    wide = torch.float64 if types[0] == torch.float64 else torch.float32
    step = unit(types[0]) * (1.0 if target.truncates and types[0] == torch.bfloat16 else 0.5) + unit(wide)
    for number, (grad, weight, gamma) in enumerate(zip(grads, weights, gammas, strict=True)):
        d_weight, *sums = found[number :: len(weights)]
        expected = gradients(grad, weight, gamma)
        assert d_weight.dtype == types[0] and all(s.dtype == wide and s.shape == weight.shape[:2] for s in sums)
        tiny = torch.finfo(types[0]).tiny
        assert ((d_weight.double() - expected[0]).abs() <= 1.01 * step * expected[0].abs() + tiny).all()
        absolute = gradients(grad.abs(), weight.abs(), None)
        taps = weight.shape[2:].numel()
        for value, wanted, terms in zip(sums, expected[1:], absolute[1:], strict=True):
            assert ((value.double() - wanted).abs() <= taps * unit(wide) * terms).all()


@pytest.mark.parametrize("mask", range(8))
def test_masks(target, mask):
    """Groups that are not asked for are left out; the others keep their bits."""
    weights, gammas, _ = network(device=target.device)
    grads = [normal(w.shape, device=target.device, seed=n) for n, w in enumerate(weights)]
    asked = [bool(mask & 1), bool(mask & 2), bool(mask & 4)]
    complete = MANY_BACKWARD(grads, weights, gammas, ALL, target.backend)
    found = MANY_BACKWARD(grads, weights, gammas, asked, target.backend)
    count = len(weights)
    wanted = [t for part in range(3) if asked[part] for t in complete[part * count : (part + 1) * count]]
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_layouts_of_results(target):
    """None: each its own; channels_last: every rank that has it."""
    weights, gammas, betas = network(((4, 16, 3, 3), (4, 8, 2, 2, 2), (4, 6), (3, 5, 3)), device=target.device)
    weights[0] = channels_last(weights[0])
    own = modulate_many(weights, gammas, betas, backend=target.backend)
    assert own[0].is_contiguous(memory_format=torch.channels_last) and all(t.is_contiguous() for t in own[1:])
    last = modulate_many(weights, gammas, betas, memory_format=torch.channels_last, backend=target.backend)
    assert last[0].is_contiguous(memory_format=torch.channels_last)
    assert last[1].is_contiguous(memory_format=torch.channels_last_3d)
    assert last[2].is_contiguous() and last[3].is_contiguous()
    plain_order = modulate_many(weights, gammas, betas, memory_format=torch.contiguous_format, backend=target.backend)
    assert all(t.is_contiguous() for t in plain_order)
    for group in zip(own, last, plain_order, strict=True):
        assert torch.equal(group[0], group[1]) and torch.equal(group[0], group[2])


def test_parameters_that_are_absent_broadcast_or_strided(target):
    weights = [normal((4, 6, 3, 2), device=target.device, seed=n) for n in range(5)]
    gammas = [
        None,
        normal((4, 1), device=target.device, seed=11),
        normal((1, 6, 1, 1), torch.float16, target.device, 12),
        normal((6, 8), device=target.device, seed=13).t()[::2],
        normal((1, 1), torch.float64, target.device, 14),
    ]
    betas = [normal((4, 6), device=target.device, seed=15).flip(0), None, *gammas[1:3], None]
    found = modulate_many(weights, gammas, betas, backend=target.backend)
    for value, weight, gamma, beta in zip(found, weights, gammas, betas, strict=True):
        gamma = gamma if gamma is None else gamma.float()
        assert_forward(value, weight, gamma, beta, torch.float32, False)


def test_strided_weights_and_expanded_gradients(target):
    """Every way a weight can lie; a gradient of zero strides."""
    weight, gamma, beta = inputs((6, 16, 3, 3), device=target.device)
    views = list(layouts(weight).values())
    many = modulate_many(views, [gamma] * len(views), [beta] * len(views), backend=target.backend)
    assert all(torch.equal(value, many[0]) for value in many)
    one = torch.ones((), device=target.device).expand(weight.shape)
    found = MANY_BACKWARD([one] * len(views), views, [gamma] * len(views), [False, False, True], target.backend)
    assert all(torch.equal(value, torch.full((6, 16), 9.0, device=target.device)) for value in found)


def test_no_weights():
    assert modulate_many([], [], []) == []
    assert MANY([], [], []) == [] and MANY_BACKWARD([], [], [], ALL) == []


def test_same_bits_every_time_and_with_any_number_of_threads(target):
    weights, gammas, betas = network(((64, 48, 3, 3), (33, 20), (17, 64, 4, 4), (64, 64, 1, 1)), device=target.device)
    grads = [normal(w.shape, torch.bfloat16, target.device, n) for n, w in enumerate(weights)]

    def run():
        values = modulate_many(weights, gammas, betas, dtype=torch.bfloat16, backend=target.backend)
        return *values, *MANY_BACKWARD(grads, weights, gammas, ALL, target.backend)

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
    points = leaves((2, 2, 2, 1), (1, 3), (2, 2, 1, 1), (1, 1), (2, 1), (1, 3), device=target.device)
    check(entry(target), points, target)


def test_gradcheck_of_the_backward(target):
    grads_weights = leaves((2, 1, 2), (1, 2), (2, 1, 2), (1, 2), (2, 1), (1, 1), device=target.device)
    for mask in (ALL, [True, False, False], [False, True, True]):

        def call(*t, mask=mask):
            return tuple(MANY_BACKWARD(list(t[:2]), list(t[2:4]), list(t[4:]), mask, target.backend))

        check(call, grads_weights, target)


@pytest.mark.parametrize("entry", [on, registered], ids=["function", "op"])
def test_derivatives_agree_with_the_formula(target, entry):
    points = leaves((3, 4, 2, 2), (2, 5), (3, 4, 1, 1), (2, 1), (1, 4), (2, 5), device=target.device)
    assert_agree(chain(entry(target), points), chain(plain, points))


@pytest.mark.parametrize("needs", [(0, 1, 0, 1), (1, 0, 0, 0), (0, 0, 0, 1), (1, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("entry", [on, registered], ids=["function", "op"])
def test_some_layers_are_frozen(target, needs, entry):
    """Gradients for those that ask, from one call of each op; undefined incoming gradients are no zero tensors."""
    shapes = ((3, 4, 2, 2), (2, 5), (3, 4), (2, 5))
    points = [normal(s, torch.float64, target.device, n) for n, s in enumerate((*shapes, (3, 1), (1, 5)))]
    for point, needed in zip(points, (*needs, 1, 0), strict=True):
        point.requires_grad_(bool(needed))
    with Record() as record:
        values = entry(target)(*points)
        sum(v.square().sum() for v in values).backward()
    assert record.names == ["modulate_many", "modulate_many_backward"]
    found = [p.grad for p in points]
    for p in points:
        p.grad = None
    sum(v.square().sum() for v in plain(*points)).backward()
    assert_agree(found, [p.grad for p in points])
    assert [f is not None for f in found] == [p.requires_grad for p in points]
    # Only one of the results is used.
    unused = torch.autograd.grad(
        entry(target)(*points)[0].sum(), [p for p in points if p.requires_grad], allow_unused=True
    )
    expected = torch.autograd.grad(plain(*points)[0].sum(), [p for p in points if p.requires_grad], allow_unused=True)
    assert_agree(unused, expected)


def test_only_what_backward_reads_is_saved():
    """With frozen weights gammas and betas may change between forward and backward."""
    weights, gammas, betas = network(((3, 4, 2, 2), (2, 5)))
    for parameter in (*gammas, *betas):
        parameter.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        values = modulate_many(weights, gammas, betas)
    assert [t.data_ptr() for t in saved] == [w.data_ptr() for w in weights]
    with torch.no_grad():
        for parameter in (*gammas, *betas):
            parameter.add_(1.0)
    sum(v.sum() for v in values).backward()
    assert torch.allclose(gammas[0].grad, weights[0].sum((2, 3), keepdim=True), atol=1e-5)


@pytest.mark.parametrize("op", ["modulate_many", "modulate_many_backward"])
def test_opcheck(target, op):
    dtype = torch.float32
    weights = list(leaves((3, 4, 3, 3), (2, 5), device=target.device, dtype=dtype))
    gammas = list(leaves((3, 4, 1, 1), (2, 1), device=target.device, dtype=dtype, seed=5))
    betas = list(leaves((3, 1), (1, 5), device=target.device, dtype=dtype, seed=7))
    if op == "modulate_many":
        torch.library.opcheck(MANY, (weights, gammas, betas, torch.bfloat16, torch.channels_last, target.backend))
        torch.library.opcheck(MANY, (weights, gammas, betas, None, None, target.backend))
        return
    grads = list(leaves((3, 4, 3, 3), (2, 5), device=target.device, dtype=dtype, seed=9))
    for mask in (ALL, [False, True, False]):
        torch.library.opcheck(MANY_BACKWARD, (grads, weights, gammas, mask, target.backend))


def test_torch_func(target):
    """grad, grad of grad, vmap and vmap of grad."""
    points = [p.detach() for p in leaves((2, 3, 2), (2, 2), (2, 3, 1), (2, 1), (2, 3), (1, 2), device=target.device)]
    batch = normal((4, 2, 3, 1), torch.float64, target.device, 30)

    def loss(call):
        return lambda *tensors: sum((v.square() * v).sum() for v in call(*tensors))

    def second(call):
        first = torch.func.grad(loss(call), argnums=tuple(range(6)))
        return torch.func.grad(lambda *t: sum(g.square().sum() for g in first(*t)), argnums=tuple(range(6)))

    dims = (None, None, 0, None, None, None)
    batched = (*points[:2], batch, *points[3:])
    gradient = [torch.func.grad(loss(f), argnums=(0, 2, 3)) for f in (on(target), plain)]
    assert_agree(*(g(*points) for g in gradient))
    assert_agree(second(on(target))(*points), second(plain)(*points))
    assert_agree(*(torch.vmap(f, in_dims=dims)(*batched) for f in (on(target), plain)))
    assert_agree(*(torch.vmap(g, in_dims=dims)(*batched) for g in gradient))


def test_forward_mode_raises():
    weights, gammas, betas = network(((2, 3),))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda g: modulate_many(weights, [g], betas)[0], (gammas[0],), (gammas[0],))


def test_compiled_graph_has_no_breaks(target):
    weights, gammas, betas = network(((4, 3, 3, 3), (2, 5)), device=target.device)
    parameters = [p.requires_grad_() for p in (*gammas, *betas)]

    def layer(scale):
        return [v * scale for v in modulate_many(weights, gammas, betas, dtype=torch.bfloat16)]

    with use_backend(target.backend):
        torch._dynamo.reset()
        results = []
        for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            values = function(torch.ones((), device=target.device))
            loss = sum(v.float().square().sum() for v in values)
            results.append((*values, *torch.autograd.grad(loss, parameters)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_type_follows_autocast():
    weights, gammas, betas = network(((2, 3, 3, 3), (4, 5)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [v.dtype for v in modulate_many(weights, gammas, betas)] == [torch.bfloat16] * 2
        assert modulate_many([w.double() for w in weights], gammas, betas)[0].dtype == torch.float64
        assert modulate_many(weights, gammas, betas, dtype=torch.float32)[0].dtype == torch.float32


ERRORS = {
    "weights no list": (dict(weights=torch.ones(2, 4, 6)), TypeError, "weights is a Tensor; expected a list"),
    "gamma no tensor": (dict(gammas=[None, 2.0]), TypeError, r"gammas\[1\] is a float"),
    "weight None": (dict(weights=[None, torch.ones(4, 6)]), TypeError, r"weights\[0\] is a NoneType"),
    "gammas too few": (dict(gammas=[None]), ValueError, r"gammas holds 1 tensors; expected 2"),
    "betas too many": (dict(betas=[None] * 3), ValueError, r"betas holds 3 tensors; expected 2"),
    "weights empty": (dict(weights=[]), ValueError, r"gammas holds 2 tensors; expected 0"),
    "types differ": (
        dict(weights=[torch.ones(4, 6), torch.ones(4, 6).half()]),
        ValueError,
        r"weights\[1\] is torch.float16",
    ),
    "devices differ": (
        dict(weights=[torch.ones(4, 6), torch.ones(4, 6, device="meta")]),
        ValueError,
        r"weights\[1\] is torch.float32 on meta",
    ),
    "rank 1": (dict(weights=[torch.ones(4, 6), torch.ones(4)]), ValueError, r"weights\[1\] has shape \[4\]"),
    "integers": (dict(weights=[torch.ones(4, 6).int(), torch.ones(4, 6)]), TypeError, r"weights\[0\] is torch.int32"),
    "gamma transposed": (dict(gammas=[None, torch.ones(6, 4)]), ValueError, r"gammas\[1\] has shape \[6, 4\]"),
    "beta complex": (dict(betas=[torch.ones(4, 6) * 1j, None]), TypeError, r"betas\[0\] is torch.complex64"),
    "dtype": (dict(dtype=torch.int8), TypeError, "dtype is torch.int8"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'"),
}


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(change, kind, message):
    arguments = dict(weights=[torch.ones(4, 6, 3, 3), torch.ones(4, 6)], gammas=[None] * 2, betas=[None] * 2) | change
    with pytest.raises(kind, match=message):
        modulate_many(arguments.pop("weights"), arguments.pop("gammas"), arguments.pop("betas"), **arguments)


def test_backward_errors():
    weights, gammas, _ = network(((4, 6, 3, 3), (4, 6)))
    with pytest.raises(ValueError, match=r"grads\[1\] is torch.float32 \[6, 4\]"):
        MANY_BACKWARD([weights[0], torch.ones(6, 4)], weights, gammas, ALL)
    with pytest.raises(ValueError, match=r"grads holds 1 tensors; expected 2"):
        MANY_BACKWARD(weights[:1], weights, gammas, ALL)
    with pytest.raises(TypeError, match=r"grads\[0\] is torch.int64"):
        MANY_BACKWARD([weights[0].long(), weights[1]], weights, gammas, ALL)
