"""DCGAN generators and discriminators (Radford, Metz and Chintala, ICLR 2016), in the layout of the common checkpoints.

Every layer is one entry of ``main``, numbered as in the usual PyTorch code, so its state dictionaries load by name.
Batch normalisation takes the statistics of the batch in training mode, where it also averages them, and those averages
in evaluation mode; it is computed in the parameters' own dtype, also under autocast.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SourceError
from .architecture import Architecture, Groups, State
from .description import check_counts, from_json
from .gpgan import check_noise, layout
from .recompute import run_stage

ARCH = "dcgan"
SLOPE = 0.2
_DEVIATION = 0.02
_FIRST_SIDE = 4


@dataclass(frozen=True)
class DCGANConfig:
    """Sizes of a DCGAN pair; ValueError from the constructor names the field, its value and what is admissible."""

    arch: str = ARCH
    size: int = 64
    """Image side in pixels: a power of two from 16. Widths double with each halving of the side, down to 4 pixels."""
    channels: int = 3
    """Image channels."""
    z_dim: int = 100
    """Size of the latent vector."""
    ngf: int = 64
    """Channels of the generator's last map, of half the image's side."""
    ndf: int = 64
    """Channels of the discriminator's first map."""
    classes: int = 0
    """Labels: none, the family is unconditional."""

    def __post_init__(self) -> None:
        if self.arch != ARCH:
            raise ValueError(f"arch is {self.arch!r}; expected {ARCH}")
        check_counts(self, size=16, channels=1, z_dim=1, ngf=1, ndf=1, classes=0)
        if self.size & (self.size - 1):
            raise ValueError(f"size is {self.size}; arch {ARCH} makes powers of two from 16: 16, 32, 64, 128, ...")
        if self.classes:
            raise ValueError(f"classes is {self.classes}; arch {ARCH} is unconditional: leave it at 0")

    @property
    def doublings(self) -> int:
        """Layers of stride 2 between 4 pixels and the image."""
        return (self.size // _FIRST_SIDE).bit_length() - 1

    def to_json(self) -> dict[str, Any]:
        """All fields as a dictionary of JSON values."""
        return dataclasses.asdict(self)


class _Network(nn.Module):
    """``main`` in stages of a convolution and what follows it, each of which can be computed again in the backward."""

    checkpoint_activations = False

    def __init__(self, cfg: DCGANConfig, layers: list[nn.Module], kind: type[nn.Module]) -> None:
        super().__init__()
        self.cfg, self.main = cfg, nn.Sequential(*layers)
        starts = [i for i, layer in enumerate(layers) if isinstance(layer, kind)]
        self._stages = [range(i, end) for i, end in zip(starts, [*starts[1:], len(layers)], strict=True)]
        for layer in layers:
            if isinstance(layer, kind):
                nn.init.normal_(layer.weight, std=_DEVIATION)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, _DEVIATION)

    def _run(self, h: Tensor) -> Tensor:
        memory_format, computed = layout(self), set()

        def stage(h: Tensor, t: int) -> Tensor:
            # A stage that is computed again must not average the batch's statistics a second time.
            again = t in computed
            computed.add(t)
            h = h.contiguous(memory_format=memory_format)
            for layer in (self.main[i] for i in self._stages[t]):
                h = _normalise(layer, h, again) if isinstance(layer, nn.BatchNorm2d) else layer(h)
            return h

        for t in range(len(self._stages)):
            h = run_stage(self, stage, h, t)
        return h


class Generator(_Network):
    """Images in [-1, 1] from latents: ``z [B, z_dim] -> [B, channels, size, size]``.

    Unconditional and without injected noise: ``y`` must be None, ``noise`` None or empty. Any order of differentiation
    that batch normalisation has (two). With ``checkpoint_activations`` every stage is computed again in the backward.
    """

    noise_shapes: tuple[tuple[int, int], ...] = ()

    def __init__(self, cfg: DCGANConfig) -> None:
        layers: list[nn.Module] = []
        fin = cfg.z_dim
        for k in reversed(range(cfg.doublings)):
            fout, stride = cfg.ngf << k, 2 if layers else 1
            layers += [nn.ConvTranspose2d(fin, fout, 4, stride, stride - 1, bias=False), nn.BatchNorm2d(fout)]
            layers.append(nn.ReLU())
            fin = fout
        layers.append(nn.ConvTranspose2d(fin, cfg.channels, 4, 2, 1, bias=False))
        super().__init__(cfg, layers, nn.ConvTranspose2d)
        self.z_dim = cfg.z_dim

    def forward(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        return torch.tanh(self.pre_tanh(z, y, noise))

    def pre_tanh(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """The image before tanh, ``[B, channels, size, size]``, in the autocast type where one is active."""
        check_noise(noise, self.noise_shapes)
        _check_unconditional(y)
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected [B, {self.z_dim}]")
        return self._run(z[:, :, None, None])


class Discriminator(_Network):
    """One logit per image: ``x [B, channels, size, size] -> [B]``; ``y`` must be None. Differentiable twice.

    In training mode a logit depends on the whole batch, by its statistics.
    """

    def __init__(self, cfg: DCGANConfig) -> None:
        layers: list[nn.Module] = [nn.Conv2d(cfg.channels, cfg.ndf, 4, 2, 1, bias=False), nn.LeakyReLU(SLOPE)]
        for k in range(1, cfg.doublings):
            fin, fout = cfg.ndf << (k - 1), cfg.ndf << k
            layers += [nn.Conv2d(fin, fout, 4, 2, 1, bias=False), nn.BatchNorm2d(fout), nn.LeakyReLU(SLOPE)]
        layers.append(nn.Conv2d(cfg.ndf << (cfg.doublings - 1), 1, 4, 1, 0, bias=False))
        super().__init__(cfg, layers, nn.Conv2d)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        _check_unconditional(y)
        expected = (self.cfg.channels, self.cfg.size, self.cfg.size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, {', '.join(map(str, expected))}]")
        return self._run(x).flatten()


def dcgan_groups(module: nn.Module, cfg: DCGANConfig) -> Groups:
    """One group for each convolution with its normalisation, named by the side of the map it makes or reads.

    Group 1 is the image's convolution, the last one that of the 4 pixels beside the latent or the logit.
    """
    count = cfg.doublings + 1
    generator = isinstance(module, Generator)
    # The discriminator's first convolution has no normalisation: its numbers run one short from the second on.
    places = [3 * k for k in range(count)] if generator else [0, *(3 * k - 1 for k in range(1, count))]
    listed = []
    for number, place in enumerate(reversed(places) if generator else places):
        norm = isinstance(module.main[min(place + 1, len(module.main) - 1)], nn.BatchNorm2d)
        name = f"side{cfg.size >> number}" if number else "conv_img"
        listed.append((name, [f"main.{place}", *([f"main.{place + 1}"] if norm else [])]))
    return listed


def modulated_convolutions(module: nn.Module, names: list[str]) -> list[str]:
    """The convolutions among the modules ``names``, transposed in a generator; that of the image is one of them."""
    return [name for name in names if isinstance(module.get_submodule(name), (nn.ConvTranspose2d, nn.Conv2d))]


def rename(network: str, state: State) -> State:
    """Published names in ours: those of the usual code as they are, and ``convTr<k>``, ``batchNorm<k>`` of generators.

    ``module.`` of a network saved from several devices is taken off.
    """
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        if network != "discriminator" and (found := re.fullmatch(r"(convTr|batchNorm)(\d+)\.(\w+)", name)):
            name = f"main.{3 * (int(found[2]) - 1) + (found[1] == 'batchNorm')}.{found[3]}"
        renamed[name] = value
    return renamed


def infer(arch: str, networks: Mapping[str, State]) -> DCGANConfig:
    """Sizes from the tensors of a generator (or its average) and of a discriminator, where there is one.

    Without a discriminator ``ndf`` is ``ngf``. Raises SourceError where there is no generator or its shapes belong to
    no DCGAN.
    """
    names = ("generator", "average", "generator_test")
    network = next((name for name in names if name in networks), None)
    if network is None:
        raise SourceError("the checkpoint holds no generator, so the sizes of its networks cannot be told")
    filters = _filters(rename(network, networks[network]))
    if len(filters) < 3:
        raise SourceError(
            f"the generator has {len(filters)} filters named main.<number>.weight or convTr<number>.weight; "
            f"a DCGAN has at least 3: is it really of --arch {arch}?"
        )
    first, last = filters[0], filters[-1]
    ndf = last.shape[0]
    if "discriminator" in networks:
        own = _filters(rename("discriminator", networks["discriminator"]))
        if not own:
            raise SourceError(f"the discriminator has no main.0.weight; is it really of --arch {arch}?")
        ndf = own[0].shape[0]
    size, channels, z_dim, ngf = _FIRST_SIDE << (len(filters) - 1), last.shape[1], first.shape[0], last.shape[0]
    try:
        cfg = DCGANConfig(arch, size, channels, z_dim, ngf, ndf)
    except ValueError as error:
        raise SourceError(f"the generator's shapes do not fit --arch {arch}: {error}") from error
    if tuple(first.shape) != (z_dim, ngf << (cfg.doublings - 1), 4, 4):
        raise SourceError(
            f"the generator's first filter is {list(first.shape)}; with {len(filters)} layers and {ngf} channels at "
            f"the end a DCGAN has {[z_dim, ngf << (cfg.doublings - 1), 4, 4]}: is it really of --arch {arch}?"
        )
    return cfg


def _filters(state: State) -> list[Tensor]:
    found = {int(m[1]): v for n, v in state.items() if (m := re.fullmatch(r"main\.(\d+)\.weight", n)) and v.dim() == 4}
    return [found[place] for place in sorted(found)]


def _normalise(norm: nn.BatchNorm2d, h: Tensor, again: bool) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):
        h = h.to(norm.weight.dtype)
        if not (again and norm.training):
            return norm(h)
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
        return F.batch_norm(h, mean, variance, norm.weight, norm.bias, True, norm.momentum, norm.eps)


def _check_unconditional(y: Tensor | None) -> None:
    if y is not None:
        raise ValueError(f"labels of shape {tuple(y.shape)} were given to a network without classes; y must be None")


ARCHITECTURE = Architecture(
    names=(ARCH,),
    describe=partial(from_json, DCGANConfig),
    generator=Generator,
    discriminator=Discriminator,
    groups=dcgan_groups,
    modulated=modulated_convolutions,
    infer=infer,
    rename=rename,
    loss="nonsat",
)
