"""Training from random weights: the baseline of every transfer, and how a source comes into being."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..models.architecture import Description
from ..models.catalogue import build_discriminator, build_generator
from ..models.source import SourcePair
from .base import Group, Networks, TransferMethod, trained
from .config import TrainConfig


class Scratch(TransferMethod):
    """All of G and D from PyTorch's default initialisation. A source, if given, only tells the sizes."""

    name = "scratch"
    needs_source = False

    def target_model(self, sources: Sequence[SourcePair], config: TrainConfig) -> Description:
        return sources[0].cfg

    def structure(self, model: Description, config: TrainConfig) -> Networks:
        return Networks(build_generator(model), build_discriminator(model), model)

    def initialise(
        self,
        networks: Networks,
        sources: Sequence[SourcePair],
        config: TrainConfig,
        log: Callable[[str], None],
        autocast: torch.dtype | None = None,
    ) -> None:
        log("start values: random; nothing is copied" + (", the source gives the sizes only" if sources else ""))

    def copied(self, networks: Networks, sources: Sequence[SourcePair], config: TrainConfig) -> list[str]:
        return []

    def generator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        return [Group("generator", tuple(trained(networks.generator)), config.lr_g)]
