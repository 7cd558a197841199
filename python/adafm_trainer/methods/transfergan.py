"""Fine-tuning of a source with the source's own loss: all of it, or all but the groups that GmDn freezes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import SourceError
from ..models.config import ModelConfig
from ..models.gpgan import build_discriminator, build_generator
from ..models.source import SourcePair
from ..models.transfer import copy_source, freeze
from .base import Group, Networks, TransferMethod, trained
from .config import TrainConfig


class TransferGAN(TransferMethod):
    """G and D start from the source and are trained (Wang et al., ECCV 2018); ``freeze_g`` and ``freeze_d`` groups from
    the image side stay frozen (GmDn of Zhao, Cong and Carin, ICML 2020)."""

    name = "transfergan"

    def target_model(self, source: ModelConfig, config: TrainConfig) -> ModelConfig:
        return source

    def structure(self, model: ModelConfig, config: TrainConfig) -> Networks:
        networks = Networks(build_generator(model), build_discriminator(model), model)
        try:
            freeze(networks.generator, model, config.freeze_g)
            freeze(networks.discriminator, model, config.freeze_d)
        except ValueError as error:
            raise SourceError(f"--freeze-g {config.freeze_g} --freeze-d {config.freeze_d}: {error}") from error
        return networks

    def initialise(
        self,
        networks: Networks,
        source: SourcePair | None,
        config: TrainConfig,
        log: Callable[[str], None],
        autocast: torch.dtype | None = None,
    ) -> None:
        log(
            copy_source(networks.generator, source_generator_state(source, config, log), config.copy).summary(
                "generator"
            )
        )
        copy_discriminator(networks.discriminator, source, config, log)

    def generator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        return [Group("generator", tuple(trained(networks.generator)), config.lr_g)]


def source_generator_state(source: SourcePair, config: TrainConfig, log: Callable[[str], None]) -> dict[str, Tensor]:
    """The generator weights that ``--source-weights`` names; the raw ones where the source has no average."""
    if config.source_weights == "average" and source.average_state is not None:
        return source.average_state
    if config.source_weights == "average":
        log("the source has no weight average: its raw generator is taken")
    return source.generator_state


def copy_discriminator(
    discriminator: nn.Module, source: SourcePair, config: TrainConfig, log: Callable[[str], None]
) -> None:
    """Copy the source's discriminator; without one, D starts at random, which is said, and nothing of it may be frozen.

    Raises:
        SourceError: ``freeze_d`` asks to freeze groups that would be random.
    """
    if source.discriminator_state is not None:
        log(copy_source(discriminator, source.discriminator_state, config.copy).summary("discriminator"))
        return
    if config.freeze_d:
        raise SourceError(
            f"--freeze-d {config.freeze_d}: the source has no discriminator, so the frozen groups would be random; "
            "use --freeze-d 0"
        )
    log("the source has no discriminator: D starts at random")
