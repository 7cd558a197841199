"""One training iteration of the GAN: a generator step and one or several discriminator steps.

In the order of Zhao, Cong and Carin (ICML 2020, released code) the generator is updated first, and the discriminator
then sees the images that were made *before* that update, so an iteration costs one generator forward. WGAN-GP and
MineGAN update the discriminator first, on images made for it (``fakes``). The loop decides; a step takes what it gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.convolution import ExplicitDoubleBackward
from .augment_base import Augment, Draws
from .losses import (
    ADVERSARIAL,
    class_loss,
    gradient_norm_penalty,
    gradient_penalty,
    interpolate,
    saturation_penalty,
)
from .player import Player
from .step_config import DiscriminatorResult, GeneratorResult, StepConfig


@dataclass(frozen=True)
class _Judged:
    """What D said to images: mean loss, mean weighted penalty, penalties per sample, logits, mean class loss."""

    loss: Tensor
    reg: Tensor | None
    r1: Tensor | None
    logits: Tensor
    classes: Tensor | None


class GanStep:
    """The step of one generator and discriminator; holds no data, draws no random numbers, waits for no device.

    The discriminator is at rest while the generator's step runs: gradients pass through it and it gets none. A step
    whose gradients are not finite is not taken and reported as ``finite`` False.

    Labels ``y [B]`` go to networks that are conditioned on them. A discriminator with ``judge`` has an auxiliary
    classifier, whose loss counts where labels are given. A generator with ``choose`` chooses among several sources by
    what D says of them. ``augment`` is applied to every image that D sees, with the draws that each call is given.
    """

    def __init__(
        self, generator: Player, discriminator: Player, config: StepConfig, augment: Augment | None = None
    ) -> None:
        self.G, self.D, self.config, self.augment = generator, discriminator, config, augment
        self.d_steps = 0
        self._losses = ADVERSARIAL[config.loss]

    def generator(
        self,
        z: Tensor,
        y: Tensor | None = None,
        noise: Sequence[Tensor] | None = None,
        draws: Draws | None = None,
    ) -> GeneratorResult:
        """Update G on latents ``z [B, z_dim]``; the gradients stay in ``.grad`` until the next call."""
        config, g, d = self.config, self.G, self.D
        losses, images = [], []
        with d.at_rest():
            g.begin()
            with self._autocast(z, config.autocast):
                chosen = self._chosen(z, y)
                for part, share in self._parts(z):
                    labels = _of(y, part)
                    pre_tanh, aside = self._pre_tanh(z[part], labels, _taken(noise, part), _of(chosen, part), share)
                    made = torch.tanh(pre_tanh)
                    logits, classes = self._look(self._seen(made, draws, part), labels)
                    with self._autocast(z, None):
                        loss = share * self._losses.generator(logits)
                        total = loss if aside is None else loss + share * aside
                        if classes is not None and config.class_weight:
                            total = total + share * config.class_weight * class_loss(classes, labels)
                        if config.saturation_weight:
                            penalty = saturation_penalty(pre_tanh, config.saturation_limit)
                            total = total + share * config.saturation_weight * penalty
                        g.backward(total)
                    losses.append(loss.detach())
                    images.append(made.detach())
            finite = g.step()
            d.buffers.settle(finite)
        return GeneratorResult(_total(losses), _joined(images), finite)

    @torch.no_grad()
    def fakes(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Images for the discriminator alone, made in the generator's training mode."""
        if self.G.plan is not None:
            self.G.plan.modulate()
        images = []
        with self._autocast(z, self.config.autocast):
            chosen = self._chosen(z, y)
            for part, _ in self._parts(z):
                labels = _of(y, part)
                made, _ = self._pre_tanh(z[part], labels, _taken(noise, part), _of(chosen, part))
                images.append(torch.tanh(made))
        return _joined(images)

    def discriminator(
        self,
        x_real: Tensor,
        images: Tensor,
        y: Tensor | None = None,
        y_fake: Tensor | None = None,
        mix: Tensor | None = None,
        draws: tuple[Draws, Draws] | None = None,
    ) -> DiscriminatorResult:
        """Update D on ``x_real`` and ``images`` (both ``[B, C, H, W]``): the loss on the real ones and its penalty in
        one backward, that on the others in a second one, when the first one's memory is free; with wgan-gp the penalty
        at the interpolates ``x_real + mix (images - x_real)``, ``mix [B]``, in a third one.

        ``y`` and ``y_fake`` are the labels of the two, ``draws`` their augmentations.
        """
        config, regularised = self.config, self.d_steps % self.config.reg_interval == 0
        wasserstein = config.loss == "wgan-gp"
        r1 = regularised and not wasserstein and config.reg_param > 0
        of_real, of_fake = (None, None) if draws is None else draws
        self.D.begin()
        # One context for both: autocast casts every weight once.
        with self._autocast(x_real, config.autocast):
            real = self._judge(x_real, y, True, r1 and config.reg_type != "fake", of_real)
            fake = self._judge(images, y_fake, False, r1 and config.reg_type != "real", of_fake)
            gp = self._interpolated(x_real, images, mix, of_real) if wasserstein and regularised else None
        finite = self.D.step()
        self.d_steps += 1
        return DiscriminatorResult(
            real.loss, fake.loss, real.reg, fake.reg, real.r1, fake.r1, real.logits, fake.logits, finite, gp,
            real.classes,
        )  # fmt: skip

    def state_dict(self) -> dict:
        state = {"d_steps": self.d_steps}
        if self.G.scaler is not None:
            state["scalers"] = [player.scaler.state_dict() for player in (self.G, self.D)]
        return state

    def load_state_dict(self, state: dict) -> None:
        self.d_steps = int(state["d_steps"])
        if self.G.scaler is not None:
            for player, saved in zip((self.G, self.D), state["scalers"], strict=True):
                player.scaler.load_state_dict(saved)

    def _chosen(self, z: Tensor, y: Tensor | None) -> Tensor | None:
        """The source of each sample, of a G that chooses among several by what D says of them."""
        network = self.G.network
        if not hasattr(network, "choose"):
            return None
        return network.choose(z, self.D.network, y, [part for part, _ in self._parts(z)], self.G.exchange)

    def _pre_tanh(
        self,
        z: Tensor,
        y: Tensor | None,
        noise: Sequence[Tensor] | None,
        chosen: Tensor | None,
        share: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        """What G makes before tanh, and its loss beside the adversarial one, if any, of a ``share`` of the samples."""
        network = self.G.network
        if chosen is None:
            return network.pre_tanh(z, y, noise), None
        return network.pre_tanh(z, y, noise, chosen), network.selection_loss(z, chosen, share)

    def _look(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits ``[B]`` of D, and its class logits where it classifies and there are labels."""
        network = self.D.network
        if y is not None and hasattr(network, "judge"):
            return network.judge(x)
        return network(x, y), None

    def _seen(self, images: Tensor, draws: Draws | None, part: slice) -> Tensor:
        return images if self.augment is None or draws is None else self.augment(images, draws[part])

    def _judge(self, images: Tensor, y: Tensor | None, is_real: bool, penalised: bool, draws: Draws | None) -> _Judged:
        """The gradients that D gets from images, added to those it has."""
        config, weight = self.config, self.config.reg_param * self.config.reg_interval
        loss_of = self._losses.real if is_real else self._losses.fake
        losses, regs, r1s, said, classified = [], [], [], [], []
        for part, share in self._parts(images):
            x = images[part].detach().requires_grad_(penalised)
            labels = _of(y, part)
            convolutions = ExplicitDoubleBackward() if penalised and config.explicit else nullcontext()
            with self._autocast(x, config.reg_autocast if penalised else config.autocast), convolutions:
                logits, classes = self._look(self._seen(x, draws, part), labels)
            with self._autocast(x, None):
                total = share * loss_of(logits)
                losses.append(total.detach())
                said.append(logits.detach())
                if is_real and classes is not None and config.class_weight:
                    right = share * class_loss(classes, labels)
                    total = total + config.class_weight * right
                    classified.append(right.detach())
                if penalised:
                    r1 = gradient_penalty(logits, x)
                    reg = share * weight * r1.mean()
                    total = total + reg
                    regs.append(reg.detach())
                    r1s.append(r1.detach())
                self.D.backward(total)
        penalties = (_total(regs), _joined(r1s)) if penalised else (None, None)
        return _Judged(_total(losses), *penalties, _joined(said), _total(classified) if classified else None)

    def _interpolated(self, real: Tensor, fake: Tensor, mix: Tensor | None, draws: Draws | None) -> Tensor:
        """The gradients of the penalty of WGAN-GP, added to those D has; the penalties per sample.

        Squares of the norm's distance from 1 need a second derivative of every layer, which is taken in float32 unless
        the step's own type is asked for.
        """
        if mix is None:
            raise ValueError("mix is None; loss wgan-gp needs one value in [0, 1) for each sample")
        config, found = self.config, []
        weight = config.gp_weight * config.reg_interval
        for part, share in self._parts(real):
            x = interpolate(real[part], fake[part], mix[part])
            convolutions = ExplicitDoubleBackward() if config.explicit else nullcontext()
            with self._autocast(x, config.reg_autocast), convolutions:
                scores, _ = self._look(self._seen(x, draws, part), None)
            with self._autocast(x, None):
                penalty = gradient_norm_penalty(scores, x, scale=getattr(self.D.network, "gradient_scale", 1.0))
                self.D.backward(share * weight * penalty.mean())
            found.append(penalty.detach())
        return _joined(found)

    def _parts(self, batch: Tensor) -> Iterator[tuple[slice, float]]:
        """Slices of at most ``micro_batch`` samples, and their shares of the batch."""
        count = batch.shape[0]
        size = self.config.micro_batch or count
        for start in range(0, count, size):
            end = min(count, start + size)
            yield slice(start, end), (end - start) / count

    @staticmethod
    def _autocast(like: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
        return torch.autocast(like.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]


def _taken(noise: Sequence[Tensor] | None, part: slice) -> list[Tensor] | None:
    return None if noise is None else [n[part] for n in noise]
