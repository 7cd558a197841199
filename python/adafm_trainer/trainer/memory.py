"""Where a training step's memory goes: what stays, what autograd keeps for the backward pass, what only passes."""

from __future__ import annotations

import re
import resource
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .assemble import Assembly

_STATUS = Path("/proc/self/status")


class _Kept:
    """A tensor that the graph holds; its bytes are taken off again when the graph lets go of it."""

    __slots__ = ("_meter", "tensor")

    def __init__(self, meter: SavedMeter, tensor: Tensor) -> None:
        self._meter, self.tensor = meter, tensor

    def __del__(self) -> None:
        self._meter._drop(self.tensor)


class SavedMeter:
    """Bytes of the distinct storages that autograd keeps for backward while the meter is entered: ``peak`` over time.

    Storages of ``known`` tensors (parameters, inputs) are not counted. Inside a checkpointed stage only what the stage
    keeps is seen. Views count as the whole of their storage, once.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._known = {t.untyped_storage().data_ptr() for t in known}
        self._holders: dict[int, int] = {}
        self._live = 0
        self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor)

    def __enter__(self) -> SavedMeter:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _keep(self, tensor: Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._known:
            if not self._holders.get(key):
                self._live += storage.nbytes()
                self.peak = max(self.peak, self._live)
            self._holders[key] = self._holders.get(key, 0) + 1
        return _Kept(self, tensor)

    def _drop(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._known:
            return
        self._holders[key] -= 1
        if not self._holders[key]:
            self._live -= storage.nbytes()


class LiveMeter(TorchDispatchMode):
    """Bytes of the storages that operators make while the meter is entered and that still live: ``peak`` over time.

    What an operator takes for itself while it runs (a convolution's workspace) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref] = {}
        self._live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._key(tensor) not in before:
                self._see(tensor.untyped_storage())
        return result

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the distinct storages among those of ``tensors`` that were made under the meter."""
        found = {self._key(t): t.untyped_storage().nbytes() for t in tensors}
        return sum(size for key, size in found.items() if key in self._storages)

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def drop(_: object) -> None:
            del self._storages[key]
            self._live -= size

        self._storages[key] = weakref.ref(storage, drop)
        self._live += size
        self.peak = max(self.peak, self._live)


def held_bytes(assembly: Assembly) -> dict[str, int]:
    """Bytes of everything that stays from step to step, by part; to be called after a step of each network.

    Each storage counts once, in the first part that has a tensor of it: filters, gamma and beta that lie in a plan's
    arenas are parameters, and the arenas of modulated weights and their gradients are what is left.
    """
    seen: set[int] = set()
    players = (assembly.step.G, assembly.step.D)
    plans = [player.plan for player in players if player.plan is not None]
    parameters = [p for player in players for p in player.network.parameters()]
    state = [value for player in players for entry in player.optimizer.state.values() for value in entry.values()]
    average = assembly.average.module
    parts = {
        "parameters": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer state": [value for value in state if isinstance(value, Tensor)],
        "weight average": [*average.parameters(), *average.buffers()],
    }
    found = {name: _unseen_bytes(tensors, seen) for name, tensors in parts.items()}
    found["modulation arenas"] = _unseen_bytes([plan.parameters_arena for plan in plans], seen) + sum(
        plan.nbytes["out"] + plan.nbytes["grad"] for plan in plans
    )
    return found


def _unseen_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


class PeakMeter:
    """Most memory of this process (CPU: resident set; CUDA: torch's allocations) since ``start``.

    On the CPU it is the growth over the resident set at the time of construction; the source of the number is in
    ``what``. Where the kernel lets nobody reset its mark, a peak from before ``start`` is in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        if not cuda:
            # A process's first optimizer imports PyTorch's compiler: 140 MiB that are no part of a network's memory.
            torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True)
        self.what = "torch.cuda.max_memory_allocated" if cuda else "growth of the process's peak resident set"
        self._before = 0 if cuda else _status_bytes("VmRSS")

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        mark = Path("/proc/self/clear_refs")
        try:
            mark.write_text("5")
        except OSError:
            self.what += " (over the whole process: its mark cannot be reset here)"

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(field: str) -> int:
    """A line of /proc/self/status in bytes; elsewhere than on Linux the peak that getrusage knows."""
    if _STATUS.is_file():
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.M)
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
