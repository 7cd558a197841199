"""Adversarial losses and the gradient penalty of the non-saturating GAN with R1.

Sources: Goodfellow et al., "Generative Adversarial Nets" (2014), non-saturating form; Mescheder, Geiger and Nowozin,
"Which Training Methods for GANs do actually Converge?" (ICML 2018), equation 9, here without the factor one half, as in
the code of Zhao, Cong and Carin (ICML 2020): ``reg_param = 10`` equals ``gamma = 20`` of the published equation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def generator_loss(logits: Tensor) -> Tensor:
    """Mean of softplus(-D(G(z))) over ``logits [B]``: a float32 (or float64) scalar."""
    return F.softplus(-_wide(logits)).mean()


def real_loss(logits: Tensor) -> Tensor:
    """Mean of softplus(-D(x)) over ``logits [B]``."""
    return F.softplus(-_wide(logits)).mean()


def fake_loss(logits: Tensor) -> Tensor:
    """Mean of softplus(D(G(z))) over ``logits [B]``."""
    return F.softplus(_wide(logits)).mean()


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Squared norm of the gradient of the summed logits with respect to the images, one value a sample.

    ``logits [B]`` must have been computed from ``images [B, C, H, W]`` with ``images.requires_grad``. The result
    ``[B]`` is differentiable once more (its backward is a double backward of the discriminator). The gradient has the
    type of the step; squares and sums are taken in float32 (float64 for float64).
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return _wide(gradient).square().sum(tuple(range(1, gradient.dim())))


def saturation_penalty(pre_tanh: Tensor, limit: float) -> Tensor:
    """Mean of relu(|v| - limit)^2 over the generator's output before tanh.

    White paper drives tanh into saturation, where its gradient vanishes and a generator that has once turned white
    stays white. The penalty keeps the pre-image within reach; it is zero for every value inside ``[-limit, limit]``.
    """
    return F.relu(_wide(pre_tanh).abs() - limit).square().mean()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
