"""Triton launchers of ``modulate_many`` and ``modulate_many_backward``: separate weights, one launch for all of them.

Addresses, sizes and strides travel in one table copied to the device, so that nothing is compiled anew for another
network. Weights of any layout are read where they lie; only one that is neither contiguous nor channels-last is copied.
"""

import torch
import triton.language as tl
from torch import Tensor

from .._arguments import accumulation_type, dense, is_channels_last
from . import interpreting
from .triton_launch import constant, next_power, on_device, options, register, taps_of
from .triton_many_kernels import FLAT, GENERAL, ROWS, ROWS_ANY, modulate_many_backward_kernel, modulate_many_kernel

# Pairs of one program, and those of a GENERAL layer that it works on at a time.
PAIRS = 1024
SCALAR_PAIRS = 128
_INTERPRETED_PAIRS = 1 << 14
# Taps in flight of ROWS layers: of the forward, of the sums, of the sums with dW.
FORWARD_UNROLL = 9
SUMS_UNROLL = 5
WEIGHT_UNROLL = 3
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def _aligned(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _unit_rows(tensor: Tensor) -> bool:
    """Whether neighbouring input channels lie side by side."""
    return is_channels_last(tensor) or taps_of(tensor) == 1


def _along_rows(parameter: Tensor) -> bool:
    """Whether gamma or beta ``[O, I]`` can be read 16 bytes at a time."""
    return parameter.stride(1) == 1 and parameter.stride(0) % 8 == 0 and _aligned(parameter)


def _mode(source: Tensor, target: Tensor, parameters: tuple[Tensor, ...]) -> int:
    """How an elementwise pass over a layer from ``source`` to ``target`` is done."""
    if not _aligned(source, target):
        return GENERAL.value
    if _unit_rows(source) and _unit_rows(target) and source.shape[1] % 8 == 0:
        return ROWS.value if all(map(_along_rows, parameters)) else ROWS_ANY.value
    if source.is_contiguous() and target.is_contiguous() and source.numel() % 8 == 0:
        return FLAT.value
    return GENERAL.value


def _strides(tensor: Tensor, taps: int) -> tuple[int, int]:
    """Distances of neighbouring pairs of a filter and of neighbouring taps."""
    return (1, tensor.shape[1]) if _unit_rows(tensor) else (taps, 1)


def _table(rows: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, int]:
    """The table ``[fields, layers]`` on the device, the first program of each layer before it, and all programs."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "modulate_many of the Triton backend cannot be captured in a CUDA graph: it copies a table of addresses "
            "from the host at every call; use the ops over arenas (modulate_many_out) or backend='compiled'"
        )
    pairs, first, table = _pairs(), 0, []
    for row in rows:
        table.append((first, *row))
        first += -(-row[1] // pairs)
    return torch.tensor(table, dtype=torch.int64).t().contiguous().to(device, non_blocking=True), first


def _pairs() -> int:
    return _INTERPRETED_PAIRS if interpreting() else PAIRS


def _launch(kernel, rows: list[tuple[int, ...]], weight: Tensor, **constants) -> None:
    """One launch over the layers in ``rows``, on the device of ``weight``."""
    if not rows:
        return
    pairs = _pairs()
    scalar = pairs if interpreting() else SCALAR_PAIRS
    with on_device(weight.device):
        table, programs = _table(rows, weight.device)
        kernel[(programs,)](
            table,
            len(rows),
            LAYERS=next_power(len(rows)),
            PAIRS=pairs,
            SCALAR_BLOCK=scalar,
            FLAT_BLOCK=pairs,
            **constants,
            **options(weight),
        )


def row_of_forward(weight: Tensor, gamma: Tensor, beta: Tensor, out: Tensor) -> tuple[int, ...]:
    """The fields of one layer behind its first program: mode, pairs, I, taps, gamma, beta, weight, out, elements."""
    taps = taps_of(weight)
    return (
        _mode(weight, out, (gamma, beta)),
        weight.shape[0] * weight.shape[1],
        weight.shape[1],
        taps,
        gamma.data_ptr(),
        *gamma.stride(),
        beta.data_ptr(),
        *beta.stride(),
        weight.data_ptr(),
        *_strides(weight, taps),
        out.data_ptr(),
        *_strides(out, taps),
        weight.numel(),
    )


def row_of_backward(
    grad: Tensor, weight: Tensor, gamma: Tensor, d_weight: Tensor | None, d_gamma: Tensor | None, d_beta: Tensor | None
) -> tuple[int, ...]:
    """The fields of one layer behind its first program: mode, pairs, I, taps, gamma, grad, weight, results."""
    taps = taps_of(weight)
    results = tuple(tensor for tensor in (d_weight, d_gamma, d_beta) if tensor is not None)
    mode = _mode(grad, weight, (gamma,) if d_weight is not None else ())
    if not _aligned(*results):
        mode = GENERAL.value
    return (
        mode,
        weight.shape[0] * weight.shape[1],
        weight.shape[1],
        taps,
        gamma.data_ptr(),
        *gamma.stride(),
        grad.data_ptr(),
        *_strides(grad, taps),
        weight.data_ptr(),
        *_strides(weight, taps),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (d_weight, d_gamma, d_beta)),
        weight.numel(),
    )


def _launch_modulate(
    weights: list[Tensor],
    gammas: list[Tensor | None],
    betas: list[Tensor | None],
    dtype: torch.dtype,
    channels_last: list[bool],
) -> list[Tensor]:
    outs, rows, kept = [], [], []
    for weight, gamma, beta, last in zip(weights, gammas, betas, channels_last, strict=True):
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=_format(weight, last))
        outs.append(out)
        if out.numel() == 0:
            continue
        weight = dense(weight)
        gamma = constant(1.0, weight) if gamma is None else gamma
        beta = constant(0.0, weight) if beta is None else beta
        # Addresses in a table keep no tensor alive.
        kept.append((weight, gamma, beta))
        rows.append(row_of_forward(weight, gamma, beta, out))
    if rows:
        types = {"WEIGHT": _TYPES[weights[0].dtype], "OUT": _TYPES[dtype]}
        _launch(modulate_many_kernel, rows, weights[0], UNROLL=FORWARD_UNROLL, **types)
    return outs


def _format(weight: Tensor, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if weight.dim() == 4 else torch.channels_last_3d


def _launch_backward(
    grads: list[Tensor], weights: list[Tensor], gammas: list[Tensor | None], mask: list[bool], channels_last: list[bool]
) -> list[Tensor]:
    groups: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    kept, rows = [], {}
    for grad, weight, gamma, last in zip(grads, weights, gammas, channels_last, strict=True):
        wide, pairs = accumulation_type(weight), weight.shape[:2]
        grad, weight = dense(grad), dense(weight)
        # No tap: the sums are zero, and there is nothing to launch.
        empty = weight.new_zeros if weight.numel() == 0 else weight.new_empty
        results = (
            torch.empty_like(weight, memory_format=_format(weight, last)) if mask[0] else None,
            empty(pairs, dtype=wide) if mask[1] else None,
            empty(pairs, dtype=wide) if mask[2] else None,
        )
        for group, result in zip(groups, results, strict=True):
            if result is not None:
                group.append(result)
        if weight.numel() == 0:
            continue
        gamma = constant(1.0, weight) if gamma is None else gamma
        if mask[0] and not _along_rows(gamma):
            gamma = gamma.contiguous()
        kept.append((grad, weight, gamma))
        rows.setdefault(grad.dtype, []).append(row_of_backward(grad, weight, gamma, *results))
    if any(mask):
        for kind, layers in rows.items():
            _launch(
                modulate_many_backward_kernel,
                layers,
                weights[0],
                GRAD=_TYPES[kind],
                WEIGHT=_TYPES[weights[0].dtype],
                UNROLL=WEIGHT_UNROLL if mask[0] else SUMS_UNROLL,
                NEED_WEIGHT=mask[0],
                NEED_GAMMA=mask[1],
                NEED_BETA=mask[2],
            )
    return [*groups[0], *groups[1], *groups[2]]


_modulate = register(
    "modulate_many(Tensor[] weights, Tensor?[] gammas, Tensor?[] betas, ScalarType dtype, bool[] channels_last) "
    "-> Tensor[]",
    _launch_modulate,
)
_backward = register(
    "modulate_many_backward(Tensor[] grads, Tensor[] weights, Tensor?[] gammas, bool[3] mask, bool[] channels_last) "
    "-> Tensor[]",
    _launch_backward,
)


def modulate_many(
    weights: list[Tensor],
    gammas: list[Tensor | None],
    betas: list[Tensor | None],
    dtype: torch.dtype,
    memory_formats: list[torch.memory_format],
) -> list[Tensor]:
    """W' = gamma * W + beta of every layer in one launch, by one fused multiply-add each, rounded once."""
    return _modulate(weights, gammas, betas, dtype, [form != torch.contiguous_format for form in memory_formats])


def modulate_many_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    gammas: list[Tensor | None],
    mask: list[bool],
    memory_formats: list[torch.memory_format],
) -> list[Tensor]:
    """dW, dgamma, dbeta of every layer in one launch for each type of gradient; sums in the order of the taps.

    All dW come first, then all dgamma and all dbeta (``[O, I]``); groups not in ``mask`` are left out.
    """
    return _backward(grads, weights, gammas, mask, [form != torch.contiguous_format for form in memory_formats])
