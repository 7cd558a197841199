"""Layers of the AdaFM target generator's new head (Zhao, Cong and Carin, ICML 2020, released code).

AdaIN and small_H follow the reference's gradient rule, which is not the derivative of the computed value: finite
differences disagree with them by design. Everything but the convolutions is computed in the parameters' own dtype
(float32), also under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import lrelu

EPS = 1e-5


class PixelNorm(nn.Module):
    """``z / sqrt(mean(z^2) + 1e-8)`` over the features: ``[B, N] -> [B, N]``."""

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)


class StyleLinear(nn.Module):
    """Linear layer with weights N(0, 0.1^2) and bias 0: ``[B, fin] -> [B, fout]``."""

    def __init__(self, fin: int, fout: int) -> None:
        super().__init__()
        self.linear = nn.Linear(fin, fout)
        nn.init.normal_(self.linear.weight, std=0.1)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class StyleNetwork(nn.Sequential):
    """Style vector from the latent, ``[B, z_dim] -> [B, style_dim]``: pixel norm, 8 linear layers with leaky ReLU."""

    def __init__(self, z_dim: int, style_dim: int) -> None:
        layers: list[nn.Module] = [PixelNorm()]
        for i in range(8):
            layers += [StyleLinear(style_dim if i else z_dim, style_dim), nn.LeakyReLU(0.2)]
        super().__init__(*layers)


class NoiseInjection(nn.Module):
    """``x + weight * noise``: ``x [B, C, H, W]``, one map ``noise [B, 1, H, W]`` shared by all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(1, channels, 1, 1))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return x + self.weight * noise


class AdaIN(nn.Module):
    """Adaptive instance norm ``gamma * n + beta``: n is x normalised per sample and channel, the style gives the rest.

    ``x [B, C, H, W]``, ``style [B, style_dim]``; biased variance, eps 1e-5. The gradient into n takes gamma clamped to
    [-1, 1]; those into gamma and beta are the ordinary ones. Any order of differentiation under that rule.
    """

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        self.style = StyleLinear(style_dim, 2 * channels)
        with torch.no_grad():
            self.style.linear.bias[:channels] = 1.0

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x, style = x.to(self.style.linear.weight.dtype), style.to(self.style.linear.weight.dtype)
            gamma, beta = self.style(style)[:, :, None, None].chunk(2, 1)
            variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
            n = (x - mean) * torch.rsqrt(variance + EPS)
            limited = gamma.clamp(-1.0, 1.0)
            return limited * n + n.detach() * (gamma - limited) + beta


class HeadConv(nn.Module):
    """3x3 convolution that keeps side and width, bias starting at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class StyleBlock(nn.Module):
    """Residual block that doubles the side: ``[B, C, H, W] -> [B, C, 2H, 2W]``.

    The shortcut is a 4x4 transposed convolution of stride 2; the branch a second one and a 3x3 convolution, each after
    a leaky ReLU and followed by noise and AdaIN. ``noise`` holds the two maps ``[B, 1, 2H, 2W]`` in order of use.
    """

    def __init__(self, channels: int, style_dim: int) -> None:
        super().__init__()
        self.conv_s = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False)
        self.conv_0 = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.conv_1 = HeadConv(channels)
        self.noise_0, self.noise_1 = NoiseInjection(channels), NoiseInjection(channels)
        self.adain_0, self.adain_1 = AdaIN(channels, style_dim), AdaIN(channels, style_dim)

    def forward(self, x: Tensor, style: Tensor, noise: tuple[Tensor, Tensor]) -> Tensor:
        dx = self.adain_0(self.noise_0(self.conv_0(lrelu(x)), noise[0]), style)
        dx = self.adain_1(self.noise_1(self.conv_1(lrelu(dx)), noise[1]), style)
        return torch.add(self.conv_s(x), dx, alpha=0.1)


class SmallH(nn.Module):
    """Rescaling of the head's output to the source's magnitude: ``[B, C, side, side]`` to the same shape.

    With n = LayerNorm over the two spatial dimensions (eps 1e-5; affine ``norm`` shared by all channels):

    - reference: ``0.01 * n + stopgrad(n) * weight + beta``, weight N(1000, 1), beta N(0, 1). The value is
      ``(weight + 0.01) * n + beta``, the gradient into n (and ``norm``) 0.01 times the incoming one.
    - calibrated: ``n * weight + beta`` with its ordinary gradient; weight 1, beta 0 until they are set from the source.

    Always computed outside autocast, because values near 1000 lose their fraction in bfloat16.
    """

    def __init__(self, channels: int, side: int, *, calibrated: bool) -> None:
        super().__init__()
        self.calibrated = calibrated
        self.norm = nn.LayerNorm((side, side), eps=EPS)
        shape = (1, channels, 1, 1)
        self.weight = nn.Parameter(torch.ones(shape) if calibrated else 1000.0 + torch.randn(shape))
        self.beta = nn.Parameter(torch.zeros(shape) if calibrated else torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            n = F.layer_norm(
                x.to(self.weight.dtype), self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps
            )
            if self.calibrated:
                return n * self.weight + self.beta
            return 0.01 * n + n.detach() * self.weight + self.beta
