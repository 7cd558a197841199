"""The ops on the arenas of a whole network: ``modulate_many_out``, ``modulate_many_backward_out``, ``step_many``.

They write into buffers that a ``ModulationPlan`` owns and have no derivative formula: where an input asks for
gradients they refuse; ``modulate_many`` is the differentiable form. ``weight``, ``grad``, ``out``, ``grad_weight``
are flat, each layer as ``[O, taps, I]``; gamma, beta and their gradients are flat, each layer as ``[O, I]``;
``layers`` int64 ``[L, 6]`` on the CPU: first weight, first pair, O, I, taps, flags (1: gamma stays, 2: beta stays);
``tiles`` what ``adafm_kernels._C.plan_tiles`` makes of it, which CUDA tensors and Triton need.
"""

import torch
from torch import Tensor

from . import _arguments, backends
from ._ops import _library

_library.define(
    "modulate_many_out(Tensor weight, Tensor gamma, Tensor beta, Tensor layers, Tensor? tiles, *, Tensor(a!) out, "
    "str? backend=None) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "modulate_many_backward_out(Tensor grad, Tensor weight, Tensor? gamma, Tensor layers, Tensor? tiles, *, "
    "Tensor(a!)? grad_weight=None, Tensor(b!)? grad_gamma=None, Tensor(c!)? grad_beta=None, str? backend=None) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "step_many(Tensor grad, Tensor weight, Tensor layers, Tensor? tiles, Tensor hyper, *, Tensor(a!) parameters, "
    "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? average=None, Tensor(e!)? out=None, str? backend=None) "
    "-> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _modulate_many_out(
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    layers: Tensor,
    tiles: Tensor | None,
    *,
    out: Tensor,
    backend: str | None = None,
) -> None:
    wide = _arguments.accumulation_type(weight)
    _arguments.check_weight_arenas(weight, weight=weight, out=out)
    _arguments.check_pair_arenas(weight, wide, gamma=gamma, beta=beta)
    _arguments.check_layers(layers, min(weight.numel(), out.numel()), min(gamma.numel(), beta.numel()))
    _arguments.check_apart({"out": out}, {"weight": weight, "gamma": gamma, "beta": beta})
    implementation = backends.implementation(weight.device, backend)
    implementation.modulate_many_out(weight, gamma, beta, layers, tiles, out)


def _modulate_many_backward_out(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    layers: Tensor,
    tiles: Tensor | None,
    *,
    grad_weight: Tensor | None = None,
    grad_gamma: Tensor | None = None,
    grad_beta: Tensor | None = None,
    backend: str | None = None,
) -> None:
    wide = _arguments.accumulation_type(weight)
    _arguments.check_weight_arenas(weight, weight=weight, grad=grad)
    pairs = {"gamma": gamma, "grad_gamma": grad_gamma, "grad_beta": grad_beta}
    pairs = {name: arena for name, arena in pairs.items() if arena is not None}
    _arguments.check_pair_arenas(weight, wide, **pairs)
    written = {name: arena for name, arena in pairs.items() if name != "gamma"}
    read = {"grad": grad, "weight": weight} | ({} if gamma is None else {"gamma": gamma})
    weights = [weight, grad]
    if grad_weight is not None:
        if gamma is None:
            raise ValueError("gamma is None; grad_weight = gamma * grad needs it")
        _arguments.check_weight_arenas(weight, grad_weight=grad_weight)
        if grad_weight.dtype != weight.dtype:
            raise TypeError(f"grad_weight is {grad_weight.dtype}; expected the weight's type {weight.dtype}")
        written["grad_weight"] = grad_weight
        weights.append(grad_weight)
    pair_end = min((arena.numel() for arena in pairs.values()), default=None)
    _arguments.check_layers(layers, min(arena.numel() for arena in weights), pair_end)
    _arguments.check_apart(written, read)
    if written:
        implementation = backends.implementation(weight.device, backend)
        implementation.modulate_many_backward_out(
            grad, weight, gamma, layers, tiles, grad_weight, grad_gamma, grad_beta
        )


def _step_many(
    grad: Tensor,
    weight: Tensor,
    layers: Tensor,
    tiles: Tensor | None,
    hyper: Tensor,
    *,
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    average: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> None:
    wide = _arguments.accumulation_type(weight)
    weights = {"weight": weight, "grad": grad} | ({} if out is None else {"out": out})
    _arguments.check_weight_arenas(weight, **weights)
    _arguments.check_pair_arenas(weight, wide, hyper=hyper)
    if hyper.numel() != 8:
        raise ValueError(f"hyper has shape {list(hyper.shape)}; expected [8]")
    written = {"parameters": parameters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if average is not None:
        written["average"] = average
    _arguments.check_pair_arenas(weight, wide, rows=2, **written)
    for name, arena in written.items():
        if arena.shape != parameters.shape:
            raise ValueError(
                f"{name} has shape {list(arena.shape)}; expected that of parameters, {list(parameters.shape)}"
            )
    _arguments.check_layers(layers, min(arena.numel() for arena in weights.values()), parameters.shape[1])
    if out is not None:
        written["out"] = out
    _arguments.check_apart(written, {"grad": grad, "weight": weight, "hyper": hyper})
    implementation = backends.implementation(weight.device, backend)
    implementation.step_many(grad, weight, layers, tiles, hyper, parameters, exp_avg, exp_avg_sq, average, out)


def _refuse(name: str, op: torch._ops.OpOverload):
    """The op below autograd; RuntimeError where an input asks for gradients."""

    def call(keyset, *args, **kwargs):
        if torch.is_grad_enabled():
            for position, value in (*enumerate(args), *kwargs.items()):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"{name} has no derivative, but its argument {position} asks for gradients; call "
                        "modulate_many, which has one, or detach the arenas (a ModulationPlan's are)"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return call


def _register() -> None:
    for name, function in (
        ("modulate_many_out", _modulate_many_out),
        ("modulate_many_backward_out", _modulate_many_backward_out),
        ("step_many", _step_many),
    ):
        op = getattr(torch.ops.adafm, name).default
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"adafm::{name}", lambda *args, **kwargs: None, lib=_library)
        _library.impl(name, _refuse(name, op), "Autograd", with_keyset=True)


_register()
