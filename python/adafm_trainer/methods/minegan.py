"""MineGAN: a miner moves the input of frozen source generators, which are then fine-tuned (Wang et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import SourceError
from ..models.architecture import Description
from ..models.catalogue import build_discriminator, build_generator
from ..models.mined import MinedGenerator
from ..models.mined_pair import MinedConfig
from ..models.miners import BigGANMiner
from ..models.multi_mine import MultiMinedGenerator
from ..models.source import SourcePair
from ..models.transfer import adapter_parameters, copy_source, freeze, modulate_blocks, modulated_state
from .base import Group, Networks, TransferMethod, trained
from .config import TrainConfig
from .transfergan import copy_discriminator, source_generator_state


class MineGAN(TransferMethod):
    """Two stages in one run: ``stage2_start`` steps train the miner and D, then G is trained too, as ``stage2`` says.

    D comes from the first source in both stages, with groups 1 to ``freeze_d`` frozen. In stage 1 every parameter of
    every source generator stays bit for bit, and with frozen miner buffers so does every buffer. Stage 2 trains all of
    the generators, or, with adafm, gamma and beta of the convolutions in their groups 1 to ``freeze_g``. Adam's state
    for them begins at the switch.

    Several sources compete for each sample (``select``): only the winner's images are made with gradients. For the
    first ``mining_warmup`` steps every source gets an equal share.
    """

    name = "minegan"
    most_sources = 16

    def target_model(self, sources: Sequence[SourcePair], config: TrainConfig) -> Description:
        try:
            return MinedConfig(
                sources=tuple(source.cfg.to_json() for source in sources),
                u_dim=config.miner_dim,
                hidden=config.miner_hidden,
                init=config.miner_init,
                freeze_buffers=config.miner_buffers == "frozen",
                reduce=config.select.replace("-", "_"),
                selector=config.selector,
            )
        except ValueError as error:
            raise SourceError(str(error)) from error

    def structure(self, model: Description, config: TrainConfig) -> Networks:
        try:
            networks = Networks(build_generator(model), build_discriminator(model), model)
        except ValueError as error:
            raise SourceError(f"the sources cannot be mined as asked: {error}") from error
        source = model.described[0]
        try:
            freeze(networks.discriminator, source, config.freeze_d)
            if config.stage2 == "adafm":
                for generator, described in zip(self._generators(networks), model.described, strict=True):
                    if not modulate_blocks(generator, described, config.freeze_g):
                        raise ValueError("--stage2 adafm has no convolution to modulate there; freeze more groups of G")
        except ValueError as error:
            raise SourceError(f"--freeze-g {config.freeze_g} --freeze-d {config.freeze_d}: {error}") from error
        self._release(networks, config)
        return networks

    def initialise(
        self,
        networks: Networks,
        sources: Sequence[SourcePair],
        config: TrainConfig,
        log: Callable[[str], None],
        autocast: torch.dtype | None = None,
    ) -> None:
        for number, (generator, source) in enumerate(zip(self._generators(networks), sources, strict=True), 1):
            state = self._state(source, config, log)
            log(copy_source(generator, state, "all").summary(f"generator of source {number}"))
        miners = _miners(networks.generator)
        if config.miner_init == "identity":
            for miner, generator in zip(miners, self._generators(networks), strict=False):
                if isinstance(miner, BigGANMiner):
                    with torch.no_grad():
                        miner.linear8.bias.copy_(generator.shared.weight.mean(0))
        copy_discriminator(networks.discriminator, sources[0], config, log)
        for number, source in enumerate(sources, 1):
            mines_class = isinstance(miners[min(number, len(miners)) - 1], BigGANMiner)
            if source.cfg.classes > 1 and config.labels == "none" and not mines_class:
                remedy = "" if len(sources) > 1 else "; for all of them add --labels folders, with a folder for each"
                log(
                    f"source {number} has {source.cfg.classes} classes and is given no labels: it makes its class 0 "
                    f"alone{remedy}"
                )
        log(
            f"stage 1, steps 0 to {min(config.stage2_start, config.steps)}: the miner is trained, every generator is "
            "frozen"
        )

    def generator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        self._release(networks, config)
        names = trained(networks.generator)
        mined = [name for name in names if name.startswith("miner")]
        rest = [name for name in names if not name.startswith("miner")]
        if config.stage2 != "adafm":
            return [Group("miner", tuple(mined), config.lr_miner), Group("generator", tuple(rest), config.lr_g)]
        return [
            Group("miner", tuple(mined), config.lr_miner),
            Group("gamma", tuple(n for n in rest if n.endswith(".gamma")), config.lr_gamma),
            Group("beta", tuple(n for n in rest if n.endswith(".beta")), config.lr_beta),
        ]

    def copied(self, networks: Networks, sources: Sequence[SourcePair], config: TrainConfig) -> list[str]:
        return [
            name
            for name in trained(networks.generator)
            if not name.startswith("miner") and not name.endswith((".gamma", ".beta"))
        ]

    def before_step(self, networks: Networks, config: TrainConfig, step: int) -> str | None:
        network = networks.generator
        several = not isinstance(network, MinedGenerator)
        events = []
        if several:
            if network.warming and step >= config.mining_warmup and step:
                events.append("the discriminator chooses the sources from here on")
            network.warming = step < config.mining_warmup
        if step < config.stage2_start or config.stage2 == "none":
            network.mine()
        elif network.mining:
            self._release(networks, config)
            if step:
                what = "every generator's weights are" if config.stage2 == "all" else "gamma and beta are"
                events.append(f"stage 2: {what} trained from here on")
        return "; ".join(events) or None

    def _release(self, networks: Networks, config: TrainConfig) -> None:
        """``requires_grad`` and modes of stage 2 (of stage 1 where there is no stage 2)."""
        network = networks.generator
        if config.stage2 == "none":
            network.mine()
        elif config.stage2 == "all":
            network.fine_tune()
        else:
            network.fine_tune([p for g in self._generators(networks) for p in _adapters(g)])

    def _state(self, source: SourcePair, config: TrainConfig, log: Callable[[str], None]) -> dict[str, Tensor]:
        """The generator's tensors under the names that the (modulated) network has."""
        state = source_generator_state(source, config, log)
        if config.stage2 != "adafm":
            return state
        return modulated_state(source.cfg, state, config.freeze_g)

    @staticmethod
    def _generators(networks: Networks) -> list[nn.Module]:
        network = networks.generator
        return [network.generator] if isinstance(network, MinedGenerator) else list(network.generators)


def _miners(network: MinedGenerator | MultiMinedGenerator) -> list[nn.Module]:
    """The miner of each generator, or the one that serves all."""
    return [network.miner] if isinstance(network, MinedGenerator) else list(network.miners)


def _adapters(generator: nn.Module) -> list[nn.Parameter]:
    return [generator.get_parameter(name) for name in adapter_parameters(generator)]
