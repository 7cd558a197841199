"""The MNIST networks of MineGAN (Wang et al., "MineGAN", CVPR 2020; Gulrajani et al., NeurIPS 2017), 28 x 28 pixels.

Strided convolutions pad as TensorFlow's SAME does, which at an odd total puts the larger part after the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SourceError
from .architecture import Architecture, Groups, State
from .blocks import lrelu
from .description import check_counts, from_json
from .gpgan import check_noise
from .recompute import run_stage
from .tf_names import from_tf

ARCH = "mnist"
KERNEL, STRIDE = 5, 2
SIDES = (4, 7, 14, 28)


@dataclass(frozen=True)
class MnistConfig:
    """Sizes of an MNIST pair: ``dim`` channels at 14 pixels, twice as many at 7 and four times as many at 4.

    Raises:
        ValueError: from the constructor, naming the field, its value and what is admissible.
    """

    arch: str = ARCH
    size: int = 28
    """Image side in pixels: 28."""
    channels: int = 1
    """Image channels."""
    dim: int = 64
    """Base width."""
    z_dim: int = 16
    """Size of the latent vector."""
    classes: int = 0
    """Labels: always 0, the pair is unconditional."""

    def __post_init__(self) -> None:
        for name, value in (("arch", ARCH), ("size", SIDES[-1]), ("classes", 0)):
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}; arch {ARCH} has {value}")
        check_counts(self, channels=1, dim=1, z_dim=1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at the sides ``SIDES``."""
        return (4 * self.dim, 2 * self.dim, self.dim, self.channels)

    def to_json(self) -> dict[str, Any]:
        """All fields as a dictionary of JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MnistConfig:
        """Inverse of ``to_json``; ValueError names a field that is unknown or inadmissible."""
        return from_json(cls, values)


class Generator(nn.Module):
    """Images ``2 sigmoid(v) - 1`` in [-1, 1]: ``z [B, z_dim] -> [B, channels, 28, 28]``. Any order of differentiation.

    The published generator gives ``sigmoid(v)`` for pixels in [0, 1]. ``noise`` must be None or empty, ``y`` is not
    read. With ``checkpoint_activations`` set, every stage is computed again in the backward pass.
    """

    noise_shapes: tuple[tuple[int, int], ...] = ()
    checkpoint_activations = False

    def __init__(self, cfg: MnistConfig) -> None:
        super().__init__()
        self.cfg, self.z_dim = cfg, cfg.z_dim
        self.input = nn.Linear(cfg.z_dim, cfg.widths[0] * SIDES[0] ** 2)
        for i, (fin, fout) in enumerate(zip(cfg.widths, cfg.widths[1:], strict=False), 1):
            self.add_module(f"deconv{i}", nn.ConvTranspose2d(fin, fout, KERNEL, STRIDE, padding=1))
        initialise(self)

    def forward(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        return torch.tanh(self.pre_tanh(z, y, noise))

    def pre_tanh(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """``v / 2``, whose tanh is ``2 sigmoid(v) - 1``: ``[B, channels, 28, 28]``."""
        check_noise(noise, self.noise_shapes)
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected [B, {self.z_dim}]")
        h = self.input(z).view(-1, self.cfg.widths[0], SIDES[0], SIDES[0])
        for i, side in enumerate(SIDES[1:], 1):
            h = run_stage(self, self._stage, h, i, side)
        return h / 2

    def _stage(self, h: Tensor, i: int, side: int) -> Tensor:
        # Padding 1 leaves one row and column too many after the image; from 4 pixels it is cut to 7, not 8.
        return self.get_submodule(f"deconv{i}")(F.relu(h))[:, :, :side, :side]


class Discriminator(nn.Module):
    """The critic's score of each image in [-1, 1]: ``x [B, channels, 28, 28] -> [B]``. Any order of differentiation.

    The published critic takes pixels in [0, 1], which it is given here; the norm of its gradient with respect to those
    is twice that with respect to ``x`` (``gradient_scale``). ``y`` is not read. With ``checkpoint_activations`` set,
    every stage is computed again in the backward pass.
    """

    checkpoint_activations = False
    gradient_scale = 2.0

    def __init__(self, cfg: MnistConfig) -> None:
        super().__init__()
        self.cfg = cfg
        widths = cfg.widths[::-1]
        for i, (fin, fout) in enumerate(zip(widths, widths[1:], strict=False), 1):
            self.add_module(f"conv{i}", nn.Conv2d(fin, fout, KERNEL, STRIDE))
        self.output = nn.Linear(widths[-1] * SIDES[0] ** 2, 1)
        initialise(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.output(self.features(x)[-1].flatten(1))[:, 0]

    def features(self, x: Tensor) -> list[Tensor]:
        """The maps ``[B, dim 2^k, side, side]`` after each convolution and its leaky ReLU: sides 14, 7 and 4."""
        expected = (self.cfg.channels, self.cfg.size, self.cfg.size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, {', '.join(map(str, expected))}]")
        h, maps = (x + 1) / 2, []
        for i in range(1, len(SIDES)):
            h = run_stage(self, self._stage, h, i)
            maps.append(h)
        return maps

    def _stage(self, h: Tensor, i: int) -> Tensor:
        before, after = same_padding(h.shape[2], KERNEL, STRIDE)
        return lrelu(self.get_submodule(f"conv{i}")(F.pad(h, (before, after, before, after))))


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Rows of zeros before and after an image of ``side`` rows for TensorFlow's SAME: ceil(side / stride) rows."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Random weights, biases 0: uniform with variance ``2 / (fan_in + fan_out)`` in linear layers, twice that in
    convolutions. There a coarse position meets every tap of the fine side's channels, a fine position one in stride^2
    taps of the coarse side's."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            variance = 2 / sum(layer.weight.shape)
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            # The weight's first dimension is the coarse side's channels in both.
            coarse, fine, rows, columns = layer.weight.shape
            reach = rows * columns
            variance = 4 / (fine * reach + coarse * reach / STRIDE**2)
        else:
            continue
        layer.weight.uniform_(-((3 * variance) ** 0.5), (3 * variance) ** 0.5)
        layer.bias.zero_()


def groups(module: nn.Module, cfg: MnistConfig) -> Groups:
    """Groups of a network, image side first: each convolution and the linear layer."""
    names = [name for name, child in module.named_children() if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d))]
    if isinstance(module, Discriminator):
        return [(name, [name]) for name in (*names, "output")]
    return [(name, [name]) for name in (*reversed(names), "input")]


def modulated(module: nn.Module, names: list[str]) -> list[str]:
    """The convolutions among the modules ``names``, but for the generator's last one, which makes the image."""
    last = f"deconv{len(SIDES) - 1}"
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    return [name for name in names if isinstance(module.get_submodule(name), kinds) and name != last]


def rename(network: str, state: State) -> State:
    """Variables ``teacher_Generator.*`` and ``teacher_Discriminator.*`` under our names and in our layouts.

    ``state`` may hold both networks; only those of ``network`` and names of another form are returned.
    """
    stems = {"discriminator": {str(i): f"conv{i}" for i in (1, 2, 3)}}
    modules = stems.get(network, {"2": "deconv1", "3": "deconv2", "5": "deconv3"})
    return from_tf(network, state, modules, prefix="teacher_")


def infer(arch: str, networks: Mapping[str, State]) -> MnistConfig:
    """Sizes of a pair from its generator's tensors, under published names or ours.

    Raises:
        SourceError: there is no generator, or its tensors do not belong to the family.
    """
    found = next((name for name in ("generator", "average") if name in networks), None)
    if found is None:
        raise SourceError(f"no generator among {', '.join(networks) or 'nothing'}; the sizes cannot be told")
    state = rename(found, networks[found])
    try:
        columns, z_dim = state["input.weight"].shape
        dim, channels = state["deconv3.weight"].shape[:2]
        cfg = MnistConfig(arch, channels=channels, dim=dim, z_dim=z_dim)
    except KeyError as error:
        raise SourceError(f"the generator has no {error.args[0]}; is it really of --arch {ARCH}?") from error
    except ValueError as error:
        raise SourceError(f"the generator's shapes do not fit --arch {ARCH}: {error}") from error
    if columns != cfg.widths[0] * SIDES[0] ** 2:
        raise SourceError(
            f"the generator's first layer makes {columns} values; --arch {ARCH} of base width {dim} has "
            f"{cfg.widths[0] * SIDES[0] ** 2}"
        )
    return cfg


ARCHITECTURE = Architecture(
    names=(ARCH,),
    describe=MnistConfig.from_json,
    generator=Generator,
    discriminator=Discriminator,
    groups=groups,
    modulated=modulated,
    infer=infer,
    rename=rename,
    loss="wgan-gp",
)
