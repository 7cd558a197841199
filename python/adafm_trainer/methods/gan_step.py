"""One training iteration of the GAN: generator step, weight average, discriminator step.

The order is that of Zhao, Cong and Carin (ICML 2020, released code): the generator is updated first, and the
discriminator then sees the images that were made *before* that update, so an iteration costs one generator forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .average import Average
from .losses import fake_loss, generator_loss, gradient_penalty, real_loss, saturation_penalty

REG_TYPES = ("real", "fake", "real_fake")


@dataclass(frozen=True)
class StepConfig:
    """Loss and precision of one iteration.

    ``reg_param`` multiplies the mean penalty (no factor one half); with ``reg_interval`` k the penalty is taken in
    every k-th discriminator step with k times the weight, which keeps its mean strength.
    ``saturation_weight`` and ``saturation_limit`` belong to ``losses.saturation_penalty``; 0 switches it off.
    ``autocast`` is the compute type inside the networks, None for the parameters' own; ``reg_autocast`` the same for
    the pass that the penalty differentiates twice.
    """

    loss: str = "r1"
    reg_type: str = "real"
    reg_param: float = 10.0
    reg_interval: int = 1
    saturation_weight: float = 0.0
    saturation_limit: float = 2.5
    autocast: torch.dtype | None = None
    reg_autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.loss != "r1":
            raise ValueError(f"loss is {self.loss!r}; the only loss so far is 'r1' (non-saturating with R1 penalty)")
        if self.reg_type not in REG_TYPES:
            raise ValueError(f"reg_type is {self.reg_type!r}; expected one of {', '.join(REG_TYPES)}")
        if self.reg_interval < 1:
            raise ValueError(
                f"reg_interval is {self.reg_interval}; it counts discriminator steps and must be at least 1"
            )


@dataclass(frozen=True)
class GeneratorResult:
    """``loss`` (adversarial part only), ``images`` detached and made before the update, ``finite``: step was taken."""

    loss: Tensor
    images: Tensor
    finite: bool


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
    finite: bool


class GanStep:
    """The step of one generator and discriminator pair; holds no data and draws no random numbers.

    Trainable are the parameters in the optimizers that require a gradient; the discriminator's are switched off while
    the generator's step runs. A step whose gradients are not finite is not taken and reported as ``finite=False``.
    ``scalers`` (fp16) is one gradient scaler for each optimizer, or None.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        opt_g: Optimizer,
        opt_d: Optimizer,
        average: Average | None,
        config: StepConfig,
        scalers: tuple[torch.amp.GradScaler, torch.amp.GradScaler] | None = None,
    ) -> None:
        self.G, self.D, self.average, self.config = generator, discriminator, average, config
        self.opt_g, self.opt_d, self.scalers = opt_g, opt_d, scalers
        self.d_steps = 0

    def generator(self, z: Tensor, y: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> GeneratorResult:
        """Update G on latents ``z [B, z_dim]``; the gradients stay in ``.grad`` until the next call."""
        trained = [p for p in self._parameters(self.opt_d) if p.requires_grad]
        self.opt_g.zero_grad(set_to_none=True)
        for p in trained:
            p.requires_grad_(False)
        try:
            with self._autocast(z, self.config.autocast):
                pre_tanh = self.G.pre_tanh(z, y, noise)
                images = torch.tanh(pre_tanh)
                logits = self.D(images, y)
            loss = generator_loss(logits)
            total = loss
            if self.config.saturation_weight:
                total = loss + self.config.saturation_weight * saturation_penalty(
                    pre_tanh, self.config.saturation_limit
                )
            finite = self._backward_and_step(total, self.opt_g, 0)
        finally:
            for p in trained:
                p.requires_grad_(True)
        return GeneratorResult(loss.detach(), images.detach(), finite)

    def discriminator(self, x_real: Tensor, images: Tensor, y: Tensor | None = None) -> DiscriminatorResult:
        """Update D on ``x_real`` and ``images`` (both ``[B, C, H, W]``): losses and penalty in a single backward."""
        config, regularised = self.config, self.d_steps % self.config.reg_interval == 0
        self.opt_d.zero_grad(set_to_none=True)
        d_real, r1_real = self._judge(x_real, y, regularised and config.reg_type != "fake")
        d_fake, r1_fake = self._judge(images, y, regularised and config.reg_type != "real")
        loss_real, loss_fake = real_loss(d_real), fake_loss(d_fake)
        weight = config.reg_param * config.reg_interval
        reg_real = None if r1_real is None else weight * r1_real.mean()
        reg_fake = None if r1_fake is None else weight * r1_fake.mean()
        total = loss_real + loss_fake
        for penalty in (reg_real, reg_fake):
            if penalty is not None:
                total = total + penalty
        finite = self._backward_and_step(total, self.opt_d, 1)
        self.d_steps += 1
        detached = [None if t is None else t.detach() for t in (reg_real, reg_fake, r1_real, r1_fake)]
        return DiscriminatorResult(
            loss_real.detach(), loss_fake.detach(), *detached, d_real.detach(), d_fake.detach(), finite
        )

    def state_dict(self) -> dict:
        state = {"d_steps": self.d_steps}
        if self.scalers is not None:
            state["scalers"] = [scaler.state_dict() for scaler in self.scalers]
        return state

    def load_state_dict(self, state: dict) -> None:
        self.d_steps = int(state["d_steps"])
        if self.scalers is not None:
            for scaler, saved in zip(self.scalers, state["scalers"], strict=True):
                scaler.load_state_dict(saved)

    def _judge(self, images: Tensor, y: Tensor | None, penalised: bool) -> tuple[Tensor, Tensor | None]:
        images = images.detach().requires_grad_(penalised)
        with self._autocast(images, self.config.reg_autocast if penalised else self.config.autocast):
            logits = self.D(images, y)
        return logits, gradient_penalty(logits, images) if penalised else None

    def _backward_and_step(self, total: Tensor, optimizer: Optimizer, which: int) -> bool:
        scaler = None if self.scalers is None else self.scalers[which]
        (total if scaler is None else scaler.scale(total)).backward()
        gradients = [p.grad for p in self._parameters(optimizer) if p.grad is not None]
        if scaler is not None:
            scaler.unscale_(optimizer)
        finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite()) if gradients else True
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif finite:
            optimizer.step()
        return finite

    @staticmethod
    def _parameters(optimizer: Optimizer) -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    @staticmethod
    def _autocast(like: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
        return torch.autocast(like.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
