"""Times on an NVIDIA GPU: between events with a cold second-level cache, to enqueue, and inside kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Far above the second-level cache of any GPU; its kernel takes long enough to hide the enqueueing of a few launches.
_FLUSH_BYTES = 512 * 2**20
_REPEATS = 10


class GpuClock:
    """Single calls, each after the second-level cache was overwritten."""

    def __init__(self) -> None:
        self._flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")
        # sinh is in no measured op, so that the profiler tells the flush from everything else by its kernel's name.
        self._flush_kernels = {name for name, _ in self._profiled([lambda: None])}

    def time(self, run: Callable[[], Any], calls: int) -> tuple[float, float]:
        """Seconds between events around one call (the rest of ``calls`` is for clocks of a CPU), and to enqueue it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sinh_()
        start.record()
        enqueue = time.perf_counter()
        run()
        enqueue = time.perf_counter() - enqueue
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, enqueue

    def calls(self, seconds: float) -> int:
        """One: a second call would find the cache warm."""
        return 1

    def kernels(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        """Seconds that one call of each spends inside kernels and copies, by the profiler, the cache cold."""
        spent = [0.0] * len(runs)
        call = -1
        for name, seconds in self._profiled([run for run in runs for _ in range(_REPEATS)]):
            if name in self._flush_kernels:
                call += 1
            else:
                spent[call // _REPEATS] += seconds / _REPEATS
        if call + 1 != len(runs) * _REPEATS:
            raise RuntimeError(f"the profiler saw {call + 1} calls of {len(runs) * _REPEATS}")
        return spent

    def _profiled(self, runs: Sequence[Callable[[], Any]]) -> list[tuple[str, float]]:
        """Name and seconds of everything that the device did, in its order; each call follows one flush."""
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for run in runs:
                self._flush.sinh_()
                run()
            torch.cuda.synchronize()
        events = [event for event in found.events() if event.device_type == DeviceType.CUDA]
        events.sort(key=lambda event: event.time_range.start)
        return [(event.name, event.time_range.elapsed_us() / 1e6) for event in events]
