"""Checks and resolution of the arguments of the modulation ops.

Every rule about shapes, types, devices and layouts is stated here once; the ops and their fake kernels call it, so that
eager code and compiled graphs raise the same errors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def accumulation_type(weight: Tensor) -> torch.dtype:
    """The type that an op on ``weight`` computes in: float64 for float64, float32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a rank 4 or 5 tensor is dense in channels-last order and not also contiguous."""
    form = _CHANNELS_LAST.get(tensor.dim())
    return form is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=form)


def result_format(weight: Tensor, memory_format: torch.memory_format | None) -> torch.memory_format:
    """The layout of the result: the asked one, or the weight's own (contiguous for a weight that is not dense)."""
    if memory_format is None or memory_format == torch.preserve_format:
        return _CHANNELS_LAST[weight.dim()] if is_channels_last(weight) else torch.contiguous_format
    if memory_format != torch.contiguous_format and memory_format != _CHANNELS_LAST.get(weight.dim()):
        raise ValueError(
            f"memory_format is {memory_format} for a weight of rank {weight.dim()}; expected torch.contiguous_format, "
            "torch.channels_last (rank 4) or torch.channels_last_3d (rank 5)"
        )
    return memory_format


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """A floating-point tensor ``[O, I, *K]`` with no to three kernel dimensions."""
    if weight.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} is {weight.dtype}; expected float32, float64, float16 or bfloat16")
    if not 2 <= weight.dim() <= 5:
        raise ValueError(
            f"{name} has shape {list(weight.shape)}; expected [O, I] or [O, I, *K] with one to three kernel dimensions"
        )


def check_parameter(parameter: Tensor | None, weight: Tensor, name: str) -> None:
    """gamma or beta: None, or a floating-point tensor of one of the shapes that spread over ``[O, I]``."""
    if parameter is None:
        return
    shape, pairs = parameter.shape, weight.shape[:2]
    fits = shape == pairs or (len(shape) == weight.dim() and shape[:2] == pairs and shape[2:].numel() == 1)
    if fits and parameter.dtype == torch.float32 and parameter.device == weight.device:
        return
    if parameter.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} is {parameter.dtype}; expected float32, float64, float16 or bfloat16")
    if parameter.device != weight.device:
        raise ValueError(f"{name} is on {parameter.device} and weight on {weight.device}; move both to one device")
    outer, inner = pairs
    if (
        len(shape) < 2
        or (shape[0] != outer and shape[0] != 1)
        or (shape[1] != inner and shape[1] != 1)
        or any(side != 1 for side in shape[2:])
    ):
        raise ValueError(
            f"{name} has shape {list(shape)}; expected [{outer}, {inner}], [{outer}, 1] or [1, {inner}], with any "
            f"number of trailing ones, for a weight of shape {list(weight.shape)}"
        )


def check_modulate(weight: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype | None) -> None:
    """Raise TypeError or ValueError unless the arguments of ``modulate`` fit together."""
    check_weight(weight)
    check_parameter(gamma, weight, "gamma")
    check_parameter(beta, weight, "beta")
    if dtype is not None and dtype not in FLOAT_TYPES:
        raise TypeError(f"dtype is {dtype}; expected float32, float64, float16 or bfloat16")


def check_modulate_backward(grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: list[bool]) -> None:
    """Raise TypeError or ValueError unless the arguments of ``modulate_backward`` fit together."""
    check_weight(weight)
    check_weight(grad, "grad")
    check_parameter(gamma, weight, "gamma")
    if grad.shape != weight.shape:
        raise ValueError(f"grad has shape {list(grad.shape)}; expected the weight's shape {list(weight.shape)}")
    if grad.device != weight.device:
        raise ValueError(f"grad is on {grad.device} and weight on {weight.device}; move both to one device")
    if len(mask) != 3:
        raise ValueError(f"mask has {len(mask)} entries; expected 3 (weight, gamma, beta)")


def result_format_of_many(weight: Tensor, memory_format: torch.memory_format | None) -> torch.memory_format:
    """The layout of one result among many: channels-last for every rank that has it where it is asked for."""
    if memory_format in (torch.channels_last, torch.channels_last_3d):
        return _CHANNELS_LAST.get(weight.dim(), torch.contiguous_format)
    return result_format(weight, memory_format)


def check_modulate_many(
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
    dtype: torch.dtype | None,
) -> None:
    """Raise TypeError or ValueError unless the lists of ``modulate_many`` fit together."""
    _check_lists(weights, gammas=gammas, betas=betas)
    for number, (weight, gamma, beta) in enumerate(zip(weights, gammas, betas, strict=True)):
        check_parameter(gamma, weight, f"gammas[{number}]")
        check_parameter(beta, weight, f"betas[{number}]")
    if dtype is not None and dtype not in FLOAT_TYPES:
        raise TypeError(f"dtype is {dtype}; expected float32, float64, float16 or bfloat16")


def check_modulate_many_backward(
    grads: Sequence[Tensor], weights: Sequence[Tensor], gammas: Sequence[Tensor | None], mask: Sequence[bool]
) -> None:
    """Raise TypeError or ValueError unless the lists of ``modulate_many_backward`` fit together."""
    _check_lists(weights, grads=grads, gammas=gammas)
    if len(mask) != 3:
        raise ValueError(f"mask has {len(mask)} entries; expected 3 (weights, gammas, betas)")
    for number, (grad, weight, gamma) in enumerate(zip(grads, weights, gammas, strict=True)):
        check_weight(grad, f"grads[{number}]")
        check_parameter(gamma, weight, f"gammas[{number}]")
        if grad.shape != weight.shape or grad.dtype != grads[0].dtype or grad.device != weight.device:
            raise ValueError(
                f"grads[{number}] is {grad.dtype} {list(grad.shape)} on {grad.device}; expected {grads[0].dtype} like "
                f"grads[0], and shape and device of its weight, {list(weight.shape)} on {weight.device}"
            )


def check_lengths(weights: Sequence[Tensor], **others: Sequence[Tensor | None]) -> None:
    """Raise ValueError unless there is one of each for every weight."""
    for name, tensors in others.items():
        if len(tensors) != len(weights):
            raise ValueError(f"{name} holds {len(tensors)} tensors; expected {len(weights)}, one for each weight")


def _check_lists(weights: Sequence[Tensor], **others: Sequence[Tensor | None]) -> None:
    check_lengths(weights, **others)
    for number, weight in enumerate(weights):
        check_weight(weight, f"weights[{number}]")
        if weight.dtype != weights[0].dtype or weight.device != weights[0].device:
            raise ValueError(
                f"weights[{number}] is {weight.dtype} on {weight.device} and weights[0] {weights[0].dtype} on "
                f"{weights[0].device}; all weights need one type and one device"
            )


def check_per_sample(weight: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype | None) -> int:
    """Raise TypeError or ValueError unless the arguments of ``modulate_per_sample`` fit together; N."""
    check_weight(weight)
    if dtype is not None and dtype not in FLOAT_TYPES:
        raise TypeError(f"dtype is {dtype}; expected float32, float64, float16 or bfloat16")
    counts = []
    for name, parameter in (("gamma", gamma), ("beta", beta)):
        if parameter is not None:
            check_sets(parameter, weight, None, name)
            counts.append(parameter.shape[0])
    if not counts:
        raise ValueError("gamma and beta are both None; one of them has to say how many samples there are")
    if counts[0] != counts[-1] and counts[0] != 1 and counts[-1] != 1:
        raise ValueError(f"gamma holds {counts[0]} samples and beta {counts[1]}; expected one number, or 1")
    return counts[0] if counts[0] != 1 else counts[-1]


def check_per_sample_backward(grad: Tensor, weight: Tensor, gamma: Tensor | None, mask: Sequence[bool]) -> None:
    """Raise TypeError or ValueError unless the arguments of ``modulate_per_sample_backward`` fit together."""
    check_weight(weight)
    if grad.dtype not in FLOAT_TYPES:
        raise TypeError(f"grad is {grad.dtype}; expected float32, float64, float16 or bfloat16")
    if grad.dim() != weight.dim() + 1 or grad.shape[1:] != weight.shape or grad.device != weight.device:
        raise ValueError(
            f"grad has shape {list(grad.shape)} on {grad.device}; expected [N, {', '.join(map(str, weight.shape))}] on "
            f"{weight.device}"
        )
    if gamma is not None:
        check_sets(gamma, weight, grad.shape[0], "gamma")
    if len(mask) != 3:
        raise ValueError(f"mask has {len(mask)} entries; expected 3 (weight, gamma, beta)")


def check_group(weight: Tensor, over: str, eps: float) -> None:
    """Over what ``modulate_normalized`` normalises: at least two weights in each group."""
    if over not in ("filter", "channel"):
        raise ValueError(f'over is {over!r}; expected "filter" or "channel"')
    if not eps >= 0.0:
        raise ValueError(f"eps is {eps}; expected 0 or more")
    members = weight.shape[2 if over == "filter" else 1 :].numel()
    if members < 2 and weight.shape[:2].numel() != 0:
        hint = '; over="channel" takes all weights of an output channel' if over == "filter" else ""
        raise ValueError(
            f"weight has shape {list(weight.shape)}, {members} in each {over}; a sample deviation needs at least "
            f"2{hint}"
        )


def check_factors(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> None:
    """The factors of a low-rank gamma: u ``[O, R]``, s ``[R]``, v ``[I, R]``."""
    outer, inner = weight.shape[:2]
    rank = s.shape[0] if s.dim() == 1 else -1
    for name, factor, expected in (("s", s, [rank]), ("u", u, [outer, rank]), ("v", v, [inner, rank])):
        if factor.dtype not in FLOAT_TYPES:
            raise TypeError(f"{name} is {factor.dtype}; expected float32, float64, float16 or bfloat16")
        if factor.device != weight.device:
            raise ValueError(f"{name} is on {factor.device} and weight on {weight.device}; move both to one device")
        if list(factor.shape) != expected:
            wanted = {"s": "[R]", "u": f"[{outer}, R]", "v": f"[{inner}, R]"}[name]
            known = f" with R = {rank}, as s has" if rank >= 0 else ""
            raise ValueError(f"{name} has shape {list(factor.shape)}; expected {wanted}{known}")


def check_sets(parameter: Tensor, weight: Tensor, samples: int | None, name: str) -> None:
    """gamma or beta of N samples: a floating-point tensor of a shape that spreads over ``[N, O, I]``."""
    if parameter.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} is {parameter.dtype}; expected float32, float64, float16 or bfloat16")
    if parameter.device != weight.device:
        raise ValueError(f"{name} is on {parameter.device} and weight on {weight.device}; move both to one device")
    shape, (outer, inner) = parameter.shape, weight.shape[:2]
    if (
        len(shape) < 3
        or (samples is not None and shape[0] not in (samples, 1))
        or shape[1] not in (outer, 1)
        or shape[2] not in (inner, 1)
        or any(side != 1 for side in shape[3:])
    ):
        raise ValueError(
            f"{name} has shape {list(shape)}; expected [{'N' if samples is None else samples}, {outer}, {inner}], with "
            "1 in place of any of the three and any number of trailing ones, for a weight of shape "
            f"{list(weight.shape)}"
        )


def over_pairs(parameter: Tensor | None, weight: Tensor) -> Tensor | None:
    """gamma or beta as ``[O, I]`` in the type the op computes in; a view where the type allows it."""
    if parameter is None:
        return None
    pairs, wide = weight.shape[:2], accumulation_type(weight)
    if parameter.dim() > 2:
        parameter = parameter.view(parameter.shape[:2])
    if parameter.shape != pairs:
        parameter = parameter.expand(pairs)
    return parameter if parameter.dtype == wide else parameter.to(wide)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where it is contiguous or channels-last, else a contiguous copy."""
    return tensor if tensor.is_contiguous() or is_channels_last(tensor) else tensor.contiguous()


def check_weight_arenas(weight: Tensor, /, **arenas: Tensor) -> None:
    """Flat buffers of weights or their gradients: contiguous, floating-point, on the weight's device."""
    for name, arena in arenas.items():
        if arena.dtype not in FLOAT_TYPES:
            raise TypeError(f"{name} is {arena.dtype}; expected float32, float64, float16 or bfloat16")
        if arena.dim() != 1 or not arena.is_contiguous():
            raise ValueError(
                f"{name} has shape {list(arena.shape)} and strides {list(arena.stride())}; expected a contiguous "
                "one-dimensional arena"
            )
        if arena.device != weight.device:
            raise ValueError(f"{name} is on {arena.device} and weight on {weight.device}; move both to one device")


def check_pair_arenas(weight: Tensor, wide: torch.dtype, /, rows: int = 1, **arenas: Tensor) -> None:
    """Flat buffers of pairs (``rows`` 1), or of gamma's and beta's pairs (``rows`` 2), in the computing type."""
    for name, arena in arenas.items():
        if arena.dtype != wide:
            raise TypeError(f"{name} is {arena.dtype}; expected {wide} for a {weight.dtype} weight")
        shape_fits = arena.dim() == 1 if rows == 1 else arena.dim() == 2 and arena.shape[0] == rows
        if not shape_fits or not arena.is_contiguous():
            expected = "one-dimensional arena" if rows == 1 else f"arena [{rows}, pairs]"
            raise ValueError(
                f"{name} has shape {list(arena.shape)} and strides {list(arena.stride())}; expected a contiguous "
                f"{expected}"
            )
        if arena.device != weight.device:
            raise ValueError(f"{name} is on {arena.device} and weight on {weight.device}; move both to one device")


def check_layers(layers: Tensor, weight_end: int, pair_end: int | None) -> None:
    """The table of an arena's layers: each inside the arenas, at multiples of 8, behind the one before it."""
    if layers.dtype != torch.int64 or layers.device.type != "cpu":
        raise TypeError(f"layers is {layers.dtype} on {layers.device}; expected int64 on the CPU")
    if layers.dim() != 2 or layers.shape[1] != 6 or not layers.is_contiguous():
        raise ValueError(f"layers has shape {list(layers.shape)}; expected a contiguous [L, 6]")
    weight_before = pair_before = 0
    for number, (weight, pair, outer, inner, taps, _) in enumerate(layers.tolist()):
        if outer < 0 or inner < 0 or taps < 1:
            raise ValueError(
                f"layers[{number}] has O {outer}, I {inner} and {taps} taps; expected O and I of at least 0, and a tap"
            )
        if weight % 8 or pair % 8 or weight < weight_before or pair < pair_before:
            raise ValueError(
                f"layers[{number}] begins at weight {weight} and pair {pair}; expected multiples of 8 behind the layer "
                f"before, {weight_before} and {pair_before}"
            )
        weight_before, pair_before = weight + outer * inner * taps, pair + outer * inner
        if weight_before > weight_end or (pair_end is not None and pair_before > pair_end):
            raise ValueError(
                f"layers[{number}] ends at weight {weight_before} and pair {pair_before}; the arenas end at "
                f"{weight_end} and {pair_end}"
            )


def check_apart(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """No tensor that is written shares memory with another argument."""
    spans = {
        name: (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for name, tensor in (*written.items(), *read.items())
    }
    names = list(spans)
    for position, name in enumerate(names[: len(written)]):
        for other in names[position + 1 :]:
            if spans[name][0] < spans[other][1] and spans[other][0] < spans[name][1]:
                raise ValueError(f"{name} shares memory with {other}; give it memory of its own")
