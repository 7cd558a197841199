"""Weights to measure on, read off real generators and discriminators that are built without memory."""

from __future__ import annotations

from functools import cache

import torch

from ..models.blocks import ResBlock
from ..models.catalogue import build_discriminator, build_generator
from ..models.config import ModelConfig

Shape = tuple[int, int, int, int]

# Name, what it is, description of the network, whether it is the discriminator. Every 3x3 filter of its residual blocks
# is modulated: the published AdaFM generator keeps four groups of its source, the others are modulated throughout.
NETWORKS = {
    "G128": ("AdaFM generator, 128 px", ModelConfig(arch="adafm", base="resnet2", size=128), False),
    "G256": ("fully modulated generator, 256 px", ModelConfig(arch="resnet4", size=256), False),
    "D128": ("fully modulated discriminator, 128 px", ModelConfig(arch="resnet2", size=128), True),
}
_SMALL = ModelConfig(arch="adafm", base="resnet2", size=128, nf=8, style_dim=32)
# The bar's geometric mean runs over the first four.
_PAIRS = ((64, 64), (128, 256), (256, 512), (1024, 1024))
_LISTED = (512, 512)
_POINTWISE = (256, 512)


@cache
def filters(config: ModelConfig, discriminator: bool) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Shapes of the 3x3 filters of all residual blocks, in the network's order, and of the 1x1 shortcuts."""
    with torch.device("meta"):
        network = (build_discriminator if discriminator else build_generator)(config)
    blocks = [module for module in network.modules() if isinstance(module, ResBlock)]
    square = [tuple(conv.weight.shape) for block in blocks for conv in (block.conv_0, block.conv_1)]
    pointwise = [tuple(block.conv_s.weight.shape) for block in blocks if block.conv_s is not None]
    return tuple(square), tuple(pointwise)


def network_layers(name: str, small: bool = False) -> tuple[Shape, ...]:
    """The modulated filters of one of NETWORKS; ``small``: of the same generator an eighth as wide."""
    _, config, discriminator = NETWORKS[name]
    return filters(_SMALL, False)[0] if small else filters(config, discriminator)[0]


def mean_shapes() -> list[Shape]:
    """The filters that geometric means run over, smallest first."""
    return [_square(pair) for pair in _PAIRS]


def listed_shapes() -> list[Shape]:
    """Filters measured beside those: another 3x3, and a 1x1 shortcut."""
    _, pointwise = filters(NETWORKS["G256"][1], False)
    return [_square(_LISTED), next(shape for shape in pointwise if shape[:2] == _POINTWISE)]


def middle_shape() -> Shape:
    """A filter of middling size."""
    return mean_shapes()[2]


def small_shape() -> Shape:
    return mean_shapes()[1]


def text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _square(pair: tuple[int, int]) -> Shape:
    """The 3x3 filter of that many outputs and inputs; StopIteration where no generator has it."""
    layers = [*network_layers("G128"), *network_layers("G256")]
    return next(shape for shape in layers if shape[:2] == pair)
