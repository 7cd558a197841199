"""Independent Wasserstein critic: a distance that neither the generator nor its own discriminator has been trained on.

Source: Danihelka et al., "Comparison of Maximum Likelihood and GAN-based training of Real NVPs" (2017); the critic's
loss is that of Gulrajani et al., "Improved Training of Wasserstein GANs" (2017), equation 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adafm_trainer import keyed
from adafm_trainer.metrics.value import MetricValue

PENALTY = 10.0
LEARNING_RATE, BETAS = 1e-4, (0.0, 0.9)
BATCH = 64
LEAST = 4
_Z95 = 1.959963984540054


def independent_wasserstein(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    *,
    steps: int,
    seed: int,
    device: torch.device | str = "cpu",
    batch: int = BATCH,
) -> dict[str, MetricValue]:
    """Trains ``critic`` to tell reals from samples and measures with it what it has not been trained on.

    ``real`` (images the generator has not seen) and ``fake`` (samples of the frozen generator) are float
    ``[N, C, H, W]`` in [-1, 1], at least 4 each; ``critic`` maps them to one score each, ``[B]``, has fresh weights and
    is trained in place, on ``device``, by ``steps`` steps of Adam under the WGAN-GP loss. Half of each set, chosen by
    ``seed``, trains it; the other half is measured. Batch normalisation in the critic is replaced by layer
    normalisation over channels and places, because the penalty is one of each image alone (Gulrajani et al., section
    4). Same arguments and same weights give the same result.

    Returns ``iw_distance = mean f(real) - mean f(fake)``, 0 where the critic finds no difference, larger the further
    apart, and ``IW = -iw_distance``, the sign that papers print. The interval, 1.96 standard errors of the two means,
    is for this critic: another one, or more steps, finds another distance, so compare equal ``steps`` only.

    Raises:
        TypeError, ValueError: the sets are not floating point, of one shape and large enough, or ``steps`` < 1.
    """
    _check(real, fake, steps, batch)
    replaced = _normalise_layers(critic)
    critic.to(device).train().requires_grad_(True)
    real_train, real_test = _halves(real, seed, "iw/real")
    fake_train, fake_test = _halves(fake, seed, "iw/fake")
    size = min(batch, len(real_train), len(fake_train))
    optimizer = torch.optim.Adam(critic.parameters(), lr=LEARNING_RATE, betas=BETAS)
    for step in range(steps):
        reals = real_train[_rows(len(real_train), size, seed, "iw/batch-real", step)].to(device)
        fakes = fake_train[_rows(len(fake_train), size, seed, "iw/batch-fake", step)].to(device)
        share = keyed.uniform(seed, "iw/mix", step, range(size), (1, 1, 1)).to(device)
        loss = critic(fakes).mean() - critic(reals).mean() + PENALTY * _penalty(critic, reals, fakes, share)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    critic.eval()
    scores = [_scores(critic, part, device, batch) for part in (real_test, fake_test)]
    value = float(scores[0].mean() - scores[1].mean())
    reach = _Z95 * sum(float(s.var()) / len(s) for s in scores) ** 0.5
    note = (
        f"critic trained {steps} steps of {size} on {len(real_train)} real and {len(fake_train)} generated images, "
        f"measured on {len(real_test)} and {len(fake_test)} others"
    ) + ("; batch normalisation replaced by layer normalisation" if replaced else "")
    distance = MetricValue(value, value - reach, value + reach, len(fake_test), len(real_test), note=note)
    return {"iw_distance": distance, "IW": distance.tagged(value=-value, low=-value - reach, high=-value + reach)}


def _normalise_layers(critic: nn.Module) -> int:
    """Put a layer normalisation with the same number of scales in the place of each batch normalisation."""
    found = [(name, m) for name, m in critic.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for name, module in found:
        critic.set_submodule(name, nn.GroupNorm(1, module.num_features, eps=module.eps))
    return len(found)


def _penalty(critic: nn.Module, real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """Mean of ``(|grad f(u)| - 1)^2`` at ``u = share * real + (1 - share) * fake``, one share for each pair."""
    points = (share * real + (1.0 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1.0).square().mean()


@torch.no_grad()
def _scores(critic: nn.Module, images: Tensor, device: torch.device | str, batch: int) -> Tensor:
    return torch.cat([critic(part.to(device)).to("cpu", torch.float64) for part in images.split(batch)])


def _halves(images: Tensor, seed: int, stream: str) -> tuple[Tensor, Tensor]:
    order = torch.from_numpy(keyed.permutation(seed, stream, 0, len(images)))
    half = len(images) // 2
    return images[order[:half]].float(), images[order[half:]].float()


def _rows(n: int, size: int, seed: int, stream: str, step: int) -> Tensor:
    """``size`` of ``n`` rows: each epoch in a new order, the rest of one that fills no batch left out."""
    per_epoch = n // size
    order = keyed.permutation(seed, stream, step // per_epoch, n)
    start = step % per_epoch * size
    return torch.from_numpy(order[start : start + size])


def _check(real: Tensor, fake: Tensor, steps: int, batch: int) -> None:
    for name, images in (("real", real), ("fake", fake)):
        if not images.is_floating_point():
            raise TypeError(f"{name} images must be floating point in [-1, 1], got {images.dtype}")
        if images.ndim != 4 or len(images) < LEAST:
            raise ValueError(
                f"iw_distance trains on half of {name} and measures on the other: it needs [N, C, H, W] with "
                f"N >= {LEAST}, got {tuple(images.shape)}"
            )
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(f"real images are {tuple(real.shape[1:])}, generated ones {tuple(fake.shape[1:])}")
    if steps < 1 or batch < 1:
        raise ValueError(f"steps and batch must be at least 1, got {steps} and {batch}")
