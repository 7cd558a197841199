"""BigGAN generators and discriminators (Brock, Donahue and Simonyan, ICLR 2019) of 32 to 256 pixels.

Names of parameters and buffers are those of the published PyTorch code, so its state dictionaries load as they are.
In train mode every forward moves the vectors of the spectral norms and the stored statistics of the batch norms, also
without gradients; in eval mode nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import Architecture, Groups
from .biggan_config import BOTTOM, BigGANConfig
from .biggan_layers import BatchNorm, DiscriminatorBlock, GeneratorBlock, SelfAttention, run_modules
from .biggan_source import infer, rename
from .gpgan import check_noise, labels, layout
from .spectral import SpectralConv2d, SpectralEmbedding, SpectralLinear, modulate_spectral


class BigGANGenerator(nn.Module):
    """Images in [-1, 1] from latents: ``z [B, z_dim] -> [B, channels, size, size]``. Any order of differentiation.

    ``y`` are labels ``[B]`` (None is class 0 for every sample), or, with a shared embedding, floating-point class
    embeddings ``[B, shared_dim]`` in its place. No noise is injected: ``noise`` must be None or empty.
    With ``checkpoint_activations`` set, every block is computed again in the backward; buffers advance once.

    Raises:
        ValueError: from ``forward``, a wrong shape of ``z`` or ``y``, or a label outside the classes. Values of labels
            are looked at on a CPU only; elsewhere that would wait for the device.
    """

    noise_shapes: tuple[tuple[int, int], ...] = ()
    checkpoint_activations = False

    def __init__(self, cfg: BigGANConfig) -> None:
        super().__init__()
        self.cfg, self.z_dim, norm = cfg, cfg.z_dim, cfg.norm
        if cfg.shared_dim:
            self.shared = nn.Embedding(cfg.classes, cfg.shared_dim)
        self.linear = SpectralLinear(cfg.chunk, cfg.first_width * BOTTOM**2, norm=norm)
        self.blocks = nn.ModuleList()
        for plan in cfg.generator_blocks():
            modules = [GeneratorBlock(plan, cfg.condition_dim, cfg.classes, norm, cfg.bn_eps)]
            if plan.side in cfg.g_attention:
                modules.append(SelfAttention(plan.fout, norm))
            self.blocks.append(nn.ModuleList(modules))
        image = SpectralConv2d(plan.fout, cfg.channels, 3, padding=1, norm=norm)
        self.output_layer = nn.Sequential(BatchNorm(plan.fout, cfg.bn_eps), nn.ReLU(), image)
        initialize(self, cfg.init)

    def forward(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        return torch.tanh(self.pre_tanh(z, y, noise))

    def pre_tanh(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """The image before tanh, ``[B, channels, size, size]``, in the autocast type where one is active."""
        check_noise(noise, self.noise_shapes)
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected [B, {self.z_dim}]")
        condition = self._condition(z, y)
        first, *chunks = z.split(self.cfg.chunk, 1)
        conditions = [torch.cat([condition, c], 1) for c in chunks] or [condition] * len(self.blocks)
        h = self.linear(first).view(-1, self.cfg.first_width, BOTTOM, BOTTOM)
        h = h.contiguous(memory_format=layout(self))
        for modules, each in zip(self.blocks, conditions, strict=True):
            h = run_modules(self, modules, h, each)
        return self.output_layer(h)

    def _condition(self, z: Tensor, y: Tensor | None) -> Tensor:
        """What stands for the class: the embedding ``[B, shared_dim]``, or without a shared one the labels."""
        cfg, count = self.cfg, z.shape[0]
        if y is None or not y.is_floating_point():
            y = checked_labels(z, y, cfg.classes)
            return self.shared(y) if cfg.shared_dim else y
        if not cfg.shared_dim:
            raise ValueError("y is floating-point; this BigGAN has no shared class embedding that y could stand for")
        if y.shape != (count, cfg.shared_dim):
            raise ValueError(
                f"y has shape {tuple(y.shape)}; expected class embeddings [{count}, {cfg.shared_dim}], or labels "
                f"[{count}] of an integer type"
            )
        return y


class BigGANDiscriminator(nn.Module):
    """One logit for each image: ``x [B, channels, size, size] -> [B]``. Any order of differentiation.

    With labels ``y [B]`` the logit has the projection of the features on the label's embedding (Miyato and Koyama,
    "cGANs with Projection Discriminator", ICLR 2018); without labels that term is left out, as MineGAN does, and the
    embedding neither gets a gradient nor moves.
    With ``checkpoint_activations`` set, every block is computed again in the backward; buffers advance once.

    Raises:
        ValueError: from ``forward``, a wrong shape of ``x`` or ``y``, or (on a CPU) a label outside the classes.
    """

    checkpoint_activations = False

    def __init__(self, cfg: BigGANConfig) -> None:
        super().__init__()
        self.cfg, norm = cfg, cfg.norm
        self.blocks = nn.ModuleList()
        for i, plan in enumerate(cfg.discriminator_blocks()):
            modules = [DiscriminatorBlock(plan, i == 0, norm)]
            if plan.side in cfg.d_attention:
                modules.append(SelfAttention(plan.fout, norm))
            self.blocks.append(nn.ModuleList(modules))
        self.linear = SpectralLinear(plan.fout, 1, norm=norm)
        self.embed = SpectralEmbedding(cfg.classes, plan.fout, norm=norm)
        initialize(self, cfg.init)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        expected = (self.cfg.channels, self.cfg.size, self.cfg.size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, {', '.join(map(str, expected))}]")
        h = x.contiguous(memory_format=layout(self))
        for modules in self.blocks:
            h = run_modules(self, modules, h)
        features = F.relu(h).sum((2, 3))
        logits = self.linear(features).squeeze(1)
        if y is None:
            return logits
        return logits + (self.embed(checked_labels(x, y, self.cfg.classes)) * features).sum(1)


def checked_labels(like: Tensor, y: Tensor | None, classes: int) -> Tensor:
    """Labels ``[B]`` for the samples of ``like``, class 0 where ``y`` is None.

    Raises:
        ValueError: another shape, a type that is not an integer, or (on a CPU) a value outside the classes.
    """
    y = labels(like, y)
    if y.shape != like.shape[:1] or y.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"y has shape {tuple(y.shape)} and type {y.dtype}; expected labels [{like.shape[0]}] of type int64 or int32"
        )
    if y.device.type == "cpu" and y.numel() and not torch.compiler.is_compiling():
        smallest, largest = int(y.min()), int(y.max())
        if smallest < 0 or largest >= classes:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(f"y has the label {wrong}; the network knows the classes 0 to {classes - 1}")
    return y


@torch.no_grad()
def initialize(network: nn.Module, init: str) -> None:
    """Filters, matrices and tables as ``BigGANConfig.init`` says; biases keep PyTorch's default."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            if init == "ortho":
                nn.init.orthogonal_(module.weight)
            else:
                nn.init.normal_(module.weight, 0.0, 0.02)


def groups(network: nn.Module, cfg: BigGANConfig) -> Groups:
    """Groups for freezing, image side first: the image layer (G only), each block with its attention, the rest."""
    count = len(network.blocks)
    if isinstance(network, BigGANDiscriminator):
        return [*((f"blocks.{i}", [f"blocks.{i}"]) for i in range(count)), ("linear", ["linear", "embed"])]
    last = ["linear", "shared"] if cfg.shared_dim else ["linear"]
    blocks = [(f"blocks.{i}", [f"blocks.{i}"]) for i in reversed(range(count))]
    return [("output_layer", ["output_layer"]), *blocks, ("linear", last)]


def modulated(network: nn.Module, names: list[str]) -> list[str]:
    """Names of the 3x3 convolutions of the blocks in the modules ``names``; ``modulate_spectral`` takes each."""
    found = []
    for name in names:
        for inner, module in network.get_submodule(name).named_modules(prefix=name):
            if isinstance(module, GeneratorBlock | DiscriminatorBlock):
                found += [f"{inner}.conv1", f"{inner}.conv2"]
    return found


ARCHITECTURE = Architecture(
    names=("biggan",),
    describe=BigGANConfig.from_json,
    generator=BigGANGenerator,
    discriminator=BigGANDiscriminator,
    groups=groups,
    modulated=modulated,
    infer=infer,
    rename=rename,
    loss="nonsat",
    label_free=True,
    modulate=modulate_spectral,
)
