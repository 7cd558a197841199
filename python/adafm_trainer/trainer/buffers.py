"""Buffers that training moves (running statistics, spectral vectors, MineGAN's p), kept alike on all processes."""

from __future__ import annotations

import torch
from torch import nn

from .parallel import Parallel


class SharedBuffers:
    """Gives the floating-point buffers of ``network`` the mean over the processes of how far each has moved them.

    Running means and MineGAN's estimate p then are what one process with the whole batch would have; running variances
    are the mean of those of the processes' parts, without the variance between these. A buffer that no process has
    moved keeps its bits. Buffers of other types count batches and are alike anyway. With one process nothing happens.

    To be made when the network holds its start values, or those of a checkpoint, which are alike on all processes.
    """

    def __init__(self, network: nn.Module, parallel: Parallel) -> None:
        self._parallel = parallel
        self._live = [b for b in network.buffers() if b.is_floating_point()] if parallel.grouped else []
        self._before = [b.clone() for b in self._live]

    @torch.no_grad()
    def share(self) -> None:
        """After forwards that move buffers, before these are copied, compared or stored; on all processes at once."""
        if not self._live:
            return
        moved = [live - before for live, before in zip(self._live, self._before, strict=True)]
        self._parallel.exchange(moved, "the buffers")
        for live, before, by in zip(self._live, self._before, moved, strict=True):
            live.copy_(before.add_(by))
