"""The ops ``adafm::modulate_per_sample`` and its backward: N sets of gamma and beta on one weight, which is read once.

    modulate_per_sample            W'[n] = gamma[n] * W + beta[n]
    modulate_per_sample_backward   dW = sum over n of gamma[n] * G[n],  dgamma[n] = sum over K of G[n] * W,
                                   dbeta[n] = sum over K of G[n]

W is ``[O, I, *K]``, W' and G ``[N, O, I, *K]``; gamma and beta are ``[N, O, I]`` with 1 in place of any of the three
and any number of trailing ones, or None (one and zero), not both. Order of differentiation: any. The pair is closed:
with incoming (uW, ug, ub) the derivative of the backward is

    dG[n] = ug[n] * W + ub[n] + gamma[n] * uW,   dW = sum over n of ug[n] * G[n],   dgamma[n] = sum over K of uW * G[n],

each of which is one of the two ops again. Forward mode is not supported.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _arguments, backends
from ._ops import Modulate, _library

_library.define(
    "modulate_per_sample(Tensor weight, Tensor? gamma, Tensor? beta, ScalarType? dtype=None, "
    "MemoryFormat? memory_format=None, str? backend=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "modulate_per_sample_backward(Tensor grad, Tensor weight, Tensor? gamma, bool[3] mask, str? backend=None) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _modulate_per_sample(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    samples = _arguments.check_per_sample(weight, gamma, beta, dtype)
    last = _arguments.result_format(weight, memory_format) != torch.contiguous_format
    return backends.implementation(weight.device, backend).modulate_per_sample(
        weight,
        _over_sets(gamma, weight, samples),
        _over_sets(beta, weight, samples),
        samples,
        dtype or weight.dtype,
        last,
    )


def _modulate_per_sample_fake(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    samples = _arguments.check_per_sample(weight, gamma, beta, dtype)
    layout = _arguments.result_format(weight, memory_format)
    stacked = (samples * weight.shape[0], *weight.shape[1:])
    empty = torch.empty(stacked, dtype=dtype or weight.dtype, device=weight.device, memory_format=layout)
    return empty.unflatten(0, (samples, weight.shape[0]))


def _modulate_per_sample_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: Sequence[bool], backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _arguments.check_per_sample_backward(grad, weight, gamma, mask)
    layout = _arguments.result_format(weight, None)
    sets = _over_sets(gamma, weight, grad.shape[0])
    return backends.implementation(weight.device, backend).modulate_per_sample_backward(
        grad, weight, sets, list(mask), layout
    )


def _modulate_per_sample_backward_fake(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: Sequence[bool], backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _arguments.check_per_sample_backward(grad, weight, gamma, mask)
    wide, layout = _arguments.accumulation_type(weight), _arguments.result_format(weight, None)
    sets = grad.shape[:3]
    d_weight = torch.empty_like(weight, memory_format=layout) if mask[0] else weight.new_empty(0)
    d_gamma = weight.new_empty(sets if mask[1] else (0,), dtype=wide)
    d_beta = weight.new_empty(sets if mask[2] else (0,), dtype=wide)
    return d_weight, d_gamma, d_beta


def _over_sets(parameter: Tensor | None, weight: Tensor, samples: int) -> Tensor | None:
    """gamma or beta as ``[N, O, I]`` in the computing type."""
    if parameter is None:
        return None
    wide = _arguments.accumulation_type(weight)
    parameter = parameter.view(parameter.shape[:3]).expand(samples, *weight.shape[:2])
    return parameter if parameter.dtype == wide else parameter.to(wide)


def _fit(gradient: Tensor, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    """A gradient over ``[N, O, I]`` in the shape and dtype of its parameter."""
    shape, dtype = like
    return gradient.sum_to_size(shape[:3]).reshape(shape).to(dtype)


def _like(parameter: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if parameter is None else (parameter.shape, parameter.dtype)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    weight, gamma, beta, _, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mask, ctx.backend = [bool(needed) for needed in ctx.needs_input_grad[:3]], backend
    ctx.gamma_like, ctx.beta_like = _like(gamma), _like(beta)
    ctx.save_for_backward(weight, gamma if ctx.mask[0] else None)


def _gradients(ctx: Any, grad: Tensor | None, backward_op: Callable) -> tuple:
    mask = ctx.mask
    if grad is None or not any(mask):
        return None, None, None, None, None, None
    weight, gamma = ctx.saved_tensors
    d_weight, d_gamma, d_beta = backward_op(grad, weight, gamma, mask, ctx.backend)
    return (
        d_weight if mask[0] else None,
        _fit(d_gamma, ctx.gamma_like) if mask[1] else None,
        _fit(d_beta, ctx.beta_like) if mask[2] else None,
        None,
        None,
        None,
    )


def _backward_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    grad, weight, gamma, mask, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.mask, ctx.backend = [bool(n) for n in ctx.needs_input_grad[:3]], list(mask), backend
    ctx.gamma_like = _like(gamma)
    ctx.save_for_backward(grad, weight, gamma if mask[0] and ctx.needs[0] else None)


def _backward_gradients(
    ctx: Any,
    u_weight: Tensor | None,
    u_gamma: Tensor | None,
    u_beta: Tensor | None,
    op: Callable,
    backward_op: Callable,
) -> tuple:
    u_weight, u_gamma, u_beta = (
        u if asked else None for u, asked in zip((u_weight, u_gamma, u_beta), ctx.mask, strict=True)
    )
    grad, weight, gamma = ctx.saved_tensors
    wide = _arguments.accumulation_type(weight)
    d_grad = d_weight = d_gamma = None
    if ctx.needs[0]:
        terms = []
        # Terms are added before the one cast to the type of G.
        if u_gamma is not None:
            terms.append(op(weight, u_gamma, u_beta, wide, None, ctx.backend))
        elif u_beta is not None:
            terms.append(u_beta.reshape(u_beta.shape + (1,) * (weight.dim() - 2)).expand(grad.shape).to(wide))
        if u_weight is not None:
            sets = gamma if gamma is not None else u_weight.new_ones((grad.shape[0], 1, 1), dtype=wide)
            terms.append(op(u_weight, sets, None, wide, None, ctx.backend))
        d_grad = sum(terms[1:], start=terms[0]).to(grad.dtype) if terms else None
    if ctx.needs[1] and u_gamma is not None:
        d_weight = backward_op(grad, weight, u_gamma, [True, False, False], ctx.backend)[0]
    if ctx.needs[2] and u_weight is not None:
        d_gamma = _fit(backward_op(grad, u_weight, None, [False, True, False], ctx.backend)[1], ctx.gamma_like)
    return d_grad, d_weight, d_gamma, None, None


def _batch(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """The batch as the first dimension, repeated where there is none."""
    batched = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    return batched.expand(count, *batched.shape[1:])


def _stacked(parameter: Tensor | None, dim: int | None, count: int, sets: Sequence[int]) -> Tensor | None:
    """gamma or beta of all members of a batch as ``[batch * N, O, I]``: more samples of one weight."""
    if parameter is None:
        return None
    batched = _batch(parameter, dim, count)
    return batched.reshape(batched.shape[:4]).expand(count, *sets).flatten(0, 1)


def _side_by_side(tensor: Tensor | None, dim: int | None, count: int, sets: Sequence[int] = ()) -> Tensor | None:
    """gamma, beta or gradient of all members as ``[N, batch * O, I, *K]``: more rows of one weight."""
    if tensor is None:
        return None
    batched = _batch(tensor, dim, count)
    if sets:
        batched = batched.reshape(batched.shape[:4]).expand(count, *sets)
    return batched.movedim(0, 1).flatten(1, 2)


def _samples(parameters: Sequence[Tensor | None], dims: Sequence[int | None]) -> int:
    """N, which a parameter of one set leaves to the other."""
    counts = [
        _batch(p, dim, 1 if dim is None else p.shape[dim]).shape[1]
        for p, dim in zip(parameters, dims, strict=True)
        if p is not None
    ]
    return max(counts, key=lambda n: n != 1)


def _vmap(apply: Callable, info: Any, in_dims: tuple, weight: Tensor, gamma: Any, beta: Any, *rest: Any) -> tuple:
    """One weight: batch * N samples of it. A batch of weights: N samples of one weight of batch * O rows."""
    count, parameters, dims = info.batch_size, (gamma, beta), in_dims[1:3]
    rows = weight if in_dims[0] is None else weight.movedim(in_dims[0], 0)[0]
    sets = (_samples(parameters, dims), *rows.shape[:2])
    if in_dims[0] is None:
        stacked = [_stacked(p, dim, count, sets) for p, dim in zip(parameters, dims, strict=True)]
        return apply(weight, *stacked, *rest).unflatten(0, (count, sets[0])), 0
    folded = [_side_by_side(p, dim, count, sets) for p, dim in zip(parameters, dims, strict=True)]
    return apply(_batch(weight, in_dims[0], count).flatten(0, 1), *folded, *rest).unflatten(1, (count, sets[1])), 1


def _vmap_backward(
    apply: Callable,
    info: Any,
    in_dims: tuple,
    grad: Tensor,
    weight: Tensor,
    gamma: Any,
    mask: Sequence[bool],
    *rest: Any,
) -> tuple:
    """As ``_vmap``; rows of one weight also where dW is asked for, which sums over the samples of each member alone."""
    count, batched = info.batch_size, _batch(grad, in_dims[0], info.batch_size)
    sets = batched.shape[1:4]
    if in_dims[1] is None and not mask[0]:
        stacked = _stacked(gamma, in_dims[2], count, sets)
        found = apply(batched.flatten(0, 1), weight, stacked, mask, *rest)
        dims, fold = (None, 0, 0), (count, sets[0])
    else:
        rows = _batch(weight, in_dims[1], count).flatten(0, 1)
        folded = _side_by_side(gamma, in_dims[2], count, sets)
        found = apply(_side_by_side(batched, 0, count), rows, folded, mask, *rest)
        dims, fold = (0, 1, 1), (count, sets[1])
    dims = tuple(dim if asked else None for dim, asked in zip(dims, mask, strict=True))
    return tuple(
        part if dim is None else part.unflatten(dim, fold) for part, dim in zip(found, dims, strict=True)
    ), dims


class ModulatePerSample(torch.autograd.Function):
    """``modulate_per_sample`` with derivatives of any order; arguments as of the op."""

    @staticmethod
    def forward(weight, gamma, beta, dtype, memory_format, backend):
        return torch.ops.adafm.modulate_per_sample.default(weight, gamma, beta, dtype, memory_format, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad):
        return _gradients(ctx, grad, ModulatePerSampleBackward.apply)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(ModulatePerSample.apply, info, in_dims, *inputs)


class ModulatePerSampleBackward(torch.autograd.Function):
    """``modulate_per_sample_backward`` with derivatives of any order; arguments as of the op."""

    @staticmethod
    def forward(grad, weight, gamma, mask, backend):
        return torch.ops.adafm.modulate_per_sample_backward.default(grad, weight, gamma, mask, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _backward_setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, u_weight, u_gamma, u_beta):
        return _backward_gradients(
            ctx, u_weight, u_gamma, u_beta, ModulatePerSample.apply, ModulatePerSampleBackward.apply
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap_backward(ModulatePerSampleBackward.apply, info, in_dims, *inputs)


def vmap_over_parameters(
    op: Callable, info: Any, in_dims: tuple, weight: Tensor, gamma: Any, beta: Any, *rest: Any
) -> tuple:
    """The batching rule of ``modulate`` for one weight and a batch of gamma or beta: one set for each member.

    A rule of the Function ends in a Function, and one of the registered op in an op.
    """
    sets = []
    for parameter, dim in zip((gamma, beta), in_dims[1:3], strict=True):
        if parameter is not None:
            parameter = parameter.unsqueeze(0) if dim is None else parameter.movedim(dim, 0)
            parameter = parameter.expand(info.batch_size, *parameter.shape[1:])
        sets.append(parameter)
    single = torch.ops.adafm.modulate.default
    per_sample = torch.ops.adafm.modulate_per_sample.default if op is single else ModulatePerSample.apply
    return per_sample(weight, *sets, *rest), 0


Modulate.vmap_over_parameters = staticmethod(vmap_over_parameters)


def _register() -> None:
    op = torch.ops.adafm.modulate_per_sample.default
    backward_op = torch.ops.adafm.modulate_per_sample_backward.default
    _library.impl("modulate_per_sample", _modulate_per_sample, "CompositeExplicitAutograd")
    _library.impl("modulate_per_sample_backward", _modulate_per_sample_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("adafm::modulate_per_sample", _modulate_per_sample_fake, lib=_library)
    torch.library.register_fake("adafm::modulate_per_sample_backward", _modulate_per_sample_backward_fake, lib=_library)
    torch.library.register_autograd(
        "adafm::modulate_per_sample",
        lambda ctx, grad: _gradients(ctx, grad, backward_op),
        setup_context=_setup,
        lib=_library,
    )
    torch.library.register_autograd(
        "adafm::modulate_per_sample_backward",
        lambda ctx, *us: _backward_gradients(ctx, *us, op, backward_op),
        setup_context=_backward_setup,
        lib=_library,
    )
    torch.library.register_vmap("adafm::modulate_per_sample", lambda *args: _vmap(op, *args), lib=_library)
    torch.library.register_vmap(
        "adafm::modulate_per_sample_backward", lambda *args: _vmap_backward(backward_op, *args), lib=_library
    )


_register()
