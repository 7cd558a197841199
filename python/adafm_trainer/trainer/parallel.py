"""Training on several devices: one process for each, started by `torchrun`.

Networks stay plain modules. Rank 0's tensors are broadcast at the start; after the local backwards of a phase its
gradients are averaged over the ranks in one flat all-reduce, in the order they are given (name order), so phases with
different parameters, parameters released in mid-run and penalties that are differentiated twice need nothing special.
DistributedDataParallel is silently wrong or raises in those cases (see pytorch/pytorch#47562 and #63812).

What normalises over the batch takes the statistics of its own rank's samples, so with batch norm several processes do
not train as one with the whole batch does. Running statistics are averaged over the ranks (``buffers``).

Gradients travel by NCCL between CUDA devices and by Gloo between CPUs; flags, hashes and statistics are CPU tensors and
always travel by Gloo. A process that fails leaves word in the rendezvous store before it goes; the others end with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from ..errors import AdafmError, DivergedError, PeerError, UsageError
from .digest import state_digest
from .peers import Peers
from .precision import resolve_device

T = TypeVar("T")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def launched_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of a group: `torchrun` has set RANK, WORLD_SIZE and LOCAL_RANK."""
    return all(name in environment for name in _TORCHRUN)


class Parallel:
    """This process among those of a run; ``with`` joins the group, if ``launched`` as one of several, and leaves it.

    Attributes: ``rank`` of ``world`` processes, ``device`` of this one, ``main`` on rank 0, ``grouped`` where there is
    a process group. A single process has none: every method then returns at once what one rank alone would get.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        timeout: float = 600.0,
        launched: bool = False,
    ) -> None:
        self.device, self.rank, self.world, self.timeout = device, rank, world, timeout
        self.main, self.grouped, self._launched = rank == 0, False, launched
        self._peers: Peers | None = None
        self._works = 0

    @classmethod
    def from_environment(cls, device: str = "auto", timeout: float = 600.0) -> Parallel:
        """The process that `torchrun` started, or a single one; ``device`` is the setting of that name.

        Under `torchrun`, ``auto`` and ``cuda`` are the CUDA device of this process's local rank.

        Raises:
            UsageError: ``device`` names one device for all, there are fewer devices than processes, or the environment
                lacks the rendezvous address.
        """
        if not launched_by_torchrun():
            return cls(resolve_device(device))
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UsageError(
                f"RANK and WORLD_SIZE are set but {' and '.join(missing)} not: start the processes with torchrun, or "
                "unset RANK, WORLD_SIZE and LOCAL_RANK to train in one process"
            )
        rank, world, local = (int(os.environ[name]) for name in _TORCHRUN)
        return cls(_local_device(device, local), rank, world, timeout, launched=True)

    def __enter__(self) -> Parallel:
        if self._launched:
            self._join()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Leave the group; with ``error``, leave word first, so that the others end too and say why."""
        if not self.grouped:
            return
        self.grouped = False
        if error is not None and not isinstance(error, PeerError):
            self._peers.record(error)
        self._peers.leave(error)
        distributed.destroy_process_group()

    def samples(self, batch: int) -> range:
        """Sample indices of this rank in a batch of ``batch``: one contiguous slice, equally long on every rank.

        Raises:
            UsageError: ``batch`` is not a multiple of the number of processes.
        """
        if batch % self.world:
            below = batch - batch % self.world
            choices = f"{below} or {below + self.world}" if below else f"{self.world}"
            raise UsageError(
                f"--batch {batch} cannot be shared equally by {self.world} processes: use --batch {choices}, or start "
                f"a number of processes that divides {batch}"
            )
        local = batch // self.world
        return range(self.rank * local, (self.rank + 1) * local)

    def micro_batch(self, batch: int, batch_gpu: int | None) -> int | None:
        """Samples that pass a network at once on one device; None where that is this rank's whole slice.

        Raises:
            UsageError: ``batch_gpu`` does not divide the slice, or see ``samples``.
        """
        local = len(self.samples(batch))
        size = local if batch_gpu is None else batch_gpu
        if local % size:
            divisors = ", ".join(str(d) for d in range(1, local + 1) if local % d == 0)
            each = f"(--batch {batch} over {self.world} processes) " if self.world > 1 else ""
            raise UsageError(
                f"--batch-gpu {size} does not divide the {local} images {each}that a device takes in a step: use one "
                f"of {divisors}, or another --batch"
            )
        return None if size == local else size

    def exchange(self, gradients: Sequence[Tensor], what: str = "the gradients") -> None:
        """Replace each of ``gradients`` by its mean over the ranks: one flat all-reduce for each dtype among them.

        Every rank must give the same shapes in the same order. Non-finite values spread to all ranks, so a check
        afterwards comes out alike everywhere.
        """
        if not self.grouped:
            return
        for part in _by_type(gradients):
            flat = torch.cat([g.detach().reshape(-1) for g in part])
            self._together(what, distributed.all_reduce, flat)
            _spread(flat.div_(self.world), part)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` by those of rank 0, which must have the same shapes and dtypes in the same order."""
        if not self.grouped:
            return
        for part in _by_type(list(tensors)):
            flat = torch.cat([t.detach().reshape(-1) for t in part])
            self._together("the start values", distributed.broadcast, flat, 0)
            _spread(flat, part)

    def broadcast_object(self, value: T | None) -> T:
        """The ``value`` of rank 0, on every rank; tensors in it must lie on the CPU."""
        if not self.grouped:
            return value
        box = [value]
        self._together("the checkpoint", distributed.broadcast_object_list, box, 0, device=torch.device("cpu"))
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        if not self.grouped:
            return flag
        flags = torch.tensor([int(flag)])
        self._together("the stop request", distributed.all_reduce, flags, distributed.ReduceOp.MAX)
        return bool(flags.item())

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the ranks of every scalar of ``values``; all ranks must have the same names."""
        if not self.grouped or not values:
            return dict(values)
        names = sorted(values)
        flat = torch.stack([values[name].detach().double().cpu() for name in names])
        self._together("the statistics", distributed.all_reduce, flat)
        means = dict(zip(names, flat / self.world, strict=True))
        return {name: means[name].to(value) for name, value in values.items()}

    def agree(self, state: object, what: str, error: type[AdafmError] = DivergedError) -> None:
        """Compare a SHA-256 over ``state`` (see ``state_digest``), which holds ``what``, between the ranks.

        Raises:
            error: on every rank, naming the ranks that differ from rank 0.
        """
        if not self.grouped:
            return
        mine = torch.frombuffer(bytearray(state_digest(state)), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.world)]
        self._together("the consistency check", distributed.all_gather, every, mine)
        if differing := [str(rank) for rank, other in enumerate(every) if not torch.equal(other, every[0])]:
            ranks = "rank " if len(differing) == 1 else "ranks "
            raise error(
                f"{what} of {ranks}{', '.join(differing)} differ from those of rank 0, and every process must hold the "
                "same: check that all machines run the same versions, flags and files, and continue from the last "
                "checkpoint"
            )

    def on_main(self, what: str, work: Callable[[], T]) -> T | None:
        """Do ``work`` on rank 0 while the others wait; its result on rank 0, None elsewhere.

        However long it takes, the timeout does not strike: rank 0 gives signs of life meanwhile, and only silence for
        the whole timeout ends the wait. If ``work`` raises, every rank stops.
        """
        if not self.grouped:
            return work()
        key = f"work {self._works}"
        self._works += 1
        if not self.main:
            self._peers.wait(key, what)
            return None
        try:
            with self._peers.beating():
                result = work()
        except BaseException as error:
            self._peers.record(error)
            raise
        self._peers.announce(key)
        return result

    def _join(self) -> None:
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        timeout = timedelta(seconds=self.timeout)
        try:
            store, _, _ = next(distributed.rendezvous("env://", timeout=timeout))
            store.set_timeout(timeout)
            distributed.init_process_group(
                backend,
                store=distributed.PrefixStore("collectives", store),
                rank=self.rank,
                world_size=self.world,
                timeout=timeout,
            )
        except distributed.DistError as error:
            raise PeerError(
                f"rank {self.rank} of {self.world} could not join the others within --dist-timeout {self.timeout:g} "
                f"seconds: {error}"
            ) from error
        self._peers = Peers(distributed.PrefixStore("peers", store), self.rank, self.timeout)
        self.grouped = True

    def _together(self, what: str, collective: Callable, *arguments: object, **options: object) -> None:
        try:
            collective(*arguments, **options)
        except RuntimeError as error:
            raise self._peers.lost(what, str(error).strip().splitlines()[0]) from error


def _local_device(name: str, local_rank: int) -> torch.device:
    """The device of ``local_rank`` under the setting ``name``."""
    if name.startswith("cuda:"):
        raise UsageError(f"--device {name} is one device for all processes of torchrun; use --device cuda")
    if name != "cuda" and not (name == "auto" and torch.cuda.is_available()):
        return resolve_device(name)
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"local rank {local_rank} has no CUDA device of its own, {torch.cuda.device_count()} are usable here: "
            "lower --nproc-per-node, or use --device cpu"
        )
    return torch.device("cuda", local_rank)


def _by_type(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    parts: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        parts.setdefault((tensor.device.type, tensor.dtype), []).append(tensor)
    return list(parts.values())


@torch.no_grad()
def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy consecutive pieces of ``flat`` into ``tensors``, whatever their memory layout."""
    pieces = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(list(tensors), [p.view(t.shape) for t, p in zip(tensors, pieces, strict=True)])
