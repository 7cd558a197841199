"""The ops ``adafm::modulate_lowrank`` and its backward: a gamma with a low-rank part that is never written to memory.

    modulate_lowrank            W' = (gamma + U diag(s) V^T) * W + beta
    modulate_lowrank_backward   dW = (gamma + U diag(s) V^T) * G,  D = sum over K of G * W (the gradient of gamma),
                                dU = D V diag(s),  ds = diag(U^T D V),  dV = D^T U diag(s),  dbeta = sum over K of G

W is ``[O, I, *K]``, u ``[O, R]``, s ``[R]``, v ``[I, R]``; gamma and beta as in ``modulate``. The low-rank storage of
gamma over a sequence of tasks is that of GAN memory (Cong et al., NeurIPS 2020, section 4.3). Order of differentiation:
any; the derivative of the backward is made of the ops of ``_ops`` and of matrix products. Forward mode is not
supported.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _arguments, backends
from ._ops import Modulate, ModulateBackward, _fit, _library, _like

_library.define(
    "modulate_lowrank(Tensor weight, Tensor? gamma, Tensor u, Tensor s, Tensor v, Tensor? beta, "
    "ScalarType? dtype=None, MemoryFormat? memory_format=None, str? backend=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "modulate_lowrank_backward(Tensor grad, Tensor weight, Tensor? gamma, Tensor u, Tensor s, Tensor v, bool[6] mask, "
    "str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _modulate_lowrank(
    weight: Tensor,
    gamma: Tensor | None,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    beta: Tensor | None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    _arguments.check_modulate(weight, gamma, beta, dtype)
    _arguments.check_factors(weight, u, s, v)
    left, right = _factors(weight, u, s, v)
    return backends.implementation(weight.device, backend).modulate_lowrank(
        weight,
        _arguments.over_pairs(gamma, weight),
        left,
        right,
        _arguments.over_pairs(beta, weight),
        dtype or weight.dtype,
        _arguments.result_format(weight, memory_format),
    )


def _modulate_lowrank_fake(
    weight: Tensor,
    gamma: Tensor | None,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    beta: Tensor | None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    backend: str | None = None,
) -> Tensor:
    _arguments.check_modulate(weight, gamma, beta, dtype)
    _arguments.check_factors(weight, u, s, v)
    layout = _arguments.result_format(weight, memory_format)
    return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device, memory_format=layout)


def _modulate_lowrank_backward(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    mask: Sequence[bool],
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    _check_backward(grad, weight, gamma, u, s, v, mask)
    implementation = backends.implementation(weight.device, backend)
    layout, wide = _arguments.result_format(weight, None), _arguments.accumulation_type(weight)
    gamma = _arguments.over_pairs(gamma, weight)
    left, right = _factors(weight, u, s, v)
    none = weight.new_empty(0, dtype=wide)
    d_weight = weight.new_empty(0)
    if mask[0]:
        # gamma * G is the forward on G. The computing type is that of W.
        source = grad.to(wide) if wide == torch.float64 or grad.dtype == torch.float64 else grad
        zero = torch.zeros((), dtype=wide, device=weight.device).expand(weight.shape[:2])
        d_weight = implementation.modulate_lowrank(source, gamma, left, right, zero, weight.dtype, layout)
    through = any(mask[2:5])
    sums = [False, mask[1] or through, mask[5]]
    _, d_gamma, d_beta = implementation.modulate_backward(grad, weight, gamma, sums, layout)
    d_u = (d_gamma @ right.t()) * s.to(wide) if mask[2] else none
    d_s = _inner(u.to(wide), d_gamma, v.to(wide)) if mask[3] else none
    d_v = d_gamma.t() @ left if mask[4] else none
    parts = (d_u, d_s, d_v)
    return (
        d_weight,
        d_gamma if mask[1] else none.clone(),
        *(p if p is not none else none.clone() for p in parts),
        d_beta,
    )


def _modulate_lowrank_backward_fake(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    mask: Sequence[bool],
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    _check_backward(grad, weight, gamma, u, s, v, mask)
    layout, wide = _arguments.result_format(weight, None), _arguments.accumulation_type(weight)
    d_weight = torch.empty_like(weight, memory_format=layout) if mask[0] else weight.new_empty(0)
    shapes = (weight.shape[:2], u.shape, s.shape, v.shape, weight.shape[:2])
    rest = (
        weight.new_empty(shape if asked else (0,), dtype=wide) for shape, asked in zip(shapes, mask[1:], strict=True)
    )
    return d_weight, *rest


def _check_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor | None, u: Tensor, s: Tensor, v: Tensor, mask: Sequence[bool]
) -> None:
    if len(mask) != 6:
        raise ValueError(f"mask has {len(mask)} entries; expected 6 (weight, gamma, u, s, v, beta)")
    _arguments.check_modulate_backward(grad, weight, gamma, list(mask[:3]))
    _arguments.check_factors(weight, u, s, v)


def _factors(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``U diag(s)`` as ``[O, R]`` and ``V^T`` as ``[R, I]``, dense, in the computing type."""
    wide = _arguments.accumulation_type(weight)
    return (u.to(wide) * s.to(wide)).contiguous(), v.to(wide).t().contiguous()


def _inner(u: Tensor, d: Tensor, v: Tensor) -> Tensor:
    """The diagonal of ``U^T D V``."""
    return (u * (d @ v)).sum(0)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    weight, gamma, u, s, v, beta, _, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mask, ctx.backend = [bool(needed) for needed in ctx.needs_input_grad[:6]], backend
    ctx.gamma_like, ctx.beta_like = _like(gamma), _like(beta)
    ctx.save_for_backward(weight, gamma if ctx.mask[0] else None, u, s, v)


def _gradients(ctx: Any, grad: Tensor | None, backward_op: Callable) -> tuple:
    mask = ctx.mask
    if grad is None or not any(mask):
        return (None,) * 9
    weight, gamma, u, s, v = ctx.saved_tensors
    d_weight, d_gamma, d_u, d_s, d_v, d_beta = backward_op(grad, weight, gamma, u, s, v, mask, ctx.backend)
    return (
        d_weight if mask[0] else None,
        _fit(d_gamma, ctx.gamma_like) if mask[1] else None,
        d_u.to(u.dtype) if mask[2] else None,
        d_s.to(s.dtype) if mask[3] else None,
        d_v.to(v.dtype) if mask[4] else None,
        _fit(d_beta, ctx.beta_like) if mask[5] else None,
        None,
        None,
        None,
    )


def _backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, weight, gamma, u, s, v, mask, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.mask, ctx.backend = [bool(n) for n in ctx.needs_input_grad[:6]], list(mask), backend
    ctx.gamma_like = _like(gamma)
    ctx.save_for_backward(grad, weight, gamma, u, s, v)


def _backward_gradients(ctx: Any, us: Sequence[Tensor | None], op: Callable, backward_op: Callable) -> tuple:
    """Derivative of the backward: of dW, D, dU, ds, dV, dbeta with the incoming ``us``.

    With C the gradient that reaches D (from D itself and through dU, ds, dV) everything is ``modulate`` and its
    backward for the pair (C, dbeta) and matrix products for U, s and V.
    """
    u_weight, u_gamma, u_u, u_s, u_v, u_beta = (
        incoming if asked else None for incoming, asked in zip(us, ctx.mask, strict=True)
    )
    grad, weight, gamma, u, s, v = ctx.saved_tensors
    wide = _arguments.accumulation_type(weight)
    left, right = u.to(wide) * s.to(wide), v.to(wide).t()
    u, s, v = u.to(wide), s.to(wide), v.to(wide)
    total = left @ right
    total = total + (1.0 if gamma is None else gamma.to(wide).reshape(gamma.shape[:2]))

    # What reaches D.
    d_pairs = None if u_gamma is None else u_gamma.to(wide)
    for term in (
        None if u_u is None else (u_u * s) @ v.t(),
        None if u_s is None else (u * u_s) @ v.t(),
        None if u_v is None else left @ u_v.t(),
    ):
        if term is not None:
            d_pairs = term if d_pairs is None else d_pairs + term

    results: list[Tensor | None] = [None] * 6
    if ctx.needs[0]:
        terms = []
        if d_pairs is not None:
            terms.append(op(weight, d_pairs, u_beta, wide, None, ctx.backend))
        elif u_beta is not None:
            terms.append(u_beta.reshape(u_beta.shape + (1,) * (weight.dim() - 2)).expand(grad.shape).to(wide))
        if u_weight is not None:
            terms.append(op(u_weight, total, None, wide, None, ctx.backend))
        results[0] = sum(terms[1:], start=terms[0]).to(grad.dtype) if terms else None
    source = grad.to(wide) if wide == torch.float64 else grad
    if ctx.needs[1] and d_pairs is not None:
        results[1] = op(source, d_pairs, None, weight.dtype, None, ctx.backend)
    # D again, and the gradient that reaches the sum gamma + U diag(s) V^T through dW.
    sums = backward_op(grad, weight, None, [False, True, False], ctx.backend)[1]
    d_total = None
    if u_weight is not None:
        d_total = backward_op(u_weight, source, None, [False, True, False], ctx.backend)[1].to(wide)
    if ctx.needs[2] and d_total is not None:
        results[2] = _fit(d_total, ctx.gamma_like)
    if ctx.needs[3]:
        results[3] = _total(
            None if d_total is None else (d_total @ v) * s,
            None if u_s is None else (sums @ v) * u_s,
            None if u_v is None else (sums @ u_v) * s,
        )
    if ctx.needs[4]:
        results[4] = _total(
            None if d_total is None else _inner(u, d_total, v),
            None if u_u is None else _inner(u_u, sums, v),
            None if u_v is None else _inner(u, sums, u_v),
        )
    if ctx.needs[5]:
        results[5] = _total(
            None if d_total is None else d_total.t() @ left,
            None if u_u is None else sums.t() @ (u_u * s),
            None if u_s is None else sums.t() @ (u * u_s),
        )
    saved = ctx.saved_tensors
    factors = (None if r is None else r.to(t.dtype) for r, t in zip(results[3:], saved[3:], strict=True))
    return *results[:3], *factors, None, None


def _total(*terms: Tensor | None) -> Tensor | None:
    found = [term for term in terms if term is not None]
    return sum(found[1:], start=found[0]) if found else None


class ModulateLowrank(torch.autograd.Function):
    """``modulate_lowrank`` with derivatives of any order; arguments as of the op."""

    @staticmethod
    def forward(weight, gamma, u, s, v, beta, dtype, memory_format, backend):
        op = torch.ops.adafm.modulate_lowrank.default
        return op(weight, gamma, u, s, v, beta, dtype, memory_format, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad):
        return _gradients(ctx, grad, ModulateLowrankBackward.apply)

    @staticmethod
    def vmap(info, in_dims, weight, gamma, u, s, v, beta, *rest):
        """The sum is formed for each member, and ``modulate`` does the rest."""

        def one(weight, gamma, u, s, v, beta):
            total = (u * s) @ v.t() + (1.0 if gamma is None else gamma.reshape(gamma.shape[:2]))
            return Modulate.apply(weight, total, beta, *rest)

        return torch.func.vmap(one, in_dims[:6])(weight, gamma, u, s, v, beta), 0


class ModulateLowrankBackward(torch.autograd.Function):
    """``modulate_lowrank_backward`` with derivatives of any order; arguments as of the op."""

    @staticmethod
    def forward(grad, weight, gamma, u, s, v, mask, backend):
        return torch.ops.adafm.modulate_lowrank_backward.default(grad, weight, gamma, u, s, v, mask, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _backward_setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, *us):
        return _backward_gradients(ctx, us, Modulate.apply, ModulateBackward.apply)


def _register() -> None:
    backward_op = torch.ops.adafm.modulate_lowrank_backward.default
    single, single_backward = torch.ops.adafm.modulate.default, torch.ops.adafm.modulate_backward.default
    _library.impl("modulate_lowrank", _modulate_lowrank, "CompositeExplicitAutograd")
    _library.impl("modulate_lowrank_backward", _modulate_lowrank_backward, "CompositeExplicitAutograd")
    torch.library.register_fake("adafm::modulate_lowrank", _modulate_lowrank_fake, lib=_library)
    torch.library.register_fake("adafm::modulate_lowrank_backward", _modulate_lowrank_backward_fake, lib=_library)
    torch.library.register_autograd(
        "adafm::modulate_lowrank",
        lambda ctx, grad: _gradients(ctx, grad, backward_op),
        setup_context=_setup,
        lib=_library,
    )
    torch.library.register_autograd(
        "adafm::modulate_lowrank_backward",
        lambda ctx, *us: _backward_gradients(ctx, us, single, single_backward),
        setup_context=_backward_setup,
        lib=_library,
    )


_register()
