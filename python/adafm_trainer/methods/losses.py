"""Adversarial losses, gradient penalties and the losses of auxiliary classifiers.

Sources: Goodfellow et al., "Generative Adversarial Nets" (2014), non-saturating form; Mescheder, Geiger and Nowozin,
"Which Training Methods for GANs do actually Converge?" (ICML 2018), equation 9, here without the factor one half, as in
the code of Zhao, Cong and Carin (ICML 2020): ``reg_param = 10`` equals ``gamma = 20`` of the published equation.
Arjovsky, Chintala and Bottou, "Wasserstein GAN" (ICML 2017); Gulrajani et al., "Improved Training of Wasserstein GANs"
(NeurIPS 2017), equation 3 (the weight, 10 there, is the caller's). Lim and Ye, "Geometric GAN" (2017), and Miyato et
al., "Spectral Normalization for GANs" (ICLR 2018), hinge form. Odena, Olah and Shlens, "Conditional Image Synthesis
with Auxiliary Classifier GANs" (ICML 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def hinge_generator_loss(logits: Tensor) -> Tensor:
    """Mean of -D(G(z)) over ``logits [B]``: a float32 (or float64) scalar."""
    return -_wide(logits).mean()


def hinge_real_loss(logits: Tensor) -> Tensor:
    """Mean of relu(1 - D(x)) over ``logits [B]``."""
    return F.relu(1 - _wide(logits)).mean()


def hinge_fake_loss(logits: Tensor) -> Tensor:
    """Mean of relu(1 + D(G(z))) over ``logits [B]``."""
    return F.relu(1 + _wide(logits)).mean()


def wasserstein_generator_loss(scores: Tensor) -> Tensor:
    """Mean of -D(G(z)) over ``scores [B]``: a float32 (or float64) scalar."""
    return -_wide(scores).mean()


def wasserstein_real_loss(scores: Tensor) -> Tensor:
    """Mean of -D(x) over ``scores [B]``."""
    return -_wide(scores).mean()


def wasserstein_fake_loss(scores: Tensor) -> Tensor:
    """Mean of D(G(z)) over ``scores [B]``; with ``wasserstein_real_loss`` the negative of the estimated distance."""
    return _wide(scores).mean()


@dataclass(frozen=True)
class Adversarial:
    """The three parts of one adversarial loss, each a mean over logits ``[B]``."""

    generator: Callable[[Tensor], Tensor]
    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]


# By the name that ``models.architecture.Architecture.loss`` uses. The penalty that belongs to wgan-gp is separate.
ADVERSARIAL = {
    "nonsat": Adversarial(generator_loss, real_loss, fake_loss),
    "hinge": Adversarial(hinge_generator_loss, hinge_real_loss, hinge_fake_loss),
    "wgan-gp": Adversarial(wasserstein_generator_loss, wasserstein_real_loss, wasserstein_fake_loss),
}


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Squared norm of the gradient of the summed logits with respect to the images, one value a sample.

    ``logits [B]`` must have been computed from ``images [B, C, H, W]`` with ``images.requires_grad``. The result
    ``[B]`` is differentiable once more (its backward is a double backward of the discriminator). The gradient has the
    type of the step; squares and sums are taken in float32 (float64 for float64).
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return _wide(gradient).square().sum(tuple(range(1, gradient.dim())))


def interpolate(real: Tensor, fake: Tensor, e: Tensor) -> Tensor:
    """``real + e (fake - real)`` with one ``e`` in [0, 1) for each sample: a leaf that requires a gradient.

    ``real`` and ``fake`` are ``[B, ...]`` of one shape, ``e`` holds B values in any shape. Both images are constants
    here: no gradient reaches the generator.

    Raises:
        ValueError: the shapes of the images differ, or ``e`` does not hold one value a sample.
    """
    if real.shape != fake.shape:
        raise ValueError(f"real images have shape {tuple(real.shape)} and made ones {tuple(fake.shape)}; expected one")
    if e.numel() != real.shape[0]:
        raise ValueError(f"e has shape {tuple(e.shape)}; expected one value for each of {real.shape[0]} samples")
    e = e.detach().to(real.dtype).reshape(-1, *[1] * (real.dim() - 1))
    return torch.lerp(real.detach(), fake.detach().to(real.dtype), e).requires_grad_()


def gradient_norm(scores: Tensor, images: Tensor) -> Tensor:
    """Euclidean norm of the gradient of the summed scores with respect to the images, one value a sample, ``[B]``.

    ``scores [B]`` must have been computed from ``images [B, ...]`` with ``images.requires_grad``. Differentiable once
    more. Squares and sums are taken in float32 (float64 for float64). Where scores or gradient are of a narrower type,
    the norm is ``sqrt(s + 1e-12)``; elsewhere it is exact, and its derivative where it is zero is taken to be zero.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    dims = tuple(range(1, gradient.dim()))
    if _is_narrow(scores) or _is_narrow(gradient):
        return (gradient.float().square().sum(dims) + 1e-12).sqrt()
    return torch.linalg.vector_norm(gradient, dim=dims)


def gradient_norm_penalty(scores: Tensor, images: Tensor, *, one_sided: bool = False, scale: float = 1.0) -> Tensor:
    """``(scale * n - 1)^2`` for the norms n of ``gradient_norm``, one value a sample, ``[B]``.

    Args:
        images: of ``interpolate``.
        one_sided: norms below 1 are not penalised.
        scale: images that the method's authors had in a range ``scale`` times narrower have gradients ``scale`` times
            larger: 2 for a critic published for images in [0, 1] that here takes them in [-1, 1].
    """
    excess = scale * gradient_norm(scores, images) - 1
    return (F.relu(excess) if one_sided else excess).square()


def class_loss(class_logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy of ``class_logits [B, n]`` against labels ``y [B]``: the auxiliary classifier's loss.

    The critic's loss takes it of real images, the generator's of made ones with the labels they were made for.
    """
    return F.cross_entropy(_wide(class_logits), y)


def saturation_penalty(pre_tanh: Tensor, limit: float) -> Tensor:
    """Mean of relu(|v| - limit)^2 over the generator's output before tanh.

    White paper drives tanh into saturation, where its gradient vanishes and a generator that has once turned white
    stays white. The penalty keeps the pre-image within reach; it is zero for every value inside ``[-limit, limit]``.
    """
    return F.relu(_wide(pre_tanh).abs() - limit).square().mean()


def _is_narrow(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
