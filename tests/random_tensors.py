"""Random weights, parameters and gradients for ``test_random_inputs``: any shape, type and way of lying in memory."""

import math

import torch
from hypothesis import strategies as st
from modulation import normal
from torch import Tensor

from adafm_kernels.backends import interpreting

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST = 20  # largest side
# Triton's interpreter takes a millisecond for each tap of each program.
INTERPRETED_TAPS = 16
ELEMENTS = 20_000  # most elements of a tensor


def types():
    return st.sampled_from(TYPES)


def sides(most: int = MOST, least: int = 0):
    """Sides of a tensor; empty ones are rare."""
    return st.integers(1, most) | st.integers(1, most) | st.integers(least, most)


@st.composite
def shapes(draw, least_taps: int = 0) -> tuple[int, ...]:
    """``[O, I, *K]`` of rank 2 to 5, sides 0 to 20 as far as ``ELEMENTS`` goes."""
    left, found = ELEMENTS, []
    for position in range(draw(st.integers(2, 5))):
        if position == 2 and interpreting():
            left = min(left, INTERPRETED_TAPS)
        found.append(draw(sides(min(MOST, left), 0 if position < 2 else least_taps)))
        left //= max(found[-1], 1)
    return tuple(found)


@st.composite
def tensors(draw, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Normal numbers that lie permuted, with steps and offsets between NaNs, or repeated by a stride of zero."""
    rank = len(shape)
    kind = draw(st.sampled_from(("contiguous", "channels_last", "any")))
    order, steps, offsets, repeated = list(range(rank)), [1] * rank, [0] * rank, [False] * rank
    if kind == "channels_last" and rank > 2:
        order = [*range(rank - 3), *((0, 2, 1) if rank == 3 else (0, *range(2, rank), 1))][-rank:]
    if kind == "any":
        order = list(draw(st.permutations(order)))
        steps = draw(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=rank, max_size=rank))
        offsets = draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank))
        repeated = draw(st.lists(st.sampled_from((False, False, False, True)), min_size=rank, max_size=rank))
    held = [1 if r and side else side for side, r in zip(shape, repeated, strict=True)]
    room = [side * step + offset for side, step, offset in zip(held, steps, offsets, strict=True)]
    buffer = torch.full([room[axis] for axis in order], math.nan, dtype=dtype, device=device)
    view = buffer.permute([order.index(axis) for axis in range(rank)])
    view = view[tuple(slice(o, o + h * s, s) for o, h, s in zip(offsets, held, steps, strict=True))]
    view.copy_(normal(held, dtype, device, draw(st.integers(0, 999))))
    return view.expand(shape)


@st.composite
def parameters(draw, leading: tuple[int, ...], device: str = "cpu", optional: bool = True) -> Tensor | None:
    """gamma or beta of any type over ``leading``, with ones in place of some sides and behind; or None."""
    if optional and draw(st.integers(0, 5)) == 0:
        return None
    shape = [draw(st.sampled_from((side, side, 1))) for side in leading] + [1] * draw(st.integers(0, 3))
    return draw(tensors(tuple(shape), draw(types()), device))


@st.composite
def formats(draw, rank: int) -> torch.memory_format | None:
    last = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(rank, [])
    return draw(st.sampled_from((None, torch.contiguous_format, *last)))


def masks(size: int = 3):
    return st.lists(st.booleans(), min_size=size, max_size=size)


def computing(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def read(parameter: Tensor | None, weight: Tensor, default: float, leading: int = 2) -> Tensor:
    """The parameter as the op reads it, rounded to the computing type, in float64, ready to broadcast."""
    taps = (1,) * (weight.dim() - 2)
    if parameter is None:
        return torch.full((1,) * leading + taps, default, dtype=torch.float64, device=weight.device)
    return parameter.to(computing(weight)).double().reshape(*parameter.shape[:leading], *taps)


def assert_close(
    found: Tensor, expected: Tensor, error: Tensor, truncates: bool = False, only: Tensor | None = None
) -> None:
    """Within one rounding of ``found``'s type beside the ``error`` of the computation; nowhere NaN.

    ``only`` says which entries are compared: others may be anything finite.
    """
    kind = torch.finfo(found.dtype)
    store = (
        0.0
        if found.dtype == torch.float64
        else kind.eps * (1.0 if truncates and found.dtype == torch.bfloat16 else 0.5)
    )
    allowed = 1.01 * (store * expected.abs() + error) + kind.tiny * kind.eps
    assert found.shape == expected.shape and not found.isnan().any()
    off = ~((found.double() - expected).abs() <= allowed)
    if only is not None:
        off = off & only
    worst = (found.double() - expected).abs().sub(allowed)[off]
    assert not off.any(), f"{int(off.sum())} of {off.numel()} entries; the worst is {worst.max():.3e} over its bound"
