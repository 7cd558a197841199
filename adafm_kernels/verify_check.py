"""One comparison of a backend with float64, and the numbers that the comparisons run on."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# The largest error, in units of the last place at the largest entry. One more than half is for bfloat16 under Triton's
# interpreter, which truncates; the rest for sums (over kernels, samples and low-rank products), for the terms of second
# derivatives, and in float64 for the rounding of the truth itself.
UNITS = 4.0


@dataclass(frozen=True)
class Check:
    """What one comparison found; ``error`` is in units of the last place of the type at the largest entry."""

    backend: str
    device: str
    op: str
    case: str
    what: str
    error: float
    passed: bool


def compare(backend: str, device: str, op: str, case: str, what: str, found: Tensor, truth: Tensor) -> Check:
    """Compare what an op gave with the float64 truth of the same shape; an error that is NaN does not pass."""
    if found.shape != truth.shape:
        raise RuntimeError(f"{op}, {case}, {what}: shape {list(found.shape)}; expected {list(truth.shape)}")
    unit = torch.finfo(found.dtype).eps * max(truth.abs().max().item(), torch.finfo(torch.float32).tiny)
    error = (found.double() - truth).abs().max().item() / unit
    return Check(backend, device, op, case, what, error, error <= UNITS)


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal numbers by seed, the same on every device and rounded to the type."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def as_rows(checks: list[Check]) -> list[dict[str, Any]]:
    """The checks as plain dictionaries."""
    return [asdict(check) for check in checks]
