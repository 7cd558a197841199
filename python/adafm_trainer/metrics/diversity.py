"""How different the images of one set are from each other."""

from __future__ import annotations

import torch

from adafm_trainer.metrics.distances import BLOCK, check_features, distances


def diversity(x: torch.Tensor) -> float:
    """Mean Euclidean distance over all pairs of different rows: float64 features ``[n, d]``, n >= 2.

    0 for one picture repeated; compare with the value of the real set under the same extractor.
    """
    check_features(x, least=2, what="diversity")
    total = sum(float(distances(part, x).sum()) for part in x.split(BLOCK))
    return total / (len(x) * (len(x) - 1))


def mean_variance(x: torch.Tensor) -> float:
    """Mean over the dimensions of the unbiased variance over the images: float64 features ``[n, d]``, n >= 2.

    The "mean variance" (MV) that Noguchi and Harada (ICCV 2019) report beside KMMD, whose exact definition is not
    published; d times it is half the mean squared distance of two images.
    """
    check_features(x, least=2, what="mean_variance")
    return float(x.var(dim=0, correction=1).mean())
