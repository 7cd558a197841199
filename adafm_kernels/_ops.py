"""The ops ``adafm::modulate`` and ``adafm::modulate_backward``: schemas, fake kernels, derivatives, batching.

    modulate            W' = gamma * W + beta
    modulate_backward   dW = gamma * G,  dgamma = sum over K of G * W,  dbeta = sum over K of G

W is ``[O, I, *K]`` with no to three kernel dimensions; gamma and beta are ``[O, I]``, ``[O, 1]`` or ``[1, I]`` with any
number of trailing ones, or None (one and zero). Both are computed in float32 (float64 for a float64 weight).

Order of differentiation: any. The pair is closed: with incoming (uW, ug, ub) the derivative of ``modulate_backward`` is

    dG = modulate(W, ug, ub) + gamma * uW,   dW = ug * G,   dgamma = sum over K of uW * G,

each of which is one of the two ops again. Forward mode is not supported.

The formulas are attached twice. ``torch.ops.adafm.*`` carry them through ``torch.library``; ``Modulate`` and
``ModulateBackward`` carry them as ``autograd.Function``, which ``torch.func.grad`` needs, and which raises in forward
mode where a registered op would give a zero tangent without a word. The Functions are the public entry: ``modulate``
runs them, or, for plain tensors outside every transform and mode, ``_EagerModulate``, which has the same formulas and
calls the backend without passing through the dispatcher twice.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _arguments, backends

_library = torch.library.Library("adafm", "DEF")
_library.define(
    "modulate(Tensor weight, Tensor? gamma, Tensor? beta, ScalarType? dtype=None, MemoryFormat? memory_format=None, "
    "str? backend=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "modulate_backward(Tensor grad, Tensor weight, Tensor? gamma, bool[3] mask, str? backend=None) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _modulate(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    implementation = backends.implementation(weight.device, backend)
    layout = _arguments.result_format(weight, memory_format)
    dtype = weight.dtype if dtype is None else dtype
    wide = _arguments.accumulation_type(weight)
    if implementation.BROADCASTS and _is_ready(gamma, wide) and _is_ready(beta, wide):
        try:
            return implementation.modulate(weight, gamma, beta, dtype, layout)
        except RuntimeError:
            # The library has the same rules; where it refuses, these say what is wrong, by type and with the remedy.
            _arguments.check_modulate(weight, gamma, beta, dtype)
            raise
    _arguments.check_modulate(weight, gamma, beta, dtype)
    gamma, beta = _arguments.over_pairs(gamma, weight), _arguments.over_pairs(beta, weight)
    return implementation.modulate(weight, gamma, beta, dtype, layout)


def _is_ready(parameter: Tensor | None, wide: torch.dtype) -> bool:
    return parameter is None or parameter.dtype == wide


def _modulate_fake(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    _arguments.check_modulate(weight, gamma, beta, dtype)
    layout = _arguments.result_format(weight, memory_format)
    return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device, memory_format=layout)


def _modulate_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: Sequence[bool], backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _arguments.check_modulate_backward(grad, weight, gamma, mask)
    layout = _arguments.result_format(weight, None)
    pairs = _arguments.over_pairs(gamma, weight)
    return backends.implementation(weight.device, backend).modulate_backward(grad, weight, pairs, list(mask), layout)


def _modulate_backward_fake(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: Sequence[bool], backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _arguments.check_modulate_backward(grad, weight, gamma, mask)
    wide, layout = _arguments.accumulation_type(weight), _arguments.result_format(weight, None)
    pairs = weight.shape[:2]
    d_weight = torch.empty_like(weight, memory_format=layout) if mask[0] else weight.new_empty(0)
    d_gamma = weight.new_empty(pairs if mask[1] else (0,), dtype=wide)
    d_beta = weight.new_empty(pairs if mask[2] else (0,), dtype=wide)
    return d_weight, d_gamma, d_beta


def _fit(gradient: Tensor, like: tuple[torch.Size, torch.dtype]) -> Tensor:
    """A gradient over ``[O, I]`` in the shape and dtype of its parameter."""
    shape, dtype = like
    if gradient.shape != shape[:2]:
        gradient = gradient.sum_to_size(shape[:2])
    if len(shape) != 2:
        gradient = gradient.reshape(shape)
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def _like(parameter: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if parameter is None else (parameter.shape, parameter.dtype)


def _widened(tensor: Tensor, wide: bool) -> Tensor:
    return tensor.to(torch.float64) if wide else tensor


def _modulate_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    weight, gamma, beta, _, _, backend = inputs
    ctx.set_materialize_grads(False)
    mask = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    ctx.mask, ctx.backend, ctx.wide = mask, backend, weight.dtype == torch.float64
    ctx.gamma_like, ctx.beta_like = _like(gamma), _like(beta)
    # dbeta needs G alone, dgamma W as well, dW gamma and the weight's type and layout.
    ctx.save_for_backward(weight if mask[0] or mask[1] else None, gamma if mask[0] else None)


def _modulate_gradients(ctx: Any, grad: Tensor | None, backward_op: Callable) -> tuple:
    mask = ctx.mask
    if grad is None or not any(mask):
        return None, None, None, None, None, None
    weight, gamma = ctx.saved_tensors
    if weight is None:
        weight = _widened(grad, ctx.wide)
    d_weight, d_gamma, d_beta = backward_op(grad, weight, gamma, mask, ctx.backend)
    return (
        d_weight if mask[0] else None,
        _fit(d_gamma, ctx.gamma_like) if mask[1] else None,
        _fit(d_beta, ctx.beta_like) if mask[2] else None,
        None,
        None,
        None,
    )


def _modulate_backward_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    grad, weight, gamma, mask, backend = inputs
    ctx.set_materialize_grads(False)
    needs = [bool(needed) for needed in ctx.needs_input_grad[:3]]
    ctx.needs, ctx.mask, ctx.backend, ctx.wide = needs, list(mask), backend, weight.dtype == torch.float64
    ctx.shape, ctx.grad_dtype, ctx.weight_dtype, ctx.gamma_like = weight.shape, grad.dtype, weight.dtype, _like(gamma)
    ctx.save_for_backward(
        grad if (mask[1] and needs[1]) or (mask[0] and needs[2]) else None,
        weight if mask[1] and needs[0] else None,
        gamma if mask[0] and needs[0] else None,
    )


def _modulate_backward_gradients(
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
    d_grad = d_weight = d_gamma = None
    if ctx.needs[0]:
        terms = []
        # Two terms are added before the one cast to the type of G.
        both = u_weight is not None and (u_gamma is not None or u_beta is not None)
        dtype = (torch.float64 if ctx.wide else torch.float32) if both else ctx.grad_dtype
        if u_gamma is not None:
            terms.append(op(weight, u_gamma, u_beta, dtype, None, ctx.backend))
        elif u_beta is not None:
            terms.append(u_beta.reshape(u_beta.shape + (1,) * (len(ctx.shape) - 2)).expand(ctx.shape).to(dtype))
        if u_weight is not None:
            terms.append(op(u_weight, gamma, None, dtype, None, ctx.backend))
        d_grad = sum(terms[1:], start=terms[0]).to(ctx.grad_dtype) if terms else None
    if ctx.needs[1] and u_gamma is not None:
        d_weight = op(_widened(grad, ctx.wide), u_gamma, None, ctx.weight_dtype, None, ctx.backend)
    if ctx.needs[2] and u_weight is not None:
        sums = backward_op(u_weight, _widened(grad, ctx.wide), None, [False, True, False], ctx.backend)
        d_gamma = _fit(sums[1], ctx.gamma_like)
    return d_grad, d_weight, d_gamma, None, None


def _folded(tensor: Tensor | None, dim: int | None, count: int, pairs: Sequence[int] | None = None) -> Tensor | None:
    """The batch moved into the first dimension, ``[N * O, ...]``; a parameter first spread over ``pairs``, (O, I)."""
    if tensor is None:
        return None
    batched = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    if pairs is not None:
        batched = batched.reshape(batched.shape[:3]).expand(count, *pairs)
    else:
        batched = batched.expand(count, *batched.shape[1:])
    return batched.reshape(count * batched.shape[1], *batched.shape[2:])


def _pairs(weight: Tensor, dim: int | None) -> Sequence[int]:
    return (weight if dim is None else weight.movedim(dim, 0)[0]).shape[:2]


def _vmap_modulate(op: Callable, info: Any, in_dims: tuple, weight: Tensor, gamma: Any, beta: Any, *rest: Any) -> tuple:
    """One weight with N sets of gamma and beta is ``modulate_per_sample``; N weights are one of N * O rows."""
    if in_dims[0] is None and any(dim is not None for dim in in_dims[1:3]):
        return Modulate.vmap_over_parameters(op, info, in_dims, weight, gamma, beta, *rest)
    return _vmap_rows(op, info, in_dims, weight, gamma, beta, *rest)


def _vmap_rows(op: Callable, info: Any, in_dims: tuple, weight: Tensor, gamma: Any, beta: Any, *rest: Any) -> tuple:
    """N weights as one of N * O rows."""
    count, pairs = info.batch_size, _pairs(weight, in_dims[0])
    result = op(
        _folded(weight, in_dims[0], count),
        _folded(gamma, in_dims[1], count, pairs),
        _folded(beta, in_dims[2], count, pairs),
        *rest,
    )
    return result.unflatten(0, (count, pairs[0])), 0


def _vmap_modulate_backward(
    op: Callable, info: Any, in_dims: tuple, grad: Tensor, weight: Tensor, gamma: Any, mask: Sequence[bool], *rest: Any
) -> tuple:
    count, pairs = info.batch_size, _pairs(weight, in_dims[1])
    results = op(
        _folded(grad, in_dims[0], count),
        _folded(weight, in_dims[1], count),
        _folded(gamma, in_dims[2], count, pairs),
        mask,
        *rest,
    )
    split = tuple(r.unflatten(0, (count, pairs[0])) if asked else r for r, asked in zip(results, mask, strict=True))
    return split, tuple(0 if asked else None for asked in mask)


class Modulate(torch.autograd.Function):
    """``modulate`` with derivatives of any order, ``torch.func`` transforms included; arguments as of the op."""

    # Batching of one weight with many gamma and beta; ``_ops_per_sample``, which comes later, puts it here.
    vmap_over_parameters: Callable

    @staticmethod
    def forward(weight, gamma, beta, dtype, memory_format, backend):
        return torch.ops.adafm.modulate.default(weight, gamma, beta, dtype, memory_format, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _modulate_setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad):
        return _modulate_gradients(ctx, grad, ModulateBackward.apply)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap_modulate(Modulate.apply, info, in_dims, *inputs)


class ModulateBackward(torch.autograd.Function):
    """``modulate_backward`` with derivatives of any order; arguments as of the op."""

    @staticmethod
    def forward(grad, weight, gamma, mask, backend):
        return torch.ops.adafm.modulate_backward.default(grad, weight, gamma, mask, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _modulate_backward_setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, u_weight, u_gamma, u_beta):
        return _modulate_backward_gradients(ctx, u_weight, u_gamma, u_beta, Modulate.apply, ModulateBackward.apply)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap_modulate_backward(ModulateBackward.apply, info, in_dims, *inputs)


class _EagerModulate(torch.autograd.Function):
    """``Modulate`` for plain tensors: forward and first backward call the backend directly."""

    @staticmethod
    def forward(ctx, *inputs):
        _modulate_setup(ctx, inputs, None)
        return _modulate(*inputs)

    @staticmethod
    def backward(ctx, grad):
        # With create_graph the gradients are differentiated again; a mode wants to see the op.
        plain = not torch.is_grad_enabled() and not torch._C._len_torch_dispatch_stack()
        return _modulate_gradients(ctx, grad, _modulate_backward if plain else ModulateBackward.apply)


_PLAIN = (Tensor, torch.nn.Parameter)


def modulate(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
    backend: str | None,
) -> Tensor:
    """``adafm::modulate`` with derivatives of any order; arguments as of the op."""
    if (
        torch.compiler.is_compiling()
        or type(weight) not in _PLAIN
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or not (gamma is None or type(gamma) in _PLAIN)
        or not (beta is None or type(beta) in _PLAIN)
    ):
        return Modulate.apply(weight, gamma, beta, dtype, memory_format, backend)
    if torch.is_grad_enabled() and (
        weight.requires_grad or (gamma is not None and gamma.requires_grad) or (beta is not None and beta.requires_grad)
    ):
        return _EagerModulate.apply(weight, gamma, beta, dtype, memory_format, backend)
    return _modulate(weight, gamma, beta, dtype, memory_format, backend)


# autograd.Function asks for the signature of forward at every call; found here, it is not worked out anew (10 us).
Modulate.forward.__signature__ = inspect.signature(Modulate.forward)
ModulateBackward.forward.__signature__ = inspect.signature(ModulateBackward.forward)


def _register() -> None:
    """Attach kernels, fake kernels, derivatives and batching rules to the two ops."""
    op, backward_op = torch.ops.adafm.modulate.default, torch.ops.adafm.modulate_backward.default
    _library.impl("modulate", _modulate, "CompositeExplicitAutograd")
    _library.impl("modulate_backward", _modulate_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("adafm::modulate", _modulate_fake, lib=_library)
    torch.library.register_fake("adafm::modulate_backward", _modulate_backward_fake, lib=_library)
    torch.library.register_autograd(
        "adafm::modulate",
        lambda ctx, grad: _modulate_gradients(ctx, grad, backward_op),
        setup_context=_modulate_setup,
        lib=_library,
    )
    torch.library.register_autograd(
        "adafm::modulate_backward",
        lambda ctx, *grads: _modulate_backward_gradients(ctx, *grads, op, backward_op),
        setup_context=_modulate_backward_setup,
        lib=_library,
    )
    torch.library.register_vmap("adafm::modulate", lambda *args: _vmap_modulate(op, *args), lib=_library)
    torch.library.register_vmap(
        "adafm::modulate_backward", lambda *args: _vmap_modulate_backward(backward_op, *args), lib=_library
    )


_register()
