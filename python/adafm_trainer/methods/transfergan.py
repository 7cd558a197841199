"""Fine-tuning of a source with the source's own loss: all of it, or all but the groups that GmDn freezes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import SourceError
from ..models.architecture import Description
from ..models.catalogue import architecture, build_discriminator, build_generator
from ..models.source import SourcePair
from ..models.transfer import copy_source
from .base import Group, Networks, TransferMethod, freeze_groups, trained
from .config import TrainConfig


class TransferGAN(TransferMethod):
    """G and D start from the source and are trained (Wang et al., ECCV 2018); ``freeze_g`` and ``freeze_d`` groups from
    the image side stay frozen (GmDn of Zhao, Cong and Carin, ICML 2020).

    ``transfer`` chooses which of the two starts from the source; the other one has its family's initialisation. With
    ``classes`` an unconditional source becomes conditional where its family knows how: the function is the same for
    every label at the start, and the classifier's weights are fresh. Adam starts without moments.
    """

    name = "transfergan"

    def target_model(self, sources: Sequence[SourcePair], config: TrainConfig) -> Description:
        source = sources[0].cfg
        if config.classes in (0, source.classes):
            return source
        conditional = architecture(source.arch).conditional
        if conditional is None or source.classes:
            what = f"has {source.classes} classes" if source.classes else f"is of family {source.arch}"
            raise SourceError(
                f"--classes {config.classes}: the source {what}, and only an unconditional one of family wgan-resnet "
                f"becomes conditional; use --classes {source.classes}"
            )
        return conditional.describe(source, config.classes, config.conditioning)

    def structure(self, model: Description, config: TrainConfig) -> Networks:
        networks = Networks(build_generator(model), build_discriminator(model), model)
        starts_at_random = config.transfer in ("none", "discriminator") and config.freeze_g
        if starts_at_random or (config.transfer in ("none", "generator") and config.freeze_d):
            raise SourceError(
                f"--transfer {config.transfer} --freeze-g {config.freeze_g} --freeze-d {config.freeze_d}: what starts "
                "at random must not be frozen; set its --freeze flag to 0"
            )
        if config.transfer in ("none", "discriminator") and config.reg != "none":
            raise SourceError(
                f"--transfer {config.transfer} --reg {config.reg}: the generator starts at random and has no "
                "source weights to be held near; leave --reg out"
            )
        freeze_groups(networks, model, config)
        return networks

    def initialise(
        self,
        networks: Networks,
        sources: Sequence[SourcePair],
        config: TrainConfig,
        log: Callable[[str], None],
        autocast: torch.dtype | None = None,
    ) -> None:
        (source,) = sources
        becomes_conditional = networks.model.classes and not source.cfg.classes
        conditional = architecture(source.cfg.arch).conditional if becomes_conditional else None
        if conditional is not None and source.discriminator_state is not None:
            state = conditional.convert("discriminator", source.discriminator_state, networks.model)
            source = dataclasses.replace(source, discriminator_state=state)
        if config.transfer in ("both", "generator"):
            state = source_generator_state(source, config, log)
            if conditional is not None:
                state = conditional.convert("generator", state, networks.model)
                log(f"the generator becomes conditional: {networks.model.classes} classes, each the source's function")
            log(copy_source(networks.generator, state, config.copy).summary("generator"))
        else:
            log("the generator starts at random, as --transfer says")
        if config.transfer in ("both", "discriminator"):
            copy_discriminator(networks.discriminator, source, config, log)
        else:
            log("the discriminator starts at random, as --transfer says")

    def generator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        return [Group("generator", tuple(trained(networks.generator)), config.lr_g)]


class FreezeD(TransferGAN):
    """Fine-tuning with the discriminator's layers next to the image frozen (Mo, Cho and Shin, "Freeze the
    Discriminator", 2020): ``freeze_d`` groups, at least one."""

    name = "freezed"

    def structure(self, model: Description, config: TrainConfig) -> Networks:
        if config.freeze_d < 1:
            raise SourceError(
                f"--freeze-d is {config.freeze_d}: freezed freezes at least 1 group of the discriminator; for none use "
                "`adafm train transfergan`"
            )
        return super().structure(model, config)


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
