"""The ops ``adafm::modulate_many`` and ``adafm::modulate_many_backward``: all weights of a network in one launch.

    modulate_many            W'[l] = gamma[l] * W[l] + beta[l]
    modulate_many_backward   dW[l] = gamma[l] * G[l],  dgamma[l] = sum over K of G[l] * W[l],  dbeta[l] = sum of G[l]

Weights, gammas and betas are lists of one length; the weights share a type and a device. A gamma or beta that is not
wanted is a one or zero of shape [1, 1]: a list of an op holds tensors only, or PyTorch drops its gradients. Order of
differentiation: any. Value and first derivative are one launch each; higher derivatives are those of ``_ops``, layer by
layer. Forward mode is not supported.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import _arguments, backends
from ._ops import (
    Modulate,
    ModulateBackward,
    _fit,
    _library,
    _like,
    _modulate_backward_gradients,
    _vmap_modulate,
    _vmap_modulate_backward,
    _widened,
)

_library.define(
    "modulate_many(Tensor[] weights, Tensor[] gammas, Tensor[] betas, ScalarType? dtype=None, "
    "MemoryFormat? memory_format=None, str? backend=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "modulate_many_backward(Tensor[] grads, Tensor[] weights, Tensor[] gammas, bool[3] mask, str? backend=None) "
    "-> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_Tensors = Sequence[Tensor]


def _modulate_many(
    weights: _Tensors,
    gammas: _Tensors,
    betas: _Tensors,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    _arguments.check_modulate_many(weights, gammas, betas, dtype)
    if not weights:
        return []
    layouts = [_arguments.result_format_of_many(weight, memory_format) for weight in weights]
    return backends.implementation(weights[0].device, backend).modulate_many(
        list(weights), _over_pairs(gammas, weights), _over_pairs(betas, weights), dtype or weights[0].dtype, layouts
    )


def _modulate_many_fake(
    weights: _Tensors,
    gammas: _Tensors,
    betas: _Tensors,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    _arguments.check_modulate_many(weights, gammas, betas, dtype)
    layouts = [_arguments.result_format_of_many(weight, memory_format) for weight in weights]
    return [
        torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device, memory_format=layout)
        for weight, layout in zip(weights, layouts, strict=True)
    ]


def _modulate_many_backward(
    grads: _Tensors, weights: _Tensors, gammas: _Tensors, mask: Sequence[bool], backend: str | None = None
) -> list[Tensor]:
    _arguments.check_modulate_many_backward(grads, weights, gammas, mask)
    if not weights or not any(mask):
        return []
    layouts = [_arguments.result_format(weight, None) for weight in weights]
    return backends.implementation(weights[0].device, backend).modulate_many_backward(
        list(grads), list(weights), _over_pairs(gammas, weights), list(mask), layouts
    )


def _modulate_many_backward_fake(
    grads: _Tensors, weights: _Tensors, gammas: _Tensors, mask: Sequence[bool], backend: str | None = None
) -> list[Tensor]:
    _arguments.check_modulate_many_backward(grads, weights, gammas, mask)
    results = []
    if mask[0]:
        results += [torch.empty_like(w, memory_format=_arguments.result_format(w, None)) for w in weights]
    for asked in mask[1:]:
        if asked:
            results += [w.new_empty(w.shape[:2], dtype=_arguments.accumulation_type(w)) for w in weights]
    return results


def _over_pairs(parameters: _Tensors, weights: _Tensors) -> list[Tensor]:
    return [_arguments.over_pairs(parameter, weight) for parameter, weight in zip(parameters, weights, strict=True)]


def _groups(results: _Tensors, mask: Sequence[bool], count: int) -> list[list[Tensor | None]]:
    """dW, dgamma and dbeta of every layer; None for groups that were not asked for."""
    left = list(results)
    groups: list[list[Tensor | None]] = []
    for asked in mask:
        groups.append(left[:count] if asked else [None] * count)
        left = left[count:] if asked else left
    return groups


def _split(needs: Sequence[bool], count: int) -> list[list[bool]]:
    """Which tensors of each of the three lists ask for gradients; the lists' tensors come one after the other."""
    return [[bool(needed) for needed in needs[first : first + count]] for first in (0, count, 2 * count)]


def _setup(ctx: Any, weights: _Tensors, gammas: _Tensors, betas: _Tensors, needs: list, backend: Any) -> None:
    """``needs``: for weights, gammas and betas, which of each ask for gradients."""
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.backend, ctx.count = needs, backend, len(weights)
    ctx.mask = [any(group) for group in needs]
    ctx.gamma_likes, ctx.beta_likes = [_like(p) for p in gammas], [_like(p) for p in betas]
    ctx.wide = bool(weights) and weights[0].dtype == torch.float64
    # dbeta needs G alone, dgamma W as well, dW gamma and the weight's type and layout.
    keep_weights, keep_gammas = ctx.mask[0] or ctx.mask[1], ctx.mask[0]
    ctx.save_for_backward(
        *(w if keep_weights else None for w in weights), *(g if keep_gammas else None for g in gammas)
    )


def _gradients(ctx: Any, grads: Sequence[Tensor | None], backward_op: Callable) -> tuple[list, list, list]:
    count = ctx.count
    weights, gammas = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    results: tuple[list, list, list] = ([None] * count, [None] * count, [None] * count)
    live = [number for number in range(count) if grads[number] is not None]
    if not live or not any(ctx.mask):
        return results
    given = [grads[number] for number in live]
    if weights[0] is None:
        weights = [None if grad is None else _widened(grad, ctx.wide) for grad in grads]
    if gammas[0] is None:
        gammas = [given[0].new_ones((1, 1))] * count
    found = backward_op(
        given, [weights[number] for number in live], [gammas[number] for number in live], ctx.mask, ctx.backend
    )
    groups = _groups(found, ctx.mask, len(live))
    for position, number in enumerate(live):
        if ctx.needs[0][number]:
            results[0][number] = groups[0][position]
        if ctx.needs[1][number]:
            results[1][number] = _fit(groups[1][position], ctx.gamma_likes[number])
        if ctx.needs[2][number]:
            results[2][number] = _fit(groups[2][position], ctx.beta_likes[number])
    return results


def _setup_backward(
    ctx: Any, grads: _Tensors, weights: _Tensors, gammas: _Tensors, mask: Sequence[bool], needs: list, backend: Any
) -> None:
    """``needs``: for grads, weights and gammas, which of each ask for gradients."""
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.mask, ctx.backend, ctx.count = needs, list(mask), backend, len(weights)
    ctx.shapes, ctx.gamma_likes = [w.shape for w in weights], [_like(g) for g in gammas]
    ctx.types = (grads[0].dtype, weights[0].dtype) if weights else None
    of_grads, of_weights, of_gammas = (any(group) for group in needs)
    keep_grads = (mask[1] and of_weights) or (mask[0] and of_gammas)
    ctx.save_for_backward(
        *(g if keep_grads else None for g in grads),
        *(w if mask[1] and of_grads else None for w in weights),
        *(g if mask[0] and of_grads else None for g in gammas),
    )


def _backward_gradients(
    ctx: Any, us: Sequence[Tensor | None], op: Callable, backward_op: Callable
) -> tuple[list, list, list]:
    count = ctx.count
    saved = ctx.saved_tensors
    groups = _groups(us, ctx.mask, count)
    results: tuple[list, list, list] = ([None] * count, [None] * count, [None] * count)
    for number in range(count):
        one = SimpleNamespace(
            needs=[bool(group[number]) for group in ctx.needs],
            mask=ctx.mask,
            backend=ctx.backend,
            wide=ctx.types[1] == torch.float64,
            shape=ctx.shapes[number],
            grad_dtype=ctx.types[0],
            weight_dtype=ctx.types[1],
            gamma_like=ctx.gamma_likes[number],
            saved_tensors=saved[number::count],
        )
        found = _modulate_backward_gradients(one, *(group[number] for group in groups), op, backward_op)
        for result, gradient in zip(results, found, strict=False):
            result[number] = gradient
    return results


class ModulateMany(torch.autograd.Function):
    """``modulate_many`` with derivatives of any order; after the settings all weights, all gammas, all betas."""

    @staticmethod
    def forward(count, dtype, memory_format, backend, *tensors):
        weights, gammas, betas = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        op = torch.ops.adafm.modulate_many.default
        return tuple(op(list(weights), list(gammas), list(betas), dtype, memory_format, backend))

    @staticmethod
    def setup_context(ctx, inputs, output):
        count, _, _, backend, *tensors = inputs
        needs = _split(ctx.needs_input_grad[4:], count)
        _setup(ctx, tensors[:count], tensors[count : 2 * count], tensors[2 * count :], needs, backend)

    @staticmethod
    def backward(ctx, *grads):
        groups = _gradients(ctx, grads, _apply_backward)
        return (None, None, None, None, *groups[0], *groups[1], *groups[2])

    @staticmethod
    def vmap(info, in_dims, count, dtype, memory_format, backend, *tensors):
        results = []
        for number in range(count):
            layer, dims = tensors[number::count], in_dims[4:][number::count]
            results.append(_vmap_modulate(Modulate.apply, info, dims, *layer, dtype, memory_format, backend)[0])
        return tuple(results), (0,) * count


class ModulateManyBackward(torch.autograd.Function):
    """``modulate_many_backward`` with derivatives of any order; after the settings all grads, weights, gammas."""

    @staticmethod
    def forward(count, mask, backend, *tensors):
        grads, weights, gammas = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        op = torch.ops.adafm.modulate_many_backward.default
        return tuple(op(list(grads), list(weights), list(gammas), mask, backend))

    @staticmethod
    def setup_context(ctx, inputs, output):
        count, mask, backend, *tensors = inputs
        needs = _split(ctx.needs_input_grad[3:], count)
        _setup_backward(ctx, tensors[:count], tensors[count : 2 * count], tensors[2 * count :], mask, needs, backend)

    @staticmethod
    def backward(ctx, *us):
        groups = _backward_gradients(ctx, us, Modulate.apply, ModulateBackward.apply)
        return (None, None, None, *groups[0], *groups[1], *groups[2])

    @staticmethod
    def vmap(info, in_dims, count, mask, backend, *tensors):
        layers = []
        for number in range(count):
            layer, dims = tensors[number::count], in_dims[3:][number::count]
            layers.append(_vmap_modulate_backward(ModulateBackward.apply, info, dims, *layer, mask, backend)[0])
        results = [layer[part] for part in range(3) if mask[part] for layer in layers]
        return tuple(results), (0,) * len(results)


def _apply_backward(grads, weights, gammas, mask, backend):
    return ModulateManyBackward.apply(len(weights), mask, backend, *grads, *weights, *gammas)


def modulate_many(
    weights: _Tensors,
    gammas: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
    backend: str | None,
) -> list[Tensor]:
    """``adafm::modulate_many`` with derivatives of any order; a gamma or beta may be None (one, zero)."""
    _arguments.check_lengths(weights, gammas=gammas, betas=betas)
    gammas, betas = _given(gammas, weights, 1.0), _given(betas, weights, 0.0)
    if torch.compiler.is_compiling():
        # Dynamo does not follow lists through an autograd.Function; the op carries the same formulas.
        op = torch.ops.adafm.modulate_many.default
        return op(list(weights), gammas, betas, dtype, memory_format, backend)
    return list(ModulateMany.apply(len(weights), dtype, memory_format, backend, *weights, *gammas, *betas))


def _given(parameters: Sequence[Tensor | None], weights: _Tensors, default: float) -> list[Tensor]:
    return [
        torch.full((1, 1), default, dtype=_arguments.accumulation_type(w), device=w.device) if p is None else p
        for p, w in zip(parameters, weights, strict=True)
    ]


def _padded(ctx: Any, gradients: tuple[list, list, list]) -> tuple:
    """With None for the settings: as many answers as arguments. A compiled call leaves out those at their default."""
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - 3)


def _register() -> None:
    backward_op = torch.ops.adafm.modulate_many_backward.default
    single, single_backward = torch.ops.adafm.modulate.default, torch.ops.adafm.modulate_backward.default

    def setup(ctx, inputs, output):
        weights, gammas, betas, _, _, backend = inputs
        needs = _split(ctx.needs_input_grad, len(weights))
        _setup(ctx, weights, gammas, betas, needs, backend)

    def backward_setup(ctx, inputs, output):
        grads, weights, gammas, mask, backend = inputs
        needs = _split(ctx.needs_input_grad, len(weights))
        _setup_backward(ctx, grads, weights, gammas, mask, needs, backend)

    _library.impl("modulate_many", _modulate_many, "CompositeExplicitAutograd")
    _library.impl("modulate_many_backward", _modulate_many_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("adafm::modulate_many", _modulate_many_fake, lib=_library)
    torch.library.register_fake("adafm::modulate_many_backward", _modulate_many_backward_fake, lib=_library)
    torch.library.register_autograd(
        "adafm::modulate_many",
        lambda ctx, grads: _padded(ctx, _gradients(ctx, grads, backward_op)),
        setup_context=setup,
        lib=_library,
    )
    torch.library.register_autograd(
        "adafm::modulate_many_backward",
        lambda ctx, us: _padded(ctx, _backward_gradients(ctx, us, single, single_backward)),
        setup_context=backward_setup,
        lib=_library,
    )


_register()
