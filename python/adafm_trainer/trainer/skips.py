"""Counts the steps that were not taken because a gradient was not finite."""

from __future__ import annotations

import torch
from torch import Tensor


class Skips:
    """Skipped steps in all, the latest ones in a row, and the longest row since the start of the process.

    Counted on the device, which nobody waits for until a number is read.
    """

    def __init__(self, device: torch.device, total: int = 0, consecutive: int = 0) -> None:
        self._counts = torch.tensor([total, consecutive, consecutive], dtype=torch.int64, device=device)

    def add(self, finite: Tensor) -> None:
        """Count one step, which was taken where the bool tensor ``finite`` is true."""
        total, row, longest = self._counts.unbind()
        skipped = (~finite).to(torch.int64)
        row = (row + 1) * skipped
        self._counts = torch.stack([total + skipped, row, torch.maximum(longest, row)])

    def total(self) -> int:
        return int(self._counts[0])

    def consecutive(self) -> int:
        return int(self._counts[1])

    def longest(self) -> int:
        return int(self._counts[2])
