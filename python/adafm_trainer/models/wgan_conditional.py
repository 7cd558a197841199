"""A conditional WGAN-GP residual pair that starts as an unconditional one (Wang et al., ECCV 2018, section 4)."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..errors import SourceError
from .architecture import Conditional, State
from .wgan_config import WganResNetConfig
from .wgan_resnet import Generator, build_discriminator, initialise


def conditional_from(network: str, state: State, cfg: WganResNetConfig) -> State:
    """Weights of a conditional network that computes, for every label, what the unconditional ``state`` computes.

    Every row of a class table is a copy of the unconditional scale or offset; with ``conditioning="concatenate"`` the
    label's columns of the first layer are zero. The critic's classifier is new and random; all else is copied.

    Args:
        network: generator (or average) or discriminator.
        state: of the unconditional network, under our names.
        cfg: of the conditional pair; its other sizes must be those of ``state``.

    Returns:
        A complete state of that network of ``cfg``; no tensor is shared with ``state``.

    Raises:
        ValueError: ``network`` is unknown or ``cfg`` has no classes.
        SourceError: ``state`` is not an unconditional network of the other sizes of ``cfg``.
    """
    if network not in ("generator", "average", "discriminator"):
        raise ValueError(f"network is {network!r}; expected generator, average or discriminator")
    if not cfg.classes:
        raise ValueError("classes is 0; a conditional pair needs the number of labels of the target")
    _check(network, state, cfg)
    new = {name: value.clone() for name, value in state.items()}
    if network == "discriminator":
        classifier = nn.Linear(state["output.weight"].shape[1], cfg.classes)
        initialise(classifier)
        like = state["output.weight"]
        new |= {f"classifier.{name}": value.to(like) for name, value in classifier.state_dict().items()}
        return new
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".")
        if cfg.tables and leaf in ("weight", "bias") and layer.rpartition(".")[2] in ("bn1", "bn2", "output_norm"):
            new[name] = value.repeat(cfg.tables, 1)
    weight = state["input.weight"]
    new["input.weight"] = torch.cat([weight, weight.new_zeros(len(weight), cfg.appended)], 1)
    return new


def _check(network: str, state: State, cfg: WganResNetConfig) -> None:
    plain = dataclasses.replace(cfg, classes=0)
    with torch.device("meta"):
        expected = (build_discriminator if network == "discriminator" else Generator)(plain).state_dict()
    for name in expected.keys() | state.keys():
        found, wanted = (list(s[name].shape) if name in s else "nothing" for s in (state, expected))
        if found != wanted:
            raise SourceError(
                f"{network}: {name} is {found} in the source; an unconditional {cfg.arch} of {cfg.size} pixels and "
                f"base width {cfg.dim} has {wanted}"
            )


def _described(source: WganResNetConfig, classes: int, conditioning: str) -> WganResNetConfig:
    return dataclasses.replace(source, classes=classes, conditioning=conditioning)


CONDITIONAL = Conditional(_described, conditional_from)
