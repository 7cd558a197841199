"""Published weights of the WGAN-GP residual networks: names, layouts and sizes told from the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import SourceError
from .architecture import State
from .tf_names import from_tf
from .wgan_config import ARCH, WganResNetConfig

_MODULES = {"OutputN": "output_norm", "ACGANOutput": "classifier"}


def rename(network: str, state: State) -> State:
    """Variables of TransferGAN's TensorFlow code under our names and in our layouts.

    ``state`` may hold both networks; only those of ``network`` and names of another form are returned.
    """
    return from_tf(network, state, _MODULES)


def infer(arch: str, networks: Mapping[str, State]) -> WganResNetConfig:
    """Sizes of a pair from its tensors, under published names or ours.

    A critic with a classifier beside a generator without class tables means labels that are joined to the latent.

    Raises:
        SourceError: a tensor that tells a size is absent, or the sizes do not belong to the family.
    """
    found = next((name for name in ("generator", "average") if name in networks), None)
    if found is None:
        raise SourceError(f"no generator among {', '.join(networks) or 'nothing'}; the sizes cannot be told")
    generator = rename(found, networks[found])
    critic = rename("discriminator", networks.get("discriminator", {}))
    try:
        inputs, first = generator["input.weight"].shape[::-1]
        channels, dim = generator["output.weight"].shape[:2]
        tables = generator["output_norm.weight"]
    except KeyError as error:
        raise SourceError(f"the generator has no {error.args[0]}; is it really of --arch {ARCH}?") from error
    blocks = {int(m[1]) for name in generator if (m := re.match(r"res(\d+)\.", name))}
    heads = critic["classifier.weight"].shape[0] if "classifier.weight" in critic else 0
    classes = tables.shape[0] if tables.dim() == 2 else heads
    if critic and heads != classes:
        raise SourceError(f"the generator has tables for {classes} classes, the critic's classifier {heads}")
    concatenated = classes if tables.dim() == 1 else 0
    try:
        cfg = WganResNetConfig(
            arch=arch,
            size=4 * 2 ** len(blocks),
            channels=channels,
            dim=dim,
            z_dim=inputs - concatenated,
            classes=classes,
            conditioning="concatenate" if concatenated else "batchnorm",
            statistics="running" if "output_norm.running_mean" in generator else "batch",
        )
    except ValueError as error:
        raise SourceError(f"the generator's shapes do not fit --arch {ARCH}: {error}") from error
    if blocks != set(range(1, cfg.blocks + 1)) or first != cfg.widths[0] * 16:
        raise SourceError(
            f"the generator has blocks {sorted(blocks)} and a first layer of {first} values; --arch {ARCH} of base "
            f"width {dim} and side {cfg.size} has blocks 1 to {cfg.blocks} and {cfg.widths[0] * 16} values"
        )
    return cfg
