"""Groups of a network counted from the image side, as GmDn counts them (Zhao, Cong and Carin, ICML 2020)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .config import ModelConfig
from .gpgan import Discriminator
from .plan import discriminator_plan, generator_plan, join_stage

Groups = list[tuple[str, list[str]]]


def groups(module: nn.Module, cfg: ModelConfig) -> Groups:
    """Name and modules of every group, group 1 (``conv_img``) first.

    Each stage of blocks is one group; the last group of a GP-GAN network is its linear layer (with the embedding), that
    of an AdaFM generator its whole new head. Together the modules hold every parameter exactly once.

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
    _check(module, found)
    return found


def group_parameters(module: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Full names and parameters of the modules ``names``."""
    for name in names:
        for leaf, parameter in module.get_submodule(name).named_parameters():
            yield f"{name}.{leaf}", parameter


def _stage_name(block: str) -> str:
    return block if "." in block else block.rpartition("_")[0]


def _check(module: nn.Module, found: Groups) -> None:
    present = dict(module.named_modules())
    if absent := [name for _, names in found for name in names if name not in present]:
        raise ValueError(f"the network has no module {', '.join(absent)}; its description does not fit it")
    listed = {name for _, names in found for name, _ in group_parameters(module, names)}
    if outside := [name for name, _ in module.named_parameters() if name not in listed]:
        raise ValueError(f"parameters outside every group: {', '.join(outside[:5])}; the description does not fit")
