"""What the networks see in a step: a function of the seed, the step and the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import keyed
from ..data.images import ImageSet
from ..data.prepare import prepare
from ..data.sampler import indices as sample_indices
from ..methods.augment_base import Augment, Draws
from ..methods.config import TrainConfig
from .parallel import Parallel
from .sampling import draw_latents, draw_noise


@dataclass(frozen=True)
class Latents:
    """What a generator is given for ``z [B, z_dim]``: labels ``[B]`` and noise maps, or None."""

    z: Tensor
    y: Tensor | None
    noise: tuple[Tensor, ...] | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.z, self.y, *(self.noise or ())) if t is not None)


@dataclass(frozen=True)
class Reals:
    """Training images ``[B, C, H, W]`` and their labels ``[B]`` or None."""

    images: Tensor
    y: Tensor | None


class Inputs:
    """Draws the inputs of every step for the samples that this process has of a batch, on the device.

    ``labels``: those of the training images, or None; ``classes``: of the generator's labels, 0 for none.
    """

    def __init__(
        self,
        config: TrainConfig,
        training: ImageSet,
        labels: Tensor | None,
        generator: torch.nn.Module,
        classes: int,
        augment: Augment | None,
        parallel: Parallel,
        layout: torch.memory_format,
    ) -> None:
        self._config, self._training, self._labels, self._classes = config, training, labels, classes
        self._generator, self._augment = generator, augment
        self._device, self._layout = parallel.device, layout
        self._samples = parallel.samples(config.batch)

    def latents(self, step: int, critic: int | None = None) -> Latents:
        """For the generator's step, or for the images of the ``critic``-th discriminator step."""
        config, stream = self._config, "train" if critic is None else f"train/critic{critic}"
        z = draw_latents(self._generator, config.seed, stream, step, self._samples).to(self._device)
        noise = draw_noise(self._generator, config.seed, stream, step, self._samples)
        if noise is not None:
            noise = tuple(n.to(self._device) for n in noise)
        if not self._classes:
            return Latents(z, None, noise)
        uniform = keyed.uniform(config.seed, f"{stream}/y", step, self._samples)
        y = (uniform.double() * self._classes).long().clamp_(max=self._classes - 1)
        return Latents(z, y.to(self._device), noise)

    def reals(self, step: int, critic: int = 0) -> Reals:
        """For the ``critic``-th discriminator step of ``step``; no image comes twice before all have come once."""
        config, samples = self._config, self._samples
        count = step * config.critic_steps + critic
        rows = sample_indices(config.seed, count * config.batch + samples.start, len(samples), len(self._training))
        images = prepare(
            self._training.batch(rows),
            seed=config.seed,
            step=count,
            sample_indices=samples,
            flip=config.aug == "flip",
            dither=config.dither,
            scale=config.data_scale,
        )
        y = None if self._labels is None else self._labels[rows].to(self._device)
        return Reals(images.to(self._device, memory_format=self._layout), y)

    def mix(self, step: int, critic: int = 0) -> Tensor | None:
        """Uniform numbers ``[B]`` for the interpolates of wgan-gp; None with another loss."""
        if self._config.loss != "wgan-gp":
            return None
        return keyed.uniform(self._config.seed, f"mix/{critic}", step, self._samples).to(self._device)

    def draws(self, step: int, which: str) -> Draws | None:
        """Augmentation of one pass; None without augmentation."""
        if self._augment is None:
            return None
        return self._augment.draw(self._config.seed, step, self._samples, which)
