"""AdaFM: the source's image-side filters stay frozen and are modulated (Zhao, Cong and Carin, ICML 2020)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..errors import SourceError
from ..keyed import normal
from ..models.adafm import calibrate, distil_head
from ..models.architecture import Description
from ..models.catalogue import architecture, build_discriminator, build_generator
from ..models.config import ModelConfig
from ..models.source import SourcePair
from ..models.transfer import adapter_parameters, copy_source, modulated_state
from .base import Group, Networks, TransferMethod, freeze_groups, trained
from .config import TrainConfig
from .transfergan import copy_discriminator, source_generator_state

# Steps that fit a distilled head to the source's own blocks.
DISTIL_STEPS = 300


class AdaFM(TransferMethod):
    """Groups 1 to ``freeze_g`` of G frozen, their ``conv_0`` and ``conv_1`` modulated by gamma and beta; a head above.

    ``head`` decides what stands above: the source's own blocks, kept and trained (``source``); the paper's fresh small
    head (``new``); or that head fitted to the source's first (``distilled``). D comes from the source with groups 1 to
    ``freeze_d`` frozen and is not modulated. gamma and beta are held at identity for the first ``adafm_start`` steps;
    Adam's state for them begins when they are released.
    """

    name = "adafm"

    def target_model(self, sources: Sequence[SourcePair], config: TrainConfig) -> Description:
        _check_groups(config)
        source = sources[0].cfg
        if config.head == "source":
            return source
        if not isinstance(source, ModelConfig):
            raise SourceError(
                f"--head {config.head} puts the paper's head on a GP-GAN source; for one of family {source.arch} use "
                "--head source"
            )
        small_h = "reference" if config.faithful else "calibrated"
        return dataclasses.replace(source, arch="adafm", base=source.arch, keep=config.freeze_g, small_h=small_h)

    def structure(self, model: Description, config: TrainConfig) -> Networks:
        _check_groups(config)
        networks = Networks(build_generator(model), build_discriminator(model), model)
        freeze_groups(networks, model, config, modulate=True)
        release(networks.generator)
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
        state = source_generator_state(source, config, log)
        copied = state
        if architecture(source.cfg.arch).modulate is not None:
            # The family's modulated layers hold other tensors than its plain ones: those of the source, modulated.
            copied = modulated_state(source.cfg, state, config.freeze_g)
        log(copy_source(networks.generator, copied, config.copy).summary("generator"))
        copy_discriminator(networks.discriminator, source, config, log)
        if config.head == "source":
            return
        teacher = build_generator(source.cfg)
        teacher.load_state_dict(state)
        if config.head == "distilled":
            if networks.model.small_h != "calibrated":
                raise SourceError("--head distilled fits the head's scale too: leave --faithful out, or use --head new")
            log("fitting the new head to the source's own blocks")
            error = distil_head(
                networks.generator,
                teacher,
                steps=DISTIL_STEPS,
                seed=config.seed,
                autocast=autocast,
                progress=_reporter(log),
            )
            log(f"head fitted: relative error {error:.3f} at the join")
        elif networks.model.small_h == "calibrated":
            calibrate(networks.generator, teacher, normal(config.seed, "calibrate", 0, range(256), (teacher.z_dim,)))
            log("new head: random, its output at the scale that the source has at the join")

    def generator_groups(self, networks: Networks, config: TrainConfig) -> list[Group]:
        adapters = adapter_parameters(networks.generator)
        rest = [name for name in trained(networks.generator) if name not in set(adapters)]
        lr = config.lr_g if config.head == "source" else config.lr_head
        return [
            Group("head", tuple(rest), lr),
            Group("gamma", tuple(n for n in adapters if n.endswith(".gamma")), config.lr_gamma),
            Group("beta", tuple(n for n in adapters if n.endswith(".beta")), config.lr_beta),
        ]

    def before_step(self, networks: Networks, config: TrainConfig, step: int) -> str | None:
        if step < config.adafm_start:
            hold(networks.generator)
            return None
        held = not _requires_grad(networks.generator)
        release(networks.generator)
        return "gamma and beta are trained from here on" if held and step else None


def _reporter(log: Callable[[str], None], every: int = 50) -> Callable[[int, int, float], None]:
    def report(step: int, steps: int, error: float) -> None:
        if step % every == 0:
            log(f"  head step {step}/{steps}: relative error {error:.3f}")

    return report


def hold(generator: nn.Module) -> None:
    """Keep every gamma and beta of ``generator`` as they are: they get no gradient and no optimizer step."""
    _set(generator, False)


def release(generator: nn.Module) -> None:
    """Train every gamma and beta of ``generator`` from the next step on."""
    _set(generator, True)


def _set(generator: nn.Module, flag: bool) -> None:
    for name in adapter_parameters(generator):
        generator.get_parameter(name).requires_grad_(flag)


def _requires_grad(generator: nn.Module) -> bool:
    return any(generator.get_parameter(name).requires_grad for name in adapter_parameters(generator))


def _check_groups(config: TrainConfig) -> None:
    if config.freeze_g < 2:
        raise SourceError(
            f"--freeze-g is {config.freeze_g}: AdaFM modulates the blocks of the frozen groups, and group 1 is "
            "conv_img alone; freeze at least 2 groups, or use `adafm train transfergan`"
        )
