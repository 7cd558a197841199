"""Checks a backend on this machine, op by op: values, first and second derivatives against float64.

The truth is each op's formula written out in plain PyTorch and differentiated by autograd in float64; it uses none of
the package's ops. The ops that work in a network's arenas are checked in ``verify_arena``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .family import modulate_lowrank, modulate_many, modulate_normalized, modulate_per_sample
from .functional import modulate
from .verify_adam import verify_adam
from .verify_arena import verify_arena
from .verify_check import Check, compare, normal

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """An op to check: shapes of its arguments for a weight's shape, how it is called, and its formula."""

    name: str
    shapes: Callable[[_Shape], dict[str, _Shape]]
    call: Callable[..., Any]
    plain: Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One weight to modulate: its shape and type, the type of the result, and the layouts."""

    name: str
    shape: _Shape
    dtype: torch.dtype = torch.float32
    result: torch.dtype = torch.float32
    channels_last: bool = False


CASES = (
    Case("linear 5x7 float32", (5, 7)),
    Case("3x3 float64", (6, 5, 3, 3), torch.float64, torch.float64),
    Case("3x3 float32", (6, 5, 3, 3)),
    Case("3x3 float32 channels-last", (6, 16, 3, 3), channels_last=True),
    Case("3x3 float32 to bfloat16 channels-last", (6, 16, 3, 3), result=torch.bfloat16, channels_last=True),
    Case("4x4 float32 to float16", (3, 8, 4, 4), result=torch.float16),
    Case("1x3 bfloat16", (3, 8, 1, 3), torch.bfloat16, torch.bfloat16),
)
# The other ops share their arithmetic with modulate; these tell their layouts, types and tails apart.
FAMILY_CASES = tuple(case for case in CASES if case.name.startswith("3x3"))


def _pairs(shape: _Shape) -> _Shape:
    return (*shape[:2], *(1,) * (len(shape) - 2))


def _one(shape: _Shape) -> dict[str, _Shape]:
    return {"weight": shape, "gamma": _pairs(shape), "beta": _pairs(shape)}


def _many(shape: _Shape) -> dict[str, _Shape]:
    layers = (shape, (3, 8, 4, 4), (5, 7))
    return {f"{name} {n}": part for n, layer in enumerate(layers) for name, part in _one(layer).items()}


def _per_sample(shape: _Shape) -> dict[str, _Shape]:
    return {"weight": shape, "gamma": (3, *_pairs(shape)), "beta": (3, *_pairs(shape))}


def _lowrank(shape: _Shape) -> dict[str, _Shape]:
    outer, inner, rank = *shape[:2], 3
    factors = {"u": (outer, rank), "s": (rank,), "v": (inner, rank)}
    return {"weight": shape, "gamma": _pairs(shape), **factors, "beta": _pairs(shape)}


def _plain(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return gamma * weight + beta


def _plain_normalized(dims: tuple[int, ...]) -> Callable[..., Tensor]:
    def plain(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        mean, deviation = weight.mean(dims, keepdim=True), weight.std(dims, keepdim=True)
        return gamma * (weight - mean) / deviation + beta

    return plain


def _plain_lowrank(weight: Tensor, gamma: Tensor, u: Tensor, s: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return (gamma + ((u * s) @ v.t()).view(gamma.shape)) * weight + beta


def _call_many(*tensors: Tensor, **settings: Any) -> list[Tensor]:
    return modulate_many(tensors[0::3], tensors[1::3], tensors[2::3], **settings)


def _plain_many(*tensors: Tensor) -> list[Tensor]:
    return [_plain(*tensors[first : first + 3]) for first in range(0, len(tensors), 3)]


def _call_over_channels(*tensors: Tensor, **settings: Any) -> Tensor:
    return modulate_normalized(*tensors, over="channel", **settings)


MODULATE = Op("modulate", _one, modulate, _plain)
FAMILY = (
    Op("modulate_many", _many, _call_many, _plain_many),
    Op("modulate_per_sample", _per_sample, modulate_per_sample, _plain),
    Op("modulate_normalized", _one, modulate_normalized, _plain_normalized((2, 3))),
    Op("modulate_normalized", _one, _call_over_channels, _plain_normalized((1, 2, 3))),
    Op("modulate_lowrank", _lowrank, modulate_lowrank, _plain_lowrank),
)


def verify(backend: str, device: str) -> list[Check]:
    """Compare one backend on one device with float64, op by op. Errors of the backend itself are not caught."""
    pairs = [(MODULATE, case) for case in CASES] + [(op, case) for op in FAMILY for case in FAMILY_CASES]
    checks = [check for op, case in pairs for check in _verify_case(op, case, backend, device)]
    return checks + verify_arena(backend, device) + verify_adam(backend, device)


def _verify_case(op: Op, case: Case, backend: str, device: str) -> list[Check]:
    names, points = _points(op, case, device)
    layout = torch.channels_last if case.channels_last else None

    def candidate(*tensors: Tensor) -> Any:
        return op.call(*tensors, dtype=case.result, memory_format=layout, backend=backend)

    with torch.no_grad():
        shapes = [value.shape for value in _listed(op.plain(*points))]
    count = len(points)
    grads = [normal(shape, case.result, device, count + n) for n, shape in enumerate(shapes)]
    directions = [normal(p.shape, p.dtype, device, count + len(grads) + n) for n, p in enumerate(points)]
    if case.channels_last:
        grads, directions = _channels_last(grads), _channels_last(directions)
    found = _derivatives(candidate, names, points, grads, directions)
    wide = ([t.double() for t in group] for group in (points, grads, directions))
    truth = _derivatives(op.plain, names, *wide)
    return [
        compare(backend, device, op.name if what.startswith("value") else f"{op.name}_backward", case.name, what, *both)
        for what, both in ((what, (value, truth[what])) for what, value in found.items())
    ]


def _points(op: Op, case: Case, device: str) -> tuple[list[str], list[Tensor]]:
    """Names and values of the op's arguments."""
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    shapes = op.shapes(case.shape)
    points = [
        normal(shape, case.dtype if name.startswith("weight") else wide, device, seed)
        for seed, (name, shape) in enumerate(shapes.items())
    ]
    return list(shapes), _channels_last(points) if case.channels_last else points


def _channels_last(tensors: list[Tensor]) -> list[Tensor]:
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _derivatives(
    function: Callable[..., Any],
    names: Sequence[str],
    points: Sequence[Tensor],
    grads: Sequence[Tensor],
    directions: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Values, gradients of sum(grad * value), and gradients of sum(direction * gradient) by points and grads."""
    points, grads = ([t.detach().clone().requires_grad_() for t in group] for group in (points, grads))
    values = _listed(function(*points))
    first = torch.autograd.grad(values, points, grads, create_graph=True)
    second = torch.autograd.grad(first, (*points, *grads), directions, materialize_grads=True)
    numbers = [""] if len(values) == 1 else [f" {n}" for n in range(len(values))]
    keys = [f"value{n}" for n in numbers] + [f"d {name}" for name in names]
    keys += [f"dd {name}" for name in names] + [f"dd grad{n}" for n in numbers]
    return {key: tensor.detach() for key, tensor in zip(keys, (*values, *first, *second), strict=True)}
