"""How close samples come to the training images: the guard against memorisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adafm_trainer.metrics.distances import BLOCK, check_features, distances, kth_neighbour

QUANTILE = 0.05


@dataclass(frozen=True)
class Nearest:
    """What ``nearest_training`` found.

    share: share of samples at most ``threshold`` from a training image; threshold: 5th percentile of the distances
    from each training image to the nearest other one; largest_share: the largest share of samples that have one and
    the same nearest training image; indices int64 ``[n]`` and distances float64 ``[n]``: the nearest training image of
    each sample.
    """

    share: float
    threshold: float
    largest_share: float
    indices: torch.Tensor
    distances: torch.Tensor


def nearest_training_images(fake: torch.Tensor, train: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest training image of each sample: ``[n, d]``, ``[m, d]`` -> indices int64 ``[n]``, distances ``[n]``."""
    check_features(fake, train, what="nearest_training_images")
    nearest = [distances(part, train).min(dim=1) for part in fake.split(BLOCK)]
    return torch.cat([part.indices for part in nearest]), torch.cat([part.values for part in nearest])


def nearest_training(fake: torch.Tensor, train: torch.Tensor) -> Nearest:
    """Compares samples with training images: float64 features ``[n, d]`` and ``[m, d]``, n >= 1, m >= 2.

    A set as far from the training images as they are from each other has a share of about 0.05. A much higher share
    says copies; a high ``largest_share`` says one picture over and over.
    """
    check_features(train, least=2, what="nearest_training (training images)")
    threshold = float(torch.quantile(kth_neighbour(train, 1), QUANTILE))
    indices, values = nearest_training_images(fake, train)
    return Nearest(
        share=float((values <= threshold).double().mean()),
        threshold=threshold,
        largest_share=int(torch.bincount(indices).max()) / len(indices),
        indices=indices,
        distances=values,
    )
