"""GP-GAN generators and discriminators (Mescheder, Geiger and Nowozin, ICML 2018), families resnet to resnet4.

Parameter names are those of the published checkpoints. There are no buffers and nothing depends on train or eval mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import ResBlock, downsample, lrelu, register, upsample
from .config import ModelConfig
from .plan import Block, Plan, discriminator_plan, generator_plan, join_stage
from .recompute import run_stage


class Generator(nn.Module):
    """Images in [-1, 1] from latents: ``z [B, z_dim] -> [B, channels, size, size]``.

    The label's embedding (divided by its L2 norm in resnet and resnet2) is joined to ``z``; a floating-point ``y
    [B, embed]`` stands for the embedding itself. No noise is injected: ``noise`` must be None or empty.
    Any order of differentiation. With ``checkpoint_activations`` set, every stage is computed again in the backward.
    """

    noise_shapes: tuple[tuple[int, int], ...] = ()
    checkpoint_activations = False

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg, self.plan, self.z_dim = cfg, generator_plan(cfg), cfg.z_dim
        if cfg.embed:
            self.embedding = nn.Embedding(cfg.nlabels, cfg.embed)
        self.fc = nn.Linear(cfg.z_dim + cfg.embed, self.plan.width * self.plan.side**2)
        for block in (block for stage in self.plan.stages for block in stage):
            register(self, block.name, ResBlock(block.fin, block.fout))
        self.conv_img = image_convolution(self.plan, self.plan.image_width, cfg.channels)

    def forward(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        return torch.tanh(self.pre_tanh(z, y, noise))

    def pre_tanh(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """The image before tanh, ``[B, channels, size, size]``, in the autocast type where one is active."""
        check_noise(noise, self.noise_shapes)
        return self.from_join(self.activations_at_join(z, y, 1), 1)

    def activations_at_join(self, z: Tensor, y: Tensor | None = None, keep: int = 4) -> Tensor:
        """The map that enters the ``keep`` image-side groups (before the upsampling that precedes them)."""
        first = join_stage(self.plan, keep)
        h = self.fc(self._input(z, y)).view(-1, self.plan.width, self.plan.side, self.plan.side)
        return run_stages(self, self.plan, h, 0, first)

    def from_join(self, h: Tensor, keep: int) -> Tensor:
        """What the ``keep`` image-side groups make of a map at their join: the image before tanh."""
        stages = len(self.plan.stages)
        h = run_stages(self, self.plan, h, join_stage(self.plan, keep), stages)
        if self.plan.resample_last:
            h = upsample(h)
        return self.conv_img(lrelu(h))

    def _input(self, z: Tensor, y: Tensor | None) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected [B, {self.z_dim}]")
        if not self.cfg.embed:
            return z
        if y is not None and y.is_floating_point():
            embedded = y
        else:
            embedded = self.embedding(labels(z, y))
        if self.cfg.family in ("resnet", "resnet2"):
            embedded = embedded / embedded.norm(dim=1, keepdim=True)
        return torch.cat([z, embedded.expand(z.shape[0], -1)], 1)


class Discriminator(nn.Module):
    """One logit per image, that of its label: ``x [B, channels, size, size] -> [B]``. Any order of differentiation.

    With ``checkpoint_activations`` set, every stage is computed again in the backward pass.
    """

    checkpoint_activations = False

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg, self.plan = cfg, discriminator_plan(cfg)
        self.conv_img = image_convolution(self.plan, cfg.channels, self.plan.stages[0][0].fin)
        for block in (block for stage in self.plan.stages for block in stage):
            register(self, block.name, ResBlock(block.fin, block.fout))
        self.fc = nn.Linear(self.plan.width * self.plan.side**2, cfg.nlabels)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        expected = (self.cfg.channels, self.cfg.size, self.cfg.size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, {', '.join(map(str, expected))}]")
        h = self.conv_img(x)
        for t in range(len(self.plan.stages)):
            h = run_stage(self, self._stage, h, t)
        # The flattening is row-major over [C, H, W] whatever the memory format.
        logits = self.fc(lrelu(h).reshape(h.shape[0], -1))
        if y is None:
            return logits[:, 0]
        return logits.gather(1, labels(x, y).unsqueeze(1)).squeeze(1)

    def _stage(self, h: Tensor, t: int) -> Tensor:
        if t or self.plan.resample_first:
            h = downsample(h)
        return run_blocks(self, self.plan.stages[t], h)


def build_generator(cfg: ModelConfig) -> nn.Module:
    """The generator that ``cfg`` describes, with random weights (PyTorch's defaults)."""
    if cfg.arch == "adafm":
        from .adafm import AdaFMGenerator

        return AdaFMGenerator(cfg)
    return Generator(cfg)


def build_discriminator(cfg: ModelConfig) -> Discriminator:
    """The discriminator that ``cfg`` describes (of family ``base`` for arch adafm), with random weights."""
    return Discriminator(cfg)


def run_stages(module: nn.Module, plan: Plan, h: Tensor, first: int, end: int) -> Tensor:
    """Stages ``first`` to ``end - 1`` of a generator, each but stage 0 preceded by upsampling.

    Every stage's input is put into the layout of the weights: maps of one pixel forget theirs.
    """
    memory_format = layout(module)

    def stage(h: Tensor, t: int) -> Tensor:
        h = (upsample(h) if t else h).contiguous(memory_format=memory_format)
        return run_blocks(module, plan.stages[t], h)

    for t in range(first, end):
        h = run_stage(module, stage, h, t)
    return h


def run_blocks(module: nn.Module, blocks: Sequence[Block], h: Tensor) -> Tensor:
    """The residual blocks of one stage, one after the other."""
    for block in blocks:
        h = module.get_submodule(block.name)(h)
    return h


def image_convolution(plan: Plan, fin: int, fout: int) -> nn.Conv2d:
    """The convolution at the image's end, which keeps the side."""
    return nn.Conv2d(fin, fout, plan.image_kernel, padding=plan.image_kernel // 2)


def layout(module: nn.Module) -> torch.memory_format:
    """Memory format of a network's weights: its first filter whose strides tell decides."""
    for parameter in module.parameters():
        if parameter.dim() == 4 and parameter.shape[1] > 1 and parameter.shape[2] > 1:
            return torch.contiguous_format if parameter.is_contiguous() else torch.channels_last
    return torch.contiguous_format


def labels(like: Tensor, y: Tensor | None) -> Tensor:
    """``y``, or class 0 for every sample of ``like``."""
    return torch.zeros(like.shape[0], dtype=torch.int64, device=like.device) if y is None else y


def check_noise(noise: Sequence[Tensor] | None, shapes: tuple[tuple[int, int], ...]) -> None:
    """Raise ValueError unless ``noise`` is None or one ``[B, 1, h, w]`` map for each of ``shapes``."""
    if noise is None:
        return
    found = tuple(tuple(n.shape[2:]) for n in noise)
    if found != shapes or any(n.dim() != 4 or n.shape[1] != 1 for n in noise):
        listed = [list(n.shape) for n in noise]
        raise ValueError(f"noise has shapes {listed}; expected maps [B, 1, h, w] with (h, w) = {list(shapes)}")
