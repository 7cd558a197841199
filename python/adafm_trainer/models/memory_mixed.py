"""Images of several tasks of a GAN memory in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adafm_kernels import modulate_per_sample

from .memory import modulated_layers
from .memory_bank import MemoryBank

_MODULATION = ("gamma", "beta", "shift")


@dataclass
class _Batch:
    """What the layers need to know of a batch whose samples stand task by task: its tasks, and samples of each."""

    tasks: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


class MixedTaskGenerator(nn.Module):
    """A batch in which every sample has a task of its own: ``(z [B, z_dim], tasks, y [B]) -> [B, channels, H, W]``.

    Equals the generator of each task on its samples, to the rounding that a batch of another size has. Samples are
    brought together by task; each layer modulates its weight for all tasks of the batch in one pass
    (``modulate_per_sample``), and each task's samples are convolved with their own. No gradients for the tasks'
    tensors: they are constants here.

    Args:
        bank: whose tasks are taken, as they are now.

    Raises:
        ValueError: the bank is empty.
    """

    def __init__(self, bank: MemoryBank) -> None:
        super().__init__()
        if not len(bank):
            raise ValueError("the bank has no task yet")
        self.names = bank.names
        self._batch = _Batch()
        self.network = bank.base().requires_grad_(False)
        states = [bank.recall(name) for name in self.names]

        def stacked(prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
            keys = {name: f"{prefix}.{name}" for name in names}
            return {n: torch.stack([state[key] for state in states]) for n, key in keys.items() if key in states[0]}

        for name, layer in list(modulated_layers(self.network)):
            parent, _, leaf = name.rpartition(".")
            mixed = _MixedLayer(layer, stacked(name, _MODULATION), self._batch)
            setattr(self.network.get_submodule(parent), leaf, mixed)
        if self.network.class_bias is not None:
            self.network.class_bias = _MixedClasses(stacked("class_bias", ("weight", "bias")), self._batch)

    def forward(self, z: Tensor, tasks: Sequence[str | int] | Tensor, y: Tensor | None = None) -> Tensor:
        """Images in [-1, 1]; ``tasks`` has the name or the number of each sample's task.

        Raises:
            ValueError: another number of tasks than of samples, or a task that is not in the bank.
        """
        numbers = self._numbers(tasks, z.shape[0])
        order = torch.argsort(numbers, stable=True)
        distinct, counts = torch.unique_consecutive(numbers[order], return_counts=True)
        self._batch.tasks, self._batch.counts = distinct.tolist(), counts.tolist()
        order = order.to(z.device)
        images = self.network(z[order], None if y is None else y[order])
        return torch.empty_like(images).index_copy(0, order, images)

    def _numbers(self, tasks: Sequence[str | int] | Tensor, count: int) -> Tensor:
        listed = tasks.tolist() if isinstance(tasks, Tensor) else list(tasks)
        if len(listed) != count:
            raise ValueError(f"there are {len(listed)} tasks for {count} samples; give one for each sample")
        places = {name: number for number, name in enumerate(self.names)} | {n: n for n in range(len(self.names))}
        if unknown := [task for task in listed if task not in places]:
            raise ValueError(f"there is no task {unknown[0]!r} in the bank; it has {', '.join(self.names)}")
        return torch.tensor([places[task] for task in listed])


class _MixedLayer(nn.Module):
    """A convolution or linear layer with a modulation for each task, ``gamma [T, O, I, 1, 1]`` or ``[T, O, 1]``."""

    def __init__(self, layer: nn.Module, modulation: dict[str, Tensor], batch: _Batch) -> None:
        super().__init__()
        self.weight, self.bias, self._batch = layer.weight, layer.bias, batch
        self._apply_to: Callable[..., Tensor] = F.linear
        if self.weight.dim() == 4:
            self._apply_to = lambda x, w, b: F.conv2d(x, w, b, layer.stride, layer.padding)
        for name in _MODULATION:
            self.register_buffer(name, modulation.get(name), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tasks = self._batch.tasks
        weights = modulate_per_sample(self.weight, self.gamma[tasks], self.beta[tasks])
        biases = self.bias.expand(len(tasks), -1) if self.shift is None else self.bias + self.shift[tasks]
        parts = zip(x.split(self._batch.counts), weights, biases, strict=True)
        return torch.cat([self._apply_to(part, weight, bias) for part, weight, bias in parts])


class _MixedClasses(nn.Module):
    """The classes' biases of each task: ``weight [T, O, classes]``, ``bias [T, O]``."""

    def __init__(self, tensors: dict[str, Tensor], batch: _Batch) -> None:
        super().__init__()
        self._batch = batch
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, classes: Tensor) -> Tensor:
        parts = zip(self._batch.tasks, classes.split(self._batch.counts), strict=True)
        return torch.cat([F.linear(part, self.weight[task], self.bias[task]) for task, part in parts])
