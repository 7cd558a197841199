"""Triton launchers of a whole network in arenas: one launch, one program for each tile (csrc/include/adafm/arena.h)."""

import torch
from torch import Tensor

from . import interpreting
from .triton_arena_kernels import modulate_arena_kernel, modulate_backward_arena_kernel, step_many_kernel
from .triton_launch import on_device, options, register

# Pairs of a vector tile; pairs that a scalar tile works on at a time: its programs run beside vector tiles in the same
# kernel and must not take more registers.
VECTOR_PAIRS = 1024
SCALAR_PAIRS = 128
_INTERPRETED_SCALAR_PAIRS = 1 << 14
# Taps in flight: as many as leave no kernel with spilled registers.
FORWARD_UNROLL = 9
SUMS_UNROLL = 5
UPDATE_UNROLL = 4


def _common(weight: Tensor, unroll: int) -> dict:
    scalar = _INTERPRETED_SCALAR_PAIRS if interpreting() else SCALAR_PAIRS
    return {"UNROLL": unroll, "BLOCK": VECTOR_PAIRS, "SCALAR_BLOCK": scalar, **options(weight)}


def _planned(layers: Tensor, tiles: Tensor | None) -> Tensor:
    """The tiles; planned here where a caller on the CPU gave none."""
    if tiles is not None:
        return tiles
    from adafm_kernels import _C

    plan = bytearray(_C.plan_tiles([tuple(row) for row in layers.tolist()]))
    return torch.frombuffer(plan, dtype=torch.int32).view(-1, 4) if plan else torch.empty(0, 4, dtype=torch.int32)


def _launch_modulate(
    weight: Tensor, gamma: Tensor, beta: Tensor, layers: Tensor, tiles: Tensor | None, *, out: Tensor
) -> None:
    tiles = _planned(layers, tiles)
    if len(tiles) == 0:
        return
    with on_device(weight.device):
        modulate_arena_kernel[(len(tiles),)](tiles, weight, gamma, beta, out, **_common(weight, FORWARD_UNROLL))


def _launch_backward(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    layers: Tensor,
    tiles: Tensor | None,
    *,
    grad_weight: Tensor | None = None,
    grad_gamma: Tensor | None = None,
    grad_beta: Tensor | None = None,
) -> None:
    tiles = _planned(layers, tiles)
    if len(tiles) == 0 or (grad_weight is None and grad_gamma is None and grad_beta is None):
        return
    if grad_weight is None:
        gamma = None
    elif gamma is None:
        # Only arenas are read: identity needs one that holds ones.
        elements = int((layers[:, 1] + layers[:, 2] * layers[:, 3]).max())
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        gamma = torch.ones(elements, dtype=wide, device=weight.device)
    unroll = SUMS_UNROLL if grad_weight is None else UPDATE_UNROLL
    with on_device(weight.device):
        modulate_backward_arena_kernel[(len(tiles),)](
            tiles, grad, weight, gamma, grad_weight, grad_gamma, grad_beta, **_common(weight, unroll)
        )


def _launch_step(
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
) -> None:
    tiles = _planned(layers, tiles)
    if len(tiles) == 0:
        return
    # The kernel must know that beta's half begins at a multiple of eight, to read it 16 bytes at a time.
    stride = parameters.stride(0)
    unit = 8 if stride % 8 == 0 else 1
    with on_device(weight.device):
        step_many_kernel[(len(tiles),)](
            tiles,
            grad,
            weight,
            hyper,
            parameters,
            exp_avg,
            exp_avg_sq,
            average,
            out,
            stride // unit,
            UNIT=unit,
            **_common(weight, UPDATE_UNROLL),
        )


_modulate = register(
    "modulate_many_out(Tensor weight, Tensor gamma, Tensor beta, Tensor layers, Tensor? tiles, *, Tensor(a!) out) "
    "-> ()",
    _launch_modulate,
)
_backward = register(
    "modulate_many_backward_out(Tensor grad, Tensor weight, Tensor? gamma, Tensor layers, Tensor? tiles, *, "
    "Tensor(a!)? grad_weight=None, Tensor(b!)? grad_gamma=None, Tensor(c!)? grad_beta=None) -> ()",
    _launch_backward,
)
_step = register(
    "step_many(Tensor grad, Tensor weight, Tensor layers, Tensor? tiles, Tensor hyper, *, Tensor(a!) parameters, "
    "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? average=None, Tensor(e!)? out=None) -> ()",
    _launch_step,
)


def modulate_many_out(
    weight: Tensor, gamma: Tensor, beta: Tensor, layers: Tensor, tiles: Tensor | None, out: Tensor
) -> None:
    """out = gamma * weight + beta over arenas, by one fused multiply-add each, rounded once; padding is not written."""
    _modulate(weight, gamma, beta, layers, tiles, out=out)


def modulate_many_backward_out(
    grad: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    layers: Tensor,
    tiles: Tensor | None,
    grad_weight: Tensor | None,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
) -> None:
    """dW = gamma * G, dgamma = sum over taps of G * W, dbeta = sum over taps of G, over arenas; None: not computed."""
    _backward(grad, weight, gamma, layers, tiles, grad_weight=grad_weight, grad_gamma=grad_gamma, grad_beta=grad_beta)


def step_many(
    grad: Tensor,
    weight: Tensor,
    layers: Tensor,
    tiles: Tensor | None,
    hyper: Tensor,
    parameters: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    average: Tensor | None,
    out: Tensor | None,
) -> None:
    """Sums over the taps, one Adam step, average and the next modulate; csrc/include/adafm/step_many.h."""
    _step(
        grad,
        weight,
        layers,
        tiles,
        hyper,
        parameters=parameters,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        average=average,
        out=out,
    )
