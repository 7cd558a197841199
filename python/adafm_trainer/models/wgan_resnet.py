"""The WGAN-GP residual networks of TransferGAN (Wang et al., "Transferring GANs", ECCV 2018; Gulrajani et al., 2017).

Generator: residual blocks with batch norm, each doubling the side. Critic: residual blocks with layer norm, each
halving it; no normalisation over the batch, because the penalty is one of single samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import Architecture, Groups
from .blocks import upsample
from .gpgan import check_noise, labels, layout
from .recompute import run_stage
from .wgan_config import ARCH, WganResNetConfig
from .wgan_names import infer, rename

EPS = 1e-5


class BatchNorm(nn.Module):
    """Normalisation over batch, height and width with the batch's own statistics (biased variance, eps 1e-5).

    ``x [B, C, H, W]`` to the same shape; any order of differentiation. ``weight`` and ``bias`` are ``[C]``, or tables
    ``[classes, C]`` of which each sample takes the row of its label (Dumoulin et al., "A Learned Representation for
    Artistic Style", ICLR 2017). With ``running`` the statistics outside training are averages of momentum 0.1.
    """

    def __init__(self, channels: int, classes: int, running: bool) -> None:
        super().__init__()
        shape = (classes, channels) if classes else (channels,)
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(channels) if running else None)
        self.register_buffer("running_var", torch.ones(channels) if running else None)

    def forward(self, x: Tensor, y: Tensor | None, update: bool) -> Tensor:
        """``update``: let this batch count in the running statistics, in training and where there are any."""
        mean, variance = self.running_mean, self.running_var
        batch = self.training or mean is None
        if batch and mean is not None and not update:
            # Copies take the update: a second run must save for backward as many tensors as the first.
            mean, variance = mean.clone(), variance.clone()
        if self.weight.dim() == 1:
            return F.batch_norm(x, mean, variance, self.weight, self.bias, batch, eps=EPS)
        n = F.batch_norm(x, mean, variance, None, None, batch, eps=EPS)
        scale, offset = (F.embedding(y, table).to(n.dtype)[:, :, None, None] for table in (self.weight, self.bias))
        return torch.addcmul(offset, scale, n)


class UpBlock(nn.Module):
    """``shortcut + conv2(relu(bn2(conv1(up(relu(bn1(x)))))))``: ``[B, fin, H, W] -> [B, fout, 2H, 2W]``.

    The shortcut is a 1x1 convolution of the doubled map. It is taken before the doubling, which gives the same values.
    """

    def __init__(self, fin: int, fout: int, norm: Callable[[int], BatchNorm]) -> None:
        super().__init__()
        self.bn1, self.bn2 = norm(fin), norm(fout)
        self.conv1 = nn.Conv2d(fin, fout, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(fout, fout, 3, padding=1)
        self.shortcut = nn.Conv2d(fin, fout, 1)

    def forward(self, x: Tensor, y: Tensor | None, update: bool) -> Tensor:
        h = self.conv1(upsample(F.relu(self.bn1(x, y, update))))
        return upsample(self.shortcut(x)) + self.conv2(F.relu(self.bn2(h, y, update)))


class DownBlock(nn.Module):
    """``shortcut + pool(conv2(relu(bn2(conv1(relu(bn1(x)))))))``: ``[B, fin, H, W] -> [B, fout, H/2, W/2]``.

    ``bn`` (the published name) is a layer norm: mean and biased variance of each sample over ``[C, H, W]``, then a
    scale and an offset for each channel (a group norm of one group). The shortcut is a 1x1 convolution of the pooled
    map; pooling is the 2x2 mean.
    """

    def __init__(self, fin: int, fout: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.GroupNorm(1, fin, eps=EPS), nn.GroupNorm(1, fin, eps=EPS)
        self.conv1 = nn.Conv2d(fin, fin, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(fin, fout, 3, padding=1)
        self.shortcut = nn.Conv2d(fin, fout, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.shortcut(F.avg_pool2d(x, 2)) + F.avg_pool2d(h, 2)


class Generator(nn.Module):
    """Images in [-1, 1] from latents: ``z [B, z_dim] -> [B, channels, size, size]``, labels ``y [B]`` (None: class 0).

    Any order of differentiation. An image depends on the whole batch, except outside training with
    ``statistics="running"``. ``noise`` must be None or empty. With ``checkpoint_activations`` set, every block is
    computed again in the backward pass; the running statistics count a batch once all the same.
    """

    noise_shapes: tuple[tuple[int, int], ...] = ()
    checkpoint_activations = False

    def __init__(self, cfg: WganResNetConfig) -> None:
        super().__init__()
        self.cfg, self.z_dim = cfg, cfg.z_dim
        self.batch_statistics = cfg.statistics == "batch"

        def norm(channels: int) -> BatchNorm:
            return BatchNorm(channels, cfg.tables, cfg.statistics == "running")

        widths = cfg.widths
        self.input = nn.Linear(cfg.z_dim + cfg.appended, widths[0] * 16)
        for i, (fin, fout) in enumerate(zip(widths, widths[1:], strict=False), 1):
            self.add_module(f"res{i}", UpBlock(fin, fout, norm))
        self.output_norm = norm(cfg.dim)
        self.output = nn.Conv2d(cfg.dim, cfg.channels, 3, padding=1)
        initialise(self)

    def forward(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        return torch.tanh(self.pre_tanh(z, y, noise))

    def pre_tanh(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """The image before tanh, ``[B, channels, size, size]``, in the autocast type where one is active."""
        check_noise(noise, self.noise_shapes)
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected [B, {self.z_dim}]")
        if self.cfg.classes:
            y = labels(z, y)
        if self.cfg.appended:
            z = torch.cat([z, F.one_hot(y, self.cfg.classes).to(z.dtype)], 1)
        h = self.input(z).view(-1, self.cfg.widths[0], 4, 4).contiguous(memory_format=layout(self))
        for i in range(self.cfg.blocks):
            h = run_stage(self, _once(self.get_submodule(f"res{i + 1}"), self.training), h, y)
        return self.output(F.relu(self.output_norm(h, y, self.training)))


class Discriminator(nn.Module):
    """The critic's score of each image, whatever its label: ``x [B, channels, size, size] -> [B]``.

    Any order of differentiation. With ``checkpoint_activations`` set, every block is computed again in the backward.
    """

    checkpoint_activations = False

    def __init__(self, cfg: WganResNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        widths = cfg.widths[::-1]
        self.input = nn.Conv2d(cfg.channels, cfg.dim, 3, padding=1)
        for i, (fin, fout) in enumerate(zip(widths, widths[1:], strict=False), 1):
            self.add_module(f"res{i}", DownBlock(fin, fout))
        self.output = nn.Linear(widths[-1] * 16, 1)
        if cfg.classes:
            self.classifier = nn.Linear(widths[-1] * 16, cfg.classes)
        initialise(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.output(self._features(x))[:, 0]

    def _features(self, x: Tensor) -> Tensor:
        expected = (self.cfg.channels, self.cfg.size, self.cfg.size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, {', '.join(map(str, expected))}]")
        h = self.input(x)
        for i in range(self.cfg.blocks):
            h = run_stage(self, self.get_submodule(f"res{i + 1}"), h)
        # Row-major over [C, H, W] whatever the memory format.
        return h.reshape(h.shape[0], -1)


class ClassifyingDiscriminator(Discriminator):
    """A critic with an auxiliary classifier on the features that it scores (Odena et al., ICML 2017)."""

    def judge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[B]`` and class logits ``[B, classes]``."""
        features = self._features(x)
        return self.output(features)[:, 0], self.classifier(features)


def build_discriminator(cfg: WganResNetConfig) -> Discriminator:
    """The critic that ``cfg`` describes, with random weights."""
    return ClassifyingDiscriminator(cfg) if cfg.classes else Discriminator(cfg)


def groups(module: nn.Module, cfg: WganResNetConfig) -> Groups:
    """Groups of a network, image side first: its image convolution, each residual block, its linear layers."""
    blocks = [(f"res{i}", [f"res{i}"]) for i in range(1, cfg.blocks + 1)]
    if isinstance(module, Discriminator):
        last = ["output", "classifier"] if cfg.classes else ["output"]
        found = [("input", ["input"]), *blocks, ("output", last)]
    else:
        found = [("output", ["output", "output_norm"]), *reversed(blocks), ("input", ["input"])]
    return found


def modulated(module: nn.Module, names: list[str]) -> list[str]:
    """The 3x3 convolutions of those of the modules ``names`` that are residual blocks."""
    blocks = [name for name in names if isinstance(module.get_submodule(name), (UpBlock, DownBlock))]
    return [f"{name}.{leaf}" for name in blocks for leaf in ("conv1", "conv2")]


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Random weights as published: uniform with variance ``4 / (fan_in + fan_out)`` in 3x3 convolutions that follow a
    ReLU, half of it in all others and in linear layers; biases 0. The norms keep scale 1 and offset 0."""
    for name, layer in module.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        rows, columns, *kernel = layer.weight.shape
        after_relu = bool(kernel) and kernel[0] == 3 and name != "input"
        variance = (4 if after_relu else 2) / ((rows + columns) * kernel[0] ** 2 if kernel else rows + columns)
        layer.weight.uniform_(-((3 * variance) ** 0.5), (3 * variance) ** 0.5)
        if layer.bias is not None:
            layer.bias.zero_()


def _once(block: nn.Module, training: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    """``block`` whose norms count the batch in its first run only: a checkpointed block runs again in the backward."""
    first = [training]

    def run(h: Tensor, y: Tensor | None) -> Tensor:
        return block(h, y, first.pop() if first else False)

    return run


ARCHITECTURE = Architecture(
    names=(ARCH,),
    describe=WganResNetConfig.from_json,
    generator=Generator,
    discriminator=build_discriminator,
    groups=groups,
    modulated=modulated,
    infer=infer,
    rename=rename,
    loss="wgan-gp",
)
