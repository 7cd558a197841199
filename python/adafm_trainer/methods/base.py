"""What a transfer method decides: the networks, their start values, what trains, and what changes on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..models.config import ModelConfig
from ..models.source import SourcePair
from .config import TrainConfig


@dataclass
class Networks:
    """The two networks of a run and the generator's description (which may differ from the source's)."""

    generator: nn.Module
    discriminator: nn.Module
    model: ModelConfig


@dataclass(frozen=True)
class Group:
    """Parameters of one step size: name for the log, parameter names, Adam's learning rate."""

    name: str
    parameters: tuple[str, ...]
    lr: float


class TransferMethod(ABC):
    """One transfer method. It holds no tensors: everything it needs to resume is in the networks and the config.

    ``structure`` builds the networks with arbitrary values and decides what is frozen; ``initialise`` fills in the
    source. A resumed or sampled run calls only the first and loads its own weights.
    """

    name: str
    needs_source = True

    @abstractmethod
    def target_model(self, source: ModelConfig, config: TrainConfig) -> ModelConfig:
        """Description of the target generator made from that of the source."""

    @abstractmethod
    def structure(self, model: ModelConfig, config: TrainConfig) -> Networks:
        """Networks of ``model``, with ``requires_grad`` set for every parameter that is trained at any time."""

    @abstractmethod
    def initialise(
        self,
        networks: Networks,
        source: SourcePair | None,
        config: TrainConfig,
        log: Callable[[str], None],
        autocast: torch.dtype | None = None,
    ) -> None:
        """Give the networks their start values; ``log`` takes the lines that say what was copied.

        ``autocast`` is the compute type of anything that is fitted on the way.
        """

    @abstractmethod
    def generator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        """All generator parameters that are trained at any time, in groups of one step size."""

    def discriminator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        return [Group("discriminator", tuple(trained(networks.discriminator)), config.lr_d)]

    def before_step(self, networks: Networks, config: TrainConfig, step: int) -> str | None:
        """Called before every step, and once after loading a checkpoint; returns a line for the log or None.

        It must put the networks into the state that belongs to ``step`` whatever came before.
        """
        return None


def trained(module: nn.Module) -> list[str]:
    """Names of the parameters that require a gradient."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]
