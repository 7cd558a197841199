"""Every other form of the ops, on one or two layers each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from adafm_kernels import backends, modulate

from . import shapes
from .baselines import (
    AUTHORS,
    BROADCAST,
    COMPILE_PACKED,
    authors,
    broadcast,
    copy_of,
    stored,
    through_autograd,
)
from .case import Case, Setup
from .layer_cases import (
    BF16,
    LAST,
    PLAIN,
    Layer,
    arena_backward,
    arena_forward,
    moved_backward,
    moved_forward,
    ours,
)
from .measure import COPY, OURS, Method

FORM_FIRST, ONE_BY_ONE = "gamma formed first", "one call a sample"
_SAMPLES, _RANKS, _EPS = (1, 4, 16), (1, 8, 64), 1e-5

ROWS = {
    "bf16 to bf16": "forward, W bf16 prepacked, to bf16 channels-last, output reused",
    "fp16 to fp16": "forward, W fp16 prepacked, to fp16 channels-last, output reused",
    "fp32 to fp32": "forward, W prepacked, to fp32 channels-last, output reused",
    "backward fp32": "backward (dgamma, dbeta) in fp32 contiguous, outputs fresh",
    "backward with dW": "backward with dW of bf16 channels-last: W prepacked, outputs reused",
    "backward 4x4": "backward (dgamma, dbeta) of a 4x4 filter in fp32 contiguous, outputs fresh",
    "double backward": "double backward (dG) of bf16 channels-last through autograd",
    "film": "one gamma and beta for a filter, to bf16 channels-last, output fresh",
    "normalised by filter": "normalised by filter, to bf16 channels-last, output fresh",
    "normalised by channel": "normalised by output channel, to bf16 channels-last, output fresh",
    **{f"samples {n}": f"{n} sets of gamma and beta, to bf16 channels-last, output fresh" for n in _SAMPLES},
    **{f"rank {r}": f"gamma of rank {r} more, to bf16 channels-last, output fresh" for r in _RANKS},
    "tiny forward": "differentiable `modulate()` of a tiny layer in fp32, forward",
    "tiny forward + backward": "differentiable `modulate()` of a tiny layer in fp32, forward and backward",
}
# The layer of the last two rows: what a call costs where there is next to nothing to compute.
TINY = (8, 8, 3, 3)


def variant_cases(setup: Setup) -> Iterator[Case]:
    """The rows of ROWS."""
    middle, small = shapes.middle_shape(), shapes.small_shape()
    if setup.quick:
        middle = small = shapes.mean_shapes()[0]
    yield _typed(setup, middle, "bf16 to bf16", BF16)
    yield _typed(setup, middle, "fp16 to fp16", torch.float16)
    yield _typed(setup, middle, "fp32 to fp32", torch.float32)
    yield _backward_call(setup, middle, "backward fp32")
    yield _backward_with_weight(setup, middle)
    # No generator here has 4x4 filters; those of DCGAN generators do, transposed convolutions of these widths.
    yield _backward_call(setup, (*middle[:2], 4, 4), "backward 4x4")
    yield _double_backward(setup, middle)
    yield _film(setup, middle)
    yield _normalised(setup, middle, "filter")
    yield _normalised(setup, middle, "channel")
    for count in _SAMPLES:
        yield _per_sample(setup, small, count)
    for rank in _RANKS:
        yield _lowrank(setup, middle, rank)
    yield from _tiny(setup)


def _typed(setup: Setup, shape: shapes.Shape, row: str, dtype: torch.dtype) -> Case:
    layer = Layer(setup, shape, dtype)
    old, plain = stored(authors, dtype, LAST), stored(broadcast, dtype, LAST)
    moved = moved_forward(layer.arena, dtype)
    methods = [
        *arena_forward(setup, layer.arena, dtype),
        Method(AUTHORS, lambda: old(layer.weight, layer.gamma, layer.beta)),
        Method(BROADCAST, lambda: plain(layer.weight, layer.gamma, layer.beta)),
        *setup.compiled_method(plain, layer.packed, layer.gamma, layer.beta, name=COMPILE_PACKED),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    return Case(row, shapes.text(shape), moved, methods, layer.truth)


def _eager_backward(layer: Layer, grad: Tensor, with_weight: bool = False) -> list[Method]:
    methods = []
    for name, expression in ((AUTHORS, authors), (BROADCAST, broadcast)):
        weight, leaves = layer.weight.clone().requires_grad_(with_weight), layer.leaves()
        form = LAST if grad.is_contiguous(memory_format=LAST) else PLAIN
        out = stored(expression, grad.dtype, form)(weight, *leaves)
        methods.append(Method(name, through_autograd(out, (weight, *leaves) if with_weight else leaves, grad)))
    return methods


def _backward_call(setup: Setup, shape: shapes.Shape, row: str) -> Case:
    layer = Layer(setup, shape)
    grad = layer.arena.views(layer.arena.random(torch.float32))[0].contiguous()
    moved, mask = moved_backward(layer.arena, torch.float32), [False, True, True]

    def call(backend: str) -> Method:
        op = backends.implementation(grad.device, backend).modulate_backward
        return Method(ours(backend), lambda: op(grad, layer.weight, None, mask, PLAIN)[1:])

    methods = [
        *map(call, ("compiled", *setup.backends)),
        *_eager_backward(layer, grad),
        *setup.compiled_method(lambda g, w: ((g * w).sum((2, 3)), g.sum((2, 3))), grad, layer.weight),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    return Case(row, shapes.text(shape), moved, methods, lambda: layer.sums(grad), shape[2] * shape[3] + 2.0)


def _backward_with_weight(setup: Setup, shape: shapes.Shape) -> Case:
    layer = Layer(setup, shape)
    buffer = layer.arena.random(BF16)
    (grad,) = layer.arena.views(buffer)
    moved = moved_backward(layer.arena, BF16, with_weight=True)

    def written_out(grad: Tensor, weight: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        wide = grad.float()
        return gamma * wide, (wide * weight).sum((2, 3)), wide.sum((2, 3))

    methods = [
        *arena_backward(setup, layer.arena, buffer, with_weight=True),
        *_eager_backward(layer, grad, with_weight=True),
        *setup.compiled_method(written_out, grad, layer.packed, layer.gamma, name=COMPILE_PACKED),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    truth = lambda: [layer.gamma.double() * grad.double(), *layer.sums(grad)]  # noqa: E731
    return Case("backward with dW", shapes.text(shape), moved, methods, truth, shape[2] * shape[3] + 2.0)


def _double_backward(setup: Setup, shape: shapes.Shape) -> Case:
    layer = Layer(setup, shape)
    (packed,) = layer.arena.views(layer.arena.random(BF16))
    u_gamma, u_beta = (tensor.flip(0) for tensor in (layer.gamma, layer.beta))
    moved = moved_forward(layer.arena, BF16)

    def twice(forward: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        leaves, grad = layer.leaves(), packed.clone().requires_grad_()
        first = torch.autograd.grad(forward(layer.packed, *leaves), leaves, grad, create_graph=True)
        return through_autograd(first, (grad,), (u_gamma, u_beta))

    methods = [
        Method(OURS, twice(lambda w, g, b: modulate(w, g, b, dtype=BF16, backend="compiled"))),
        Method(AUTHORS, twice(stored(authors, BF16, LAST))),
        Method(BROADCAST, twice(stored(broadcast, BF16, LAST))),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    truth = lambda: [u_gamma.double() * layer.weight.double() + u_beta.double()]  # noqa: E731
    return Case("double backward", shapes.text(shape), moved, methods, truth)


def _film(setup: Setup, shape: shapes.Shape) -> Case:
    layer = Layer(setup, shape)
    gamma, beta = layer.gamma[:, :1].contiguous(), layer.beta[:, :1].contiguous()
    plain = stored(broadcast, BF16, LAST)
    moved = layer.arena.weights * 6 + 8 * shape[0]
    run = lambda: modulate(layer.packed, gamma, beta, dtype=BF16, backend="compiled")  # noqa: E731
    methods = [
        Method(OURS, run),
        Method(BROADCAST, lambda: plain(layer.packed, gamma, beta)),
        *setup.compiled_method(plain, layer.packed, gamma, beta, name=COMPILE_PACKED),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    truth = lambda: [gamma.double() * layer.weight.double() + beta.double()]  # noqa: E731
    return Case("film", shapes.text(shape), moved, methods, truth)


def _normalised(setup: Setup, shape: shapes.Shape, over: str) -> Case:
    layer = Layer(setup, shape)
    dims = (2, 3) if over == "filter" else (1, 2, 3)
    op = torch.ops.adafm.modulate_normalized.default
    moved = moved_forward(layer.arena, BF16)

    def normalised(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(weight, dims, keepdim=True)
        return gamma * ((weight - mean) / deviation.clamp_min(_EPS)) + beta

    plain = stored(normalised, BF16, LAST)
    arguments = (layer.packed, layer.gamma, layer.beta)
    methods = [
        Method(OURS, lambda: op(*arguments, over, _EPS, BF16, LAST, "compiled")),
        Method(BROADCAST, lambda: plain(*arguments)),
        *setup.compiled_method(plain, *arguments, name=COMPILE_PACKED),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    truth = lambda: [normalised(layer.weight.double(), layer.gamma.double(), layer.beta.double())]  # noqa: E731
    return Case(f"normalised by {over}", shapes.text(shape), moved, methods, truth)


def _per_sample(setup: Setup, shape: shapes.Shape, count: int) -> Case:
    layer = Layer(setup, shape)
    chance = torch.Generator(setup.device).manual_seed(1)
    gamma, beta = (torch.randn(count, *shape[:2], device=setup.device, generator=chance) for _ in range(2))
    op = torch.ops.adafm.modulate_per_sample.default
    moved = layer.arena.weights * (4 + 2 * count) + 8 * count * layer.arena.filters

    def every(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return gamma[..., None, None] * weight + beta[..., None, None]

    def plain(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        # [N, O, I, kh, kw], each sample channels-last.
        return every(weight, gamma, beta).to(BF16).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)

    def one_by_one() -> list[Tensor]:
        return [modulate(layer.packed, g, b, dtype=BF16, backend="compiled") for g, b in zip(gamma, beta, strict=True)]

    arguments = (layer.packed, gamma, beta)
    methods = [
        Method(OURS, lambda: op(*arguments, BF16, LAST, "compiled")),
        Method(ONE_BY_ONE, one_by_one, lambda: torch.stack(one_by_one())),
        Method(BROADCAST, lambda: plain(*arguments)),
        *setup.compiled_method(plain, *arguments, name=COMPILE_PACKED),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    truth = lambda: [every(layer.weight.double(), gamma.double(), beta.double())]  # noqa: E731
    return Case(f"samples {count}", shapes.text(shape), moved, methods, truth)


def _lowrank(setup: Setup, shape: shapes.Shape, rank: int) -> Case:
    layer = Layer(setup, shape)
    chance = torch.Generator(setup.device).manual_seed(1)
    draw = lambda *size: torch.randn(*size, device=setup.device, generator=chance)  # noqa: E731
    u, s, v = draw(shape[0], rank), draw(rank), draw(shape[1], rank)
    op = torch.ops.adafm.modulate_lowrank.default
    moved = layer.arena.weights * 6 + 8 * layer.arena.filters + 4 * rank * (shape[0] + shape[1] + 1)

    def formed(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return modulate(weight, gamma[..., 0, 0] + (u * s) @ v.T, beta, dtype=BF16, backend="compiled")

    def plain(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        total = gamma + ((u * s) @ v.T)[:, :, None, None]
        return (total * weight + beta).to(BF16, memory_format=LAST)

    arguments = (layer.packed, layer.gamma, layer.beta)
    methods = [
        Method(OURS, lambda: op(layer.packed, layer.gamma, u, s, v, layer.beta, BF16, LAST, "compiled")),
        Method(FORM_FIRST, lambda: formed(*arguments)),
        Method(BROADCAST, lambda: plain(*arguments)),
        *setup.compiled_method(plain, *arguments, name=COMPILE_PACKED),
        Method(COPY, copy_of(moved, setup.device)),
    ]

    def truth() -> list[Tensor]:
        total = layer.gamma.double() + ((u.double() * s.double()) @ v.double().T)[:, :, None, None]
        return [total * layer.weight.double() + layer.beta.double()]

    return Case(f"rank {rank}", shapes.text(shape), moved, methods, truth)


def _tiny(setup: Setup) -> Iterator[Case]:
    layer = Layer(setup, TINY)
    leaves, grad = layer.leaves(), layer.weight.flip(0).contiguous()
    moved = moved_forward(layer.arena, torch.float32)

    forward = [
        Method(OURS, lambda: modulate(layer.weight, *leaves)),
        Method(AUTHORS, lambda: authors(layer.weight, *leaves)),
        Method(BROADCAST, lambda: broadcast(layer.weight, *leaves)),
        *setup.compiled_method(broadcast, layer.weight, *leaves),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    yield Case("tiny forward", shapes.text(TINY), moved, forward, layer.truth)

    def differentiated(call: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(call(), leaves, grad)

    moved += moved_backward(layer.arena, torch.float32)
    both = [
        *(Method(method.name, differentiated(method.run)) for method in forward[:3]),
        *setup.compiled_method(broadcast, layer.weight, *leaves, use=differentiated),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    yield Case(
        "tiny forward + backward", shapes.text(TINY), moved, both, lambda: layer.sums(grad), TINY[2] * TINY[3] + 2.0
    )
