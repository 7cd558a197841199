"""The AdaFM target generator (Zhao, Cong and Carin, ICML 2020): a new small head on a source's modulated image side.

Generic over the source's family, the number of groups kept, image side, width, latent and style size and first side.
The published model is base resnet2, size 128, keep 4, s0 4, style_dim 256.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adafm_kernels.nn import AdaFMConv2d

from ..keyed import normal
from .blocks import ResBlock, lrelu, register, upsample
from .config import ModelConfig
from .gpgan import Generator, check_noise, image_convolution, layout, run_stages
from .head import SmallH, StyleBlock, StyleNetwork
from .plan import generator_plan, join_shape, join_stage
from .recompute import run_stage

_CALIBRATION_LATENTS = 256


class AdaFMGenerator(nn.Module):
    """Images in [-1, 1] from latents: ``z [B, z_dim] -> [B, channels, size, size]``.

    Modules of the head are named ``small_*``; the kept blocks carry the source's names and hold ``AdaFMConv2d`` as
    ``conv_0`` and ``conv_1``. Labels have no effect; ``small_embedding`` exists (with ``embed`` > 0) for the names of
    the published model only. ``noise`` holds one map ``[B, 1, h, w]`` for each of ``noise_shapes`` in order of use;
    None draws them from PyTorch's global generator, in evaluation too.

    Under autocast ``small_H`` and the residual stream behind it (``conv_s``, ``conv_img``) stay in the parameters'
    dtype; the other convolutions run in autocast's type. AdaIN and small_H have the reference's gradient rules.
    With ``checkpoint_activations`` set, the head's blocks and every stage are computed again in the backward pass.
    """

    checkpoint_activations = False

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        if cfg.arch != "adafm":
            raise ValueError(f"arch is {cfg.arch!r}; AdaFMGenerator needs arch adafm")
        self.cfg, self.plan, self.z_dim = cfg, generator_plan(cfg), cfg.z_dim
        self.first = join_stage(self.plan, cfg.keep)
        self.join_width, self.join_side = join_shape(self.plan, cfg.keep)
        self.s0 = head_side(cfg.s0, self.join_side)
        levels = int(math.log2(self.join_side // self.s0))
        self.noise_shapes = tuple((side, side) for k in range(levels) for side in [self.s0 * 2 ** (k + 1)] * 2)

        if cfg.embed:
            self.small_embedding = nn.Embedding(cfg.nlabels, cfg.embed)
        self.small_style = StyleNetwork(cfg.z_dim, cfg.style_dim)
        self.small_fc = nn.Linear(cfg.z_dim, self.join_width * self.s0**2)
        self.style_blocks = tuple(f"small_net_{k + 2}" for k in range(levels))
        for name in self.style_blocks:
            self.add_module(name, StyleBlock(self.join_width, cfg.style_dim))
        self.small_H = SmallH(self.join_width, self.join_side, calibrated=cfg.small_h == "calibrated")
        for block in (block for stage in self.plan.stages[self.first :] for block in stage):
            register(self, block.name, ResBlock(block.fin, block.fout, conv=AdaFMConv2d, wide_stream=True))
        self.conv_img = image_convolution(self.plan, self.plan.image_width, cfg.channels)

    def forward(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        return torch.tanh(self.pre_tanh(z, y, noise))

    def pre_tanh(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """The image before tanh, ``[B, channels, size, size]``, in the parameters' dtype."""
        h = run_stages(self, self.plan, self.head(z, noise), self.first, len(self.plan.stages))
        if self.plan.resample_last:
            h = upsample(h)
        with torch.autocast(h.device.type, enabled=False):
            return self.conv_img(lrelu(h))

    def head(self, z: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Output of the new head, ``[B, join_width, join_side, join_side]`` in the parameters' dtype."""
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected [B, {self.z_dim}]")
        if noise is None:
            noise = [torch.randn(z.shape[0], 1, *shape, device=z.device, dtype=z.dtype) for shape in self.noise_shapes]
        check_noise(noise, self.noise_shapes)
        style = self.style(z)
        h = self.small_fc(z).view(-1, self.join_width, self.s0, self.s0)
        h = h.contiguous(memory_format=layout(self))
        for k, name in enumerate(self.style_blocks):
            h = run_stage(self, self.get_submodule(name), h, style, (noise[2 * k], noise[2 * k + 1]))
        return self.small_H(h)

    def style(self, z: Tensor) -> Tensor:
        """Style vector ``[B, style_dim]``."""
        return self.small_style(z)


def head_side(s0: int | None, join_side: int) -> int:
    """First side of a head that ends at ``join_side``; None is 4, or half the join's side where that is smaller."""
    admissible = [side for side in range(1, join_side) if join_side % side == 0 and _power_of_two(join_side // side)]
    if s0 is None:
        s0 = max([side for side in admissible if side <= 4], default=0)
    if s0 not in admissible:
        if not admissible:
            raise ValueError(f"a join at side {join_side} leaves no room for a head of smaller maps; keep fewer groups")
        sides = ", ".join(map(str, admissible))
        raise ValueError(f"s0 is {s0}; for a join at side {join_side} it must be one of {sides}")
    return s0


def head_modules(generator: AdaFMGenerator) -> list[str]:
    """Names of the modules that make up the new head."""
    return [name for name, _ in generator.named_children() if name.startswith("small_")]


@torch.no_grad()
def calibrate(generator: AdaFMGenerator, source: Generator, z: Tensor, y: Tensor | None = None) -> None:
    """Give small_H the source's scale at the join: spatial deviation and mean of each channel, over ``z [B, z_dim]``.

    Afterwards every map of the head's output has the mean, and the root-mean-square spatial deviation, that the
    source's own maps of that channel have. Sets ``small_H.weight`` and ``small_H.beta`` in place.

    Raises:
        ValueError: the model's small_h is not calibrated, or the source's join has another shape.
    """
    if not generator.small_H.calibrated:
        raise ValueError("this generator's small_h is 'reference'; build it with small_h='calibrated' to calibrate it")
    h = _source_join(generator, source, z, y)
    variance, mean = torch.var_mean(h.float(), (2, 3), correction=0, keepdim=True)
    generator.small_H.weight.copy_(variance.mean(0, keepdim=True).sqrt())
    generator.small_H.beta.copy_(mean.mean(0, keepdim=True))


def distil_head(
    generator: AdaFMGenerator,
    source: Generator,
    steps: int = 300,
    batch: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    autocast: torch.dtype | None = None,
) -> float:
    """Fit the new head to the source's own activations at the join, for the same latents, by mean squared error.

    small_H is calibrated first. Adam with the step size falling from ``lr`` to 0 along a cosine; latents and injected
    noise are keyed by ``seed`` and step. Only the head's parameters change; every ``requires_grad`` flag is left as it
    was found.

    Args:
        progress: called after each step with (steps done, steps, relative error).
        autocast: compute type inside the networks; None computes in the parameters' own.

    Returns:
        Relative error of the last step's batch: root of the squared error over the source's variance per channel.

    Raises:
        ValueError: latent sizes or the shapes at the join differ, small_h is not calibrated, or steps < 1.
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"steps is {steps} and batch {batch}; both must be at least 1")
    if generator.z_dim != source.z_dim:
        raise ValueError(f"the head takes latents of {generator.z_dim}, the source of {source.z_dim}; make them equal")
    fitted = [p for name in head_modules(generator) for p in generator.get_submodule(name).parameters()]
    flags = [p.requires_grad for p in fitted]
    device = fitted[0].device
    latents = normal(seed, "distil-calibrate", 0, range(_CALIBRATION_LATENTS), (generator.z_dim,)).to(device)
    calibrate(generator, source, latents)
    for parameter in fitted:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(fitted, lr=lr, betas=(0.9, 0.99))
    error = math.inf
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            indices = range(batch)
            z = normal(seed, "distil", step, indices, (generator.z_dim,)).to(device)
            shapes = enumerate(generator.noise_shapes)
            noise = [normal(seed, f"distil-noise-{k}", step, indices, (1, *shape)).to(device) for k, shape in shapes]
            with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                with torch.no_grad():
                    target = _source_join(generator, source, z, None)
                output = generator.head(z, noise)
            target = target.float()
            loss = F.mse_loss(output.float(), target)
            optimizer.zero_grad(set_to_none=True)
            gradients = torch.autograd.grad(loss, fitted, allow_unused=True)
            for parameter, gradient in zip(fitted, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            spread = target.var((0, 2, 3), correction=0).mean()
            error = float((loss.detach() / spread.clamp_min(1e-30)).sqrt())
            if progress is not None:
                progress(step + 1, steps, error)
    finally:
        for parameter, flag in zip(fitted, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
    return error


def _source_join(generator: AdaFMGenerator, source: Generator, z: Tensor, y: Tensor | None) -> Tensor:
    h = source.activations_at_join(z, y, generator.cfg.keep)
    expected = (generator.join_width, generator.join_side, generator.join_side)
    if tuple(h.shape[1:]) != expected:
        raise ValueError(f"the source's map at the join is {list(h.shape[1:])}; this head makes {list(expected)}")
    return h


def _power_of_two(n: int) -> bool:
    return n > 1 and n & (n - 1) == 0
