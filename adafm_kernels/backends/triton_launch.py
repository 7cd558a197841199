"""What the Triton launchers share: the op library ``adafm_triton``, the device, options, and sizes of tiles."""

import contextlib

import torch
import triton.language as tl
from torch import Tensor

from .._arguments import accumulation_type
from . import interpreting

_MAX_UNROLL = 16

if interpreting():
    from .triton_interpreter import mend

    mend()

library = torch.library.Library("adafm_triton", "DEF")


def register(schema: str, launcher) -> torch._ops.OpOverload:
    """Define ``adafm_triton::schema`` with one implementation for every device, and return the op."""
    library.define(schema)
    name = schema[: schema.index("(")]
    library.impl(name, launcher, "CompositeExplicitAutograd")
    return getattr(torch.ops.adafm_triton, name).default


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a CUDA device the current one: Triton launches on the current device and its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def options(weight: Tensor) -> dict:
    """What every kernel takes: the type of the computation, and no contraction beside the written one."""
    wide = tl.float64 if weight.dtype == torch.float64 else tl.float32
    return {"ACC": wide, "num_warps": 4, "enable_fp_fusion": False}


def tiles(outer: int, inner: int, pairs: int) -> tuple[int, int]:
    """BLOCK_O and BLOCK_I, powers of two: whole rows where they fit into ``pairs``, and about that many pairs."""
    block_i = min(next_power(inner), pairs)
    return min(next_power(outer), pairs // block_i), block_i


def unroll(taps: int, most: int = _MAX_UNROLL) -> int:
    """The largest divisor of ``taps`` that is not above ``most``."""
    return max(divisor for divisor in range(1, min(taps, most) + 1) if taps % divisor == 0)


def next_power(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def taps_of(weight: Tensor) -> int:
    """The product of the kernel dimensions of ``[O, I, *K]``."""
    taps = 1
    for side in weight.shape[2:]:
        taps *= side
    return taps


def constant(value: float, weight: Tensor) -> Tensor:
    """The value as ``[O, I]`` with zero strides, in the type of the computation."""
    return torch.full((), value, dtype=accumulation_type(weight), device=weight.device).expand(weight.shape[:2])
