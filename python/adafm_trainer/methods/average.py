"""Exponential moving average of a generator's trained tensors and of the statistics that go with them."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn


class Average:
    """Weight average ``a <- d * a + (1 - d) * p`` over the named parameters of ``module``.

    ``names`` are the parameters that are trained at any time of the run; the others are frozen, so their average is the
    parameter itself: ``self.module`` holds the very tensors of ``module`` there, which costs no memory and no pass over
    them. With ``ramp`` the decay at update t is ``min(decay, (1 + t) / (10 + t))``, so that short runs are not
    dominated by their start.
    Floating-point buffers are averaged like the weights: running statistics belong to the weights that made them, so
    those of the newest weights would normalise the averaged ones with others' statistics (and a batch's noise). One
    that does not move keeps its bits. Other buffers, counters, are copied. Updates are taken without gradient, in the
    tensor's own dtype.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], decay: float, ramp: bool = False) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema decay is {decay}; it must lie in [0, 1)")
        self.decay, self.ramp, self.updates = decay, ramp, 0
        live, names = dict(module.named_parameters()), list(names)
        if unknown := [name for name in names if name not in live]:
            raise ValueError(f"averaged parameters not in the network: {', '.join(unknown[:5])}")
        averaged = {id(live[name]) for name in names}
        # What the memo knows is taken instead of copied.
        self.module = copy.deepcopy(module, {id(p): p for p in live.values() if id(p) not in averaged}).eval()
        mean = dict(self.module.named_parameters())
        self._live = [live[name] for name in names]
        self._mean = [mean[name].requires_grad_(False) for name in names]
        buffers = list(zip(self.module.buffers(), module.buffers(), strict=True))
        self._counters = [pair for pair in buffers if not pair[0].is_floating_point()]
        statistics = [pair for pair in buffers if pair[0].is_floating_point()]
        self._mean += [mean for mean, _ in statistics]
        self._live += [live for _, live in statistics]

    def current_decay(self) -> float:
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.ramp else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live parameters: one pass over the trained tensors, after every step or skip."""
        if self._mean:
            torch._foreach_lerp_(self._mean, self._live, 1.0 - self.current_decay())
        for mean, live in self._counters:
            mean.copy_(live)
        self.updates += 1

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = int(state["updates"])
