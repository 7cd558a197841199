"""One layer: modulate and its backward, in the forms that a plan and that a single call use."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from adafm_kernels import modulate

from . import shapes
from .arena import Arena, arena_op
from .baselines import (
    AUTHORS,
    BROADCAST,
    COMPILE_BARE,
    COMPILE_PACKED,
    PARAMETRIZE,
    authors,
    backward,
    broadcast,
    copy_of,
    parametrized,
    stored,
    through_autograd,
)
from .case import Case, Setup
from .measure import COPY, OURS, Method

BF16, LAST, PLAIN = torch.bfloat16, torch.channels_last, torch.contiguous_format

ROWS = {
    "forward": "forward to bf16 channels-last: W prepacked, output reused",
    "backward": "backward (dgamma, dbeta) of bf16 channels-last: W prepacked, outputs reused",
    "call bf16": "`modulate()` to bf16 channels-last: W contiguous, output fresh",
    "call fp32": "`modulate()` in fp32: W contiguous, output fresh",
    "call backward": "`modulate()` to bf16 channels-last, its backward through autograd: W contiguous",
}


def layer_cases(setup: Setup) -> Iterator[Case]:
    """Every row of ROWS on the shapes of the geometric mean, then on the listed ones."""
    inside = shapes.mean_shapes()[:1] if setup.quick else shapes.mean_shapes()
    for shape in inside + ([] if setup.quick else shapes.listed_shapes()):
        for row in ROWS:
            case = layer_case(setup, row, shape)
            case.mean = shape in inside
            yield case


def layer_case(setup: Setup, row: str, shape: shapes.Shape) -> Case:
    """One row of ROWS on one filter."""
    return _BUILDERS[row](setup, shape)


def moved_forward(arena: Arena, result: torch.dtype) -> int:
    """Bytes read and written: W, W', gamma, beta."""
    return arena.weights * (arena.dtype.itemsize + result.itemsize) + 8 * arena.filters


def moved_backward(arena: Arena, grad: torch.dtype, with_weight: bool = False) -> int:
    """Bytes read and written: G, W, dgamma, dbeta; with dW also that and gamma."""
    own = 4 * arena.filters + arena.weights * arena.dtype.itemsize if with_weight else 0
    return arena.weights * (arena.dtype.itemsize + grad.itemsize) + 8 * arena.filters + own


class Layer:
    """One layer's arena, and its tensors as a user of plain PyTorch holds them."""

    def __init__(self, setup: Setup, shape: shapes.Shape, dtype: torch.dtype = torch.float32) -> None:
        self.arena = Arena([shape], setup.device, dtype)
        (self.packed,) = self.arena.views(self.arena.weight)
        self.weight = self.packed.contiguous()
        self.gamma, self.beta = (parameters[0] for parameters in self.arena.parameters())

    def leaves(self) -> tuple[Tensor, Tensor]:
        """gamma and beta that need gradients."""
        return tuple(tensor.clone().requires_grad_() for tensor in (self.gamma, self.beta))

    def truth(self) -> list[Tensor]:
        return [self.gamma.double() * self.weight.double() + self.beta.double()]

    def sums(self, grad: Tensor) -> list[Tensor]:
        wide = grad.double()
        return [(wide * self.weight.double()).sum((2, 3)), wide.sum((2, 3))]


def ours(backend: str) -> str:
    """Name of the way that a backend serves."""
    return OURS if backend == "compiled" else f"{OURS} ({backend})"


def arena_forward(setup: Setup, arena: Arena, result: torch.dtype) -> list[Method]:
    """The whole-network op into a buffer, by every backend of the device."""
    arguments = (arena.weight, arena.gamma, arena.beta, arena.layers, arena.tiles)

    def method(backend: str) -> Method:
        op, out = arena_op("modulate_many_out", backend, setup.device), arena.empty(result)
        return Method(ours(backend), lambda: op(*arguments, out=out), lambda: arena.views(out))

    return [method(backend) for backend in ("compiled", *setup.backends)]


def arena_backward(setup: Setup, arena: Arena, grad: Tensor, with_weight: bool = False) -> list[Method]:
    """The whole-network backward into buffers, by every backend of the device."""
    arguments = (grad, arena.weight, arena.gamma if with_weight else None, arena.layers, arena.tiles)

    def method(backend: str) -> Method:
        op = arena_op("modulate_many_backward_out", backend, setup.device)
        d_weight = arena.empty(arena.dtype) if with_weight else None
        d_gamma, d_beta = arena.empty_pairs(), arena.empty_pairs()
        outs = {"grad_weight": d_weight, "grad_gamma": d_gamma, "grad_beta": d_beta}

        def result() -> list[Tensor]:
            scaled = arena.views(d_weight) if with_weight else []
            return [*scaled, *arena.pair_views(d_gamma), *arena.pair_views(d_beta)]

        return Method(ours(backend), lambda: op(*arguments, **outs), result)

    return [method(backend) for backend in ("compiled", *setup.backends)]


def _forward(setup: Setup, shape: shapes.Shape) -> Case:
    layer = Layer(setup, shape)
    old, plain = stored(authors, BF16, LAST), stored(broadcast, BF16, LAST)
    moved = moved_forward(layer.arena, BF16)
    arguments = (layer.weight, layer.gamma, layer.beta)
    methods = [
        *arena_forward(setup, layer.arena, BF16),
        Method(AUTHORS, lambda: old(*arguments)),
        Method(BROADCAST, lambda: plain(*arguments)),
        *setup.compiled_method(plain, *arguments),
        *setup.compiled_method(plain, layer.packed, layer.gamma, layer.beta, name=COMPILE_PACKED),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    return Case("forward", shapes.text(shape), moved, methods, layer.truth)


def _backward(setup: Setup, shape: shapes.Shape) -> Case:
    layer = Layer(setup, shape)
    buffer = layer.arena.random(BF16)
    (grad,) = layer.arena.views(buffer)
    moved = moved_backward(layer.arena, BF16)
    methods = [
        *arena_backward(setup, layer.arena, buffer),
        *_eager_backward(layer, grad),
        *setup.compiled_method(backward, grad, layer.weight),
        *setup.compiled_method(backward, grad, layer.packed, name=COMPILE_PACKED),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    return Case("backward", shapes.text(shape), moved, methods, lambda: layer.sums(grad), shape[2] * shape[3] + 2.0)


def _eager_backward(layer: Layer, grad: Tensor) -> list[Method]:
    methods = []
    for name, expression in ((AUTHORS, authors), (BROADCAST, broadcast)):
        leaves = layer.leaves()
        out = stored(expression, grad.dtype, LAST)(layer.weight, *leaves)
        methods.append(Method(name, through_autograd(out, leaves, grad)))
    return methods


def _call(setup: Setup, shape: shapes.Shape, row: str, dtype: torch.dtype, layout: torch.memory_format) -> Case:
    layer = Layer(setup, shape)
    old, plain = stored(authors, dtype, layout), stored(broadcast, dtype, layout)
    moved = moved_forward(layer.arena, dtype)
    arguments = (layer.weight, layer.gamma, layer.beta)
    module = parametrized(*arguments)

    def call(backend: str) -> Method:
        run = lambda: modulate(*arguments, dtype=dtype, memory_format=layout, backend=backend)  # noqa: E731
        return Method(ours(backend), run)

    methods = [
        *map(call, ("compiled", *setup.backends)),
        Method(AUTHORS, lambda: old(*arguments)),
        Method(BROADCAST, lambda: plain(*arguments)),
        *setup.compiled_method(plain, *arguments),
        Method(PARAMETRIZE, lambda: module.weight.to(dtype, memory_format=layout)),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    return Case(row, shapes.text(shape), moved, methods, layer.truth)


def _call_backward(setup: Setup, shape: shapes.Shape) -> Case:
    layer = Layer(setup, shape)
    (grad,) = layer.arena.views(layer.arena.random(BF16))
    moved = moved_backward(layer.arena, BF16)
    leaves, own = layer.leaves(), layer.leaves()
    out = modulate(layer.weight, *leaves, dtype=BF16, memory_format=LAST, backend="compiled")
    methods = [
        Method(OURS, through_autograd(out, leaves, grad)),
        *_eager_backward(layer, grad),
        *setup.compiled_method(
            stored(broadcast, BF16, LAST), layer.weight, *own, use=lambda call: through_autograd(call(), own, grad)
        ),
        *setup.compiled_method(backward, grad, layer.weight, name=COMPILE_BARE),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    units = shape[2] * shape[3] + 2.0
    return Case("call backward", shapes.text(shape), moved, methods, lambda: layer.sums(grad), units)


_BUILDERS = {
    "forward": _forward,
    "backward": _backward,
    "call bf16": partial(_call, row="call bf16", dtype=BF16, layout=LAST),
    "call fp32": partial(_call, row="call fp32", dtype=torch.float32, layout=PLAIN),
    "call backward": _call_backward,
}
