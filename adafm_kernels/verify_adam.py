"""Checks ``FusedAdam``'s one launch against the written-out rule in float64."""

import torch

from .adam import FusedAdam
from .backends import use_backend
from .verify_check import Check, compare, normal

SHAPES = ((6, 16, 3, 3), (3, 5), (1025,))
STEPS = 3
RATES, BETA1, BETA2, EPS = (0.1, 0.01, 0.003), 0.5, 0.9, 1e-3


def verify_adam(backend: str, device: str) -> list[Check]:
    """Compare parameters and moments after a few steps of several step sizes; empty for backends without the launch."""
    if backend != "compiled":
        return []
    return [check for dtype in (torch.float32, torch.float64) for check in _verify_type(dtype, backend, device)]


def _verify_type(dtype: torch.dtype, backend: str, device: str) -> list[Check]:
    parameters = [normal(shape, dtype, device, n).requires_grad_() for n, shape in enumerate(SHAPES)]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, RATES, strict=True)]
    optimizer = FusedAdam(groups, betas=(BETA1, BETA2), eps=EPS)
    truth = [p.detach().double() for p in parameters]
    m, v = ([torch.zeros_like(p) for p in truth] for _ in range(2))
    for t in range(1, STEPS + 1):
        for n, (p, rate) in enumerate(zip(parameters, RATES, strict=True)):
            p.grad = normal(SHAPES[n], dtype, device, 100 * t + n)
            g = p.grad.double()
            m[n] = BETA1 * m[n] + (1 - BETA1) * g
            v[n] = BETA2 * v[n] + (1 - BETA2) * g.square()
            corrected = m[n] / (1 - BETA1**t), v[n] / (1 - BETA2**t)
            truth[n] = truth[n] - rate * corrected[0] / (corrected[1].sqrt() + EPS)
        with use_backend(backend):
            optimizer.step()
    name = f"network {str(dtype).removeprefix('torch.')}"
    found = {
        "parameter": ([p.detach() for p in parameters], truth),
        "exp_avg": ([optimizer.state[p]["exp_avg"] for p in parameters], m),
        "exp_avg_sq": ([optimizer.state[p]["exp_avg_sq"] for p in parameters], v),
    }
    return [
        compare(backend, device, "adam_many", name, f"{what} {n}", *both)
        for what, lists in found.items()
        for n, both in enumerate(zip(*lists, strict=True))
    ]
