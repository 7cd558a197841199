"""What a transfer method decides: the networks, their start values, what trains, and what changes on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import SourceError
from ..models.architecture import Description
from ..models.source import SourcePair
from ..models.transfer import LEFT_BY_GMDN, freeze, modulate_blocks
from .config import TrainConfig


@dataclass
class Networks:
    """The two networks of a run and their description (which may differ from the source's)."""

    generator: nn.Module
    discriminator: nn.Module
    model: Description


@dataclass(frozen=True)
class Group:
    """Parameters of one step size: name for the log, parameter names, Adam's learning rate."""

    name: str
    parameters: tuple[str, ...]
    lr: float


class TransferMethod(ABC):
    """One transfer method. It holds no tensors: everything it needs to resume is in the networks and the config.

    ``structure`` builds the networks with arbitrary values and decides what is frozen; ``initialise`` fills in the
    source. A resumed or sampled run calls only the first and loads its own weights. ``copied`` names what of the
    generator came from the source and is trained: what --reg holds near its start.
    """

    name: str
    needs_source = True
    most_sources = 1

    @abstractmethod
    def target_model(self, sources: Sequence[SourcePair], config: TrainConfig) -> Description:
        """Description of the target's networks made from those of the sources, of which there are as many as asked.

        Raises:
            SourceError: the method cannot be applied to them.
        """

    @abstractmethod
    def structure(self, model: Description, config: TrainConfig) -> Networks:
        """Networks of ``model``, with ``requires_grad`` set for every parameter that is trained at any time."""

    @abstractmethod
    def initialise(
        self,
        networks: Networks,
        sources: Sequence[SourcePair],
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

    def copied(self, networks: Networks, sources: Sequence[SourcePair], config: TrainConfig) -> list[str]:
        """Trained parameters of the generator that have the source's values at the start."""
        present = sources[0].generator_state if sources else {}
        left = () if config.copy == "all" else LEFT_BY_GMDN
        return [name for name in trained(networks.generator) if name in present and name.split(".")[0] not in left]

    def discriminator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        return [Group("discriminator", tuple(trained(networks.discriminator)), config.lr_d)]

    def before_step(self, networks: Networks, config: TrainConfig, step: int) -> str | None:
        """Called before every step, and once after loading a checkpoint; returns a line for the log or None.

        It must put the networks into the state that belongs to ``step`` whatever came before.
        """
        return None

    def generator_penalty(self, networks: Networks, config: TrainConfig) -> Callable[[], None] | None:
        """What adds to the generator's gradients in every step, after the last backward and before the optimizer; or
        None. With several processes it comes after the exchange of gradients, with fp16 after they are unscaled."""
        return None

    def finish(
        self,
        average: nn.Module,
        config: TrainConfig,
        sources: Callable[[], Sequence[SourcePair]],
        log: Callable[[str], None],
    ) -> None:
        """Called on rank 0 after the last step, and again where a run that had reached it is resumed.

        ``average`` is the generator's weight average; ``sources`` reads the sources of the run.
        """
        return None


def freeze_groups(networks: Networks, model: Description, config: TrainConfig, modulate: bool = False) -> None:
    """Freeze groups 1 to ``freeze_g`` of G and 1 to ``freeze_d`` of D, counted from the image side; with ``modulate``
    the convolutions of those of G get gamma and beta.

    Raises:
        SourceError: a network has fewer groups.
    """
    try:
        if modulate:
            modulate_blocks(networks.generator, model, config.freeze_g)
        freeze(networks.generator, model, config.freeze_g)
        freeze(networks.discriminator, model, config.freeze_d)
    except ValueError as error:
        raise SourceError(f"--freeze-g {config.freeze_g} --freeze-d {config.freeze_d}: {error}") from error


def trained(module: nn.Module) -> list[str]:
    """Names of the parameters that require a gradient."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]
