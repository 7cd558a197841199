"""Buffers that forwards move (running statistics, spectral vectors, MineGAN's p), undone with a step not taken."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MovingBuffers:
    """The floating-point buffers of ``network``, one flat copy of them for each type. Nothing waits for the device."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._before: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Keep what they hold: before the first forward of a step."""
        self._before = [_flat(group) for group in self._groups()]

    @torch.no_grad()
    def settle(self, taken: Tensor) -> None:
        """Leave them where ``taken``, a bool on the device; put back what ``remember`` kept where not.

        A forward that is not finite would otherwise stay in running statistics for good.
        """
        for group, before in zip(self._groups(), self._before, strict=True):
            kept = torch.where(taken, _flat(group), before).split([b.numel() for b in group])
            torch._foreach_copy_(group, [k.view(b.shape) for k, b in zip(kept, group, strict=True)])
        self._before = []

    def _groups(self) -> list[list[Tensor]]:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self._network.buffers():
            if buffer.is_floating_point():
                groups.setdefault(buffer.dtype, []).append(buffer)
        return list(groups.values())


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
