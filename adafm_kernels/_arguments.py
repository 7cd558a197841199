"""Checks and resolution of the arguments of the modulation ops.

Every rule about shapes, types, devices and layouts is stated here once; the ops and their fake kernels call it, so that
eager code and compiled graphs raise the same errors.
"""

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
    if parameter.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} is {parameter.dtype}; expected float32, float64, float16 or bfloat16")
    if parameter.device != weight.device:
        raise ValueError(f"{name} is on {parameter.device} and weight on {weight.device}; move both to one device")
    shape = parameter.shape
    outer, inner = weight.shape[0], weight.shape[1]
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


def over_pairs(parameter: Tensor | None, weight: Tensor) -> Tensor | None:
    """gamma or beta as ``[O, I]`` in the type the op computes in; a view where the type allows it."""
    if parameter is None:
        return None
    pairs, wide = weight.shape[:2], accumulation_type(weight)
    if parameter.dim() > 2:
        parameter = parameter.reshape(parameter.shape[:2])
    if parameter.shape != pairs:
        parameter = parameter.expand(pairs)
    return parameter if parameter.dtype == wide else parameter.to(wide)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where it is contiguous or channels-last, else a contiguous copy."""
    return tensor if tensor.is_contiguous() or is_channels_last(tensor) else tensor.contiguous()
