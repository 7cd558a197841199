"""The configurations of a training step: ours, the authors' code with and without PyTorch's switches, and the floors.

All start from the same values and run on the same inputs; names of parameters agree wherever a parameter does.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from adafm_kernels.nn import AdaFMConv2d

from ..methods.base import Networks
from ..methods.gan_step import GanStep
from ..methods.losses import gradient_penalty, real_loss
from ..methods.scratch import Scratch
from ..models.convolution import ExplicitDoubleBackward
from ..trainer.assemble import assemble
from ..trainer.graphs import GraphedStep
from ..trainer.precision import has_bf16
from .measure import OURS, SECOND
from .step_authors import AuthorsStep, replace_modulated
from .step_cases import Start, StepCase

REFERENCE = "ours, float32"
PUBLISHED, SWITCHED, COMPILED = "authors, as published", "authors, every switch on", "the same, torch.compile"
LEAF, FULL, GRAPHED = "plain leaf", "full fine-tuning", "ours, CUDA graphs"
# What is measured, ours first; the reference is only compared with.
WAYS = {
    OURS: "the trainer as it is",
    SECOND: "the same once more, in another process: the control",
    PUBLISHED: "float32, contiguous, their order of passes, plain Adam, average of every parameter one by one",
    SWITCHED: "their code with bf16 autocast, channels-last and fused Adam",
    COMPILED: "their code with these and torch.compile wherever nothing is differentiated twice",
    LEAF: "the trainer with the modulated weights as plain trainable parameters in the compute type and layout",
    FULL: "the trainer with no modulation and every parameter of both networks trained",
    GRAPHED: "the trainer with --graphs on: each kind of step captured once and replayed; on a GPU only",
}


class Run(Protocol):
    """One configuration, ready to take the parts of an iteration on its inputs."""

    networks: Networks

    def generator(self) -> Tensor | float:
        """Generator step; its loss. The images are kept for the discriminator's."""

    def average(self) -> None:
        """Move the weight average."""

    def discriminator(self, penalised: bool) -> Tensor | float:
        """Discriminator step; the loss of reals and fakes without the penalty."""

    def real_pass(self) -> None:
        """Loss and penalty of the reals, forward and backward; gradients of D are left in place, no step is taken."""


def fast_type(device: str) -> torch.dtype | None:
    """Autocast's type of everything but the published step: bfloat16 where the device has it, else none."""
    return torch.bfloat16 if has_bf16(torch.device(device)) else None


def build(case: StepCase, way: str, device: str, start: Start) -> Run:
    """The configuration ``way`` of ``case`` on ``device``, in the type of ``start`` where nothing is autocast."""
    networks = start.load(case)
    fast = None if start.z.dtype == torch.float64 else fast_type(device)
    if way in (PUBLISHED, SWITCHED, COMPILED):
        return AuthorsRun(case, networks, device, start, way, fast)
    if way not in (*WAYS, REFERENCE):
        raise ValueError(f"unknown configuration {way!r}; expected one of {', '.join((*WAYS, REFERENCE))}")
    autocast = None if way == REFERENCE else fast
    if way == LEAF:
        for network in (networks.generator, networks.discriminator):
            replace_modulated(network, lambda layer: _leaf(layer, autocast))
    if way == FULL:
        for network in (networks.generator, networks.discriminator):
            replace_modulated(network, AdaFMConv2d.merge)
            network.requires_grad_(True)
    modulated = way in (OURS, SECOND, REFERENCE, GRAPHED)
    return TrainerRun(case, networks, device, start, autocast, modulated, way == REFERENCE, way == GRAPHED)


class TrainerRun:
    """A configuration of the project's own trainer."""

    def __init__(
        self,
        case: StepCase,
        networks: Networks,
        device: str,
        start: Start,
        autocast: torch.dtype | None,
        modulated: bool,
        plain: bool,
        graphed: bool = False,
    ) -> None:
        config = dataclasses.replace(
            case.config,
            device=device,
            precision="fp32" if autocast is None else "bf16",
            layout="contiguous" if plain else "channels-last",
            modulation="autograd" if plain else "plan",
            graphs="on" if graphed else "off",
        )
        # A pair without modulated layers has no groups of gamma and beta.
        method = case.method if modulated else Scratch()
        assembly = assemble(method, networks, config)
        self.networks, self.step, self._average = networks, assembly.step, assembly.average
        self._z, self._noise, self._real = _inputs(start, device, assembly.layout)
        self._images: Tensor | None = None
        self._penalised = self.step.config
        self._unpenalised = dataclasses.replace(self._penalised, reg_interval=2)

    @property
    def eager(self) -> GanStep:
        """The step itself, outside of CUDA graphs."""
        return self.step.eager if isinstance(self.step, GraphedStep) else self.step

    def generator(self) -> Tensor:
        found = self.step.generator(self._z, None, self._noise)
        self._images = found.images
        return found.loss

    def average(self) -> None:
        self._average.update()

    def discriminator(self, penalised: bool) -> Tensor:
        # The penalty is taken when the count of steps is a multiple of its interval, which for some pairs is 1.
        self.eager.config = self._penalised if penalised else self._unpenalised
        self.step.d_steps = 0 if penalised else 1
        found = self.step.discriminator(self._real, self._images)
        return found.loss_real + found.loss_fake

    def real_pass(self) -> None:
        config, player = self._penalised, self.step.D
        player.begin()
        logits, images = self.judge_reals()
        penalty = gradient_penalty(logits, images).mean()
        player.backward(real_loss(logits) + config.reg_param * config.reg_interval * penalty)

    def judge_reals(self) -> tuple[Tensor, Tensor]:
        """Logits of the reals, and the images that they can be differentiated by."""
        images, dtype = self._real.detach().requires_grad_(), self.step.config.reg_autocast
        autocast = torch.autocast(images.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
        with autocast, ExplicitDoubleBackward() if self.step.config.explicit else nullcontext():
            return self.networks.discriminator(images), images


class AuthorsRun:
    """A configuration of the authors' step."""

    def __init__(
        self, case: StepCase, networks: Networks, device: str, start: Start, way: str, fast: torch.dtype | None
    ) -> None:
        layout = torch.contiguous_format if way == PUBLISHED else torch.channels_last
        for network in (networks.generator, networks.discriminator):
            network.to(device=device, memory_format=layout)
        settings = case.config
        self.networks, self.compiled = networks, way == COMPILED
        self.step = AuthorsStep(
            networks.generator,
            networks.discriminator,
            settings.r1_gamma / 2 * settings.r1_interval,
            autocast=None if way == PUBLISHED else fast,
            fused=way != PUBLISHED,
            compiled=self.compiled,
        )
        self._z, self._noise, self._real = _inputs(start, device, layout)
        self._images: Tensor | None = None

    def generator(self) -> float:
        loss, self._images = self.step.generator(self._z, self._noise)
        return loss

    def average(self) -> None:
        self.step.average()

    def discriminator(self, penalised: bool) -> float:
        return self.step.discriminator(self._real, self._images, penalised)

    def real_pass(self) -> None:
        self.step.opt_d.zero_grad()
        self.step.real_pass(self._real)


def _inputs(start: Start, device: str, layout: torch.memory_format) -> tuple[Tensor, list[Tensor], Tensor]:
    real = start.real.to(device, memory_format=layout)
    return start.z.to(device), [noise.to(device) for noise in start.noise], real


def _leaf(layer: AdaFMConv2d, dtype: torch.dtype | None) -> nn.Conv2d:
    """The plain layer whose weight is W', trained, in the type that convolutions compute in."""
    plain = layer.merge()
    weight = plain.weight.detach().to(dtype or plain.weight.dtype, memory_format=torch.channels_last)
    plain.weight = nn.Parameter(weight)
    return plain
