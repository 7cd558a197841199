"""The GP-GAN families, and the AdaFM generator on them, as the trainer sees them."""

from __future__ import annotations

from torch import nn

from .architecture import Architecture, Groups
from .blocks import ResBlock
from .checkpoints import infer_config
from .config import GPGAN_FAMILIES, ModelConfig
from .gpgan import Discriminator, build_discriminator, build_generator
from .groups import check_groups
from .names import state_from_reference
from .plan import discriminator_plan, generator_plan, join_stage


def gpgan_groups(module: nn.Module, cfg: ModelConfig) -> Groups:
    """Groups of a GP-GAN network as GmDn counts them (Zhao, Cong and Carin, ICML 2020), group 1 (``conv_img``) first.

    Each stage of blocks is one group; the last group of a GP-GAN network is its linear layer (with the embedding), that
    of an AdaFM generator its whole new head.

    Raises:
        ValueError: the network has parameters outside the groups of ``cfg``, or lacks one of their modules.
    """
    if isinstance(module, Discriminator):
        stages, last = list(discriminator_plan(cfg).stages), ("fc", ["fc"])
    else:
        stages = list(reversed(generator_plan(cfg).stages))
        last = ("fc", ["fc", "embedding"] if cfg.embed else ["fc"])
        if cfg.arch == "adafm":
            kept = len(stages) - join_stage(generator_plan(cfg), cfg.keep)
            head = [name for name, _ in module.named_children() if name.startswith("small_")]
            stages, last = stages[:kept], ("head", head)
    found = [("conv_img", ["conv_img"])]
    for stage in stages:
        names = [block.name for block in stage]
        found.append((_stage_name(names[0]), names))
    found.append(last)
    check_groups(module, found)
    return found


def modulated_convolutions(module: nn.Module, names: list[str]) -> list[str]:
    """``conv_0`` and ``conv_1`` of every residual block among the modules ``names``."""
    blocks = [name for name in names if isinstance(module.get_submodule(name), ResBlock)]
    return [f"{name}.{leaf}" for name in blocks for leaf in ("conv_0", "conv_1")]


def _stage_name(block: str) -> str:
    return block if "." in block else block.rpartition("_")[0]


GPGAN = Architecture(
    names=(*GPGAN_FAMILIES, "adafm"),
    describe=ModelConfig.from_json,
    generator=build_generator,
    discriminator=build_discriminator,
    groups=gpgan_groups,
    modulated=modulated_convolutions,
    infer=infer_config,
    rename=lambda network, state: state_from_reference(state),
    label_free=True,
)
