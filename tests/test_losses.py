"""Adversarial losses, gradient penalties, classifier losses and TensorFlow's epsilon."""

from __future__ import annotations

import math

import pytest
import torch
from adafm_trainer.methods.losses import (
    ADVERSARIAL,
    class_loss,
    gradient_norm,
    gradient_norm_penalty,
    gradient_penalty,
    interpolate,
)
from adafm_trainer.methods.tf_adam import tf_epsilon
from torch import Tensor, nn

LOGITS = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])


@pytest.mark.parametrize(
    ("name", "generator", "real", "fake"),
    [
        ("hinge", -0.3, (3 + 1.5 + 1 + 0 + 0) / 5, (0 + 0.5 + 1 + 2 + 4) / 5),
        ("wgan-gp", -0.3, -0.3, 0.3),
        (
            "nonsat",
            sum(math.log1p(math.exp(-x)) for x in LOGITS.tolist()) / 5,
            sum(math.log1p(math.exp(-x)) for x in LOGITS.tolist()) / 5,
            sum(math.log1p(math.exp(x)) for x in LOGITS.tolist()) / 5,
        ),
    ],
)
def test_values(name: str, generator: float, real: float, fake: float) -> None:
    loss = ADVERSARIAL[name]
    for part, expected in ((loss.generator, generator), (loss.real, real), (loss.fake, fake)):
        assert part(LOGITS).item() == pytest.approx(expected, rel=1e-6)
        assert part(LOGITS.bfloat16()).dtype == torch.float32
        assert part(LOGITS.double()).dtype == torch.float64


def test_interpolates_lie_between_and_are_leaves() -> None:
    real, fake = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2, requires_grad=True)
    e = torch.tensor([0.25, 0.5, 0.75])
    between = interpolate(real, 2 * fake, e[:, None])
    assert between.is_leaf and between.requires_grad
    assert torch.equal(between[:, 0, 0, 0], 2 * e)
    gradient_norm(between.square().sum((1, 2, 3)), between).sum().backward()
    assert fake.grad is None
    with pytest.raises(ValueError, match=r"\(3, 1, 2, 2\) and made ones \(2, 1, 2, 2\)"):
        interpolate(real, fake[:2], e)
    with pytest.raises(ValueError, match=r"e has shape \(2,\); expected one value for each of 3 samples"):
        interpolate(real, fake, e[:2])


def test_the_norm_of_a_linear_critic_is_that_of_its_weights() -> None:
    w = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    norms = gradient_norm((w * x).sum(1), x)
    torch.testing.assert_close(norms, torch.tensor([5.0, 0.5, 1.0], dtype=torch.float64), rtol=1e-15, atol=0)
    penalty = gradient_norm_penalty((w * x).sum(1), x)
    torch.testing.assert_close(penalty, torch.tensor([16.0, 0.25, 0.0], dtype=torch.float64))
    one_sided = gradient_norm_penalty((w * x).sum(1), x, one_sided=True)
    torch.testing.assert_close(one_sided, torch.tensor([16.0, 0.0, 0.0], dtype=torch.float64))
    scaled = gradient_norm_penalty((w * x).sum(1), x, scale=2)
    torch.testing.assert_close(scaled, torch.tensor([81.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(gradient_penalty((w * x).sum(1), x), norms.square())
    # d (|w| - 1)^2 / dw = 2 (|w| - 1) w / |w|
    (found,) = torch.autograd.grad(penalty.sum(), w)
    torch.testing.assert_close(found, 2 * (norms - 1)[:, None] * w.detach() / norms[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_vanishing_gradient_gives_a_finite_penalty(dtype: torch.dtype) -> None:
    w = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    x = torch.randn(2, 3, dtype=dtype, requires_grad=True)
    penalty = gradient_norm_penalty((w * x).sum(1), x)
    assert penalty.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    torch.testing.assert_close(penalty, torch.ones_like(penalty), atol=1e-5, rtol=0)
    penalty.sum().backward()
    assert w.grad.isfinite().all()


def test_norms_of_narrow_gradients_are_taken_in_float32() -> None:
    w = torch.full((1, 4096), 200.0, dtype=torch.float16, requires_grad=True)
    x = torch.zeros(1, 4096, dtype=torch.float16, requires_grad=True)
    assert gradient_norm((w * x).sum(1), x).item() == pytest.approx(200 * 64)


def test_class_loss_is_the_mean_cross_entropy() -> None:
    logits, y = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1])
    assert class_loss(logits, y).item() == pytest.approx((math.log(2) + math.log1p(math.exp(-2))) / 2)
    assert class_loss(logits.bfloat16(), y).dtype == torch.float32


def tf_adam(theta: Tensor, gradients: list[Tensor], lr: float, betas: tuple[float, float], epsilon: float) -> Tensor:
    m = v = torch.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        rate = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        theta = theta - rate * m / (v.sqrt() + epsilon)
    return theta


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.5, 0.999)])
def test_tensorflow_epsilon(betas: tuple[float, float]) -> None:
    torch.manual_seed(0)
    start = torch.randn(7, dtype=torch.float64)
    gradients = [torch.randn(7, dtype=torch.float64) * 10.0 ** -torch.arange(7) for _ in range(6)]
    theta = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([theta], lr=0.01, betas=betas, eps=1e-3, fused=True)
    for step, gradient in enumerate(gradients, 1):
        if step == 4:
            # What is kept of the epsilon survives a resume.
            state = optimizer.state_dict()
            optimizer = torch.optim.Adam([theta], lr=0.01, betas=betas, eps=1e-3, fused=True)
            optimizer.load_state_dict(state)
        tf_epsilon(optimizer.param_groups[0], step)
        theta.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(theta.detach(), tf_adam(start, gradients, 0.01, betas, 1e-3), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="step is 0; an optimizer's first step is 1"):
        tf_epsilon(optimizer.param_groups[0], 0)
