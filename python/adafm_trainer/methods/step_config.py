"""What one training iteration is given and gives back: loss and precision, and the results of its two steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import ADVERSARIAL

REG_TYPES = ("real", "fake", "real_fake")


@dataclass(frozen=True)
class StepConfig:
    """Loss and precision of one iteration.

    ``loss`` is nonsat, hinge or wgan-gp. With the first two ``reg_param`` multiplies the mean R1 penalty (no factor
    one half; 0 leaves it out) at the images of ``reg_type``; with wgan-gp ``gp_weight`` multiplies the mean penalty at
    the interpolates. Either is taken in every ``reg_interval``-th discriminator step with as many times its weight,
    which keeps its mean strength. ``class_weight`` multiplies the cross entropy of an auxiliary classifier, in both
    networks' losses.
    ``saturation_weight`` and ``saturation_limit`` belong to ``losses.saturation_penalty``; 0 switches it off.
    ``autocast`` is the compute type inside the networks, None for the parameters' own; ``reg_autocast`` the same for
    the pass that the penalty differentiates twice. ``micro_batch`` is the most samples that pass a network at once,
    None for all of them; the gradients are those of the whole batch. ``explicit`` takes the convolutions of the pass
    that the penalty differentiates twice from ``models.convolution``.
    """

    loss: str = "nonsat"
    reg_type: str = "real"
    reg_param: float = 10.0
    reg_interval: int = 1
    gp_weight: float = 10.0
    class_weight: float = 1.0
    saturation_weight: float = 0.0
    saturation_limit: float = 2.5
    autocast: torch.dtype | None = None
    reg_autocast: torch.dtype | None = None
    micro_batch: int | None = None
    explicit: bool = True

    def __post_init__(self) -> None:
        if self.loss not in ADVERSARIAL:
            raise ValueError(f"loss is {self.loss!r}; expected one of {', '.join(ADVERSARIAL)}")
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
    """Losses are batch means; ``reg_*`` weighted penalties and ``r1_*`` unweighted ones per sample, or None.

    ``gp`` is the unweighted penalty of WGAN-GP per sample and ``class_real`` the mean cross entropy of an auxiliary
    classifier on real images, or None.
    """

    loss_real: Tensor
    loss_fake: Tensor
    reg_real: Tensor | None
    reg_fake: Tensor | None
    r1_real: Tensor | None
    r1_fake: Tensor | None
    d_real: Tensor
    d_fake: Tensor
    finite: Tensor
    gp: Tensor | None = None
    class_real: Tensor | None = None
