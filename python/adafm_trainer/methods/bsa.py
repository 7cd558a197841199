"""Scale and shift alone, in the manner of batch statistics adaptation (Noguchi and Harada, ICCV 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import SourceError
from ..models import biggan_layers, wgan_resnet
from ..models.architecture import Description
from ..models.catalogue import build_discriminator, build_generator
from ..models.source import SourcePair
from ..models.transfer import copy_source, freeze, groups, modulate_blocks
from .base import Group, Networks, TransferMethod, freeze_groups
from .config import TrainConfig
from .transfergan import copy_discriminator, source_generator_state

_BATCH_NORMS = (nn.BatchNorm2d, wgan_resnet.BatchNorm, biggan_layers.BatchNorm, biggan_layers.ConditionalBatchNorm)


class BSA(TransferMethod):
    """One scale and one shift for every channel of G are trained, and D; all filters of G stay as they are.

    Where G normalises over the batch these are the normalisation's own scale and shift (of conditional ones, what makes
    them from the label). Elsewhere they are a scale gamma ``[O, 1]`` of each modulated convolution's filters, which
    starts at one, and the convolution's bias. The paper fits them with latents of the training images and a perceptual
    loss; here they are trained against D, as every method is.
    """

    name = "bsa"

    def target_model(self, sources: Sequence[SourcePair], config: TrainConfig) -> Description:
        return sources[0].cfg

    def structure(self, model: Description, config: TrainConfig) -> Networks:
        if config.freeze_g:
            raise SourceError(
                f"--freeze-g is {config.freeze_g}: bsa freezes every filter of the generator and trains the scale and "
                "shift of every channel; leave it out"
            )
        if config.copy != "all":
            raise SourceError(
                f"--copy {config.copy} leaves parts of the generator at random, and bsa keeps its filters as they are; "
                "leave it out"
            )
        networks = Networks(build_generator(model), build_discriminator(model), model)
        generator, everything = networks.generator, len(groups(networks.generator, model))
        normalised = _normalisation(generator)
        layers = [] if normalised else modulate_blocks(generator, model, everything)
        freeze(generator, model, everything)
        freeze_groups(networks, model, config)
        for name in normalised:
            generator.get_parameter(name).requires_grad_(True)
        for name in layers:
            layer = generator.get_submodule(name)
            layer.gamma = nn.Parameter(torch.ones_like(layer.gamma[:, :1]))
            layer.beta.requires_grad_(False)
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
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
        state: dict[str, Tensor] = source_generator_state(source, config, log)
        log(copy_source(networks.generator, state, config.copy).summary("generator"))
        copy_discriminator(networks.discriminator, source, config, log)

    def generator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        named = [name for name, p in networks.generator.named_parameters() if p.requires_grad]
        scale = tuple(name for name in named if name.endswith(".gamma"))
        return [
            Group("scale", scale, config.lr_gamma),
            Group("shift", tuple(name for name in named if name not in set(scale)), config.lr_beta),
        ]


def _normalisation(generator: nn.Module) -> list[str]:
    """Names of the parameters of the generator's batch normalisations."""
    layers = ((name, layer) for name, layer in generator.named_modules() if isinstance(layer, _BATCH_NORMS))
    return [f"{name}.{leaf}" for name, layer in layers for leaf, _ in layer.named_parameters()]
