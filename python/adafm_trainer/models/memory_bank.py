"""A bank of GAN memory's tasks on one frozen source: each has its modulation, and none touches another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError
from .memory import MemoryDiscriminator, MemoryGenerator, load_source, modulation_parameters, task_parameters
from .memory_config import MemoryConfig
from .memory_file import describe_bank, fingerprint, read_tensors, write_bank
from .memory_lowrank import (
    Components,
    LowRankConv2d,
    low_rank_layers,
    store,
    stored_numbers,
    stored_numbers_as_published,
)

STORAGES = ("full", "low-rank")
_MATRICES = ("gamma", "beta")


class MemoryBank:
    """Tasks by name, in the order they were added; they are never removed or changed.

    Full storage keeps a task's tensors as they are: what is recalled computes what it computed in training, bit for
    bit. Low-rank storage keeps gamma and beta of the wide layers as singular vectors that the tasks share (Cong et al.,
    NeurIPS 2020, section 4.3): a task then has to start from ``next_model`` and ``start``.

    Args:
        model: description of the tasks' networks, without components.
        source: the tensors of the source's generator that the tasks are modulations of.
        storage: "full" or "low-rank".

    Raises:
        ValueError: another storage.
    """

    def __init__(self, model: MemoryConfig, source: Mapping[str, Tensor], storage: str = "full") -> None:
        if storage not in STORAGES:
            raise ValueError(f"storage is {storage!r}; expected {' or '.join(STORAGES)}")
        self.model = dataclasses.replace(model, components={})
        self.storage = storage
        self._source = {name: tensor.detach().cpu() for name, tensor in source.items()}
        self.fingerprint = fingerprint(self._source)
        self._tasks: dict[str, dict[str, Tensor]] = {}

    # ---- what it holds ----

    @property
    def names(self) -> list[str]:
        """Names of the tasks in the order they were added."""
        return list(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def nbytes(self, name: str) -> dict[str, int]:
        """Bytes that a task takes, by network: what storing it has added."""
        sizes: dict[str, int] = {}
        for key, tensor in self._task(name).items():
            network = key.partition(".")[0]
            sizes[network] = sizes.get(network, 0) + tensor.numel() * tensor.element_size()
        return sizes

    def components(self, name: str) -> dict[str, tuple[int, int]]:
        """Low-rank storage: for each layer stored so, how many components of gamma and of beta this task has added."""
        task = self._task(name)
        layers = low_rank_layers(self.model) if self.storage == "low-rank" else []
        return {layer: tuple(task[f"generator.{layer}.{m}_u"].shape[1] for m in _MATRICES) for layer in layers}

    def low_rank_numbers(self, name: str) -> tuple[int, int]:
        """Numbers a task takes in the layers of low rank, shifts included: as they are, and as the released code counts
        them, which takes every matrix for square. Weights of earlier components, which each task has anew, are not
        counted there; ``nbytes`` counts all that is stored."""
        task, found = self._task(name), [0, 0]
        for layer, counts in self.components(name).items():
            for matrix, count in zip(_MATRICES, counts, strict=True):
                shape = tuple(task[f"generator.{layer}.{matrix}_{part}"].shape[0] for part in "uv")
                found[0] += stored_numbers(shape, count)
                found[1] += stored_numbers_as_published(shape, count)
            found = [number + task[f"generator.{layer}.shift"].numel() for number in found]
        return found[0], found[1]

    # ---- add and recall ----

    def add(self, name: str, generator: MemoryGenerator, discriminator: MemoryDiscriminator | None = None) -> None:
        """Store a task: the generator's modulation and, if given, the discriminator's and its ``fc``.

        Raises:
            ValueError: the name is taken or empty; the networks are not of this bank's description; with low-rank
                storage the generator was not started from this bank as it is now.
            SourceError: the generator's frozen tensors are not the bank's source's.
        """
        if not name or name in self._tasks:
            raise ValueError(f"task {name!r} {'is in the bank already' if name else 'has no name'}; give another name")
        self._check(generator)
        task = {f"generator.{key}": value for key, value in self._stored(generator).items()}
        if discriminator is not None:
            if dataclasses.replace(discriminator.memory, components={}) != self.model:
                raise ValueError("the discriminator's description is not the bank's")
            state = discriminator.state_dict()
            task |= {f"discriminator.{key}": _copy(state[key]) for key in task_parameters(discriminator)}
        self._tasks[name] = task

    def recall(self, name: str, network: str = "generator") -> dict[str, Tensor]:
        """A task's tensors by the parameter names of its network, copies on the CPU.

        With full storage they are those that were added, bit for bit. With low-rank storage gamma and beta of the wide
        layers are formed from their components.

        Raises:
            KeyError: there is no such task.
            ValueError: the task was stored without that network.
        """
        state = self._part(name, network)
        if network == "generator" and self.storage == "low-rank":
            for layer, found in self._low_rank(name).items():
                for matrix, components in found.items():
                    for part in "usv":
                        del state[f"{layer}.{matrix}_{part}"]
                    state[f"{layer}.{matrix}"] = components.matrix()[:, :, None, None]
        return state

    def generator(self, name: str) -> MemoryGenerator:
        """The generator of a task, on the CPU; low-rank layers compute with the components (``modulate_lowrank``)."""
        found = self._low_rank(name) if self.storage == "low-rank" else {}
        counts = {layer: tuple(len(c.s) for c in pair.values()) for layer, pair in found.items()}
        generator = self._network(dataclasses.replace(self.model, components=counts))
        state = self._part(name, "generator")
        for layer, pair in found.items():
            generator.get_submodule(layer).put(pair["gamma"], pair["beta"], state[f"{layer}.shift"])
            state = {key: value for key, value in state.items() if not key.startswith(f"{layer}.")}
        generator.load_state_dict(state, strict=False)
        return generator

    def base(self) -> MemoryGenerator:
        """The generator before any task: the source's function."""
        return self._network(self.model)

    # ---- the next task ----

    def next_model(self) -> MemoryConfig:
        """Description of the network that the next task trains, with room for the components that are stored."""
        if self.storage == "full" or not self._tasks:
            return self.model
        found = self._low_rank(self.names[-1])
        return dataclasses.replace(
            self.model, components={layer: tuple(len(c.s) for c in pair.values()) for layer, pair in found.items()}
        )

    def start(self, generator: MemoryGenerator) -> None:
        """Give ``generator``, of ``next_model``, a task's start: the source's statistics, and in low-rank layers the
        stored components with the last task's weights, no residual and the first task's shift.

        Raises:
            SourceError: the source does not fit the generator.
        """
        load_source(generator, self._source)
        if self.storage == "full" or not self._tasks:
            return
        first = self._tasks[self.names[0]]
        for layer, pair in self._low_rank(self.names[-1]).items():
            shift = first[f"generator.{layer}.shift"]
            generator.get_submodule(layer).put(pair["gamma"], pair["beta"], shift)

    # ---- on disk ----

    def save(self, folder: str | Path) -> Path:
        """Write the bank; the file is replaced as a whole, so a crash leaves the one before."""
        tensors = {f"{n}.{key}": value for n, task in enumerate(self._tasks.values()) for key, value in task.items()}
        description = {
            "source_sha256": self.fingerprint,
            "model": self.model.to_json(),
            "next_model": self.next_model().to_json(),
            "storage": self.storage,
            "tasks": [{"name": name, "bytes": self.nbytes(name)} for name in self._tasks],
        }
        return write_bank(folder, tensors, description)

    @classmethod
    def load(cls, folder: str | Path, source: Mapping[str, Tensor]) -> MemoryBank:
        """Read what ``save`` wrote.

        Raises:
            SourceError: there is no bank or it cannot be read, or ``source`` is not the generator it was made on.
        """
        description = describe_bank(folder)
        found = fingerprint(source)
        if found != description["source_sha256"]:
            raise SourceError(
                f"{Path(folder)} was made on another source: its generator has sha256 "
                f"{description['source_sha256'][:16]}…, this one {found[:16]}…; give the --source (and "
                "--source-weights) that its tasks were trained on"
            )
        bank = cls(MemoryConfig.from_json(description["model"]), source, description["storage"])
        bank._tasks = {task["name"]: {} for task in description["tasks"]}
        names = bank.names
        for key, tensor in read_tensors(folder):
            number, _, rest = key.partition(".")
            bank._tasks[names[int(number)]][rest] = tensor
        return bank

    # ---- inside ----

    def _task(self, name: str) -> dict[str, Tensor]:
        if name not in self._tasks:
            raise KeyError(f"there is no task {name!r} in the bank; it has {', '.join(self._tasks) or 'none'}")
        return self._tasks[name]

    def _part(self, name: str, network: str) -> dict[str, Tensor]:
        prefix = f"{network}."
        found = {k.removeprefix(prefix): v.clone() for k, v in self._task(name).items() if k.startswith(prefix)}
        if not found:
            raise ValueError(f"task {name!r} was stored without its {network}")
        return found

    def _network(self, model: MemoryConfig) -> MemoryGenerator:
        generator = MemoryGenerator(model).to(self._source["fc.weight"].dtype)
        load_source(generator, self._source)
        return generator

    def _low_rank(self, name: str) -> dict[str, dict[str, Components]]:
        """Components of gamma and beta, of all tasks up to this one, with this task's weights, by layer."""
        upto = [self._tasks[n] for n in self.names[: self.names.index(name) + 1]]
        found: dict[str, dict[str, Components]] = {}
        for layer in low_rank_layers(self.model):
            for matrix in _MATRICES:
                key = f"generator.{layer}.{matrix}"
                u, v = (torch.cat([task[f"{key}_{part}"] for task in upto], 1) for part in "uv")
                found.setdefault(layer, {})[matrix] = Components(u, upto[-1][f"{key}_s"], v)
        return found

    def _stored(self, generator: MemoryGenerator) -> dict[str, Tensor]:
        state = generator.state_dict()
        tensors = {key: _copy(state[key]) for key in modulation_parameters(generator)}
        if self.storage == "full":
            return tensors
        before = self._low_rank(self.names[-1]) if self._tasks else {}
        for layer in low_rank_layers(self.model):
            module = generator.get_submodule(layer)
            for matrix in _MATRICES:
                residual = tensors.pop(f"{layer}.{matrix}")
                earlier = Components.empty(residual)
                if before:
                    self._check_components(module, layer, matrix, before[layer][matrix])
                    earlier = Components(*(tensors.pop(f"{layer}.{matrix}_{part}") for part in "usv"))
                kept, count = store(residual, earlier)
                added = len(kept.s) - count
                tensors[f"{layer}.{matrix}_u"] = kept.u[:, added:].contiguous()
                tensors[f"{layer}.{matrix}_s"] = kept.s.contiguous()
                tensors[f"{layer}.{matrix}_v"] = kept.v[:, added:].contiguous()
        return tensors

    def _check(self, generator: MemoryGenerator) -> None:
        if dataclasses.replace(generator.memory, components={}) != self.model:
            raise ValueError(f"the generator's description is {generator.memory}; the bank's is {self.model}")
        if generator.memory != self.next_model():
            raise ValueError("the generator was not built for this bank's next task: build it of bank.next_model()")
        own, task = generator.state_dict(), set(modulation_parameters(generator))
        for key, value in self.base().state_dict().items():
            if key not in task and not torch.allclose(own[key].cpu().to(value.dtype), value, rtol=1e-5, atol=1e-6):
                raise SourceError(f"{key} of the generator is not that of the bank's source; tasks share one source")

    def _check_components(self, module: Any, layer: str, matrix: str, stored: Components) -> None:
        if not isinstance(module, LowRankConv2d):
            raise ValueError(f"{layer} holds no stored components: build the task's generator of bank.next_model()")
        own = module.components(matrix)
        if not (torch.equal(own.u.cpu(), stored.u) and torch.equal(own.v.cpu(), stored.v)):
            raise ValueError(f"{layer}.{matrix}: its stored components are not the bank's; begin with bank.start()")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
