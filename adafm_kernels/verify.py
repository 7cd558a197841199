"""Checks a backend on this machine: values, first and second derivatives against float64.

The truth is the formula written out in plain PyTorch and differentiated by autograd in float64; it uses none of the
package's ops.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .functional import modulate

# The largest error, in units of the last place at the largest entry. One more than half is for bfloat16 under Triton's
# interpreter, which truncates; the rest for sums over the kernel and the sum of two terms in second derivatives.
UNITS = 4.0


@dataclass(frozen=True)
class Case:
    """One weight to modulate: its shape and type, the type of the result, and the layouts."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    result: torch.dtype = torch.float32
    channels_last: bool = False


@dataclass(frozen=True)
class Check:
    """What one comparison found; ``error`` is in units of the last place of the type at the largest entry."""

    backend: str
    device: str
    case: str
    what: str
    error: float
    passed: bool


CASES = (
    Case("linear 5x7 float32", (5, 7)),
    Case("3x3 float64", (6, 5, 3, 3), torch.float64, torch.float64),
    Case("3x3 float32", (6, 5, 3, 3)),
    Case("3x3 float32 channels-last", (6, 16, 3, 3), channels_last=True),
    Case("3x3 float32 to bfloat16 channels-last", (6, 16, 3, 3), result=torch.bfloat16, channels_last=True),
    Case("4x4 float32 to float16", (3, 8, 4, 4), result=torch.float16),
    Case("1x3 bfloat16", (3, 8, 1, 3), torch.bfloat16, torch.bfloat16),
)


def verify(backend: str, device: str) -> list[Check]:
    """Compare one backend on one device with float64, case by case. Errors of the backend itself are not caught."""
    return [check for case in CASES for check in _verify_case(case, backend, device)]


def _verify_case(case: Case, backend: str, device: str) -> list[Check]:
    inputs = _inputs(case, device)
    truth = _derivatives(_plain, {name: tensor.double() for name, tensor in inputs.items()})
    layout = torch.channels_last if case.channels_last else None

    def candidate(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return modulate(weight, gamma, beta, dtype=case.result, memory_format=layout, backend=backend)

    found = _derivatives(candidate, inputs)
    checks = []
    for what, value in found.items():
        unit = torch.finfo(value.dtype).eps * max(truth[what].abs().max().item(), torch.finfo(torch.float32).tiny)
        error = (value.double() - truth[what]).abs().max().item() / unit
        checks.append(Check(backend, device, case.name, what, error, error <= UNITS))
    return checks


def _inputs(case: Case, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    pairs = (*case.shape[:2], *(1,) * (len(case.shape) - 2))
    inputs = {
        "weight": normal(case.shape, case.dtype),
        "gamma": normal(pairs, wide),
        "beta": normal(pairs, wide),
        "grad": normal(case.shape, case.result),
        "u_weight": normal(case.shape, case.dtype),
        "u_gamma": normal(pairs, wide),
        "u_beta": normal(pairs, wide),
    }
    if case.channels_last:
        for name in ("weight", "grad", "u_weight"):
            inputs[name] = inputs[name].contiguous(memory_format=torch.channels_last)
    return inputs


def _plain(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return gamma * weight + beta


def _derivatives(function: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Value, gradients of sum(grad * value), and gradients of sum(u * gradients)."""
    points = [inputs[name].detach().clone().requires_grad_() for name in ("weight", "gamma", "beta", "grad")]
    weight, gamma, beta, grad = points
    value = function(weight, gamma, beta)
    first = torch.autograd.grad(value, (weight, gamma, beta), grad, create_graph=True)
    directions = [inputs[name] for name in ("u_weight", "u_gamma", "u_beta")]
    second = torch.autograd.grad(first, (weight, gamma, grad), directions)
    names = ("value", "d weight", "d gamma", "d beta", "dd weight", "dd gamma", "dd grad")
    return {name: tensor.detach() for name, tensor in zip(names, (value, *first, *second), strict=True)}


def as_rows(checks: list[Check]) -> list[dict[str, Any]]:
    """The checks as plain dictionaries."""
    return [asdict(check) for check in checks]
