"""Checks the ops that work in a network's arenas, through the plan and the optimizer that call them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import ModulationPlan
from .plan_adam import PlanAdam
from .verify_check import Check, compare, normal

# Channels that fill vectors and channels that do not, with and without taps.
SHAPES = ((6, 16, 3, 3), (3, 5, 4, 4), (16, 8), (5, 7))
STEPS = 2


@dataclass(frozen=True)
class Kind:
    """Types of the weights and of the modulated weights."""

    name: str
    dtype: torch.dtype
    result: torch.dtype


KINDS = (
    Kind("network float32", torch.float32, torch.float32),
    Kind("network float32 to bfloat16", torch.float32, torch.bfloat16),
    Kind("network float64", torch.float64, torch.float64),
)


def verify_arena(backend: str, device: str) -> list[Check]:
    """Compare ``modulate_many_out``, ``modulate_many_backward_out`` and ``step_many`` with float64."""
    return [check for kind in KINDS for check in _verify_kind(kind, backend, device)]


def _verify_kind(kind: Kind, backend: str, device: str) -> list[Check]:
    wide = torch.float64 if kind.dtype == torch.float64 else torch.float32
    layers = [
        (
            normal(shape, kind.dtype, device, 3 * n).requires_grad_(),
            normal(shape[:2], wide, device, 3 * n + 1).requires_grad_(),
            normal(shape[:2], wide, device, 3 * n + 2).requires_grad_(),
        )
        for n, shape in enumerate(SHAPES)
    ]
    truth = [_Truth(*(t.detach().double() for t in layer)) for layer in layers]
    plan = ModulationPlan(layers, dtype=kind.result, backend=backend)
    checks: list[Check] = []

    def check(op: str, what: str, found: list[Tensor], expected: list[Tensor]) -> None:
        for n, (part, wanted) in enumerate(zip(found, expected, strict=True)):
            checks.append(compare(backend, device, op, kind.name, f"{what} {n}", part.detach(), wanted))

    values = list(plan.modulate().values())
    check("modulate_many_out", "value", values, [t.value() for t in truth])
    optimizer = PlanAdam(plan, lr=0.01, average_decay=0.9)
    for step in range(STEPS):
        _give_gradients(plan, truth, device, 100 * (step + 1))
        if step == 0:
            plan.reduce()
            for row, name in enumerate(("weight", "gamma", "beta")):
                found = [layer[row].grad for layer in layers]
                check("modulate_many_backward_out", f"d {name}", found, [t.gradients()[row] for t in truth])
        optimizer.step()
        for t in truth:
            t.step(optimizer.hyper.double().tolist())
    check("step_many", "value", values, [t.value() for t in truth])
    arenas = {
        "parameter": plan.parameters_arena,
        "exp_avg": optimizer.exp_avg,
        "exp_avg_sq": optimizer.exp_avg_sq,
        "average": optimizer.average,
    }
    for name, arena in arenas.items():
        assert arena is not None
        found = [torch.stack(pair) for pair in plan.pairs_of(arena).values()]
        check("step_many", name, found, [getattr(t, name) for t in truth])
    return checks


def _give_gradients(plan: ModulationPlan, truth: list["_Truth"], device: str, seed: int) -> None:
    plan.zero_grad()
    for n, (leaf, layer) in enumerate(zip(plan.weights.values(), truth, strict=True)):
        leaf.grad = normal(leaf.shape, leaf.dtype, device, seed + n)
        layer.grad = leaf.grad.double()


class _Truth:
    """One layer in float64, by the written-out formulas: gamma, then beta, their moments and their average."""

    def __init__(self, weight: Tensor, gamma: Tensor, beta: Tensor) -> None:
        self.weight, self.grad = weight, torch.zeros_like(weight)
        self.parameter = torch.stack((gamma, beta))
        self.average = self.parameter.clone()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.parameter), torch.zeros_like(self.parameter)

    def value(self) -> Tensor:
        gamma, beta = (p.reshape(*p.shape, *(1,) * (self.weight.dim() - 2)) for p in self.parameter)
        return gamma * self.weight + beta

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        gamma = self.parameter[0].reshape(*self.parameter.shape[1:], *(1,) * (self.weight.dim() - 2))
        sums = (t.flatten(2).sum(2) if t.dim() > 2 else t for t in (self.grad * self.weight, self.grad))
        return gamma * self.grad, *sums

    def step(self, hyper: list[float]) -> None:
        lr, beta1, beta2, eps, correction1, correction2, decay, _ = hyper
        slope = torch.stack(self.gradients()[1:])
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * slope
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * slope.square()
        change = self.exp_avg * correction1 / ((self.exp_avg_sq * correction2).sqrt() + eps)
        self.parameter = self.parameter - lr * change
        self.average = self.average + (1 - decay) * (self.parameter - self.average)
