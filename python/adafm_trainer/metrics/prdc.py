"""Precision, recall, density and coverage by nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adafm_trainer.metrics.distances import check_features, distances, kth_neighbour

PRECISION_K = 3
DENSITY_K = 5
_BLOCK = 2048


@dataclass(frozen=True)
class PRDC:
    """The four values, and the numbers of neighbours they were taken with."""

    precision: float
    recall: float
    density: float
    coverage: float
    precision_k: int
    recall_k: int
    density_k: int


def neighbours(wanted: int, n: int) -> int:
    """Number of neighbours used for a set of n images: ``wanted``, or n - 2 for a smaller set. n must be at least 3."""
    return min(wanted, n - 2)


def prdc(fake: torch.Tensor, real: torch.Tensor) -> PRDC:
    """Precision and recall with k = 3 and ``<=`` (Kynkaanniemi et al. 2019), density and coverage with k = 5 and ``<``
    (Naeem et al. 2020), from float64 features ``[n, d]`` and ``[m, d]`` with n, m >= 3.

    The ball of an image reaches to its k-th nearest neighbour in its own set, itself not counted. Precision: share of
    fakes in the ball of any real; recall: share of reals in the ball of any fake. Density: balls of reals that a fake
    lies in, over k, averaged over fakes; it may exceed 1. Coverage: share of reals whose ball holds a fake.
    A set of fewer than k + 2 images uses n - 2 neighbours; the numbers used are in the result.
    """
    check_features(fake, real, least=3, what="prdc")
    precision_k, recall_k = neighbours(PRECISION_K, len(real)), neighbours(PRECISION_K, len(fake))
    density_k = neighbours(DENSITY_K, len(real))
    real_radius, fake_radius = kth_neighbour(real, precision_k), kth_neighbour(fake, recall_k)
    density_radius = kth_neighbour(real, density_k)

    precise, hits = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(fake), _BLOCK):
        block = distances(fake[start : start + _BLOCK], real)
        precise += int((block <= real_radius).any(dim=1).sum())
        recalled |= (block <= fake_radius[start : start + _BLOCK, None]).any(dim=0)
        inside = block < density_radius
        hits += int(inside.sum())
        covered |= inside.any(dim=0)
    return PRDC(
        precision=precise / len(fake),
        recall=float(recalled.double().mean()),
        density=hits / (density_k * len(fake)),
        coverage=float(covered.double().mean()),
        precision_k=precision_k,
        recall_k=recall_k,
        density_k=density_k,
    )
