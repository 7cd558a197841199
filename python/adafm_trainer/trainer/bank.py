"""What a bank of GAN memory takes on disk, and pictures of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError
from ..locate import source_path
from ..methods.config import TrainConfig
from ..methods.transfergan import source_generator_state
from ..models.memory import MemoryGenerator
from ..models.memory_bank import MemoryBank
from ..models.memory_mixed import MixedTaskGenerator
from ..models.source import load_pair
from .sampling import draw_latents


@dataclass(frozen=True)
class OpenBank:
    """A bank, the tensors of the source's generator that its tasks modulate, and the source's scale of images."""

    bank: MemoryBank
    source: dict[str, Tensor]
    data_scale: float


def open_bank(folder: str | Path, source: str, source_weights: Literal["average", "raw"] = "average") -> OpenBank:
    """Read a bank with its source, which are the ``--bank``, ``--source`` and ``--source-weights`` of its runs.

    Raises:
        SourceError: one of them is missing or cannot be read, or the bank was made on another source.
    """
    pair = load_pair(source_path(source))
    config = TrainConfig(data="", outdir="", source=(source,), source_weights=source_weights)
    state = source_generator_state(pair, config, lambda line: None)
    return OpenBank(MemoryBank.load(folder, state), state, float(pair.meta.get("data_scale", 1.0)))


@dataclass(frozen=True)
class TaskSize:
    """Bytes of one task in both storages; ``low_rank`` is what it adds after the tasks before it."""

    name: str
    full: int
    low_rank: int


def task_sizes(opened: OpenBank) -> list[TaskSize]:
    """Bytes of every task's generator in full and in low-rank storage, in the bank's order.

    One of the two is what the bank holds. Low-rank sizes of a bank in full storage are those of storing its tasks so,
    one after another; they were not trained for it, so training with --storage low-rank can take less.
    """
    bank = opened.bank
    low = _in_low_rank(bank, opened.source) if bank.storage == "full" else bank
    sizes = []
    for name in bank.names:
        full = sum(value.numel() * value.element_size() for value in bank.recall(name).values())
        sizes.append(TaskSize(name, full, low.nbytes(name)["generator"]))
    return sizes


def size_table(sizes: Sequence[TaskSize], kids: Mapping[str, str] | None = None) -> str:
    """Lines of names, bytes and, if given, a column of what ``kids`` says of each."""
    head = ["task", *(["KID"] if kids is not None else []), "bytes", "bytes in low rank"]
    rows = []
    for size in sizes:
        middle = [kids.get(size.name, "-")] if kids is not None else []
        rows.append([size.name, *middle, f"{size.full:,}", f"{size.low_rank:,}"])
    total = [f"{sum(size.full for size in sizes):,}", f"{sum(size.low_rank for size in sizes):,}"]
    rows.append([f"{len(sizes)} tasks", *([""] if kids is not None else []), *total])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(row: list[str]) -> str:
        return "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])

    return "\n".join(line(row) for row in [head, *rows])


@torch.no_grad()
def draw_tasks(bank: MemoryBank, names: Sequence[str], columns: int, seed: int, *, single: bool = False) -> Tensor:
    """Images ``[len(names) * columns, C, H, W]`` in [-1, 1], task after task, of the same latents for each.

    All are drawn in one batch with the tasks mixed, or with ``single`` by each task's own generator. float32 on the
    CPU, computed in float64: a convolution rounds a batch of another size otherwise, and in float32 a picture would
    show by a few 1e-6 how it was drawn. Tasks with classes take their labels in turn.

    Raises:
        UsageError: no name, a name twice or one that is not in the bank; fewer than one column.
    """
    if not names or len(set(names)) != len(names):
        raise UsageError(f"tasks {', '.join(names) or '(none)'}: name at least one, and each once")
    if unknown := [name for name in names if name not in bank]:
        raise UsageError(f"there is no task {unknown[0]!r} in the bank; it has {', '.join(bank.names) or 'none'}")
    if columns < 1:
        raise UsageError(f"{columns} samples of each task; there must be at least 1")
    z = draw_latents(bank.base(), seed, "sample", 0, range(columns)).double()
    y = torch.arange(columns) % bank.model.classes if bank.model.classes else None
    if single:
        return torch.cat([bank.generator(name).double()(z, y) for name in names]).float()
    tasks = [name for name in names for _ in range(columns)]
    mixed = MixedTaskGenerator(bank).double()
    return mixed(z.repeat(len(names), 1), tasks, None if y is None else y.repeat(len(names))).float()


@torch.no_grad()
def _in_low_rank(bank: MemoryBank, source: Mapping[str, Tensor]) -> MemoryBank:
    """The same tasks in a bank of low-rank storage, as if trained one after another to where they are."""
    low = MemoryBank(bank.model, source, "low-rank")
    for name in bank.names:
        generator = MemoryGenerator(low.next_model())
        low.start(generator)
        state = bank.recall(name)
        for layer in generator.memory.components:
            module = generator.get_submodule(layer)
            for matrix in ("gamma", "beta"):
                state[f"{layer}.{matrix}"] -= module.components(matrix).matrix()[:, :, None, None]
        generator.load_state_dict(state, strict=False)
        low.add(name, generator)
    return low
