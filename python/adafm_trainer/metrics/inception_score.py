"""Inception score: how sure a classifier is of each image, and how evenly the images spread over its classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SPLITS = 10


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation (divisor ``splits``) of the score over ``splits`` equal runs of images."""

    mean: float
    std: float
    splits: int


def inception_score(probabilities: torch.Tensor, splits: int = SPLITS) -> InceptionScore:
    """``exp(mean_x KL(p(y|x) || p(y)))`` in each split, p(y) the mean over that split (Salimans et al. 2016).

    ``probabilities`` float64 ``[n, classes]``, rows of sum 1; split k holds rows ``k n // splits`` to
    ``(k + 1) n // splits``. A class of probability 0 adds 0. The score lies between 1 and the number of classes, and
    of fewer images than classes it says little. The images' order matters, as the splits do.

    Raises TypeError or ValueError for other input, or for fewer than ``splits`` images.
    """
    if probabilities.dtype != torch.float64:
        raise TypeError(f"inception_score: probabilities must be float64, got {probabilities.dtype}")
    if probabilities.ndim != 2 or probabilities.shape[1] == 0:
        raise ValueError(f"inception_score: probabilities must be [n, classes], got {tuple(probabilities.shape)}")
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"inception_score: {splits} splits of {len(probabilities)} images; give 1 to that many")
    if not bool((probabilities >= 0).all()) or float((probabilities.sum(dim=1) - 1).abs().max()) > 1e-4:
        raise ValueError("inception_score: every row of probabilities must be non-negative with sum 1")
    scores, n = [], len(probabilities)
    for k in range(splits):
        part = probabilities[k * n // splits : (k + 1) * n // splits]
        mean = part.mean(dim=0)
        entropies = torch.special.entr(part).sum(dim=1)
        # mean KL = H(mean) - mean H.
        scores.append(torch.exp(torch.special.entr(mean).sum() - entropies.mean()))
    values = torch.stack(scores)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)), splits)
