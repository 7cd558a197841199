"""One training iteration of the GAN: generator step, weight average, discriminator step.

The order is that of Zhao, Cong and Carin (ICML 2020, released code): the generator is updated first, and the
discriminator then sees the images that were made *before* that update, so an iteration costs one generator forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.convolution import ExplicitDoubleBackward
from .losses import fake_loss, generator_loss, gradient_penalty, real_loss, saturation_penalty
from .player import Player

Loss = Callable[[Tensor], Tensor]

REG_TYPES = ("real", "fake", "real_fake")


@dataclass(frozen=True)
class StepConfig:
    """Loss and precision of one iteration.

    ``reg_param`` multiplies the mean penalty (no factor one half); with ``reg_interval`` k the penalty is taken in
    every k-th discriminator step with k times the weight, which keeps its mean strength.
    ``saturation_weight`` and ``saturation_limit`` belong to ``losses.saturation_penalty``; 0 switches it off.
    ``autocast`` is the compute type inside the networks, None for the parameters' own; ``reg_autocast`` the same for
    the pass that the penalty differentiates twice. ``micro_batch`` is the most samples that pass a network at once,
    None for all of them; the gradients are those of the whole batch. ``explicit`` takes the convolutions of the pass
    that the penalty differentiates twice from ``models.convolution``.
    """

    loss: str = "r1"
    reg_type: str = "real"
    reg_param: float = 10.0
    reg_interval: int = 1
    saturation_weight: float = 0.0
    saturation_limit: float = 2.5
    autocast: torch.dtype | None = None
    reg_autocast: torch.dtype | None = None
    micro_batch: int | None = None
    explicit: bool = True

    def __post_init__(self) -> None:
        if self.loss != "r1":
            raise ValueError(f"loss is {self.loss!r}; the only loss so far is 'r1' (non-saturating with R1 penalty)")
        if self.reg_type not in REG_TYPES:
            raise ValueError(f"reg_type is {self.reg_type!r}; expected one of {', '.join(REG_TYPES)}")
        if self.reg_interval < 1:
            raise ValueError(
                f"reg_interval is {self.reg_interval}; it counts discriminator steps and must be at least 1"
            )
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}; it counts samples and must be at least 1")


@dataclass(frozen=True)
class GeneratorResult:
    """``loss`` (adversarial part only), ``images`` detached and made before the update, ``finite``: step was taken.

    Everything is a tensor on the device, ``finite`` a bool.
    """

    loss: Tensor
    images: Tensor
    finite: Tensor


@dataclass(frozen=True)
class DiscriminatorResult:
    """Losses are batch means; ``reg_*`` weighted penalties and ``r1_*`` unweighted ones per sample, or None."""

    loss_real: Tensor
    loss_fake: Tensor
    reg_real: Tensor | None
    reg_fake: Tensor | None
    r1_real: Tensor | None
    r1_fake: Tensor | None
    d_real: Tensor
    d_fake: Tensor
    finite: Tensor


@dataclass(frozen=True)
class _Judged:
    """What D said to images: mean loss, mean weighted penalty, penalties per sample, logits."""

    loss: Tensor
    reg: Tensor | None
    r1: Tensor | None
    logits: Tensor


class GanStep:
    """The step of one generator and discriminator; holds no data, draws no random numbers, waits for no device.

    The discriminator is at rest while the generator's step runs: gradients pass through it and it gets none. A step
    whose gradients are not finite is not taken and reported as ``finite`` False.
    """

    def __init__(self, generator: Player, discriminator: Player, config: StepConfig) -> None:
        self.G, self.D, self.config = generator, discriminator, config
        self.d_steps = 0

    def generator(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> GeneratorResult:
        """Update G on latents ``z [B, z_dim]``; the gradients stay in ``.grad`` until the next call."""
        config, g, d = self.config, self.G, self.D
        losses, images = [], []
        with d.at_rest():
            g.begin()
            with self._autocast(z, config.autocast):
                for part, share in self._parts(z):
                    labels = None if y is None else y[part]
                    maps = None if noise is None else [n[part] for n in noise]
                    pre_tanh = g.network.pre_tanh(z[part], labels, maps)
                    made = torch.tanh(pre_tanh)
                    logits = d.network(made, labels)
                    with self._autocast(z, None):
                        loss = share * generator_loss(logits)
                        total = loss
                        if config.saturation_weight:
                            penalty = saturation_penalty(pre_tanh, config.saturation_limit)
                            total = loss + share * config.saturation_weight * penalty
                        g.backward(total)
                    losses.append(loss.detach())
                    images.append(made.detach())
            finite = g.step()
        return GeneratorResult(_total(losses), _joined(images), finite)

    def discriminator(self, x_real: Tensor, images: Tensor, y: Tensor | None = None) -> DiscriminatorResult:
        """Update D on ``x_real`` and ``images`` (both ``[B, C, H, W]``): the loss on the real ones and its penalty in
        one backward, that on the others in a second one, when the first one's memory is free."""
        config, regularised = self.config, self.d_steps % self.config.reg_interval == 0
        self.D.begin()
        # One context for both: autocast casts every weight once.
        with self._autocast(x_real, config.autocast):
            real = self._judge(x_real, y, real_loss, regularised and config.reg_type != "fake")
            fake = self._judge(images, y, fake_loss, regularised and config.reg_type != "real")
        finite = self.D.step()
        self.d_steps += 1
        return DiscriminatorResult(
            real.loss, fake.loss, real.reg, fake.reg, real.r1, fake.r1, real.logits, fake.logits, finite
        )

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

    def _judge(self, images: Tensor, y: Tensor | None, loss_of: Loss, penalised: bool) -> _Judged:
        """The gradients that D gets from images, added to those it has."""
        config, weight = self.config, self.config.reg_param * self.config.reg_interval
        losses, regs, r1s, said = [], [], [], []
        for part, share in self._parts(images):
            x = images[part].detach().requires_grad_(penalised)
            convolutions = ExplicitDoubleBackward() if penalised and config.explicit else nullcontext()
            with self._autocast(x, config.reg_autocast if penalised else config.autocast), convolutions:
                logits = self.D.network(x, None if y is None else y[part])
            with self._autocast(x, None):
                total = share * loss_of(logits)
                losses.append(total.detach())
                said.append(logits.detach())
                if penalised:
                    r1 = gradient_penalty(logits, x)
                    reg = share * weight * r1.mean()
                    total = total + reg
                    regs.append(reg.detach())
                    r1s.append(r1.detach())
                self.D.backward(total)
        penalties = (_total(regs), _joined(r1s)) if penalised else (None, None)
        return _Judged(_total(losses), *penalties, _joined(said))

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
