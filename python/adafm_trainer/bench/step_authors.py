"""The training step of the released AdaFM code, re-stated (Zhao, Cong and Carin, ICML 2020).

What differs from ours: gamma and beta are repeated to the filter's size in every forward; the real loss, the penalty
and the fake loss are three backward passes, the first of which keeps its graph; Adam is the plain one and holds every
parameter, frozen ones too; the average runs over every parameter, frozen ones too, one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adafm_kernels.nn import AdaFMConv2d

from .baselines import authors

LEARNING_RATE, BETAS, EPS, DECAY = 1e-4, (0.0, 0.99), 1e-8, 0.999


class AuthorsConv2d(nn.Conv2d):
    """Convolution with the weight ``gamma * weight + beta``, both repeated; names and shapes as in AdaFMConv2d."""

    @classmethod
    def of(cls, layer: AdaFMConv2d) -> AuthorsConv2d:
        """The same layer in this form; it shares the parameters."""
        made = cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, device="meta"
        )  # fmt: skip
        made.weight, made.bias, made.gamma, made.beta = layer.weight, layer.bias, layer.gamma, layer.beta
        return made

    def modulated(self) -> Tensor:
        return authors(self.weight, self.gamma, self.beta)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.modulated(), self.bias)


def replace_modulated(network: nn.Module, make: Callable[[AdaFMConv2d], nn.Module]) -> None:
    """Put ``make(layer)`` in the place of every AdaFM layer of ``network``."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, AdaFMConv2d):
            network.set_submodule(name, make(layer))


class AuthorsStep:
    """Generator step, average and discriminator step of the released code on one pair with fixed sizes.

    Parameters that require a gradient when this is made are trained. ``autocast`` (None: as published), ``fused`` and
    ``compiled`` are switches of PyTorch that leave the code as it is. ``compiled`` leaves out the pass that the penalty
    differentiates twice, which torch.compile cannot do.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        reg_param: float,
        *,
        autocast: torch.dtype | None = None,
        fused: bool = False,
        compiled: bool = False,
    ) -> None:
        self.G, self.D, self.reg_param, self.autocast = generator, discriminator, reg_param, autocast
        for network in (generator, discriminator):
            replace_modulated(network, AuthorsConv2d.of)
        self._trained = {network: [p for p in network.parameters() if p.requires_grad] for network in (self.G, self.D)}
        options = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "fused": fused or None}
        self.opt_g = torch.optim.Adam(self.G.parameters(), **options)
        self.opt_d = torch.optim.Adam(self.D.parameters(), **options)
        self.averaged = copy.deepcopy(generator).eval()
        self._pre_tanh, self._judge = generator.pre_tanh, discriminator
        if compiled:
            self._pre_tanh = torch.compile(generator.pre_tanh, dynamic=False)
            self._judge = torch.compile(discriminator, dynamic=False)

    def generator(self, z: Tensor, noise: Sequence[Tensor] | None) -> tuple[float, Tensor]:
        """Loss and images, made before the update."""
        self._train(self.G)
        self.opt_g.zero_grad()
        with self._cast(z):
            images = torch.tanh(self._pre_tanh(z, None, noise))
            logits = self._judge(images)
        loss = _loss(logits, 1.0)
        loss.backward()
        self.opt_g.step()
        return loss.item(), images.detach()

    @torch.no_grad()
    def average(self) -> None:
        """Every parameter by itself."""
        mean = dict(self.averaged.named_parameters())
        for name, parameter in self.G.named_parameters():
            mean[name].copy_(DECAY * mean[name] + (1.0 - DECAY) * parameter)

    def discriminator(self, real: Tensor, images: Tensor, penalised: bool = True) -> float:
        """Loss of reals and fakes together, without the penalty."""
        self._train(self.D)
        self.opt_d.zero_grad()
        loss = self.real_pass(real, penalised)
        with self._cast(images):
            logits = self._judge(images.detach().requires_grad_())
        fake = _loss(logits, 0.0)
        fake.backward()
        self.opt_d.step()
        return loss + fake.item()

    def real_pass(self, real: Tensor, penalised: bool = True) -> float:
        """Forward of the reals, backward of their loss and, behind it, penalty and its backward."""
        real = real.detach().requires_grad_()
        with self._cast(real):
            logits = self.D(real) if penalised else self._judge(real)
        loss = _loss(logits, 1.0)
        one_by_one(loss, (lambda: self.reg_param * _squared_gradient(logits, real).mean()) if penalised else None)
        return loss.item()

    def _train(self, network: nn.Module) -> None:
        """Gradients for what is trained of ``network`` and for nothing else."""
        for other, parameters in self._trained.items():
            for parameter in parameters:
                parameter.requires_grad_(other is network)

    def _cast(self, like: Tensor) -> AbstractContextManager:
        return torch.autocast(
            like.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )


def one_by_one(loss: Tensor, penalty: Callable[[], Tensor] | None) -> None:
    """Their order of backward passes over the reals: the loss, its graph kept, and only then the penalty."""
    loss.backward(retain_graph=penalty is not None)
    if penalty is not None:
        penalty().backward()


def _loss(logits: Tensor, target: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.binary_cross_entropy_with_logits(wide, torch.full_like(wide, target))


def _squared_gradient(logits: Tensor, images: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.pow(2).flatten(1).sum(1)
