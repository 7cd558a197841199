"""Training from random weights: the baseline of every transfer, and how a source comes into being."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..models.config import ModelConfig
from ..models.gpgan import build_discriminator, build_generator
from ..models.source import SourcePair
from .base import Group, Networks, TransferMethod, trained
from .config import TrainConfig


class Scratch(TransferMethod):
    """All of G and D from PyTorch's default initialisation. A source, if given, only tells the sizes."""

    name = "scratch"
    needs_source = False

    def target_model(self, source: ModelConfig, config: TrainConfig) -> ModelConfig:
        return source

    def structure(self, model: ModelConfig, config: TrainConfig) -> Networks:
        return Networks(build_generator(model), build_discriminator(model), model)

    def initialise(
        self,
        networks: Networks,
        source: SourcePair | None,
        config: TrainConfig,
        log: Callable[[str], None],
        autocast: torch.dtype | None = None,
    ) -> None:
        log("start values: random; nothing is copied" + ("" if source is None else ", the source gives the sizes only"))

    def generator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        return [Group("generator", tuple(trained(networks.generator)), config.lr_g)]
