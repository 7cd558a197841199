"""The ops ``adafm::modulate_normalized`` and its backward: modulation of a weight that is normalised on the way.

    modulate_normalized            W' = gamma * n + beta,  n = (W - mean) / max(s, eps)
    modulate_normalized_backward   dW = (dn - mean(dn) - n * sum(dn * n) / (M - 1)) / s,  dn = gamma * G,
                                   dgamma = sum over K of G * n,  dbeta = sum over K of G

mean and sample deviation s (divisor M - 1) over the M taps of each filter, or over all M weights of each output
channel. A deviation below eps is replaced by eps, and the last term of dW is then left out. This is the modulation of
GAN memory (Cong et al., NeurIPS 2020, equation 4) with a weight that is still trained; a frozen one is normalised once,
for ``modulate``. Order of differentiation: any; value and first derivative are kernels, the derivative of the backward
comes from its formula in plain PyTorch, ``backends.reference.normalized_gradients``. Forward mode is not supported.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _arguments, backends
from ._ops import _fit, _library, _like, _vmap_modulate_backward, _vmap_rows
from .backends.reference import normalized_gradients

_library.define(
    "modulate_normalized(Tensor weight, Tensor? gamma, Tensor? beta, str over='filter', float eps=1e-08, "
    "ScalarType? dtype=None, MemoryFormat? memory_format=None, str? backend=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "modulate_normalized_backward(Tensor grad, Tensor weight, Tensor? gamma, str over, float eps, bool[3] mask, "
    "str? backend=None) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _modulate_normalized(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    over: str = "filter",
    eps: float = 1e-8,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    _arguments.check_modulate(weight, gamma, beta, dtype)
    _arguments.check_group(weight, over, eps)
    return backends.implementation(weight.device, backend).modulate_normalized(
        weight,
        _arguments.over_pairs(gamma, weight),
        _arguments.over_pairs(beta, weight),
        over,
        eps,
        dtype or weight.dtype,
        _arguments.result_format(weight, memory_format),
    )


def _modulate_normalized_fake(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    over: str = "filter",
    eps: float = 1e-8,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    _arguments.check_modulate(weight, gamma, beta, dtype)
    _arguments.check_group(weight, over, eps)
    layout = _arguments.result_format(weight, memory_format)
    return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device, memory_format=layout)


def _modulate_normalized_backward(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    over: str,
    eps: float,
    mask: Sequence[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _arguments.check_modulate_backward(grad, weight, gamma, mask)
    _arguments.check_group(weight, over, eps)
    layout, pairs = _arguments.result_format(weight, None), _arguments.over_pairs(gamma, weight)
    implementation = backends.implementation(weight.device, backend)
    return implementation.modulate_normalized_backward(grad, weight, pairs, over, eps, list(mask), layout)


def _modulate_normalized_backward_fake(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    over: str,
    eps: float,
    mask: Sequence[bool],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _arguments.check_modulate_backward(grad, weight, gamma, mask)
    _arguments.check_group(weight, over, eps)
    wide, layout = _arguments.accumulation_type(weight), _arguments.result_format(weight, None)
    pairs = weight.shape[:2]
    d_weight = torch.empty_like(weight, memory_format=layout) if mask[0] else weight.new_empty(0)
    d_gamma = weight.new_empty(pairs if mask[1] else (0,), dtype=wide)
    d_beta = weight.new_empty(pairs if mask[2] else (0,), dtype=wide)
    return d_weight, d_gamma, d_beta


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    weight, gamma, beta, over, eps, _, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mask, ctx.backend, ctx.over, ctx.eps = [bool(n) for n in ctx.needs_input_grad[:3]], backend, over, eps
    ctx.gamma_like, ctx.beta_like = _like(gamma), _like(beta)
    ctx.save_for_backward(weight, gamma if ctx.mask[0] else None)


def _gradients(ctx: Any, grad: Tensor | None, backward_op: Callable) -> tuple:
    mask = ctx.mask
    if grad is None or not any(mask):
        return (None,) * 8
    weight, gamma = ctx.saved_tensors
    d_weight, d_gamma, d_beta = backward_op(grad, weight, gamma, ctx.over, ctx.eps, mask, ctx.backend)
    return (
        d_weight if mask[0] else None,
        _fit(d_gamma, ctx.gamma_like) if mask[1] else None,
        _fit(d_beta, ctx.beta_like) if mask[2] else None,
        *(None,) * 5,
    )


def _backward_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    grad, weight, gamma, over, eps, mask, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.mask = [bool(needed) for needed in ctx.needs_input_grad[:3]], list(mask)
    ctx.over, ctx.eps = over, eps
    ctx.save_for_backward(grad, weight, gamma)


def _backward_gradients(ctx: Any, *us: Tensor | None) -> tuple:
    """Differentiates the formula of the backward, in plain PyTorch."""
    grad, weight, gamma = ctx.saved_tensors
    wide = _arguments.accumulation_type(weight)
    if not any(u is not None and asked for u, asked in zip(us, ctx.mask, strict=True)):
        return (None,) * 7

    def formula(grad: Tensor, weight: Tensor, *gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pairs = _arguments.over_pairs(gamma[0], weight) if gamma else None
        return normalized_gradients(grad, weight, pairs, ctx.over, ctx.eps)

    points = [t.to(wide) for t in (grad, weight, gamma) if t is not None]
    values, pull_back = torch.func.vjp(formula, *points)
    incoming = tuple(
        torch.zeros_like(value) if u is None or not asked else u.to(value.dtype)
        for value, u, asked in zip(values, us, ctx.mask, strict=True)
    )
    found = [*pull_back(incoming), None][:3]
    results = [
        r.to(t.dtype) if needed and t is not None else None
        for r, t, needed in zip(found, (grad, weight, gamma), ctx.needs, strict=True)
    ]
    return *results, *(None,) * 4


class ModulateNormalized(torch.autograd.Function):
    """``modulate_normalized`` with derivatives of any order; arguments as of the op."""

    @staticmethod
    def forward(weight, gamma, beta, over, eps, dtype, memory_format, backend):
        op = torch.ops.adafm.modulate_normalized.default
        return op(weight, gamma, beta, over, eps, dtype, memory_format, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad):
        return _gradients(ctx, grad, ModulateNormalizedBackward.apply)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap_rows(ModulateNormalized.apply, info, in_dims, *inputs)


class ModulateNormalizedBackward(torch.autograd.Function):
    """``modulate_normalized_backward`` with derivatives of any order; arguments as of the op."""

    @staticmethod
    def forward(grad, weight, gamma, over, eps, mask, backend):
        op = torch.ops.adafm.modulate_normalized_backward.default
        return op(grad, weight, gamma, over, eps, mask, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _backward_setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, *us):
        return _backward_gradients(ctx, *us)

    @staticmethod
    def vmap(info, in_dims, grad, weight, gamma, over, eps, mask, backend):
        def run(grad, weight, gamma, mask):
            return ModulateNormalizedBackward.apply(grad, weight, gamma, over, eps, mask, backend)

        return _vmap_modulate_backward(run, info, in_dims, grad, weight, gamma, mask)


def _register() -> None:
    backward_op = torch.ops.adafm.modulate_normalized_backward.default
    _library.impl("modulate_normalized", _modulate_normalized, "CompositeExplicitAutograd")
    _library.impl("modulate_normalized_backward", _modulate_normalized_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("adafm::modulate_normalized", _modulate_normalized_fake, lib=_library)
    torch.library.register_fake("adafm::modulate_normalized_backward", _modulate_normalized_backward_fake, lib=_library)
    torch.library.register_autograd(
        "adafm::modulate_normalized",
        lambda ctx, grad: _gradients(ctx, grad, backward_op),
        setup_context=_setup,
        lib=_library,
    )
    torch.library.register_autograd(
        "adafm::modulate_normalized_backward", _backward_gradients, setup_context=_backward_setup, lib=_library
    )


_register()
