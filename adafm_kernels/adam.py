"""``FusedAdam``: ``torch.optim.Adam`` in one call whatever the number of step sizes."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from . import backends

_TYPES = (torch.float32, torch.float64)
_Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class FusedAdam(torch.optim.Adam):
    """Adam (Kingma and Ba, ICLR 2015, algorithm 1) on all parameter groups at once.

    ``torch.optim.Adam(fused=True)`` makes a call for each group, and adaptation gives gamma, beta and a new head step
    sizes of their own. Here groups that differ in their ``lr`` alone share a call: on the CPU one parallel region, on
    CUDA for every 56 tensors one launch that updates them and one of a single block that counts their steps.
    State, ``state_dict``, learning-rate schedulers, ``torch.amp.GradScaler`` and ``capturable`` are those of
    ``torch.optim.Adam``, and so are the results, to rounding: a state of either loads into the other.

    A group that the launch does not cover is left to PyTorch's own call: one with parameters that are not float32 or
    float64, with gradients in another memory order than their parameter or still scaled, with weight decay, under
    ``torch.compile``, or on a device that the compiled kernels do not serve. With ``optimizer.found_inf`` set to a
    number on the device, a step is skipped there where it is not 0, without waiting for the device.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: step size, a number, or with ``capturable`` a float32 tensor on the parameters' device.
        betas, eps: as in ``torch.optim.Adam``.
        capturable: every number that changes is read on the device, so a CUDA graph may hold the step.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, capturable=capturable, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns the closure's loss.

        Raises:
            RuntimeError: a CUDA graph captures the step of a group that is not capturable.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls: dict[tuple, _Lists] = defaultdict(_no_lists)
        for group in self.param_groups:
            lists: _Lists = _no_lists()
            parameters, grads, exp_avgs, exp_avg_sqs, _, steps = lists
            has_complex = self._init_group(group, *lists)
            if not self._covers(group, parameters):
                self._leave_to_pytorch(group, lists, has_complex)
                continue
            beta1, beta2 = map(float, group["betas"])
            rate = _rate(group["lr"])
            for one in zip(parameters, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
                call = calls[one[0].device, one[0].dtype, beta1, beta2, float(group["eps"])]
                for values, value in zip(call, (*one, rate), strict=True):
                    values.append(value)
        skip = getattr(self, "found_inf", None)
        for (device, _, beta1, beta2, eps), lists in calls.items():
            there = None if skip is None else skip.to(device, torch.float32, non_blocking=True).reshape(())
            backends.implementation(device, backends.forced_backend()).adam_many(*lists, beta1, beta2, eps, there)
        return loss

    def _covers(self, group: dict[str, Any], parameters: list[Tensor]) -> bool:
        """Whether the launch does what a group's settings and these of its parameters ask for."""
        if getattr(self, "grad_scale", None) is not None or torch.compiler.is_compiling():
            return False
        if group["weight_decay"] or group["amsgrad"] or group["maximize"] or not group["fused"]:
            return False
        for p in parameters:
            if p.dtype not in _TYPES or p.grad.dtype != p.dtype or not _served(p.device):
                return False
            if not _same_order(p.grad, p) or not _fills_its_memory(p):
                return False
            if p.is_cuda and not group["capturable"] and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph captures FusedAdam's step, but a parameter group is not capturable and the graph "
                    "would keep its step size; give capturable=True and a tensor as lr"
                )
        return True

    def _leave_to_pytorch(self, group: dict[str, Any], lists: _Lists, has_complex: bool) -> None:
        adam(
            *lists,
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            has_complex=has_complex,
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def _no_lists() -> _Lists:
    return [], [], [], [], [], []


def _rate(lr: float | Tensor) -> Tensor:
    """The step size as the op takes it: on the device as it is, else a number on the CPU."""
    return lr if isinstance(lr, Tensor) and lr.is_cuda else _number(float(lr))


@functools.lru_cache(maxsize=64)
def _number(lr: float) -> Tensor:
    return torch.tensor(lr, dtype=torch.float64)


def _same_order(a: Tensor, b: Tensor) -> bool:
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.stride() == b.stride() or all(mine == other or size <= 1 for size, mine, other in strides)


def _fills_its_memory(p: Tensor) -> bool:
    if p.is_contiguous():
        return True
    return 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True)) == p.numel()


def _served(device: torch.device) -> bool:
    return backends.choose(device.type, device.index, backends.forced_backend()).name == "compiled"
