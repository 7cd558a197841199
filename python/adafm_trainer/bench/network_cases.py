"""All modulated layers of a network: modulate, reduce, and the whole parameter step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from adafm_kernels import backends, modulate

from . import shapes
from .arena import Arena, arena_op
from .baselines import AUTHORS, BROADCAST, authors, backward, broadcast, copy_of, stored, through_autograd
from .case import Case, Setup
from .layer_cases import BF16, LAST, arena_backward, arena_forward, moved_backward, moved_forward, ours
from .measure import COPY, Method

LAYER_BY_LAYER, UNFUSED = "ours, layer by layer", "ours, unfused"

ROWS = {
    "network forward": "forward to bf16 channels-last in one call",
    "network backward": "backward (dgamma, dbeta) of bf16 in one call",
    "network step": "backward, Adam, average and next forward in one call",
}

# Adam and the running average; eps is far above the rounding of sums, so that every way can be held to one result.
_LR, _BETAS, _EPS, _DECAY = 1e-4, (0.5, 0.99), 1e-2, 0.999


def network_cases(setup: Setup) -> Iterator[Case]:
    """The rows of ROWS for the generators, on a GPU for the discriminator too."""
    names = ["G128"] if setup.quick else ["G128", "G256", *(["D128"] if setup.device == "cuda" else [])]
    for name in names:
        for row in ROWS:
            yield network_case(setup, row, name)


def network_case(setup: Setup, row: str, name: str) -> Case:
    """One row of ROWS on one of shapes.NETWORKS."""
    layers = shapes.network_layers(name, small=setup.quick)
    return _BUILDERS[row](setup, layers, f"{name}{' / 8' if setup.quick else ''} ({len(layers)} layers)")


def _forward(setup: Setup, layers: tuple[shapes.Shape, ...], label: str) -> Case:
    arena = Arena(layers, setup.device)
    packed, weights = _weights(arena)
    gammas, betas = arena.parameters()
    moved = moved_forward(arena, BF16)
    old, plain = (partial(_each, stored(expression, BF16, LAST)) for expression in (authors, broadcast))
    own = partial(_each, lambda w, g, b: modulate(w, g, b, dtype=BF16, backend="compiled"))
    methods = [
        *arena_forward(setup, arena, BF16),
        Method(LAYER_BY_LAYER, lambda: own(packed, gammas, betas)),
        Method(AUTHORS, lambda: old(weights, gammas, betas)),
        Method(BROADCAST, lambda: plain(weights, gammas, betas)),
        *setup.compiled_method(plain, weights, gammas, betas),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    return Case("network forward", label, moved, methods, lambda: _truth(weights, gammas, betas))


def _backward(setup: Setup, layers: tuple[shapes.Shape, ...], label: str) -> Case:
    arena = Arena(layers, setup.device)
    packed, weights = _weights(arena)
    buffer = arena.random(BF16)
    grads = arena.views(buffer)
    moved = moved_backward(arena, BF16)
    own, mask = backends.implementation(arena.weight.device, "compiled").modulate_backward, [False, True, True]

    def by_layer() -> list[Tensor]:
        sums = [own(g, w, None, mask, LAST) for g, w in zip(grads, packed, strict=True)]
        return [row[1] for row in sums] + [row[2] for row in sums]

    def written_out(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        sums = [backward(g, w) for g, w in zip(grads, weights, strict=True)]
        return [row[0] for row in sums] + [row[1] for row in sums]

    def eager(expression: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        gammas, betas = arena.parameters(requires_grad=True)
        outs = _each(stored(expression, BF16, LAST), weights, gammas, betas)
        return through_autograd(outs, [*gammas, *betas], grads)

    methods = [
        *arena_backward(setup, arena, buffer),
        Method(LAYER_BY_LAYER, by_layer),
        Method(AUTHORS, eager(authors)),
        Method(BROADCAST, eager(broadcast)),
        *setup.compiled_method(written_out, grads, weights),
        Method(COPY, copy_of(moved, setup.device)),
    ]
    units = layers[0][2] * layers[0][3] + 2.0
    return Case("network backward", label, moved, methods, lambda: _sums(grads, weights), units)


def _step(setup: Setup, layers: tuple[shapes.Shape, ...], label: str) -> Case:
    arena = Arena(layers, setup.device)
    _, weights = _weights(arena)
    buffer = arena.random(BF16)
    # Read: G, W, and the parameters, both moments and the average of gamma and of beta; written: all of them, and W'.
    moved = arena.weights * (2 + 4 + 2) + arena.filters * 2 * 4 * 8
    methods = [
        *(_fused_step(setup, arena, buffer, backend) for backend in ("compiled", *setup.backends)),
        _unfused_step(setup, arena, buffer),
        _authors_step(arena, weights, arena.views(buffer)),
        Method(COPY, copy_of(moved, setup.device)),
    ]

    def truth() -> list[Tensor]:
        count = len(weights)
        sums = _sums(arena.views(buffer), weights)
        gammas, betas = arena.parameters()
        updated = []
        for parameter, slope in zip([*gammas, *betas], sums, strict=True):
            updated.append(parameter.double()[..., 0, 0] - _LR * slope / (slope.abs() + _EPS))
        outs = _truth(weights, *([p[..., None, None] for p in half] for half in (updated[:count], updated[count:])))
        return [*updated, *outs]

    return Case("network step", label, moved, methods, truth, 4.0)


class _State:
    """Parameters (gamma, then beta), Adam's moments and the average, each ``[2, pairs]``, and the next W'."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.parameters = torch.stack([arena.gamma, arena.beta])
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.parameters), torch.zeros_like(self.parameters)
        self.average, self.out = self.parameters.clone(), arena.empty(BF16)

    def result(self) -> list[Tensor]:
        pairs = [view for half in self.parameters for view in self.arena.pair_views(half)]
        return [*pairs, *self.arena.views(self.out)]


def _fused_step(setup: Setup, arena: Arena, grad: Tensor, backend: str) -> Method:
    op, state = arena_op("step_many", backend, setup.device), _State(arena)
    corrections = [1.0 / (1.0 - beta) for beta in _BETAS]
    hyper = torch.tensor([_LR, *_BETAS, _EPS, *corrections, _DECAY, 0.0], device=setup.device)
    buffers = {name: getattr(state, name) for name in ("parameters", "exp_avg", "exp_avg_sq", "average", "out")}
    return Method(
        ours(backend), lambda: op(grad, arena.weight, arena.layers, arena.tiles, hyper, **buffers), state.result
    )


def _unfused_step(setup: Setup, arena: Arena, grad: Tensor) -> Method:
    """The same from the whole-network ops, PyTorch's fused Adam over the flat parameters, and one lerp."""
    state = _State(arena)
    reduce, forward = (
        arena_op(f"modulate_many{form}_out", "compiled", setup.device) for form in ("_backward", "")
    )  # fmt: skip
    state.parameters.grad = torch.zeros_like(state.parameters)
    optimizer = torch.optim.Adam([state.parameters], lr=_LR, betas=_BETAS, eps=_EPS, fused=True)

    def run() -> None:
        d_gamma, d_beta = state.parameters.grad
        outs = {"grad_weight": None, "grad_gamma": d_gamma, "grad_beta": d_beta}
        reduce(grad, arena.weight, None, arena.layers, arena.tiles, **outs)
        optimizer.step()
        state.average.lerp_(state.parameters, 1 - _DECAY)
        gamma, beta = state.parameters
        forward(arena.weight, gamma, beta, arena.layers, arena.tiles, out=state.out)

    return Method(UNFUSED, run, state.result)


def _authors_step(arena: Arena, weights: list[Tensor], grads: list[Tensor]) -> Method:
    """The released code's way: autograd, Adam with PyTorch's defaults, averages tensor by tensor, next forward."""
    gammas, betas = arena.parameters(requires_grad=True)
    leaves = [*gammas, *betas]
    averages = [leaf.detach().clone() for leaf in leaves]
    optimizer = torch.optim.Adam(leaves, lr=_LR, betas=_BETAS, eps=_EPS)
    forward = partial(_each, stored(authors, BF16, LAST), weights, gammas, betas)
    outs = forward()

    def run() -> None:
        nonlocal outs
        for leaf, slope in zip(leaves, torch.autograd.grad(outs, leaves, grads), strict=True):
            leaf.grad = slope
        optimizer.step()
        with torch.no_grad():
            for average, leaf in zip(averages, leaves, strict=True):
                average.mul_(_DECAY).add_(leaf, alpha=1 - _DECAY)
        outs = forward()

    return Method(AUTHORS, run, lambda: [*leaves, *outs])


def _weights(arena: Arena) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' weights as the arena holds them, and contiguous copies."""
    packed = arena.views(arena.weight)
    return packed, [weight.contiguous() for weight in packed]


def _each(function: Callable[..., Tensor], *lists: list[Tensor]) -> list[Tensor]:
    return [function(*arguments) for arguments in zip(*lists, strict=True)]


def _truth(weights: list[Tensor], gammas: list[Tensor], betas: list[Tensor]) -> list[Tensor]:
    return _each(lambda w, g, b: g.double() * w.double() + b.double(), weights, gammas, betas)


def _sums(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    wide = [(g.double(), w.double()) for g, w in zip(grads, weights, strict=True)]
    return [(g * w).sum((2, 3)) for g, w in wide] + [g.sum((2, 3)) for g, _ in wide]


_BUILDERS = {"network forward": _forward, "network backward": _backward, "network step": _step}
